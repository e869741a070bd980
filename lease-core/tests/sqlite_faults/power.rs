//! The power fails: what was not synced is gone, or some of it is. Tokens increase all the same.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use futures_lite::future::block_on;
use lease_core::runtime::system;
use lease_core::store::{Claim, ClaimId, Standing, Store};
use lease_core::stores::sqlite::SqliteStore;
use lease_core::{Name, Token};
use rusqlite::Connection;

use crate::rounds;
use crate::subject::{answer, claims_in, names_in, obey, order, start};
use crate::support::scratch::Scratch;

/// Files that power failures happen to, and how often it happens to each.
const FILES: u64 = 80;
const BOOTS: u64 = 5;
const AT_ONCE: usize = 4;
/// Disks write whole ones.
const SECTOR: usize = 512;
/// As far as the subject goes: beyond where the log is moved into the file.
const CLAIMS: usize = 800;

/// What the failure leaves of what was not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Left {
    Nothing,
    /// Of each file a beginning.
    Beginnings,
    /// Of each file an end: disks write in any order.
    Ends,
    /// Any sectors.
    Sectors,
    /// No power failure: the process is killed.
    Everything,
}

/// Seen at least once, or the test has shown nothing.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    After(Left),
    /// The last token was given by a transaction that was gone after the failure.
    TokensForgotten,
    /// More than a block of tokens has been skipped or used.
    BlocksReserved,
    LogMoved,
}

/// Random numbers from a seed.
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % below
    }
}

pub(crate) fn failures() {
    let one = std::env::var("SQLITE_SEED").ok().map(|seed| seed.parse().expect("SQLITE_SEED is a number"));
    if let Some(seed) = one {
        println!("seed {seed}: {:?}", on_one_file(seed));
        return;
    }
    let (next, seen) = (AtomicU64::new(0), Mutex::new(BTreeSet::new()));
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= FILES * rounds() {
                        return;
                    }
                    let new = on_one_file(seed);
                    seen.lock().unwrap().extend(new);
                }
            });
        }
    });
    let seen = seen.into_inner().unwrap();
    for left in [Left::Nothing, Left::Beginnings, Left::Ends, Left::Sectors, Left::Everything] {
        assert!(seen.contains(&Seen::After(left)), "{seen:?}");
    }
    for event in [Seen::TokensForgotten, Seen::BlocksReserved, Seen::LogMoved] {
        assert!(seen.contains(&event), "{event:?} is not among {seen:?}");
    }
}

fn on_one_file(seed: u64) -> BTreeSet<Seen> {
    let mut random = Random(seed);
    let scratch = Scratch::in_memory("lease-power").unwrap();
    let path = |name: &str| scratch.path().join(name);
    let (directory, synced, boot) = (path("disk"), path("synced"), path("boot"));
    let file = directory.join("leases.db");
    fs::create_dir(&directory).unwrap();
    fs::create_dir(&synced).unwrap();
    let (mut highest, mut seen, mut boots, mut crashes) = (0, BTreeSet::new(), 0, 0);
    fs::write(&boot, "boot 0\n").unwrap();
    for run in 0..BOOTS {
        let left = [Left::Nothing, Left::Nothing, Left::Beginnings, Left::Ends, Left::Sectors, Left::Everything];
        let left = left[usize::try_from(random.next(6)).unwrap()];
        // Opening and the first block of tokens; a block in the midst of work; all the way to a checkpoint and the end.
        let (step, near) = match random.next(4) {
            0 => (1 + random.next(250), false),
            1 => (1 + random.next(1_500), true),
            _ => (1 + random.next(30_000), random.next(2) == 0),
        };
        let what = format!("SQLITE_SEED={seed}, run {run}: {left:?} left at step {step}");
        let mut subject = start("power", &file, &[("FAULTS_SYNCED", &synced), ("FAULTS_BOOT", &boot)]);
        subject.tell(&format!("run {step} {near} {crashes}")).unwrap();
        let lowest = highest;
        while let Some(told) = answer(&subject) {
            match told.split_once(' ') {
                Some(("token", token)) => {
                    let token: i64 = token.parse().unwrap();
                    assert!(token > highest, "{what}: token {token} was given after {highest}");
                    highest = token;
                }
                // What was torn may be refused. SQLite has checksums, so it is not: not once.
                _ => panic!("{what}: {told}"),
            }
        }
        drop(subject);
        if highest > lowest + 32_768 {
            seen.insert(Seen::BlocksReserved);
        }
        let moved = |directory: &Path| fs::metadata(directory.join("leases.db")).is_ok_and(|meta| meta.len() > 1_024);
        if moved(&synced) {
            seen.insert(Seen::LogMoved);
        }
        seen.insert(Seen::After(left));
        if left == Left::Everything {
            crashes += 1;
        } else {
            boots += 1;
            fs::write(&boot, format!("boot {boots}\n")).unwrap();
            fail(&mut random, left, &directory, &synced);
            let next = next_token(&file, &path("looked at"), &what);
            if next.is_some_and(|next| lowest < next && next <= highest) {
                seen.insert(Seen::TokensForgotten);
            }
        }
    }
    claims_in(&file);
    seen
}

