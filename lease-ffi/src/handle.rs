//! All pointer handling and all panic policy.
//!
//! A handle is not an address: it is an index and a generation, looked up in a table. So a handle that was freed, that is
//! of another kind, or that never was one is found out; and one from before a `fork` belongs to the parent.
//!
//! Invariant: nothing is dropped, and no user code runs, while the table is locked.

use std::any::Any;
use std::ffi::{CStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use lease_core::fork::{count, is_noticed};
use lease_core::{Error, ErrorKind, Result, Token};
use slotmap::{DefaultKey, Key, KeyData, SlotMap};

use crate::error::{LEASE_OK, lease_error_t, lease_status};

/// What a handle stands for.
type Object = Arc<dyn Any + Send + Sync>;
type Table = RwLock<SlotMap<DefaultKey, Object>>;

/// What a process has one of. A forked child begins with a new one: its parent's may be locked, by a thread that the child
/// does not have.
pub(crate) struct PerProcess<T: 'static>(AtomicPtr<(u32, T)>);

impl<T: Default> PerProcess<T> {
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    pub(crate) fn get(&self) -> &'static T {
        loop {
            let current = self.0.load(Ordering::Acquire);
            if !current.is_null() {
                // SAFETY: only leaked boxes are stored, which live for ever.
                let (forks, value) = unsafe { &*current };
                if *forks == count() {
                    return value;
                }
            }
            let new = Box::into_raw(Box::new((count(), T::default())));
            if self.0.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire).is_err() {
                // SAFETY: it was made above, and nobody else has seen it.
                drop(unsafe { Box::from_raw(new) });
            }
        }
    }
}

static TABLE: PerProcess<Table> = PerProcess::new();

/// The word of a handle, from its high bits: 32 of the slot's generation, 8 of how many forks there were, 24 of the slot's index.
/// The slot map gives 32 and 32; so many slots are enough.
const INDEX_BITS: u32 = 24;

fn forks() -> u64 {
    u64::from(count()) & 0xff
}

fn forks_of(handle: *const ()) -> u64 {
    handle.addr() as u64 >> INDEX_BITS & 0xff
}

/// A new handle of this object.
pub(crate) fn insert<C, T: Any + Send + Sync>(object: Arc<T>) -> Result<*mut C> {
    is_noticed()?;
    let object: Object = object;
    let mut slots = TABLE.get().write().unwrap_or_else(PoisonError::into_inner);
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
    (forks_of(handle) == forks()).then(|| KeyData::from_ffi(word & !(0xff << INDEX_BITS)).into())
}

/// The object of a handle. `argument` and `kind` are for the message.
pub(crate) fn find<T: Any + Send + Sync>(handle: *const (), argument: &str, kind: &str) -> Result<Arc<T>> {
    if handle.is_null() {
        return Err(Error::new(ErrorKind::Invalid, format!("argument {argument} is NULL: give a {kind}")));
    }
    let Some(key) = key(handle) else {
        if is_forked(handle) {
            let message =
                format!("argument {argument} belongs to the parent of this forked process: make a new {kind}");
            return Err(Error::new(ErrorKind::Forked, message));
        }
        return Err(Error::new(ErrorKind::Invalid, format!("argument {argument} is no {kind}")));
    };
    let found = TABLE.get().read().unwrap_or_else(PoisonError::into_inner).get(key).cloned();
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
    !handle.is_null() && forks_of(handle) < forks()
}

/// Takes the object of a handle out of the table; nothing for NULL, a freed, a foreign and an inherited one.
pub(crate) fn remove<T: Any + Send + Sync>(handle: *const ()) -> Option<Arc<T>> {
    let key = key(handle)?;
    let mut slots = TABLE.get().write().unwrap_or_else(PoisonError::into_inner);
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

/// Where a result goes: written to on success only.
pub(crate) struct Out<T>(NonNull<T>);

impl<T> Out<T> {
    pub(crate) fn put(self, result: T) {
        // SAFETY: the caller gave the address of a variable of that type.
        unsafe { self.0.write(result) };
    }
}

/// The argument `out`.
pub(crate) fn out<T>(argument: *mut T) -> Result<Out<T>> {
    NonNull::new(argument).map(Out).ok_or_else(|| invalid("out", "is NULL: give the address of a variable"))
}

/// A token that C gave.
pub(crate) fn token(token: i64) -> Result<Token> {
    Token::try_from(token).map_err(|error: Error| invalid("token", format!("is {token}: {}", error.message())))
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
