//! Who holds what, for operators.

use std::ffi::{CString, c_char};
use std::ptr;
use std::sync::Arc;

use lease_core::{Record, Result};

use crate::error::c_string;
use crate::handle::{find, insert, millis, remove, value};

/// Who holds a name. Free it with `lease_record_free`.
pub struct lease_record_t {
    _private: [u8; 0],
}

/// A list of records. Free it with `lease_records_free`.
pub struct lease_records_t {
    _private: [u8; 0],
}

struct Told {
    name: CString,
    owner: CString,
    record: Record,
}

/// The handles of the records, which live as long as the list.
struct List(Vec<usize>);

impl Drop for List {
    fn drop(&mut self) {
        for handle in &self.0 {
            remove::<Told>(ptr::without_provenance(*handle));
        }
    }
}

pub(crate) fn record(record: Record) -> Result<*mut lease_record_t> {
    insert(Arc::new(Told { name: c_string(&record.name), owner: c_string(&record.owner), record }))
}

pub(crate) fn records(found: Vec<Record>) -> Result<*mut lease_records_t> {
    let mut list = List(Vec::with_capacity(found.len()));
    for each in found {
        list.0.push(record(each)?.addr());
    }
    insert(Arc::new(list))
}

fn read<T>(r: *const lease_record_t, otherwise: T, read: impl FnOnce(&Told) -> T) -> T {
    value(otherwise, || Some(read(&*find::<Told>(r.cast(), "r", "lease_record_t").ok()?)))
}

/// What is held. Valid as long as the record; NULL: not a record.
#[unsafe(no_mangle)]
pub extern "C" fn lease_record_name(r: *const lease_record_t) -> *const c_char {
    read(r, ptr::null(), |told| told.name.as_ptr())
}

/// The holder's fencing token; 0: not a record.
#[unsafe(no_mangle)]
pub extern "C" fn lease_record_token(r: *const lease_record_t) -> i64 {
    read(r, 0, |told| told.record.token.get())
}

/// The text the holder shows to others. Valid as long as the record; NULL: not a record.
#[unsafe(no_mangle)]
pub extern "C" fn lease_record_owner(r: *const lease_record_t) -> *const c_char {
    read(r, ptr::null(), |told| told.owner.as_ptr())
}

/// For how many milliseconds it has held, as far as the store knows; -1: not a record.
#[unsafe(no_mangle)]
pub extern "C" fn lease_record_held_ms(r: *const lease_record_t) -> i64 {
    read(r, -1, |told| millis(told.record.held_for))
}

/// The holder's ttl in milliseconds; -1: not a record.
#[unsafe(no_mangle)]
pub extern "C" fn lease_record_ttl_ms(r: *const lease_record_t) -> i64 {
    read(r, -1, |told| millis(told.record.ttl))
}

/// How many claims wait behind it in the store; waiters of one manager count as one. -1: not a record.
#[unsafe(no_mangle)]
pub extern "C" fn lease_record_waiting(r: *const lease_record_t) -> i64 {
    read(r, -1, |told| i64::try_from(told.record.waiting).unwrap_or(i64::MAX))
}

/// Frees a record and its texts. Those of a list are freed with the list. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn lease_record_free(r: *mut lease_record_t) {
    value((), || {
        remove::<Told>(r.cast());
        None
    });
}

/// How many records the list has; 0 for what is no list.
#[unsafe(no_mangle)]
pub extern "C" fn lease_records_count(rs: *const lease_records_t) -> usize {
    value(0, || Some(find::<List>(rs.cast(), "rs", "lease_records_t").ok()?.0.len()))
}

/// A record of the list, counted from 0; it lives as long as the list. NULL beyond its end.
#[unsafe(no_mangle)]
pub extern "C" fn lease_records_at(rs: *const lease_records_t, index: usize) -> *const lease_record_t {
    value(ptr::null(), || {
        let list = find::<List>(rs.cast(), "rs", "lease_records_t").ok()?;
        list.0.get(index).map(|handle| ptr::without_provenance(*handle))
    })
}

/// Frees a list and its records. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn lease_records_free(rs: *mut lease_records_t) {
    value((), || {
        remove::<List>(rs.cast());
        None
    });
}
