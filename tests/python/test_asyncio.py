"""The verbs for asyncio, under its own event loop and under uvloop."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import select
import threading
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import uvloop

import lease
from conftest import LIMIT, in_thread
from lease.testing import CutStore

Run = Callable[[Any], Any]


async def until(condition: Callable[[], Any]) -> None:
    """Waits for something that nobody tells of."""
    while True:
        result = condition()
        if result if not asyncio.iscoroutine(result) else await result:
            return
        await asyncio.sleep(0.005)


async def is_free(manager: lease.AsyncManager, name: str) -> bool:
    return await manager.inspect(name) is None


async def nobody_waits(manager: lease.AsyncManager, name: str) -> bool:
    record = await manager.inspect(name)
    return record is None or record.waiting == 0


async def somebody_waits(manager: lease.AsyncManager, name: str) -> bool:
    return not await nobody_waits(manager, name)


def test_awaited_entered_or_made_a_task(run: Run, url: str) -> None:
    async def main() -> None:
        async with lease.AsyncManager(url) as manager:
            async with manager.acquire("a", ttl=15, timeout=5, owner="me") as held:
                assert isinstance(held, lease.AsyncLease)
                assert (held.name, held.owner, held.ttl, held.is_held) == ("a", "me", 15.0, True)
                held.check()
                await held.confirm()
                assert repr(held).startswith("<Lease 'a' token=1 held, ")
            assert held.end_reason is lease.EndReason.RELEASED
            held = await manager.acquire("a")
            async with held:
                assert held.is_held
            assert not held.is_held
            held = await asyncio.create_task(manager.acquire("a"))
            await held.release()
            await held.release()
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(manager.acquire(str(number))) for number in range(10)]
            assert sorted({task.result().name for task in tasks}) == [str(number) for number in range(10)]
            assert await asyncio.wait_for(manager.acquire("b"), LIMIT)

    run(main())


def test_verbs(run: Run, url: str) -> None:
    async def main() -> None:
        async with lease.AsyncManager(url) as manager:
            await manager.ping()
            assert await manager.inspect("a") is None and await manager.list() == []
            held = await manager.try_acquire("a", ttl=5)
            assert held is not None and held.ttl == 5.0
            assert await manager.try_acquire("a") is None
            with pytest.raises(lease.AcquireTimeout) as error:
                await manager.acquire("a", timeout=0)
            assert error.value.token == held.token and error.value.name == "a"
            assert [record.name for record in await manager.list("")] == ["a"]
            record = await manager.inspect("a")
            assert record is not None and record.token == held.token
            await manager.break_lease("a", record.token)
            with pytest.raises(lease.LeaseLost) as lost:
                await held.confirm()
            assert lost.value.token == held.token and lost.value.reason is lease.EndReason.GONE
            with pytest.raises(lease.LeaseLost):
                await held.release()
        with pytest.raises(lease.ManagerClosed):
            await manager.ping()
        await manager.close()

    run(main())


def test_a_watch_is_iterated_over(run: Run, url: str) -> None:
    async def main() -> None:
        async with lease.AsyncManager(url) as manager:
            seen: list[int | None] = []
            watching = asyncio.Event()

            async def watch() -> None:
                async for record in manager.watch("a"):
                    seen.append(record and record.token)
                    watching.set()

            task = asyncio.create_task(watch())
            await watching.wait()
            held = await manager.acquire("a")
            await until(lambda: held.token in seen)
            await held.release()
            await until(lambda: seen == [None, held.token, None])
        with pytest.raises(lease.ManagerClosed):
            await task

    run(main())


def test_a_cancelled_acquire_leaves_no_waiter_and_no_orphan(run: Run, url: str) -> None:
    async def main() -> None:
        async with lease.AsyncManager(url) as manager:
            async with manager.acquire("a"):
                task = asyncio.create_task(manager.acquire("a"))
                await until(lambda: somebody_waits(manager, "a"))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await until(lambda: nobody_waits(manager, "a"))
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await manager.acquire("a")
            # As long as it takes to hand over, at every moment of it.
            for turn in range(200):
                held = await manager.acquire("a")
                task = asyncio.create_task(manager.acquire("a"))
                for _ in range(turn % 5):
                    await asyncio.sleep(0)
                if turn % 2:
                    await until(lambda: somebody_waits(manager, "a"))
                await held.release()
                for _ in range(turn % 7):
                    await asyncio.sleep(0)
                task.cancel()
                try:
                    await (await task).release()
                except asyncio.CancelledError:
                    pass
                del task
                await until(lambda: is_free(manager, "a"))

    run(main())


def test_a_loss_cancels_the_body_and_the_block_raises_it(run: Run) -> None:
    async def main() -> None:
        store = CutStore()
        async with store.async_manager(ttl=0.1) as manager:
            task = asyncio.current_task()
            assert task is not None
            told: list[lease.EndReason] = []
            ended: list[str] = []
            with pytest.raises(lease.LeaseLost) as error:
                async with manager.acquire("a") as held:
                    held.on_lost(told.append)
                    store.cut()
                    try:
                        await asyncio.sleep(LIMIT)
                    except asyncio.CancelledError:
                        ended.append("cancelled")
                        raise
            assert ended == ["cancelled"] and task.cancelling() == 0
            assert error.value.reason is lease.EndReason.UNREACHABLE and error.value.token == held.token
            assert isinstance(error.value.__cause__, asyncio.CancelledError)
            await until(lambda: told == [lease.EndReason.UNREACHABLE])
            assert held.cancelled.is_set() and await held.cancelled.wait()
            # The task is as it was: it can be cancelled, timed out, and sleep.
            await asyncio.sleep(0)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await asyncio.sleep(LIMIT)

    run(main())


def test_a_body_that_fails_of_its_own_keeps_its_error(run: Run) -> None:
    async def main() -> None:
        store = CutStore()
        async with store.async_manager(ttl=0.1) as manager:
            with pytest.raises(KeyError) as failed:
                async with manager.acquire("a") as held:
                    store.cut()
                    try:
                        await asyncio.sleep(LIMIT)
                    finally:
                        raise KeyError("of the body")
            assert any("not held any more" in note for note in failed.value.__notes__)
            task = asyncio.current_task()
            assert task is not None and task.cancelling() == 0 and not held.is_held
            store.mend()
            # The loss itself, raised by the body, is raised as it is.
            with pytest.raises(lease.LeaseLost) as lost:
                async with manager.acquire("b") as held:
                    await manager.break_lease("b", held.token)
                    await held.confirm()
            assert not hasattr(lost.value, "__notes__") and lost.value.operation == "confirm"

    run(main())


def test_a_body_that_ends_well_on_a_lost_lease_raises(run: Run) -> None:
    async def main() -> None:
        async with CutStore().async_manager() as manager:
            with pytest.raises(lease.LeaseLost):
                async with manager.acquire("a") as held:
                    await manager.break_lease("a", held.token)
                    with pytest.raises(lease.LeaseLost):
                        await held.confirm()
            # One that swallows the cancellation ends well too, and is told at the end.
            with pytest.raises(lease.LeaseLost):
                async with manager.acquire("b") as held:
                    try:
                        await manager.break_lease("b", held.token)
                        with pytest.raises(lease.LeaseLost):
                            await held.confirm()
                        await asyncio.sleep(LIMIT)
                    except asyncio.CancelledError:
                        pass
            task = asyncio.current_task()
            assert task is not None and task.cancelling() == 0

    run(main())


async def lose(store: CutStore, held: lease.AsyncLease) -> None:
    store.cut()
    await asyncio.sleep(LIMIT)


def test_an_end_that_is_no_loss_cancels_nothing(run: Run) -> None:
    async def main() -> None:
        async with lease.AsyncManager("memory:") as manager:
            done: list[str] = []
            async with manager.acquire("a") as held:
                await held.release()
                await asyncio.sleep(0.01)
                done.append("released")
            async with manager.acquire("b") as held:
                held.on_lost(lambda reason: done.append(f"lost: {reason}"))
                await manager.close()
                await asyncio.sleep(0.01)
                done.append("closed")
            assert done == ["released", "closed"] and held.end_reason is lease.EndReason.CLOSED

    run(main())


def test_an_outer_cancellation_keeps_its_meaning(run: Run) -> None:
    async def main() -> None:
        store = CutStore()
        async with store.async_manager(ttl=0.1) as manager:
            entered = asyncio.Event()

            async def work() -> None:
                async with manager.acquire("a"):
                    entered.set()
                    await asyncio.sleep(LIMIT)

            task = asyncio.create_task(work())
            await entered.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled()
            await until(lambda: is_free(manager, "a"))

            # Both at once: whoever cancels from outside wins, and the loss is noted.
            both: list[BaseException] = []

            async def work_and_lose() -> None:
                me = asyncio.current_task()
                assert me is not None
                try:
                    async with manager.acquire("a") as held:
                        held.on_lost(lambda _: me.cancel())
                        await lose(store, held)
                except asyncio.CancelledError as error:
                    both.append(error)
                    raise

            task = asyncio.create_task(work_and_lose())
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled() and any("not held any more" in note for note in both[0].__notes__)

    run(main())


def test_nested_timeouts_and_groups_keep_their_meaning(run: Run) -> None:
    async def main() -> None:
        store = CutStore()
        async with store.async_manager(ttl=0.1) as manager:
            # A timeout within, and one around.
            async with manager.acquire("a"):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await asyncio.sleep(LIMIT)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    async with manager.acquire("a"):
                        await asyncio.sleep(LIMIT)
            await until(lambda: is_free(manager, "a"))
            # A loss is no timeout.
            with pytest.raises(lease.LeaseLost):
                async with asyncio.timeout(LIMIT):
                    async with manager.acquire("a") as held:
                        async with asyncio.timeout(LIMIT):
                            await lose(store, held)
            store.mend()
            # A loss ends the children of a group, and is not a group.
            children: list[str] = []

            async def child() -> None:
                try:
                    await asyncio.sleep(LIMIT)
                finally:
                    children.append("ended")

            with pytest.raises(lease.LeaseLost):
                async with manager.acquire("b") as held:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(child())
                        group.create_task(child())
                        await asyncio.sleep(0)
                        store.cut()
            assert children == ["ended", "ended"]
            store.mend()

            # A child that fails is a group, and the lease is released.
            async def failing() -> None:
                async with manager.acquire("c"):
                    async with asyncio.TaskGroup() as group:
                        group.create_task(asyncio.wait_for(asyncio.sleep(LIMIT), 0))

            with pytest.raises(ExceptionGroup):
                await asyncio.create_task(failing())
            await until(lambda: is_free(manager, "c"))
            # A lease within a lease: each loss ends its own block.
            with pytest.raises(lease.LeaseLost) as outer:
                async with manager.acquire("outer") as out:
                    with pytest.raises(lease.LeaseLost) as inner:
                        async with manager.acquire("inner", ttl=0.1) as held:
                            await manager.break_lease("inner", held.token)
                            await asyncio.sleep(LIMIT)
                    assert inner.value.name == "inner"
                    await manager.break_lease("outer", out.token)
                    await asyncio.sleep(LIMIT)
            assert outer.value.name == "outer"
            task = asyncio.current_task()
            assert task is not None and task.cancelling() == 0

    run(main())


def test_a_release_that_is_cancelled_goes_on(run: Run, url: str) -> None:
    async def main() -> None:
        async with lease.AsyncManager(url) as manager:
            for _ in range(20):
                held = await manager.acquire("a")
                task = asyncio.create_task(held.release())
                await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await until(lambda: is_free(manager, "a"))

    run(main())


def test_waits_with_a_limit(run: Run) -> None:
    async def main() -> None:
        async with lease.AsyncManager("memory:") as manager:
            held = await manager.acquire("a")
            assert await held.cancelled.wait(0.01) is False
            assert "not set" in repr(held.cancelled)
            waiting = asyncio.create_task(held.cancelled.wait())
            await asyncio.sleep(0)
            await held.release()
            assert await waiting is True

    run(main())


def test_who_waits_for_long_is_told_in_the_loop(run: Run) -> None:
    async def main() -> None:
        async with lease.AsyncManager("memory:") as manager:
            told: list[lease.Waiting] = []
            here: list[bool] = []
            held = await manager.acquire("a", owner="the holder")
            thread = threading.get_ident()

            def tell(waiting: lease.Waiting) -> None:
                told.append(waiting)
                here.append(threading.get_ident() == thread)

            task = asyncio.create_task(manager.acquire("a", on_wait=tell))
            await until(lambda: told)
            await held.release()
            await (await task).release()
            assert told == [lease.Waiting("a", "the holder", held.token, 1)] and here == [True]
            # Who has it before that is told nothing.
            await (await manager.acquire("a", on_wait=tell)).release()
            assert len(told) == 1

    run(main())


def test_callbacks_are_those_of_the_loop(run: Run) -> None:
    """Never within the call that registers them, in its context, and what they raise goes to the loop's handler."""

    async def main() -> None:
        loop, failures = asyncio.get_running_loop(), []
        loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
        variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nobody's")
        store = CutStore()
        async with store.async_manager(ttl=0.1) as manager:
            held = await manager.acquire("a")
            store.cut()
            await held.cancelled.wait()
            told: list[str] = []
            variable.set("mine")
            held.on_lost(lambda reason: told.append(variable.get()))
            variable.set("another")
            assert told == []
            held.on_lost(lambda reason: 1 / 0)  # type: ignore[arg-type, return-value]
            await until(lambda: failures)
            assert told == ["mine"] and isinstance(failures[0], ZeroDivisionError)

            async def nobody_awaits(reason: object) -> None: ...

            for register in (held.on_lost, lambda callback: manager.acquire("b", on_wait=callback).send(None)):
                with pytest.raises(TypeError, match="let a plain function make a task"):
                    register(nobody_awaits)

    run(main())


