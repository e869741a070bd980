"""The decorator."""

from __future__ import annotations

import asyncio
import functools
import inspect
from typing import Any

import pytest

import lease
from conftest import LIMIT, in_thread, waits
from lease.testing import CutStore

MANAGER: Any = lease.Manager("memory:")
ASYNC: Any = lease.AsyncManager("memory:")


def test_each_call_holds_the_name_of_its_arguments() -> None:
    @MANAGER.guard("report:{day}:{options[kind]}", pass_as="held")
    def report(day: str, *, held: lease.Lease, **options: str) -> str:
        """Makes a report."""
        assert held.is_held and held.name == f"report:{day}:{options['kind']}"
        assert MANAGER.try_acquire(held.name) is None
        return held.name

    assert report("monday", kind="short") == "report:monday:short"
    assert report(day="tuesday", kind="long") == "report:tuesday:long"
    assert MANAGER.list("report:") == []
    assert report.__name__ == "report" and report.__doc__ == "Makes a report."
    assert list(inspect.signature(report).parameters) == ["day", "options"]


def test_methods_defaults_and_braces() -> None:
    class Shard:
        number = 7

        @MANAGER.guard("shard:{self.number}:{{{part}}}")
        def work(self, part: int = 3) -> list[str]:
            return [record.name for record in MANAGER.list("shard:")]

    assert Shard().work() == ["shard:7:{3}"] and Shard().work(4) == ["shard:7:{4}"]


def test_the_lease_is_passed_wherever_it_belongs() -> None:
    @MANAGER.guard("pass:{day}", pass_as="held")
    def first(held: Any, day: str, *more: str, last: int = 0) -> tuple[Any, ...]:
        return held.name, day, more, last

    assert first("monday") == ("pass:monday", "monday", (), 0)
    assert first("monday", "x", last=1) == ("pass:monday", "monday", ("x",), 1)

    @MANAGER.guard("pass", pass_as="held")
    def any_words(**words: Any) -> list[str]:
        return sorted(words)

    assert any_words(a=1) == ["a", "held"]
    with pytest.raises(TypeError):
        first()
    assert MANAGER.list("pass") == []


def test_a_name_without_fields_is_itself() -> None:
    @MANAGER.guard("plain {{}}", ttl=15)
    def work(*args: int) -> tuple[list[str], float]:
        record = MANAGER.inspect("plain {}")
        return [record.name], record.ttl

    assert work(1, 2) == (["plain {}"], 15.0)


def test_who_is_busy_is_raised_or_skipped() -> None:
    @MANAGER.guard("busy", timeout=0)
    def strict() -> str:
        return "ran"

    @MANAGER.guard("busy", timeout=0.01, if_busy="skip")
    def lax() -> str:
        return "ran"

    assert strict() == lax() == "ran"

    @MANAGER.guard("busy", if_busy="skip")
    def at_once() -> str:
        return "ran"

    with MANAGER.acquire("busy"):
        with pytest.raises(lease.AcquireTimeout):
            strict()
        assert lax() is None and at_once() is None
    assert at_once() == "ran"
    assert lax() == "ran"


def test_what_the_body_raises_is_not_mistaken_for_busy() -> None:
    @MANAGER.guard("mine", timeout=0, if_busy="skip")
    def work() -> None:
        MANAGER.acquire("mine", timeout=0)

    with pytest.raises(lease.AcquireTimeout):
        work()


def test_calls_wait_for_each_other() -> None:
    inside: list[int] = []

    @MANAGER.guard("queue")
    def work(number: int) -> None:
        inside.append(number)
        assert MANAGER.inspect("queue") is not None

    with MANAGER.acquire("queue"):
        joins = [in_thread(lambda number=number: work(number)) for number in range(5)]
        waits(MANAGER, "queue")
        assert inside == []
    for join in joins:
        join()
    assert sorted(inside) == [0, 1, 2, 3, 4]


def test_a_loss_is_raised_at_the_end() -> None:
    store = CutStore()
    with store.manager(ttl=0.1) as manager:

        @manager.guard("lossy", pass_as="held")
        def work(held: Any) -> None:
            store.cut()
            assert held.cancelled.wait(LIMIT)

        with pytest.raises(lease.LeaseLost):
            work()
        store.mend()


def test_coroutine_functions() -> None:
    @ASYNC.guard("report:{day}", timeout=0, if_busy="skip", pass_as="held")
    async def report(day: str, held: lease.AsyncLease) -> tuple[str, int]:
        await asyncio.sleep(0)
        assert await ASYNC.try_acquire(held.name) is None
        return held.name, held.token

    assert inspect.iscoroutinefunction(report)

    async def main() -> None:
        results = await asyncio.gather(*(report("monday") for _ in range(5)))
        assert results.count(None) == 4 and ("report:monday", 1) in results
        assert (await report(day="monday"))[1] > 1
        store = CutStore()
        async with store.async_manager(ttl=0.1) as manager:

            @manager.guard("lossy")
            async def work() -> None:
                store.cut()
                await asyncio.sleep(LIMIT)

            with pytest.raises(lease.LeaseLost):
                await work()
            store.mend()

    asyncio.run(main())


def plain(day: str) -> None: ...
async def coroutine(day: str) -> None: ...
def generator(day: str) -> Any:
    yield day


async def async_generator(day: str) -> Any:
    yield day


@pytest.mark.parametrize(
    ("decorate", "type", "says"),
    [
        (lambda: MANAGER.guard("a")(coroutine), TypeError, "lease.AsyncManager"),
        (lambda: MANAGER.guard("a")(lambda day: coroutine(day))("x"), TypeError, "runs after the call"),
        (lambda: MANAGER.guard("a")(lambda day: generator(day))("x"), TypeError, "runs after the call"),
        (lambda: MANAGER.guard("a:{b}")(lambda **words: None)(c=1), ValueError, "gives no 'b'"),
        (lambda: MANAGER.guard("a:{b}")(functools.partial(plain, "x")), ValueError, "no parameter 'b'"),
        (lambda: MANAGER.guard("a", timeout=None, if_busy="skip"), ValueError, "give timeout=0"),
        (lambda: ASYNC.guard("a")(plain), TypeError, "lease.Manager"),
        (lambda: MANAGER.guard("a")(generator), TypeError, "generator"),
        (lambda: ASYNC.guard("a")(async_generator), TypeError, "generator"),
        (lambda: MANAGER.guard(plain), TypeError, "name must be a str"),
        (lambda: MANAGER.guard("a")("b"), TypeError, "write @manager.guard(name)"),
        (lambda: MANAGER.guard("a:{dya}")(plain), ValueError, "no parameter 'dya'"),
        (lambda: MANAGER.guard("a:{}")(plain), ValueError, "no parameter ''"),
        (lambda: MANAGER.guard("a:{day")(plain), ValueError, "no template"),
        (lambda: MANAGER.guard("a", pass_as="held")(plain), ValueError, "no such parameter"),
        (lambda: MANAGER.guard("a", if_busy="wait"), ValueError, "give 'raise', or 'skip'"),
        (lambda: MANAGER.guard("a", is_async=True), TypeError, "unknown keyword 'is_async'"),
        (lambda: MANAGER.guard("a", timout=1), TypeError, "unknown keyword 'timout'"),
        (lambda: MANAGER.guard("a", ttl=-1)(plain)("x"), ValueError, "ttl is -1"),
    ],
)  # fmt: skip
def test_wrong_uses_are_refused(decorate: Any, type: Any, says: str) -> None:
    with pytest.raises(type) as error:
        decorate()
    assert says in str(error.value) and isinstance(error.value, lease.InvalidArgument)
