//! The resource's side.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lease_core::clock::Moment;
use lease_core::{ErrorKind, Fence as Core, Token};
use pyo3::prelude::*;

use crate::errors::{during, raise_with, wrong_use};
use crate::interpreter::detached;
use crate::process::Own;
use crate::values;

/// How long a newer holder waits for an older one's write.
const LIMIT: Duration = Duration::from_secs(5);
/// How often it looks whether a signal has arrived.
const SIGNALS_EVERY: Duration = Duration::from_millis(50);

#[doc = include_str!(concat!(env!("OUT_DIR"), "/Fence"))]
#[pyclass(frozen, weakref, module = "lease")]
pub(crate) struct Fence(Mutex<Own<Arc<Core>>>);

impl Fence {
    /// A forked child begins with a new one: in its parent's, threads may be that the child does not have.
    fn core(&self) -> Arc<Core> {
        let mut core = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if core.get().is_none() {
            *core = Own::new(Arc::default());
        }
        core.get().cloned().unwrap_or_default()
    }
}

#[pymethods]
impl Fence {
    #[new]
    fn new() -> Self {
        Self(Mutex::new(Own::new(Arc::default())))
    }

    #[doc = include_str!(concat!(env!("OUT_DIR"), "/Fence.admit"))]
    fn admit(&self, py: Python<'_>, name: &Bound<'_, PyAny>, token: &Bound<'_, PyAny>) -> PyResult<Admitted> {
        let arguments = values::text(name, "name").and_then(|text| Ok((text, values::token(token)?)));
        let (name, token) = during(arguments, "admit", Some(name), py)?;
        let (fence, until) = (self.core(), Moment::now() + LIMIT);
        loop {
            let left = until.since(Moment::now());
            let entered = detached(py, || fence.enter_within(&name, token, left.min(SIGNALS_EVERY)));
            match entered {
                Ok(()) => {
                    let fence = Own::new(fence);
                    return Ok(Admitted { fence, name, token, inside: AtomicBool::new(true) });
                }
                Err(error) if error.kind() == ErrorKind::Timeout && left > SIGNALS_EVERY => py.check_signals()?,
                Err(error) => return Err(raise_with(py, &error, Some(token.get()))),
            }
        }
    }

    fn __repr__(&self) -> &'static str {
        "<Fence>"
    }
}

#[doc = include_str!(concat!(env!("OUT_DIR"), "/Admitted"))]
#[pyclass(frozen, module = "lease")]
pub(crate) struct Admitted {
    fence: Own<Arc<Core>>,
    name: String,
    token: Token,
    inside: AtomicBool,
}

impl Admitted {
    fn leave(&self) {
        if self.inside.swap(false, Ordering::Relaxed) {
            // Entered by `admit` and left only here, so it is inside; but not in a forked child.
            if let Some(fence) = self.fence.get() {
                drop(fence.leave(&self.name, self.token));
            }
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.leave();
    }
}

#[pymethods]
impl Admitted {
    fn __enter__(slf: Bound<'_, Self>) -> PyResult<Bound<'_, Self>> {
        if slf.get().inside.load(Ordering::Relaxed) {
            return Ok(slf);
        }
        Err(wrong_use(slf.py(), "this write is over: call admit for each"))
    }

    fn __exit__(&self, _kind: &Bound<'_, PyAny>, _exception: &Bound<'_, PyAny>, _traceback: &Bound<'_, PyAny>) {
        self.leave();
    }

    fn __repr__(&self) -> String {
        let state = if self.inside.load(Ordering::Relaxed) { "inside" } else { "left" };
        format!("<Admitted '{}' token={} {state}>", self.name.escape_debug(), self.token)
    }
}
