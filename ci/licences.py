#!/usr/bin/env python3
"""May we ship what we depend on?

Reads `cargo metadata` and checks of every third-party crate in Cargo.lock, for any platform and any feature:

1. its licence, an SPDX expression, can be met with the licences of ALLOWED, or with those of ALLOWED_IN_TESTS for a
   crate that does not reach users (only through dev-dependencies);
2. it comes from crates.io, not from git, a path or another registry;
3. among the crates that reach users, none is there in two incompatible versions, unless TWICE says why. Duplicates are printed in any case.

`--self-test` runs the rules on made-up crates, good and bad. Python 3.11 and cargo; nothing else.
"""

import json
import re
import subprocess
import sys

ALLOWED = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
}

# Asks nothing of who only runs it, and what it writes is not under it: cbindgen writes our header.
ALLOWED_IN_TESTS = {"MPL-2.0"}

# Crates that may be there in two incompatible versions, and why.
TWICE = {
    "syn": "runs in the compiler only; the derive macros move to syn 3 one by one",
    "getrandom": "ring 0.17, which is rustls's provider, has not moved on from 0.2",
    "windows-sys": "not built on Linux; ring 0.17 again",
}

CRATES_IO = "registry+https://github.com/rust-lang/crates.io-index"


class Malformed(Exception):
    """Not an SPDX expression."""


def permitted(expression, allowed=frozenset(ALLOWED)):
    """Whether an SPDX expression can be met with these. WITH binds before AND, AND before OR; the old `/` is OR."""
    words = re.findall(r"[()/]|[^\s()/]+", expression)
    words = ["OR" if word == "/" else word for word in words]

    def peek():
        return words[0] if words else None

    def any_of():
        verdict = all_of()
        while peek() == "OR":
            words.pop(0)
            # Not `verdict or all_of()`: the rest must be read, and be well formed, though nothing depends on it.
            other = all_of()
            verdict = verdict or other
        return verdict

    def all_of():
        verdict = one()
        while peek() == "AND":
            words.pop(0)
            other = one()
            verdict = verdict and other
        return verdict

    def one():
        if peek() == "(":
            words.pop(0)
            verdict = any_of()
            if peek() != ")":
                raise Malformed("a parenthesis is not closed")
            words.pop(0)
            return verdict
        licence = identifier()
        if peek() == "WITH":
            words.pop(0)
            licence += f" WITH {identifier()}"
        return licence in allowed

    def identifier():
        if peek() is None:
            raise Malformed("it ends too early")
        word = words.pop(0)
        if word in {"AND", "OR", "WITH", "(", ")"} or not re.fullmatch(r"[A-Za-z0-9.:+-]+", word):
            raise Malformed(f"{word!r} is no licence")
        return word

    verdict = any_of()
    if words:
        raise Malformed(f"{words[0]!r} is one too many")
    return verdict


def line_of_compatibility(version):
    """Versions with the same answer are one to cargo: 1.x.y by 1, 0.3.y by 0.3, 0.0.7 by itself."""
    numbers = version.split("+")[0].split("-")[0].split(".")
    for length, number in enumerate(numbers, start=1):
        if number != "0":
            return ".".join(numbers[:length])
    return version


