"""Contenders in Python for a name that those of other languages want too: see test_across.py.

worker.py work|unlocked URL DIRECTORY GRANTS CONTENDERS
worker.py hold URL DIRECTORY
"""

from __future__ import annotations

import asyncio
import itertools
import os
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Self

import lease

NAME = "across"
PATIENCE = 60.0
A_MOMENT = 0.0002
"""Between reading and writing: here another comes in between, if another can."""


def now() -> int:
    """The clock of all journals."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def say(*words: object) -> None:
    print(*words, flush=True)


def say_lost(error: lease.LeaseLost) -> None:
    assert error.reason is not None
    say("lost", error.reason.value)


def fail(failure: threading.ExceptHookArgs) -> None:
    """The process ends at once with a thread that fails: who waits for it would wait for nothing."""
    threading.__excepthook__(failure)
    os._exit(1)


class Journal:
    """Who held when, as the holders saw it."""

    def __init__(self, directory: Path) -> None:
        self.file = os.open(directory / f"{os.getpid()}.journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def grant(self, contender: int, token: int, asked: int) -> None:
        self._line(f"grant {os.getpid()} {contender} {token} {asked} {now()}\n")

    def end(self, token: int, at: int, end: str) -> None:
        self._line(f"end {os.getpid()} {token} {at} {end}\n")

    def _line(self, line: str) -> None:
        # One write a line: appended whole.
        assert os.write(self.file, line.encode()) == len(line)


class Resource:
    """A count and the newest token. Nothing but the lease keeps it from losing updates."""

    SHAPE = struct.Struct("<2q")

    def __init__(self, directory: Path) -> None:
        self.file = os.open(directory / "resource", os.O_RDWR)

    def read(self, token: int) -> int | None:
        """The count; ``None``: refused, because a newer token has written."""
        count, fence = self.SHAPE.unpack(os.pread(self.file, self.SHAPE.size, 0))
        return None if token < fence else count

    def write(self, count: int, token: int) -> None:
        assert os.pwrite(self.file, self.SHAPE.pack(count, token), 0) == self.SHAPE.size

    def count_one(self, token: int) -> bool:
        count = self.read(token)
        if count is None:
            return False
        time.sleep(A_MOMENT)
        self.write(count + 1, token)
        return True

    async def count_one_async(self, token: int) -> bool:
        count = self.read(token)
        if count is None:
            return False
        await asyncio.sleep(A_MOMENT)
        self.write(count + 1, token)
        return True


class Unlocked:
    """Takes no lease, and makes up its tokens: manager and lease in one."""

    made_up = itertools.count(1)

    def __init__(self, token: int = 0) -> None:
        self.token = token

    def acquire(self, name: str, timeout: float) -> Unlocked:
        return Unlocked(next(self.made_up))

    def check(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


class Work:
    """Takes so many grants a contender, and more until our standard input ends."""

    def __init__(self, directory: Path, grants: int) -> None:
        self.journal, self.resource, self.grants = Journal(directory), Resource(directory), grants
        self.over = threading.Event()
        self.counting = threading.Lock()
        self.granted = self.refused = 0

    def count(self, written: bool) -> None:
        with self.counting:
            self.granted += 1
            self.refused += not written

    def contend(self, manager: lease.Manager | Unlocked, contender: int) -> None:
        taken = 0
        while taken < self.grants or not self.over.is_set():
            asked = now()
            with manager.acquire(NAME, timeout=PATIENCE) as held:
                self.journal.grant(contender, held.token, asked)
                held.check()
                self.count(self.resource.count_one(held.token))
                self.journal.end(held.token, now(), "Released")
            taken += 1

    async def contend_async(self, manager: lease.AsyncManager | Unlocked, contender: int) -> None:
        taken = 0
        while taken < self.grants or not self.over.is_set():
            asked = now()
            async with manager.acquire(NAME, timeout=PATIENCE) as held:
                self.journal.grant(contender, held.token, asked)
                held.check()
                self.count(await self.resource.count_one_async(held.token))
                self.journal.end(held.token, now(), "Released")
            taken += 1

    def loop(self, url: str | None, contenders: range) -> None:
        asyncio.run(self.tasks(url, contenders))

    async def tasks(self, url: str | None, contenders: range) -> None:
        async with Unlocked() if url is None else lease.AsyncManager(url) as manager, asyncio.TaskGroup() as group:
            for contender in contenders:
                group.create_task(self.contend_async(manager, contender))

    def run(self, url: str | None, contenders: int) -> None:
        """Every second contender is a thread, the others are tasks of one event loop, with a manager of their own."""
        manager = Unlocked() if url is None else lease.Manager(url)
        say("ready")
        sys.stdin.readline()

        threads = [threading.Thread(target=self.contend, args=[manager, at]) for at in range(0, contenders, 2)]
        threads.append(threading.Thread(target=self.loop, args=[url, range(1, contenders, 2)]))
        for thread in threads:
            thread.start()
        while sys.stdin.readline():
            pass
        self.over.set()
        for thread in threads:
            thread.join()
        if isinstance(manager, lease.Manager):
            manager.close()
        say("done", self.granted, self.refused)


def hold(url: str, directory: Path) -> None:
    """Holds, and does what it is told; it may be killed or stopped meanwhile."""
    journal, resource = Journal(directory), Resource(directory)
    with lease.Manager(url) as manager:
        asked = now()
        held = manager.acquire(NAME, timeout=PATIENCE)
        token = held.token
        journal.grant(0, token, asked)
        # Until then at least it may believe without asking anybody. The clock is read first.
        until = now() + int(held.remaining * 1e9)
        assert resource.count_one(token)
        say("holding", token, until)
        while command := sys.stdin.readline().strip():
            if command == "check":
                try:
                    held.check()
                    say("held")
                except lease.LeaseLost as error:
                    journal.end(token, until, "Lost")
                    say_lost(error)
            elif command == "write":
                # What a program does that does not ask: it goes on writing.
                say("written" if resource.count_one(token) else "refused")
            else:
                assert command == "release", command
                if held.is_held:
                    journal.end(token, now(), "Released")
                try:
                    held.release()
                    say("released")
                except lease.LeaseLost as error:
                    say_lost(error)
                break


def main(mode: str, url: str, directory: str, *numbers: str) -> None:
    if mode == "hold":
        hold(url, Path(directory))
    else:
        threading.excepthook = fail
        assert mode in ("work", "unlocked"), mode
        grants, contenders = map(int, numbers)
        Work(Path(directory), grants).run(url if mode == "work" else None, contenders)


main(*sys.argv[1:])
