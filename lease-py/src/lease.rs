//! What is held.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use lease_core::signal::EndSignal;
use lease_core::{EndReason, Error, Lease as Held};
use pyo3::PyTraverseError;
use pyo3::gc::PyVisit;
use pyo3::prelude::*;

use crate::errors::{during, is_loss_of, is_ours, raise_with, wrong_type, wrong_use};
use crate::interpreter::{attached, detached, unraisable};
use crate::mailbox::{Answer, Pending, lock};
use crate::process::Own;
use crate::values;
use crate::wait::{wait, wait_within};

const ENTERED: &str = "the lease is entered already: enter it once, or acquire another";

#[doc = include_str!(concat!(env!("OUT_DIR"), "/BaseLease"))]
#[pyclass(frozen, subclass, weakref, module = "lease._lease")]
pub(crate) struct BaseLease {
    held: Own<Arc<Held>>,
    token: i64,
    ended: Own<OnceLock<Arc<EndSignal>>>,
    entered: AtomicBool,
    /// Owned by this object, where the garbage collector sees them, and not by the core: a callback may refer to its lease.
    callbacks: Arc<Mutex<Vec<Option<Py<PyAny>>>>>,
}

impl BaseLease {
    fn of(held: Held) -> Self {
        Self {
            token: held.token().get(),
            held: Own::new(Arc::new(held)),
            ended: Own::new(OnceLock::new()),
            entered: AtomicBool::new(false),
            callbacks: Arc::default(),
        }
    }

    fn name(&self) -> &str {
        // Plain memory, which a forked child has too.
        self.held.peek().map_or("", |held| held.name().as_str())
    }

    pub(crate) fn raise(&self, py: Python<'_>, error: &Error) -> PyErr {
        raise_with(py, error, Some(self.token))
    }

    /// The lease, or `Forked` in a forked child.
    fn here(&self, py: Python<'_>, operation: &'static str) -> PyResult<&Arc<Held>> {
        self.held.get().ok_or_else(|| {
            let held = self.held.peek().expect("taken by drop only");
            self.raise(py, &Error::ended(EndReason::Forked, held.name()).during(operation, None))
        })
    }

    /// Why it ended, `None` while it is held.
    fn ended(&self) -> Option<EndReason> {
        self.held.get().map_or(Some(EndReason::Forked), |held| held.end_reason())
    }

    /// What is left to do at the end of a block, after the release: a loss is raised when the body succeeded, else noted.
    fn settle(&self, py: Python<'_>, released: PyResult<()>, exception: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let Err(error) = released else { return Ok(()) };
        let failed = error.value(py);
        let is_loss = !failed.getattr("reason").is_ok_and(|reason| reason.is_none());
        match exception {
            None if is_loss => Err(error),
            Some(exception) if is_loss => {
                if !is_loss_of(py, exception, self.name(), self.token)? {
                    exception.call_method1("add_note", (failed.str()?,))?;
                }
                Ok(())
            }
            _ => {
                let logger = py.import("logging")?.call_method1("getLogger", ("lease",))?;
                logger.call_method1("warning", ("not released: %s", failed)).map(drop)
            }
        }
    }
}

impl Drop for BaseLease {
    fn drop(&mut self) {
        if let Some(signal) = self.ended.get().and_then(OnceLock::get) {
            signal.close();
        }
    }
}

