"""The verbs for threads."""

from __future__ import annotations

import datetime
import gc
import logging
import os
import select
import threading
import weakref
from pathlib import Path

import pytest

import lease
from conftest import LIMIT, in_thread, waits
from lease.testing import CutStore


def test_a_lease_tells_what_it_is(manager: lease.Manager) -> None:
    with manager.acquire("nightly", ttl=15, timeout=5, owner="me") as held:
        assert (held.token, held.name, held.owner, held.ttl) == (1, "nightly", "me", 15.0)
        assert held.is_held is True and held.end_reason is None
        assert 0 < held.remaining <= 7.5
        assert repr(held).startswith("<Lease 'nightly' token=1 held, 7.") and repr(held).endswith("s left>")
        held.check()
        held.confirm()
        assert not held.cancelled.is_set()
    assert held.is_held is False and held.end_reason is lease.EndReason.RELEASED and held.remaining == 0.0
    assert repr(held) == "<Lease 'nightly' token=1 released>"
    assert held.cancelled.is_set() and held.cancelled.wait()
    assert (held.token, held.name) == (1, "nightly")
    with pytest.raises(lease.LeaseLost) as error:
        held.check()
    assert error.value.reason is lease.EndReason.RELEASED and error.value.token == 1


def test_times_are_seconds_or_timedeltas(manager: lease.Manager) -> None:
    quarter = datetime.timedelta(minutes=15)
    with manager.acquire("a", ttl=quarter, timeout=quarter) as held:
        assert held.ttl == 900.0
        with pytest.raises(lease.AcquireTimeout):
            manager.acquire("a", timeout=datetime.timedelta(milliseconds=1))
        assert not held.cancelled.wait(datetime.timedelta(milliseconds=1))


def test_tokens_increase_from_lease_to_lease(manager: lease.Manager) -> None:
    tokens = []
    for _ in range(20):
        with manager.acquire("nightly") as held:
            tokens.append(held.token)
    assert tokens == sorted(set(tokens))


def test_who_is_in_the_way_is_named(manager: lease.Manager) -> None:
    with manager.acquire("nightly", owner="the other") as held:
        assert manager.try_acquire("nightly") is None
        for timeout in (0, 0.01):
            with pytest.raises(lease.AcquireTimeout) as raised:
                manager.acquire("nightly", timeout=timeout)
            error = raised.value
            assert isinstance(error, TimeoutError)
            assert (error.operation, error.name, error.holder, error.token) == ("acquire", "nightly", "the other", held.token)
            assert error.place == 1 and error.retryable and not error.in_doubt and error.reason is None


def test_an_attempt_has_options(manager: lease.Manager) -> None:
    tried = manager.try_acquire("nightly", ttl=5, owner="me")
    assert tried is not None
    with tried:
        assert (tried.ttl, tried.owner) == (5.0, "me")


def test_a_manager_has_defaults_that_an_acquire_beats(tmp_path: Path) -> None:
    with lease.Manager("memory:?ttl=20s&timeout=0s", owner="mine") as manager:
        with manager.acquire("a") as held:
            assert (held.ttl, held.owner) == (20.0, "mine")
            with pytest.raises(lease.AcquireTimeout):
                manager.acquire("a")  # one attempt
            join = in_thread(lambda: manager.acquire("a", timeout=None).token)
            waits(manager, "a")
        assert join() > held.token
    with lease.Manager("memory:?ttl=20s", ttl=10) as manager, manager.acquire("a") as held:
        assert held.ttl == 10.0


def test_the_url_may_come_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEASE_URL", "memory:?ttl=7s")
    with lease.Manager() as manager, manager.acquire("a") as held:
        assert held.ttl == 7.0


def test_waiters_are_served_in_their_order(manager: lease.Manager) -> None:
    order: list[int] = []
    joins = []
    with manager.acquire("nightly"):
        for number in range(5):

            def turn(number: int = number) -> None:
                with manager.acquire("nightly"):
                    order.append(number)

            waiting = threading.Event()
            joins.append(in_thread(lambda turn=turn, waiting=waiting: (waiting.set(), turn())))
            assert waiting.wait(LIMIT)
            waits(manager, "nightly")
            # Those of one manager share a place in the store: only that they came one after another can be seen.
            with pytest.raises(lease.AcquireTimeout) as error:
                manager.acquire("nightly", timeout=0)
            while error.value.place is not None and error.value.place < number + 2:
                with pytest.raises(lease.AcquireTimeout) as error:
                    manager.acquire("nightly", timeout=0)
    for join in joins:
        join()
    assert order == [0, 1, 2, 3, 4]


