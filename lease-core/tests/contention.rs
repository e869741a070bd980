//! Fifty contenders for one name: as tasks, as threads, and as processes. Never do two hold it, no token comes twice, they
//! come in order, nobody starves, and a counter that nothing else guards loses no update. Then the holder's connection is
//! cut, and it must know before anyone else can get the name.
//!
//! Every contender goes round until the counter has reached its goal: the end is an event. Tests run one at a time, so that
//! the limits of the partition are the library's and not those of a busy machine.

// Shared with programs that use other parts of it.
#[allow(dead_code)]
mod support;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use lease_core::clock::Moment;
use lease_core::{Manager, Token, blocking};
use support::journal::{self, End, Holding, Journal, judge};
use support::process::{Worker, told, within};
use support::scratch::Scratch;
use tokio::task::JoinSet;

const CONTENDERS: usize = 50;
const NAME: &str = "nightly";
/// A test that takes longer than this hangs.
const LIMIT: Duration = Duration::from_secs(20);
/// A contender that waits longer than this fails, so that a hang is told by the one who hangs.
const PATIENCE: Duration = Duration::from_secs(15);

static ALONE: Mutex<()> = Mutex::new(());

/// Runs the body with nothing beside it. Fails when it takes longer than the limit, or panics.
fn alone(body: impl FnOnce() + Send + 'static) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (tx, rx) = std::sync::mpsc::channel();
    let thread = thread::spawn(move || {
        body();
        tx.send(()).unwrap();
    });
    match rx.recv_timeout(LIMIT) {
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("it hangs: not done after {LIMIT:?}"),
        // Done, or it panicked.
        _ => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
    }
}

fn alone_async(body: impl Future<Output = ()> + Send + 'static) {
    alone(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        // A task of its own, so that it runs on the workers as what it spawns does.
        let body = runtime.spawn(body);
        runtime.block_on(body).unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
    });
}

/// What only a holder may touch, in one process.
#[derive(Default)]
struct Resource {
    occupied: AtomicBool,
    /// Atomic because the language asks for it; it is read and written in two steps.
    counter: AtomicU64,
    tokens: Mutex<Vec<Token>>,
}

impl Resource {
    /// One step of a holder's work: whether there is more to do.
    fn enter(&self, token: Token) -> u64 {
        assert!(!self.occupied.swap(true, Ordering::SeqCst), "two holders at once, one of them with token {token}");
        self.tokens.lock().unwrap().push(token);
        self.counter.load(Ordering::SeqCst)
    }

    fn leave(&self, counted: u64) {
        self.counter.store(counted, Ordering::SeqCst);
        assert!(self.occupied.swap(false, Ordering::SeqCst), "somebody else left");
    }

    /// Given how often each contender has counted, and how far.
    fn check(&self, shares: &[u64], goal: u64) {
        let tokens = self.tokens.lock().unwrap();
        assert_eq!(shares.len(), CONTENDERS);
        assert!(shares.iter().all(|share| *share >= 1), "somebody starved: {shares:?}");
        assert_eq!(shares.iter().sum::<u64>(), self.counter.load(Ordering::SeqCst), "an update was lost");
        assert_eq!(self.counter.load(Ordering::SeqCst), goal);
        assert!(tokens.is_sorted_by(|older, newer| older < newer), "tokens out of order: {tokens:?}");
        assert_eq!(tokens.iter().collect::<HashSet<_>>().len(), tokens.len(), "a token was given twice");
        // In the last round everybody finds that the goal was reached.
        assert_eq!(tokens.len() as u64, goal + CONTENDERS as u64);
    }
}

#[test]
fn fifty_tasks_of_one_process_on_a_memory_store() {
    const GOAL: u64 = 5_000;
    alone_async(async {
        let manager = Manager::open("memory:").await.unwrap();
        let resource = Arc::new(Resource::default());
        let mut contenders = JoinSet::new();
        for _ in 0..CONTENDERS {
            let (manager, resource) = (manager.clone(), resource.clone());
            contenders.spawn(async move {
                let mut share = 0;
                loop {
                    let lease = manager.acquire(NAME).timeout(PATIENCE).await.unwrap();
                    let counted = resource.enter(lease.token());
                    // Here another would come in between, if another could.
                    tokio::task::yield_now().await;
                    let more = counted < GOAL;
                    resource.leave(counted + u64::from(more));
                    lease.release().await.unwrap();
                    if !more {
                        return share;
                    }
                    share += 1;
                }
            });
        }
        resource.check(&contenders.join_all().await, GOAL);
        manager.close().await.unwrap();
    });
}

