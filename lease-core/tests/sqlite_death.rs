//! The claims of a process that died are passed over at once, and only on proof: real processes, in namespaces too.
//!
//! Nobody renews here, so a claim of a living process lasts exactly for its ttl. Where a death has to be noticed, the ttl
//! is a minute and the limit a third of it; where it must not be, the ttl is two seconds and nobody may be earlier.

// Shared with programs that use other parts of it.
#[allow(dead_code)]
#[path = "support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use futures_lite::future::block_on;
use lease_core::Name;
use lease_core::store::{Ahead, Claim, ClaimId, Place, Standing, Store};
use libtest_mimic::{Arguments, Trial};
use rusqlite::Connection;
use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitId, WaitIdOptions, getrlimit, kill_process, setrlimit, waitid,
};
use support::manager::{LIMIT, Manager};
use support::process::{Worker, told, within};
use support::scratch::Scratch;

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_secs(2);
/// Tells this program to be one of the other processes, and of which file.
const WORKER: &str = "DEATH_WORKER";
/// Tells it to do the rest of the test of numbers that are used again, within a namespace.
const REUSE: &str = "DEATH_REUSE";

impl Manager {
    fn behind(&self, claim: &Claim) -> Waiting {
        match self.claim(claim) {
            Standing::Behind(token, ahead) => Waiting { place: Place { claim: claim.clone(), token }, ahead },
            other => panic!("not behind: {other:?}"),
        }
    }

    fn look(&self, waiting: &mut Waiting) -> bool {
        match self.soon(self.store.look(&waiting.place)).unwrap() {
            Standing::Head(token) => {
                assert_eq!(token, waiting.place.token);
                return true;
            }
            Standing::Behind(_, now) => waiting.ahead = now,
            other => panic!("neither head nor behind: {other:?}"),
        }
        false
    }

    fn turn(&self, waiting: &Waiting) {
        self.soon(self.store.turn(&waiting.place, &waiting.ahead)).unwrap();
    }

    /// Until it is the head.
    fn wait(&self, mut waiting: Waiting) {
        loop {
            self.turn(&waiting);
            if self.look(&mut waiting) {
                return;
            }
        }
    }

    fn close(self) {
        self.soon(self.store.close());
        block_on(self.env.stop(self.env.now() + LIMIT));
    }
}

struct Waiting {
    place: Place,
    ahead: Ahead,
}

fn claim(name: &str, ttl: Duration) -> Claim {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    // The numbers of processes meet where there are namespaces.
    let own = lease_core::clock::Moment::now().as_nanos() ^ u64::from(std::process::id()) << 44;
    let id = u128::from(own) << 64 | u128::from(NEXT.fetch_add(1, Ordering::Relaxed));
    Claim { name: Name::new(name).unwrap(), id: ClaimId(id), ttl, owner: "test".into(), queues: true, follows: None }
}

