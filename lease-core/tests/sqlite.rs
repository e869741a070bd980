//! What only the `SQLite` file store has to get right: the file, its locks, its bells, and other processes.

// Shared with programs that use other parts of it.
#[allow(dead_code)]
#[path = "support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::future::Future;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use futures_lite::future::{block_on, poll_once};
use lease_core::runtime::system;
use lease_core::store::{Ahead, Claim, ClaimId, Departure, Place, Renewal, Standing, Store};
use lease_core::stores::sqlite::SqliteStore;
use lease_core::{ErrorKind, Name, Result, Token};
use rusqlite::Connection;
use rustix::process::{Pid, Signal, kill_process};
use support::manager::Manager;

const TTL: Duration = Duration::from_secs(30);
const SOON: Duration = Duration::from_secs(10);

/// A directory of its own for each test, removed when it passes.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("sqlite-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn db(&self) -> PathBuf {
        self.0.join("jobs.db")
    }

    fn raw(&self) -> Connection {
        Connection::open(self.db()).unwrap()
    }

    fn rows(&self) -> i64 {
        self.raw().query_row("SELECT count(*) FROM line", [], |row| row.get(0)).unwrap()
    }

    fn names(&self) -> Vec<String> {
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<_> = fs::read_dir(&self.0).unwrap().map(name).collect();
        names.sort();
        names
    }

    fn bells(&self) -> Vec<String> {
        self.names().into_iter().filter(|name| name.contains("-bell-")).collect()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

impl Manager {
    fn behind(&self, claim: &Claim) -> (Place, Ahead) {
        match self.claim(claim) {
            Standing::Behind(token, ahead) => (Place { claim: claim.clone(), token }, ahead),
            other => panic!("not behind: {other:?}"),
        }
    }

    fn look(&self, place: &Place) -> Standing {
        self.soon(self.store.look(place)).unwrap()
    }

    fn ping(&self) -> Result<()> {
        self.soon(self.store.ping())
    }

    /// How long it took until the claim was the head.
    fn wait(&self, place: &Place, mut ahead: Ahead) -> Duration {
        let since = Instant::now();
        loop {
            self.soon(self.store.turn(place, &ahead)).unwrap();
            match self.look(place) {
                Standing::Head(token) => {
                    assert_eq!(token, place.token);
                    return since.elapsed();
                }
                Standing::Behind(_, now) => ahead = now,
                other => panic!("neither head nor behind: {other:?}"),
            }
        }
    }

    /// The result, which has to come soon.
    /// Runs the work on the library's thread, where no transaction may run.
    fn on_library_thread<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Answer<T> {
        let (tx, rx) = mpsc::channel();
        self.env.spawn(Box::pin(async move { drop(tx.send(work.await)) }));
        Answer(rx)
    }

    fn close(self) {
        self.soon(self.store.close());
        block_on(self.env.stop(self.env.now() + SOON));
    }
}

struct Answer<T>(mpsc::Receiver<T>);

impl<T> Answer<T> {
    fn get(&self) -> T {
        self.0.recv_timeout(SOON).expect("an answer")
    }
}

fn claim(name: &str) -> Claim {
    claim_for(name, TTL)
}

fn claim_for(name: &str, ttl: Duration) -> Claim {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let id = u128::from(std::process::id()) << 64 | u128::from(NEXT.fetch_add(1, Ordering::Relaxed));
    Claim { name: Name::new(name).unwrap(), id: ClaimId(id), ttl, owner: "test".into(), queues: true, follows: None }
}

fn kind<T>(result: Result<T>) -> ErrorKind {
    result.err().expect("an error").kind()
}

fn until(what: &str, done: impl Fn() -> bool) {
    let limit = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < limit, "not within {SOON:?}: {what}");
        std::thread::yield_now();
    }
}

/// This test binary once more, in another process, doing what [`child`] does.
struct Other {
    process: Child,
    stdin: ChildStdin,
    answers: Answer<String>,
}

impl Other {
    fn start(db: &Path) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env("LEASE_TEST_CHILD", db)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let (tx, rx) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
                if let Some((_, answer)) = line.split_once('@') {
                    let _ = tx.send(answer.to_owned());
                }
            }
        });
        Self { process, stdin, answers: Answer(rx) }
    }

    fn tell(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").unwrap();
    }

    fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.answers.get()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The other process. On its own it does nothing: it is for [`Other`].
