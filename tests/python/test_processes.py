"""Forks, signals, the end of the interpreter, and what else happens to a process."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lease
from conftest import LIMIT, finish, in_thread, python, start, waits
from lease import EndReason
from lease.testing import CutStore


def child(body: Callable[[], object]) -> None:
    """Runs it in a forked child, which has to end well and soon."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(int(LIMIT))
            body()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_child_has_none_of_the_leases_and_a_manager_of_its_own(url: str) -> None:
    with lease.Manager(url) as manager:
        held = manager.acquire("nightly", ttl=15, owner="the parent")
        watch = manager.watch("nightly")
        next(watch)
        cancelled, descriptor = held.cancelled, held.fileno()

        def in_child() -> None:
            assert held.is_held is False and held.end_reason is EndReason.FORKED and held.remaining == 0.0
            assert (held.token, held.name, held.owner, held.ttl) == (1, "nightly", "the parent", 15.0)
            assert repr(held) == "<Lease 'nightly' token=1 lost: FORKED>" and cancelled.is_set() and cancelled.wait()
            for call in (held.check, held.confirm, held.release, held.fileno, held.__enter__, lambda: held.on_lost(print)):
                with pytest.raises(lease.Forked) as error:
                    call()
                assert error.value.name == "nightly" and error.value.token == 1 and isinstance(error.value, RuntimeError)
            with pytest.raises(lease.Forked):
                next(watch)
            assert os.fstat(descriptor)
            # It opens itself anew.
            if url.startswith("sqlite"):
                record = manager.inspect("nightly")
                assert record is not None and record.owner == "the parent" and manager.try_acquire("nightly") is None
                with manager.acquire("of the child") as own:
                    assert own.token > held.token and own.is_held
                    child(lambda: pytest.raises(lease.Forked, own.check))
            else:
                assert manager.inspect("nightly") is None
                with manager.acquire("nightly"):
                    pass
            manager.close()

        child(in_child)
        held.confirm()
        held.release()
        assert next(watch) is None


def test_a_block_that_a_child_leaves_is_its_parents(file_url: str) -> None:
    with lease.Manager(file_url) as manager:
        with manager.acquire("nightly") as held:

            def leave() -> None:
                with pytest.raises(lease.Forked):
                    held.__exit__(None, None, None)
                error = KeyError("of the child")
                held.__exit__(KeyError, error, None)
                assert len(error.__notes__) == 1
                manager.__exit__(None, None, None)

            child(leave)
            held.confirm()


def test_a_relative_path_is_the_same_file_in_a_child_and_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    monkeypatch.setenv("LEASE_URL", "sqlite:of%20variable.db?ttl=9s")
    for manager in (lease.Manager("sqlite:jobs.db?ttl=9s"), lease.Manager()):
        with manager, manager.acquire("nightly") as held:
            monkeypatch.chdir(tmp_path / "two")

            def elsewhere(manager: lease.Manager = manager, token: int = held.token) -> None:
                for same in (manager, pickle.loads(pickle.dumps(manager))):
                    record = same.inspect("nightly")
                    assert record is not None and record.token == token and record.ttl == 9.0

            child(elsewhere)
            elsewhere()
            monkeypatch.chdir(tmp_path / "one")
    assert list((tmp_path / "two").iterdir()) == []


def test_a_fence_of_a_child_is_its_own() -> None:
    """Writers of its parent's are not in it."""
    fence = lease.Fence()
    with fence.admit("a", 7):

        def in_child() -> None:
            with fence.admit("a", 8):
                pass
            with pytest.raises(lease.LeaseLost):
                fence.admit("a", 7)

        child(in_child)
        with fence.admit("a", 7):
            pass


