"""What is written in Rust: the manager and the lease for threads, and the fence."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Literal, ParamSpec, Self, TypeVar, final, overload

from typing_extensions import disjoint_base

from lease._types import EndReason, Record, Waiting

_P = ParamSpec("_P")
_R = TypeVar("_R")

__version__: Final[str]
ERRORS: Final[list[tuple[str, int, bool]]]
END_REASONS: Final[list[tuple[str, int, bool]]]

@disjoint_base
class BaseManager:
    """What ``Manager`` and ``AsyncManager`` have in common."""

    def __new__(
        cls,
        url: str | None = None,
        *,
        ttl: float | timedelta | None = None,
        timeout: float | timedelta | None = ...,
        owner: str | None = None,
        request_timeout: float | timedelta | None = None,
    ) -> Self:
        """Opens a manager on the store of a URL, such as ``memory:`` or ``sqlite:jobs.db?ttl=30s``.

        The options are the defaults of its leases: see ``Manager``.
        """

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its URL and options: a manager of its own where it arrives. Not one of ``memory:``."""

    def _acquire(
        self,
        name: str,
        *,
        ttl: float | timedelta | None = None,
        timeout: float | timedelta | None = ...,
        owner: str | None = None,
        on_wait: bool = False,
    ) -> tuple[Pending, Pending | None]: ...
    def _try_acquire(self, name: str, *, ttl: float | timedelta | None = None, owner: str | None = None) -> Pending: ...
    def _inspect(self, name: str) -> Pending: ...
    def _list(self, prefix: str) -> Pending: ...
    def _watch(self, name: str) -> BaseWatch: ...
    def _break_lease(self, name: str, token: int) -> Pending: ...
    def _ping(self) -> Pending: ...
    def _close(self) -> Pending | None: ...
    def _enter(self) -> None: ...