#[test]
fn child() {
    let Some(db) = std::env::var_os("LEASE_TEST_CHILD") else { return };
    let manager = Manager::open(Path::new(&db));
    let mut wish = claim("n");
    let mut waits = None;
    for command in std::io::stdin().lines() {
        match command.unwrap().as_str() {
            "claim" => {
                wish = claim("n");
                match manager.soon(manager.store.claim(manager.env.now(), &wish)) {
                    Ok(Standing::Head(token)) => println!("@head {token}"),
                    Ok(Standing::Behind(token, ahead)) => {
                        waits = Some((Place { claim: wish.clone(), token }, ahead));
                        println!("@behind {token}");
                    }
                    Ok(other) => println!("@{other:?}"),
                    Err(error) => println!("@{}", error.kind()),
                }
            }
            "wait" => {
                let (place, ahead) = waits.take().unwrap();
                println!("@waits");
                manager.wait(&place, ahead);
                println!("@head {}", place.token);
            }
            "leave" => println!("@{:?}", manager.leave(&wish)),
            other => panic!("no command: {other}"),
        }
    }
}

/// Tokens that restart after a release or a restart defeat every fence.
#[test]
fn tokens_go_on_after_leaving_and_reopening() {
    let dir = Dir::new();
    let mut last = 0;
    for _ in 0..3 {
        let manager = Manager::open(&dir.db());
        for _ in 0..3 {
            let place = manager.head(&claim("n"));
            assert!(place.token.get() > last);
            last = place.token.get();
            assert_eq!(manager.leave(&place.claim), Departure::Left);
            assert_eq!(manager.leave(&place.claim), Departure::Gone);
        }
        manager.close();
    }
    assert_eq!(last, 9);
    assert_eq!(dir.names(), ["jobs.db", "jobs.db-gate", "jobs.db-live"]);
    assert_eq!(dir.rows(), 0, "nothing of a name remains");
}

/// After a crash of the machine the file may be as of the last sync: the tokens given since must not be given again.
#[test]
fn a_new_boot_clears_the_lines_and_skips_all_tokens_that_may_have_been_given() {
    let dir = Dir::new();
    let manager = Manager::open(&dir.db());
    manager.head(&claim("held in the crash"));
    let saved = ["jobs.db", "jobs.db-wal"].map(|name| (dir.0.join(name), fs::read(dir.0.join(name)).unwrap()));
    let last = (0..1_000).map(|_| {
        let place = manager.head(&claim("n"));
        manager.leave(&place.claim);
        place.token.get()
    });
    let last = last.max().unwrap();
    manager.close();
    for (path, bytes) in saved {
        fs::write(path, bytes).unwrap();
    }
    let raw = dir.raw();
    let (next, reserved): (i64, i64) =
        raw.query_row("SELECT next_token, reserved_token FROM meta", [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    assert!(next < last && last < reserved, "the crash lost what was given, not what was reserved");
    raw.execute("UPDATE meta SET boot = 'another'", []).unwrap();
    drop(raw);
    let manager = Manager::open(&dir.db());
    assert!(manager.head(&claim("held in the crash")).token.get() >= reserved);
    manager.close();
}

/// A container can fake a boot id: rows of live holders must not be taken for those of an earlier boot.
#[test]
fn another_boot_id_beside_a_live_process_is_refused() {
    let dir = Dir::new();
    let mut other = Other::start(&dir.db());
    assert!(other.ask("claim").starts_with("head"));
    dir.raw().execute("UPDATE meta SET boot = 'another'", []).unwrap();
    let manager = Manager::open(&dir.db());
    assert_eq!(kind(manager.ping()), ErrorKind::Incompatible);
    assert_eq!(dir.rows(), 1);
    drop(other);
    // The lock went with the process.
    manager.ping().unwrap();
    assert_eq!(dir.rows(), 0);
    manager.close();
}

/// Closing any descriptor of a file drops the locks of the process on it: a second store must not do that to the first.
#[test]
fn closing_one_of_two_stores_keeps_the_locks_of_the_other() {
    let dir = Dir::new();
    let one = Manager::open(&dir.db());
    one.head(&claim("n"));
    for _ in 0..2 {
        let two = Manager::open(&dir.0.join("./jobs.db"));
        two.ping().unwrap();
        two.close();
    }
    dir.raw().execute("UPDATE meta SET boot = 'another'", []).unwrap();
    assert_eq!(Other::start(&dir.db()).ask("claim"), "INCOMPATIBLE");
    assert_eq!(dir.rows(), 1);
    one.close();
}

/// Two paths to one file have two gates and two logs, and so two holders: refused, before and while it is used.
#[test]
fn a_file_of_two_names_is_refused() {
    let dir = Dir::new();
    let manager = Manager::open(&dir.db());
    manager.ping().unwrap();
    let other = dir.0.join("other.db");
    fs::hard_link(dir.db(), &other).unwrap();
    let error = SqliteStore::open(&other, system().unwrap()).expect_err("an error");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("2 hard links"), "{error}");
    assert_eq!(kind(manager.ping()), ErrorKind::Invalid);
    fs::remove_file(&other).unwrap();
    manager.ping().unwrap();
    manager.close();
}

/// The database file is deleted while a store has it open, and another store of the same process opens the path: it would
/// have a holder of its own. It is refused until the first is closed, whose locks stay meanwhile.
#[test]
fn a_file_that_was_replaced_is_not_opened_beside_a_store_that_has_the_old_one() {
    use std::os::unix::fs::MetadataExt;
    let dir = Dir::new();
    let first = Manager::open(&dir.db());
    first.ping().unwrap();
    let live = fs::metadata(format!("{}-live", dir.db().display())).unwrap().ino();
    let locked = || {
        let locks = fs::read_to_string("/proc/locks").unwrap();
        locks
            .lines()
            .any(|lock| lock.contains(&format!(":{live} ")) && lock.contains(&format!(" {} ", std::process::id())))
    };
    for suffix in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{suffix}", dir.db().display()));
    }
    let second = || SqliteStore::open(&dir.db(), system().unwrap());
    assert_eq!(kind(second()), ErrorKind::Incompatible);
    assert!(locked(), "closing any descriptor of a file drops the locks of the process on it");
    first.close();
    assert!(!locked());
    for suffix in ["", "-gate", "-live"] {
        fs::remove_file(format!("{}{suffix}", dir.db().display())).unwrap();
    }
    let second = Manager::open(&dir.db());
    second.ping().unwrap();
    second.close();
}