def shipped(metadata):
    """The ids of the packages that users of the workspace's crates build."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    reached, todo = set(), list(metadata["workspace_members"])
    while todo:
        package = todo.pop()
        if package not in reached:
            reached.add(package)
            todo += [
                dep["pkg"]
                for dep in nodes[package]["deps"]
                if any(kind["kind"] != "dev" for kind in dep["dep_kinds"])
            ]
    return reached


def examine(metadata):
    """What is wrong, and what is worth knowing."""
    wrong, notes = [], []
    members, users = set(metadata["workspace_members"]), shipped(metadata)
    versions = {}
    for package in metadata["packages"]:
        if package["id"] in members:
            continue
        crate, licence = f"{package['name']} {package['version']}", package["license"]
        if package["source"] != CRATES_IO:
            source = package["source"] or "a path outside the workspace"
            wrong.append(f"{crate}: comes from {source}. Depend on a release on crates.io.")
        try:
            if not licence:
                wrong.append(f"{crate}: names no licence. Replace it, or ask its authors for an SPDX expression.")
            elif not permitted(licence, ALLOWED if package["id"] in users else ALLOWED | ALLOWED_IN_TESTS):
                wrong.append(
                    f"{crate}: its licence {licence!r} needs more than ci/licences.py allows. Replace the crate; "
                    "or, if that licence asks nothing of our users that MIT does not, add it to ALLOWED."
                )
        except Malformed as why:
            wrong.append(f"{crate}: its licence {licence!r} is no SPDX expression: {why}. Replace the crate.")
        line = line_of_compatibility(package["version"])
        versions.setdefault(package["name"], {}).setdefault(line, []).append(package["id"] in users)
    for name, lines in sorted(versions.items()):
        if len(lines) < 2:
            continue
        which = " and ".join(sorted(lines))
        if sum(any(reaches) for reaches in lines.values()) < 2:
            notes.append(f"{name} is there as {which}, but reaches users once")
        elif name in TWICE:
            notes.append(f"{name} is there as {which}: {TWICE[name]}")
        else:
            wrong.append(
                f"{name}: is there as {which}. Bring the dependencies to one version (`cargo tree --locked -d` "
                "shows who wants which); or give the reason in TWICE of ci/licences.py."
            )
    return wrong, notes


def self_test():
    """Each rule on something that keeps it and something that breaks it. Returns what came out wrong."""
    failures = []

    def expect(what, got, wanted):
        if got != wanted:
            failures.append(f"{what}: got {got!r}, wanted {wanted!r}")

    for expression, wanted in [
        ("MIT", True),
        ("MIT OR Apache-2.0", True),
        ("MIT/Apache-2.0", True),
        ("GPL-3.0-only", False),
        ("GPL-3.0-only OR MIT", True),
        ("MIT OR GPL-3.0-only", True),
        ("GPL-3.0-only AND MIT", False),
        ("MIT AND GPL-3.0-only", False),
        ("GPL-3.0-only/MIT", True),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", True),
        ("(MIT OR Apache-2.0) AND GPL-3.0-only", False),
        ("MIT OR Apache-2.0 AND GPL-3.0-only", True),
        ("(MIT OR Apache-2.0 AND ISC) AND GPL-3.0-only", False),
        ("GPL-3.0-only AND MIT OR GPL-2.0-only", False),
        ("Apache-2.0 WITH LLVM-exception OR GPL-3.0-only", True),
        ("Apache-2.0 WITH Some-exception", False),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("Apache-2.0+", False),
        ("MIT OR Apache-2.0 OR LGPL-2.1-or-later", True),
        ("", Malformed),
        ("MIT OR", Malformed),
        ("OR MIT", Malformed),
        ("MIT Apache-2.0", Malformed),
        ("(MIT", Malformed),
        ("MIT)", Malformed),
        ("MIT WITH", Malformed),
        ("MIT OR GPL 3", Malformed),
        ("see LICENSE, please", Malformed),
    ]:
        try:
            got = permitted(expression)
        except Malformed:
            got = Malformed
        expect(f"licence {expression!r}", got, wanted)

    for version, wanted in [("1.2.3", "1"), ("0.3.1", "0.3"), ("0.0.7", "0.0.7"), ("0.11.1+wasi-1", "0.11")]:
        expect(f"version {version}", line_of_compatibility(version), wanted)

    def package(name, version="1.0.0", licence="MIT", source=CRATES_IO):
        return {
            "id": f"{name}@{version}",
            "name": name,
            "version": version,
            "license": licence,
            "source": source,
        }

    def verdict(third_party, dev=()):
        """The crates found wrong when `us` depends on these, and how many notes there are."""
        everything = [*third_party, *dev]
        kinds = [(crate, None) for crate in third_party] + [(crate, "dev") for crate in dev]
        deps = [{"pkg": crate["id"], "dep_kinds": [{"kind": kind, "target": None}]} for crate, kind in kinds]
        us = package("us", licence=None, source=None)
        nodes = [{"id": us["id"], "deps": deps}] + [{"id": crate["id"], "deps": []} for crate in everything]
        metadata = {
            "packages": [us, *everything],
            "workspace_members": [us["id"]],
            "resolve": {"nodes": nodes},
        }
        wrong, notes = examine(metadata)
        return [re.split("[ :]", line)[0] for line in wrong], len(notes)

    twice = next(iter(TWICE))
    for what, got, wanted in [
        ("nothing wrong", verdict([package("good")]), ([], 0)),
        ("a forbidden licence", verdict([package("bad", licence="GPL-3.0-only")]), (["bad"], 0)),
        ("a forbidden licence of a test", verdict([], [package("bad", licence="GPL-3.0-only")]), (["bad"], 0)),
        ("a licence for tests", verdict([package("bad", licence="MPL-2.0")]), (["bad"], 0)),
        ("a licence for tests, of a test", verdict([], [package("good", licence="MPL-2.0")]), ([], 0)),
        ("no licence", verdict([package("bad", licence=None)]), (["bad"], 0)),
        ("a malformed licence", verdict([package("bad", licence="MIT AND")]), (["bad"], 0)),
        ("from git", verdict([package("bad", source="git+https://example.invalid/x")]), (["bad"], 0)),
        ("from a path", verdict([package("bad", source=None)]), (["bad"], 0)),
        ("twice", verdict([package("two"), package("two", "2.0.0")]), (["two"], 0)),
        ("twice below 1.0", verdict([package("two", "0.1.0"), package("two", "0.2.0")]), (["two"], 0)),
        ("twice, in a test", verdict([package("two")], [package("two", "2.0.0")]), ([], 1)),
        ("twice, with a reason", verdict([package(twice), package(twice, "2.0.0")]), ([], 1)),
    ]:
        expect(what, got, wanted)
    return failures


def main(arguments):
    if arguments == ["--self-test"]:
        wrong, notes = self_test(), []
        done = "licences: the check itself works"
    elif arguments:
        sys.exit("usage: ci/licences.py [--self-test]")
    else:
        command = ["cargo", "metadata", "--locked", "--all-features", "--format-version", "1"]
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if answer.returncode != 0:
            sys.exit(f"licences: `{' '.join(command)}` failed: see above")
        metadata = json.loads(answer.stdout)
        wrong, notes = examine(metadata)
        done = f"licences: {len(metadata['packages']) - len(metadata['workspace_members'])} crates, all of them fine"
    for note in notes:
        print(f"licences: note: {note}")
    for line in wrong:
        print(f"licences: {line}", file=sys.stderr)
    if wrong:
        sys.exit(1)
    print(done)


main(sys.argv[1:])
