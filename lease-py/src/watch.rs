//! Who holds a name, told whenever it changes.

use std::future::poll_fn;
use std::sync::Arc;

use lease_core::{Change, Changes, Error, ErrorKind, Manager, Result};
use pyo3::prelude::*;
use tokio::sync::Mutex;

use crate::errors::raise;
use crate::mailbox::{Answer, Holder, Pending};
use crate::process::Own;
use crate::values;
use crate::wait::{wait, wait_within};

#[doc = include_str!(concat!(env!("OUT_DIR"), "/BaseWatch"))]
#[pyclass(frozen, subclass, module = "lease._lease")]
pub(crate) struct BaseWatch {
    name: String,
    /// Locked by whoever waits for the next change.
    changes: Own<Arc<Mutex<Changes>>>,
}

/// `None` when the watch is over.
async fn next(changes: Arc<Mutex<Changes>>) -> Result<Option<Holder>> {
    let mut changes = changes.lock().await;
    let change = poll_fn(|cx| changes.as_mut().poll_next(cx)).await.transpose()?;
    Ok(change.map(|change| if let Change::Held(record) = change { Some(record) } else { None }))
}

impl BaseWatch {
    pub(crate) fn of(py: Python<'_>, manager: &Manager, name: String) -> PyResult<Self> {
        lease_core::Name::new(&name).map_err(|error| raise(py, &error.during("watch", None)))?;
        let changes = Own::new(Arc::new(Mutex::new(manager.watch(&name))));
        Ok(Self { name, changes })
    }

    fn changes(&self, py: Python<'_>) -> PyResult<Arc<Mutex<Changes>>> {
        self.changes.here("watch").cloned().map_err(|error| raise(py, &error.during("watch", None)))
    }
}

#[pymethods]
impl BaseWatch {
    fn __repr__(&self) -> String {
        format!("<Watch '{}'>", self.name.escape_debug())
    }

    /// For the asyncio side of this package.
    #[pyo3(name = "_next")]
    fn start_next(&self, py: Python<'_>) -> PyResult<Pending> {
        let changes = self.changes(py)?;
        Ok(Pending::new(async move { next(changes).await.map(Answer::Change) }))
    }
}

#[doc = include_str!(concat!(env!("OUT_DIR"), "/Watch"))]
#[pyclass(frozen, extends = BaseWatch, module = "lease")]
pub(crate) struct Watch;

impl Watch {
    pub(crate) fn of(py: Python<'_>, base: BaseWatch) -> PyResult<Bound<'_, Self>> {
        Bound::new(py, PyClassInitializer::from(base).add_subclass(Self))
    }
}

#[pymethods]
impl Watch {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    /// Ends when the watch is over, which the step before has told: the manager was closed.
    fn __next__<'py>(slf: &Bound<'py, Self>) -> PyResult<Option<Told<'py>>> {
        let (py, base) = (slf.py(), slf.as_super().get());
        let changes = base.changes(py)?;
        match wait(py, next(changes))?.map_err(|error| raise(py, &error))? {
            Some(record) => Told::of(py, record).map(Some),
            None => Ok(None),
        }
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Watch.next"))]
    #[pyo3(signature = (timeout = None), text_signature = "($self, timeout=None)")]
    fn next<'py>(slf: &Bound<'py, Self>, timeout: Option<&Bound<'py, PyAny>>) -> PyResult<Told<'py>> {
        let (py, base) = (slf.py(), slf.as_super().get());
        let limit = timeout.map(|timeout| values::duration(timeout, "timeout")).transpose()?;
        let changes = base.changes(py)?;
        let error = |kind, message| {
            let name = lease_core::Name::new(&base.name).ok();
            raise(py, &Error::new(kind, message).during("watch", name.as_ref()))
        };
        let Some(change) = wait_within(py, next(changes), limit)? else {
            return Err(error(ErrorKind::Timeout, "nothing changed"));
        };
        match change.map_err(|error| raise(py, &error))? {
            Some(record) => Told::of(py, record),
            None => Err(error(ErrorKind::Closed, "the watch is over: make a new manager")),
        }
    }
}

/// A record, or `None`: the name is free. Not an `Option`, whose `None` ends an iterator.
#[derive(IntoPyObject)]
pub(crate) struct Told<'py>(Bound<'py, PyAny>);

impl<'py> Told<'py> {
    fn of(py: Python<'py>, record: Holder) -> PyResult<Self> {
        let none = || Ok(py.None().into_bound(py));
        record.map_or_else(none, |record| values::record(py, record)).map(Self)
    }
}
