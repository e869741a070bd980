//! Arguments and results: names, tokens, times, records, reasons.

use std::time::Duration;

use lease_core::{EndReason, Record, Token, Waiting};
use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyDelta, PyInt, PyString};

use crate::errors::{invalid, wrong_type};

/// Reasons by name and number, for the test that holds the enumeration to them.
pub(crate) fn end_reasons() -> Vec<(&'static str, i32, bool)> {
    EndReason::ALL.iter().map(|reason| (reason.name(), reason.code(), reason.is_loss())).collect()
}

fn of_types<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    MODULE.get_or_try_init(py, || py.import("lease._types").map(Bound::unbind))?.bind(py).getattr(name)
}

pub(crate) fn reason(py: Python<'_>, reason: EndReason) -> PyResult<Bound<'_, PyAny>> {
    of_types(py, "EndReason")?.call1((reason.code(),))
}

pub(crate) fn record(py: Python<'_>, record: Record) -> PyResult<Bound<'_, PyAny>> {
    let Record { name, token, owner, held_for, ttl, waiting, .. } = record;
    let times = (held_for.as_secs_f64(), ttl.as_secs_f64());
    of_types(py, "Record")?.call1((name.as_str(), token.get(), owner, times.0, times.1, waiting))
}

pub(crate) fn waiting(py: Python<'_>, waiting: Waiting) -> PyResult<Bound<'_, PyAny>> {
    let Waiting { name, holder, place, .. } = waiting;
    let token = holder.as_ref().map(|holder| holder.token.get());
    of_types(py, "Waiting")?.call1((name.as_str(), holder.map(|holder| holder.owner), token, place))
}

/// What the type of a value is called, for messages.
pub(crate) fn kind(value: &Bound<'_, PyAny>) -> String {
    value.get_type().name().map_or_else(|_| "that".into(), |name| name.to_string())
}

/// A text argument.
pub(crate) fn text(value: &Bound<'_, PyAny>, what: &str) -> PyResult<String> {
    let py = value.py();
    let text =
        value.cast::<PyString>().map_err(|_| wrong_type(py, format!("{what} must be a str, not {}", kind(value))))?;
    text.to_cow().map(Into::into).map_err(|_| invalid(py, format!("{what} has surrogates, and so no UTF-8: {value:?}")))
}

/// A store's URL.
pub(crate) fn url(value: &Bound<'_, PyAny>) -> PyResult<String> {
    if value.hasattr("__fspath__")? {
        let message = format!("url must be a str, not {}: for a file write f\"sqlite:{{path}}\"", kind(value));
        return Err(wrong_type(value.py(), message));
    }
    text(value, "url")
}

/// A fencing token.
pub(crate) fn token(value: &Bound<'_, PyAny>) -> PyResult<Token> {
    let py = value.py();
    if !value.is_instance_of::<PyInt>() || value.is_instance_of::<PyBool>() {
        return Err(wrong_type(py, format!("token must be an int, not {}", kind(value))));
    }
    let number: i64 = value.extract().unwrap_or(0);
    Token::try_from(number).map_err(|_| invalid(py, "token is out of range: tokens are from 1 to 2**63 - 1"))
}

/// A time: seconds as a number, or a `timedelta`.
pub(crate) fn duration(value: &Bound<'_, PyAny>, what: &str) -> PyResult<Duration> {
    let py = value.py();
    let hint = "give seconds as a number, or a timedelta";
    let wrong = || wrong_type(py, format!("{what} must be a number or a timedelta, not {}: {hint}", kind(value)));
    if value.is_instance_of::<PyBool>() {
        return Err(wrong());
    }
    let seconds: f64 = if value.is_instance_of::<PyDelta>() {
        value.call_method0("total_seconds")?.extract()?
    } else {
        value.extract().map_err(|error: PyErr| {
            // What a number of the user's own raises is his.
            if error.is_instance_of::<PyOverflowError>(py) {
                invalid(py, format!("{what} is too large: {hint}"))
            } else if error.is_instance_of::<PyTypeError>(py) {
                wrong()
            } else {
                error
            }
        })?
    };
    if seconds == f64::INFINITY {
        let instead = if what == "timeout" { "for one without end give None" } else { "give at most 24 h" };
        return Err(invalid(py, format!("{what} is infinite: {instead}")));
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| invalid(py, format!("{what} is {seconds:?}: {hint}, from 0 on")))
}

/// A time in seconds, checked. For the asyncio side of this package.
#[pyfunction(name = "_seconds")]
pub(crate) fn seconds(value: &Bound<'_, PyAny>, what: &str) -> PyResult<f64> {
    duration(value, what).map(|duration| duration.as_secs_f64())
}

/// An argument of which it matters that it was not given, for `None` is a value.
pub(crate) struct Given<'py>(pub(crate) Option<Bound<'py, PyAny>>);

impl<'a, 'py> FromPyObject<'a, 'py> for Given<'py> {
    type Error = PyErr;

    fn extract(value: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        Ok(Self(Some(value.to_owned())))
    }
}

/// How long to wait: `None` for ever.
pub(crate) type Timeout = Option<Duration>;

/// How long to wait: not given, or `None` for ever, or a time.
pub(crate) fn timeout(given: &Given<'_>) -> PyResult<Option<Timeout>> {
    match &given.0 {
        None => Ok(None),
        Some(value) if value.is_none() => Ok(Some(None)),
        Some(value) => duration(value, "timeout").map(|timeout| Some(Some(timeout))),
    }
}