def test_operators_see_and_break(manager: lease.Manager) -> None:
    assert manager.inspect("a/1") is None and manager.list() == []
    manager.ping()
    with pytest.raises(lease.LeaseLost) as lost:
        with manager.acquire("a/1", ttl=15, owner="me") as held, manager.acquire("b"):
            record = manager.inspect("a/1")
            assert record is not None and [each.name for each in manager.list("a/")] == ["a/1"]
            assert (record.name, record.token, record.owner, record.ttl, record.waiting) == ("a/1", held.token, "me", 15.0, 0)
            assert record.held_for >= 0
            assert [each.name for each in manager.list()] == ["a/1", "b"]
            with pytest.raises(lease.NotFound) as error:
                manager.break_lease("a/1", held.token + 100)
            assert isinstance(error.value, LookupError)
            manager.break_lease("a/1", held.token)
            with pytest.raises(lease.LeaseLost) as told:
                held.confirm()
            assert told.value.reason is lease.EndReason.GONE and told.value.token == held.token
    assert lost.value.reason is lease.EndReason.GONE and repr(held) == "<Lease 'a/1' token=1 lost: GONE>"


def test_a_watch_tells_of_every_holder(manager: lease.Manager) -> None:
    watch = manager.watch("nightly")
    assert next(watch) is None
    held = manager.acquire("nightly")
    record = next(watch)
    assert record is not None and record.token == held.token
    with pytest.raises(lease.AcquireTimeout):
        watch.next(timeout=0.01)
    join = in_thread(lambda: watch.next(timeout=LIMIT))
    held.release()
    assert join() is None
    manager.close()
    with pytest.raises(lease.ManagerClosed):
        next(watch)
    assert list(watch) == []
    with pytest.raises(lease.ManagerClosed):
        watch.next()


def test_a_lease_is_entered_once_at_a_time(manager: lease.Manager) -> None:
    """Else the inner end would release it under the outer block."""
    with manager.acquire("nightly") as held:
        with pytest.raises(RuntimeError, match="entered already") as error, held:
            pass
        assert isinstance(error.value, lease.InvalidArgument) and error.value.name == "nightly"
        held.check()
    with pytest.raises(lease.LeaseLost), held:
        pass


def test_releasing_twice_is_harmless(manager: lease.Manager) -> None:
    with manager.acquire("nightly") as held:
        held.release()
        held.release()
        assert manager.inspect("nightly") is None
    held.release()


def test_a_lease_that_is_dropped_while_an_exception_passes(caplog: pytest.LogCaptureFixture) -> None:
    """Its end is logged by Python code, which must not run with an exception set."""
    caplog.set_level(logging.DEBUG, "lease")
    with lease.Manager("memory:") as manager, manager.acquire("busy"):
        for _ in range(20):
            with pytest.raises(lease.AcquireTimeout):
                [manager.acquire("a"), manager.acquire("busy", timeout=0)]
            with pytest.raises(ZeroDivisionError):
                print(manager.acquire("a"), 1 / 0)
            with pytest.raises(TypeError, match="must be callable"):
                manager.acquire("a", timeout=LIMIT).on_lost(5)  # type: ignore[arg-type]
        assert manager.acquire("a", timeout=LIMIT).token > 20
    assert sum(record.getMessage().startswith("ended ") for record in caplog.records) > 60


def test_a_callback_may_refer_to_its_lease(manager: lease.Manager) -> None:
    """And the lease is released all the same when it is dropped."""

    class Worker:
        def __init__(self) -> None:
            self.held = manager.acquire("nightly", timeout=LIMIT)
            self.held.on_lost(self.stop)
            self.held.on_lost(lambda reason: print(self.held))

        def stop(self, reason: lease.EndReason) -> None: ...

    for _ in range(5):
        worker = weakref.ref(Worker())
        gc.collect()
        assert worker() is None


def test_a_lease_that_is_dropped_is_released(manager: lease.Manager) -> None:
    held = manager.acquire("nightly")
    token = held.token
    del held
    gc.collect()
    with manager.acquire("nightly", timeout=LIMIT) as held:
        assert held.token > token


def test_closing_releases_and_ends_waits(manager: lease.Manager) -> None:
    held = manager.acquire("nightly")
    join = in_thread(lambda: manager.acquire("nightly"))
    waits(manager, "nightly")
    manager.close()
    with pytest.raises(lease.ManagerClosed) as error:
        join()
    assert isinstance(error.value, RuntimeError)
    assert held.end_reason is lease.EndReason.CLOSED and "its manager was closed" in repr(held)
    with pytest.raises(lease.ManagerClosed):
        manager.acquire("nightly")
    manager.close()
    held.release()
    assert repr(manager).endswith(" closed>")