@final
class Manager(BaseManager):
    """A manager of leases on one store, for threads.

    ``url`` names the store: ``memory:``, ``memory:jobs`` or ``sqlite:jobs.db``; without one the variable ``LEASE_URL`` counts.
    The options are the defaults of its leases. They beat those in the URL, which beat variables such as ``LEASE_TTL``:

    - ``ttl``: the lifetime without renewal, in seconds or as a ``timedelta``; 30 s by default, up to 24 h. Renewed at a third,
      lost at half;
    - ``timeout``: how long ``acquire`` waits, in seconds or as a ``timedelta``; ``None``, the default, is for ever, 0 one attempt;
    - ``owner``: the text shown to others, ``host:pid`` by default;
    - ``request_timeout``: the bound of one request to the store, 3 s by default.

    Share it between threads. In a block it is closed at the end, which releases what is held. A child of a fork opens the
    store anew when it first uses an inherited manager; the leases stay the parent's. Every call can be interrupted by Ctrl-C.

    Raises ``InvalidArgument`` for a wrong URL or option, ``Unsupported`` for a store this build lacks, ``PermissionDenied`` for
    a path that cannot be written, ``IncompatibleStore`` for another program's file, ``LimitExceeded``. A store that does not
    answer is no error before the first call that needs it.

    >>> import lease
    >>> with lease.Manager("memory:", ttl=15) as manager:
    ...     with manager.acquire("nightly") as held:
    ...         print(held.token, held.ttl)
    1 15.0
    """

    def __new__(
        cls,
        url: str | None = None,
        *,
        ttl: float | timedelta | None = None,
        timeout: float | timedelta | None = ...,
        owner: str | None = None,
        request_timeout: float | timedelta | None = None,
    ) -> Self: ...
    def acquire(
        self,
        name: str,
        *,
        ttl: float | timedelta | None = None,
        timeout: float | timedelta | None = ...,
        owner: str | None = None,
        on_wait: Callable[[Waiting], object] | None = None,
    ) -> Lease:
        """Waits until the name is yours, and gives the lease. Enter it: ``with manager.acquire("nightly") as held``.

        A name has 1 to 512 bytes of UTF-8. ``ttl``, ``timeout`` and ``owner`` are for this lease, and those of the manager where
        they are not given: times in seconds or as a ``timedelta``, ``timeout=None`` for ever, 0 one attempt. ``on_wait`` is called
        once, on a thread of the library, when the wait has lasted for a second; the same is logged.

        Raises ``AcquireTimeout``, which says who holds the name, ``StoreUnavailable`` if the store never answered,
        ``InvalidArgument``, ``PermissionDenied``, ``IncompatibleStore``, ``ManagerClosed``. Interrupted, it leaves no waiter behind.

        >>> import lease
        >>> manager = lease.Manager("memory:")
        >>> held = manager.acquire("nightly", ttl=15, timeout=5)
        >>> manager.acquire("nightly", timeout=0, owner="other")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        lease.AcquireTimeout: acquire "nightly": held by this process (held by ... with token 1, 1 ahead)
        >>> held.release()
        """

    def try_acquire(self, name: str, *, ttl: float | timedelta | None = None, owner: str | None = None) -> Lease | None:
        """One attempt: ``None`` when somebody else holds the name or waits for it.

        Raises what ``acquire`` does, but for ``AcquireTimeout``. Takes at most the request timeout.

        >>> import lease
        >>> manager = lease.Manager("memory:")
        >>> if held := manager.try_acquire("nightly"):
        ...     with held:
        ...         print("mine")
        mine
        """

    def inspect(self, name: str) -> Record | None:
        """Who holds the name; ``None`` when it is free.

        Raises ``StoreUnavailable``, ``PermissionDenied``, ``InvalidArgument``, ``IncompatibleStore``, ``ManagerClosed``.

        >>> import lease
        >>> manager = lease.Manager("memory:")
        >>> print(manager.inspect("nightly"))
        None
        """

    def list(self, prefix: str = "") -> list[Record]:
        """Everything held whose name begins with the prefix, sorted by name; the empty prefix lists all.

        Raises what ``inspect`` does.

        >>> import lease
        >>> manager = lease.Manager("memory:")
        >>> held = manager.acquire("report/monday"), manager.acquire("report/tuesday"), manager.acquire("other")
        >>> [record.name for record in manager.list("report/")]
        ['report/monday', 'report/tuesday']
        """

    def watch(self, name: str) -> Watch:
        """The holder of the name now, and again whenever it changes, as an iterator. By watching, never by polling.

        Changes that follow each other faster than you read are merged into the last.

        >>> import lease
        >>> manager = lease.Manager("memory:")
        >>> watch = manager.watch("nightly")
        >>> print(next(watch))  # free
        None
        >>> held = manager.acquire("nightly")
        >>> next(watch).token
        1
        """

    def break_lease(self, name: str, token: int) -> None:
        """Takes the lease with that token away from its holder, for operators.

        The holder is told when it renews, at the latest at half its ttl: until then it may overlap its successor, and only the
        fencing token protects. Raises ``NotFound`` when there is no such lease, and what ``inspect`` does; ``StoreUnavailable``
        is in doubt.

        >>> import lease
        >>> manager = lease.Manager("memory:")
        >>> held = manager.acquire("nightly")
        >>> manager.break_lease("nightly", manager.inspect("nightly").token)
        >>> held.confirm()
        Traceback (most recent call last):
            ...
        lease.LeaseLost: confirm "nightly": not held any more: the store says that the claim is gone: it expired, was deleted, or was broken by an operator
        """

    def ping(self) -> None:
        """Asks whether the store answers: raises ``StoreUnavailable`` if it does not, and what ``inspect`` does.

        >>> import lease
        >>> lease.Manager("memory:").ping()
        """

    def close(self) -> None:
        """Ends every wait with ``ManagerClosed``, releases every lease, and leaves nothing behind. Finish the work first.

        At most 5 s; harmless when repeated. Raises ``StoreUnavailable``, in doubt, if the store could not be told of a lease that
        was held.

        >>> import lease
        >>> manager = lease.Manager("memory:")
        >>> manager.close()
        >>> manager.ping()
        Traceback (most recent call last):
            ...
        lease.ManagerClosed: ping: the manager is closed: open a new one
        """

    @overload
    def guard(
        self,
        name: str,
        *,
        ttl: float | timedelta | None = None,
        timeout: float | timedelta | None = ...,
        owner: str | None = None,
        if_busy: Literal["raise"] = "raise",
        pass_as: None = None,
    ) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
        """A decorator: each call of the function holds the name.

        ``{parameter}`` in the name is filled in from the call's arguments; a brace is written twice. ``if_busy="skip"`` returns
        ``None`` when the timeout ends before the name is yours, in place of ``AcquireTimeout``; where no timeout is given it makes
        one attempt. ``pass_as`` names a parameter
        that gets the lease, whose token the work may need. The other options are those of ``acquire``.

        The function is not interrupted by a loss: let it call ``check``. If the lease was lost by its end, ``LeaseLost`` is raised.

        >>> import lease
        >>> manager = lease.Manager("memory:")
        >>> @manager.guard("report:{day}", timeout=0, if_busy="skip", pass_as="held")
        ... def report(day, held):
        ...     return f"{held.name} under fence {held.token}"
        >>> report("monday")
        'report:monday under fence 1'
        >>> busy = manager.acquire("report:monday")
        >>> print(report("monday"))
        None
        """

    @overload
    def guard(
        self,
        name: str,
        *,
        ttl: float | timedelta | None = None,
        timeout: float | timedelta | None = ...,
        owner: str | None = None,
        if_busy: Literal["skip"],
        pass_as: None = None,
    ) -> Callable[[Callable[_P, _R]], Callable[_P, _R | None]]: ...
    @overload
    def guard(
        self,
        name: str,
        *,
        ttl: float | timedelta | None = None,
        timeout: float | timedelta | None = ...,
        owner: str | None = None,
        if_busy: Literal["raise"] = "raise",
        pass_as: str,
    ) -> Callable[[Callable[..., _R]], Callable[..., _R]]: ...
    @overload
    def guard(
        self,
        name: str,
        *,
        ttl: float | timedelta | None = None,
        timeout: float | timedelta | None = ...,
        owner: str | None = None,
        if_busy: Literal["skip"],
        pass_as: str,
    ) -> Callable[[Callable[..., _R]], Callable[..., _R | None]]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@disjoint_base
