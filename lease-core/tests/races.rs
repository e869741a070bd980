//! What many do at once in one process: waiters that are answered where others release, stores that panic, users' code that
//! comes back into the library. Nobody is stranded, nothing is left in the store, and no lock is held while a user's code runs.

#[allow(dead_code)]
mod support;

use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use futures_lite::future::block_on;
use lease_core::store::{Name, Store};
use lease_core::stores::memory::MemoryStore;
use lease_core::testing::{CutStore, Fault, Gate, Operation};
use lease_core::{ErrorKind, Lease, Manager, blocking};

/// What takes longer hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// Runs it on a thread of its own, and gives what it gives.
fn aside<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (tx, rx) = channel();
    thread::spawn(move || drop(tx.send(body())));
    rx
}

/// What it gives; fails, with the word, when it hangs or panics.
fn within_limit<T: Send + 'static>(what: &str, body: impl FnOnce() -> T + Send + 'static) -> T {
    aside(body).recv_timeout(LIMIT).unwrap_or_else(|error| panic!("{what}: {error}"))
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = std::time::Instant::now() + LIMIT;
    while !done() {
        assert!(std::time::Instant::now() < until, "{what}: not within {LIMIT:?}");
        thread::yield_now();
    }
}

/// A manager on a memory store that can be made to fail, and another store on the same lines.
struct Rig {
    store: Arc<CutStore>,
    memory: Arc<MemoryStore>,
    manager: Manager,
}

impl Rig {
    fn new() -> Self {
        let env = lease_core::runtime::system().unwrap();
        let memory = MemoryStore::new(env.clone());
        let store = CutStore::new(memory.clone());
        // No timer of a request helps who waits for a wake-up.
        let builder = Manager::builder().environment(env.clone()).store(store.clone()).request_timeout(LIMIT * 2);
        Self { memory: memory.beside(env), store, manager: block_on(builder.open()).unwrap() }
    }

    fn blocking(&self) -> blocking::Manager {
        self.manager.clone().into()
    }

    fn acquire(&self, name: &str) -> Lease {
        block_on(self.manager.acquire(name).into_future()).unwrap()
    }

    /// How many claims of the name are in the store.
    fn claims(&self, name: &str) -> u64 {
        let record = block_on(self.memory.inspect(&Name::new(name).unwrap())).unwrap();
        record.map_or(0, |record| record.waiting + 1)
    }

    fn waits(&self, name: &str) {
        eventually("it waits", || self.claims(name) == 2);
    }

    fn close(self) {
        block_on(self.manager.close()).unwrap();
    }
}

/// What a callback has captured is its user's: a lease in it that is dropped with it is released, whatever ends the wait.
#[test]
fn what_a_callback_has_captured_is_dropped_under_no_lock() {
    for ending in ["timeout", "error", "close", "panic", "grant"] {
        let rig = Rig::new();
        let (held, captured) = (rig.acquire("n"), rig.acquire("captured"));
        let manager = rig.manager.clone();
        let timeout = (ending == "timeout").then_some(Duration::from_millis(20));
        let wait = manager.acquire("n").timeout(timeout).on_wait(move |_| drop(captured));
        let waiter = aside(move || block_on(wait.into_future()).map(drop));
        if ending != "timeout" {
            rig.waits("n");
        }
        match ending {
            "error" => {
                rig.store.next(Operation::Look, Fault::Refuse(ErrorKind::Denied));
                drop(held);
            }
            "panic" => {
                rig.store.next(Operation::Look, Fault::Panic);
                drop(held);
            }
            "close" => within_limit("closing", {
                let manager = rig.manager.clone();
                move || block_on(manager.close()).unwrap()
            }),
            _ if ending == "timeout" => eventually("it is late", || rig.claims("captured") == 0),
            _ => drop(held),
        }
        let answer = waiter.recv_timeout(LIMIT).unwrap_or_else(|error| panic!("{ending}: {error}"));
        assert_eq!(answer.is_ok(), ending == "grant", "{ending}: {answer:?}");
        eventually("what it captured is dropped", || rig.claims("captured") == 0);
        within_limit("closing", move || rig.close());
    }
}

