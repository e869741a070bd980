"""What a lease costs in Python, as ratios to a floor measured in the same run.

    python figures.py

Wants this package and filelock; has rows for redis if the package redis and redis-server are there. Takes about a minute.

A figure alone says more of the machine than of the library. So each row has a floor, or another library that does the
same, the two are measured in turns, and medians are compared. Ratio: measured / floor. A missed aim is printed as such;
the exit status is about whether it could be measured.
"""

import asyncio
import logging
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from datetime import date
from itertools import pairwise
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from timeit import timeit

import filelock

import lease
from lease._lease import _Nothing

try:
    import redis
except ImportError:
    redis = None

NAME = "n"
ROUNDS = 9
PROCESSES, CONTENDED_ROUNDS, CONTENDED_SECONDS = 8, 3, 1.3
TASKS, TASKS_SECONDS = 50, 0.3
WAKE_UPS = 150
# How often those who poll do so, by default, in seconds.
POLL = {"filelock": 0.05, "redis": 0.1, "lease": 0}
# Whatever takes longer than this hangs.
PATIENCE = 60

# Not forked: each begins as a program of its own would.
spawn = multiprocessing.get_context("spawn")
# CLOCK_MONOTONIC, the same in all processes.
now = time.monotonic_ns


def main():
    # Whoever ends this ends what it has started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    # A task that waits for another of its process is warned that leases are not re-entrant. Here that is meant.
    logging.getLogger("lease").setLevel(logging.ERROR)
    print(
        f"Run of {date.today()}: {os.cpu_count()} cores, Linux {platform.release()},"
        f" Python {platform.python_version()}, filelock {filelock.__version__}, redis-py {redis.__version__ if redis else 'not there'}; medians.\n"
    )
    print("| row | floor or other library | its figure | measured | ratio | aim | |\n|---|---|---|---|---|---|---|")
    uncontended()
    contended()
    wake_ups()
    in_asyncio()


# ---------------------------------------------------------------- the rows


def uncontended():
    pair = "with manager.acquire('n'): pass"
    with lease.Manager("memory:") as manager:
        lock = ("with lock: pass", {"lock": threading.Lock()})
        floor, measured = statements(20_000, lock, (pair, {"manager": manager}))
        row("memory: `with manager.acquire(…)`", "`with lock`, a `threading.Lock`", floor, measured, at_most=8)
        with manager.acquire(NAME) as held:
            floor, measured = statements(500_000, ("it.nothing()", {"it": _Nothing()}), ("it.check()", {"it": held}))
        row("`held.check()`", "a method in Rust that does nothing", floor, measured, at_most=2)
    with (
        TemporaryDirectory() as directory,
        raw_commits(f"{directory}/raw.db") as raw,
        lease.Manager(f"sqlite:{directory}/leases.db") as manager,
    ):
        floor, measured = statements(1_000, ("raw()", {"raw": raw}), (pair, {"manager": manager}))
    row("SQLite: `with manager.acquire(…)`", "two raw commits of `sqlite3`", floor, measured, at_most=2)


@contextmanager
def raw_commits(path):
    """A database without a lease manager: a row like that of a claim, one commit that enters, one that leaves."""
    claim = (NAME, 1, bytes(16), 30, 60, 0, 0, "raw.db-bell-0123456789abcdef", "host:12345")
    with closing(sqlite3.connect(path, isolation_level=None)) as sql:
        sql.execute("PRAGMA journal_mode = wal")
        sql.execute("PRAGMA synchronous = normal")
        sql.execute(
            "CREATE TABLE line (name TEXT, token INTEGER, claim BLOB, ttl INTEGER, deadline INTEGER, turn INTEGER,"
            " held_at INTEGER, bell TEXT, owner TEXT, PRIMARY KEY (name, token)) WITHOUT ROWID"
        )

        def both():
            sql.execute("BEGIN IMMEDIATE")
            sql.execute("INSERT INTO line VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", claim)
            sql.execute("COMMIT")
            sql.execute("BEGIN IMMEDIATE")
            sql.execute("DELETE FROM line WHERE name = ? AND token = ?", claim[:2])
            sql.execute("COMMIT")

        yield both


