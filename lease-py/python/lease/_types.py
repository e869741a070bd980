"""Plain values."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypedDict

__all__ = ["AcquireOptions", "EndReason", "GuardOptions", "ManagerOptions", "Record", "TryOptions", "Waiting"]


class EndReason(enum.Enum):
    """Why a lease ended. ``RELEASED`` and ``CLOSED`` are the holder's own acts, all others are losses.

    >>> import lease
    >>> [reason.name for reason in lease.EndReason if not reason.is_loss]
    ['RELEASED', 'CLOSED']
    """

    RELEASED = 0
    """The holder released it."""
    SUPERSEDED = 1
    """The store says that the claim is gone and that another heads the line."""
    GONE = 2
    """The store says that the claim is gone (expired, deleted, broken by an operator), and names no other holder."""
    UNREACHABLE = 3
    """Half the ttl passed since the last confirmed renewal; one had been tried and was not answered."""
    STALLED = 4
    """Half the ttl passed without a renewal even tried: this process was stopped, suspended or starved."""
    DENIED = 5
    """As ``UNREACHABLE``, the last answer being a refusal (credentials, permission)."""
    CLOSED = 6
    """The manager was closed."""
    FORKED = 7
    """Seen in the child of a fork: the lease is the parent's."""

    @property
    def is_loss(self) -> bool:
        """Whether the lease was lost: ended, and not by the holder's own act."""
        return self not in (EndReason.RELEASED, EndReason.CLOSED)


@dataclass(frozen=True, slots=True)
class Record:
    """Who holds a name, and how many wait.

    >>> import lease
    >>> with lease.Manager("memory:") as manager, manager.acquire("nightly", ttl=15, owner="me"):
    ...     record = manager.inspect("nightly")
    >>> record.owner, record.token, record.ttl, record.waiting
    ('me', 1, 15.0, 0)
    """

    name: str
    """What is held."""
    token: int
    """The holder's fencing token."""
    owner: str
    """The text the holder shows to others."""
    held_for: float
    """For how long it has held, in seconds, as far as the store knows."""
    ttl: float
    """The holder's ttl, in seconds."""
    waiting: int
    """How many claims wait behind it. Waiters of one manager count as one."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a wait goes on, told to ``on_wait`` after a second."""

    name: str
    """What is waited for."""
    holder: str | None
    """The owner text of who holds it; ``None`` when that is not known, because the store does not answer."""
    token: int | None
    """The holder's fencing token, if it is known."""
    place: int
    """How many stand before you in line."""


class TryOptions(TypedDict, total=False):
    """The options of ``try_acquire``."""

    ttl: float | timedelta | None
    """The lifetime without renewal: seconds, or a ``timedelta``, from the store's minimum to 24 h. Renewed at a third, lost at
    half."""
    owner: str | None
    """The text shown to others; ``host:pid`` by default."""


class GuardOptions(TryOptions, total=False):
    """The options of ``guard``."""

    timeout: float | timedelta | None
    """How long to wait: seconds, or a ``timedelta``; ``None`` for ever, 0 for one attempt."""


class AcquireOptions(GuardOptions, total=False):
    """The options of ``acquire``."""

    on_wait: Callable[[Waiting], object] | None
    """Called once, when the wait has lasted for a second."""


class ManagerOptions(GuardOptions, total=False):
    """The options of a manager: the defaults of its leases, and more."""

    request_timeout: float | timedelta | None
    """The bound of one request to the store; 3 s by default."""


for _public in __all__:
    globals()[_public].__module__ = "lease"
