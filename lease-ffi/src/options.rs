//! Options by key and text.

use std::ffi::{c_char, c_int};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use lease_core::{Builder, Error, ErrorKind, Result};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::error::{lease_error_t, lease_status};
use crate::handle::{export, find, insert, invalid, remove, text, value};

/// Options of an open or an acquire. Free them with `lease_options_free`; they may be used for many calls.
pub struct lease_options_t {
    _private: [u8; 0],
}

#[derive(Default)]
struct Options(Mutex<Set>);

/// What was set so far.
#[derive(Clone, Default)]
pub(crate) struct Set {
    pub(crate) texts: Vec<(String, String)>,
    cancel: Option<Arc<OwnedFd>>,
}

impl Set {
    pub(crate) fn cancel(&self) -> Option<BorrowedFd<'_>> {
        self.cancel.as_ref().map(|fd| fd.as_fd())
    }
}

/// The options of a handle that may be NULL.
pub(crate) fn options(opts: *const lease_options_t) -> Result<Set> {
    if opts.is_null() {
        return Ok(Set::default());
    }
    let options = find::<Options>(opts.cast(), "opts", "lease_options_t")?;
    let set = options.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Ok(set)
}

/// New options with nothing set. NULL when too many handles are in use.
#[unsafe(no_mangle)]
pub extern "C" fn lease_options_new() -> *mut lease_options_t {
    value(ptr::null_mut(), || insert(Arc::new(Options::default())).ok())
}

/// Sets an option by its key: "ttl", "owner", "request_timeout" (see Options above). Times are numbers and units: "15s", "500ms",
/// "1m 30s". Setting a key again replaces its value. The texts are copied.
///
/// Errors: INVALID for an unknown key, naming the nearest known one, and for a wrong value. An acquire refuses
/// "request_timeout", which is the manager's, and "timeout", which the argument timeout_ms says.
#[unsafe(no_mangle)]
pub extern "C" fn lease_options_set(
    o: *mut lease_options_t,
    key: *const c_char,
    value: *const c_char,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let options = find::<Options>(o.cast(), "o", "lease_options_t")?;
        let (key, value) = (text(key, "key")?, text(value, "value")?);
        Builder::check_option(key, value)?;
        let mut set = options.0.lock().unwrap_or_else(PoisonError::into_inner);
        set.texts.retain(|(other, _)| other != key);
        set.texts.push((key.into(), value.into()));
        Ok(())
    })
}

/// A descriptor that ends the wait of an acquire: when it is readable, hung up or in error, the acquire gives up with
/// `LEASE_ERR_CANCELLED`. Use a pipe, a socket or an eventfd: a signal handler may write to it. It is only polled, and duplicated,
/// so you may close yours afterwards. -1 sets none.
///
/// Errors: INVALID when it is not open, or of a file or directory; LIMIT when no descriptor is left.
#[unsafe(no_mangle)]
pub extern "C" fn lease_options_set_cancel_fd(
    o: *mut lease_options_t,
    fd: c_int,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let options = find::<Options>(o.cast(), "o", "lease_options_t")?;
        let cancel = match fd {
            -1 => None,
            ..0 => return Err(invalid("fd", format!("is {fd}: give an open descriptor, or -1 for none"))),
            _ => {
                // SAFETY: it is only duplicated; the system says if it is not open.
                let duplicate = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
                let why = |error: std::io::Error| match Errno::from_io_error(&error) {
                    Some(Errno::BADF) | None => invalid("fd", format!("is {fd}, which is not open")),
                    _ => Error::new(ErrorKind::Limit, "cannot duplicate the descriptor: raise the limit of open files"),
                };
                let duplicate = duplicate.map_err(why)?;
                pollable(fd, &duplicate)?;
                Some(Arc::new(duplicate))
            }
        };
        options.0.lock().unwrap_or_else(PoisonError::into_inner).cancel = cancel;
        Ok(())
    })
}

/// Refuses what is readable at any time, or cannot be asked.
fn pollable(fd: c_int, duplicate: &OwnedFd) -> Result<()> {
    let kind = rustix::fs::fstat(duplicate).map(|stat| FileType::from_raw_mode(stat.st_mode));
    let is_path = rustix::fs::fcntl_getfl(duplicate).is_ok_and(|flags| flags.contains(OFlags::PATH));
    if is_path || matches!(kind, Ok(FileType::RegularFile | FileType::Directory)) {
        return Err(invalid("fd", format!("is {fd}, of a file or directory: give a pipe, a socket or an eventfd")));
    }
    Ok(())
}

/// Frees options. What was opened or acquired with them stays as it is. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn lease_options_free(o: *mut lease_options_t) {
    value((), || {
        remove::<Options>(o.cast());
        None
    });
}
