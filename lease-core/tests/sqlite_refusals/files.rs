//! The file itself: copied, replaced, deleted, truncated, corrupt, foreign, newer, or of two names.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use lease_core::ErrorKind::{Incompatible, Invalid, Unsupported};
use rusqlite::Connection;

use crate::Test;
use crate::support::scratch::Scratch;
use crate::worker::{Other, PATIENCE, assert_refused, open};

pub(crate) const TESTS: &[Test] = crate::tests![
    a_copy_is_refused_whatever_is_copied_with_it,
    a_copy_made_while_it_is_used_is_refused,
    a_copy_with_an_empty_gate_is_refused,
    a_moved_store_goes_on,
    a_restored_backup_is_refused_and_the_original_goes_on,
    an_older_state_in_the_same_file_is_refused,
    a_file_emptied_while_closed_is_refused,
    a_file_that_was_deleted_while_closed_is_not_made_anew,
    all_deleted_begins_anew,
    an_interrupted_beginning_is_finished,
    a_file_that_was_truncated_or_damaged_is_refused,
    files_of_others_are_refused,
    files_of_later_versions_are_refused,
    a_link_made_while_it_is_used_is_refused,
    side_files_deleted_under_a_holder_make_no_second_holder,
    side_files_deleted_and_made_anew_by_another_program_make_no_second_holder,
    the_database_replaced_under_a_holder_makes_no_second_holder,
    locks_dropped_by_another_sqlite_make_no_second_holder,
    a_process_that_closes_leaves_no_suspicion,
    a_process_between_two_managers_raises_no_suspicion,
    a_killed_process_leaves_no_suspicion,
    a_failed_transaction_leaves_the_log,
    a_file_system_of_no_files_is_refused,
];

pub(crate) struct Place(Scratch);

impl Place {
    pub(crate) fn new(what: &str) -> Self {
        Self(Scratch::new(&format!("refusals-{what}")).unwrap())
    }

    pub(crate) fn db(&self) -> PathBuf {
        self.0.path().join("jobs.db")
    }

    /// A store that was used and closed: tokens 1 to 3 were given.
    pub(crate) fn used(what: &str) -> Self {
        let place = Self::new(what);
        take(&place.db(), 3);
        place
    }

    /// Everything in it: the files, with a hash of their bytes.
    pub(crate) fn all(&self) -> BTreeMap<PathBuf, u64> {
        let entries = fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap());
        let files = entries.filter(|entry| entry.file_type().unwrap().is_file());
        files.map(|entry| (entry.path(), hash(&fs::read(entry.path()).unwrap()))).collect()
    }
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

/// Takes and releases so often, and gives the last token.
pub(crate) fn take(db: &Path, times: u32) -> i64 {
    let manager = open(db).unwrap();
    let mut last = 0;
    for _ in 0..times {
        let lease = manager.try_acquire("n").unwrap().expect("nobody has it");
        last = lease.token().get();
        lease.release().unwrap();
    }
    manager.close().unwrap();
    last
}

pub(crate) fn beside(db: &Path, suffix: &str) -> PathBuf {
    format!("{}{suffix}", db.display()).into()
}

fn remove(db: &Path, suffixes: &[&str]) {
    for suffix in suffixes {
        fs::remove_file(beside(db, suffix)).unwrap();
    }
}

const COPIED: [&str; 2] = ["copied", "begin anew"];

/// The copy's tokens would be given a second time.
fn a_copy_is_refused_whatever_is_copied_with_it() {
    for with in [&[""][..], &["", "-gate"], &["", "-gate", "-live"]] {
        let place = Place::used("copy");
        let copy = place.db().with_file_name("copy.db");
        for suffix in with {
            fs::copy(beside(&place.db(), suffix), beside(&copy, suffix)).unwrap();
        }
        let before = place.all();
        for _ in 0..2 {
            assert_refused(&copy, Incompatible, &COPIED);
        }
        let after = place.all();
        assert_eq!(after[&copy], before[&copy]);
        if with.len() != 2 {
            assert_eq!(
                before.keys().collect::<Vec<_>>(),
                after.keys().collect::<Vec<_>>(),
                "nothing was put beside it"
            );
        }
        assert_eq!(take(&place.db(), 1), 4, "the original goes on");
    }
}

