//! Log lines for C.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::fmt::{self, Write};
use std::sync::{Once, PoisonError, RwLock};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::error::c_string;
use crate::handle::value;

/// A line about something that failed.
pub const LEASE_LOG_ERROR: c_int = 1;
/// A line about something to look at: a lost lease, a store that does not answer.
pub const LEASE_LOG_WARN: c_int = 2;
/// A line about something that happens seldom.
pub const LEASE_LOG_INFO: c_int = 3;
/// A line about each lease and each renewal.
pub const LEASE_LOG_DEBUG: c_int = 4;

type Callback = extern "C" fn(c_int, *const std::ffi::c_char, *mut c_void);

#[derive(Clone, Copy)]
struct Sink {
    log: Callback,
    user_data: *mut c_void,
}

// SAFETY: the header says that the function is called on any thread, so the user's data is made for that.
unsafe impl Send for Sink {}
// SAFETY: as above.
unsafe impl Sync for Sink {}

static SINK: RwLock<Option<Sink>> = RwLock::new(None);

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

struct Lines;

/// `message key=value key=value`
struct Line(String, String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a text cannot fail.
        let _ = if field.name() == "message" {
            write!(self.0, "{value:?}")
        } else {
            write!(self.1, " {}={value:?}", field.name())
        };
    }
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= Level::DEBUG
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        // A line that is caused by the user's own function would call it for ever.
        if INSIDE.get() {
            return;
        }
        let sink = SINK.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Sink { log, user_data }) = *sink else { return };
        let level = match *event.metadata().level() {
            Level::ERROR => LEASE_LOG_ERROR,
            Level::WARN => LEASE_LOG_WARN,
            Level::INFO => LEASE_LOG_INFO,
            _ => LEASE_LOG_DEBUG,
        };
        let mut line = Line(String::new(), String::new());
        event.record(&mut line);
        let text = c_string(&(line.0 + &line.1));
        INSIDE.set(true);
        // Under the lock, so that it is not called after it was replaced.
        log(level, text.as_ptr(), user_data);
        INSIDE.set(false);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Where log lines go: one function for the process, called on any thread with one of `LEASE_LOG_…` and a line of UTF-8 that is
/// valid during the call. NULL: nowhere, as at the start. Once this has returned, the function before is not called any more; so
/// do not call this from the function itself, where it does nothing. A slow function loses lines, and delays no heartbeat.
#[unsafe(no_mangle)]
pub extern "C" fn lease_set_log(
    log: Option<extern "C" fn(level: c_int, message: *const std::ffi::c_char, user_data: *mut c_void)>,
    user_data: *mut c_void,
) {
    static SUBSCRIBE: Once = Once::new();
    value((), || {
        if INSIDE.get() {
            return None;
        }
        *SINK.write().unwrap_or_else(PoisonError::into_inner) = log.map(|log| Sink { log, user_data });
        if log.is_some() {
            // Ours alone: the library has a tracing of its own.
            SUBSCRIBE.call_once(|| drop(tracing::subscriber::set_global_default(Lines)));
        }
        None
    });
}
