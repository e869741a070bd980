//! Errors of the core as exceptions, which are Python's own classes: `_errors.py`.

use lease_core::{Error, ErrorKind};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

use crate::values::reason;

/// Kinds by class and number, for the test that holds the classes to them.
pub(crate) fn table() -> Vec<(&'static str, i32, bool)> {
    ErrorKind::ALL.iter().map(|kind| (class(*kind), kind.code(), kind.is_retryable())).collect()
}

fn classes(py: Python<'_>) -> PyResult<&Bound<'_, PyModule>> {
    static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    Ok(MODULE.get_or_try_init(py, || py.import("lease._errors").map(Bound::unbind))?.bind(py))
}

fn class(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Timeout => "AcquireTimeout",
        ErrorKind::Lost => "LeaseLost",
        ErrorKind::Unavailable => "StoreUnavailable",
        ErrorKind::Invalid => "InvalidArgument",
        ErrorKind::Unsupported => "Unsupported",
        ErrorKind::Denied => "PermissionDenied",
        ErrorKind::Incompatible => "IncompatibleStore",
        ErrorKind::Cancelled => "AcquireCancelled",
        ErrorKind::Closed => "ManagerClosed",
        ErrorKind::Forked => "Forked",
        ErrorKind::NotFound => "NotFound",
        ErrorKind::Limit => "LimitExceeded",
        _ => "InternalError",
    }
}

/// The exception for an error.
pub(crate) fn raise(py: Python<'_>, error: &Error) -> PyErr {
    raise_with(py, error, None)
}

/// The same about a lease of that token.
pub(crate) fn raise_with(py: Python<'_>, error: &Error, token: Option<i64>) -> PyErr {
    let exception = || {
        let exception = classes(py)?.getattr(class(error.kind()))?.call1((error.to_line(),))?;
        let token = token.or_else(|| error.holder().map(|holder| holder.token.get()));
        exception.setattr("operation", error.operation())?;
        exception.setattr("name", error.name())?;
        exception.setattr("token", token)?;
        exception.setattr("holder", error.holder().map(|holder| &holder.owner))?;
        exception.setattr("place", error.place())?;
        exception.setattr("in_doubt", error.is_in_doubt())?;
        exception.setattr("reason", error.reason().map(|why| reason(py, why)).transpose()?)?;
        Ok(PyErr::from_value(exception))
    };
    exception().unwrap_or_else(|failure| failure)
}

/// An argument of the wrong type.
pub(crate) fn wrong_type(py: Python<'_>, message: impl Into<String>) -> PyErr {
    local(py, "WrongType", message.into())
}

/// A call at the wrong moment or place.
pub(crate) fn wrong_use(py: Python<'_>, message: impl Into<String>) -> PyErr {
    local(py, "WrongUse", message.into())
}

/// An argument that is wrong.
pub(crate) fn invalid(py: Python<'_>, message: impl Into<String>) -> PyErr {
    local(py, "InvalidArgument", message.into())
}

fn local(py: Python<'_>, class: &str, message: String) -> PyErr {
    let exception = || Ok::<_, PyErr>(PyErr::from_value(classes(py)?.getattr(class)?.call1((message,))?));
    exception().unwrap_or_else(|failure| failure)
}

/// What is wrong with an argument, with the operation and the name that it was about.
pub(crate) fn during<T>(
    outcome: PyResult<T>,
    operation: &str,
    name: Option<&Bound<'_, PyAny>>,
    py: Python<'_>,
) -> PyResult<T> {
    let tell = |error: &PyErr| {
        let exception = error.value(py);
        let is_ours = exception.is_instance(&classes(py)?.getattr("InvalidArgument")?)?;
        if is_ours && exception.getattr("operation")?.is_none() {
            let name: Option<String> = name.and_then(|name| name.extract().ok());
            let about = name.as_ref().map_or_else(String::new, |name| format!(" {name:?}"));
            exception.setattr("args", (format!("{operation}{about}: {}", exception.str()?),))?;
            exception.setattr("operation", operation)?;
            exception.setattr("name", name)?;
        }
        Ok::<_, PyErr>(())
    };
    outcome.map_err(|error| tell(&error).err().unwrap_or(error))
}

/// Refuses keywords that there are not, naming the nearest that there is.
pub(crate) fn refuse_unknown(py: Python<'_>, unknown: Option<&Bound<'_, PyDict>>, known: &[&str]) -> PyResult<()> {
    match unknown.and_then(|unknown| unknown.keys().get_item(0).ok()) {
        None => Ok(()),
        Some(word) => {
            let error = Error::unknown("keyword", &word.to_string(), known);
            Err(wrong_type(py, error.message()))
        }
    }
}

/// Whether it is one of this package's.
pub(crate) fn is_ours(py: Python<'_>, error: &PyErr) -> bool {
    let base = classes(py).and_then(|classes| classes.getattr("LeaseError"));
    base.is_ok_and(|base| error.matches(py, base).unwrap_or(false))
}

/// Whether an exception is the loss of that very lease.
pub(crate) fn is_loss_of(py: Python<'_>, exception: &Bound<'_, PyAny>, name: &str, token: i64) -> PyResult<bool> {
    let lost = classes(py)?.getattr("LeaseLost")?;
    Ok(exception.is_instance(&lost)?
        && exception.getattr("name")?.eq(name)?
        && exception.getattr("token")?.eq(token)?)
}