fn a_copy_made_while_it_is_used_is_refused() {
    let place = Place::used("live-copy");
    let manager = open(&place.db()).unwrap();
    let lease = manager.try_acquire("n").unwrap().unwrap();
    let copy = place.db().with_file_name("copy.db");
    for suffix in ["", "-wal", "-shm", "-gate", "-live"] {
        fs::copy(beside(&place.db(), suffix), beside(&copy, suffix)).unwrap();
    }
    let before = place.all();
    assert_refused(&copy, Incompatible, &COPIED);
    assert_eq!(place.all(), before);
    lease.confirm().unwrap();
    lease.release().unwrap();
    manager.close().unwrap();
}

/// The gate is there, but was made for no file: by who was refused before.
fn a_copy_with_an_empty_gate_is_refused() {
    let place = Place::used("empty-gate");
    let copy = place.db().with_file_name("copy.db");
    fs::copy(place.db(), &copy).unwrap();
    fs::write(beside(&copy, "-gate"), "").unwrap();
    let before = fs::read(&copy).unwrap();
    for _ in 0..2 {
        assert_refused(&copy, Incompatible, &COPIED);
    }
    assert_eq!(fs::read(&copy).unwrap(), before);
}

/// All of it within one file system: these are the same files.
fn a_moved_store_goes_on() {
    let place = Place::used("moved");
    let moved = place.db().with_file_name("moved.db");
    for suffix in ["", "-gate", "-live"] {
        fs::rename(beside(&place.db(), suffix), beside(&moved, suffix)).unwrap();
    }
    assert_eq!(take(&moved, 1), 4);
}

/// Another file at the path, as `tar` and most backup programs restore it.
fn a_restored_backup_is_refused_and_the_original_goes_on() {
    let place = Place::used("backup");
    let (db, saved, backup) = (place.db(), beside(&place.db(), ".orig"), beside(&place.db(), ".backup"));
    fs::copy(&db, &backup).unwrap();
    assert_eq!(take(&db, 2), 5);
    fs::rename(&db, &saved).unwrap();
    fs::rename(&backup, &db).unwrap();
    let before = place.all();
    assert_refused(&db, Incompatible, &COPIED);
    assert_eq!(place.all(), before);
    fs::rename(&saved, &db).unwrap();
    assert_eq!(take(&db, 1), 6);
}

/// Written over, as `cp` restores it: the file is the same, and knows less than was given.
fn an_older_state_in_the_same_file_is_refused() {
    let place = Place::used("restored");
    let db = place.db();
    let backup = fs::read(&db).unwrap();
    assert_eq!(take(&db, 1), 4);
    let newer = fs::read(&db).unwrap();
    fs::write(&db, &backup).unwrap();
    assert_refused(&db, Incompatible, &COPIED);
    assert_eq!(fs::read(&db).unwrap(), backup);
    fs::write(&db, newer).unwrap();
    assert_eq!(take(&db, 1), 5);
}

/// An empty file is one to begin with, but not if it has been more.
fn a_file_emptied_while_closed_is_refused() {
    let place = Place::used("emptied");
    fs::write(place.db(), "").unwrap();
    for _ in 0..2 {
        assert_refused(&place.db(), Incompatible, &COPIED);
    }
}

fn a_file_that_was_deleted_while_closed_is_not_made_anew() {
    let place = Place::used("deleted");
    remove(&place.db(), &[""]);
    for _ in 0..2 {
        assert_refused(&place.db(), Incompatible, &COPIED);
    }
}