def test_nothing_is_left_behind(url: str) -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with lease.Manager(url):
        pass
    before = threads(), descriptors()
    for _ in range(20):
        with lease.Manager(url) as manager, manager.acquire("nightly") as held:
            held.fileno()
            held.on_lost(print)
        del held
    assert (threads(), descriptors()) == before


def test_objects_are_freed(manager: lease.Manager) -> None:
    held = manager.acquire("nightly")
    reference, callback = weakref.ref(held), type("Callback", (), {"__call__": lambda self, reason: None})()
    of_callback = weakref.ref(callback)
    held.on_lost(callback)
    held.release()
    del held, callback
    gc.collect()
    assert reference() is None
    manager.close()
    gc.collect()
    assert of_callback() is None


def test_a_descriptor_tells_of_the_end(manager: lease.Manager) -> None:
    held = manager.acquire("nightly")
    assert held.fileno() == held.fileno()
    assert select.select([held], [], [], 0)[0] == []
    held.release()
    assert select.select([held], [], [], 0)[0] == [held]


def test_many_threads_use_one_lease(manager: lease.Manager) -> None:
    held = manager.acquire("nightly")

    def use() -> bool:
        while held.is_held:
            held.remaining, repr(held), held.end_reason
        return held.cancelled.wait(LIMIT)

    joins = [in_thread(use) for _ in range(4)] + [in_thread(lambda: held.cancelled.wait()) for _ in range(4)]
    held.release()
    assert all(join() for join in joins)


def test_a_fence_refuses_who_woke_up_late() -> None:
    fence = lease.Fence()
    inside = threading.Event()
    leave = threading.Event()

    def older() -> None:
        with fence.admit("nightly", 7):
            inside.set()
            assert leave.wait(LIMIT)

    join_older = in_thread(older)
    assert inside.wait(LIMIT)
    order: list[str] = []

    def newer() -> None:
        with fence.admit("nightly", 8):
            order.append("newer")

    join_newer = in_thread(newer)
    with fence.admit("another", 1):
        pass
    while True:
        # Until the newer write was seen: it waits for the older one to end.
        try:
            fence.admit("nightly", 7).__exit__(None, None, None)
        except lease.LeaseLost:
            break
    order.append("older")
    leave.set()
    join_older()
    join_newer()
    assert order == ["older", "newer"]
    with pytest.raises(lease.LeaseLost) as error:
        fence.admit("nightly", 7)
    assert error.value.token == 7 and error.value.name == "nightly" and error.value.reason is None
    admitted = fence.admit("nightly", 8)
    with admitted:
        pass
    with pytest.raises(RuntimeError, match="admit for each"), admitted:
        pass


def test_long_waits_are_told_and_logged(manager: lease.Manager, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lease")
    told: list[lease.Waiting] = []
    heard = threading.Event()
    with manager.acquire("nightly", owner="the holder") as held:
        join = in_thread(lambda: manager.acquire("nightly", on_wait=lambda waiting: (told.append(waiting), heard.set())))
        assert heard.wait(LIMIT)
    join().release()
    assert told == [lease.Waiting("nightly", "the holder", held.token, 1)]
    manager.close()
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "lease"]
    assert any(level == "INFO" and "waits" in line and "the holder" in line for level, line in lines), lines
    assert any(level == "WARNING" and "not re-entrant" in line for level, line in lines), lines


def test_details_are_logged_when_they_are_wanted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "lease")
    with lease.Manager("memory:") as manager, manager.acquire("nightly"):
        pass
    lines = [record.getMessage() for record in caplog.records if record.name == "lease"]
    assert any(line.startswith("acquired ") for line in lines), lines
    assert any(line.startswith("ended ") for line in lines), lines


def test_what_a_log_handler_does_is_its_own_affair(caplog: pytest.LogCaptureFixture) -> None:
    """It may use the library, and raise."""
    store = CutStore()
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            with lease.Manager("memory:") as other, other.acquire("x"):
                pass

        def handle(self, record: logging.LogRecord) -> bool:
            super().handle(record)
            raise ValueError("of the handler")

    handler = Handler()
    logging.getLogger("lease").addHandler(handler)
    unraisable: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.unraisablehook", unraisable.append)
        try:
            with store.manager(ttl=0.1) as manager:
                held = manager.acquire("nightly")
                store.cut()
                assert held.cancelled.wait(LIMIT)
                store.mend()
        finally:
            logging.getLogger("lease").removeHandler(handler)
    assert any("lease lost" in line for line in lines) and unraisable
