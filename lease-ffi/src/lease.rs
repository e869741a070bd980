//! What is held.

use std::ffi::{CString, c_char, c_int};
use std::ptr;
use std::sync::{Arc, OnceLock};

use lease_core::signal::EndSignal;
use lease_core::{EndReason, Lease, Result};

use crate::cancelled::Callbacks;
use crate::error::{c_string, lease_error_t, lease_status};
use crate::handle::{export, find, insert, is_forked, millis, remove, value};
use crate::wait::block_on;

/// A lease: a name that is yours, as long as `lease_is_held` says so. Free it with `lease_free`.
pub struct lease_t {
    _private: [u8; 0],
}

/// Why a lease ended: the holder released it. This and `LEASE_END_CLOSED` are his own acts, all others are losses.
pub const LEASE_END_RELEASED: i32 = 0;
/// The store says that the claim is gone and that another heads the line.
pub const LEASE_END_SUPERSEDED: i32 = 1;
/// The store says that the claim is gone (expired, deleted, broken by an operator), and names no other holder.
pub const LEASE_END_GONE: i32 = 2;
/// Half the ttl passed since the last confirmed renewal; one had been tried and was not answered.
pub const LEASE_END_UNREACHABLE: i32 = 3;
/// Half the ttl passed without a renewal even tried: this process was stopped, suspended or starved.
pub const LEASE_END_STALLED: i32 = 4;
/// As LEASE_END_UNREACHABLE, the last answer being a refusal (credentials, permission).
pub const LEASE_END_DENIED: i32 = 5;
/// The manager was closed.
pub const LEASE_END_CLOSED: i32 = 6;
/// Seen in the child of a fork: the lease is the parent's.
pub const LEASE_END_FORKED: i32 = 7;

// The numbers are the core's.
const _: () = assert!(
    LEASE_END_RELEASED == EndReason::Released.code()
        && LEASE_END_SUPERSEDED == EndReason::Superseded.code()
        && LEASE_END_GONE == EndReason::Gone.code()
        && LEASE_END_UNREACHABLE == EndReason::Unreachable.code()
        && LEASE_END_STALLED == EndReason::Stalled.code()
        && LEASE_END_DENIED == EndReason::Denied.code()
        && LEASE_END_CLOSED == EndReason::Closed.code()
        && LEASE_END_FORKED == EndReason::Forked.code()
);

pub(crate) struct Held {
    pub(crate) lease: Lease,
    name: CString,
    ended: OnceLock<Arc<EndSignal>>,
    callbacks: Arc<Callbacks>,
}

impl Held {
    pub(crate) fn insert(lease: Lease) -> Result<*mut lease_t> {
        let name = c_string(lease.name());
        insert(Arc::new(Self { lease, name, ended: OnceLock::new(), callbacks: Arc::default() }))
    }
}

fn held(l: *const lease_t) -> Result<Arc<Held>> {
    find(l.cast(), "l", "lease_t")
}

fn read<T>(l: *const lease_t, otherwise: T, read: impl FnOnce(&Held) -> T) -> T {
    value(otherwise, || Some(read(&*held(l).ok()?)))
}

/// The fencing token: greater than every token given before for this name. Show it to whatever you write to. It stays readable
/// after the end. 0: not a lease handle, or an inherited one.
#[unsafe(no_mangle)]
pub extern "C" fn lease_token(l: *const lease_t) -> i64 {
    read(l, 0, |held| held.lease.token().get())
}

/// Whether it is yours at this instant, by the clock: never true again once it was false. Asks nobody. False for what is no lease
/// handle.
#[unsafe(no_mangle)]
pub extern "C" fn lease_is_held(l: *const lease_t) -> bool {
    read(l, false, |held| held.lease.is_held())
}

/// Call it before each step of the work: `LEASE_OK` while held. It reads a clock and asks nobody.
///
/// Errors: LOST with the reason (`lease_error_reason`) once the lease has ended, by whatever cause, your own release too.
#[unsafe(no_mangle)]
pub extern "C" fn lease_check(l: *const lease_t, err: *mut *mut lease_error_t) -> lease_status {
    export(err, || held(l)?.lease.check())
}

/// Milliseconds until it is lost unless a renewal succeeds: at most half the ttl, 0 once it ended and for what is no lease handle.
#[unsafe(no_mangle)]
pub extern "C" fn lease_remaining_ms(l: *const lease_t) -> i64 {
    read(l, 0, |held| millis(held.lease.remaining()))
}

