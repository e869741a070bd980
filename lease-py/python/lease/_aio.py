"""The same verbs for asyncio. What waits, waits in the core; a loop is woken through its mailbox."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
from collections.abc import Callable, Coroutine, Generator
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Self, TypeVar, Unpack, overload
from weakref import WeakKeyDictionary, ref

from lease import _guard
from lease._errors import LeaseError, WrongType, WrongUse
from lease._lease import BaseLease, BaseManager, BaseWatch, Mailbox, Pending, _seconds
from lease._types import AcquireOptions, EndReason, GuardOptions, Record, TryOptions, Waiting

P = ParamSpec("P")
R = TypeVar("R")

__all__ = ["AsyncAcquire", "AsyncCancelled", "AsyncLease", "AsyncManager", "AsyncWatch"]

_logger = logging.getLogger("lease")
_mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, ref[Mailbox]] = WeakKeyDictionary()
"""Where to find a loop's own. Only the loop keeps it, by its reader: so both, and what waits in it, can go together."""


def _mailbox(loop: asyncio.AbstractEventLoop) -> Mailbox:
    known = _mailboxes.get(loop)
    mailbox = None if known is None else known()
    if mailbox is None:
        mailbox = Mailbox()
        _mailboxes[loop] = ref(mailbox)
        loop.add_reader(mailbox.fileno(), mailbox.run)
    return mailbox


async def _finish(pending: Pending) -> None:
    """Waits until it is done. If this is cancelled, it is given up: a waiter leaves, a lease that came is released."""
    if pending.begin():
        return
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    mailbox = _mailbox(loop)
    key = mailbox.add(pending, lambda: None if done.done() else done.set_result(None))
    try:
        await done
    except BaseException:
        mailbox.forget(key)
        pending.cancel()
        raise


class _Told:
    """A callback of the loop's for something that the core tells, until it is left. As others of its: in the context of who
    registered it, never within that call, and what it raises goes to the loop's exception handler."""

    def __init__(self, pending: Pending, tell: Callable[[Any], object]) -> None:
        context = contextvars.copy_context()
        self._handle: asyncio.Handle | None = None

        def done() -> None:
            self._handle = asyncio.get_running_loop().call_soon(lambda: tell(pending.take()), context=context)

        self._mailbox = _mailbox(asyncio.get_running_loop())
        self._key = self._mailbox.add(pending, done)

    def leave(self) -> None:
        self._mailbox.forget(self._key)
        if self._handle is not None:
            self._handle.cancel()


def _check_callback(callback: Any, what: str) -> None:
    if not callable(callback):
        raise WrongType(f"{what} must be callable, not {type(callback).__name__}")
    if inspect.iscoroutinefunction(callback):
        raise WrongType(f"{what} is a coroutine function, which nobody would await: let a plain function make a task")


class AsyncCancelled:
    """An event that is set once the lease ended: what ``AsyncLease.cancelled`` gives."""

    def __init__(self, lease: AsyncLease) -> None:
        self._lease = lease

    def is_set(self) -> bool:
        """Whether the lease has ended, for whatever reason."""
        return not self._lease.is_held

    async def wait(self, timeout: float | timedelta | None = None) -> bool:
        """Waits for the end; whether it has come within the timeout (seconds, or a ``timedelta``)."""
        self._lease._here("cancelled.wait")
        seconds = None if timeout is None else _seconds(timeout, "timeout")
        if self.is_set():
            return True
        try:
            async with asyncio.timeout(seconds):
                await _finish(self._lease._ended())
        except TimeoutError:
            return self.is_set()
        return True

    def __repr__(self) -> str:
        return f"<AsyncCancelled {self._lease.name!r}: {'set' if self.is_set() else 'not set'}>"


