//! What went wrong, as C sees it.

use std::ffi::{CStr, CString, c_char};
use std::ptr;
use std::sync::Arc;

use lease_core::{Error, ErrorKind, Name, Result};

use crate::handle::{find, insert, is_forked, remove, value};

/// What a call came to: `LEASE_OK`, or one of those below.
pub type lease_status = i32;

/// It was done.
pub const LEASE_OK: lease_status = 0;
/// The deadline passed while somebody else held the name. Try again.
pub const LEASE_ERR_TIMEOUT: lease_status = 1;
/// The lease has ended: stop the work, and acquire anew.
pub const LEASE_ERR_LOST: lease_status = 2;
/// The store did not answer, or not in time. Try again.
pub const LEASE_ERR_UNAVAILABLE: lease_status = 3;
/// An argument is wrong. The message says which and why.
pub const LEASE_ERR_INVALID: lease_status = 4;
/// This build or this store cannot do it.
pub const LEASE_ERR_UNSUPPORTED: lease_status = 5;
/// The store refuses these credentials or permissions.
pub const LEASE_ERR_DENIED: lease_status = 6;
/// The store is not what it was, or was written by something else.
pub const LEASE_ERR_INCOMPATIBLE: lease_status = 7;
/// The caller gave up waiting.
pub const LEASE_ERR_CANCELLED: lease_status = 8;
/// The manager is closed.
pub const LEASE_ERR_CLOSED: lease_status = 9;
/// The handle belongs to the parent of this forked process.
pub const LEASE_ERR_FORKED: lease_status = 10;
/// There is no such lease.
pub const LEASE_ERR_NOT_FOUND: lease_status = 11;
/// A panic was caught: a defect of the library.
pub const LEASE_ERR_INTERNAL: lease_status = 12;
/// A limit of the system or of the store was reached. Try later.
pub const LEASE_ERR_LIMIT: lease_status = 13;

/// What went wrong. Free it with `lease_error_free`.
pub struct lease_error_t {
    _private: [u8; 0],
}

struct Failure {
    error: Error,
    message: CString,
    name: Option<CString>,
    holder: Option<CString>,
}

/// A text for C. Names and owners have no NUL; a message that quotes one is cut there.
pub(crate) fn c_string(text: &str) -> CString {
    let end = text.find('\0').unwrap_or(text.len());
    CString::new(&text[..end]).unwrap_or_default()
}

/// A new handle of an error.
pub(crate) fn handle(error: &Error) -> Result<*mut lease_error_t> {
    let message = error.to_line();
    insert(Arc::new(Failure {
        message: c_string(&message),
        name: error.name().map(c_string),
        holder: error.holder().map(|holder| c_string(&holder.owner)),
        error: error.clone(),
    }))
}

fn read<T>(e: *const lease_error_t, otherwise: T, read: impl FnOnce(&Failure) -> T) -> T {
    value(otherwise, || Some(read(&*find::<Failure>(e.cast(), "e", "lease_error_t").ok()?)))
}

/// The status that the failed call gave too. `LEASE_ERR_INVALID` for NULL and what is no error handle, `LEASE_ERR_FORKED` for an
/// inherited one.
#[unsafe(no_mangle)]
pub extern "C" fn lease_error_status(e: *const lease_error_t) -> lease_status {
    let otherwise = if is_forked(e.cast()) { LEASE_ERR_FORKED } else { LEASE_ERR_INVALID };
    read(e, otherwise, |failure| failure.error.kind().code())
}

/// What happened, to which name, and what to do: one line of UTF-8. Never NULL, whatever `e` is. Valid until `lease_error_free`.
#[unsafe(no_mangle)]
pub extern "C" fn lease_error_message(e: *const lease_error_t) -> *const c_char {
    read(e, c"this is no lease_error_t, or one that was freed".as_ptr(), |failure| failure.message.as_ptr())
}

/// Whether the same call may succeed later with nothing changed by you. False for what is no error handle.
#[unsafe(no_mangle)]
pub extern "C" fn lease_error_is_retryable(e: *const lease_error_t) -> bool {
    read(e, false, |failure| failure.error.is_retryable())
}