def test_a_loss_in_the_moment_of_entering_leaves_no_cancellation_behind(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with CutStore().async_manager() as manager:
            held = await manager.acquire("a")
            await manager.break_lease("a", held.token)
            with pytest.raises(lease.LeaseLost):
                await held.confirm()
            monkeypatch.setattr(lease.AsyncLease, "check", lambda self: None)  # it was held when it was asked
            with pytest.raises(lease.LeaseLost):
                async with held:
                    pass
            await asyncio.sleep(0)
            task = asyncio.current_task()
            assert task is not None and task.cancelling() == 0

    run(main())


def test_a_forgotten_await_is_told_in_public_words() -> None:
    async def main() -> None:
        async with lease.AsyncManager("memory:") as manager:
            acquiring = manager.acquire("a")
            with pytest.raises(AttributeError, match="await the acquire"):
                acquiring.release()  # type: ignore[attr-defined]
            task = asyncio.create_task(acquiring)
            assert "AsyncManager.acquire" in repr(task)
            await (await task).release()

    asyncio.run(main())


def test_a_lease_belongs_to_its_loop() -> None:
    manager = lease.AsyncManager("memory:")

    async def acquire() -> lease.AsyncLease:
        return await manager.acquire("a")

    held: Any = asyncio.run(acquire())
    assert held.is_held

    async def misuse() -> None:
        for call in (held.release, held.confirm, held.cancelled.wait, held.__aenter__):
            with pytest.raises(RuntimeError, match="another event loop") as error:
                await call()
            assert isinstance(error.value, lease.InvalidArgument)
        with pytest.raises(RuntimeError, match="another event loop"):
            held.on_lost(print)
        held.check()

    asyncio.run(misuse())
    with pytest.raises(RuntimeError, match="no running event loop"):
        held.release().send(None)
    # The manager belongs to no loop.
    held = None
    gc.collect()

    async def again() -> None:
        async with manager.acquire("a", timeout=LIMIT):
            pass
        await manager.close()

    asyncio.run(again())


def test_a_lease_is_entered_once_at_a_time(run: Run) -> None:
    async def main() -> None:
        async with lease.AsyncManager("memory:") as manager:
            async with manager.acquire("a") as held:
                with pytest.raises(lease.InvalidArgument, match="entered already"):
                    async with held:
                        pass
                assert held.is_held
            with pytest.raises(lease.LeaseLost):
                async with held:
                    pass
            with pytest.raises(RuntimeError, match="entered already"):
                async with manager:
                    pass
        with pytest.raises(lease.ManagerClosed):
            async with manager:
                pass

    run(main())


def test_managers_of_several_loops_and_threads(url: str) -> None:
    """One manager, four loops in four threads, and each its turns."""
    manager = lease.AsyncManager(url)
    tokens: list[int] = []

    async def work() -> None:
        for _ in range(20):
            async with manager.acquire("a") as held:
                tokens.append(held.token)
                await asyncio.sleep(0)

    for join in [in_thread(lambda: asyncio.run(work())) for _ in range(4)]:
        join()
    assert len(tokens) == 80 and tokens == sorted(set(tokens))
    asyncio.run(manager.close())


def test_loops_that_are_closed_leave_nothing(url: str) -> None:
    manager = lease.AsyncManager(url)
    waiting: list[asyncio.Future[Any]] = []

    async def hold_and_wait() -> None:
        held = await manager.acquire("a", ttl=15)
        waiting.append(asyncio.ensure_future(manager.acquire("a")))
        held.on_lost(print)
        async with asyncio.timeout(LIMIT):
            await until(lambda: somebody_waits(manager, "a"))

    for _ in range(5):
        asyncio.run(hold_and_wait())  # which cancels the waiter, and drops the lease
        waiting.clear()
        gc.collect()

    async def is_free_again() -> None:
        async with asyncio.timeout(LIMIT):
            await until(lambda: is_free(manager, "a"))
        await manager.close()

    asyncio.run(is_free_again())


def test_a_loop_that_is_closed_in_the_midst_leaves_nothing(url: str) -> None:
    """In a block, in a wait, and with callbacks that refer to their lease."""
    manager = lease.AsyncManager(url)

    async def work() -> None:
        async with manager.acquire("a", ttl=15) as held:
            held.on_lost(lambda reason: print(held))
            await asyncio.sleep(LIMIT)

    for factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        loop = factory()
        loop.set_exception_handler(lambda *_: None)  # of tasks that are destroyed

        async def start() -> None:
            tasks = [asyncio.ensure_future(work()) for _ in range(3)]
            await until(lambda: somebody_waits(manager, "a"))
            assert len(tasks) == 3

        loop.run_until_complete(start())
        loop.close()
        gone = weakref.ref(loop)
        del loop
        gc.collect()
        assert gone() is None

        async def is_free_again() -> None:
            async with asyncio.timeout(LIMIT):
                await until(lambda: is_free(manager, "a"))

        asyncio.run(is_free_again())
    asyncio.run(manager.close())


def test_a_callback_may_refer_to_its_lease_in_a_loop_that_goes_on(run: Run) -> None:
    async def main() -> None:
        async with lease.AsyncManager("memory:") as manager:
            held = await manager.acquire("a")
            held.on_lost(lambda reason, held=held: print(held))  # type: ignore[misc]
            del held
            gc.collect()
            await until(lambda: is_free(manager, "a"))

    run(main())


def test_a_descriptor_for_other_loops(run: Run) -> None:
    async def main() -> None:
        async with lease.AsyncManager("memory:") as manager:
            held = await manager.acquire("a")
            loop, readable = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(held.fileno(), readable.set)
            assert select.select([held], [], [], 0)[0] == []
            await held.release()
            await readable.wait()
            loop.remove_reader(held.fileno())

    run(main())


def test_an_acquire_that_is_not_awaited_warns() -> None:
    manager = lease.AsyncManager("memory:")
    with pytest.warns(RuntimeWarning, match="never awaited"):
        manager.acquire("a")
        gc.collect()


def test_anyio_keeps_its_meaning() -> None:
    async def main() -> None:
        store = CutStore()
        async with store.async_manager(ttl=0.1) as manager:
            with anyio.move_on_after(0.01) as scope:
                async with manager.acquire("a"):
                    await anyio.sleep(LIMIT)
            assert scope.cancelled_caught
            with anyio.fail_after(LIMIT):
                await until(lambda: is_free(manager, "a"))
            with pytest.raises(lease.LeaseLost):
                with anyio.fail_after(LIMIT):
                    async with manager.acquire("a"):
                        store.cut()
                        await anyio.sleep(LIMIT)
            store.mend()
            with pytest.raises(ExceptionGroup) as group:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(anyio.sleep, LIMIT)
                    async with manager.acquire("b"):
                        store.cut()
                        await anyio.sleep(LIMIT)
            assert isinstance(group.value.exceptions[0], lease.LeaseLost)
            with anyio.move_on_after(0.01) as scope:
                await manager.acquire("b")
            assert scope.cancelled_caught

    anyio.run(main)