/// A subscriber that panics takes the acquire with it that it was told of, and no other.
#[test]
fn a_subscriber_that_panics_strands_nobody() {
    struct Panics;
    impl tracing::Subscriber for Panics {
        fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
            metadata.is_event()
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, _: &tracing::Event<'_>) {
            panic!("a subscriber panics, as a test told it to");
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }
    let rig = Rig::new();
    let held = rig.acquire("n");
    let manager = rig.blocking();
    let panics = move || tracing::subscriber::with_default(Panics, || manager.acquire("n").wait().map(drop));
    assert!(aside(panics).recv_timeout(LIMIT).is_err(), "it was told of a lease of this process");
    let manager = rig.blocking();
    let late = within_limit("a timeout", move || {
        manager.acquire("n").timeout(Duration::from_millis(20)).wait().map(drop).unwrap_err().kind()
    });
    assert_eq!(late, ErrorKind::Timeout);
    drop(held);
    let manager = rig.blocking();
    within_limit("an acquire", move || manager.acquire("n").wait().unwrap().release().unwrap());
    rig.close();
}

/// A store that panics in its user's thread fails the call, as it does elsewhere, and what it may have done is undone.
#[test]
fn a_store_that_panics_at_once_leaves_no_claim() {
    let rig = Rig::new();
    rig.store.next(Operation::Claim, Fault::Panic);
    let failed = block_on(rig.manager.acquire("n").into_future()).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::Internal);
    assert_eq!(rig.claims("n"), 0, "what had entered is withdrawn");
    let lease = rig.acquire("n");
    rig.store.next(Operation::Leave, Fault::Panic);
    block_on(lease.release()).unwrap();
    assert_eq!(rig.claims("n"), 0);
    let lease = rig.acquire("n");
    rig.store.next(Operation::Leave, Fault::Panic);
    drop(lease);
    eventually("a dropped lease is released", || rig.claims("n") == 0);
    assert_eq!(rig.store.fired(), 3);
    rig.close();
}

/// A task that has used up its time with its runtime releases, and does not come to an end: the next waiter, whose pursuit
/// went on in that task, has nothing to do with that.
#[test]
fn a_hand_over_does_not_wait_for_the_task_that_released() {
    let rig = Rig::new();
    let held = rig.acquire("n");
    let (told, telling) = channel();
    let wait = rig.manager.acquire("n").on_wait(move |_| told.send(()).unwrap());
    let waiter = aside(move || block_on(wait.into_future()).map(drop));
    telling.recv_timeout(LIMIT).expect("it waits, and no timer of its own is left");
    let open = Gate::shut();
    open.open();
    rig.store.next(Operation::Look, Fault::HoldReply(open));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        while tokio::task::coop::has_budget_remaining() {
            tokio::task::coop::consume_budget().await;
        }
        held.release().await.unwrap();
        // Without letting the runtime go on.
        waiter.recv_timeout(LIMIT).expect("the next one has it").unwrap();
    });
    assert_eq!(rig.store.fired(), 1);
    rig.close();
}