/// Another program that keeps the file locked holds up no caller for longer than a moment.
#[test]
fn a_file_that_another_program_keeps_locked_is_unavailable_at_once() {
    let dir = Dir::new();
    let manager = lease_core::blocking::Manager::open(format!("sqlite:{}", dir.db().display())).unwrap();
    manager.ping().unwrap();
    let other = dir.raw();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let began = Instant::now();
    assert_eq!(kind(manager.acquire("n").timeout(Duration::from_millis(50)).wait()), ErrorKind::Unavailable);
    let error = manager.try_acquire("n").expect_err("an error");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.message().contains(dir.db().to_str().unwrap()), "it names the file: {error}");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    other.execute_batch("ROLLBACK").unwrap();
    assert!(manager.try_acquire("n").unwrap().is_some());
    manager.close().unwrap();
}

/// A hand-over between processes is a bell, not a poll: it must not take until the look at the predecessor's deadline.
#[test]
fn a_hand_over_between_processes_takes_no_polling() {
    let dir = Dir::new();
    let manager = Manager::open(&dir.db());
    let mut other = Other::start(&dir.db());
    let quick = Duration::from_millis(500);
    for _ in 0..5 {
        assert!(other.ask("claim").starts_with("head"));
        let (place, ahead) = manager.behind(&claim("n"));
        other.tell("leave");
        assert!(manager.wait(&place, ahead) < quick);
        assert_eq!(other.answers.get(), "Left");
        assert!(other.ask("claim").starts_with("behind"));
        assert_eq!(other.ask("wait"), "waits");
        let since = Instant::now();
        manager.leave(&place.claim);
        assert!(other.answers.get().starts_with("head"));
        assert!(since.elapsed() < quick);
        assert_eq!(other.ask("leave"), "Left");
    }
    assert_eq!(dir.rows(), 0);
    manager.close();
}