/// Why it ended, one of LEASE_END_...; -1 while held, -2 for what is no lease handle.
#[unsafe(no_mangle)]
pub extern "C" fn lease_end_reason(l: *const lease_t) -> i32 {
    let otherwise = if is_forked(l.cast()) { LEASE_END_FORKED } else { -2 };
    read(l, otherwise, |held| held.lease.end_reason().map_or(-1, EndReason::code))
}

/// What is leased. Valid until `lease_free`. NULL: not a lease handle.
#[unsafe(no_mangle)]
pub extern "C" fn lease_name(l: *const lease_t) -> *const c_char {
    read(l, ptr::null(), |held| held.name.as_ptr())
}

/// A descriptor that becomes readable, and stays so, once the lease is not held any more, whatever the reason. For poll, epoll and
/// event loops: never read, write or close it. The same at each call. Closed by `lease_free`: take it out of your loop before.
///
/// Errors: LIMIT when no descriptor is left.
#[unsafe(no_mangle)]
pub extern "C" fn lease_cancelled_fd(l: *const lease_t, out: *mut c_int, err: *mut *mut lease_error_t) -> lease_status {
    export(err, || {
        let out = crate::handle::out(out)?;
        let held = held(l)?;
        let ended = if let Some(ended) = held.ended.get() {
            ended
        } else {
            let new = held.lease.end_signal()?;
            held.ended.get_or_init(|| new)
        };
        out.put(ended.fd());
        Ok(())
    })
}

/// Asks the store: a renewal now, within the request timeout.
///
/// Errors: LOST when the store says that it is gone, or when its time was up; UNAVAILABLE and DENIED when the store does not answer,
/// or refuses: then it is held still, until its time is up.
#[unsafe(no_mangle)]
pub extern "C" fn lease_confirm(l: *mut lease_t, err: *mut *mut lease_error_t) -> lease_status {
    export(err, || block_on(held(l)?.lease.confirm()))
}

/// Calls back once, on the thread that the manager has for callbacks, if the lease is lost; never for your own release or close. Any
/// number of callbacks; one that is registered after the loss is called too (if the manager is closed by then, by this very call).
/// It may run before this call returns. It may block, which delays the manager's other callbacks, and may call the library,
/// `lease_free` of this lease included; it must not throw or longjmp.
///
/// `free_user_data` (or NULL) is called with `user_data` exactly once in every case, on any thread: after the callback, when there
/// will be none, or when this call fails.
///
/// Errors: LIMIT when the thread for callbacks cannot be started.
#[unsafe(no_mangle)]
pub extern "C" fn lease_on_lost(
    l: *mut lease_t,
    callback: Option<extern "C" fn(reason: i32, user_data: *mut std::ffi::c_void)>,
    user_data: *mut std::ffi::c_void,
    free_user_data: Option<extern "C" fn(user_data: *mut std::ffi::c_void)>,
    err: *mut *mut lease_error_t,
) -> lease_status {
    let data = crate::cancelled::UserData::new(user_data, free_user_data);
    export(err, || {
        let callback = callback.ok_or_else(|| crate::handle::invalid("callback", "is NULL: give a function"))?;
        let held = held(l)?;
        let added = held.callbacks.add(&held.lease, callback, data);
        added.map_err(|error| error.during("on_lost", Some(held.lease.name())))
    })
}

/// Gives the name back, at once. Finish the work first. Takes at most 5 s. Harmless when repeated: only the first call tells
/// whether the store was told. The handle stays until `lease_free`.
///
/// Errors: LOST if it had been lost before; UNAVAILABLE, in doubt, if the store could not be told: the library keeps trying, and
/// what it cannot delete expires. DENIED, INCOMPATIBLE, in doubt: it expires.
#[unsafe(no_mangle)]
pub extern "C" fn lease_release(l: *mut lease_t, err: *mut *mut lease_error_t) -> lease_status {
    export(err, || block_on(held(l)?.lease.give_back()))
}

/// Frees the handle, its name and its descriptor. A lease that is still held is released in the background: release it yourself
/// before the process exits. No callback of it starts any more, and one that runs is waited for, 5 s at most, except in that
/// callback: so hold no lock that it takes. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn lease_free(l: *mut lease_t) {
    value((), || {
        let held = remove::<Held>(l.cast())?;
        held.callbacks.close();
        held.lease.abandon();
        // Others may hold the lease a moment longer; the descriptor is gone when this returns.
        if let Some(ended) = held.ended.get() {
            ended.close();
        }
        None
    });
}
