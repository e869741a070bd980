//! Log lines for C.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError, RwLock};
use std::time::Duration;

use lease_core::fork::undisturbed;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::error::c_string;
use crate::handle::{PerProcess, value};

/// A line about something that failed.
pub const LEASE_LOG_ERROR: c_int = 1;
/// A line about something to look at: a lost lease, a store that does not answer.
pub const LEASE_LOG_WARN: c_int = 2;
/// A line about something that happens seldom.
pub const LEASE_LOG_INFO: c_int = 3;
/// A line about each lease and each renewal.
pub const LEASE_LOG_DEBUG: c_int = 4;

type Callback = extern "C" fn(c_int, *const std::ffi::c_char, *mut c_void);

/// How long `lease_set_log` waits for a line that is being written.
const LINE_LIMIT: Duration = Duration::from_secs(5);

/// Where lines go.
struct Sink {
    log: Callback,
    user_data: *mut c_void,
    /// How many lines are being written.
    writing: Mutex<u32>,
    idle: Condvar,
}

// SAFETY: the header says that the function is called on any thread, so the user's data is made for that.
unsafe impl Send for Sink {}
// SAFETY: as above.
unsafe impl Sync for Sink {}

impl Sink {
    fn writing(&self) -> MutexGuard<'_, u32> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
pub(crate) struct Current(RwLock<Option<Arc<Sink>>>);

pub(crate) static SINK: PerProcess<Current> = PerProcess::new();

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

struct Lines;

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // What the library is built on logs by itself, for who develops that.
        let ours = metadata.target().starts_with("lease");
        ours && metadata.is_event() && *metadata.level() <= Level::DEBUG
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
        let sink = {
            let current = SINK.get().0.read().unwrap_or_else(PoisonError::into_inner);
            let Some(sink) = current.clone() else { return };
            // While it is still the one: who replaces it waits for this line.
            *sink.writing() += 1;
            sink
        };
        let level = match *event.metadata().level() {
            Level::ERROR => LEASE_LOG_ERROR,
            Level::WARN => LEASE_LOG_WARN,
            Level::INFO => LEASE_LOG_INFO,
            _ => LEASE_LOG_DEBUG,
        };
        let text = c_string(&lease_core::line_of(event));
        INSIDE.set(true);
        (sink.log)(level, text.as_ptr(), sink.user_data);
        INSIDE.set(false);
        *sink.writing() -= 1;
        sink.idle.notify_all();
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Where log lines go: one function for the process, or NULL: nowhere, as at the start and in a forked child. It is called with one
/// of LEASE_LOG_... and a line of UTF-8 that is valid during the call; on threads of the library and within your own calls, on
/// several threads at once: it must hold no lock that you hold while you call the library. A slow function delays your own calls
/// and loses lines; it delays no heartbeat. What it causes in the library is not logged.
///
/// Waits for lines that the function before is writing, 5 s at most, and not within that function; it is not called after that.
#[unsafe(no_mangle)]
pub extern "C" fn lease_set_log(
    log: Option<extern "C" fn(level: c_int, message: *const std::ffi::c_char, user_data: *mut c_void)>,
    user_data: *mut c_void,
) {
    static SUBSCRIBE: Once = Once::new();
    value((), || {
        let new = log.map(|log| Arc::new(Sink { log, user_data, writing: Mutex::default(), idle: Condvar::new() }));
        let before = std::mem::replace(&mut *SINK.get().0.write().unwrap_or_else(PoisonError::into_inner), new);
        if let Some(before) = before
            && !INSIDE.get()
        {
            drop(before.idle.wait_timeout_while(before.writing(), LINE_LIMIT, |writing| *writing > 0));
        }
        if log.is_some() {
            // Ours alone: the library has a tracing of its own.
            // A child that is forked in the midst of it would wait for a thread that it does not have.
            undisturbed(|| SUBSCRIBE.call_once(|| drop(tracing::subscriber::set_global_default(Lines))));
        }
        None
    });
}
