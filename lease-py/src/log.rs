//! Log lines for Python's `logging`: the logger `lease`.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::interpreter::{attached, unraisable};

/// Whether lines about each lease and renewal are made. They cost something, so they are only if they are wanted.
static DEBUG: AtomicBool = AtomicBool::new(false);

struct Lines;

fn logger(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    static LOGGER: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let get = || py.import("logging")?.call_method1("getLogger", ("lease",)).map(Bound::unbind);
    Ok(LOGGER.get_or_try_init(py, get)?.bind(py))
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // What the library is built on logs by itself, for who develops that.
        let ours = metadata.target().trim_start_matches('_').starts_with("lease");
        ours && metadata.is_event() && (*metadata.level() <= Level::INFO || DEBUG.load(Ordering::Relaxed))
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(if DEBUG.load(Ordering::Relaxed) { LevelFilter::DEBUG } else { LevelFilter::INFO })
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let level = match *event.metadata().level() {
            Level::ERROR => 40,
            Level::WARN => 30,
            Level::INFO => 20,
            _ => 10,
        };
        let line = lease_core::line_of(event);
        attached(|py| {
            let written = logger(py).and_then(|logger| logger.call_method1("log", (level, "%s", line)));
            unraisable(py, written, None);
        });
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// From now on lines go to the logger; those about details if it is enabled for them now.
pub(crate) fn subscribe(py: Python<'_>) -> PyResult<()> {
    static SUBSCRIBE: Once = Once::new();
    let debug = logger(py)?.call_method1("isEnabledFor", (10,))?.is_truthy()?;
    if debug && !DEBUG.swap(true, Ordering::Relaxed) {
        tracing::callsite::rebuild_interest_cache();
    }
    // Ours alone: this module has a tracing of its own.
    SUBSCRIBE.call_once(|| drop(tracing::subscriber::set_global_default(Lines)));
    Ok(())
}
