//! The Python package: translates, and decides nothing. What is public is documented in `python/lease/_lease.pyi`.
//!
//! One file a noun. `interpreter` has all that is about the interpreter's lock and its end, `wait` how a thread waits,
//! `mailbox` how an event loop does, `process` what a forked child must not touch.
#![forbid(unsafe_code)]
#![allow(clippy::needless_pass_by_value, clippy::unused_self, reason = "the signatures are Python's")]
#![allow(
    clippy::doc_lazy_continuation,
    clippy::doc_link_with_quotes,
    clippy::doc_markdown,
    reason = "so is the documentation"
)]

mod errors;
mod fence;
mod interpreter;
mod lease;
mod log;
mod mailbox;
mod manager;
mod process;
mod testing;
mod values;
mod wait;
mod watch;

use pyo3::prelude::*;

/// Does nothing: the floor of the figures.
#[pyclass(frozen, name = "_Nothing", module = "lease._lease")]
pub(crate) struct Nothing;

#[pymethods]
impl Nothing {
    #[new]
    fn new() -> Self {
        Self
    }

    fn nothing(&self) {}

    /// Something to ask for that panics: for the test that a panic is an error.
    fn panic(&self) -> mailbox::Pending {
        mailbox::Pending::new(async { panic!("of a test") })
    }
}

// Where the interpreter has no lock, it takes one for us: what is inherited by a fork counts on it.
#[pymodule(gil_used = true)]
mod _lease {
    #[pymodule_export]
    use crate::fence::{Admitted, Fence};
    #[pymodule_export]
    use crate::interpreter::at_exit;
    #[pymodule_export]
    use crate::lease::{BaseLease, Cancelled, Lease};
    #[pymodule_export]
    use crate::mailbox::{Mailbox, Pending};
    #[pymodule_export]
    use crate::manager::{BaseManager, Manager};
    #[pymodule_export]
    use crate::testing::CutStore;
    #[pymodule_export]
    use crate::values::seconds;
    #[pymodule_export]
    use crate::watch::{BaseWatch, Watch};
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::Nothing;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::interpreter::only_one(module.py())?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("ERRORS", crate::errors::table())?;
        module.add("END_REASONS", crate::values::end_reasons())?;
        // What is public is said by the package.
        module.delattr("__all__")
    }
}
