//! The limit of open descriptors, which is the process's: each of these has one of its own.

use std::fs::File;
use std::time::Instant;

use lease_core::ErrorKind;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::Test;
use crate::files::{Place, take};
use crate::support::process::within;
use crate::worker::{Other, PATIENCE, open, until};

pub(crate) const TESTS: &[Test] =
    crate::tests![no_descriptor_is_left_to_open_a_store, no_descriptor_is_left_for_an_open_store];

fn open_descriptors() -> u64 {
    // The directory that is read is one of them.
    std::fs::read_dir("/proc/self/fd").unwrap().count() as u64 - 1
}

fn allow(descriptors: u64) {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(descriptors), maximum }).unwrap();
}

/// Whichever descriptor is the one too many, the error names the limit, nothing is left open, and nothing is broken afterwards.
fn no_descriptor_is_left_to_open_a_store() {
    let place = Place::used("descriptors");
    let (before, mut refused) = (open_descriptors(), 0);
    for more in 0..100 {
        allow(before + more);
        let opened = open(&place.db()).and_then(|manager| {
            let taken = manager.try_acquire("n").map(drop);
            manager.close().unwrap();
            taken
        });
        allow(4096);
        until("all is closed", || open_descriptors() == before);
        match opened {
            Ok(()) => break,
            Err(error) => {
                refused += 1;
                assert_eq!(error.kind(), ErrorKind::Limit, "{more} more: {error}");
                assert!(error.message().contains("raise"), "{more} more: {error}");
            }
        }
    }
    assert!(refused > 5, "{refused}");
    take(&place.db(), 1);
}

/// A program that has run out of descriptors keeps what it holds.
fn no_descriptor_is_left_for_an_open_store() {
    let place = Place::used("no-descriptor");
    let manager = open(&place.db()).unwrap();
    let lease = manager.try_acquire("n").unwrap().unwrap();
    let mut other = Other::start(&place.db());
    assert_eq!(other.ask("take"), "busy");
    allow(open_descriptors());
    let mut all = Vec::new();
    while let Ok(one) = File::open("/dev/null") {
        all.push(one);
    }
    let renewed = Instant::now() + 2 * lease.ttl();
    let limit = within(PATIENCE);
    while Instant::now() < renewed {
        assert!(lease.is_held(), "{:?}", lease.end_reason());
        assert!(Instant::now() < limit);
        std::thread::park_timeout(renewed.saturating_duration_since(Instant::now()));
    }
    lease.confirm().unwrap();
    assert_eq!(other.ask("take"), "busy");
    lease.release().unwrap();
    assert!(other.ask("take").starts_with("took"));
    manager.close().unwrap();
    allow(4096);
}
