"""What the tests of the Python package share. They test the installed package, and nothing of the source tree."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

import lease

ROOT = Path(__file__).resolve().parents[2]
assert ROOT not in Path(lease.__file__).resolve().parents or "site-packages" in lease.__file__, (
    f"not the installed package: {lease.__file__}"
)

LIMIT = 60.0
"""For events that are sure to come: whoever waits for longer hangs."""


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("LEASE_"):
            monkeypatch.delenv(name)


@pytest.fixture(params=["memory", "sqlite"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory:" if request.param == "memory" else f"sqlite:{tmp_path}/jobs.db"


@pytest.fixture
def file_url(tmp_path: Path) -> str:
    return f"sqlite:{tmp_path}/jobs.db"


@pytest.fixture
def manager(url: str) -> Iterator[lease.Manager]:
    with lease.Manager(url) as manager:
        yield manager


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    """Runs a coroutine under either event loop; what a task of it raises unseen fails the test."""

    def run(main: Coroutine[Any, Any, Any]) -> Any:
        failures: list[dict[str, Any]] = []

        async def watched() -> Any:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
            return await asyncio.wait_for(main, LIMIT)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop if request.param == "uvloop" else None) as runner:
            result = runner.run(watched())
        assert not failures, failures
        return result

    return run


def python(code: str, *arguments: object, limit: float = LIMIT, **options: Any) -> str:
    """Runs a program, which has to end well. Gives what it printed."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, **options)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert not done.stderr, done.stderr
    return done.stdout


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Starts a program that talks through its standard input and output."""
    command = [sys.executable, "-u", "-c", textwrap.dedent(code), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], says: str = "") -> tuple[str, str, int]:
    """Tells it something, and waits for its end. ``communicate`` would lose what was read ahead."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    with process:
        process.stdin.write(says)
        process.stdin.close()
        return process.stdout.read(), process.stderr.read(), process.wait(LIMIT)


def in_thread(work: Callable[[], object]) -> Callable[[], Any]:
    """Runs it in a thread. What is given back waits for its end, and gives its result or raises its error."""
    outcome: list[Any] = []

    def body() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=body, daemon=True)
    thread.start()

    def join() -> Any:
        thread.join(LIMIT)
        assert outcome, "the thread hangs"
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    return join


def waits(manager: lease.Manager, name: str, count: int = 1) -> None:
    """Returns once so many claims wait behind the holder of a name, which a watch does not tell."""
    pause = threading.Event()
    for _ in range(int(LIMIT / 0.005)):
        record = manager.inspect(name)
        if record is not None and record.waiting >= count:
            return
        pause.wait(0.005)
    raise AssertionError(f"nobody waits for {name}")
