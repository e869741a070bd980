"""What happens when a lease is lost: told in time, once, and before anybody else can have it."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time

import pytest

import lease
from conftest import LIMIT, finish, in_thread, start
from lease import EndReason
from lease.testing import CutStore


def now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize("ttl", [0.4, 1.0])
def test_a_partitioned_holder_is_cancelled_before_its_ttl_and_before_the_next(ttl: float) -> None:
    store = CutStore()
    with store.manager(ttl=ttl) as manager, store.beside().manager(ttl=ttl) as other:
        held = manager.acquire("nightly")
        next_one = in_thread(lambda: (other.acquire("nightly"), now()))
        store.cut()
        # The last confirmation was sent before this.
        confirmed = now()
        seen = {
            "wait": in_thread(lambda: (held.cancelled.wait(LIMIT), now())[1]),
            "descriptor": in_thread(lambda: (select.select([held], [], [], LIMIT), now())[1]),
        }
        called: list[tuple[EndReason, float]] = []
        heard = threading.Event()
        held.on_lost(lambda reason: (called.append((reason, now())), heard.set()))
        while held.is_held:
            assert held.remaining <= ttl / 2
        checked = now()
        assert heard.wait(LIMIT)
        (reason, at), (after, granted) = called[0], next_one()
        told = {"check": checked, "callback": at, **{how: join() for how, join in seen.items()}}
        assert reason is held.end_reason is EndReason.UNREACHABLE and len(called) == 1
        for how, when in told.items():
            assert when < confirmed + ttl, f"{how} came {when - confirmed:.3f} s after the last confirmation"
            assert when < granted, f"{how} came after the next holder"
        assert after.token > held.token and not held.is_held and held.remaining == 0.0
        after.release()


def test_every_call_says_lost_for_good() -> None:
    store = CutStore()
    with store.manager(ttl=0.1) as manager:
        held = manager.acquire("nightly")
        store.cut()
        assert held.cancelled.wait(LIMIT)
        store.mend()
        for call in (held.check, held.confirm, held.release, held.__enter__):
            with pytest.raises(lease.LeaseLost) as error:
                call()
            assert error.value.reason is EndReason.UNREACHABLE and error.value.token == held.token
            assert error.value.name == "nightly" and not error.value.in_doubt
        assert repr(held) == "<Lease 'nightly' token=1 lost: UNREACHABLE>"


def test_a_block_raises_the_loss_or_notes_it() -> None:
    store = CutStore()
    with store.manager(ttl=0.1) as manager:
        with pytest.raises(lease.LeaseLost, match="half the ttl"):
            with manager.acquire("a") as held:
                store.cut()
                assert held.cancelled.wait(LIMIT)
        store.mend()
        with pytest.raises(KeyError) as failed:
            with manager.acquire("b") as held:
                store.cut()
                assert held.cancelled.wait(LIMIT)
                raise KeyError("of the body")
        assert len(failed.value.__notes__) == 1 and "not held any more" in failed.value.__notes__[0]
        store.mend()
        with pytest.raises(lease.LeaseLost) as lost:
            with manager.acquire("c") as held:
                store.cut()
                assert held.cancelled.wait(LIMIT)
                held.check()
        assert lost.value.operation == "check" and not hasattr(lost.value, "__notes__")


def test_a_body_that_fails_while_it_holds_keeps_its_error() -> None:
    with lease.Manager("memory:") as manager:
        with pytest.raises(KeyError) as failed, manager.acquire("a"):
            raise KeyError("of the body")
        assert not hasattr(failed.value, "__notes__") and manager.inspect("a") is None


def test_a_store_that_is_not_reached_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """Logged at the end of a block, whose work is done; raised by an explicit call. The name is free later in any case."""
    cut = CutStore()
    manager = cut.manager(ttl=60)
    held = manager.acquire("explicit")

    def block() -> None:
        with manager.acquire("block"):
            cut.cut()

    def explicit() -> None:
        while not cut.is_cut:
            pass
        with pytest.raises(lease.StoreUnavailable) as error:
            held.release()
        assert error.value.in_doubt and error.value.token == held.token and error.value.retryable
        assert isinstance(error.value, ConnectionError) and held.end_reason is EndReason.RELEASED

    def closing() -> None:
        store = CutStore()
        with store.manager(ttl=60) as other:
            other.acquire("closing").on_lost(print)
            kept.append(other.acquire("kept"))
            store.cut()

    def closing_explicitly() -> None:
        store = CutStore()
        other = store.manager(ttl=60)
        kept.append(other.acquire("kept"))
        store.cut()
        with pytest.raises(lease.StoreUnavailable) as error:
            other.close()
        assert error.value.in_doubt and error.value.operation == "close"

    kept: list[lease.Lease] = []
    for join in [in_thread(each) for each in (block, explicit, closing, closing_explicitly)]:
        join()
    lines = [record.getMessage() for record in caplog.records if record.name == "lease"]
    assert any(line.startswith('not released: release "block"') for line in lines), lines
    assert any(line.startswith("not all leases could be released") for line in lines), lines
    with pytest.raises(lease.StoreUnavailable):
        manager.acquire("other", timeout=0.05)
    cut.mend()
    with manager.acquire("block", timeout=LIMIT), manager.acquire("explicit", timeout=LIMIT):
        pass  # told in the background
    manager.close()


def test_a_callback_comes_also_when_it_is_too_late_and_never_for_a_release() -> None:
    store = CutStore()
    with store.manager(ttl=0.1) as manager:
        held = manager.acquire("a")
        store.cut()
        assert held.cancelled.wait(LIMIT)
        told = threading.Event()
        held.on_lost(lambda reason: told.set())
        assert told.wait(LIMIT)
        store.mend()
        calls: list[EndReason] = []
        with manager.acquire("b") as held:
            held.on_lost(calls.append)
        # Callbacks are made in their order.
        told.clear()
        with pytest.raises(lease.LeaseLost), manager.acquire("c") as held:
            held.on_lost(lambda reason: told.set())
            manager.break_lease("c", held.token)
            held.confirm()
        assert told.wait(LIMIT) and calls == []


def test_a_callback_may_use_the_library_and_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    unraisable: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda failure: unraisable.append(failure.exc_value))
    store = CutStore()
    with store.manager(ttl=0.1) as manager, store.beside().manager(ttl=5) as other:
        held = manager.acquire("a")
        got: list[lease.Lease] = []
        done = threading.Event()

        def take_over(reason: EndReason) -> None:
            got.append(other.acquire("a"))
            done.set()
            raise ValueError("of the callback")

        held.on_lost(take_over)
        held.on_lost(lambda reason: done.set())
        store.cut()
        assert done.wait(LIMIT) and got[0].token > held.token
    assert [type(error) for error in unraisable] == [ValueError]


def test_a_stopped_process_says_lost_at_its_first_call(file_url: str) -> None:
    process = start(
        """
        import sys, lease
        with lease.Manager(sys.argv[1], ttl=0.2) as manager:
            held = manager.acquire("nightly")
            print(held.token, flush=True)
            sys.stdin.readline()
            print(held.is_held, held.remaining, flush=True)
            print(held.end_reason.name, held, flush=True)
        """,
        file_url,
    )
    assert process.stdout is not None
    token = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGSTOP)
    with lease.Manager(file_url) as manager, manager.acquire("nightly", timeout=LIMIT) as held:
        assert held.token > token
        os.kill(process.pid, signal.SIGCONT)
        said, errors, status = finish(process, "\n")
    lines = said.splitlines()
    assert lines[0] == "False 0.0", (said, errors)
    assert lines[1].split()[0] in ("STALLED", "SUPERSEDED", "UNREACHABLE"), said
    assert status == 0, errors


def test_an_evicted_holder_is_told_when_it_renews(file_url: str) -> None:
    with lease.Manager(file_url, ttl=0.3) as manager, lease.Manager(file_url) as operator:
        held = manager.acquire("nightly")
        operator.break_lease("nightly", held.token)
        with operator.acquire("nightly", timeout=LIMIT) as after:
            assert held.cancelled.wait(LIMIT) and after.token > held.token
        assert held.end_reason in (EndReason.SUPERSEDED, EndReason.GONE)


def test_losses_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lease")
    store = CutStore()
    with store.manager(ttl=0.1) as manager:
        held = manager.acquire("nightly")
        store.cut()
        assert held.cancelled.wait(LIMIT)
        store.mend()
    lines = [record.getMessage() for record in caplog.records if record.name == "lease"]
    assert any("lease lost" in line and '"nightly"' in line and "UNREACHABLE" in line for line in lines), lines


def test_the_store_of_a_test_says_if_it_is_cut() -> None:
    store = CutStore()
    assert store.is_cut is False
    store.cut()
    assert store.is_cut is True
    manager = store.manager()  # cut from the beginning
    with pytest.raises(lease.StoreUnavailable):
        manager.acquire("a", timeout=0)
    store.mend()
    beside = store.beside().manager()
    held = manager.acquire("a", timeout=0)
    record = beside.inspect("a")
    assert record is not None and record.token == held.token