/// A frozen waiter is passed over, and must find itself gone when it thaws: else there are two holders.
#[test]
fn a_frozen_waiter_is_passed_over_and_does_not_hold_when_it_thaws() {
    let dir = Dir::new();
    let (one, three) = (Manager::open(&dir.db()), Manager::open(&dir.db()));
    let held = one.head(&claim("n"));
    let mut two = Other::start(&dir.db());
    assert!(two.ask("claim").starts_with("behind"));
    two.signal(Signal::STOP);
    let (place, ahead) = three.behind(&claim("n"));
    one.leave(&held.claim);
    let took = three.wait(&place, ahead);
    assert!(took > Duration::from_millis(900) && took < Duration::from_secs(2), "{took:?}");
    two.signal(Signal::CONT);
    assert_eq!(two.ask("leave"), "Gone");
    assert_eq!(three.look(&place), Standing::Head(place.token));
    one.close();
    three.close();
}

/// A leaver that closes at once cannot watch over its offer: the next in line must, or it waits for a whole ttl.
#[test]
fn an_offer_of_a_store_that_closed_is_watched_by_the_next_in_line() {
    let dir = Dir::new();
    let (one, two, three) = (Manager::open(&dir.db()), Manager::open(&dir.db()), Manager::open(&dir.db()));
    let held = one.head(&claim("n"));
    let (never_looks, _) = two.behind(&claim("n"));
    let (place, ahead) = three.behind(&claim("n"));
    one.leave(&held.claim);
    one.close();
    assert!(three.wait(&place, ahead) < Duration::from_secs(2));
    assert_eq!(two.look(&never_looks), Standing::Lost);
    two.close();
    three.close();
}

/// A manager's own next claim needs no offer: the manager is there.
#[test]
fn the_own_next_claim_becomes_held_with_the_leave() {
    let dir = Dir::new();
    let manager = Manager::open(&dir.db());
    let (first, (next, ahead)) = (manager.head(&claim("n")), manager.behind(&claim("n")));
    manager.leave(&first.claim);
    let turn: i64 = dir.raw().query_row("SELECT turn FROM line", [], |row| row.get(0)).unwrap();
    assert_eq!(turn, i64::MAX);
    assert!(manager.wait(&next, ahead) < Duration::from_secs(1), "its bell rang before it was waited for");
    manager.leave(&next.claim);
    manager.close();
}

/// A renewal of a claim that was offered its turn says so, and one whose offer lapsed is lost to everybody alike.
#[test]
fn renewing_tells_of_the_offer() {
    let dir = Dir::new();
    let (one, two) = (Manager::open(&dir.db()), Manager::open(&dir.db()));
    let held = one.head(&claim("n"));
    let (place, _) = two.behind(&claim_for("n", Duration::from_millis(500)));
    let renew = || {
        let sent = two.env.now();
        (two.soon(two.store.renew(sent, std::slice::from_ref(&place))).remove(0).unwrap(), sent)
    };
    let (renewal, confirmed) = renew();
    assert_eq!(renewal, Renewal::Renewed { confirmed, offered: false });
    one.leave(&held.claim);
    let (renewal, confirmed) = renew();
    assert_eq!(renewal, Renewal::Renewed { confirmed, offered: true });
    block_on(two.env.sleep_until(two.env.now() + Duration::from_millis(501)));
    assert_eq!(renew().0, Renewal::Lost { superseded: false });
    assert_eq!(two.look(&place), Standing::Lost);
    one.close();
    two.close();
}

/// Sharing a commit must not mean sharing a place: many claims at once, on the library's thread, where they queue.
#[test]
fn claims_that_share_a_commit_have_their_own_places() {
    let dir = Dir::new();
    let manager = Manager::open(&dir.db());
    let enter = |number: u32| {
        let (store, sent, wish) = (manager.store.clone(), manager.env.now(), claim(&format!("n{}", number % 10)));
        manager.on_library_thread(async move { store.claim(sent, &wish).await })
    };
    let entered: Vec<_> = (0..1_000).map(enter).collect();
    let (mut heads, mut tokens) = (0, BTreeSet::new());
    for standing in entered {
        let token = match standing.get().unwrap() {
            Standing::Head(token) => {
                heads += 1;
                token
            }
            Standing::Behind(token, ahead) => {
                assert!(ahead.holder <= ahead.predecessor && ahead.predecessor < token);
                assert!(ahead.count >= 1 && ahead.count < 100);
                token
            }
            other => panic!("{other:?}"),
        };
        tokens.insert(token);
    }
    assert_eq!((heads, tokens.len()), (10, 1_000));
    let records = manager.soon(manager.store.list("n")).unwrap();
    assert_eq!(records.iter().map(|record| record.waiting).collect::<Vec<_>>(), [99; 10]);
    manager.close();
}