class BaseLease:
    """What ``Lease`` and ``AsyncLease`` have in common: all that does not wait."""

    def __new__(cls, pending: Pending | None = None) -> Self: ...
    @property
    def token(self) -> int:
        """The fencing token: greater than every token given before for this name. Readable after the end too."""

    @property
    def name(self) -> str:
        """What is leased."""

    @property
    def owner(self) -> str:
        """The text shown to others."""

    @property
    def ttl(self) -> float:
        """The lifetime without renewal, in seconds."""

    @property
    def remaining(self) -> float:
        """The seconds until it is lost unless a renewal succeeds: at most half the ttl, 0.0 once it ended."""

    @property
    def is_held(self) -> bool:
        """Whether it is yours at this instant, by the clock: never true again once it was false. A property: no parentheses."""

    @property
    def end_reason(self) -> EndReason | None:
        """Why it ended; ``None`` while it is held."""

    def check(self) -> None:
        """Call it before each step of the work: raises ``LeaseLost`` with the reason once the lease has ended, by whatever cause.

        Reads a clock and asks nobody. In the child of a fork it raises ``Forked``.

        >>> import lease
        >>> held = lease.Manager("memory:").acquire("nightly")
        >>> held.check()
        >>> held.release()
        >>> held.check()
        Traceback (most recent call last):
            ...
        lease.LeaseLost: check "nightly": not held any more: it was released
        """

    def fileno(self) -> int:
        """A descriptor that is readable once the lease ended, and stays so: for ``select``, ``poll`` and event loops.

        To be polled, and nothing else; closed with the lease object. Raises ``LimitExceeded`` when no descriptor is left.

        >>> import lease, select
        >>> held = lease.Manager("memory:").acquire("nightly")
        >>> select.select([held], [], [], 0)[0]
        []
        >>> held.release()
        >>> select.select([held], [], [], 0)[0]
        [<Lease 'nightly' token=1 released>]
        """

    def __reduce__(self) -> Any:
        """Refuses: a lease belongs to its process. Hand on its token."""

    def _confirm(self) -> Pending: ...
    def _release(self) -> Pending: ...
    def _ended(self) -> Pending: ...
    def _abandon(self) -> None: ...
    def _settle(self, error: BaseException, exception: BaseException | None) -> None: ...

@final
class Lease(BaseLease):
    """A name that is yours, as long as ``is_held`` says so: what ``Manager.acquire`` gives.

    A heartbeat keeps it. When it can no longer be proven yours it ends for good, before anyone else can get the name; stop the
    work then. At the end of its block it is released. If it was lost, the block raises ``LeaseLost`` when the body succeeded, and
    adds a note to the body's own error otherwise; a release that does not reach the store after good work is logged. A lease
    that is dropped is released in the background. Not re-entrant, and not inherited by ``fork``.

    >>> import lease
    >>> with lease.Manager("memory:").acquire("nightly") as held:
    ...     held.is_held, held.end_reason
    (True, None)
    >>> held
    <Lease 'nightly' token=1 released>
    """

    def __new__(cls, pending: Pending | None = None) -> Self: ...
    def confirm(self) -> None:
        """Asks the store: a renewal now, whatever the schedule says, within the request timeout.

        Raises ``LeaseLost`` when the store says that it is gone or when its time was up, and ``StoreUnavailable`` or
        ``PermissionDenied`` when the store does not answer or refuses: then it is held still, until its time is up.

        >>> import lease
        >>> held = lease.Manager("memory:").acquire("nightly")
        >>> held.confirm()
        """

    def release(self) -> None:
        """Gives the name back, at once. Finish the work first. At most 5 s; harmless when repeated.

        Raises ``LeaseLost`` if it had been lost before, and ``StoreUnavailable``, in doubt, if the store could not be told:
        then it is tried on in the background, and expires at the latest.

        >>> import lease
        >>> held = lease.Manager("memory:").acquire("nightly")
        >>> held.release()
        >>> held.end_reason
        <EndReason.RELEASED: 0>
        """

    @property
    def cancelled(self) -> Cancelled:
        """An event that is set once the lease ended, for whatever reason.

        >>> import lease
        >>> held = lease.Manager("memory:").acquire("nightly")
        >>> held.cancelled.is_set(), held.cancelled.wait(timeout=0.01)
        (False, False)
        """

    def on_lost(self, callback: Callable[[EndReason], object]) -> None:
        """Calls back with the reason if the lease is lost, also when it was lost before. Never for your own release.

        Any number of callbacks, each once, on a thread of the library where it may call the library: a slow one delays others
        of its manager, and no heartbeat; one that never returns delays the end of the program by 5 s, and may abort it then.
        ``sys.exit`` ends nothing there. Dropped with the lease. Raises ``LimitExceeded`` when that thread cannot be started.

        >>> import lease
        >>> held = lease.Manager("memory:").acquire("nightly")
        >>> held.on_lost(lambda reason: print("lost:", reason.name))
        """

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class Cancelled:
    """An event that is set once the lease ended: what ``Lease.cancelled`` gives."""

    def is_set(self) -> bool:
        """Whether the lease has ended, for whatever reason."""

    def wait(self, timeout: float | timedelta | None = None) -> bool:
        """Waits for the end; whether it has come within the timeout (seconds, or a ``timedelta``; ``None`` for ever)."""

