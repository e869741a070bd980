"""Wrong arguments: the right exception, and a message that says what to do."""

from __future__ import annotations

import asyncio
import copy
import datetime
import math
import pickle
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import lease
from lease.testing import CutStore

MANAGER: Any = lease.Manager("memory:", owner="tests")
HELD: Any = MANAGER.acquire("held")
ASYNC: Any = lease.AsyncManager("memory:")


@pytest.mark.parametrize(
    ("call", "types", "says"),
    [
        (lambda: MANAGER.acquire(5), (TypeError, lease.InvalidArgument), "name must be a str, not int"),
        (lambda: MANAGER.acquire(b"x"), TypeError, "not bytes"),
        (lambda: MANAGER.acquire(None), TypeError, "not NoneType"),
        (lambda: MANAGER.acquire(""), (ValueError, lease.InvalidArgument), "1 to 512 bytes"),
        (lambda: MANAGER.acquire("a\0b"), ValueError, "NUL"),
        (lambda: MANAGER.acquire("x" * 513), ValueError, "512"),
        (lambda: MANAGER.acquire("\ud800"), ValueError, "surrogates"),
        (lambda: MANAGER.acquire("a", ttl="15s"), (TypeError, lease.InvalidArgument), "not str: give seconds"),
        (lambda: MANAGER.acquire("a", ttl=True), TypeError, "not bool"),
        (lambda: MANAGER.acquire("a", ttl=[1]), TypeError, "not list"),
        (lambda: MANAGER.acquire("a", ttl=-1), (ValueError, lease.InvalidArgument), "ttl is -1"),
        (lambda: MANAGER.acquire("a", ttl=datetime.timedelta(seconds=-1)), ValueError, "ttl is -1"),
        (lambda: MANAGER.acquire("a", ttl=math.nan), ValueError, "ttl is NaN"),
        (lambda: MANAGER.acquire("a", ttl=math.inf), ValueError, "at most 24 h"),
        (lambda: MANAGER.acquire("a", ttl=10**400), ValueError, "too large"),
        (lambda: lease.Manager(Path("jobs.db")), TypeError, 'write f"sqlite:{path}"'),
        (lambda: lease.Lease(), TypeError, "get one from acquire"),
        (lambda: MANAGER.list(None), TypeError, "prefix must be"),
        (lambda: MANAGER.acquire("a", ttl=0), ValueError, "at least 50ms"),
        (lambda: MANAGER.acquire("a", ttl=0.049), ValueError, "at least 50ms"),
        (lambda: MANAGER.acquire("a", ttl=86401), ValueError, "at most 24h"),
        (lambda: MANAGER.acquire("a", timeout="5"), TypeError, "timeout must be"),
        (lambda: MANAGER.acquire("a", timeout=-0.5), ValueError, "timeout is -0.5"),
        (lambda: MANAGER.acquire("a", timeout=math.nan), ValueError, "timeout is NaN"),
        (lambda: MANAGER.acquire("a", timeout=math.inf), ValueError, "give None"),
        (lambda: MANAGER.acquire("a", timeout=1e300), ValueError, "timeout is"),
        (lambda: MANAGER.acquire("a", owner=7), TypeError, "owner must be a str"),
        (lambda: MANAGER.acquire("a", owner="x" * 1025), ValueError, "1024 bytes"),
        (lambda: MANAGER.acquire("a", on_wait=7), TypeError, "on_wait must be callable"),
        (lambda: MANAGER.acquire("a", tll=7), (TypeError, lease.InvalidArgument), 'did you mean "ttl"'),
        (lambda: MANAGER.acquire("a", request_timeout=7), TypeError, 'unknown keyword "request_timeout"'),
        (lambda: MANAGER.acquire("a", 7), TypeError, "positional"),
        (lambda: MANAGER.acquire(), TypeError, "name"),
        (lambda: MANAGER.try_acquire("a", timeout=7), TypeError, 'unknown keyword "timeout"'),
        (lambda: MANAGER.try_acquire("a", ttl=-7), ValueError, "ttl is -7"),
        (lambda: MANAGER.inspect(7), TypeError, "name must be"),
        (lambda: MANAGER.inspect(""), ValueError, "1 to 512"),
        (lambda: MANAGER.list(7), TypeError, "prefix must be"),
        (lambda: MANAGER.watch(""), ValueError, "1 to 512"),
        (lambda: MANAGER.watch(7), TypeError, "name must be"),
        (lambda: MANAGER.break_lease("a", "1"), TypeError, "token must be an int"),
        (lambda: MANAGER.break_lease("a", 1.0), TypeError, "token must be an int"),
        (lambda: MANAGER.break_lease("a", True), TypeError, "not bool"),
        (lambda: MANAGER.break_lease("a", 0), ValueError, "token is out of range"),
        (lambda: MANAGER.break_lease("a", 2**63), ValueError, "token is out of range"),
        (lambda: lease.Manager("jobs.db"), ValueError, "no scheme"),
        (lambda: lease.Manager("sqlit:jobs.db"), ValueError, 'did you mean "sqlite"'),
        (lambda: lease.Manager("memory:?tll=3s"), ValueError, 'did you mean "ttl"'),
        (lambda: lease.Manager("redis://host"), (NotImplementedError, lease.Unsupported), "redis"),
        (lambda: lease.Manager("sqlite:/no/such/directory/jobs.db"), lease.LeaseError, "/no/such/directory"),
        (lambda: lease.Manager(7), TypeError, "url must be a str"),
        (lambda: lease.Manager(), ValueError, "set LEASE_URL"),
        (lambda: lease.Manager("memory:", ttl="15s"), TypeError, "ttl must be"),
        (lambda: lease.Manager("memory:", ttl=0), ValueError, "at least 50ms"),
        (lambda: lease.Manager("memory:", request_timeout=0), ValueError, "request_timeout is 0"),
        (lambda: lease.Manager("memory:", timout=1), TypeError, 'did you mean "timeout"'),
        (lambda: lease.AsyncManager("memory:", timout=1), TypeError, 'did you mean "timeout"'),
        (lambda: HELD.is_held(), TypeError, "bool"),
        (lambda: HELD.on_lost(7), TypeError, "callback must be callable"),
        (lambda: HELD.cancelled.wait(-1), ValueError, "timeout is -1"),
        (lambda: HELD.cancelled.wait("1"), TypeError, "timeout must be"),
        (lambda: MANAGER.watch("a").next(timeout=-1), ValueError, "timeout is -1"),
        (lambda: lease.Lease(7), TypeError, "get one from acquire"),
        (lambda: lease.Fence().admit("a", 0), ValueError, "token is out of range"),
        (lambda: lease.Fence().admit("", 1), ValueError, "1 to 512"),
        (lambda: lease.Fence().admit(7, 1), TypeError, "name must be"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call: Callable[[], object], types: Any, says: str) -> None:
    with pytest.raises(types, match=re.escape(says)) as error:
        call()
    for each in types if isinstance(types, tuple) else (types,):
        assert isinstance(error.value, each)


def test_wrong_arguments_are_told_with_the_operation_and_the_name() -> None:
    for call, operation, name in [
        (lambda: MANAGER.acquire("n", timeout=-1), "acquire", "n"),
        (lambda: MANAGER.acquire("n", tll=1), "acquire", "n"),
        (lambda: MANAGER.try_acquire("n", ttl="1"), "try_acquire", "n"),
        (lambda: MANAGER.break_lease("n", 0), "break_lease", "n"),
        (lambda: MANAGER.inspect(5), "inspect", None),
        (lambda: MANAGER.list(5), "list", None),
        (lambda: MANAGER.watch(5), "watch", None),
        (lambda: lease.Manager("memory:", ttl="1"), "open", None),
        (lambda: lease.Fence().admit("n", 0), "admit", "n"),
    ]:
        with pytest.raises(lease.InvalidArgument) as error:
            call()
        assert (error.value.operation, error.value.name) == (operation, name)
        assert str(error.value).startswith(f'{operation} "{name}": ' if name else f"{operation}: ")


def test_what_a_number_of_ones_own_raises_is_ones_own() -> None:
    class Evil:
        def __float__(self) -> float:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        MANAGER.acquire("n", ttl=Evil())


async def wait_async(timeout: Any) -> bool:
    async with ASYNC.acquire("waited for") as held:
        return await held.cancelled.wait(timeout)


@pytest.mark.parametrize(
    ("call", "type", "says"),
    [
        (lambda: ASYNC.acquire(5), TypeError, "name must be a str"),
        (lambda: ASYNC.acquire("a", ttl=-1), ValueError, "ttl is -1"),
        (lambda: ASYNC.acquire("a", tll=1), TypeError, 'did you mean "ttl"'),
        (lambda: ASYNC.acquire("a", on_wait=1), TypeError, "on_wait must be callable"),
        (lambda: ASYNC.try_acquire("a", timeout=1), TypeError, 'unknown keyword "timeout"'),
        (lambda: ASYNC.inspect(""), ValueError, "1 to 512"),
        (lambda: wait_async(-1), ValueError, "timeout is -1"),
        (lambda: wait_async("1"), TypeError, "timeout must be"),
        (lambda: ASYNC.list(7), TypeError, "prefix must be"),
        (lambda: ASYNC.break_lease("a", 0), ValueError, "token is out of range"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_in_asyncio(call: Callable[[], Any], type: Any, says: str) -> None:
    async def main() -> None:
        with pytest.raises(type, match=re.escape(says)) as error:
            await call()
        assert isinstance(error.value, lease.InvalidArgument)

    asyncio.run(main())


def test_what_is_not_for_asyncio_or_only_for_it_says_so() -> None:
    manager, held = MANAGER, HELD
    with pytest.raises((TypeError, AttributeError), match="asynchronous|__aenter__"):
        asyncio.run(_enter_async(manager))
    with pytest.raises((TypeError, AttributeError), match="context manager|__enter__"):
        with ASYNC:
            pass
    acquiring = ASYNC.acquire("a")
    with pytest.raises((TypeError, AttributeError), match="context manager|__enter__"):
        with acquiring:
            pass
    acquiring.close()
    assert held.is_held


async def _enter_async(manager: Any) -> None:
    async with manager:
        pass


def test_a_manager_is_entered_once() -> None:
    with lease.Manager("memory:") as manager:
        with pytest.raises(RuntimeError, match="entered already") as error:
            with manager:
                pass
        assert isinstance(error.value, lease.InvalidArgument)
        manager.ping()
    with pytest.raises(lease.ManagerClosed, match="make a new one"):
        with manager:
            pass


@pytest.mark.parametrize("kind", [lease.Manager, lease.AsyncManager])
def test_a_manager_is_pickled_as_its_url_and_options(kind: Any, file_url: str) -> None:
    options = {"ttl": 15.0, "timeout": 0.0, "owner": "me", "request_timeout": 2.5}
    for manager in (kind(f"{file_url}?ttl=9s"), kind(file_url, **options), kind(file_url, timeout=None)):
        twin = pickle.loads(pickle.dumps(manager))
        assert type(twin) is kind and repr(twin) == repr(manager) and twin is not manager
        assert twin.__reduce__()[0].args == manager.__reduce__()[0].args
        assert twin.__reduce__()[0].keywords == manager.__reduce__()[0].keywords
    with lease.Manager(file_url, **options) as manager, pickle.loads(pickle.dumps(manager)) as twin:
        with manager.acquire("a") as held, pytest.raises(lease.AcquireTimeout) as error:
            twin.acquire("a")
        assert error.value.token == held.token and held.ttl == 15.0 and held.owner == "me"


def test_what_lives_in_this_process_is_not_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEASE_URL", "Memory:")
    for kept in (MANAGER, lease.Manager("memory:named"), lease.Manager(), ASYNC, CutStore().manager()):
        with pytest.raises(TypeError, match="memory cannot be pickled"):
            pickle.dumps(kept)
    for clone in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="hand on its token"):
            clone(HELD)  # type: ignore[operator]
    for kept in (HELD.cancelled, MANAGER.watch("a"), lease.Fence()):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(kept)
    record = MANAGER.inspect("held")
    assert pickle.loads(pickle.dumps(record)) == record


def test_numbers_of_every_kind_are_times() -> None:
    for quarter in (0.25, Decimal("0.25"), Fraction(1, 4), datetime.timedelta(milliseconds=250)):
        with MANAGER.acquire("times", ttl=quarter) as held:
            assert held.ttl == 0.25
    with MANAGER.acquire("times", ttl=1) as held:
        assert held.ttl == 1.0


def test_secrets_are_not_shown() -> None:
    manager = lease.Manager("memory:jobs?owner=secret&ttl=9s")
    assert "secret" not in repr(manager) and repr(manager) == "<Manager memory:jobs>"
    for call in (lambda: lease.Manager("etcd://user:secret@host:x"), lambda: lease.Manager("redis://:secret@host")):
        with pytest.raises(lease.LeaseError) as error:
            call()
        assert "secret" not in str(error.value) + repr(error.value)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=0, max_size=200) | st.text(max_size=5)
anything = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.timedeltas() | st.lists(st.none())
)


@settings(deadline=None)
@given(names)
def test_any_name_is_taken_or_refused(name: str) -> None:
    try:
        held = MANAGER.acquire(name, timeout=0)
    except lease.InvalidArgument:
        try:
            length = len(name.encode())
        except UnicodeEncodeError:
            return
        assert not 1 <= length <= 512 or "\0" in name
    else:
        with held:
            assert held.name == name and MANAGER.inspect(name).name == name
            assert name in [record.name for record in MANAGER.list(name)]
            assert "\n" not in repr(held)


@settings(deadline=None)
@given(anything)
def test_any_ttl_is_taken_or_refused(ttl: Any) -> None:
    seconds = ttl.total_seconds() if isinstance(ttl, datetime.timedelta) else ttl
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    try:
        held = MANAGER.acquire("ttl", ttl=ttl)
    except lease.InvalidArgument as error:
        assert isinstance(error, TypeError) != is_number
        assert not (is_number and 0.05 <= seconds <= 86400)
    else:
        with held:
            expected = 30.0 if ttl is None else seconds
            assert held.ttl == pytest.approx(expected, abs=1e-6) and held.remaining <= expected / 2


@settings(deadline=None)
@given(anything, anything, anything, anything)
def test_nothing_else_is_raised(name: Any, timeout: Any, owner: Any, token: Any) -> None:
    timeout = 0 if timeout is None else timeout
    try:
        with MANAGER.acquire(name, timeout=timeout, owner=owner):
            pass
    except lease.InvalidArgument as error:
        assert str(error)
    try:
        MANAGER.break_lease("nobody", token)
    except (lease.InvalidArgument, lease.NotFound) as error:
        assert str(error)
