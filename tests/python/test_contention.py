"""Fifty contenders for one name: never two holders, tokens always increase, no update is lost."""

from __future__ import annotations

import asyncio
import mmap
import multiprocessing
import os
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import lease
from conftest import in_thread

CONTENDERS = 50
GRANTS = 8


class Resource:
    """Something that loses updates and sees overlaps unless one at a time uses it: shared by threads, tasks and processes."""

    SHAPE = struct.Struct("<6q")  # inside, count, fence, overlaps, refused, hand-overs between processes

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            self.memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self.last = -1

    def fields(self) -> list[int]:
        return list(self.SHAPE.unpack_from(self.memory))

    def enter(self, token: int) -> list[int]:
        fields = self.fields()
        fields[3] += fields[0] != 0
        fields[0] = os.getpid()
        fields[4] += token <= fields[2]
        fields[5] += self.memory[mmap.PAGESIZE - 4 :] != struct.pack("<i", os.getpid())
        fields[2] = max(fields[2], token)
        self.memory[mmap.PAGESIZE - 4 :] = struct.pack("<i", os.getpid())
        self.SHAPE.pack_into(self.memory, 0, *fields)
        return fields

    def leave(self, seen: list[int]) -> None:
        # Read, and written back after others had the time to come in.
        now = self.fields()
        self.SHAPE.pack_into(self.memory, 0, 0, seen[1] + 1, *now[2:])

    def judge(self, grants: int, hand_overs: int = 0) -> None:
        inside, count, _, overlaps, refused, between = self.fields()
        assert (inside, overlaps, refused) == (0, 0, 0) and count == grants, self.fields()
        assert between >= hand_overs, f"{between} hand-overs between processes"


def contend(manager: lease.Manager, resource: Resource, grants: int = GRANTS) -> int:
    for _ in range(grants):
        with manager.acquire("contended", ttl=15) as held:
            seen = resource.enter(held.token)
            time.sleep(0)
            held.check()
            resource.leave(seen)
    return grants


async def contend_async(manager: lease.AsyncManager, resource: Resource, grants: int = GRANTS) -> int:
    for _ in range(grants):
        async with manager.acquire("contended", ttl=15) as held:
            seen = resource.enter(held.token)
            await asyncio.sleep(0)
            held.check()
            resource.leave(seen)
    return grants


def test_the_judge_sees_what_it_is_for(tmp_path: Path) -> None:
    """Without the lease there are overlaps, or the tests below show nothing."""
    resource = Resource(tmp_path / "resource")

    class Nobody:
        token = 1

        def check(self) -> None:
            pass

        async def __aenter__(self) -> Nobody:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

    class Unlocked:
        def acquire(self, name: str, ttl: float) -> Nobody:
            return Nobody()

    async def main() -> None:
        await asyncio.gather(*(contend_async(Unlocked(), resource) for _ in range(CONTENDERS)))  # type: ignore[arg-type]

    asyncio.run(main())
    with pytest.raises(AssertionError):
        resource.judge(CONTENDERS * GRANTS)
    _, count, _, overlaps, refused, _ = resource.fields()
    assert overlaps > 0 and refused > 0 and count < CONTENDERS * GRANTS


def test_threads(manager: lease.Manager, tmp_path: Path) -> None:
    resource = Resource(tmp_path / "resource")
    joins = [in_thread(lambda: contend(manager, resource)) for _ in range(CONTENDERS)]
    resource.judge(sum(join() for join in joins))


def test_threads_with_managers_of_their_own(file_url: str, tmp_path: Path) -> None:
    resource = Resource(tmp_path / "resource")

    def work() -> int:
        with lease.Manager(file_url) as manager:
            return contend(manager, resource, 3)

    joins = [in_thread(work) for _ in range(CONTENDERS)]
    resource.judge(sum(join() for join in joins))


def test_tasks(run: Callable[[Coroutine[Any, Any, Any]], Any], url: str, tmp_path: Path) -> None:
    resource = Resource(tmp_path / "resource")

    async def main() -> int:
        async with lease.AsyncManager(url) as manager:
            return sum(await asyncio.gather(*(contend_async(manager, resource) for _ in range(CONTENDERS))))

    resource.judge(run(main()))


def process(url: str, path: Path, barrier: Any, use_asyncio: bool) -> None:
    """One of the fifty. Its exit status says that all its grants were good."""
    resource = Resource(path)
    barrier.wait()

    async def main() -> None:
        async with lease.AsyncManager(url) as manager:
            await contend_async(manager, resource)

    if use_asyncio:
        asyncio.run(main())
    else:
        with lease.Manager(url) as manager:
            contend(manager, resource)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_on_one_file(method: str, file_url: str, tmp_path: Path) -> None:
    # A process that imports Python anew takes its time: fewer of them.
    contenders = CONTENDERS if method == "fork" else 8
    resource = Resource(tmp_path / "resource")
    context = multiprocessing.get_context(method)
    barrier = context.Barrier(contenders)
    arguments = [(file_url, tmp_path / "resource", barrier, number % 2 == 0) for number in range(contenders)]
    processes = [context.Process(target=process, args=each) for each in arguments]
    # Open while they are forked, and with a lease held, which is none of theirs.
    with lease.Manager(file_url) as manager, manager.acquire("of the parent") as held:
        for each in processes:
            each.start()
        for each in processes:
            each.join(120)
        held.confirm()
        assert [each.exitcode for each in processes] == [0] * contenders
        assert manager.inspect("contended") is None
    resource.judge(contenders * GRANTS, hand_overs=contenders)


def test_a_killed_holder_is_followed(file_url: str) -> None:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def hold() -> None:
        held = lease.Manager(file_url, ttl=0.3).acquire("nightly")
        theirs.send(held.token)
        threading.Event().wait()

    child = context.Process(target=hold)
    child.start()
    token = ours.recv()
    child.kill()
    with lease.Manager(file_url) as manager, manager.acquire("nightly", timeout=60) as held:
        assert held.token > token
    child.join()
