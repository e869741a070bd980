//! A watch: who holds a name, again whenever it changes.

use std::ffi::c_char;
use std::future::poll_fn;
use std::pin::pin;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use lease_core::{Change, Changes, Error, ErrorKind};

use crate::error::{lease_error_t, lease_status};
use crate::handle::{export, find, insert, place, remove, text, timeout, value};
use crate::manager::{lease_manager_t, manager};
use crate::record::{lease_record_t, record};
use crate::wait::{Waited, wait};

/// A watch of a name. Free it with `lease_watch_free`.
pub struct lease_watch_t {
    _private: [u8; 0],
}

struct Watch(Mutex<Changes>);

/// Watches who holds a name. The first `lease_watch_next` tells who holds it now, each later one of a change; changes that follow
/// each other faster than you read are merged into the last.
///
/// Errors: INVALID, FORKED.
#[unsafe(no_mangle)]
pub extern "C" fn lease_manager_watch(
    m: *mut lease_manager_t,
    name: *const c_char,
    out: *mut *mut lease_watch_t,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let out = place(out)?;
        let name = lease_core::Name::new(text(name, "name")?)?;
        let handle = insert(Arc::new(Watch(Mutex::new(manager(m)?.watch(&*name)))))?;
        // SAFETY: `place` checked it, and the caller gave the address of a variable.
        unsafe { out.write(handle) };
        Ok(())
    })
}

/// Waits for the next change: `*out` becomes the new holder's record, to be freed, or NULL when the name is free. One thread at a
/// time; another waits for it.
///
/// Errors: TIMEOUT when nothing changed in time; UNAVAILABLE, DENIED, INCOMPATIBLE: the next call tries again, a second later;
/// CLOSED for good.
#[unsafe(no_mangle)]
pub extern "C" fn lease_watch_next(
    w: *mut lease_watch_t,
    timeout_ms: i64,
    out: *mut *mut lease_record_t,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let out = place(out)?;
        let limit = timeout(timeout_ms)?;
        let watch = find::<Watch>(w.cast(), "w", "lease_watch_t")?;
        let mut changes = watch.0.lock().unwrap_or_else(PoisonError::into_inner);
        let next = pin!(poll_fn(|cx| changes.as_mut().poll_next(cx)));
        let change = match wait(next, limit, None)? {
            Waited::Done(Some(change)) => change?,
            Waited::Done(None) => return Err(Error::new(ErrorKind::Closed, "the watch is over: open a new manager")),
            Waited::TimedOut | Waited::Cancelled => return Err(Error::new(ErrorKind::Timeout, "nothing changed")),
        };
        let handle = match change {
            Change::Held(holder) => record(holder)?,
            _ => ptr::null_mut(),
        };
        // SAFETY: as above.
        unsafe { out.write(handle) };
        Ok(())
    })
}

/// Frees a watch. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn lease_watch_free(w: *mut lease_watch_t) {
    value((), || {
        remove::<Watch>(w.cast());
        None
    });
}