#[test]
#[cfg_attr(not(feature = "sqlite"), ignore = "needs the feature sqlite")]
fn fifty_threads_of_one_process_on_a_sqlite_file() {
    const GOAL: u64 = 2_000;
    alone(|| {
        let scratch = Scratch::new("lease-threads").unwrap();
        let manager = blocking::Manager::open(scratch.sqlite()).unwrap();
        let resource = Resource::default();
        let contend = || {
            let mut share = 0;
            loop {
                let lease = manager.acquire(NAME).timeout(PATIENCE).wait().unwrap();
                let counted = resource.enter(lease.token());
                thread::yield_now();
                let more = counted < GOAL;
                resource.leave(counted + u64::from(more));
                lease.release().unwrap();
                if !more {
                    return share;
                }
                share += 1;
            }
        };
        let shares: Vec<u64> = thread::scope(|scope| {
            let contenders: Vec<_> = (0..CONTENDERS).map(|_| scope.spawn(contend)).collect();
            let join = |contender: thread::ScopedJoinHandle<'_, u64>| {
                contender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            contenders.into_iter().map(join).collect()
        });
        resource.check(&shares, GOAL);
        manager.close().unwrap();
    });
}

/// The goal of all processes together.
const PROCESSES_GOAL: u64 = 1_500;
/// Tells a worker its directory. Not an option of the library, so not named like one.
const WORKER_DIRECTORY: &str = "CONTENTION_WORKER_DIRECTORY";
const WORKER_CONTENDERS: &str = "CONTENTION_WORKER_CONTENDERS";

#[test]
#[cfg_attr(not(feature = "sqlite"), ignore = "needs the feature sqlite")]
fn fifty_contenders_in_eight_processes_on_one_sqlite_file() {
    const PROCESSES: usize = 8;
    alone(|| {
        let scratch = Scratch::new("lease-processes").unwrap();
        std::fs::write(counter(scratch.path()), "0").unwrap();
        let limit = within(PATIENCE);
        let mut workers = Vec::new();
        for process in 0..PROCESSES {
            let contenders = CONTENDERS * process / PROCESSES..CONTENDERS * (process + 1) / PROCESSES;
            let variables = [
                (WORKER_DIRECTORY, scratch.path().display().to_string()),
                (WORKER_CONTENDERS, format!("{} {}", contenders.start, contenders.end)),
            ];
            let arguments = ["--ignored", "--exact", "worker_entry", "--nocapture"];
            workers.push(Worker::start(format!("worker {process}"), arguments, variables).unwrap());
        }
        // All are there before the first begins: none starves because it was late.
        for worker in &workers {
            worker.hear("@ready", limit).unwrap();
        }
        for worker in &mut workers {
            worker.tell("go").unwrap();
        }
        let counted = |worker: &Worker| worker.hear("@counted", limit).unwrap().parse::<u64>().unwrap();
        let counted: u64 = workers.iter().map(counted).sum();
        for worker in workers {
            worker.finish(limit).unwrap();
        }

        let holdings = journal::read(scratch.path()).unwrap();
        let verdict = judge(&holdings);
        assert_eq!(verdict.overlaps, [""; 0]);
        assert_eq!(verdict.disorder, [""; 0]);
        assert_eq!(holdings.len() as u64, PROCESSES_GOAL + CONTENDERS as u64);
        assert!(holdings.iter().all(|holding| matches!(holding.end, Some((_, End::Released)))));
        // More than one: the last round of everybody does not count.
        let starved: Vec<_> =
            (0..CONTENDERS).filter(|contender| verdict.shares.get(contender).is_none_or(|share| *share < 2)).collect();
        assert!(starved.is_empty(), "starved: {starved:?}; all: {:?}", verdict.shares);
        assert_eq!(counted, read_counter(scratch.path()), "an update was lost");
        assert_eq!(counted, PROCESSES_GOAL);
        // The processes did contend: the name went from one to another.
        assert!(verdict.handovers.len() > holdings.len() / 4, "{} hand-overs", verdict.handovers.len());
    });
}

fn counter(directory: &Path) -> PathBuf {
    directory.join("counter")
}

fn read_counter(directory: &Path) -> u64 {
    std::fs::read_to_string(counter(directory)).unwrap().parse().unwrap()
}