def test_a_child_that_ends_while_its_parent_waits_or_ends(file_url: str) -> None:
    """What the parent has of its waits, and of its own end, is none of the child's."""
    for _ in range(5):
        python(
            """
            import logging, os, signal, sys, threading, lease
            logging.getLogger("lease").setLevel(logging.ERROR)
            manager = lease.Manager(sys.argv[1])
            held = manager.acquire("nightly", ttl=600)
            threading.Thread(target=lambda: manager.acquire("nightly", ttl=600), daemon=True).start()
            while not manager.inspect("nightly").waiting:
                pass
            pid = os.fork()
            signal.alarm(60)
            if pid == 0:
                with manager.acquire("child"):
                    sys.exit()
            assert os.waitpid(pid, 0)[1] == 0
            def late():
                if os.fork() == 0:
                    signal.alarm(60)
                    manager.inspect("nightly")
                    os._exit(0)
                assert os.wait()[1] == 0
            ended = threading.Event()
            def fork_late():
                lease._at_exit()  # as the main thread calls it at the end
                ended.set()
            threading.Thread(target=fork_late).start()
            assert ended.wait(60)
            late()
            os._exit(0)
            """,
            file_url,
        )
        with lease.Manager(file_url) as manager:
            for record in manager.list():
                manager.break_lease(record.name, record.token)


def test_a_closed_manager_stays_closed_in_a_child(file_url: str) -> None:
    manager = lease.Manager(file_url)
    manager.close()
    child(lambda: pytest.raises(lease.ManagerClosed, manager.ping))


def test_a_fork_from_the_middle_of_other_threads_calls(tmp_path: Path) -> None:
    """A child that inherited a lock of theirs would hang."""
    stop = threading.Event()
    managers = [lease.Manager("memory:busy"), lease.Manager(f"sqlite:{tmp_path}/jobs.db")]

    def busy(manager: lease.Manager) -> None:
        while not stop.is_set():
            with manager.acquire("busy"):
                pass

    def churn() -> None:
        while not stop.is_set():
            with lease.Manager(f"sqlite:{tmp_path}/churn.db") as manager, manager.acquire("n"):
                pass

    joins = [in_thread(lambda each=each: busy(each)) for each in managers] + [in_thread(churn)]

    def in_child() -> None:
        for manager in managers:
            with manager.acquire("busy", timeout=LIMIT):
                pass
        with lease.Manager(f"sqlite:{tmp_path}/churn.db") as manager, manager.acquire("child"):
            pass

    try:
        for _ in range(40):
            child(in_child)
    finally:
        stop.set()
    for join in joins:
        join()


def test_a_fork_while_the_main_thread_waits(file_url: str) -> None:
    with lease.Manager(file_url) as manager, manager.acquire("a") as held:
        join = in_thread(lambda: manager.acquire("a", timeout=LIMIT).token)
        waits(manager, "a")
        child(lambda: manager.acquire("b").check())
        held.release()
        assert join() > held.token


def worker(manager: lease.Manager) -> int:
    with manager.acquire("shared", timeout=LIMIT) as held:
        held.check()
        return held.token


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_managers_go_to_pools_of_processes(method: str, file_url: str) -> None:
    with lease.Manager(file_url) as manager:
        before = manager.acquire("shared")
        before.release()
        context = multiprocessing.get_context(method)
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            tokens = list(pool.map(worker, [manager] * 12))
        assert len(set(tokens)) == 12 and min(tokens) > before.token


BLOCKING = {
    "acquire": "manager.acquire('held')",
    "acquire with a timeout": "manager.acquire('held', timeout=600)",
    "cancelled.wait": "held.cancelled.wait()",
    "watch": "next(watch)",
    "watch.next": "watch.next(timeout=600)",
    "admit": "fence.admit('a', 2)",
    "asyncio": "asyncio.run(main())",
    "release": "store.cut() or far.release()",
    "close": "store.cut() or distant.close()",
}


