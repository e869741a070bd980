"""The etcd store, by URL, on real servers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import multiprocessing
import os
import pickle
import select
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_processes import child, worker

import lease
from conftest import LIMIT, in_thread, waits
from etcd_servers import Cluster, frozen
from lease import EndReason
from test_contention import CONTENDERS, Resource, contend, contend_async


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(3) as cluster:
        yield cluster
        assert not cluster.names("t-"), "a test left keys behind"


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """Where the keys of this test are."""
    return f"t-{request.node.name}".translate({ord(letter): "-" for letter in "[] "})


@pytest.fixture
def url(cluster: Cluster, prefix: str) -> str:
    return cluster.url(prefix)


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# ------------------------------------------------------------------------------- the verbs


def test_every_verb(cluster: Cluster, url: str, prefix: str) -> None:
    with lease.Manager(url) as manager, lease.Manager(url, owner="the other") as other:
        manager.ping()
        watch = manager.watch("report/a")
        assert next(watch) is None and manager.inspect("report/a") is None and manager.list() == []
        with other.acquire("report/a", ttl=20) as held:
            for record in (next(watch), manager.inspect("report/a")):
                assert record is not None
                assert (record.token, record.owner, record.ttl, record.waiting) == (held.token, "the other", 20.0, 0)
            assert manager.try_acquire("report/a") is None
            with pytest.raises(lease.AcquireTimeout) as busy:
                manager.acquire("report/a", timeout=0.2)
            assert (busy.value.holder, busy.value.token, busy.value.place) == ("the other", held.token, 1)
            with manager.acquire("report/b") as beside, manager.acquire("reports"):
                assert [each.name for each in manager.list("report/")] == ["report/a", "report/b"]
                assert len(manager.list()) == 3 and beside.token > held.token
                # What somebody's own transaction in etcd may compare.
                (key,) = cluster.keys(f"{prefix}/report%2Fb/")
                assert key["create_revision"] == beside.token
            held.confirm()
            held.check()
        assert next(watch) is None
        broken = other.acquire("report/a")
        record = next(watch)
        assert record is not None and record.token == broken.token > held.token
        with pytest.raises(lease.NotFound):
            manager.break_lease("report/a", held.token)
        assert broken.is_held
        manager.break_lease("report/a", broken.token)
        assert next(watch) is None
        with pytest.raises(lease.LeaseLost) as lost:
            broken.confirm()
        assert lost.value.reason is broken.end_reason is EndReason.GONE
        waiting = in_thread(lambda: other.acquire("handed over", timeout=LIMIT).token)
        assert waiting() > broken.token
    assert cluster.names(prefix) == []


def test_every_verb_of_asyncio(cluster: Cluster, url: str, prefix: str, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
    async def main() -> None:
        async with lease.AsyncManager(url) as manager, lease.AsyncManager(url, owner="the other") as other:
            await manager.ping()
            watch = manager.watch("a")
            assert await anext(watch) is None and await manager.inspect("a") is None and await manager.list() == []
            async with other.acquire("a") as held:
                for record in (await anext(watch), await manager.inspect("a")):
                    assert record is not None and (record.token, record.owner) == (held.token, "the other")
                assert await manager.try_acquire("a") is None
                with pytest.raises(lease.AcquireTimeout) as busy:
                    await manager.acquire("a", timeout=0.2)
                assert busy.value.holder == "the other"
                # One that is cancelled leaves no claim behind.
                impatient = asyncio.ensure_future(anext_lease(manager))
                while not (await other.list())[0].waiting:
                    await asyncio.sleep(0.01)
                impatient.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await impatient
                async with asyncio.timeout(LIMIT):
                    while (await other.list())[0].waiting:
                        await asyncio.sleep(0.01)
                await held.confirm()
                assert [record.name for record in await manager.list("a")] == ["a"]
            assert await anext(watch) is None
            with pytest.raises(lease.LeaseLost) as lost:
                async with other.acquire("a") as broken:
                    await manager.break_lease("a", broken.token)
                    await asyncio.sleep(LIMIT)  # cancelled
            assert lost.value.reason is EndReason.GONE and broken.token > held.token

    async def anext_lease(manager: lease.AsyncManager) -> lease.AsyncLease:
        return await manager.acquire("a")

    run(main())
    assert cluster.names(prefix) == []


def test_fifty_threads_and_fifty_tasks(cluster: Cluster, url: str, prefix: str, tmp_path: Path) -> None:
    resource, grants = Resource(tmp_path / "resource"), 4

    async def tasks() -> int:
        async with lease.AsyncManager(url) as manager:
            return sum(await asyncio.gather(*(contend_async(manager, resource, grants) for _ in range(CONTENDERS))))

    with lease.Manager(url) as manager:
        joins = [in_thread(lambda: contend(manager, resource, grants)) for _ in range(CONTENDERS)]
        joins.append(in_thread(lambda: asyncio.run(tasks())))
        total = sum(join() for join in joins)
    assert total == 2 * CONTENDERS * grants
    resource.judge(total)
    assert cluster.names(prefix) == []


# ------------------------------------------------------------------------------- losses


def test_a_frozen_server_is_told_before_the_ttl() -> None:
    """In every way, and for good."""
    ttl = 4.0
    with Cluster() as alone, lease.Manager(alone.url("frozen"), ttl=ttl) as manager:
        held = manager.acquire("nightly")
        entered = threading.Event()

        async def block() -> float:
            async with lease.AsyncManager(alone.url("frozen"), ttl=ttl) as other:
                with pytest.raises(lease.LeaseLost) as lost:
                    async with other.acquire("of asyncio"):
                        entered.set()
                        await asyncio.sleep(LIMIT)  # cancelled
                assert lost.value.reason is EndReason.UNREACHABLE
                return now()

        in_block = in_thread(lambda: asyncio.run(block()))
        assert entered.wait(LIMIT)
        # Kept by renewals while the server answers.
        assert not held.cancelled.wait(ttl)
        held.check()
        called: list[tuple[EndReason, float]] = []
        heard, pause = threading.Event(), threading.Event()
        held.on_lost(lambda reason: (called.append((reason, now())), heard.set()))

        def checks() -> float:
            while True:
                try:
                    held.check()
                except lease.LeaseLost as error:
                    assert error.reason is EndReason.UNREACHABLE
                    return now()
                pause.wait(0.005)

        with frozen(alone.nodes[0]):
            # The last confirmation was sent half a ttl before this, or later.
            until = now() + held.remaining
            frozen_at = now()
            ways = {
                "cancelled": in_thread(lambda: (held.cancelled.wait(LIMIT), now())[1]),
                "descriptor": in_thread(lambda: (select.select([held], [], [], LIMIT), now())[1]),
                "check": in_thread(checks),
            }
            told = {way: join() for way, join in ways.items()}
            assert heard.wait(LIMIT)
            ((reason, told["callback"]),) = called
            assert reason is held.end_reason is EndReason.UNREACHABLE
            for way, at in told.items():
                assert at < until + ttl / 2, f"{way}: {at - until:.3f} s after half the ttl"
            with pytest.raises(lease.StoreUnavailable):
                manager.ping()
            # That one was confirmed at another instant, before this.
            assert in_block() < frozen_at + ttl * 2 / 3
        assert not held.is_held
        with manager.acquire("nightly", timeout=LIMIT) as after:
            assert after.token > held.token
        with pytest.raises(lease.LeaseLost):
            held.release()
        print({way: f"{at - frozen_at:.3f} s" for way, at in told.items()})


@pytest.mark.parametrize("how", ["etcdctl", "break_lease"])
def test_an_eviction_is_told_within_a_second(how: str, cluster: Cluster, url: str, prefix: str) -> None:
    """A renewal would tell it in twenty. The middle of some tries: the machine may have other things to do."""
    took = []
    with lease.Manager(url, ttl=60) as manager, lease.Manager(url) as operator:
        for _ in range(5):
            held = manager.acquire("nightly")
            if how == "etcdctl":
                (key,) = cluster.names(prefix)
                begun = now()
                assert cluster.ctl("del", key) == "1\n"
            else:
                begun = now()
                operator.break_lease("nightly", held.token)
            assert held.cancelled.wait(LIMIT)
            took.append(now() - begun)
            assert held.end_reason is EndReason.GONE
    print(f"told after {[f'{1000 * each:.0f} ms' for each in took]}")
    assert sorted(took)[2] < 1.0 and max(took) < 10.0, took


# ------------------------------------------------------------------------------- what is wrong


VERBS: dict[str, Callable[[lease.Manager], object]] = {
    "acquire": lambda manager: manager.acquire("nightly"),
    "try_acquire": lambda manager: manager.try_acquire("nightly"),
    "inspect": lambda manager: manager.inspect("nightly"),
    "list": lambda manager: manager.list(),
    "watch": lambda manager: next(manager.watch("nightly")),
    "break_lease": lambda manager: manager.break_lease("nightly", 1),
    "ping": lambda manager: manager.ping(),
}
ASYNC_VERBS: dict[str, Callable[[lease.AsyncManager], Any]] = {
    "acquire": lambda manager: manager.acquire("nightly"),
    "try_acquire": lambda manager: manager.try_acquire("nightly"),
    "inspect": lambda manager: manager.inspect("nightly"),
    "list": lambda manager: manager.list(),
    "watch": lambda manager: anext(manager.watch("nightly")),
    "break_lease": lambda manager: manager.break_lease("nightly", 1),
    "ping": lambda manager: manager.ping(),
}
NOBODY = "127.0.0.1:1"
"""Refuses every connection."""


@pytest.mark.parametrize("host", [NOBODY, "nowhere.invalid", "nowhere.invalid,127.0.0.1:1"])
def test_a_host_that_is_not_there_is_an_error_of_the_first_verb(host: str) -> None:
    manager = lease.Manager(f"etcd://{host}/x", request_timeout=0.5, timeout=0.5)
    for verb, call in VERBS.items():
        with pytest.raises(lease.StoreUnavailable) as error:
            call(manager)
        assert error.value.operation == verb and error.value.retryable, verb
        for each in host.split(","):
            assert each in str(error.value), (verb, str(error.value))
    manager.close()


@pytest.mark.parametrize(
    "wrong",
    [
        "etcd:",
        "etcd:host",
        "etcd:///prefix",
        "etcd://",
        "etcd://h:x",
        "etcd://h:0",
        "etcd://h:70000",
        "etcd://h,,i",
        "etcd://h,h",
        "etcd://[::1",
        "etcd://h/p?tttl=3s",
        "etcd://user@h",
        "etcd://:password@h",
        "etcd://h?ca=/nowhere.pem",
        "etcds://h?ca=/nowhere.pem",
        "etcds://h?cert=/nowhere.pem",
        "etcd+tls://h",
    ],
)
def test_a_wrong_url_is_refused_at_once(wrong: str) -> None:
    for kind in (lease.Manager, lease.AsyncManager):
        with pytest.raises((lease.InvalidArgument, lease.Unsupported)) as error:
            kind(wrong)
        assert isinstance(error.value, lease.InvalidArgument), repr(error.value)


def test_a_ttl_below_two_seconds_is_refused_with_the_minimum(url: str) -> None:
    with pytest.raises(lease.InvalidArgument, match="ttl 1.9s.*at least 2s"):
        lease.Manager(url, ttl=1.9)
    with pytest.raises(lease.InvalidArgument, match="ttl 1.9s.*at least 2s"):
        lease.Manager(f"{url}?ttl=1900ms")
    with lease.Manager(url) as manager:
        for call in (manager.acquire, manager.try_acquire):
            with pytest.raises(lease.InvalidArgument, match="ttl 1.999s.*at least 2s"):
                call("nightly", ttl=1.999)
        with manager.acquire("nightly", ttl=2) as held:
            assert held.ttl == 2.0


# ------------------------------------------------------------------------------- passwords


CANARY = "Kanarien/Vogel:7"
ENCODED = CANARY.replace("/", "%2F").replace(":", "%3A")


class Told:
    """All that is ever said. Fails when a password is in it."""

    def __init__(self, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
        self.caplog, self.capfd, self.texts = caplog, capfd, [""]
        caplog.set_level(logging.DEBUG)
        caplog.set_level(logging.DEBUG, "lease")

    def add(self, *things: object) -> None:
        for thing in things:
            self.texts += [repr(thing), str(thing), f"{thing}"]

    def error(self, error: BaseException) -> None:
        self.texts += traceback.format_exception(error)
        seen: BaseException | None = error
        while seen is not None:
            self.add(seen, seen.args, vars(seen), getattr(seen, "__notes__", None))
            seen = seen.__cause__ or seen.__context__

    def verbs(self, url: str | None, expected: type[lease.LeaseError], patience: float = LIMIT) -> None:
        """Every verb fails so; at once, or when its patience is at an end."""
        with lease.Manager(url, request_timeout=min(patience, 10), timeout=patience) as manager:
            self.add(manager, pickle.loads(pickle.dumps(manager)))
            for verb, call in VERBS.items():
                with pytest.raises(expected) as error:
                    call(manager)
                self.error(error.value)
                assert error.value.operation == verb

        async def main() -> None:
            async with lease.AsyncManager(url, request_timeout=min(patience, 10), timeout=patience) as manager:
                self.add(manager)
                for call in ASYNC_VERBS.values():
                    with pytest.raises(expected) as error:
                        await call(manager)
                    self.error(error.value)

        asyncio.run(main())

    def judge(self, *parts: str) -> None:
        said = self.capfd.readouterr()
        records = [str(vars(record)) for record in self.caplog.records]
        text = "\n".join([*self.texts, *records, self.caplog.text, said.out, said.err])
        assert len(text) > 1000
        for part in parts:
            assert part not in text, text[max(0, text.index(part) - 300) :][:600]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Told:
    return Told(caplog, capfd)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Cluster]:
    """Lets in `root`, with the canary as its password, and `nobody`, with the same, who may do nothing."""
    # Or each password takes it a while.
    with Cluster(1, "--bcrypt-cost=4") as guarded:
        for user in ("root", "nobody"):
            guarded.ctl("user", "add", f"{user}:{CANARY}")
        guarded.ctl("user", "grant-role", "root", "root")
        guarded.ctl("auth", "enable")
        guarded.user = f"root:{CANARY}"
        yield guarded


def test_the_judge_of_passwords_sees_one(told: Told) -> None:
    """Or those below show nothing."""
    try:
        raise KeyError("x" * 1000) from ValueError(f"of {CANARY}")
    except KeyError as error:
        told.error(error)
    with pytest.raises(AssertionError):
        told.judge("Vogel")
    told.texts = ["x" * 1001]
    logging.getLogger("lease").debug("it is %s", CANARY)
    with pytest.raises(AssertionError):
        told.judge("Vogel")


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_a_password_that_is_wrong_or_of_no_use_is_denied_and_not_shown(user: str, guarded: Cluster, told: Told) -> None:
    access = f"{user}:Falscher{ENCODED}@" if user == "root" else f"{user}:{ENCODED}@"
    told.verbs(guarded.url("x", access), lease.PermissionDenied)
    told.judge("Kanarien", "Vogel")


def test_a_password_of_an_option_or_a_variable_is_not_shown(
    guarded: Cluster, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = guarded.url("x")
    told.verbs(f"{url}?user=root&password=Falscher{ENCODED}", lease.PermissionDenied)
    monkeypatch.setenv("LEASE_USER", "root")
    monkeypatch.setenv("LEASE_PASSWORD", f"Falscher{CANARY}")
    told.verbs(url, lease.PermissionDenied)
    monkeypatch.setenv("LEASE_URL", url)
    told.verbs(None, lease.PermissionDenied)
    told.judge("Kanarien", "Vogel")


def test_a_password_for_a_host_that_is_not_there_is_not_shown(told: Told) -> None:
    told.verbs(f"etcd://root:{ENCODED}@{NOBODY},nowhere.invalid/x", lease.StoreUnavailable, patience=0.5)
    told.judge("Kanarien", "Vogel")


def test_a_password_that_is_right_is_not_shown(guarded: Cluster, told: Told) -> None:
    """Nor when the server is frozen meanwhile."""
    url = guarded.url("x", f"root:{ENCODED}@")
    with lease.Manager(url, request_timeout=1, timeout=1) as manager:
        held, kept = manager.acquire("nightly"), manager.acquire("kept")
        told.add(manager, held, held.cancelled, manager.inspect("nightly"), manager.list(), manager.watch("nightly"))
        held.on_lost(print)
        with frozen(guarded.nodes[0]):
            for call in (kept.confirm, held.release, *(lambda call=call: call(manager) for call in VERBS.values())):
                with pytest.raises(lease.StoreUnavailable) as error:
                    call()
                told.error(error.value)
        kept.release()
        # Told in the background.
        manager.acquire("nightly", timeout=LIMIT).release()
    told.judge("Kanarien", "Vogel")


@pytest.mark.parametrize(
    "wrong",
    [
        f"etcd://root:{CANARY}@h/x",  # not encoded
        f"etcd://root:{ENCODED}@h:port/x",
        f"etcd://root:{ENCODED}%ZZ@h/x",
        f"etcd://:{ENCODED}@h/x",
        f"etcd://{ENCODED}@h/x",
        f"etcd://root:{ENCODED}@h,h/x",
        f"etcd:root:{ENCODED}@h/x",
        f"etcd//root:{ENCODED}@h/x",
        f"etcdd://root:{ENCODED}@h/x",
        f"etcd://h/x?user=root&pasword={ENCODED}",
        f"etcd://h/x?user=root&password={ENCODED}&ttl=x",
        f"etcd://h/x?password={ENCODED}",
        f"etcd://root:{ENCODED}@h/x?password={ENCODED}",
        f"etcd://root:{ENCODED}@h/x?ttl=1s",
        f"etcd://root:{ENCODED}@h/x?unknown=1",
        f"etcd://root:{ENCODED}@h/x?ttl",
        f"etcd://root:{ENCODED}@h /x",
    ],
)
def test_a_password_in_a_wrong_url_is_not_shown(wrong: str, told: Told) -> None:
    for kind in (lease.Manager, lease.AsyncManager):
        with pytest.raises((lease.InvalidArgument, lease.Unsupported)) as error:
            kind(wrong)
        told.error(error.value)
    print(error.value)
    told.texts.append("x" * 1000)
    told.judge("Kanarien", "Vogel")


# ------------------------------------------------------------------------------- processes


def test_a_manager_of_a_forked_child_opens_itself_anew(cluster: Cluster, url: str, prefix: str) -> None:
    with lease.Manager(url) as manager:
        held = manager.acquire("nightly", ttl=15, owner="the parent")
        waiting = in_thread(lambda: manager.acquire("nightly", ttl=15, timeout=LIMIT).token)
        waits(manager, "nightly")

        def in_child() -> None:
            assert held.is_held is False and held.end_reason is EndReason.FORKED
            with pytest.raises(lease.Forked):
                held.release()
            record = manager.inspect("nightly")
            assert record is not None and (record.owner, record.token) == ("the parent", held.token)
            assert manager.try_acquire("nightly") is None
            with manager.acquire("of the child", timeout=LIMIT) as own:
                assert own.token > held.token and own.is_held
                child(lambda: pytest.raises(lease.Forked, own.check))
                own.confirm()
            manager.close()

        for _ in range(3):
            child(in_child)
        held.confirm()
        held.release()
        assert waiting() > held.token
    assert cluster.names(prefix) == []


def test_a_fork_from_the_middle_of_other_threads_calls(url: str) -> None:
    """A child that inherited a lock of theirs would hang."""
    stop = threading.Event()
    with lease.Manager(url) as manager:

        def busy() -> int:
            taken = 0
            while not stop.is_set():
                with manager.acquire("busy"):
                    taken += 1
            return taken

        def in_child() -> None:
            with manager.acquire("busy", timeout=LIMIT):
                pass
            manager.close()

        joins = [in_thread(busy) for _ in range(2)]
        try:
            for _ in range(10):
                child(in_child)
        finally:
            stop.set()
        assert sum(join() for join in joins) > 10


def test_managers_are_pickled(cluster: Cluster, url: str, prefix: str) -> None:
    with lease.Manager(f"{url}?ttl=9s", owner="me") as manager, manager.acquire("here") as held:
        with pickle.loads(pickle.dumps(manager)) as same, same.acquire("there") as other:
            assert (other.ttl, other.owner) == (9.0, "me")
            record = same.inspect("here")
            assert record is not None and record.token == held.token
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            tokens = list(pool.map(worker, [manager] * 6))
        assert len(set(tokens)) == 6 and min(tokens) > held.token
    assert cluster.names(prefix) == []


ENDS = {
    "holding": "held = manager.acquire('a'); done()",
    "holding and dropped": "manager.acquire('a'); done()",
    "holding in a block": """
        with manager.acquire('a'):
            done()
            sys.exit()""",
    "holding, with callbacks": """
        held = manager.acquire('a'); held.on_lost(lambda reason: None); held.fileno(); done()""",
    "holding and waiting": """
        held = manager.acquire('a'); daemon(lambda: manager.acquire('a')); waits(); done()""",
    "holding and waiting in asyncio": """
        async def main():
            async with lease.AsyncManager(sys.argv[1], ttl=2) as other:
                await other.acquire('a')
        held = manager.acquire('a'); daemon(lambda: asyncio.run(main())); waits(); done()""",
    "leaving a loop that waits": """
        async def main():
            other = lease.AsyncManager(sys.argv[1], ttl=2)
            held = await other.acquire('a')
            try:
                await asyncio.wait_for(other.acquire('a'), 0.3)
            except TimeoutError:
                done()
        asyncio.run(main())""",
    "holding a lot and busy": """
        def loop():
            while True:
                with manager.acquire('a'): pass
        [daemon(loop) for _ in range(4)]; manager.acquire('a'); done()""",
    "watching": "watch = manager.watch('a'); next(watch); daemon(lambda: next(watch)); held = manager.acquire('a'); done()",
    "waiting for a server": """
        nowhere = lease.Manager('etcd://127.0.0.1:1/x'); daemon(lambda: nowhere.acquire('a'))
        time.sleep(0.2); held = manager.acquire('a'); done()""",
    "using it at exit": """
        held = manager.acquire('a'); atexit.register(lambda: manager.acquire('b').release()); done()""",
}
QUIET = ("acquire waits", "the store does not answer")
END = """
import asyncio, atexit, random, sys, threading, time, lease
manager = lease.Manager(sys.argv[1], ttl=2)
def daemon(work): threading.Thread(target=work, daemon=True).start()
def waits():
    while not manager.inspect('a').waiting: time.sleep(0.005)
def done(): time.sleep(random.Random(int(sys.argv[2])).random() * 0.02); print("done", flush=True)
"""


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_the_interpreter_may_end_at_any_moment(end: str, url: str) -> None:
    """And what it held or waited for is free, at the latest after its ttl."""
    command = [sys.executable, "-X", "faulthandler", "-c", END + textwrap.dedent(end), url]
    with lease.Manager(url, ttl=2) as manager:
        for turn in range(int(os.environ.get("EXITS", "2"))):
            process = subprocess.run([*command, str(turn)], capture_output=True, text=True, timeout=LIMIT)
            assert process.returncode == 0 and process.stdout == "done\n", (process.returncode, process.stderr)
            lines = [line for line in process.stderr.splitlines() if not line.startswith(QUIET)]
            assert not lines, process.stderr
            ended = now()
            with manager.acquire("a", timeout=LIMIT):
                # Two dead claims may be in the line: the one that held, and one that waited, as long as it.
                took = now() - ended
            print(f"free after {took:.2f} s")
            assert took < 2 * (2.0 + 2 / 3 + 2.0), took