def contended():
    with TemporaryDirectory() as directory, ExitStack() as stack:

        def crowd(kind):
            pipes = [stack.enter_context(worker(contender, kind, directory)) for _ in range(PROCESSES)]
            return [pipe for pipe in pipes if heard(pipe) == "ready"]

        files, leases = crowd("filelock"), crowd("lease")
        floor, measured = in_turns(CONTENDED_ROUNDS, lambda: owner_changes(files), lambda: owner_changes(leases))
    row(f"SQLite: {PROCESSES} processes, owner changes/s", "`filelock`", floor, measured, at_least=20, show=rate)


def owner_changes(crowd):
    """How many there are in a second, from one process to another."""
    until = now() + int(CONTENDED_SECONDS * 1e9)
    for pipe in crowd:
        pipe.send(until)
    holdings = sorted((*holding, one) for one, pipe in enumerate(crowd) for holding in heard(pipe))
    if any(ended > granted for (_, ended, _), (granted, _, _) in pairwise(holdings)):
        raise RuntimeError("two had it at once: the figures of a broken lock are worth nothing")
    changes = sum(one != other for (_, _, one), (_, _, other) in pairwise(holdings))
    return changes / ((holdings[-1][0] - holdings[0][0]) / 1e9)


def wake_ups():
    """From the call of ``release`` to the return of ``acquire`` in another process that waited."""
    with TemporaryDirectory() as directory, ExitStack() as stack:
        places = {"lease": directory, "filelock": directory}
        missing = "redis" if redis is None else "redis-server" if shutil.which("redis-server") is None else None
        if missing is None:
            places["redis"] = stack.enter_context(redis_server(directory))
        pairs = {}
        for kind, where in places.items():
            pipe = stack.enter_context(worker(waiter, kind, where))
            heard(pipe)
            pairs[kind] = (pipe, *stack.enter_context(opened(kind, where)))
        times = {kind: [] for kind in pairs}
        for at in random.sample(range(WAKE_UPS), WAKE_UPS):
            # At random, and evenly spread: else the medians of those who poll are those of few random numbers.
            phase = (at + random.random()) / WAKE_UPS
            for kind, pair in pairs.items():
                times[kind].append(wake_up(kind, phase, *pair))
    p50, p99 = ({kind: quantiles(those, n=100)[at] for kind, those in times.items()} for at in (49, 98))
    what = "SQLite: release called → next returned"
    for kind, title in (("filelock", "`filelock`"), ("redis", "redis-py's `Lock`")):
        if kind in times:
            row(f"{what}, p50", title, p50[kind], p50["lease"], at_most=0.02)
            row("the same, p99", title, p99[kind], p99["lease"])
        else:
            print(f"| {what} | {title} | {missing}: not installed, left out | | | | |")


def wake_up(kind, phase, pipe, acquire, is_awaited):
    release = acquire()
    pipe.send("again")
    # Whoever gives up, or dies, is heard.
    while not is_awaited() and not pipe.poll(0.001):
        pass
    # Long enough for the other's first attempt, and a whole number of times from one to the next.
    time.sleep(0.02 + phase * max(POLL.values()))
    called = now()
    release()
    asked, granted = heard(pipe)
    # Whoever polls has slept at least once, if he waited.
    if called < asked or granted - asked < POLL[kind] * 1e9:
        raise RuntimeError(f"{kind}: the other did not wait: the machine is too busy to measure this")
    return granted - called


def in_asyncio():
    async def of_locks(measure):
        lock = asyncio.Lock()
        return await measure(lambda: lock)

    async def of_leases(measure):
        async with lease.AsyncManager("memory:") as manager:
            return await measure(lambda: manager.acquire(NAME))

    def both(measure):
        return in_turns(ROUNDS, lambda: asyncio.run(of_locks(measure)), lambda: asyncio.run(of_leases(measure)))

    row(f"asyncio, memory: {TASKS} tasks, hand-overs/s", "`asyncio.Lock`", *both(hand_overs), show=rate)
    row("asyncio, memory: `async with manager.acquire(…)`", "`async with` an `asyncio.Lock`", *both(alone))