@pytest.mark.parametrize("call", BLOCKING.values(), ids=BLOCKING.keys())
def test_ctrl_c_ends_every_blocking_call_within_100_ms(call: str) -> None:
    """The best of some tries: the machine may have other things to do."""
    process = start(
        f"""
        import asyncio, signal, sys, threading, time, lease
        from lease.testing import CutStore
        manager = lease.Manager("memory:")
        held = manager.acquire("held")
        watch = manager.watch("held")
        next(watch)
        fence = lease.Fence()
        fence.admit("a", 1)  # dropped
        admitted = fence.admit("a", 1)
        async def main():
            async with lease.AsyncManager("memory:") as other:
                async with other.acquire("held"):
                    await other.acquire("held")
        for turn in range(4):
            store = CutStore()
            distant = store.manager(ttl=60)
            far = distant.acquire("far")
            print("ready", flush=True)
            try:
                {call}
                print("ended")
            except KeyboardInterrupt:
                print(time.monotonic_ns(), flush=True)
        assert held.is_held
        deadline = time.monotonic() + 30
        while (record := manager.inspect("held")).waiting:
            assert time.monotonic() < deadline, record
        print("no waiter is left", flush=True)
        """
    )
    assert process.stdout is not None
    took: list[float] = []
    for _ in range(4):
        assert process.stdout.readline() == "ready\n", finish(process)
        # Until it sleeps in the call.
        while Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "S":
            pass
        before = time.monotonic_ns()
        process.send_signal(signal.SIGINT)
        said = process.stdout.readline()
        assert said.strip().isdigit(), (said, finish(process))
        took.append((int(said) - before) / 1e6)
    said, errors, status = finish(process)
    assert (said, status) == ("no waiter is left\n", 0), errors
    assert min(took) < 100, took


def test_what_a_handler_raises_is_not_the_releases() -> None:
    """Neither noted nor logged: it is raised."""

    class Alarm(Exception):
        reason = None

    def ring(*_: object) -> None:
        raise Alarm("rings")

    before = signal.signal(signal.SIGALRM, ring)
    store = CutStore()
    try:
        with pytest.raises(Alarm), store.manager(ttl=60).acquire("nightly"):
            store.cut()
            signal.setitimer(signal.ITIMER_REAL, 0.05)  # during the release, which takes 5 s
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        store.mend()