/// What the message says helps.
fn all_deleted_begins_anew() {
    let place = Place::used("anew");
    remove(&place.db(), &["", "-gate", "-live"]);
    assert_eq!(take(&place.db(), 1), 1);
}

/// Killed between telling of the file and making its tables, or just after: no refusal.
fn an_interrupted_beginning_is_finished() {
    let place = Place::used("begun");
    let gate = OpenOptions::new().write(true).open(beside(&place.db(), "-gate")).unwrap();
    gate.write_all_at(&[0; 8], 32).unwrap();
    assert_eq!(take(&place.db(), 1), 4, "the tables were made");
    gate.write_all_at(&[0; 8], 32).unwrap();
    fs::write(place.db(), "").unwrap();
    assert_eq!(take(&place.db(), 1), 1, "they were not");
}

fn a_file_that_was_truncated_or_damaged_is_refused() {
    type Damage = fn(&mut Vec<u8>);
    let damage: [(&str, Damage); 5] = [
        ("a page left", |bytes| bytes.truncate(1024)),
        ("half a page left", |bytes| bytes.truncate(512)),
        ("another header", |bytes| bytes[..16].fill(b'x')),
        ("another first page", |bytes| bytes[100..1024].fill(b'x')),
        ("other pages", |bytes| bytes[1024..].fill(b'x')),
    ];
    for (what, damage) in damage {
        let place = Place::used("damaged");
        let mut bytes = fs::read(place.db()).unwrap();
        damage(&mut bytes);
        fs::write(place.db(), &bytes).unwrap();
        assert_refused(&place.db(), Incompatible, &["damaged", "another file"]);
        assert_eq!(fs::read(place.db()).unwrap(), bytes, "{what}: it is as it was");
    }
}

/// Somebody's data must not become a lock table by a slip of the path.
fn files_of_others_are_refused() {
    let place = Place::new("foreign");
    let app = place.db().with_file_name("app.db");
    for (mode, name) in [("DELETE", "app.db"), ("WAL", "wal.db")] {
        let raw = Connection::open(app.with_file_name(name)).unwrap();
        raw.pragma_update(None, "journal_mode", mode).unwrap();
        raw.execute_batch("CREATE TABLE users (name TEXT); INSERT INTO users VALUES ('ada')").unwrap();
    }
    let raw = Connection::open(app.with_file_name("id.db")).unwrap();
    raw.execute_batch("PRAGMA application_id = 1").unwrap();
    drop(raw);
    fs::write(app.with_file_name("notes.txt"), "no database at all, but longer than its header. ".repeat(99)).unwrap();
    fs::write(app.with_file_name("short"), "xy").unwrap();
    let before = place.all();
    for name in ["app.db", "wal.db", "id.db"] {
        assert_refused(&app.with_file_name(name), Incompatible, &["another program", "a file of its own"]);
    }
    for name in ["notes.txt", "short"] {
        assert_refused(&app.with_file_name(name), Incompatible, &["no database", "another file"]);
    }
    assert_eq!(place.all(), before, "nothing was put beside them, and nothing into them");
}

fn files_of_later_versions_are_refused() {
    let place = Place::used("newer");
    Connection::open(place.db()).unwrap().pragma_update(None, "user_version", 99).unwrap();
    let before = fs::read(place.db()).unwrap();
    assert_refused(&place.db(), Incompatible, &["version 99", "the same library"]);
    assert_eq!(fs::read(place.db()).unwrap(), before);
}

/// A second path has a second log. Who has it open learns of it with the next request, and newcomers are refused by both paths.
fn a_link_made_while_it_is_used_is_refused() {
    let place = Place::used("link");
    let manager = open(&place.db()).unwrap();
    let lease = manager.try_acquire("n").unwrap().unwrap();
    let link = place.db().with_file_name("link.db");
    fs::hard_link(place.db(), &link).unwrap();
    for path in [&link, &place.db()] {
        assert!(Other::start(path).ask("take").starts_with("INVALID"));
        assert_refused(path, Invalid, &["2 hard links", "delete the others"]);
    }
    assert_eq!(lease.confirm().unwrap_err().kind(), Invalid);
    fs::remove_file(&link).unwrap();
    lease.confirm().unwrap();
    lease.release().unwrap();
    manager.close().unwrap();
}

