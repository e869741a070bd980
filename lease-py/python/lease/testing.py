"""For tests of what your code does when a lease is lost.

>>> import lease
>>> from lease.testing import CutStore
>>> store = CutStore()
>>> with store.manager(ttl=0.1) as manager, manager.acquire("nightly") as held:
...     store.cut()
...     assert held.cancelled.wait(timeout=5)
...     print(held.end_reason)
...     held.check()
Traceback (most recent call last):
    ...
lease.LeaseLost: check "nightly": not held any more: no renewal was answered within half the ttl
"""

from __future__ import annotations

from typing import Unpack

from lease import AsyncManager, Manager
from lease._lease import CutStore as _CutStore
from lease._types import ManagerOptions

__all__ = ["CutStore"]


class CutStore(_CutStore):
    """A store in memory whose connection can be cut. Its managers lose their leases at half the ttl then.

    Leases live for 50 ms at least, so that such a test takes no longer than that. What other processes would do is done by a
    manager of ``beside()``, whose connection is another.
    """

    def manager(self, **options: Unpack[ManagerOptions]) -> Manager:
        """A manager on this store, with the options of ``lease.Manager``."""
        return Manager(_store=self, **options)  # type: ignore[call-arg]

    def async_manager(self, **options: Unpack[ManagerOptions]) -> AsyncManager:
        """The same for asyncio."""
        return AsyncManager(_store=self, **options)  # type: ignore[call-arg]

    def beside(self) -> CutStore:
        """Another connection to the same leases."""
        return CutStore(self)
