//! Permissions: who may use the file has to be able to use those beside it, and who may not is told so.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use lease_core::ErrorKind::Denied;

use crate::Test;
use crate::files::{Place, beside, take};
use crate::worker::{Other, assert_refused, open};

pub(crate) const TESTS: &[Test] = crate::tests![the_files_beside_it_have_its_permissions];
/// For who may not do everything.
pub(crate) const AS_NOBODY: &[Test] = crate::tests![
    a_read_only_file_is_denied,
    a_read_only_directory_is_denied,
    a_lock_file_of_others_is_denied,
    a_hidden_directory_is_denied,
];
/// For root, who can be anybody.
pub(crate) const AS_ROOT: &[Test] = crate::tests![
    accounts_of_one_group_share_a_file,
    a_file_of_a_group_is_shared_whatever_the_umask,
    root_takes_no_file_away_from_its_user,
];

const GROUP: u32 = 61_000;
pub(crate) const NOBODY: &[&str] = &["setpriv", "--reuid=61009", "--regid=61009", "--clear-groups"];
const ONE: &[&str] = &["setpriv", "--reuid=61001", "--regid=61000", "--clear-groups"];
const TWO: &[&str] = &["setpriv", "--reuid=61002", "--regid=61002", "--groups=61000"];

fn allow(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn directory(place: &Place) -> std::path::PathBuf {
    place.db().parent().unwrap().to_owned()
}

/// Else the first to come, with his umask, would lock out those whom the file lets in, or let in those whom it does not.
fn the_files_beside_it_have_its_permissions() {
    for umask in ["000", "027", "077"] {
        for mode in [0o600, 0o660, 0o666] {
            let place = Place::new("umask");
            fs::write(place.db(), "").unwrap();
            allow(&place.db(), mode);
            let mut other = Other::start_by(&[], &place.db(), Some(umask));
            assert!(other.ask("take").starts_with("took"));
            let entries: Vec<_> = fs::read_dir(directory(&place)).unwrap().map(Result::unwrap).collect();
            assert_eq!(entries.len(), 6, "the database, -wal, -shm, -gate, -live, -bell-: {entries:?}");
            for entry in entries {
                assert_eq!(entry.metadata().unwrap().mode() & 0o777, mode, "{umask}: {entry:?}");
            }
        }
        let place = Place::new("umask");
        let mut other = Other::start_by(&[], &place.db(), Some(umask));
        assert_eq!(other.ask("ping"), "done");
        let mode = 0o666 & !u32::from_str_radix(umask, 8).unwrap();
        for entry in fs::read_dir(directory(&place)).unwrap().map(Result::unwrap) {
            assert_eq!(entry.metadata().unwrap().mode() & 0o777, mode, "{umask}: {entry:?}");
        }
    }
}

fn a_read_only_file_is_denied() {
    let place = Place::used("read-only");
    allow(&place.db(), 0o444);
    let before = place.all();
    assert_refused(&place.db(), Denied, &["Permission denied", "give write permission"]);
    assert_eq!(place.all(), before);
    allow(&place.db(), 0o644);
    assert_eq!(take(&place.db(), 1), 4);
}

fn a_read_only_directory_is_denied() {
    let place = Place::used("read-only");
    allow(&directory(&place), 0o555);
    let before = place.all();
    assert_refused(&place.db(), Denied, &["Permission denied", "directory"]);
    assert_refused(&place.db().with_file_name("new.db"), Denied, &["cannot create", "directory"]);
    assert_eq!(place.all(), before);
    allow(&directory(&place), 0o755);
    assert_eq!(take(&place.db(), 1), 4);
}

fn a_lock_file_of_others_is_denied() {
    for suffix in ["-gate", "-live"] {
        let place = Place::used("lock-file");
        allow(&beside(&place.db(), suffix), 0o444);
        assert_refused(&place.db(), Denied, &[suffix, "Permission denied", "give write permission"]);
        allow(&beside(&place.db(), suffix), 0o644);
        assert_eq!(take(&place.db(), 1), 4);
    }
}

fn a_hidden_directory_is_denied() {
    let place = Place::used("hidden");
    allow(&directory(&place), 0o000);
    assert_refused(&place.db(), Denied, &["Permission denied"]);
    allow(&directory(&place), 0o755);
}

fn shared_directory() -> Place {
    let place = Place::new("users");
    chown(directory(&place), Some(0), Some(GROUP)).unwrap();
    allow(&directory(&place), 0o2770);
    place
}

/// One takes, the other waits his turn; one is killed, the other clears up after him; a third may not.
fn take_turns(place: &Place, umask: &str) {
    let mut one = Other::start_by(ONE, &place.db(), Some(umask));
    assert!(one.ask("take").starts_with("took"));
    let mut two = Other::start_by(TWO, &place.db(), Some(umask));
    assert_eq!(two.ask("take"), "busy");
    assert_eq!(one.ask("release"), "done");
    assert!(two.ask("take").starts_with("took"));
    assert_eq!(one.ask("take"), "busy");
    let third = Other::start_by(NOBODY, &place.db(), None).ask("take");
    assert!(third.starts_with("DENIED") && third.contains("write permission"), "{third}");
    // Killed. Its lease runs out.
    drop(two);
    let mut two = Other::start_by(TWO, &place.db(), Some(umask));
    crate::worker::until_slowly("it runs out", || two.ask("take").starts_with("took"));
    assert_eq!(two.ask("close"), "done");
    assert_eq!(one.ask("close"), "done");
    let names: Vec<_> = fs::read_dir(directory(place)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
}

fn accounts_of_one_group_share_a_file() {
    take_turns(&shared_directory(), "007");
}

fn a_file_of_a_group_is_shared_whatever_the_umask() {
    let place = shared_directory();
    fs::write(place.db(), "").unwrap();
    chown(place.db(), Some(61_001), Some(GROUP)).unwrap();
    allow(&place.db(), 0o660);
    take_turns(&place, "077");
}

/// What root was the first to make beside the file is its user's: else he is locked out by a look of root's.
fn root_takes_no_file_away_from_its_user() {
    let place = Place::new("users");
    fs::write(place.db(), "").unwrap();
    for path in [&directory(&place), &place.db()] {
        chown(path, Some(61_001), Some(GROUP)).unwrap();
    }
    allow(&place.db(), 0o600);
    let manager = open(&place.db()).unwrap();
    manager.ping().unwrap();
    assert!(Other::start_by(ONE, &place.db(), None).ask("take").starts_with("took"));
    manager.close().unwrap();
}