/// Makes the files what they are after the failure, and counts that as synced.
fn fail(random: &mut Random, left: Left, directory: &Path, synced: &Path) {
    let names: BTreeSet<String> = names_in(directory).into_iter().chain(names_in(synced)).collect();
    for name in names {
        let (now, then) = (directory.join(&name), synced.join(&name));
        if name.contains("-bell-") {
            continue;
        }
        if ["-shm", "-live"].iter().any(|side| name.ends_with(side)) {
            // Nobody syncs them, nobody needs what is in them after a failure, and they may be there. The lock is older than a
            // journal, with which the directory was synced.
            let is_kept = !name.ends_with("-shm") && synced.join("leases.db-journal").exists();
            if random.next(2) == 0 && !is_kept {
                fs::remove_file(&now).unwrap();
            }
            continue;
        }
        let (kept, written) = (fs::read(&then).ok(), fs::read(&now).ok());
        let found = match (left, kept, written) {
            (Left::Nothing, kept, _) => kept,
            // Removed, but the directory was not synced since.
            (_, kept, None) => kept.filter(|_| random.next(2) == 0),
            // Never synced.
            (_, None, _) if random.next(2) == 0 => None,
            (_, kept, written) => {
                let (kept, written) = (kept.unwrap_or_default(), written.unwrap_or_default());
                Some(torn(random, left, &kept, &written))
            }
        };
        match found {
            Some(bytes) => {
                fs::write(&now, &bytes).unwrap();
                fs::write(&then, &bytes).unwrap();
            }
            None => [now, then].iter().for_each(|path| drop(fs::remove_file(path))),
        }
    }
}

fn torn(random: &mut Random, left: Left, kept: &[u8], written: &[u8]) -> Vec<u8> {
    let length = kept.len().max(written.len());
    // Rather near the beginning, where a log starts over.
    let sectors = random.next(length.div_ceil(SECTOR) as u64 + 1);
    let border = random.next(sectors + 1);
    let mut torn = vec![0; length];
    for (number, sector) in torn.chunks_mut(SECTOR).enumerate() {
        let is_written = match left {
            Left::Beginnings => (number as u64) < border,
            Left::Ends => (number as u64) >= border,
            _ => random.next(2) == 0,
        };
        let from = if is_written { written } else { kept };
        let from = from.get(number * SECTOR..).unwrap_or_default();
        let length = from.len().min(sector.len());
        sector[..length].copy_from_slice(&from[..length]);
    }
    let either = if random.next(2) == 0 { kept.len() } else { written.len() };
    torn.truncate(either.max(kept.len().min(written.len())));
    torn
}

/// What a copy of the file says, so that looking at it changes nothing.
fn next_token(file: &Path, copy: &PathBuf, what: &str) -> Option<i64> {
    fs::create_dir_all(copy).unwrap();
    for name in ["leases.db", "leases.db-wal", "leases.db-shm"] {
        let (from, to) = (file.with_file_name(name), copy.join(name));
        if name.ends_with("-shm") || fs::copy(from, &to).is_err() {
            let _ = fs::remove_file(to);
        }
    }
    let raw = Connection::open(copy.join("leases.db")).unwrap();
    let verdict: String = raw.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok", "{what}");
    raw.query_row("SELECT next_token FROM meta", [], |row| row.get(0)).ok()
}

/// The one that dies: gives tokens until it does, and says each.
pub(crate) fn subject(file: &Path) {
    let env = system().unwrap();
    let mut id = u128::from(env.random()) << 64;
    let mut claim = |name: &str| {
        id += 1;
        let (name, ttl) = (Name::new(name).unwrap(), Duration::from_secs(60));
        Claim { name, id: ClaimId(id), ttl, owner: "dead".into(), queues: true, follows: None }
    };
    let given = |token: Token| println!("@token {token}");
    obey(|words| {
        let &["run", step, near, crashes] = words else { panic!("no command: {words:?}") };
        order("KILL", step);
        let store = match SqliteStore::open(file, env.clone()) {
            Ok(store) => store,
            Err(error) => return format!("refused: {error}"),
        };
        let head = |claim: &Claim| match block_on(store.claim(env.now(), claim)) {
            Ok(Standing::Head(token)) => Ok(token),
            Ok(other) => Err(format!("not the head of {}: {other:?}", &*claim.name)),
            Err(error) => Err(format!("refused: {error}")),
        };
        // A new boot has nothing in its lines of those before, who held the same. After a crash that was no power failure it
        // takes other names.
        for name in ["held", "held too"] {
            match head(&claim(&format!("{name} {crashes}"))) {
                Ok(token) => given(token),
                Err(message) => return message,
            }
        }
        if near == "true" {
            let raw = Connection::open(file).unwrap();
            raw.execute("UPDATE meta SET next_token = max(next_token, reserved_token - 300)", []).unwrap();
        }
        for number in 0..CLAIMS {
            let wish = claim(&format!("n{} {crashes}", number % 7));
            match head(&wish) {
                Ok(token) => given(token),
                Err(message) => return message,
            }
            block_on(store.leave(&wish)).unwrap();
        }
        block_on(store.close());
        drop(store);
        // The power fails now, if it did not before.
        order("KILL", 1);
        drop(Connection::open(file).unwrap().execute("UPDATE meta SET id = id", []));
        unreachable!("it is dead");
    });
}