/// A holder here; files are deleted; nobody there may hold too, and the holder has to learn of it with its next renewal.
fn under_a_holder(suffixes: &[&str], meddle: impl FnOnce(&Path)) {
    let place = Place::used("under");
    let db = place.db();
    let mut holder = Other::start(&db);
    assert!(holder.ask("take").starts_with("took"));
    remove(&db, suffixes);
    meddle(&db);
    let mut newcomer = Other::start(&db);
    let refused = newcomer.ask("take");
    assert!(refused.starts_with("INCOMPATIBLE"), "{suffixes:?}: {refused}");
    assert!(refused.contains(db.to_str().unwrap()), "it names the file: {refused}");
    assert_ne!(holder.ask("ended"), "RELEASED");
    let refused = holder.ask("take");
    assert!(refused.starts_with("INCOMPATIBLE") && refused.contains("deleted or replaced"), "{refused}");
    assert!(newcomer.ask("take").starts_with("INCOMPATIBLE"));
    assert_eq!(holder.ask("close"), "done");
}

fn side_files_deleted_under_a_holder_make_no_second_holder() {
    for suffixes in [
        &["-wal"][..],
        &["-shm"],
        &["-wal", "-shm"],
        &["", "-wal", "-shm"],
        &["-gate", "-live", "-wal", "-shm"],
        &["-gate", "-live"],
        &["-gate"],
        &[""],
    ] {
        under_a_holder(suffixes, |_| ());
    }
}

/// Another program has made new ones meanwhile, and has them open: their names are there, but they are not those of the holder.
fn side_files_deleted_and_made_anew_by_another_program_make_no_second_holder() {
    for suffixes in [&["-wal"][..], &["-shm"], &["-wal", "-shm"]] {
        under_a_holder(suffixes, |db| {
            for suffix in suffixes {
                fs::write(beside(db, suffix), "").unwrap();
            }
        });
    }
}

fn replace(db: &Path, by: &Place) {
    fs::copy(by.db(), db).unwrap();
}

fn the_database_replaced_under_a_holder_makes_no_second_holder() {
    let other = Place::used("replacement");
    under_a_holder(&[""], |db| replace(db, &other));
    under_a_holder(&["", "-wal", "-shm"], |db| replace(db, &other));
}

/// Another copy of `SQLite` in the holder's process opens and closes the files, which drops the holder's locks on them. Our own
/// processes leave the log all the same; another program believes that it is the last to close, and deletes it.
fn locks_dropped_by_another_sqlite_make_no_second_holder() {
    let place = Place::used("dropped");
    let db = place.db();
    let manager = open(&db).unwrap();
    let lease = manager.try_acquire("n").unwrap().unwrap();
    for suffix in ["", "-shm"] {
        drop(OpenOptions::new().read(true).open(beside(&db, suffix)).unwrap());
    }
    let mut newcomer = Other::start(&db);
    assert_eq!(newcomer.ask("take"), "busy", "the log is there, and all that counts in it");
    assert_eq!(newcomer.ask("close"), "done");
    drop(newcomer);
    lease.confirm().unwrap();
    assert!(beside(&db, "-wal").exists());
    for suffix in ["", "-shm"] {
        drop(OpenOptions::new().read(true).open(beside(&db, suffix)).unwrap());
    }
    assert_eq!(Other::start(&db).ask("read"), "done");
    assert!(!beside(&db, "-wal").exists(), "else this tests nothing");
    let mut next = Other::start(&db);
    assert!(next.ask("take").starts_with("INCOMPATIBLE"));
    lease.cancelled();
    assert!(!lease.is_held());
    assert!(next.ask("take").starts_with("INCOMPATIBLE"));
    drop(lease);
    manager.close().unwrap();
    drop(next);
    let manager = open(&db).unwrap();
    let lease = manager.acquire("n").timeout(PATIENCE).wait().unwrap();
    assert!(lease.token().get() > 4, "what was given is remembered");
    lease.release().unwrap();
    manager.close().unwrap();
}