/// A claim that was given up before it was applied must not enter after its `leave` was answered.
#[test]
fn a_claim_given_up_in_the_queue_never_enters() {
    let dir = Dir::new();
    let manager = Manager::open(&dir.db());
    manager.ping().unwrap();
    let (store, now) = (manager.store.clone(), manager.env.now());
    let gone = manager.on_library_thread(async move {
        let mut gone = 0;
        for _ in 0..200 {
            let wish = claim("n");
            let _ = poll_once(store.claim(now, &wish)).await;
            gone += i32::from(store.leave(&wish).await.unwrap() == Departure::Gone);
        }
        gone
    });
    assert!(gone.get() > 0, "none was given up in time to be skipped");
    assert_eq!(dir.rows(), 0);
    manager.close();
}

/// A `leave` that finds the file free must not overtake the `claim` that still waits in the queue.
#[test]
fn a_leave_never_overtakes_its_claim() {
    let dir = Dir::new();
    let manager = Manager::open(&dir.db());
    manager.ping().unwrap();
    for _ in 0..200 {
        let (store, sent, wish) = (manager.store.clone(), manager.env.now(), claim("n"));
        let queued = Arc::new(AtomicBool::new(false));
        let (entering, told) = (wish.clone(), queued.clone());
        let entered = manager.on_library_thread(async move {
            let mut claim = std::pin::pin!(store.claim(sent, &entering));
            let standing = poll_once(&mut claim).await;
            told.store(true, Ordering::Release);
            match standing {
                Some(standing) => standing,
                None => claim.await,
            }
        });
        while !queued.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
        assert_eq!(manager.leave(&wish), Departure::Left);
        assert!(matches!(entered.get(), Ok(Standing::Head(_))));
    }
    assert_eq!(dir.rows(), 0);
    manager.close();
}

/// The watcher of a name that nobody touches must still notice that its holder died.
#[test]
fn a_change_of_the_holder_is_told() {
    let dir = Dir::new();
    let (one, two) = (Manager::open(&dir.db()), Manager::open(&dir.db()));
    one.ping().unwrap();
    let watch = |seen: Option<Token>| {
        let (store, name) = (two.store.clone(), Name::new("n").unwrap());
        let told = two.on_library_thread(async move { store.changed(&name, seen).await });
        until("watched", || dir.raw().prepare("SELECT 1 FROM watch").unwrap().exists([]).unwrap());
        told
    };
    let enters = watch(None);
    let held = one.head(&claim("n"));
    enters.get().unwrap();
    let leaves = watch(Some(held.token));
    one.leave(&held.claim);
    leaves.get().unwrap();
    let held = one.head(&claim_for("n", Duration::from_millis(300)));
    watch(Some(held.token)).get().unwrap();
    assert!(one.soon(one.store.inspect(&held.claim.name)).unwrap().is_none());
    one.close();
    two.close();
}

/// Without a word to the evicted waiter it would go on waiting, and the one behind it for its deadline.
#[test]
fn an_eviction_is_told_to_the_evicted_and_to_the_next() {
    let dir = Dir::new();
    let (one, two) = (Manager::open(&dir.db()), Manager::open(&dir.db()));
    let held = one.head(&claim("n"));
    let (waits, ahead) = two.behind(&claim("n"));
    let (last, last_ahead) = two.behind(&claim("n"));
    assert_eq!(last_ahead.predecessor, waits.token);
    let evict = |token| one.soon(one.store.evict(&held.claim.name, token)).unwrap();
    assert!(evict(waits.token));
    two.soon(two.store.turn(&waits, &ahead)).unwrap();
    assert_eq!(two.look(&waits), Standing::Lost);
    two.soon(two.store.turn(&last, &last_ahead)).unwrap();
    let Standing::Behind(_, ahead) = two.look(&last) else { panic!("not behind") };
    assert_eq!((ahead.predecessor, ahead.count), (held.token, 1));
    assert!(evict(held.token));
    assert!(!evict(held.token));
    assert_eq!(two.look(&last), Standing::Head(last.token));
    one.close();
    two.close();
}