def test_a_handler_that_returns_does_not_end_the_wait() -> None:
    process = start(
        """
        import signal, threading, lease
        heard = []
        signal.signal(signal.SIGUSR1, lambda *_: (heard.append(1), print("heard", flush=True)))
        manager = lease.Manager("memory:")
        held = manager.acquire("a")
        threading.Thread(target=lambda: (input(), held.release())).start()
        print("ready", flush=True)
        with manager.acquire("a"):
            print("mine", len(heard), flush=True)
        """
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for _ in range(3):
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "heard\n"
    said, errors, status = finish(process, "\n")
    assert (said, status) == ("mine 3\n", 0), errors


ENDS = {
    "holding": "held = manager.acquire('a'); done()",
    "holding in a block": "with manager.acquire('a'): done()",
    "with an error": "held = manager.acquire('a'); done(); sys.exit(0)",
    "waiting in a daemon": "with manager.acquire('a'): daemon(lambda: manager.acquire('a')); done()",
    "holding in a daemon": "daemon(lambda: manager.acquire('a', ttl=0.05).cancelled.wait()); done()",
    "handing over to daemons": """
        def loop():
            while True:
                with manager.acquire('a'): pass
        [daemon(loop) for _ in range(3)]; done()""",
    "handing over between managers": """
        def loop():
            with lease.Manager(sys.argv[1]) as other:
                while True:
                    with other.acquire('a'): pass
        [daemon(loop) for _ in range(3)]; done()""",
    "watching": "daemon(lambda: list(manager.watch('a'))); manager.acquire('a'); done()",
    "in asyncio": """
        async def main():
            other = lease.AsyncManager(sys.argv[1])
            async def loop():
                while True:
                    async with other.acquire('a'): await asyncio.sleep(0)
            tasks = [asyncio.create_task(loop()) for _ in range(3)]
            await asyncio.sleep(0.02)
        asyncio.run(main()); done()""",
    "in an event loop of a daemon": """
        async def main():
            other = lease.AsyncManager(sys.argv[1])
            async def loop():
                while True:
                    async with other.acquire('a'): await asyncio.sleep(0)
            await asyncio.gather(*(loop() for _ in range(3)))
        daemon(lambda: asyncio.run(main())); done()""",
    "losing with callbacks": """
        held = manager.acquire('a', ttl=0.05); held.on_lost(lambda reason: logging.getLogger('x').info('lost'))
        manager.break_lease('a', held.token); done()""",
    "logging": """
        logging.basicConfig(level=logging.DEBUG, stream=open('/dev/null', 'w'))
        other = lease.Manager(sys.argv[1])
        def loop():
            while True:
                try:
                    with other.acquire('a', ttl=0.05): time.sleep(0.001)
                except lease.LeaseLost: pass  # a machine with other things to do
        [daemon(loop) for _ in range(2)]; done()""",
    "using it at exit": """
        atexit.register(lambda: manager.acquire('b').release())
        class Late:
            def __del__(self): manager_of(self).try_acquire('c')
        late = Late(); late.manager = manager; manager_of = lambda it: it.manager
        daemon(lambda: manager.acquire('d', ttl=0.05).cancelled.wait()); done()""",
    "from a thread that outlives main": """
        def loop():
            for _ in range(20):
                with manager.acquire('a'): pass
        threading.Thread(target=loop).start(); done()""",
}
END = """
import asyncio, atexit, logging, random, sys, threading, time, lease
manager = lease.Manager(sys.argv[1])
def daemon(work): threading.Thread(target=work, daemon=True).start()
def done(): time.sleep(random.Random(int(sys.argv[2])).random() * 0.02); print("done", flush=True)
"""


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("store", ["memory:", "sqlite"])
def test_the_interpreter_may_end_at_any_moment(end: str, store: str, tmp_path: Path) -> None:
    turns = int(os.environ.get("EXITS", "4"))
    url = store if store == "memory:" else f"sqlite:{tmp_path}/jobs.db"
    code = END + textwrap.dedent(end)
    command = [sys.executable, "-X", "faulthandler", "-c", code, url]
    for turn in range(turns):
        process = subprocess.run([*command, str(turn)], capture_output=True, text=True, timeout=LIMIT)
        assert process.returncode == 0 and process.stdout == "done\n", (process.returncode, process.stderr)
        lines = [line for line in process.stderr.splitlines() if not line.startswith(("lease lost", "acquire waits"))]
        assert not lines or "Task was destroyed" in process.stderr, process.stderr


def test_what_was_held_at_the_end_of_a_process_is_free(file_url: str) -> None:
    """Nobody needs to wait for the ttl of a lease that a module held."""
    with lease.Manager(file_url) as manager:
        for _ in range(5):
            python("import sys, lease\nheld = lease.Manager(sys.argv[1]).acquire('nightly', ttl=600)", file_url)
            # Not by proof that the process is gone, which nobody asked for.
            assert not manager.list("nightly")


def test_who_waits_at_the_end_of_a_process_is_nobodys_hindrance(file_url: str) -> None:
    """A thread that Python does not wait for leaves the line. Most of the time: the process does not wait for that either."""
    left = 0
    with lease.Manager(file_url) as manager:
        for _ in range(10):
            with manager.acquire("nightly", timeout=LIMIT):
                python(
                    """
                    import sys, threading, lease
                    manager = lease.Manager(sys.argv[1])
                    threading.Thread(target=lambda: manager.acquire("nightly", ttl=600), daemon=True).start()
                    while not manager.inspect("nightly").waiting:
                        pass
                    """,
                    file_url,
                )
                record = manager.inspect("nightly")
                left += record is not None and record.waiting == 0
    assert left >= 5, f"{left} of 10 left the line"


def test_a_second_interpreter_is_refused() -> None:
    said = python(
        """
        import sys
        import lease
        if sys.version_info < (3, 13):
            import _xxsubinterpreters as interpreters
        else:
            import _interpreters as interpreters
        other = interpreters.create()
        interpreters.run_string(other, '''if True:
            import os
            try:
                import lease
            except ImportError as error:
                os.write(1, str(error).encode() + bytes([10]))
        ''')
        interpreters.destroy(other)
        with lease.Manager("memory:") as manager, manager.acquire("a"):
            print("and the first one goes on")
        """
    )
    assert "subinterpreter" in said and said.endswith("and the first one goes on\n")


def test_importing_it_imports_no_asyncio() -> None:
    """It takes longer than all the rest."""
    python("import sys, lease; assert 'asyncio' not in sys.modules; lease.AsyncManager; assert 'asyncio' in sys.modules")
    python("import lease; assert set(lease.__all__) <= set(dir(lease)); [getattr(lease, name) for name in lease.__all__]")
