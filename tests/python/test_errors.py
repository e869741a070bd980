"""The exceptions: one list with every other language, picklable, and at home among Python's own."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import lease
from lease import _errors, _lease

KINDS = [getattr(lease, name) for name in _errors.__all__ if name not in ("LeaseError", "WrongType", "WrongUse")]
BASES = {
    "AcquireTimeout": TimeoutError,
    "StoreUnavailable": ConnectionError,
    "InvalidArgument": ValueError,
    "Unsupported": NotImplementedError,
    "PermissionDenied": PermissionError,
    "ManagerClosed": RuntimeError,
    "Forked": RuntimeError,
    "NotFound": LookupError,
}


def test_the_numbers_are_those_of_the_core() -> None:
    assert sorted((kind.__name__, kind.code, kind.retryable) for kind in KINDS) == sorted(_lease.ERRORS)
    ours = [(reason.name, reason.value, reason.is_loss) for reason in lease.EndReason]
    assert ours == _lease.END_REASONS


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_is_a_lease_error_and_one_of_pythons(kind: Any) -> None:
    assert issubclass(kind, lease.LeaseError) and issubclass(kind, BASES.get(kind.__name__, Exception))
    assert kind.__module__ == "lease" and kind.__doc__
    error = kind("what happened")
    assert str(error) == "what happened" and error.args == ("what happened",)
    assert (error.name, error.token, error.holder, error.operation, error.in_doubt) == (None, None, None, None, False)


@pytest.mark.parametrize("kind", [*KINDS, _errors.WrongType, _errors.WrongUse], ids=lambda kind: kind.__name__)
def test_every_error_is_pickled_with_all_it_says(kind: Any) -> None:
    error = kind("what happened")
    error.name, error.token, error.in_doubt, error.reason = "nightly", 7, True, lease.EndReason.GONE
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        twin = pickle.loads(pickle.dumps(error, protocol))
        assert type(twin) is kind and str(twin) == "what happened"
        assert (twin.name, twin.token, twin.in_doubt, twin.reason) == ("nightly", 7, True, lease.EndReason.GONE)


def test_a_real_one_is_pickled_too() -> None:
    with lease.Manager("memory:", owner="me") as manager, manager.acquire("nightly"):
        with pytest.raises(lease.AcquireTimeout) as raised:
            manager.acquire("nightly", timeout=0)
    twin = pickle.loads(pickle.dumps(raised.value))
    assert str(twin) == str(raised.value) and (twin.name, twin.holder, twin.token, twin.place) == ("nightly", "me", 1, 1)


def test_a_message_is_one_line() -> None:
    with lease.Manager("memory:", owner="a\nb\x1b[31m") as manager, manager.acquire("n\nx"):
        with pytest.raises(lease.AcquireTimeout) as error:
            manager.acquire("n\nx", timeout=0)
    assert str(error.value).isprintable()


def test_a_panic_is_an_internal_error() -> None:
    pending = _lease._Nothing().panic()
    with pytest.raises(lease.InternalError, match="please report"):
        pending.begin()
        pending.take()