#[pymethods]
impl BaseLease {
    #[new]
    #[pyo3(signature = (pending = None))]
    fn new(py: Python<'_>, pending: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let pending = pending.and_then(|pending| pending.cast::<Pending>().ok());
        let pending = pending.ok_or_else(|| wrong_type(py, "leases are not made: get one from acquire"))?;
        match pending.get().answer(py)? {
            Answer::Lease(Some(held)) => Ok(Self::of(held)),
            _ => Err(wrong_use(py, "there is no lease in it")),
        }
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/BaseLease.token"))]
    #[getter]
    fn token(&self) -> i64 {
        self.token
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/BaseLease.name"))]
    #[getter(name)]
    fn get_name(&self) -> &str {
        self.name()
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/BaseLease.owner"))]
    #[getter]
    fn owner(&self) -> &str {
        self.held.peek().map_or("", |held| held.owner())
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/BaseLease.ttl"))]
    #[getter]
    fn ttl(&self) -> f64 {
        self.held.peek().map_or(0.0, |held| held.ttl().as_secs_f64())
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/BaseLease.remaining"))]
    #[getter]
    fn remaining(&self) -> f64 {
        self.held.get().map_or(Duration::ZERO, |held| held.remaining()).as_secs_f64()
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/BaseLease.is_held"))]
    #[getter]
    fn is_held(&self) -> bool {
        self.held.get().is_some_and(|held| held.is_held())
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/BaseLease.end_reason"))]
    #[getter]
    fn end_reason<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.ended().map(|reason| values::reason(py, reason)).transpose()
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/BaseLease.check"))]
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        match self.held.get() {
            Some(held) => held.check().map_err(|error| self.raise(py, &error)),
            None => self.here(py, "check").map(drop),
        }
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/BaseLease.fileno"))]
    fn fileno(&self, py: Python<'_>) -> PyResult<i32> {
        let held = self.here(py, "fileno")?;
        let Some(signal) = self.ended.get().and_then(OnceLock::get) else {
            let new = held.end_signal().map_err(|error| self.raise(py, &error))?;
            return Ok(self.ended.peek().map_or(-1, |ended| ended.get_or_init(|| new).fd()));
        };
        Ok(signal.fd())
    }

    fn __repr__(&self) -> String {
        let state = match (self.ended(), self.held.get()) {
            (None, Some(held)) => format!("held, {:.1}s left", held.remaining().as_secs_f64()),
            (Some(reason), _) if reason.is_loss() => format!("lost: {reason}"),
            (Some(EndReason::Closed), _) => "released: its manager was closed".into(),
            _ => "released".into(),
        };
        format!("<Lease {} token={} {state}>", quoted(self.name()), self.token)
    }

    fn __reduce__(&self, py: Python<'_>) -> PyResult<()> {
        Err(wrong_type(py, "a lease cannot be pickled or copied: hand on its token, which the resource can check"))
    }

    /// For the asyncio side of this package.
    #[pyo3(name = "_confirm")]
    fn start_confirm(&self, py: Python<'_>) -> PyResult<Pending> {
        let held = self.here(py, "confirm")?.clone();
        Ok(Pending::about(self.token, async move { held.confirm().await.map(|()| Answer::Nothing) }))
    }

    /// For the asyncio side of this package.
    #[pyo3(name = "_release")]
    fn start_release(&self, py: Python<'_>) -> PyResult<Pending> {
        let held = self.here(py, "release")?.clone();
        Ok(Pending::about(self.token, async move { held.give_back().await.map(|()| Answer::Nothing) }))
    }

    /// For the asyncio side of this package.
    #[pyo3(name = "_ended")]
    fn start_ended(&self, py: Python<'_>) -> PyResult<Pending> {
        let ended = self.here(py, "cancelled")?.ended();
        Ok(Pending::new(async move { Ok(Answer::Reason(ended.await.reason)) }))
    }

    /// For the asyncio side of this package: what dropping it does.
    #[pyo3(name = "_abandon")]
    fn abandon(&self) {
        if let Some(held) = self.held.get() {
            held.abandon();
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Locked by nobody but who has the interpreter's lock, and does nothing else meanwhile.
        if let Ok(callbacks) = self.callbacks.try_lock() {
            callbacks.iter().try_for_each(|callback| visit.call(callback))?;
        }
        Ok(())
    }

    fn __clear__(&self) {
        let callbacks: Vec<_> = lock(&self.callbacks).iter_mut().map(Option::take).collect();
        drop(callbacks);
    }

    /// For the asyncio side of this package.
    #[pyo3(name = "_settle")]
    fn settle_error(
        &self,
        py: Python<'_>,
        error: Bound<'_, PyAny>,
        exception: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        self.settle(py, Err(PyErr::from_value(error)), exception)
    }
}

fn quoted(name: &str) -> String {
    format!("'{}'", name.escape_debug())
}

#[doc = include_str!(concat!(env!("OUT_DIR"), "/Lease"))]
#[pyclass(frozen, extends = BaseLease, module = "lease")]
pub(crate) struct Lease;

impl Lease {
    pub(crate) fn of(py: Python<'_>, held: Held) -> PyResult<Bound<'_, Self>> {
        Bound::new(py, PyClassInitializer::from(BaseLease::of(held)).add_subclass(Self))
    }

    fn give_back(base: &BaseLease, py: Python<'_>) -> PyResult<()> {
        let held = base.here(py, "release")?;
        wait(py, held.give_back())?.map_err(|error| base.raise(py, &error))
    }
}

#[pymethods]
impl Lease {
    #[new]
    #[pyo3(signature = (pending = None))]
    fn new(py: Python<'_>, pending: Option<&Bound<'_, PyAny>>) -> PyResult<PyClassInitializer<Self>> {
        Ok(PyClassInitializer::from(BaseLease::new(py, pending)?).add_subclass(Self))
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Lease.confirm"))]
    fn confirm(slf: PyRef<'_, Self>) -> PyResult<()> {
        let (py, base) = (slf.py(), slf.into_super());
        wait(py, base.here(py, "confirm")?.confirm())?.map_err(|error| base.raise(py, &error))
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Lease.release"))]
    fn release(slf: PyRef<'_, Self>) -> PyResult<()> {
        let (py, base) = (slf.py(), slf.into_super());
        Self::give_back(&base, py)
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Lease.cancelled"))]
    #[getter]
    fn cancelled(slf: Bound<'_, Self>) -> Cancelled {
        Cancelled(slf.into_super().unbind())
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Lease.on_lost"))]
    fn on_lost(slf: PyRef<'_, Self>, callback: Bound<'_, PyAny>) -> PyResult<()> {
        let (py, base) = (slf.py(), slf.into_super());
        if !callback.is_callable() {
            let message = format!("callback must be callable, not {}", values::kind(&callback));
            return Err(wrong_type(py, message));
        }
        let held = base.here(py, "on_lost")?.clone();
        let number = {
            let mut callbacks = lock(&base.callbacks);
            callbacks.push(Some(callback.unbind()));
            callbacks.len() - 1
        };
        let callbacks = Own::new(base.callbacks.clone());
        let tell = move |reason: EndReason| {
            if !reason.is_loss() {
                return;
            }
            attached(|py| {
                let callback = callbacks.get().and_then(|callbacks| lock(callbacks)[number].take());
                if let Some(callback) = callback {
                    let callback = callback.bind(py);
                    let told = values::reason(py, reason).and_then(|reason| callback.call1((reason,)));
                    unraisable(py, told, Some(callback));
                }
            });
        };
        detached(py, || held.on_end(tell)).map_err(|error| base.raise(py, &error))
    }

    fn __enter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        let (py, base) = (slf.py(), slf.as_super().get());
        base.check(py)?;
        if base.entered.swap(true, Ordering::Relaxed) {
            // Else its end would release the lease under the outer block.
            let name = base.name().into_pyobject(py)?.into_any();
            return during(Err(wrong_use(py, ENTERED)), "enter", Some(&name), py);
        }
        Ok(slf)
    }

    fn __exit__(
        slf: PyRef<'_, Self>,
        _kind: &Bound<'_, PyAny>,
        exception: Option<&Bound<'_, PyAny>>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (py, base) = (slf.py(), slf.into_super());
        base.entered.store(false, Ordering::Relaxed);
        match Self::give_back(&base, py) {
            // What interrupts the release, a signal's handler, is no error of it.
            Err(error) if !is_ours(py, &error) => Err(error),
            released => base.settle(py, released, exception),
        }
    }
}

#[doc = include_str!(concat!(env!("OUT_DIR"), "/Cancelled"))]
#[pyclass(frozen, module = "lease")]
pub(crate) struct Cancelled(Py<BaseLease>);

#[pymethods]
impl Cancelled {
    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Cancelled.is_set"))]
    fn is_set(&self) -> bool {
        self.0.get().ended().is_some()
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Cancelled.wait"))]
    #[pyo3(signature = (timeout = None), text_signature = "($self, timeout=None)")]
    fn wait(&self, py: Python<'_>, timeout: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        let limit = timeout.map(|timeout| values::duration(timeout, "timeout")).transpose()?;
        let base = self.0.get();
        let Some(held) = base.held.get() else { return Ok(true) };
        let ended = async {
            held.cancelled().await;
            Ok(true)
        };
        Ok(wait_within(py, ended, limit)?.is_some())
    }

    fn __repr__(&self) -> String {
        let state = if self.is_set() { "set" } else { "not set" };
        format!("<Cancelled {}: {state}>", quoted(self.0.get().name()))
    }
}