async def hand_overs(acquire):
    """How many there are in a second between tasks. Each lets the others run while it holds, so that they queue."""
    began = now()
    last, changes = None, 0

    async def contend(me):
        nonlocal last, changes
        while now() < began + TASKS_SECONDS * 1e9:
            async with acquire():
                changes += last != me
                last = me
                await asyncio.sleep(0)

    await asyncio.gather(*(contend(one) for one in range(TASKS)))
    return changes / ((now() - began) / 1e9)


async def alone(acquire, times=5_000):
    began = now()
    for _ in range(times):
        async with acquire():
            pass
    return (now() - began) / times


# ---------------------------------------------------------------- other processes


@contextmanager
def opened(kind, where):
    """How to acquire, which gives how to release, and how to see that somebody waits, where that can be seen."""
    if kind == "lease":
        with lease.Manager(f"sqlite:{where}/leases.db", timeout=PATIENCE) as manager:
            yield lambda: manager.acquire(NAME).release, lambda: manager.inspect(NAME).waiting == 1
    elif kind == "filelock":
        lock = filelock.FileLock(f"{where}/file.lock", timeout=PATIENCE)
        yield lambda: lock.acquire() and lock.release, lambda: True
    else:
        with redis.Redis("127.0.0.1", where) as client:
            lock = client.lock(NAME, timeout=30, blocking_timeout=PATIENCE)
            yield lambda: lock.acquire() and lock.release, lambda: True


def contender(pipe, kind, where):
    """Acquires and releases until the time it is told."""
    with opened(kind, where) as (acquire, _):
        acquire()()
        pipe.send("ready")
        for until in iter(pipe.recv, None):
            holdings = []
            while now() < until:
                release = acquire()
                granted = now()
                holdings.append((granted, now()))
                release()
            pipe.send(holdings)


def waiter(pipe, kind, where):
    with opened(kind, where) as (acquire, _):
        acquire()()
        pipe.send("ready")
        while pipe.recv():
            asked = now()
            release = acquire()
            granted = now()
            release()
            pipe.send((asked, granted))


@contextmanager
def worker(target, *arguments):
    """A process, told and heard through a pipe, that ends when it is told None."""
    pipe, its = spawn.Pipe()
    process = spawn.Process(target=target, args=(its, *arguments), daemon=True)
    process.start()
    its.close()
    try:
        yield pipe
        pipe.send(None)
        process.join(PATIENCE)
        if process.exitcode != 0:
            raise RuntimeError(f"{target.__name__}: exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def heard(pipe):
    if not pipe.poll(2 * PATIENCE):
        raise RuntimeError("a process does not answer")
    return pipe.recv()


@contextmanager
def redis_server(directory):
    """Its port. Keeps nothing."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", directory]
    server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        every = redis.backoff.ConstantBackoff(0.05)
        with redis.Redis("127.0.0.1", port, retry=redis.retry.Retry(every, int(PATIENCE / 0.05))) as client:
            client.ping()
        yield port
    finally:
        server.kill()
        server.wait()


# ---------------------------------------------------------------- how it is measured and shown


def in_turns(rounds, *subjects):
    """The median of each, one round of each in turns."""
    return [median(those) for those in zip(*([subject() for subject in subjects] for _ in range(rounds)), strict=True)]


def statements(times, *statements):
    """What each takes, in nanoseconds, without the loop around it."""

    def timed(statement, names):
        return lambda: timeit(statement, globals=names, number=times) / times * 1e9

    loop, *those = in_turns(ROUNDS, timed("pass", {}), *(timed(*statement) for statement in statements))
    return [time - loop for time in those]


def duration(nanos):
    unit, size = ("ms", 1e6) if nanos >= 1e6 else ("µs", 1e3) if nanos >= 1e3 else ("ns", 1)
    return f"{nanos / size:.3g} {unit}"


def rate(per_second):
    return f"{per_second:,.0f}/s"


def row(what, floor_is, floor, measured, *, at_most=None, at_least=None, show=duration):
    ratio, aim, verdict = measured / floor, "", ""
    if at_most is not None:
        aim, verdict = f"≤ {at_most}", "met" if ratio <= at_most else "missed"
    elif at_least is not None:
        aim, verdict = f"≥ {at_least}", "met" if ratio >= at_least else "missed"
    print(f"| {what} | {floor_is} | {show(floor)} | {show(measured)} | {ratio:.3g} | {aim} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()