/// Somebody's data must not become a lock table by a slip of the path.
#[test]
fn files_of_others_are_refused_and_untouched() {
    let dir = Dir::new();
    let raw = Connection::open(dir.0.join("app.db")).unwrap();
    raw.execute_batch("CREATE TABLE users (name TEXT); INSERT INTO users VALUES ('ada')").unwrap();
    drop(raw);
    fs::write(dir.0.join("notes.txt"), "no database at all, but longer than the header of one. ".repeat(99)).unwrap();
    for name in ["app.db", "notes.txt"] {
        let before = fs::read(dir.0.join(name)).unwrap();
        assert_eq!(kind(SqliteStore::open(&dir.0.join(name), system().unwrap())), ErrorKind::Incompatible, "{name}");
        assert_eq!(fs::read(dir.0.join(name)).unwrap(), before);
    }
    assert_eq!(dir.names(), ["app.db", "notes.txt"], "nothing was put beside them");

    let manager = Manager::open(&dir.db());
    manager.ping().unwrap();
    manager.close();
    let version: i32 = dir.raw().query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
    for other in [version - 1, version + 1] {
        dir.raw().pragma_update(None, "user_version", other).unwrap();
        let manager = Manager::open(&dir.db());
        assert_eq!(kind(manager.ping()), ErrorKind::Incompatible, "of an earlier or later version");
        manager.close();
    }
}

#[test]
fn a_path_that_cannot_be_a_database_is_refused_at_once() {
    let dir = Dir::new();
    let open = |path: PathBuf| SqliteStore::open(&path, system().unwrap()).expect_err("an error");
    let missing = open(dir.0.join("none/jobs.db"));
    assert_eq!(missing.kind(), ErrorKind::Invalid);
    assert!(missing.message().contains("none") && missing.message().contains("create it"), "{missing}");
    for wrong in [dir.0.clone(), "/".into(), "/dev/null".into()] {
        assert_eq!(open(wrong.clone()).kind(), ErrorKind::Invalid, "{}", wrong.display());
    }
    assert!(dir.names().is_empty());
}

/// Two files at one path would be two holders of one name.
#[test]
fn a_file_that_was_replaced_or_lost_its_memory_is_refused() {
    let dir = Dir::new();
    let manager = Manager::open(&dir.db());
    manager.head(&claim("n"));
    let swap = "UPDATE meta SET incarnation = CAST(substr(incarnation, 9) || substr(incarnation, 1, 8) AS BLOB)";
    dir.raw().execute(swap, []).unwrap();
    assert_eq!(kind(manager.ping()), ErrorKind::Incompatible, "another incarnation");
    manager.close();
    let manager = Manager::open(&dir.db());
    assert_eq!(kind(manager.ping()), ErrorKind::Incompatible, "the gate tells who comes later");
    manager.close();
    dir.raw().execute(swap, []).unwrap();
    let manager = Manager::open(&dir.db());
    manager.head(&claim("m"));
    let next: i64 = dir.raw().query_row("SELECT next_token FROM meta", [], |row| row.get(0)).unwrap();
    dir.raw().execute("UPDATE meta SET next_token = 1", []).unwrap();
    assert_eq!(kind(manager.ping()), ErrorKind::Incompatible, "tokens went back");
    manager.close();
    let manager = Manager::open(&dir.db());
    assert_eq!(kind(manager.ping()), ErrorKind::Incompatible, "the gate tells who comes later");
    dir.raw().execute("UPDATE meta SET next_token = ?1", [next]).unwrap();
    manager.ping().unwrap();
    fs::rename(dir.db(), dir.0.join("moved.db")).unwrap();
    assert_eq!(kind(manager.ping()), ErrorKind::Incompatible, "deleted");
    fs::write(dir.db(), "").unwrap();
    assert_eq!(kind(manager.ping()), ErrorKind::Incompatible, "replaced");
    manager.close();
}

/// A killed manager leaves its socket: the next one clears it away, and those of live managers stay.
#[test]
fn bells_of_dead_managers_are_removed() {
    let dir = Dir::new();
    let (stale, of_others) = (dir.0.join("jobs.db-bell-0000000000000001"), dir.0.join("jobs.db-bell-not-ours"));
    for path in [&stale, &of_others] {
        drop(UnixDatagram::bind(path).unwrap());
    }
    let live = Manager::open(&dir.db());
    until("removed", || !stale.exists());
    assert_eq!(dir.bells().len(), 2, "{:?}", dir.bells());
    live.close();
    assert_eq!(dir.bells(), ["jobs.db-bell-not-ours"]);
}

