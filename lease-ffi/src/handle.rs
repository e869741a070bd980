//! All pointer handling and all panic policy.
//!
//! A handle is not an address: it is an index and a generation, looked up in a table. So a handle that was freed, that is
//! of another kind, or that never was one is found out; and one from before a `fork` belongs to the parent.
//!
//! Invariant: nothing is dropped, and no user code runs, while the table is locked.

use std::any::Any;
use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::sync::{Arc, Once, PoisonError, RwLock};
use std::time::Duration;

use lease_core::{Error, ErrorKind, Result};
use slotmap::{DefaultKey, Key, KeyData, SlotMap};

use crate::error::{LEASE_OK, lease_error_t, lease_status};

/// What a handle stands for.
type Object = Arc<dyn Any + Send + Sync>;
type Table = RwLock<SlotMap<DefaultKey, Object>>;

/// This process's table: a forked child begins with none, and never touches its parent's.
static TABLE: AtomicPtr<Table> = AtomicPtr::new(ptr::null_mut());
/// How many forks this process is away from the one that loaded the library.
static FORKS: AtomicU32 = AtomicU32::new(0);
/// The slot map numbers its slots in the low 32 bits of a key. So many are enough; the rest tell the forks.
const INDEX_BITS: u32 = 24;

extern "C" fn forked() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    TABLE.store(ptr::null_mut(), Ordering::Release);
}

fn forks() -> u64 {
    u64::from(FORKS.load(Ordering::Relaxed)) & 0xff
}

fn table() -> &'static Table {
    static AT_FORK: Once = Once::new();
    loop {
        let table = TABLE.load(Ordering::Acquire);
        if !table.is_null() {
            // SAFETY: only leaked boxes are stored, which live for ever.
            return unsafe { &*table };
        }
        AT_FORK.call_once(|| {
            // SAFETY: the handler only stores to two atomics.
            let failed = unsafe { libc::pthread_atfork(None, None, Some(forked)) };
            assert_eq!(failed, 0, "a handler for fork can be registered");
        });
        let new = Box::into_raw(Box::<Table>::default());
        if TABLE.compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: it was made above, and nobody else has seen it.
            drop(unsafe { Box::from_raw(new) });
        }
    }
}

/// A new handle of this object.
pub(crate) fn insert<C, T: Any + Send + Sync>(object: Arc<T>) -> Result<*mut C> {
    let object: Object = object;
    let mut slots = table().write().unwrap_or_else(PoisonError::into_inner);
    if slots.len() >= (1 << INDEX_BITS) - 2 {
        drop(slots);
        return Err(Error::new(ErrorKind::Limit, "16,777,214 handles are in use: free some"));
    }
    let key = slots.insert(object).data().as_ffi();
    let word = usize::try_from(key | forks() << INDEX_BITS).expect("a pointer has 64 bits");
    Ok(ptr::without_provenance_mut(word))
}

fn key(handle: *const ()) -> Option<DefaultKey> {
    let word = handle.addr() as u64;
    (word >> INDEX_BITS & 0xff == forks()).then(|| KeyData::from_ffi(word & !(0xff << INDEX_BITS)).into())
}

/// The object of a handle. `argument` and `kind` are for the message.
pub(crate) fn find<T: Any + Send + Sync>(handle: *const (), argument: &str, kind: &str) -> Result<Arc<T>> {
    if handle.is_null() {
        return Err(Error::new(ErrorKind::Invalid, format!("argument {argument} is NULL: give a {kind}")));
    }
    let Some(key) = key(handle) else {
        if (handle.addr() as u64 >> INDEX_BITS & 0xff) < forks() {
            let message =
                format!("argument {argument} belongs to the parent of this forked process: make a new {kind}");
            return Err(Error::new(ErrorKind::Forked, message));
        }
        return Err(Error::new(ErrorKind::Invalid, format!("argument {argument} is no {kind}")));
    };
    let found = table().read().unwrap_or_else(PoisonError::into_inner).get(key).cloned();
    let found = found.ok_or_else(|| {
        let message = format!("argument {argument} is no {kind}, or one that was freed");
        Error::new(ErrorKind::Invalid, message)
    })?;
    found
        .downcast()
        .map_err(|_| Error::new(ErrorKind::Invalid, format!("argument {argument} is a handle, but of no {kind}")))
}