/// The log is deleted and the lock of `-live` given up at one time: a newcomer in between would see a log that was taken away.
fn a_process_that_closes_leaves_no_suspicion() {
    let place = Place::used("closing");
    let db = place.db();
    let cycle = || {
        for _ in 0..300 {
            let manager = open(&db).unwrap();
            manager.ping().unwrap();
            manager.close().unwrap();
        }
    };
    std::thread::scope(|scope| {
        let mut others: Vec<_> = (0..2).map(|_| Other::start(&db)).collect();
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(cycle)).collect();
        while threads.iter().any(|thread| !thread.is_finished()) {
            for other in &mut others {
                assert_eq!(other.ask("ping"), "done");
                assert_eq!(other.ask("close"), "done");
                *other = Other::start(&db);
            }
        }
    });
    // Who finds the gate in use when he closes leaves the log to the next.
    take(&db, 1);
    assert_eq!(place.all().len(), 3, "{:?}", place.all().keys());
}

/// A process whose lock says that the log is in use, though it has nothing open at the moment: who closes has to leave the log.
fn a_process_between_two_managers_raises_no_suspicion() {
    let place = Place::used("between");
    let (first, second) = (open(&place.db()).unwrap(), open(&place.db()).unwrap());
    first.ping().unwrap();
    let mut other = Other::start(&place.db());
    assert_eq!(other.ask("ping"), "done");
    // The second has not asked for anything yet.
    first.close().unwrap();
    assert_eq!(other.ask("close"), "done");
    assert_eq!(Other::start(&place.db()).ask("ping"), "done");
    second.ping().unwrap();
    second.close().unwrap();
}

fn a_killed_process_leaves_no_suspicion() {
    let place = Place::used("killed");
    let db = place.db();
    let mut holder = Other::start(&db);
    assert!(holder.ask("take").starts_with("took"));
    // Killed.
    drop(holder);
    assert!(beside(&db, "-wal").exists() && beside(&db, "-shm").exists());
    // Nobody has them open: they are of no use to anybody.
    remove(&db, &["-shm"]);
    let manager = open(&db).unwrap();
    manager.ping().unwrap();
    assert!(manager.inspect("n").unwrap().is_some() || manager.try_acquire("n").unwrap().is_some());
    manager.close().unwrap();
}

/// A transaction that fails costs the connection. If the log went with it, newcomers would find that somebody took it away.
fn a_failed_transaction_leaves_the_log() {
    let place = Place::used("failed");
    let manager = open(&place.db()).unwrap();
    manager.ping().unwrap();
    let raw = Connection::open(place.db()).unwrap();
    raw.execute("UPDATE meta SET next_token = 1", []).unwrap();
    // Not the last to close it: the manager has it open.
    drop(raw);
    assert_eq!(manager.ping().unwrap_err().kind(), Incompatible);
    assert!(beside(&place.db(), "-wal").exists() && beside(&place.db(), "-shm").exists());
    manager.close().unwrap();
}

fn a_file_system_of_no_files_is_refused() {
    let wrong = Path::new("/proc/jobs.db");
    assert_refused(wrong, Unsupported, &["0x9fa0", "put the file on a local file system", "ext4"]);
    let notes = Place::new("proc");
    std::os::unix::fs::symlink("/proc/self/status", notes.db()).unwrap();
    let error = crate::worker::refusal(&notes.db());
    assert_eq!(error.kind(), Unsupported, "{error}");
}
