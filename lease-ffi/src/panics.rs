//! A panic in any export becomes an error, and the process lives.
#![allow(clippy::cmp_null, reason = "one macro for what gives pointers and what gives numbers")]
#![allow(clippy::many_single_char_names, reason = "those of the header")]

use std::collections::BTreeSet;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::{null, null_mut};

use crate::cancelled::UserData;
use crate::error::*;
use crate::fence::*;
use crate::handle::PANIC;
use crate::lease::*;
use crate::log::lease_set_log;
use crate::manager::*;
use crate::options::*;
use crate::pending::*;
use crate::record::*;
use crate::version::*;
use crate::watch::*;

extern "C" fn lost(_: i32, _: *mut c_void) {}

extern "C" fn free(data: *mut c_void) {
    // SAFETY: the test below gave a number.
    unsafe { *data.cast::<i32>() += 1 };
}

extern "C" fn log(_: c_int, _: *const c_char, _: *mut c_void) {}

/// Calls what gives a status, with a place for the error behind the arguments.
macro_rules! status {
    ($called:ident, $export:ident($($argument:expr),*)) => {{
        let mut err: *mut lease_error_t = null_mut();
        PANIC.set(true);
        assert_eq!($export($($argument,)* &raw mut err), LEASE_ERR_INTERNAL, stringify!($export));
        assert!(!PANIC.get(), "{}: nothing was injected", stringify!($export));
        // SAFETY: the text lives as long as the handle.
        let message = unsafe { CStr::from_ptr(lease_error_message(err)) }.to_str().unwrap();
        assert!(message.contains("injected"), "{message}");
        lease_error_free(err);
        // Nor is a caller needed who wants the error.
        PANIC.set(true);
        assert_eq!($export($($argument,)* null_mut()), LEASE_ERR_INTERNAL, stringify!($export));
        $called.insert(stringify!($export));
    }};
}

/// Calls what gives a value, or nothing, and says what it gives then.
macro_rules! value {
    ($called:ident, $export:ident($($argument:expr),*), $otherwise:expr) => {{
        PANIC.set(true);
        let given = $export($($argument),*);
        assert!(!PANIC.get(), "{}: nothing was injected", stringify!($export));
        assert!(given == $otherwise, stringify!($export));
        $called.insert(stringify!($export));
    }};
}

#[test]
fn a_panic_in_any_export_is_an_error_and_the_process_lives() {
    let mut called = BTreeSet::new();
    let (m, l, p, w, f): (*mut _, *mut _, *mut _, *mut _, *mut _) =
        (null_mut(), null_mut(), null_mut(), null_mut(), null_mut());
    let (o, n): (*mut lease_options_t, *const c_char) = (null_mut(), null());

    status!(called, lease_version_check(1));
    status!(called, lease_manager_open(n, o, null_mut()));
    status!(called, lease_manager_acquire(m, n, 0, o, null_mut()));
    status!(called, lease_manager_acquire_start(m, n, 0, o, null_mut()));
    status!(called, lease_manager_inspect(m, n, null_mut()));
    status!(called, lease_manager_list(m, n, null_mut()));
    status!(called, lease_manager_watch(m, n, null_mut()));
    status!(called, lease_manager_break(m, n, 1));
    status!(called, lease_manager_ping(m));
    status!(called, lease_manager_close(m));
    status!(called, lease_check(l));
    status!(called, lease_confirm(l));
    status!(called, lease_release(l));
    status!(called, lease_cancelled_fd(l, null_mut()));
    let mut freed = 0_i32;
    status!(called, lease_on_lost(l, Some(lost), (&raw mut freed).cast(), Some(free)));
    assert_eq!(freed, 2, "once a call");
    drop(UserData::new(null_mut(), None));
    status!(called, lease_options_set(o, n, n));
    status!(called, lease_options_set_cancel_fd(o, 0));
    status!(called, lease_pending_fd(p, null_mut()));
    status!(called, lease_pending_take(p, null_mut()));
    status!(called, lease_watch_next(w, 0, null_mut()));
    status!(called, lease_fence_enter(f, n, 1));
    status!(called, lease_fence_leave(f, n, 1));

    let (e, r, rs) = (null_mut::<lease_error_t>(), null_mut::<lease_record_t>(), null_mut::<lease_records_t>());
    value!(called, lease_token(l), 0);
    value!(called, lease_is_held(l), false);
    value!(called, lease_remaining_ms(l), 0);
    value!(called, lease_end_reason(l), -2);
    value!(called, lease_name(l), null());
    value!(called, lease_options_new(), null_mut());
    value!(called, lease_fence_new(), null_mut());
    value!(called, lease_error_status(e), LEASE_ERR_INVALID);
    value!(called, lease_error_is_retryable(e), false);
    value!(called, lease_error_is_in_doubt(e), false);
    value!(called, lease_error_name(e), null());
    value!(called, lease_error_holder(e), null());
    value!(called, lease_error_reason(e), -1);
    PANIC.set(true);
    assert!(!lease_error_message(e).is_null());
    called.insert("lease_error_message");
    value!(called, lease_record_name(r), null());
    value!(called, lease_record_token(r), 0);
    value!(called, lease_record_owner(r), null());
    value!(called, lease_record_held_ms(r), -1);
    value!(called, lease_record_ttl_ms(r), -1);
    value!(called, lease_record_waiting(r), -1);
    value!(called, lease_records_count(rs), 0);
    value!(called, lease_records_at(rs, 0), null());
    value!(called, lease_set_log(Some(log), null_mut()), ());
    value!(called, lease_error_free(e), ());
    value!(called, lease_record_free(r), ());
    value!(called, lease_records_free(rs), ());
    value!(called, lease_watch_free(w), ());
    value!(called, lease_pending_free(p), ());
    value!(called, lease_fence_free(f), ());
    value!(called, lease_options_free(o), ());
    value!(called, lease_free(l), ());
    value!(called, lease_manager_free(m), ());

    // These look at constants only.
    called.extend(["lease_version", "lease_version_number", "lease_status_name"]);
    let functions = include_str!("../tests/abi.txt").lines().filter_map(|line| line.split_once('('));
    let words = functions.filter_map(|(before, _)| before.split([' ', '*']).next_back());
    let exported: BTreeSet<_> = words.filter(|word| word.starts_with("lease_")).collect();
    assert_eq!(called, exported, "an export is not called here");
}
