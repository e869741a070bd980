"""The types and the documentation are true."""

from __future__ import annotations

import ast
import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lease
import lease.testing

HERE = Path(__file__).resolve().parent
PACKAGE = Path(lease.__file__).parent

USER = """
import asyncio
from datetime import timedelta
from typing import assert_type

import lease
from lease.testing import CutStore

manager = lease.Manager("memory:", ttl=15, timeout=timedelta(seconds=1))
with manager.acquire("a", ttl=1.5, timeout=None, owner="me", on_wait=lambda waiting: print(waiting.place)) as held:
    assert_type(held, lease.Lease)
    assert_type(held.token, int)
    assert_type(held.remaining, float)
    assert_type(held.end_reason, lease.EndReason | None)
    assert_type(held.is_held, bool)
    assert_type(held.cancelled.wait(1), bool)
assert_type(manager.try_acquire("a"), lease.Lease | None)
assert_type(manager.inspect("a"), lease.Record | None)
for record in manager.watch("a"):
    assert_type(record, lease.Record | None)
    break


@manager.guard("x:{day}")
def strict(day: str) -> int:
    return 1


@manager.guard("x:{day}", timeout=0, if_busy="skip")
def lax(day: str) -> int:
    return 1


@manager.guard("x:{day}", pass_as="held")
def fenced(day: str, held: lease.Lease) -> int:
    return held.token


assert_type(strict("a"), int)
assert_type(lax("a"), int | None)
assert_type(fenced("a"), int)


async def main() -> None:
    async with lease.AsyncManager("memory:", ttl=15) as other:
        async with other.acquire("a", ttl=15, timeout=None) as held:
            assert_type(held, lease.AsyncLease)
            await held.confirm()
        assert_type(await other.acquire("a"), lease.AsyncLease)
        task = asyncio.create_task(other.acquire("a"))
        assert_type(await task, lease.AsyncLease)
        assert_type(await other.try_acquire("a"), lease.AsyncLease | None)
        async for record in other.watch("a"):
            assert_type(record, lease.Record | None)

        @other.guard("x", timeout=0, if_busy="skip")
        async def work() -> int:
            return 1

        assert_type(await work(), int | None)


assert_type(CutStore().manager(ttl=1), lease.Manager)
"""

WRONG = """
import lease

manager = lease.Manager("memory:")
held = manager.acquire("a")
manager.acquire(5)
manager.acquire("a", ttl="15s")
manager.acquire("a", tll=15)
if held.is_held():
    pass
held.token = 5
with manager.acquire("a") as other:
    other.relaese()
lease.AsyncManager("memory:").acquire("a", tll=15)
"""


def check(tool: list[str], source: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "user.py").write_text(source)
    return subprocess.run([sys.executable, "-m", *tool, "user.py"], cwd=tmp_path, capture_output=True, text=True)


MYPY = ["mypy", "--strict", "--no-incremental"]
PYRIGHT = ["pyright", "--pythonpath", sys.executable]


@pytest.mark.parametrize("tool", [MYPY, PYRIGHT], ids=["mypy", "pyright"])
def test_a_users_types_are_checked(tool: list[str], tmp_path: Path) -> None:
    done = check(tool, USER, tmp_path)
    assert done.returncode == 0, done.stdout
    done = check(tool, WRONG, tmp_path)
    lines = {int(line.split(":")[1]) for line in done.stdout.splitlines() if "error" in line and "user.py:" in line}
    assert lines == {6, 7, 8, 9, 11, 13, 14}, done.stdout


def test_the_package_is_typed_throughout() -> None:
    assert (PACKAGE / "py.typed").exists()
    done = subprocess.run([sys.executable, "-m", *MYPY, "-p", "lease"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    done = subprocess.run([sys.executable, "-m", *PYRIGHT, str(PACKAGE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_stubs_are_those_of_the_module() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy.stubtest", "lease"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def stubs() -> list[tuple[str, str, int]]:
    """Every docstring of the stubs: where it is, and what it says."""
    found: list[tuple[str, str, int]] = []

    def walk(node: ast.Module | ast.ClassDef, path: str) -> None:
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
                name = f"{path}.{child.name}".lstrip(".")
                said = ast.get_docstring(child)
                if said:
                    found.append((name, said, child.lineno))
                if isinstance(child, ast.ClassDef):
                    walk(child, name)

    walk(ast.parse((PACKAGE / "_lease.pyi").read_text()), "")
    return found


def test_every_example_runs() -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
    sources = [(name, said, {}) for name, said, _ in stubs()]
    for module in (lease, lease.testing, lease._aio, lease._errors, lease._types):
        assert module.__doc__
        sources.append((module.__name__, module.__doc__, {}))
        for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs={}):
            if test.examples:
                sources.append((test.name, test.docstring or "", {}))
    for name, said, globs in sources:
        runner.run(doctest.DocTestParser().get_doctest(said, globs, name, None, 0))
    assert runner.failures == 0 and runner.tries > 60, runner.summarize(verbose=False)


def test_all_that_is_public_is_documented() -> None:
    documented = {name: said for name, said, _ in stubs()}
    for name in lease.__all__:
        public = getattr(lease, name)
        if not inspect.isclass(public):
            continue
        assert public.__doc__, name
        for each, value in vars(public).items():
            if each.startswith("_") or not (callable(value) or isinstance(value, property) or hasattr(value, "__get__")):
                continue
            if type(value).__name__ in ("member_descriptor",):
                continue
            assert getattr(value, "__doc__", None), f"{name}.{each} has no documentation at run time"
    for name in ("Manager", "Lease", "Fence", "Admitted", "Cancelled", "Watch", "BaseLease", "CutStore"):
        public = getattr(lease._lease, name)
        for each in (word for word in vars(public) if not word.startswith("_")):
            assert inspect.getdoc(getattr(public, each)) == documented[f"{name}.{each}"], f"{name}.{each}"
        assert inspect.getdoc(public) == documented[name]


def test_what_must_have_an_example_has_one() -> None:
    documented = {name: said for name, said, _ in stubs()}
    verbs = ["acquire", "try_acquire", "inspect", "list", "watch", "break_lease", "ping", "close", "guard"]
    for name in [*(f"Manager.{verb}" for verb in verbs), "Lease.confirm", "Lease.release", "Lease.on_lost", "BaseLease.check"]:
        assert ">>> " in documented[name], name