/// A waker is user code: that of one waiter, called where another released, may release and acquire in its turn.
#[test]
fn a_waker_may_come_back_into_the_library() {
    struct Inline(std::sync::Mutex<Option<Box<dyn FnOnce() + Send>>>);
    impl std::task::Wake for Inline {
        fn wake(self: Arc<Self>) {
            let act = self.0.lock().unwrap().take();
            if let Some(act) = act {
                act();
            }
        }
    }
    let rig = Rig::new();
    let (held, other) = (rig.acquire("n"), rig.acquire("m"));
    let manager = rig.blocking();
    let third = aside(move || manager.acquire("m").wait().map(drop));
    rig.waits("m");
    let (told, woken) = channel();
    let manager = rig.manager.clone();
    let act = move || {
        block_on(other.release()).unwrap();
        block_on(block_on(manager.acquire("k").into_future()).unwrap().release()).unwrap();
        let late = manager.acquire("n").timeout(Duration::ZERO).into_future();
        told.send(block_on(late).map(drop).unwrap_err().kind()).unwrap();
    };
    let waker = Waker::from(Arc::new(Inline(std::sync::Mutex::new(Some(Box::new(act))))));
    let mut wait = rig.manager.acquire("n").into_future();
    assert!(wait.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    within_limit("a release", move || block_on(held.release()).unwrap());
    assert_eq!(woken.recv_timeout(LIMIT).expect("the waker is called"), ErrorKind::Timeout);
    third.recv_timeout(LIMIT).expect("the other name is handed over too").unwrap();
    let Poll::Ready(lease) = wait.as_mut().poll(&mut Context::from_waker(Waker::noop())) else {
        panic!("not answered")
    };
    block_on(lease.unwrap().release()).unwrap();
    within_limit("closing", move || rig.close());
}

/// At the very end of a thread, when what it had is gone, a lease that it kept is released, and who waits gets it.
#[test]
fn a_lease_that_a_thread_keeps_is_handed_over_at_its_end() {
    thread_local! {
        static FIRST: std::cell::RefCell<Vec<Lease>> = const { std::cell::RefCell::new(Vec::new()) };
        static LAST: std::cell::RefCell<Vec<Lease>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    let rig = Rig::new();
    let (first, last) = (rig.acquire("first"), rig.acquire("last"));
    let waiters = ["first", "last"].map(|name| {
        let manager = rig.blocking();
        let waiter = aside(move || manager.acquire(name).wait().map(drop));
        rig.waits(name);
        waiter
    });
    let between = rig.acquire("between");
    thread::spawn(move || {
        // Before and after the library has something of this thread: in whatever order they are taken apart.
        FIRST.with(|kept| kept.borrow_mut().push(first));
        block_on(between.release()).unwrap();
        LAST.with(|kept| kept.borrow_mut().push(last));
    })
    .join()
    .unwrap();
    for waiter in waiters {
        waiter.recv_timeout(LIMIT).expect("handed over").unwrap();
    }
    rig.close();
}

/// What only a holder may touch, of each name.
#[derive(Default)]
struct Judge {
    occupied: AtomicBool,
    last: AtomicI64,
}

impl Judge {
    fn enter(&self, lease: &Lease) {
        assert!(!self.occupied.swap(true, Ordering::SeqCst), "two hold {}", lease.name());
        let before = self.last.swap(lease.token().get(), Ordering::SeqCst);
        assert!(before < lease.token().get(), "tokens increase");
    }

    fn leave(&self) {
        assert!(self.occupied.swap(false, Ordering::SeqCst), "somebody else left");
    }
}

/// What one contender has done, and what another does beside him.
#[derive(Default)]
struct Done {
    granted: AtomicU64,
    late: AtomicU64,
    dropped: AtomicU64,
}

/// A number that looks like chance, and is the same in each run.
fn mix(of: u64) -> u64 {
    let word = (of + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (word ^ word >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32
}

/// Threads and tasks of several managers, on few names: they wait, give up, are dropped in the midst of it, and leave in every way.
/// Nobody waits for ever, no two hold, and nothing is left.
fn contend(urls: &[String], rounds: u64) {
    const NAMES: [&str; 3] = ["a", "b", "c"];
    const CONTENDERS: u64 = 8;
    let managers: Vec<Manager> = urls.iter().map(|url| block_on(Manager::open(url)).unwrap()).collect();
    let (judges, done) = (Arc::new([(); 3].map(|()| Judge::default())), Arc::new(Done::default()));
    let round = {
        let (judges, done) = (judges.clone(), done.clone());
        move |manager: Manager, seed: u64| {
            let (judges, done) = (judges.clone(), done.clone());
            async move {
                let (at, chance) = (usize::try_from(mix(seed) % 3).unwrap(), mix(seed ^ 0xabcd));
                let timeout = if chance % 4 == 0 { Duration::from_micros(chance % 900) } else { LIMIT };
                // Another ttl is another claim.
                let ttl = Duration::from_secs(20 + chance % 2);
                let mut wait = manager.acquire(NAMES[at]).ttl(ttl).timeout(timeout).into_future();
                if chance % 5 == 0 {
                    let mut polls = chance % 3;
                    let some = std::future::poll_fn(|cx| {
                        let polled = wait.as_mut().poll(cx).map(Some);
                        if polled.is_pending() && polls == 0 {
                            return Poll::Ready(None);
                        }
                        polls = polls.saturating_sub(1);
                        polled
                    });
                    match some.await {
                        None => {
                            done.dropped.fetch_add(1, Ordering::Relaxed);
                            return;
                        }
                        Some(got) => return drop(got.ok()),
                    }
                }
                let lease = match wait.await {
                    Ok(lease) => lease,
                    Err(error) => {
                        assert!(error.kind() == ErrorKind::Timeout || timeout < LIMIT, "stranded: {error}");
                        done.late.fetch_add(1, Ordering::Relaxed);
                        return;
                    }
                };
                assert!(timeout < LIMIT || lease.is_held());
                judges[at].enter(&lease);
                done.granted.fetch_add(1, Ordering::Relaxed);
                judges[at].leave();
                if chance % 3 == 0 { drop(lease) } else { lease.release().await.unwrap() }
            }
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let all: Vec<_> = (0..CONTENDERS)
        .map(|contender| {
            let (manager, round) =
                (managers[usize::try_from(contender).unwrap() % managers.len()].clone(), round.clone());
            let seeds = move || (0..rounds).map(move |at| at * CONTENDERS + contender);
            if contender % 2 == 0 {
                return aside(move || seeds().for_each(|seed| block_on(round(manager.clone(), seed))));
            }
            let (tx, rx) = channel();
            runtime.spawn(async move {
                for seed in seeds() {
                    round(manager.clone(), seed).await;
                }
                let _ = tx.send(());
            });
            rx
        })
        .collect();
    for one in all {
        one.recv_timeout(LIMIT * 2).expect("each comes to his end");
    }
    for name in NAMES {
        eventually("nothing is left", || block_on(managers[0].inspect(name)).unwrap().is_none());
    }
    let count = |of: &AtomicU64| of.load(Ordering::Relaxed);
    assert!(count(&done.granted) > rounds && count(&done.late) > 0 && count(&done.dropped) > 0, "all of it happened");
    within_limit("closing", move || managers.iter().for_each(|manager| block_on(manager.close()).unwrap()));
}

#[test]
fn threads_and_tasks_contend_in_memory() {
    contend(&["memory:".into()], 5_000);
    contend(&["memory:races".into(), "memory:races".into()], 5_000);
}

#[test]
#[cfg_attr(not(feature = "sqlite"), ignore = "needs the feature sqlite")]
fn threads_and_tasks_contend_on_a_file() {
    let scratch = support::scratch::Scratch::in_memory("lease-races").unwrap();
    contend(&[scratch.sqlite()], 500);
    contend(&[scratch.sqlite(), scratch.sqlite()], 500);
}

/// A manager is closed while others acquire, release and drop: each call is answered, closing comes to its end, nothing is left.
fn close_amid(url: &str, judge: &str, rounds: u64) {
    let beside = block_on(Manager::open(judge)).unwrap();
    let granted = Arc::new(AtomicU64::new(0));
    for round in 0..rounds {
        let manager = block_on(Manager::open(url)).unwrap();
        let begun = Arc::new(std::sync::Barrier::new(4));
        let contenders = [(); 3].map(|()| {
            let (manager, begun, granted) = (manager.clone(), begun.clone(), granted.clone());
            aside(move || {
                begun.wait();
                loop {
                    match block_on(manager.acquire("n").into_future()) {
                        Ok(lease) => {
                            granted.fetch_add(1, Ordering::Relaxed);
                            if granted.load(Ordering::Relaxed) % 2 == 0 {
                                drop(lease);
                            } else {
                                block_on(lease.release()).unwrap();
                            }
                        }
                        Err(error) => return error.kind(),
                    }
                }
            })
        });
        begun.wait();
        (0..mix(round) % 20_000).for_each(|_| std::hint::spin_loop());
        let began = std::time::Instant::now();
        within_limit("closing", move || block_on(manager.close()).unwrap());
        assert!(began.elapsed() < Duration::from_secs(4), "it waits for nothing that does not come");
        for contender in contenders {
            assert_eq!(contender.recv_timeout(LIMIT).expect("answered"), ErrorKind::Closed);
        }
        assert_eq!(block_on(beside.inspect("n")).unwrap(), None, "nothing is left");
    }
    assert!(granted.load(Ordering::Relaxed) > 0);
    block_on(beside.close()).unwrap();
}

#[test]
fn closing_amid_calls_in_memory() {
    close_amid("memory:amid", "memory:amid", 300);
}

#[test]
#[cfg_attr(not(feature = "sqlite"), ignore = "needs the feature sqlite")]
fn closing_amid_calls_on_a_file() {
    let scratch = support::scratch::Scratch::in_memory("lease-amid").unwrap();
    close_amid(&scratch.sqlite(), &scratch.sqlite(), 60);
}