class AsyncLease(BaseLease):
    """A name that is yours, as long as ``is_held`` says so: what ``AsyncManager.acquire`` gives.

    In a block, a loss cancels the task that entered it, as ``asyncio.timeout`` does when the time is up, and the block raises
    ``LeaseLost``. An outer cancellation or timeout keeps its meaning. Belongs to the event loop in which it was acquired.

    >>> import asyncio, lease
    >>> async def main():
    ...     async with lease.AsyncManager("memory:") as manager:
    ...         async with manager.acquire("nightly", ttl=15) as held:
    ...             await asyncio.sleep(0)  # the work: cancelled if the lease is lost
    ...             return held.token
    >>> asyncio.run(main())
    1
    """

    def __init__(self, pending: Pending) -> None:
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._lost = False
        self._loss: _Told | None = None
        self._callbacks: list[Callable[[EndReason], object]] = []

    def _is_here(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def _here(self, operation: str) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise WrongUse(
                f"{operation} {self.name!r}: the lease belongs to another event loop: use it in the one that acquired it,"
                " and in threads use lease.Manager"
            )

    async def confirm(self) -> None:
        """Asks the store: a renewal now, whatever the schedule says, within the request timeout.

        Raises ``LeaseLost`` when the store says that it is gone or when its time was up, and ``StoreUnavailable`` or
        ``PermissionDenied`` when the store does not answer or refuses: then it is held still, until its time is up.
        """
        self._here("confirm")
        pending = self._confirm()
        await _finish(pending)
        pending.take()

    async def release(self) -> None:
        """Gives the name back, at once. Finish the work first. At most 5 s; harmless when repeated.

        Raises ``LeaseLost`` if it had been lost before, and ``StoreUnavailable``, in doubt, if the store could not be told:
        then it is tried on in the background, and expires at the latest. Cancelled, it goes on in the background too.
        """
        self._here("release")
        pending = self._release()
        await _finish(pending)
        pending.take()

    @property
    def cancelled(self) -> AsyncCancelled:
        """An event that is set once the lease ended, for whatever reason."""
        return AsyncCancelled(self)

    def on_lost(self, callback: Callable[[EndReason], object]) -> None:
        """Calls back in the event loop with the reason if the lease is lost, also when it was lost before. Never for your own
        release. Any number of callbacks, each once."""
        self._here("on_lost")
        _check_callback(callback, "callback")
        # Kept by the lease, and not by the loop: a callback may refer to its lease.
        number, itself = len(self._callbacks), ref(self)
        self._callbacks.append(callback)

        def tell(reason: EndReason) -> None:
            held = itself()
            if held is not None and reason.is_loss:
                held._callbacks[number](reason)

        _Told(self._ended(), tell)

    async def __aenter__(self) -> Self:
        self._here("async with")
        self.check()
        if self._task is not None:
            raise WrongUse(f"the lease of {self.name!r} is entered already: enter it once, or acquire another")
        task = asyncio.current_task()
        if task is None:
            raise WrongUse("a lease is entered in a task, so that it can be cancelled")
        self._task, self._cancelling, self._lost = task, task.cancelling(), False
        self._loss = _Told(self._ended(), self._tell)
        return self

    def _tell(self, reason: EndReason) -> None:
        """In the loop, while the task is within the block."""
        if reason.is_loss and self._task is not None:
            self._lost = True
            self._task.cancel(f"the lease of {self.name!r} was lost: {reason.name}")

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        if self._loss is not None:
            # Nothing to tell any more: so a release wakes no loop.
            self._loss.leave()
        if kind is GeneratorExit or not self._is_here():
            # Nothing can be awaited any more: the loop is gone, or the coroutine is being closed.
            self._abandon()
            return
        mine = False
        if self._lost and task is not None:
            # Nobody else has cancelled the task: the cancellation ends here.
            mine = task.uncancel() <= self._cancelling and kind is asyncio.CancelledError
        try:
            await self.release()
        except LeaseError as error:
            if mine and error.reason is not None:
                raise error from exception
            self._settle(error, exception)


class AsyncAcquire(Coroutine[Any, Any, AsyncLease]):
    """What ``AsyncManager.acquire`` gives: to be awaited, entered with ``async with``, or made a task of. A coroutine like others."""

    def __init__(self, acquiring: Coroutine[Any, Any, AsyncLease]) -> None:
        for name, shown in (("__name__", "acquire"), ("__qualname__", "AsyncManager.acquire")):
            setattr(acquiring, name, shown)
        self._acquiring = acquiring
        self._held: AsyncLease | None = None

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # What asyncio shows of a task: the names, the code and the frame.
            if name in ("__name__", "__qualname__") or name.startswith("cr_"):
                return getattr(self._acquiring, name)
            raise AttributeError(f"no {name!r}: await the acquire or enter it, and you have the lease")

    def __await__(self) -> Generator[Any, Any, AsyncLease]:
        return self._acquiring.__await__()

    def send(self, value: Any) -> Any:
        """As of a coroutine."""
        return self._acquiring.send(value)

    def throw(self, *args: Any) -> Any:
        """As of a coroutine."""
        return self._acquiring.throw(*args)

    def close(self) -> None:
        """As of a coroutine: gives up waiting, if that began."""
        self._acquiring.close()

    async def __aenter__(self) -> AsyncLease:
        held = await self._acquiring
        self._held = await held.__aenter__()
        return held

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._held is not None
        await self._held.__aexit__(kind, exception, traceback)


class AsyncWatch:
    """The holder of a name now, and again whenever it changes: what ``AsyncManager.watch`` gives, to be iterated over.

    An error ends the ``async for``; another one over the same watch tries again, a second later.
    """

    def __init__(self, watch: BaseWatch) -> None:
        self._watch = watch

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Record | None:
        pending = self._watch._next()
        await _finish(pending)
        record: Record | None = pending.take()
        return record

    def __repr__(self) -> str:
        return f"<Async{repr(self._watch)[1:]}"


class AsyncManager(BaseManager):
    """A manager of leases on one store, for asyncio: the verbs of ``Manager``, to be awaited. Options are the same.

    In a block it is closed at the end, which releases what is held. May be used in any event loop, also under uvloop and anyio.

    >>> import asyncio, lease
    >>> async def main():
    ...     async with lease.AsyncManager("memory:", ttl=15) as manager:
    ...         held = await manager.acquire("nightly", timeout=5)
    ...         await held.release()
    >>> asyncio.run(main())
    """

    def acquire(self, name: str, **options: Unpack[AcquireOptions]) -> AsyncAcquire:
        """Waits until the name is yours. Await it, enter it with ``async with``, or make a task of it.

        Options and errors are those of ``Manager.acquire``; ``on_wait`` is called in the event loop. Cancelled, it leaves no
        waiter behind, and a lease that was on its way is released.
        """
        on_wait = options.pop("on_wait", None)
        return AsyncAcquire(self._acquiring(name, on_wait, dict(options)))

    async def _acquiring(self, name: str, on_wait: Callable[[Waiting], object] | None, options: dict[str, Any]) -> AsyncLease:
        if on_wait is not None:
            _check_callback(on_wait, "on_wait")
        pending, waiting = self._acquire(name, on_wait=on_wait is not None, **options)
        if on_wait is not None and waiting is not None and not pending.begin():
            # Told nothing, and over, when the wait ends before that.
            _Told(waiting, lambda told: None if told is None else on_wait(told))
        await _finish(pending)
        return AsyncLease(pending)

    async def try_acquire(self, name: str, **options: Unpack[TryOptions]) -> AsyncLease | None:
        """One attempt: ``None`` when somebody else holds the name or waits for it. As ``Manager.try_acquire``."""
        pending = self._try_acquire(name, **options)
        await _finish(pending)
        return None if pending.is_empty() else AsyncLease(pending)

    async def inspect(self, name: str) -> Record | None:
        """Who holds the name; ``None`` when it is free. As ``Manager.inspect``."""
        record: Record | None = await self._ask(self._inspect(name))
        return record

    async def list(self, prefix: str = "") -> list[Record]:
        """Everything held whose name begins with the prefix, sorted by name. As ``Manager.list``."""
        records: list[Record] = await self._ask(self._list(prefix))
        return records

    def watch(self, name: str) -> AsyncWatch:
        """The holder of the name now, and again whenever it changes; ``None`` while it is free. By watching.

        >>> import asyncio, lease
        >>> async def main():
        ...     async with lease.AsyncManager("memory:") as manager:
        ...         async for record in manager.watch("nightly"):
        ...             return record
        >>> asyncio.run(main())
        """
        return AsyncWatch(self._watch(name))

    async def break_lease(self, name: str, token: int) -> None:
        """Takes a lease away from its holder, for operators. As ``Manager.break_lease``."""
        await self._ask(self._break_lease(name, token))

    async def ping(self) -> None:
        """Asks whether the store answers. As ``Manager.ping``."""
        await self._ask(self._ping())

    async def close(self) -> None:
        """Ends every wait with ``ManagerClosed``, releases every lease, and leaves nothing behind. Finish the work first.

        At most 5 s; harmless when repeated. Raises ``StoreUnavailable``, in doubt, if the store could not be told. Cancelled, it
        goes on in the background.
        """
        pending = self._close()
        if pending is not None:
            await self._ask(pending)

    @staticmethod
    async def _ask(pending: Pending) -> Any:
        await _finish(pending)
        return pending.take()

    if TYPE_CHECKING:

        @overload
        def guard(
            self, name: str, *, if_busy: Literal["raise"] = "raise", pass_as: None = None, **options: Unpack[GuardOptions]
        ) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R]]]: ...
        @overload
        def guard(
            self, name: str, *, if_busy: Literal["skip"], pass_as: None = None, **options: Unpack[GuardOptions]
        ) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R | None]]]: ...
        @overload
        def guard(
            self, name: str, *, if_busy: Literal["raise"] = "raise", pass_as: str, **options: Unpack[GuardOptions]
        ) -> Callable[[Callable[..., Coroutine[Any, Any, R]]], Callable[..., Coroutine[Any, Any, R]]]: ...
        @overload
        def guard(
            self, name: str, *, if_busy: Literal["skip"], pass_as: str, **options: Unpack[GuardOptions]
        ) -> Callable[[Callable[..., Coroutine[Any, Any, R]]], Callable[..., Coroutine[Any, Any, R | None]]]: ...

    def guard(
        self, name: str, *, if_busy: Any = "raise", pass_as: str | None = None, **options: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A decorator for coroutine functions: each call holds the name. As ``Manager.guard``.

        >>> import asyncio, lease
        >>> manager = lease.AsyncManager("memory:")
        >>> @manager.guard("report:{day}", timeout=0, if_busy="skip")
        ... async def report(day):
        ...     return f"report of {day}"
        >>> asyncio.run(report("monday"))
        'report of monday'
        """
        return _guard.guard(self, True, name, if_busy=if_busy, pass_as=pass_as, **options)

    async def __aenter__(self) -> Self:
        self._enter()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.close()
        except LeaseError as error:
            # After good work, and what could not be released expires.
            _logger.warning("not all leases could be released: %s", error)


for _public in __all__:
    globals()[_public].__module__ = "lease"
