//! File systems of our own: read-only, full, mounted twice. Each of these runs as root of a user namespace.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lease_core::ErrorKind::{Denied, Invalid, Unavailable};
use lease_core::blocking::{Lease, Manager};
use lease_core::{EndReason, Error};

use crate::Test;
use crate::files::{Place, beside, take};
use crate::worker::{Other, assert_refused, open, until};

pub(crate) const UNSHARE: &[&str] = &["unshare", "-Urm"];

pub(crate) const TESTS: &[Test] = crate::tests![
    a_file_that_is_mounted_alone_is_refused,
    a_directory_that_is_mounted_twice_has_one_holder,
    a_read_only_mount_is_denied,
    what_is_allowed_works,
    a_file_that_is_copied_up_by_an_overlay_is_refused_or_goes_on,
    on_a_full_disk_nothing_can_begin,
    a_lease_is_lost_in_time_on_a_full_disk,
    a_lease_survives_a_disk_that_was_full_for_a_moment,
    a_release_on_a_full_disk_is_made_up_for,
];

/// A mount, gone when dropped: else its directory could not be removed.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[must_use]
fn mount(arguments: &[&str], on: &Path) -> Mounted {
    let output = Command::new("mount").args(arguments).arg(on).output().unwrap();
    assert!(output.status.success(), "mount {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Mounted(on.to_owned())
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn directory(place: &Place, name: &str) -> PathBuf {
    let path = place.db().with_file_name(name);
    fs::create_dir(&path).unwrap();
    path
}

/// Two paths to one file have a log each.
fn a_file_that_is_mounted_alone_is_refused() {
    let place = Place::used("bound");
    let other = place.db().with_file_name("other.db");
    fs::write(&other, "").unwrap();
    let _mounted = mount(&["--bind", text(&place.db())], &other);
    let before = place.all();
    assert_refused(&other, Invalid, &["mount of its own", "mount its directory"]);
    assert_eq!(place.all(), before);
    assert_eq!(take(&place.db(), 1), 4, "the other path is right");
}

fn a_directory_that_is_mounted_twice_has_one_holder() {
    let place = Place::new("twice");
    let (one, two) = (directory(&place, "one"), directory(&place, "two"));
    let _mounted = mount(&["--bind", text(&one)], &two);
    let manager = open(&one.join("jobs.db")).unwrap();
    let lease = manager.try_acquire("n").unwrap().unwrap();
    let here = open(&two.join("jobs.db")).unwrap();
    let mut there = Other::start(&two.join("jobs.db"));
    assert!(here.try_acquire("n").unwrap().is_none());
    assert_eq!(there.ask("take"), "busy");
    lease.release().unwrap();
    assert!(there.ask("take").starts_with("took"));
    assert!(here.try_acquire("n").unwrap().is_none());
    manager.close().unwrap();
    here.close().unwrap();
}

fn a_read_only_mount_is_denied() {
    let place = Place::used("read-only");
    let seen = directory(&place, "seen");
    let _mounted = mount(&["--bind", text(place.db().parent().unwrap())], &seen);
    std::mem::forget(mount(&["-o", "remount,bind,ro"], &seen));
    let before = place.all();
    assert_refused(&seen.join("jobs.db"), Denied, &["Read-only file system", "give write permission"]);
    assert_refused(&seen.join("new.db"), Denied, &["cannot create", "Read-only file system"]);
    assert_eq!(place.all(), before);
}

fn what_is_allowed_works() {
    let place = Place::new("allowed");
    for kind in ["tmpfs", "ramfs"] {
        let path = directory(&place, kind);
        let _mounted = mount(&["-t", kind, kind], &path);
        assert_eq!(take(&path.join("jobs.db"), 1), 1);
        assert_eq!(take(&path.join("jobs.db"), 1), 2);
    }
    let (path, _mounted) = overlay(&place, |_| ());
    assert_eq!(take(&path.join("jobs.db"), 1), 1);
    assert_eq!(take(&path.join("jobs.db"), 1), 2);
}

/// An overlay of tmpfs on tmpfs, whose lower layer was prepared.
fn overlay(place: &Place, prepare: impl FnOnce(&Path)) -> (PathBuf, [Mounted; 2]) {
    let layers = directory(place, "layers");
    let below = mount(&["-t", "tmpfs", "layers"], &layers);
    let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(|name| layers.join(name));
    for path in [&lower, &upper, &work, &merged] {
        fs::create_dir(path).unwrap();
    }
    prepare(&lower);
    let options = format!("lowerdir={},upperdir={},workdir={}", text(&lower), text(&upper), text(&work));
    let mounted = mount(&["-t", "overlay", "overlay", "-o", &options], &merged);
    (merged, [mounted, below])
}

/// What an image brings along is copied when it is first written to. It may be taken for a copy; it must not change while it is
/// used, nor begin again.
fn a_file_that_is_copied_up_by_an_overlay_is_refused_or_goes_on() {
    let place = Place::new("overlay");
    let (path, _mounted) = overlay(&place, |lower| assert_eq!(take(&lower.join("jobs.db"), 3), 3));
    let db = path.join("jobs.db");
    let again = || open(&db).and_then(|manager| manager.try_acquire("n").map(|lease| lease.unwrap().token().get()));
    match again() {
        Ok(token) => assert_eq!(token, 4),
        Err(error) => assert!(error.message().contains("copied"), "{error}"),
    }
    match again() {
        Ok(token) => assert!(token > 4),
        Err(error) => assert!(error.message().contains("copied"), "{error}"),
    }
}

/// A disk that can be filled, and emptied again.
struct Disk {
    path: PathBuf,
    _mounted: Mounted,
}

impl Disk {
    fn new(place: &Place) -> Self {
        let path = directory(place, "disk");
        let mounted = mount(&["-t", "tmpfs", "-o", "size=1m", "disk"], &path);
        Self { path, _mounted: mounted }
    }

    fn db(&self) -> PathBuf {
        self.path.join("jobs.db")
    }

    fn open(&self, ttl: &str) -> Manager {
        Manager::open(format!("sqlite:{}?ttl={ttl}", self.db().display())).unwrap()
    }

    fn fill(&self) {
        let mut filler = File::create(self.path.join("filler")).unwrap();
        while filler.write_all(&[0; 4096]).is_ok() {}
    }

    fn empty(&self) {
        fs::remove_file(self.path.join("filler")).unwrap();
    }

    /// Fills it, and renews the lease until there is not even room for that.
    fn fill_under(&self, lease: &Lease) -> Error {
        self.fill();
        loop {
            if let Err(error) = lease.confirm() {
                return error;
            }
        }
    }
}

fn assert_full(error: &Error) {
    assert_eq!(error.kind(), Unavailable, "{error}");
    assert!(error.is_retryable() && error.message().contains("make room"), "{error}");
    assert!(error.message().contains("jobs.db"), "it names the file: {error}");
}

/// Nothing of what was begun is in the way once there is room.
fn on_a_full_disk_nothing_can_begin() {
    let place = Place::new("full");
    let disk = Disk::new(&place);
    disk.fill();
    let refused = || open(&disk.db()).and_then(|manager| manager.ping()).expect_err("it is full");
    assert_full(&refused());
    assert_full(&refused());
    disk.empty();
    assert_eq!(take(&disk.db(), 1), 1);
}

fn a_lease_is_lost_in_time_on_a_full_disk() {
    let place = Place::new("full");
    let disk = Disk::new(&place);
    let manager = disk.open("3s");
    let lease = manager.try_acquire("n").unwrap().unwrap();
    assert_full(&disk.fill_under(&lease));
    // The failure cost the connection, which was the only one. The log stays, for those who come and for this one.
    assert!(beside(&disk.db(), "-wal").exists() && beside(&disk.db(), "-shm").exists());
    let mut other = Other::start(&disk.db());
    // Until the ttl is over it is not even tried.
    assert_eq!(other.ask("take"), "busy");
    assert_eq!(lease.cancelled().reason, EndReason::Unreachable);
    crate::worker::until_slowly("it runs out", || {
        let refused = other.ask("take");
        assert!(!refused.starts_with("took"), "{refused}");
        refused.starts_with("UNAVAILABLE") && refused.contains("make room")
    });
    disk.empty();
    crate::worker::until_slowly("it runs out", || other.ask("take").starts_with("took"));
    assert!(manager.try_acquire("n").unwrap().is_none());
    assert_eq!(other.ask("release"), "done");
    assert!(manager.try_acquire("n").unwrap().is_some());
    manager.close().unwrap();
}

fn a_lease_survives_a_disk_that_was_full_for_a_moment() {
    let place = Place::new("full");
    let disk = Disk::new(&place);
    let manager = disk.open("10s");
    let lease = manager.try_acquire("n").unwrap().unwrap();
    let mut other = Other::start(&disk.db());
    assert_eq!(other.ask("take"), "busy");
    for _ in 0..3 {
        assert_full(&disk.fill_under(&lease));
        disk.empty();
        lease.confirm().unwrap();
        assert!(lease.is_held());
        assert_eq!(other.ask("take"), "busy");
    }
    lease.release().unwrap();
    assert!(other.ask("take").starts_with("took"));
    manager.close().unwrap();
}

/// Else the next would wait for the ttl, which is an hour here.
fn a_release_on_a_full_disk_is_made_up_for() {
    let place = Place::new("full");
    let disk = Disk::new(&place);
    let manager = disk.open("1h");
    let lease = manager.try_acquire("n").unwrap().unwrap();
    let mut other = Other::start(&disk.db());
    assert_eq!(other.ask("take"), "busy");
    assert_full(&disk.fill_under(&lease));
    drop(lease);
    assert_full(&manager.try_acquire("another").expect_err("it is full"));
    disk.empty();
    until("it is released", || manager.inspect("n").is_ok_and(|record| record.is_none()));
    assert!(manager.acquire("n").timeout(Duration::from_secs(20)).wait().is_ok());
    manager.close().unwrap();
}