#[test]
#[ignore = "one process of `fifty_contenders_in_eight_processes_on_one_sqlite_file`, which runs it"]
fn worker_entry() {
    let variable = |key| std::env::var(key).unwrap_or_else(|_| panic!("only another test runs this one, with {key}"));
    let directory = PathBuf::from(variable(WORKER_DIRECTORY));
    let contenders = variable(WORKER_CONTENDERS);
    let (start, end) = contenders.split_once(' ').unwrap();
    let (start, end): (usize, usize) = (start.parse().unwrap(), end.parse().unwrap());

    let manager = blocking::Manager::open(format!("sqlite:{}", directory.join("leases.db").display())).unwrap();
    let journal = Journal::create(&directory).unwrap();
    println!("@ready");
    assert_eq!(told().unwrap().as_deref(), Some("go"));
    let contend = |contender| {
        let mut counted = 0;
        loop {
            let asked = Moment::now();
            let lease = manager.acquire(NAME).timeout(PATIENCE).wait().unwrap();
            journal.grant(contender, lease.token(), asked, Moment::now()).unwrap();
            let value = read_counter(&directory);
            let more = value < PROCESSES_GOAL;
            if more {
                std::fs::write(counter(&directory), (value + 1).to_string()).unwrap();
            }
            journal.end(lease.token(), Moment::now(), End::Released).unwrap();
            lease.release().unwrap();
            if !more {
                return counted;
            }
            counted += 1;
        }
    };
    let counted: u64 = thread::scope(|scope| {
        let contend = &contend;
        let contenders: Vec<_> = (start..end).map(|contender| scope.spawn(move || contend(contender))).collect();
        contenders.into_iter().map(|contender| contender.join().expect("no contender panics")).sum()
    });
    println!("@counted {counted}");
    manager.close().unwrap();
}

/// A judge that never condemns would let everything above pass.
#[test]
fn the_judge_sees_what_must_not_be() {
    let holding = |contender: usize, token: i64, granted: u64, end: Option<u64>| Holding {
        pid: u32::try_from(contender).unwrap(),
        contender,
        token,
        asked: Moment::from_nanos(0),
        granted: Moment::from_nanos(granted),
        end: end.map(|at| (Moment::from_nanos(at), End::Released)),
    };
    let problems = |holdings: &[Holding]| {
        let verdict = judge(holdings);
        (verdict.overlaps.len(), verdict.disorder.len())
    };
    let fine = [holding(1, 1, 10, Some(20)), holding(2, 2, 20, Some(30)), holding(1, 5, 35, None)];
    assert_eq!(problems(&fine), (0, 0));
    let verdict = judge(&fine);
    assert_eq!(verdict.handovers, [Duration::ZERO, Duration::from_nanos(5)]);
    assert_eq!(verdict.shares, [(1, 2), (2, 1)].into());

    assert_eq!(problems(&[holding(1, 1, 10, Some(21)), holding(2, 2, 20, Some(30))]), (1, 0), "by a nanosecond");
    assert_eq!(problems(&[holding(1, 1, 10, None), holding(2, 2, 20, Some(30))]), (1, 0), "never ended");
    let within_another = [holding(1, 1, 10, Some(90)), holding(2, 2, 20, Some(30)), holding(3, 3, 40, Some(50))];
    assert_eq!(problems(&within_another), (2, 0), "the longest counts, not the latest");
    assert_eq!(problems(&[holding(1, 1, 10, Some(20)), holding(2, 1, 20, Some(30))]), (0, 1), "a token twice");
    assert_eq!(problems(&[holding(1, 2, 10, Some(20)), holding(2, 1, 20, Some(30))]), (0, 1), "an older token");
}

#[test]
fn a_journal_is_read_as_it_was_written() {
    let scratch = Scratch::new("lease-journal").unwrap();
    let journal = Journal::create(scratch.path()).unwrap();
    let (one, two) = (Token::try_from(1).unwrap(), Token::try_from(2).unwrap());
    let at = Moment::from_nanos;
    journal.grant(7, two, at(15), at(30)).unwrap();
    journal.grant(6, one, at(5), at(10)).unwrap();
    journal.end(one, at(20), End::Lost).unwrap();
    let holding = |contender, token, asked, granted, end| {
        let pid = std::process::id();
        Holding { pid, contender, token, asked: at(asked), granted: at(granted), end }
    };
    let expected = [holding(6, 1, 5, 10, Some((at(20), End::Lost))), holding(7, 2, 15, 30, None)];
    assert_eq!(journal::read(scratch.path()).unwrap(), expected);
    std::fs::write(scratch.path().join("other.journal"), "grant 1 2").unwrap();
    assert!(journal::read(scratch.path()).is_err(), "what it cannot read it does not pass over");
}

#[cfg(not(all(feature = "test-util", feature = "sqlite")))]
#[test]
#[ignore = "needs the features test-util and sqlite"]
fn a_holder_that_is_cut_off_knows_before_anyone_else_gets_the_name() {}

/// The holder's connection is cut while a rival, whose own is whole, waits.
#[cfg(all(feature = "test-util", feature = "sqlite"))]
mod partition {
    use std::sync::Arc;

    use lease_core::runtime::{Environment, system};
    use lease_core::store::Store;
    use lease_core::stores::memory::MemoryStore;
    use lease_core::stores::sqlite::SqliteStore;
    use lease_core::testing::{CutStore, Operation};
    use lease_core::{EndReason, ErrorKind, Fence};