/// Closing, or dropping without closing, must leave no thread, no descriptor and no socket behind.
#[test]
fn nothing_is_left_after_closing_or_dropping() {
    if std::env::var_os("LEASE_TEST_ALONE").is_none() {
        // Threads and descriptors are counted, so no other test may run in that process.
        let mut alone = Command::new(std::env::current_exe().unwrap());
        alone.args(["--exact", "nothing_is_left_after_closing_or_dropping"]).env("LEASE_TEST_ALONE", "1");
        return assert!(alone.status().unwrap().success());
    }
    let dir = Dir::new();
    let env = system().unwrap();
    let open = || ["fd", "task"].map(|what| fs::read_dir(format!("/proc/self/{what}")).unwrap().count());
    let before = open();
    for closes in [true, false] {
        let store = SqliteStore::open(&dir.db(), env.clone()).unwrap();
        let (one, two) = (claim("n"), claim("n"));
        block_on(store.claim(env.now(), &one)).unwrap();
        let Standing::Behind(token, ahead) = block_on(store.claim(env.now(), &two)).unwrap() else { panic!("behind") };
        if closes {
            let (waits, place, (tx, rx)) = (store.clone(), Place { claim: two.clone(), token }, mpsc::channel());
            env.spawn(Box::pin(async move { drop(tx.send(waits.turn(&place, &ahead).await)) }));
            for wish in [&two, &one] {
                block_on(store.leave(wish)).unwrap();
            }
            block_on(store.close());
            rx.recv_timeout(SOON).unwrap().ok();
            assert_eq!(kind(block_on(store.ping())), ErrorKind::Closed);
            until("closed", || open() == before);
        }
        drop(store);
        until("dropped", || open() == before && dir.bells().is_empty());
    }
}

/// Who waits when the store closes must not wait on.
#[test]
fn closing_wakes_who_waits() {
    let dir = Dir::new();
    let manager = Manager::open(&dir.db());
    let held = manager.head(&claim("n"));
    let (place, ahead) = manager.behind(&claim("n"));
    let (store, name, seen) = (manager.store.clone(), held.claim.name.clone(), Some(held.token));
    let turn = manager.on_library_thread(async move { store.turn(&place, &ahead).await });
    let store = manager.store.clone();
    let changed = manager.on_library_thread(async move { store.changed(&name, seen).await });
    until("watched", || dir.raw().prepare("SELECT 1 FROM watch").unwrap().exists([]).unwrap());
    manager.soon(manager.store.close());
    assert_eq!(kind(turn.get()), ErrorKind::Closed);
    assert_eq!(kind(changed.get()), ErrorKind::Closed);
    manager.close();
}

/// The log must not grow for ever, although no commit moves it into the file.
#[test]
fn the_log_is_moved_into_the_file() {
    let dir = Dir::new();
    let manager = Manager::open(&dir.db());
    for _ in 0..4_000 {
        let place = manager.head(&claim("n"));
        manager.leave(&place.claim);
    }
    let log = fs::metadata(dir.0.join("jobs.db-wal")).unwrap().len();
    assert!(log < 32 << 20, "{log} bytes");
    manager.close();
}

/// Managers on a counter that is guarded by nothing else.
#[test]
fn one_holder_at_a_time() {
    let dir = Dir::new();
    let path = dir.0.join("counter");
    fs::write(&path, "0").unwrap();
    let count = || {
        let manager = Manager::open(&dir.db());
        for _ in 0..50 {
            let wish = claim("n");
            match manager.claim(&wish) {
                Standing::Head(_) => {}
                Standing::Behind(token, ahead) => {
                    manager.wait(&Place { claim: wish.clone(), token }, ahead);
                }
                other => panic!("{other:?}"),
            }
            let count: u64 = fs::read_to_string(&path).unwrap().parse().unwrap();
            fs::write(&path, (count + 1).to_string()).unwrap();
            assert_eq!(manager.leave(&wish), Departure::Left);
        }
        manager.close();
    };
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(count))));
    assert_eq!(fs::read_to_string(&path).unwrap(), "200");
    assert_eq!(dir.rows(), 0);
}
