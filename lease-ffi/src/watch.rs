//! A watch: who holds a name, again whenever it changes.

use std::ffi::c_char;
use std::future::poll_fn;
use std::pin::pin;
use std::ptr;
use std::sync::Arc;

use lease_core::{CancellationToken, Change, Changes, Error, ErrorKind, Name};
use tokio::sync::Mutex;

use crate::error::{lease_error_t, lease_status};
use crate::handle::{export, find, insert, invalid, remove, text, timeout, value};
use crate::manager::{lease_manager_t, manager};
use crate::record::{lease_record_t, record};
use crate::wait::{Waited, wait};

/// A watch of a name. Free it with `lease_watch_free`.
pub struct lease_watch_t {
    _private: [u8; 0],
}

struct Watch {
    name: Name,
    /// Locked by whoever waits for the next change; others wait for him no longer than they were told to.
    changes: Mutex<Changes>,
    /// Ends the waits of other threads when the handle is freed.
    freed: CancellationToken,
}

/// Watches who holds a name. The first `lease_watch_next` tells who holds it now, each later one of a change; changes that follow
/// each other faster than you read are merged into the last. Free `*out` with `lease_watch_free`.
///
/// Errors: INVALID, LIMIT.
#[unsafe(no_mangle)]
pub extern "C" fn lease_manager_watch(
    m: *mut lease_manager_t,
    name: *const c_char,
    out: *mut *mut lease_watch_t,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let out = crate::handle::out(out)?;
        let name = Name::new(text(name, "name")?).map_err(|error| error.during("watch", None))?;
        let changes = Mutex::new(manager(m)?.watch(&*name));
        let handle = insert(Arc::new(Watch { name, changes, freed: CancellationToken::new() }))?;
        out.put(handle);
        Ok(())
    })
}

/// Waits for the next change: `*out` becomes the new holder's record, to be freed with `lease_record_free`, or NULL when the name is
/// free. `timeout_ms` is as for `lease_manager_acquire`; with 0 a store that has to be asked may not have answered yet. Each change
/// is told to one thread: use one. Freeing the watch ends the wait.
///
/// Errors: TIMEOUT when nothing changed in time, and no change is missed; UNAVAILABLE, DENIED, INCOMPATIBLE, UNSUPPORTED: the next call
/// tries again, a second later; CLOSED for good; INVALID, also when the watch was freed meanwhile; LIMIT.
#[unsafe(no_mangle)]
pub extern "C" fn lease_watch_next(
    w: *mut lease_watch_t,
    timeout_ms: i64,
    out: *mut *mut lease_record_t,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let out = crate::handle::out(out)?;
        let limit = timeout(timeout_ms)?;
        let watch = find::<Watch>(w.cast(), "w", "lease_watch_t")?;
        let next = async {
            let mut changes = watch.changes.lock().await;
            poll_fn(|cx| changes.as_mut().poll_next(cx)).await
        };
        let change = match wait(pin!(watch.freed.run_until_cancelled(next)), limit, None)? {
            Waited::Done(Some(Some(change))) => change?,
            Waited::Done(Some(None)) => {
                return Err(Error::new(ErrorKind::Closed, "the watch is over: open a new manager"));
            }
            Waited::Done(None) => return Err(invalid("w", "was freed meanwhile")),
            Waited::TimedOut | Waited::Cancelled => {
                return Err(Error::new(ErrorKind::Timeout, "nothing changed").during("watch", Some(&watch.name)));
            }
        };
        let handle = match change {
            Change::Held(holder) => record(holder)?,
            _ => ptr::null_mut(),
        };
        out.put(handle);
        Ok(())
    })
}

/// Frees a watch. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn lease_watch_free(w: *mut lease_watch_t) {
    value((), || {
        remove::<Watch>(w.cast())?.freed.cancel();
        None
    });
}
