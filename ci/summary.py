#!/usr/bin/env python3
"""Adds up the `test result:` lines, and pytest's closing lines, of the log of `make test` that is named or comes on standard input.

A line `== tests: …` in the log begins a run. Prints what each run counted, and at the end, alone on its line,
`N passed, N failed, N skipped`; skipped are the tests marked `#[ignore]`. Fails when a test failed, when there was no
run, and when a run ran no test.
"""

import fileinput
import re
import sys

RUN = re.compile(r"== tests: (.*)")
# The closing line of pytest.
PYTEST = re.compile(r"(?:=+ )?((?:\d+ \w+(?:, )?)+) in [\d.]+s\b")
RESULT = re.compile(r"test result: \S+ (\d+) passed; (\d+) failed; (\d+) ignored;")


def text(counts):
    return "{} passed, {} failed, {} skipped".format(*counts)


runs = []
for line in fileinput.input(encoding="utf-8", errors="replace"):
    # Colours, when the terminal had them.
    line = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
    if run := RUN.fullmatch(line):
        runs.append((run[1], [0, 0, 0]))
    elif result := RESULT.match(line):
        if not runs:
            runs.append(("before the first run", [0, 0, 0]))
        for at, number in enumerate(result.groups()):
            runs[-1][1][at] += int(number)
    elif closing := PYTEST.match(line):
        for number, what in re.findall(r"(\d+) (\w+)", closing[1]):
            # Warnings are failures, or were shown; what was deselected was asked to be.
            at = {"passed": 0, "failed": 1, "error": 1, "errors": 1, "skipped": 2, "xfailed": 2, "xpassed": 1}.get(what)
            if at is not None:
                runs[-1][1][at] += int(number)

for name, counts in runs:
    print(f"{name}: {text(counts)}")
    if counts[0] + counts[1] == 0:
        print(f"{name}: no test ran", file=sys.stderr)
total = [sum(column) for column in zip(*(counts for _, counts in runs))] or [0, 0, 0]
sys.stderr.flush()
print(text(total), flush=True)
sys.exit(total[1] > 0 or not runs or any(counts[0] + counts[1] == 0 for _, counts in runs))