    use super::*;

    const TTL: Duration = Duration::from_secs(1);
    /// How much later than half its ttl the holder may be told, by a machine that runs two things at once.
    const TOLD: Duration = Duration::from_millis(50);
    /// How much later than the store's promise the rival may run.
    const RUN: Duration = Duration::from_millis(500);

    /// Cuts the holder off after so many renewals.
    async fn cut_off(holders: Arc<dyn Store>, rivals: Arc<dyn Store>, renewals: u64) {
        let slack = rivals.limits().slack;
        let cut = CutStore::new(holders);
        let holder = Manager::builder().store(cut.clone()).ttl(TTL).open().await.unwrap();
        let rival = Manager::builder().store(rivals).ttl(TTL).open().await.unwrap();

        let lease = holder.acquire(NAME).timeout(PATIENCE).await.unwrap();
        let acquired = Moment::now();
        let waiting = rival.clone();
        let next = tokio::spawn(async move {
            let lease = waiting.acquire(NAME).timeout(PATIENCE).await.unwrap();
            (lease, Moment::now())
        });
        while cut.calls(Operation::Renew) < renewals || rival.inspect(NAME).await.unwrap().unwrap().waiting == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cut.cut();
        // Whatever the lease says, nothing good was sent after this.
        let latest = if cut.calls(Operation::Renew) == 0 { acquired } else { Moment::now() };

        // The instant just before the last good renewal was sent, from what is left. A renewal that had got through before
        // the cut may still be answered: so it is asked for until the end, and the latest counts.
        let confirmed_now = || {
            let now = Moment::now();
            let left = lease.remaining();
            // Once it has ended, nothing is left to tell.
            let until = (!left.is_zero()).then(|| (now + left).as_nanos());
            until.map(|until| Moment::from_nanos(until - u64::try_from((TTL / 2).as_nanos()).unwrap()))
        };
        let mut confirmed = confirmed_now();
        let ended = loop {
            tokio::select! {
                ended = lease.cancelled() => break ended,
                () = tokio::time::sleep(Duration::from_millis(10)) => confirmed = confirmed.max(confirmed_now()),
            }
        };
        let confirmed = confirmed.expect("it was held when it was cut off");
        let cancelled = Moment::now();
        assert!(cut.fired() > 0, "nothing was cut");
        assert!(!lease.is_held());
        assert_eq!(ended.reason, EndReason::Unreachable);
        assert!(cancelled >= confirmed + TTL / 2, "given up early: after {:?}", cancelled.since(confirmed));
        assert!(cancelled <= confirmed + TTL / 2 + TOLD, "told late: after {:?}", cancelled.since(confirmed));
        assert!(cancelled <= latest + TTL / 2 + TOLD, "told late: {:?} after it was cut off", cancelled.since(latest));

        let (next, granted) = next.await.unwrap();
        assert!(granted > cancelled, "the rival got it {:?} before the holder knew", cancelled.since(granted));
        assert!(granted >= confirmed + TTL, "the rival got it {:?} after a good renewal", granted.since(confirmed));
        assert!(granted <= confirmed + TTL + slack + RUN, "the rival had to wait {:?}", granted.since(confirmed));
        assert!(next.token() > lease.token());
        let fence = Fence::new();
        drop(fence.admit(NAME, next.token()).unwrap());
        assert_eq!(fence.admit(NAME, lease.token()).unwrap_err().kind(), ErrorKind::Lost);

        assert_eq!(lease.release().await.unwrap_err().kind(), ErrorKind::Lost);
        next.release().await.unwrap();
        cut.mend();
        holder.close().await.unwrap();
        rival.close().await.unwrap();
    }

    fn memory() -> (Arc<dyn Store>, Arc<dyn Store>, Arc<dyn Environment>) {
        let env = system().unwrap();
        let store = MemoryStore::new(env.clone());
        (store.clone(), store.beside(env.clone()), env)
    }

    #[test]
    fn a_holder_cut_off_from_a_memory_store_knows_before_anyone_else_gets_the_name() {
        alone_async(async {
            for renewals in [0, 2] {
                let (holders, rivals, env) = memory();
                cut_off(holders, rivals, renewals).await;
                env.stop(env.now() + PATIENCE).await;
            }
        });
    }

    #[test]
    fn a_holder_cut_off_from_a_sqlite_file_knows_before_anyone_else_gets_the_name() {
        alone_async(async {
            let env = system().unwrap();
            for renewals in [0, 2] {
                let scratch = Scratch::new("lease-cut").unwrap();
                let open = || SqliteStore::open(&scratch.path().join("leases.db"), env.clone()).unwrap();
                cut_off(open(), open(), renewals).await;
            }
            env.stop(env.now() + PATIENCE).await;
        });
    }
}