@disjoint_base
class BaseWatch:
    """What ``Watch`` and ``AsyncWatch`` have in common."""

    def _next(self) -> Pending: ...

@final
class Watch(BaseWatch, Iterator[Record | None]):
    """Who holds a name now, and again whenever it changes: what ``Manager.watch`` gives.

    Each step blocks until there is a change; ``None`` is told while the name is free. An error, such as ``StoreUnavailable``,
    does not end it: the next step tries again, a second later. ``ManagerClosed`` is the last.
    """

    def __iter__(self) -> Self: ...
    def __next__(self) -> Record | None: ...
    def next(self, timeout: float | timedelta | None = None) -> Record | None:
        """The next change, waited for at most so long (seconds, or a ``timedelta``; ``None`` for ever).

        Raises ``AcquireTimeout`` when nothing changed in time, and then no change is missed; ``ManagerClosed`` when it is over.

        >>> import lease
        >>> watch = lease.Manager("memory:").watch("nightly")
        >>> print(watch.next())
        None
        >>> watch.next(timeout=0.01)
        Traceback (most recent call last):
            ...
        lease.AcquireTimeout: watch "nightly": nothing changed
        """

@final
class Fence:
    """Guards a resource of this process against stale holders: check *and* act.

    It lives in one process and forgets when that ends, and a child of a fork begins with an empty one: the durable form is a condition in the write's own transaction,
    ``... WHERE fence <= :token``.

    >>> import lease
    >>> fence = lease.Fence()
    >>> with fence.admit("nightly", 8):
    ...     pass  # write here
    >>> fence.admit("nightly", 7)
    Traceback (most recent call last):
        ...
    lease.LeaseLost: admit "nightly": token 7 is stale: 8 was seen; this write must not happen
    """

    def __new__(cls) -> Self: ...
    def admit(self, name: str, token: int) -> Admitted:
        """Admits a write under this token, until the end of the block: ``with fence.admit(name, held.token): write()``.

        Waits while a write under an older token is under way, 5 s at most: in asyncio use ``asyncio.to_thread``. Raises
        ``LeaseLost`` when a newer token was seen: the write must not happen; ``AcquireTimeout`` when the older write did not end.
        """

@final
class Admitted:
    """Leave to write, until the end of the block: what ``Fence.admit`` gives."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

@final
class Pending:
    """Something that the core is asked for. For the asyncio side of this package."""

    def begin(self) -> bool: ...
    def take(self) -> Any: ...
    def is_empty(self) -> bool: ...
    def cancel(self) -> None: ...

@final
class Mailbox:
    """The mailbox of one event loop. For the asyncio side of this package."""

    def __new__(cls) -> Self: ...
    def fileno(self) -> int: ...
    def add(self, pending: Pending, done: Callable[[], object]) -> int: ...
    def forget(self, key: int) -> None: ...
    def run(self) -> None: ...

@disjoint_base
class CutStore:
    """A store in memory whose connection can be cut: see ``lease.testing``."""

    def __new__(cls, beside: CutStore | None = None) -> Self: ...
    def cut(self) -> None:
        """Cuts the connection: every request of its managers fails, and does not reach the store."""

    def mend(self) -> None:
        """Mends the connection."""

    @property
    def is_cut(self) -> bool:
        """Whether the connection is cut."""

@final
class _Nothing:
    """Does nothing: the floor of the figures."""

    def __new__(cls) -> Self: ...
    def nothing(self) -> None: ...
    def panic(self) -> Pending: ...

def _at_exit() -> None: ...
def _seconds(value: object, what: str) -> float: ...
