"""A linearizable lease manager: be *the one* that runs the nightly job, owns a shard, writes a file.

>>> import lease
>>> with lease.Manager("memory:") as manager:  # or sqlite:jobs.db, to share it between processes
...     with manager.acquire("nightly", ttl=15, timeout=5) as held:
...         for row in range(3):
...             held.check()  # LeaseLost: stop
...             print(f"row {row} under fence {held.token}")
row 0 under fence 1
row 1 under fence 1
row 2 under fence 1

For asyncio there is ``AsyncManager``, for the resource's side ``Fence``, and ``lease.testing`` for what you do on a loss. Log
lines go to the logger ``lease``; those of level DEBUG if it is enabled for them when a manager is made.
"""

import atexit as _atexit
from typing import TYPE_CHECKING as _TYPE_CHECKING

from lease._errors import (
    AcquireCancelled,
    AcquireTimeout,
    Forked,
    IncompatibleStore,
    InternalError,
    InvalidArgument,
    LeaseError,
    LeaseLost,
    LimitExceeded,
    ManagerClosed,
    NotFound,
    PermissionDenied,
    StoreUnavailable,
    Unsupported,
    WrongType,
    WrongUse,
)
from lease._lease import Admitted, Cancelled, Fence, Lease, Manager, Watch, __version__, _at_exit
from lease._types import AcquireOptions, EndReason, GuardOptions, ManagerOptions, Record, TryOptions, Waiting

__all__ = [
    "AcquireCancelled",
    "AcquireOptions",
    "AcquireTimeout",
    "Admitted",
    "AsyncAcquire",
    "AsyncCancelled",
    "AsyncLease",
    "AsyncManager",
    "AsyncWatch",
    "Cancelled",
    "EndReason",
    "Fence",
    "Forked",
    "GuardOptions",
    "IncompatibleStore",
    "InternalError",
    "InvalidArgument",
    "Lease",
    "LeaseError",
    "LeaseLost",
    "LimitExceeded",
    "Manager",
    "ManagerClosed",
    "ManagerOptions",
    "NotFound",
    "PermissionDenied",
    "Record",
    "StoreUnavailable",
    "TryOptions",
    "Unsupported",
    "Waiting",
    "Watch",
    "WrongType",
    "WrongUse",
    "__version__",
]

if _TYPE_CHECKING:
    from lease._aio import AsyncAcquire, AsyncCancelled, AsyncLease, AsyncManager, AsyncWatch
else:

    def __getattr__(name: str) -> object:
        """The asyncio side, when it is first asked for: importing asyncio takes longer than all the rest."""
        if not name.startswith("Async") or name not in __all__:
            raise AttributeError(f"module 'lease' has no attribute {name!r}")
        from lease import _aio

        return globals().setdefault(name, getattr(_aio, name))

    def __dir__() -> list[str]:
        return [*globals(), *__all__]


# The last of all that is called at the end, so that what others register may use this package.
_atexit.register(_at_exit)