fn until(what: &str, done: impl Fn() -> bool) {
    let limit = within(LIMIT);
    while !done() {
        assert!(Instant::now() < limit, "not within {LIMIT:?}: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn signal(pid: u32, signal: Signal) {
    kill_process(pid_of(pid), signal).unwrap();
}

/// The letter in /proc, which a process that was waited for has no more.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// Waits for the end of all its threads, and leaves it a zombie. Its letter says so as soon as the first thread has ended.
fn ended(pid: u32) {
    let (child, how) =
        (WaitId::Pid(pid_of(pid)), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG);
    until("ended", || waitid(child.clone(), how).unwrap().is_some());
    assert_eq!(state(pid), Some('Z'));
}

fn pid_of(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed()).unwrap()
}

/// A database file, the processes that share it, and this one.
struct Scene {
    dir: Scratch,
    own: Manager,
}

impl Scene {
    fn new() -> Self {
        let dir = Scratch::in_memory("sqlite-death").unwrap();
        let own = Manager::open(&dir.path().join("jobs.db"));
        own.soon(own.store.ping()).unwrap();
        Self { dir, own }
    }

    fn db(&self) -> PathBuf {
        self.dir.path().join("jobs.db")
    }

    fn other(&self) -> Other {
        Other::start(Command::new(std::env::current_exe().unwrap()), &[], &self.db())
    }

    /// In another namespace.
    fn other_in(&self, namespace: &[&str]) -> Other {
        let mut arguments = namespace.to_vec();
        let program = std::env::current_exe().unwrap();
        arguments.push(program.to_str().unwrap());
        Other::start(Command::new("unshare"), &arguments, &self.db())
    }

    fn holder(&self, ttl: Duration) -> Other {
        let mut holder = self.other();
        holder.enter("n", ttl, "head");
        holder
    }

    fn behind(&self) -> Waiting {
        self.own.behind(&claim("n", LONG))
    }

    fn sql(&self, sql: &str) -> usize {
        let raw = Connection::open(self.db()).unwrap();
        raw.busy_timeout(LIMIT).unwrap();
        raw.execute(sql, []).unwrap()
    }

    fn number(&self, sql: &str) -> i64 {
        let raw = Connection::open(self.db()).unwrap();
        raw.busy_timeout(LIMIT).unwrap();
        raw.query_row(sql, [], |row| row.get(0)).unwrap()
    }

    /// Whoever waits gets the name when the ttl of a claim that was made after `entered` is over, and not before.
    fn lasts(&self, entered: Instant, waiting: Waiting) {
        self.own.wait(waiting);
        assert!(entered.elapsed() >= SHORT, "passed over after {:?} of {SHORT:?}", entered.elapsed());
    }

    fn end(self) {
        self.own.close();
    }
}

/// This program in another process, doing what [`work`] does.
struct Other {
    worker: Worker,
    pid: u32,
    /// Just before it was told to claim last.
    entered: Instant,
}

impl Other {
    fn start(command: Command, arguments: &[&str], db: &Path) -> Self {
        let variables = [(WORKER, db)];
        let worker = Worker::start_by(command, "another process", arguments, variables).unwrap();
        let pid = worker.hear("@ready", within(LIMIT)).unwrap().parse().unwrap();
        Self { worker, pid, entered: Instant::now() }
    }

    fn tell(&mut self, command: &str) {
        self.worker.tell(command).unwrap();
    }

    fn hear(&self, word: &str) -> String {
        self.worker.hear(word, within(LIMIT)).unwrap()
    }

    fn enter(&mut self, name: &str, ttl: Duration, standing: &str) {
        self.entered = Instant::now();
        self.tell(&format!("claim {name} {}", ttl.as_millis()));
        self.hear(&format!("@{standing}"));
    }

    /// Whether it said that by now.
    fn has_said(&self, word: &str) -> bool {
        self.worker.hear(word, Instant::now()).is_ok()
    }

    /// Killed, and waited for by nobody: its number stays its own.
    fn kill(&self) {
        signal(self.pid, Signal::KILL);
    }

    fn freeze(&self) {
        signal(self.pid, Signal::STOP);
        until("stopped", || state(self.pid) == Some('T'));
    }
}

/// The other process.
fn work(db: &Path) {
    let manager = Manager::open(db);
    println!("@ready {}", std::process::id());
    let (mut held, mut waits) = (BTreeMap::new(), BTreeMap::new());
    while let Some(line) = told().unwrap() {
        let words: Vec<_> = line.split(' ').collect();
        match *words {
            ["claim", name, ttl] => {
                let wish = claim(name, Duration::from_millis(ttl.parse().unwrap()));
                held.insert(name.to_owned(), wish.clone());
                match manager.claim(&wish) {
                    Standing::Head(token) => println!("@head {token}"),
                    Standing::Behind(token, ahead) => {
                        waits.insert(name.to_owned(), Waiting { place: Place { claim: wish, token }, ahead });
                        println!("@behind {token}");
                    }
                    other => panic!("{other:?}"),
                }
            }
            ["wait", name] => {
                manager.wait(waits.remove(name).unwrap());
                println!("@got");
            }
            ["turn", name] => {
                let (store, Waiting { place, ahead }) = (manager.store.clone(), waits.remove(name).unwrap());
                manager.env.spawn(Box::pin(async move { store.turn(&place, &ahead).await.unwrap() }));
            }
            ["leave", name] => println!("@left {:?}", manager.leave(&held[name])),
            ["watches"] => {
                let links = fs::read_dir("/proc/self/fd").unwrap().flatten().map(|fd| fs::read_link(fd.path()));
                println!(
                    "@watches {}",
                    links.flatten().filter(|link| link.to_string_lossy().contains("pidfd")).count()
                );
            }
            ["fork"] => {
                let wish = claim("of-a-child", LONG);
                // SAFETY: no other thread does anything that the child would find half done.
                if unsafe { nix::unistd::fork() }.unwrap().is_child() {
                    manager.head(&wish);
                    println!("@child {}", std::process::id());
                    loop {
                        thread::park();
                    }
                }
            }
            ["exit"] => std::process::exit(0),
            ["abort"] => std::process::abort(),
            ["sleep"] => panic!("{}", Command::new("sleep").arg("60").exec()),
            ["detach"] => {
                for fd in 0..1024 {
                    // As daemons do. Most are not open, and whoever used one fails or not.
                    let _ = nix::unistd::close(fd);
                }
                loop {
                    thread::park();
                }
            }
            ["forget"] => {
                // Without leaving: as a program that lost its way, with its store in the hands of nobody.
                let Manager { env, store } = manager;
                std::mem::forget(env);
                drop(store);
                println!("@forgotten");
                loop {
                    thread::park();
                }
            }
            ["starve"] => {
                let limit = Rlimit { current: Some(0), ..getrlimit(Resource::Nofile) };
                setrlimit(Resource::Nofile, limit).unwrap();
                println!("@starves");
            }
            _ => panic!("no command: {line}"),
        }
    }
}

/// A process that is not ours, and not waited for until the end.
struct Stranger(Child);

impl Stranger {
    fn sleep() -> Self {
        Self(Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap())
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn a_killed_holder_is_passed_over_by_who_waits() {
    let scene = Scene::new();
    let mut took = Vec::new();
    for _ in 0..5 {
        let holder = scene.holder(LONG);
        let waiting = scene.behind();
        let claim = waiting.place.claim.clone();
        let since = Instant::now();
        holder.kill();
        scene.own.wait(waiting);
        took.push(since.elapsed());
        scene.own.leave(&claim);
    }
    println!("from SIGKILL to the next holder: {took:?}");
    scene.end();
}

fn a_killed_holder_is_passed_over_by_who_comes_later() {
    let scene = Scene::new();
    for was_waited_for in [false, true] {
        let mut holder = scene.holder(LONG);
        // Its next claim is gone with it.
        holder.enter("n", LONG, "behind");
        let pid = holder.pid;
        holder.kill();
        ended(pid);
        let holder = if was_waited_for {
            drop(holder);
            None
        } else {
            Some(holder)
        };
        let claim = claim("n", LONG);
        let since = Instant::now();
        scene.own.wait(scene.own.behind(&claim));
        println!("from coming to holding: {:?}", since.elapsed());
        assert_eq!(state(pid), if was_waited_for { None } else { Some('Z') });
        scene.own.leave(&claim);
        drop(holder);
    }
    scene.end();
}

fn who_does_not_wait_gets_the_name_of_a_dead_holder() {
    let scene = Scene::new();
    let mut holder = scene.holder(LONG);
    let attempt = Claim { queues: false, ..claim("n", LONG) };
    let Standing::Busy(_) = scene.own.claim(&attempt) else { panic!("it lives") };
    let mut waits = scene.other();
    waits.enter("n", LONG, "behind");
    let pids = [holder.pid, waits.pid];
    holder.tell("exit");
    waits.kill();
    pids.into_iter().for_each(ended);
    scene.own.head(&attempt);
    scene.end();
}

fn a_dead_holder_is_not_shown_and_its_watchers_are_told() {
    let scene = Scene::new();
    let name = Name::new("n").unwrap();
    let inspect = || scene.own.soon(scene.own.store.inspect(&name)).unwrap();
    for waits in [true, false] {
        let holder = scene.holder(LONG);
        let seen = inspect().expect("it is held").token;
        let (tx, told) = mpsc::channel();
        if waits {
            let (store, name) = (scene.own.store.clone(), name.clone());
            scene.own.env.spawn(Box::pin(async move { drop(tx.send(store.changed(&name, Some(seen)).await)) }));
            until("watched", || scene.number("SELECT count(*) FROM watch") == 1);
        }
        let pid = holder.pid;
        holder.kill();
        if waits {
            told.recv_timeout(LIMIT).expect("told").unwrap();
        } else {
            ended(pid);
        }
        assert!(inspect().is_none());
    }
    scene.end();
}

fn however_a_process_ends_it_is_passed_over() {
    let scene = Scene::new();
    for end in ["exit", "abort"] {
        let mut holder = scene.holder(LONG);
        let waiting = scene.behind();
        let claim = waiting.place.claim.clone();
        holder.tell(end);
        scene.own.wait(waiting);
        scene.own.leave(&claim);
    }
    scene.end();
}

/// The process lives on, and with it perhaps what it did.
fn a_program_that_becomes_another_keeps_the_name_for_its_ttl() {
    let scene = Scene::new();
    let mut holder = scene.holder(SHORT);
    let waiting = scene.behind();
    holder.tell("sleep");
    until("another program", || fs::read_to_string(format!("/proc/{}/comm", holder.pid)).unwrap().trim() == "sleep");
    scene.lasts(holder.entered, waiting);
    scene.end();
}

fn a_frozen_process_keeps_the_name_for_its_ttl() {
    let scene = Scene::new();
    let holder = scene.holder(SHORT);
    let waiting = scene.behind();
    holder.freeze();
    scene.lasts(holder.entered, waiting);
    scene.end();
}

/// All its sockets hang up, and its locks are gone.
fn a_process_that_closes_its_descriptors_keeps_the_name_for_its_ttl() {
    let scene = Scene::new();
    let mut holder = scene.holder(SHORT);
    let waiting = scene.behind();
    holder.tell("detach");
    let open = || fs::read_dir(format!("/proc/{}/fd", holder.pid)).unwrap().count();
    until("closed", || open() == 0);
    scene.lasts(holder.entered, waiting);
    assert!(matches!(state(holder.pid), Some('S' | 'R')), "it lives");
    scene.end();
}

fn a_manager_that_was_forgotten_keeps_the_name_for_its_ttl() {
    let scene = Scene::new();
    let mut holder = scene.holder(SHORT);
    let waiting = scene.behind();
    holder.tell("forget");
    holder.hear("@forgotten");
    scene.lasts(holder.entered, waiting);
    scene.end();
}

/// Makes the row of a dead process one of that process, and says when nobody gets it before its ttl.
fn of(scene: &Scene, pid: u32) {
    let inode = {
        use rustix::process::{PidfdFlags, pidfd_open};
        let pidfd = pidfd_open(pid_of(pid), PidfdFlags::empty()).unwrap();
        rustix::fs::fstat(pidfd).unwrap().st_ino
    };
    assert_eq!(scene.sql(&format!("UPDATE line SET pid = {pid}, inode = {inode} WHERE name = 'n'")), 1);
}

/// A forked child has all descriptors of its parent, and none of its claims; and its parent has none of those that it made,
/// though by a store that was its parent's.
fn a_forked_child_that_lives_on_does_not_hold_for_its_parent() {
    let scene = Scene::new();
    let mut holder = scene.holder(LONG);
    holder.tell("fork");
    let child: u32 = holder.hear("@child").parse().unwrap();
    assert_eq!(scene.number("SELECT pid FROM line WHERE name = 'of-a-child'"), child.into());
    let waiting = scene.behind();
    holder.kill();
    scene.own.wait(waiting);
    assert!(matches!(state(child), Some('S' | 'R')), "the child lives");
    assert_eq!(scene.number("SELECT count(*) FROM line WHERE name = 'of-a-child'"), 1);
    signal(child, Signal::KILL);
    scene.own.wait(scene.own.behind(&claim("of-a-child", LONG)));
    scene.end();
}

/// Its first thread has ended, and it is shown as a zombie, but other threads of it go on.
fn a_zombie_whose_threads_live_keeps_the_name_for_its_ttl() {
    let scene = Scene::new();
    let lives = Python::run(
        "import ctypes, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
ctypes.CDLL(None).pthread_exit(None)",
    );
    let pid = lives.worker.pid();
    until("its first thread has ended", || state(pid) == Some('Z'));
    let holder = scene.holder(SHORT);
    of(&scene, pid);
    let waiting = scene.behind();
    scene.lasts(holder.entered, waiting);
    assert_eq!(fs::read_dir(format!("/proc/{pid}/task")).unwrap().count(), 2, "it lives");
    drop(lives);
    scene.end();
}

struct Python {
    worker: Worker,
}

impl Python {
    fn run(program: &str) -> Self {
        let nothing: [(&str, &str); 0] = [];
        Self { worker: Worker::start_by(Command::new("python3"), "python3", ["-c", program], nothing).unwrap() }
    }
}

/// The number is another's: the other's life is no sign of life.
fn a_number_that_is_used_again_is_no_sign_of_life() {
    let scene = Scene::new();
    let stranger = Stranger::sleep();
    let holder = scene.holder(LONG);
    drop(holder);
    scene.sql(&format!("UPDATE line SET pid = {}", stranger.pid()));
    scene.own.wait(scene.behind());
    scene.end();
}

/// The same, and nothing is made up: within a pid namespace, whose next number may be chosen.
fn a_number_that_the_kernel_gives_again_is_no_sign_of_life() {
    let mut within = Command::new("unshare");
    within.args(["-Urpf", "--mount-proc", "--kill-child"]).arg(std::env::current_exe().unwrap()).env(REUSE, "1");
    assert!(within.status().unwrap().success());
}

fn reuse() {
    let scene = Scene::new();
    let holder = scene.holder(LONG);
    let pid = holder.pid;
    drop(holder);
    let number = "/proc/sys/kernel/ns_last_pid";
    let mut strangers = Vec::new();
    let limit = within(LIMIT);
    loop {
        fs::write(number, (pid - 1).to_string()).unwrap();
        let stranger = Stranger::sleep();
        if stranger.pid() == pid {
            break strangers.push(stranger);
        }
        strangers.push(stranger);
        assert!(Instant::now() < limit, "another thread always takes it first");
    }
    scene.own.wait(scene.behind());
    assert!(state(pid).is_some(), "the other that has the number lives");
    scene.end();
}

/// Proof is about the claims of one manager: another may have its number by now, or be a child that uses its parent's.
fn proof_is_about_the_claims_of_one_manager() {
    let scene = Scene::new();
    let (mut dead, mut lives) = (scene.holder(LONG), scene.other());
    lives.enter("m", LONG, "head");
    dead.enter("of-a-child", LONG, "head");
    dead.enter("of-its-own", LONG, "head");
    scene.sql(&format!("UPDATE line SET pid = {} WHERE name IN ('n', 'of-its-own')", lives.pid));
    scene.own.wait(scene.behind());
    let names = |names: &str| scene.number(&format!("SELECT count(*) FROM line WHERE name IN ({names})"));
    until("removed", || names("'of-its-own'") == 0);
    assert_eq!(names("'m', 'of-a-child'"), 2);
    drop(dead);
    scene.end();
}

/// Nothing that is seen from here says anything about there.
fn a_process_of_another_pid_namespace_keeps_the_name_for_its_ttl() {
    for dies in [true, false] {
        let scene = Scene::new();
        let mut holder = scene.other_in(&["-Urpf", "--mount-proc", "--kill-child"]);
        assert!(holder.pid < 10, "its number there");
        holder.enter("n", SHORT, "head");
        if dies {
            signal(holder.worker.pid(), Signal::KILL);
            assert!(holder.worker.hear("nothing", within(LIMIT)).unwrap_err().contains("ended"));
        } else {
            assert_eq!(scene.sql("UPDATE line SET pid = 0x7ffffff0"), 1, "a number that nobody has here");
        }
        let waiting = scene.behind();
        scene.lasts(holder.entered, waiting);
        scene.end();
    }
}

/// The clock of such a process, and when it started, are shifted.
fn another_time_namespace_makes_no_difference() {
    for offset in ["-10", "1000"] {
        let namespace = ["-UrT", "--boottime", offset];
        let scene = Scene::new();
        let mut holder = scene.other_in(&namespace);
        holder.enter("n", SHORT, "head");
        let waiting = scene.behind();
        let claim = waiting.place.claim.clone();
        scene.lasts(holder.entered, waiting);
        scene.own.leave(&claim);
        holder.enter("n", LONG, "head");
        let waiting = scene.behind();
        let claim = waiting.place.claim.clone();
        holder.kill();
        scene.own.wait(waiting);
        scene.own.leave(&claim);

        let mut waits = scene.other_in(&namespace);
        let holder = scene.holder(SHORT);
        waits.enter("n", LONG, "behind");
        waits.tell("wait n");
        waits.hear("@got");
        assert!(holder.entered.elapsed() >= SHORT);
        waits.tell("leave n");
        waits.hear("@left");
        let holder = scene.holder(LONG);
        waits.enter("n", LONG, "behind");
        waits.tell("wait n");
        holder.kill();
        waits.hear("@got");
        scene.end();
    }
}

fn a_waiter_in_the_middle_that_dies_is_passed_over() {
    let scene = Scene::new();
    let held = scene.own.head(&claim("n", LONG));
    let mut middle = scene.other();
    middle.enter("n", LONG, "behind");
    let mut last = scene.behind();
    assert_ne!(last.ahead.predecessor, held.token);
    middle.kill();
    while last.ahead.predecessor != held.token {
        scene.own.turn(&last);
        assert!(!scene.own.look(&mut last), "it is held");
    }
    scene.own.leave(&held.claim);
    scene.own.wait(last);
    scene.end();
}

/// The offer would last for a second: it is made to last longer, so that nobody gets the name by its end.
fn a_waiter_that_dies_with_the_offer_is_passed_over() {
    let scene = Scene::new();
    let held = scene.own.head(&claim("n", LONG));
    let mut offered = scene.other();
    offered.enter("n", LONG, "behind");
    offered.freeze();
    let second = Manager::open(&scene.db());
    let last = second.behind(&claim("n", LONG));
    scene.own.leave(&held.claim);
    assert_eq!(scene.sql("UPDATE line SET turn = turn + 60000000000 WHERE turn > 0"), 1);
    offered.kill();
    second.wait(last);
    second.close();
    scene.end();
}

fn many_that_die_at_once_are_passed_over() {
    let scene = Scene::new();
    let mut others = vec![scene.holder(LONG)];
    for _ in 0..4 {
        let mut other = scene.other();
        other.enter("n", LONG, "behind");
        others.push(other);
    }
    let last = scene.behind();
    others.iter().for_each(Other::kill);
    scene.own.wait(last);
    assert_eq!(scene.number("SELECT count(*) FROM line"), 1);
    scene.end();
}

/// The one before is frozen and sees no death: it is offered the name, and passed over when it does not take it.
fn a_dead_holder_is_seen_past_a_frozen_waiter() {
    let scene = Scene::new();
    let holder = scene.holder(LONG);
    let mut frozen = scene.other();
    frozen.enter("n", LONG, "behind");
    frozen.freeze();
    let last = scene.behind();
    holder.kill();
    scene.own.wait(last);
    scene.end();
}

/// Who waits in another pid namespace has no proof, and gets the name by the proof of who waits behind.
fn proof_helps_who_has_none() {
    let scene = Scene::new();
    let holder = scene.holder(LONG);
    let mut second = scene.other_in(&["-Urpf", "--mount-proc", "--kill-child"]);
    second.enter("n", LONG, "behind");
    second.tell("wait n");
    let last = scene.behind();
    let Waiting { place, ahead } = last;
    let (store, waits) = (scene.own.store.clone(), place.clone());
    scene.own.env.spawn(Box::pin(async move { drop(store.turn(&waits, &ahead).await) }));
    holder.kill();
    second.hear("@got");
    assert_eq!(scene.number("SELECT count(*) FROM line"), 2);
    scene.own.leave(&place.claim);
    scene.end();
}

fn ten_waiters_get_the_name_of_a_dead_holder_one_after_the_other() {
    let scene = Scene::new();
    let holder = scene.holder(LONG);
    let mut waiters: Vec<_> = (0..10).map(|_| scene.other()).collect();
    for waiter in &mut waiters {
        waiter.enter("n", LONG, "behind");
        waiter.tell("wait n");
    }
    holder.kill();
    for next in 0..waiters.len() {
        waiters[next].hear("@got");
        let later = waiters.len() - next - 1;
        assert_eq!(scene.number("SELECT count(*) FROM line"), i64::try_from(later + 1).unwrap());
        assert_eq!(scene.number("SELECT count(*) FROM line WHERE turn <> 0"), 1);
        assert!(waiters[next + 1..].iter().all(|waiter| !waiter.has_said("@got")));
        waiters[next].tell("leave n");
        waiters[next].hear("@left Left");
    }
    scene.end();
}

/// Nothing is guessed where nothing can be watched.
fn who_may_open_nothing_waits_for_the_ttl() {
    let scene = Scene::new();
    let holder = scene.holder(SHORT);
    let mut waits = scene.other();
    // What it needs to wait is open by now.
    waits.enter("m", LONG, "head");
    waits.tell("starve");
    waits.hear("@starves");
    waits.enter("n", LONG, "behind");
    waits.tell("wait n");
    holder.kill();
    waits.hear("@got");
    assert!(holder.entered.elapsed() >= SHORT);
    scene.end();
}

/// The death is noticed while nothing can be written: it is not forgotten.
fn a_death_that_comes_while_the_file_is_locked_is_not_forgotten() {
    let scene = Scene::new();
    let holder = scene.holder(LONG);
    let waiting = scene.behind();
    let raw = Connection::open(scene.db()).unwrap();
    raw.execute_batch("BEGIN IMMEDIATE").unwrap();
    holder.kill();
    ended(holder.pid);
    for _ in 0..20 {
        // Each is refused after a while, in the order of the requests.
        scene.own.soon(scene.own.store.ping()).unwrap_err();
    }
    raw.execute_batch("ROLLBACK").unwrap();
    scene.own.wait(waiting);
    scene.end();
}

/// However many wait for a manager it is watched once, and not for longer than they wait.
fn a_manager_is_watched_once_and_no_longer_than_needed() {
    let scene = Scene::new();
    let names = ["a", "b", "c"];
    let held = names.map(|name| scene.own.head(&claim(name, LONG)));
    let mut waits = scene.other();
    let watches = |waits: &mut Other, count: &str| {
        let limit = within(LIMIT);
        loop {
            waits.tell("watches");
            if waits.hear("@watches") == count {
                return;
            }
            assert!(Instant::now() < limit, "not {count}");
        }
    };
    for name in names {
        waits.enter(name, LONG, "behind");
        waits.tell(&format!("turn {name}"));
        watches(&mut waits, "1");
    }
    for (place, left) in held.iter().zip(["1", "1", "0"]) {
        scene.own.leave(&place.claim);
        watches(&mut waits, left);
    }
    scene.end();
}

/// What a test takes, and why it cannot be had here.
fn missing(program: &str, arguments: &[&str]) -> Option<String> {
    let tried = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let why = match tried {
        Ok(done) if done.status.success() => return None,
        Ok(done) => String::from_utf8_lossy(&done.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    Some(format!("{program} {}: {why}", arguments.join(" ")))
}

/// Whether the kernel tells processes apart by the inodes of their descriptors.
fn no_inodes() -> Option<String> {
    use rustix::process::{PidfdFlags, getpid, pidfd_open};
    let pidfd = pidfd_open(getpid(), PidfdFlags::empty()).unwrap();
    let is_pidfs = rustix::fs::fstatfs(pidfd).unwrap().f_type == 0x5049_4446;
    (!is_pidfs).then(|| "Linux before 6.9 does not tell processes apart that had the same number".to_owned())
}

fn main() {
    if let Some(db) = std::env::var_os(WORKER) {
        return work(Path::new(&db));
    }
    if std::env::var_os(REUSE).is_some() {
        return reuse();
    }
    let required = std::env::var("TEST_TOOLS").is_ok_and(|value| value == "required");
    let pids = missing("unshare", &["-Urpf", "--mount-proc", "--kill-child", "true"]);
    let times = missing("unshare", &["-UrT", "--boottime", "1000", "true"]);
    let numbers = missing("unshare", &["-Urpf", "--mount-proc", "sh", "-c", "echo 300 > /proc/sys/kernel/ns_last_pid"]);
    let python = missing("python3", &["-c", "import ctypes"]);
    let inodes = no_inodes();
    let mut trials = Vec::new();
    let mut add = |name: &str, test: fn(), lacks: &[&Option<String>]| {
        let why = lacks.iter().find_map(|lack| lack.as_deref());
        if let Some(why) = why {
            eprintln!("NOT TESTED HERE: {name}: {why}");
        }
        let failure = why.map(ToOwned::to_owned);
        let run = move || {
            if let Some(why) = failure {
                return Err(why.into());
            }
            test();
            Ok(())
        };
        trials.push(Trial::test(name, run).with_ignored_flag(why.is_some() && !required));
    };
    macro_rules! tests {
        ($($test:ident $(lacks $($lack:ident)+)?;)*) => { $(add(stringify!($test), $test, &[$($(&$lack),+)?]);)* };
    }
    tests! {
        a_killed_holder_is_passed_over_by_who_waits;
        a_killed_holder_is_passed_over_by_who_comes_later;
        who_does_not_wait_gets_the_name_of_a_dead_holder;
        a_dead_holder_is_not_shown_and_its_watchers_are_told;
        however_a_process_ends_it_is_passed_over;
        a_program_that_becomes_another_keeps_the_name_for_its_ttl;
        a_frozen_process_keeps_the_name_for_its_ttl;
        a_process_that_closes_its_descriptors_keeps_the_name_for_its_ttl;
        a_manager_that_was_forgotten_keeps_the_name_for_its_ttl;
        a_forked_child_that_lives_on_does_not_hold_for_its_parent;
        a_zombie_whose_threads_live_keeps_the_name_for_its_ttl lacks python;
        a_number_that_is_used_again_is_no_sign_of_life lacks inodes;
        a_number_that_the_kernel_gives_again_is_no_sign_of_life lacks inodes numbers;
        proof_is_about_the_claims_of_one_manager lacks inodes;
        a_process_of_another_pid_namespace_keeps_the_name_for_its_ttl lacks pids;
        another_time_namespace_makes_no_difference lacks times;
        a_waiter_in_the_middle_that_dies_is_passed_over;
        a_waiter_that_dies_with_the_offer_is_passed_over;
        many_that_die_at_once_are_passed_over;
        a_dead_holder_is_seen_past_a_frozen_waiter;
        proof_helps_who_has_none lacks pids;
        ten_waiters_get_the_name_of_a_dead_holder_one_after_the_other;
        who_may_open_nothing_waits_for_the_ttl;
        a_death_that_comes_while_the_file_is_locked_is_not_forgotten;
        a_manager_is_watched_once_and_no_longer_than_needed;
    }
    let mut arguments = Arguments::from_args();
    // They wait much more than they work.
    arguments.test_threads.get_or_insert(8);
    libtest_mimic::run(&arguments, trials).exit();
}