/// Whether the outcome is unknown: the request may have been applied though its answer was not seen. False for what is no error
/// handle.
#[unsafe(no_mangle)]
pub extern "C" fn lease_error_is_in_doubt(e: *const lease_error_t) -> bool {
    read(e, false, |failure| failure.error.is_in_doubt())
}

/// The name it was about, or NULL. Valid until `lease_error_free`.
#[unsafe(no_mangle)]
pub extern "C" fn lease_error_name(e: *const lease_error_t) -> *const c_char {
    read(e, ptr::null(), |failure| failure.name.as_deref().map_or(ptr::null(), CStr::as_ptr))
}

/// After a timeout of an acquire: the owner text of who held the name, if that is known. Else NULL. Valid until `lease_error_free`.
#[unsafe(no_mangle)]
pub extern "C" fn lease_error_holder(e: *const lease_error_t) -> *const c_char {
    read(e, ptr::null(), |failure| failure.holder.as_deref().map_or(ptr::null(), CStr::as_ptr))
}

/// Why the lease ended, one of LEASE_END_..., if the status is `LEASE_ERR_LOST` and a lease is what was lost. Else -1.
#[unsafe(no_mangle)]
pub extern "C" fn lease_error_reason(e: *const lease_error_t) -> i32 {
    read(e, -1, |failure| failure.error.reason().map_or(-1, lease_core::EndReason::code))
}

/// Frees an error and its texts. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn lease_error_free(e: *mut lease_error_t) {
    value((), || {
        remove::<Failure>(e.cast());
        None
    });
}

const NAMES: [(lease_status, &CStr); 14] = [
    (LEASE_OK, c"LEASE_OK"),
    (LEASE_ERR_TIMEOUT, c"LEASE_ERR_TIMEOUT"),
    (LEASE_ERR_LOST, c"LEASE_ERR_LOST"),
    (LEASE_ERR_UNAVAILABLE, c"LEASE_ERR_UNAVAILABLE"),
    (LEASE_ERR_INVALID, c"LEASE_ERR_INVALID"),
    (LEASE_ERR_UNSUPPORTED, c"LEASE_ERR_UNSUPPORTED"),
    (LEASE_ERR_DENIED, c"LEASE_ERR_DENIED"),
    (LEASE_ERR_INCOMPATIBLE, c"LEASE_ERR_INCOMPATIBLE"),
    (LEASE_ERR_CANCELLED, c"LEASE_ERR_CANCELLED"),
    (LEASE_ERR_CLOSED, c"LEASE_ERR_CLOSED"),
    (LEASE_ERR_FORKED, c"LEASE_ERR_FORKED"),
    (LEASE_ERR_NOT_FOUND, c"LEASE_ERR_NOT_FOUND"),
    (LEASE_ERR_INTERNAL, c"LEASE_ERR_INTERNAL"),
    (LEASE_ERR_LIMIT, c"LEASE_ERR_LIMIT"),
];

/// The name of a status, such as "LEASE_ERR_LOST"; "LEASE_ERR_?" for a number this version does not know. Never freed.
#[unsafe(no_mangle)]
pub extern "C" fn lease_status_name(s: lease_status) -> *const c_char {
    let known = NAMES.iter().find(|(status, _)| *status == s);
    known.map_or(c"LEASE_ERR_?", |(_, name)| name).as_ptr()
}

/// Refuses an acquire whose waiting the caller ended.
pub(crate) fn cancelled(name: &Name) -> Error {
    Error::new(ErrorKind::Cancelled, "given up, because the cancel fd became readable").during("acquire", Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_and_names_are_those_of_the_core() {
        let ours: Vec<_> = NAMES[1..].iter().map(|(code, name)| (*code, name.to_str().unwrap().to_owned())).collect();
        let cores: Vec<_> =
            ErrorKind::ALL.iter().map(|kind| (kind.code(), format!("LEASE_ERR_{}", kind.name()))).collect();
        assert_eq!(ours, cores);
    }
}
