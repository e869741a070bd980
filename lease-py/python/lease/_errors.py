"""What can go wrong. The numbers are those of every other language, and are only ever added."""

from __future__ import annotations

from typing import ClassVar

from lease._types import EndReason

__all__ = [
    "AcquireCancelled",
    "AcquireTimeout",
    "Forked",
    "IncompatibleStore",
    "InternalError",
    "InvalidArgument",
    "LeaseError",
    "LeaseLost",
    "LimitExceeded",
    "ManagerClosed",
    "NotFound",
    "PermissionDenied",
    "StoreUnavailable",
    "Unsupported",
    "WrongType",
    "WrongUse",
]


class LeaseError(Exception):
    """Any error of this package: what happened, to which name, and what to do.

    >>> import lease
    >>> with lease.Manager("memory:") as manager, manager.acquire("nightly", owner="me"):
    ...     try:
    ...         manager.acquire("nightly", timeout=0)
    ...     except lease.LeaseError as error:
    ...         print(error.operation, error.name, error.token, error.holder, error.retryable)
    acquire nightly 1 me True
    """

    code: ClassVar[int | None] = None
    """The number of this kind of error in every language."""
    retryable: bool = False
    """Whether the same call may succeed later with nothing changed by you."""
    in_doubt: bool = False
    """Whether the outcome is unknown: the request may have been applied though its answer was not seen."""
    operation: str | None = None
    """The call that failed, such as ``acquire``."""
    name: str | None = None
    """The name it was about."""
    token: int | None = None
    """The token of the lease that was lost or, after a timeout, of who held the name."""
    holder: str | None = None
    """After a timeout: the owner text of who held the name, if that is known."""
    place: int | None = None
    """After a timeout: how many stood before you in line."""
    reason: EndReason | None = None
    """Why the lease ended, when that is the error."""


class AcquireTimeout(LeaseError, TimeoutError):
    """The time was up while somebody else held the name: ``holder``, ``token`` and ``place`` say who. Try again."""

    code = 1
    retryable = True


class LeaseLost(LeaseError):
    """The lease has ended: stop the work, and acquire anew. Its ``reason`` says how; a fence sets none."""

    code = 2


class StoreUnavailable(LeaseError, ConnectionError):
    """The store did not answer, or not in time. Try again."""

    code = 3
    retryable = True


class InvalidArgument(LeaseError, ValueError):
    """An argument is wrong. The message says which and why."""

    code = 4


class WrongType(InvalidArgument, TypeError):
    """An argument of the wrong type, an unknown keyword, or an object that cannot be pickled."""


class WrongUse(InvalidArgument, RuntimeError):
    """A call at the wrong moment or place: entered twice, or in another event loop."""


class Unsupported(LeaseError, NotImplementedError):
    """This build or this store cannot do it."""

    code = 5


class PermissionDenied(LeaseError, PermissionError):
    """The store refuses these credentials or permissions."""

    code = 6


class IncompatibleStore(LeaseError):
    """The store is not what it was, or was written by something else."""

    code = 7


class AcquireCancelled(LeaseError):
    """The caller gave up waiting. Python's own waits end with ``KeyboardInterrupt`` and ``CancelledError`` instead."""

    code = 8


class ManagerClosed(LeaseError, RuntimeError):
    """The manager is closed: make a new one."""

    code = 9


class Forked(LeaseError, RuntimeError):
    """It belongs to the parent of this forked process: acquire one here."""

    code = 10


class NotFound(LeaseError, LookupError):
    """There is no such lease."""

    code = 11


class InternalError(LeaseError):
    """A panic was caught: a defect of this package. Please report it."""

    code = 12


class LimitExceeded(LeaseError):
    """A limit of the system or of the store was reached. Try later."""

    code = 13
    retryable = True


for _public in __all__:
    globals()[_public].__module__ = "lease"
