//! The resource's side: refuse a holder that woke up too late.

use std::ffi::c_char;
use std::ptr;
use std::sync::Arc;

use lease_core::Fence;

use crate::error::{lease_error_t, lease_status};
use crate::handle::{export, find, insert, remove, text, value};

/// Guards a resource of this process against stale holders. Free it with `lease_fence_free`.
pub struct lease_fence_t {
    _private: [u8; 0],
}

/// A fence that has seen nothing; NULL when too many handles are in use. It is for one process: the durable form is a condition in
/// the write's own transaction, "... WHERE fence <= token". It remembers every name it has seen.
#[unsafe(no_mangle)]
pub extern "C" fn lease_fence_new() -> *mut lease_fence_t {
    value(ptr::null_mut(), || insert(Arc::new(Fence::new())).ok())
}

/// Admits a write under this token, until `lease_fence_leave` with the same name and token, once for each. Waits while a write under
/// an older token is under way, 5 s at most.
///
/// Errors: LOST when a newer token was seen: the write must not happen. TIMEOUT when the older write did not end; tokens older than
/// this one are refused all the same. INVALID.
#[unsafe(no_mangle)]
pub extern "C" fn lease_fence_enter(
    f: *mut lease_fence_t,
    name: *const c_char,
    token: i64,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let fence = find::<Fence>(f.cast(), "f", "lease_fence_t")?;
        fence.enter(text(name, "name")?, crate::handle::token(token)?)
    })
}

/// The write is done.
///
/// Errors: NOT_FOUND when no write of that name and token is under way. INVALID.
#[unsafe(no_mangle)]
pub extern "C" fn lease_fence_leave(
    f: *mut lease_fence_t,
    name: *const c_char,
    token: i64,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let fence = find::<Fence>(f.cast(), "f", "lease_fence_t")?;
        fence.leave(text(name, "name")?, crate::handle::token(token)?)
    })
}

/// Frees a fence. Writes that are under way are no longer guarded. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn lease_fence_free(f: *mut lease_fence_t) {
    value((), || {
        remove::<Fence>(f.cast());
        None
    });
}