/// Whether this is an inherited handle, whatever its kind.
pub(crate) fn is_forked(handle: *const ()) -> bool {
    !handle.is_null() && key(handle).is_none() && (handle.addr() as u64 >> INDEX_BITS & 0xff) < forks()
}

/// Takes the object of a handle out of the table; nothing for NULL, a freed, a foreign and an inherited one.
pub(crate) fn remove<T: Any + Send + Sync>(handle: *const ()) -> Option<Arc<T>> {
    let key = key(handle)?;
    let mut slots = table().write().unwrap_or_else(PoisonError::into_inner);
    if slots.get(key)?.is::<T>() { slots.remove(key)?.downcast().ok() } else { None }
}

/// Runs an export that gives a status: a panic becomes `LEASE_ERR_INTERNAL`, an error is stored where the caller wants it.
pub(crate) fn export(err: *mut *mut lease_error_t, body: impl FnOnce() -> Result<()>) -> lease_status {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        inject();
        body()
    }));
    let error = match outcome {
        Ok(Ok(())) => return LEASE_OK,
        Ok(Err(error)) => error,
        Err(panic) => {
            let said = panic.downcast_ref::<&str>().copied().map(str::to_owned);
            let said = said.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            Error::new(ErrorKind::Internal, format!("a defect of the library, please report it: {said}"))
        }
    };
    let status = error.kind().code();
    if !err.is_null() {
        let stored = catch_unwind(AssertUnwindSafe(|| crate::error::handle(&error)));
        // SAFETY: the caller gave a place for a pointer, or NULL.
        unsafe { err.write(stored.ok().and_then(Result::ok).unwrap_or(ptr::null_mut())) };
    }
    status
}

/// Runs an export that gives a value; `otherwise` after a panic or an error.
pub(crate) fn value<T>(otherwise: T, body: impl FnOnce() -> Option<T>) -> T {
    catch_unwind(AssertUnwindSafe(|| {
        inject();
        body()
    }))
    .ok()
    .flatten()
    .unwrap_or(otherwise)
}

#[cfg(test)]
thread_local! {
    /// Makes the next export on this thread panic.
    pub(crate) static PANIC: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

fn inject() {
    #[cfg(test)]
    assert!(!PANIC.take(), "injected");
}

pub(crate) fn invalid(argument: &str, why: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Invalid, format!("argument {argument} {why}"))
}

/// A text argument.
pub(crate) fn text<'a>(argument: *const c_char, called: &str) -> Result<&'a str> {
    if argument.is_null() {
        return Err(invalid(called, "is NULL: give a text"));
    }
    // SAFETY: the caller gives a NUL-terminated text that lives as long as the call.
    let bytes = unsafe { CStr::from_ptr(argument) };
    bytes.to_str().map_err(|error| invalid(called, format!("is not UTF-8, at byte {}", error.valid_up_to())))
}

/// The place for a result.
pub(crate) fn place<T>(out: *mut T) -> Result<*mut T> {
    if out.is_null() { Err(invalid("out", "is NULL: give the address of a variable")) } else { Ok(out) }
}

/// A time in milliseconds: `None` for ever.
pub(crate) fn timeout(millis: i64) -> Result<Option<Duration>> {
    match u64::try_from(millis) {
        Ok(millis) => Ok(Some(Duration::from_millis(millis))),
        Err(_) if millis == -1 => Ok(None),
        Err(_) => Err(invalid("timeout_ms", format!("is {millis}: give at least 0, or LEASE_WAIT_FOREVER"))),
    }
}

/// Milliseconds of a duration, as C has them.
pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
