//! The real environment: whose code runs on which thread, and what is left when a manager is closed.

use std::future::{Future, IntoFuture};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use futures_lite::future::block_on;
use lease_core::{EndReason, ErrorKind, Lease, Manager};

/// One test at a time: they count the threads and descriptors of the process.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn entries(of: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{of}")).unwrap().count()
}

fn library_threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.map(|name| name.trim().to_owned()).filter(|name| name.starts_with("lease")).collect()
}

/// Waits for something that another thread does; fails, with the word, after ten seconds.
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < until, "{what}: not within 10 s");
        thread::yield_now();
    }
}

/// A thread that was joined is listed a moment longer: the kernel tells who joins before it forgets the thread.
fn no_thread_is_left() {
    eventually("every library thread ends", || library_threads().is_empty());
}

fn urls() -> Vec<(String, Option<std::path::PathBuf>)> {
    let mut urls = vec![("memory:".into(), None)];
    if cfg!(feature = "sqlite") {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("lease-threads-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        urls.push((format!("sqlite:{}", dir.join("t.db").display()), Some(dir)));
    }
    urls
}

#[test]
fn close_leaves_no_thread_and_no_descriptor() {
    let _alone = alone();
    for (url, dir) in urls() {
        no_thread_is_left();
        let fds = entries("fd");
        block_on(async {
            let manager = Manager::open(&url).await.unwrap();
            let lease = manager.acquire("n").await.unwrap();
            let waiting = manager.acquire("n").timeout(Duration::from_millis(20)).await;
            assert!(waiting.is_err());
            assert!(!library_threads().is_empty());
            manager.close().await.unwrap();
            // Though who closed it still has it.
            no_thread_is_left();
            assert_eq!(entries("fd"), fds, "{url}");
            manager.close().await.unwrap();
            assert_eq!(manager.ping().await.unwrap_err().kind(), ErrorKind::Closed);
            assert_eq!(lease.end_reason(), Some(EndReason::Closed));
            lease.release().await.unwrap();
        });
        no_thread_is_left();
        assert_eq!(entries("fd"), fds, "{url}");
        dir.inspect(|dir| std::fs::remove_dir_all(dir).unwrap());
    }
}

#[test]
fn dropping_all_handles_ends_the_threads() {
    let _alone = alone();
    for (url, dir) in urls() {
        block_on(async {
            let manager = Manager::open(&url).await.unwrap();
            let lease = manager.acquire("n").await.unwrap();
            drop(manager);
            assert!(lease.is_held());
        });
        no_thread_is_left();
        dir.inspect(|dir| std::fs::remove_dir_all(dir).unwrap());
    }
}

/// Wakers are user code: however a wait ends, they run on no library thread that drives heartbeats or a store.
#[test]
fn wakers_run_on_no_thread_that_drives() {
    struct Recorder {
        woken: Mutex<Vec<String>>,
        waiting: thread::Thread,
    }
    impl Wake for Recorder {
        fn wake(self: Arc<Self>) {
            let name = thread::current().name().unwrap_or("").to_owned();
            self.woken.lock().unwrap().push(name);
            self.waiting.unpark();
        }
    }
    fn record<T>(future: impl Future<Output = T>) -> (T, Vec<String>) {
        let recorder = Arc::new(Recorder { woken: Mutex::default(), waiting: thread::current() });
        let waker = Waker::from(recorder.clone());
        let mut future = pin!(future);
        loop {
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return (output, recorder.woken.lock().unwrap().clone());
            }
            thread::park_timeout(Duration::from_secs(10));
        }
    }
    let _alone = alone();
    for (url, dir) in urls() {
        let manager = block_on(Manager::open(&url)).unwrap();
        let other = block_on(Manager::open(if url == "memory:" { "memory:" } else { &url })).unwrap();
        let held = block_on(manager.acquire("n").into_future()).unwrap();
        let (timeout, mut woken) = record(manager.acquire("n").timeout(Duration::from_millis(30)).into_future());
        assert!(timeout.is_err());
        let evict = other.break_lease("n", held.token());
        if block_on(evict).is_ok() {
            let short = block_on(manager.acquire("m").ttl(Duration::from_millis(60)).into_future()).unwrap();
            block_on(other.break_lease("m", short.token())).unwrap();
            woken.extend(record(short.cancelled()).1);
        }
        assert!(!woken.is_empty(), "{url}: something had to be waited for");
        assert!(woken.iter().all(|name| name == "lease-wake"), "{url}: {woken:?}");
        block_on(manager.close()).unwrap();
        block_on(other.close()).unwrap();
        dir.inspect(|dir| std::fs::remove_dir_all(dir).unwrap());
    }
}

/// A user's slow log subscriber stalls his log, and no renewal.
#[test]
fn a_users_slow_log_subscriber_stalls_renewal() {
    #[derive(Default)]
    struct Slow {
        stuck: AtomicBool,
        open: Mutex<bool>,
        opened: Condvar,
    }
    struct Subscriber(Arc<Slow>);
    impl tracing::Subscriber for Subscriber {
        fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
            metadata.target().starts_with("lease_core")
        }
        fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
            tracing::span::Id::from_u64(1)
        }
        fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
        fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
        fn event(&self, _: &tracing::Event<'_>) {
            if thread::current().name().is_some_and(|name| name.starts_with("lease")) {
                self.0.stuck.store(true, Ordering::SeqCst);
                let mut open = self.0.open.lock().unwrap();
                while !*open {
                    open = self.0.opened.wait(open).unwrap();
                }
            }
        }
        fn enter(&self, _: &tracing::span::Id) {}
        fn exit(&self, _: &tracing::span::Id) {}
    }
    let _alone = alone();
    let slow = Arc::new(Slow::default());
    tracing::subscriber::set_global_default(Subscriber(slow.clone())).unwrap();
    let ttl = Duration::from_millis(600);
    let manager = block_on(Manager::open("memory:")).unwrap();
    let lease: Lease = block_on(manager.acquire("n").ttl(ttl).into_future()).unwrap();
    let told = lease.cancellation();
    eventually("the subscriber is stuck", || slow.stuck.load(Ordering::SeqCst));
    let until = Instant::now() + ttl * 3;
    eventually("three ttls pass", || Instant::now() > until);
    assert!(lease.is_held(), "renewed though the subscriber is stuck: {lease:?}");
    // Nor does it delay the word of a loss.
    block_on(manager.break_lease("n", lease.token())).unwrap();
    eventually("the loss is told", || told.is_cancelled());
    *slow.open.lock().unwrap() = true;
    slow.opened.notify_all();
    drop(lease);
    block_on(manager.close()).unwrap();
}

/// Any executor will do, or none, and a runtime may be dropped in the middle of a wait.
#[test]
fn futures_do_not_need_the_runtime_they_were_made_in() {
    let _alone = alone();
    let manager = block_on(Manager::open("memory:")).unwrap();
    let held = block_on(manager.acquire("n").into_future()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let dropped = runtime.spawn(manager.acquire("n").into_future());
    eventually("it waits", || block_on(manager.inspect("n")).unwrap().unwrap().waiting == 1);
    runtime.shutdown_background();
    assert!(block_on(dropped).is_err());
    let waiting = thread::spawn({
        let manager = manager.clone();
        move || block_on(manager.acquire("n").into_future()).unwrap().token()
    });
    eventually("it waits", || block_on(manager.inspect("n")).unwrap().unwrap().waiting == 1);
    let first = held.token();
    block_on(held.release()).unwrap();
    assert!(waiting.join().unwrap() > first);
    block_on(manager.close()).unwrap();
}

/// What is under way when the manager is closed gets an answer, though the threads that would bring it are ending.
#[test]
#[cfg(feature = "test-util")]
fn calls_under_way_are_answered_when_the_manager_is_closed() {
    use lease_core::stores::memory::MemoryStore;
    use lease_core::testing::{CutStore, Fault, Gate, Operation};
    let _alone = alone();
    let env = lease_core::runtime::system().unwrap();
    let store = CutStore::new(MemoryStore::new(env.clone()));
    let builder = Manager::builder().environment(env).store(store.clone());
    let manager = lease_core::blocking::Manager::from(block_on(builder.open()).unwrap());
    let gate = Gate::shut();
    store.next(Operation::Inspect, Fault::HoldReply(gate.clone()));
    let (answered, answers) = std::sync::mpsc::channel();
    let inspecting = thread::spawn({
        let (manager, answered) = (manager.clone(), answered.clone());
        move || answered.send(manager.inspect("a").map(drop)).unwrap()
    });
    eventually("the inspect is under way", || store.fired() == 1);
    let watching = thread::spawn({
        let manager = manager.clone();
        move || answered.send(manager.watch("a").find_map(Result::err).map_or(Ok(()), Err)).unwrap()
    });
    eventually("the watch is under way", || store.calls(Operation::Changed) == 1);
    let closing = thread::spawn({
        let manager = manager.clone();
        move || manager.close().unwrap()
    });
    eventually("the manager is closed", || manager.ping().is_err());
    gate.open();
    for _ in 0..2 {
        answers.recv_timeout(Duration::from_secs(10)).expect("an answer, whatever it is").err();
    }
    for call in [inspecting, watching, closing] {
        call.join().unwrap();
    }
    no_thread_is_left();
}

/// A waker of a test: what it does when a lease ends.
struct OnWake<F>(F);

impl<F: Fn() + Send + Sync + 'static> Wake for OnWake<F> {
    fn wake(self: Arc<Self>) {
        (self.0)();
    }
}

/// Calls the waker when the lease ends.
fn when_ended<F: Fn() + Send + Sync + 'static>(lease: &Lease, act: F) -> impl Future<Output = ()> + use<F> {
    let mut ended = Box::pin(lease.cancellation().cancelled_owned());
    let waker = Waker::from(Arc::new(OnWake(act)));
    assert!(ended.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    ended
}

/// A release is under way, held up by a slow waker, when the manager is closed: closing waits for it.
#[test]
fn closing_waits_for_a_release_that_has_begun() {
    let _alone = alone();
    let (manager, other) =
        (block_on(Manager::open("memory:gap")).unwrap(), block_on(Manager::open("memory:gap")).unwrap());
    let lease = block_on(manager.acquire("n").into_future()).unwrap();
    let (woken, gate) = (Arc::new(AtomicBool::new(false)), Arc::new((Mutex::new(false), Condvar::new())));
    let _ended = when_ended(&lease, {
        let (woken, gate) = (woken.clone(), gate.clone());
        move || {
            woken.store(true, Ordering::SeqCst);
            let mut open = gate.0.lock().unwrap();
            while !*open {
                open = gate.1.wait(open).unwrap();
            }
        }
    });
    let releasing = thread::spawn(move || block_on(lease.release()));
    eventually("the waker is slow", || woken.load(Ordering::SeqCst));
    let closing = thread::spawn({
        let manager = manager.clone();
        move || block_on(manager.close())
    });
    eventually("the manager is closed to others", || block_on(manager.ping()).is_err());
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    releasing.join().unwrap().unwrap();
    closing.join().unwrap().unwrap();
    assert_eq!(block_on(other.inspect("n")).unwrap(), None, "no claim is left");
    block_on(other.close()).unwrap();
}

/// A waker that panics ends its own task, and keeps no release from the store.
#[test]
fn a_waker_that_panics_does_not_stop_a_release() {
    let _alone = alone();
    let manager = block_on(Manager::open("memory:")).unwrap();
    let lease = block_on(manager.acquire("n").into_future()).unwrap();
    let _ended = when_ended(&lease, || panic!("a waker panics, as a test told it to"));
    block_on(lease.release()).unwrap();
    assert_eq!(block_on(manager.inspect("n")).unwrap(), None);
    block_on(manager.close()).unwrap();
}

/// A waker that does not return keeps its thread, and not the one who closes.
#[test]
fn closing_is_bounded_though_a_waker_is_stuck() {
    let _alone = alone();
    let manager = block_on(Manager::open("memory:stuck")).unwrap();
    let other = block_on(Manager::open("memory:stuck")).unwrap();
    let lease = block_on(manager.acquire("n").ttl(Duration::from_millis(60)).into_future()).unwrap();
    let (gate, woken) = (Arc::new((Mutex::new(false), Condvar::new())), Arc::new(AtomicBool::new(false)));
    let _ended = when_ended(&lease, {
        let (gate, woken) = (gate.clone(), woken.clone());
        move || {
            woken.store(true, Ordering::SeqCst);
            let mut open = gate.0.lock().unwrap();
            while !*open {
                open = gate.1.wait(open).unwrap();
            }
        }
    });
    block_on(other.break_lease("n", lease.token())).unwrap();
    eventually("the waker is stuck", || woken.load(Ordering::SeqCst));
    let began = Instant::now();
    block_on(manager.close()).unwrap();
    assert!(began.elapsed() < Duration::from_secs(8), "5 s, and what a busy machine takes: {:?}", began.elapsed());
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    block_on(other.close()).unwrap();
    no_thread_is_left();
}

/// Callbacks have a thread of their own: one that blocks and calls the library back delays no renewal and no other wake-up.
#[test]
fn a_callback_may_block_and_call_back() {
    let _alone = alone();
    let (manager, other) =
        (block_on(Manager::open("memory:call")).unwrap(), block_on(Manager::open("memory:call")).unwrap());
    let acquire = |name: &str| block_on(manager.acquire(name).ttl(Duration::from_secs(1)).into_future()).unwrap();
    let (lost, kept) = (acquire("lost"), acquire("kept"));
    let (told, reasons) = std::sync::mpsc::channel();
    let (open, gate) = std::sync::mpsc::channel::<()>();
    lost.on_end({
        let (told, manager) = (told.clone(), manager.clone());
        move |reason| {
            let thread = thread::current().name().map(str::to_owned);
            // A call that waits for the library's thread, from within.
            let again = block_on(manager.acquire("lost").timeout(Duration::from_secs(10)).into_future());
            told.send((reason, thread, again.is_ok())).unwrap();
            let _ = gate.recv();
        }
    })
    .unwrap();
    block_on(other.break_lease("lost", lost.token())).unwrap();
    let (reason, thread, again) = reasons.recv_timeout(Duration::from_secs(10)).expect("the callback runs");
    assert!(reason.is_loss() && again, "{reason:?}");
    assert_eq!(thread.as_deref(), Some("lease-call"));

    // It still blocks, and another lease is renewed past its ttl.
    assert!(block_on(manager.acquire("kept").timeout(Duration::from_millis(2_200)).into_future()).is_err());
    assert!(kept.is_held());

    // A lease that had ended before is told too, and one's own release with its reason.
    kept.on_end({
        let told = told.clone();
        move |reason| told.send((reason, None, true)).unwrap()
    })
    .unwrap();
    block_on(kept.give_back()).unwrap();
    block_on(kept.give_back()).unwrap();
    drop(open);
    assert_eq!(reasons.recv_timeout(Duration::from_secs(10)).unwrap().0, EndReason::Released);
    lost.on_end(move |reason| told.send((reason, None, true)).unwrap()).unwrap();
    assert!(reasons.recv_timeout(Duration::from_secs(10)).unwrap().0.is_loss());

    // From within, when everything is closed already: as harmless as from elsewhere.
    let (told, closes) = std::sync::mpsc::channel();
    let last = acquire("last");
    last.on_end({
        let manager = manager.clone();
        move |_| {
            let closes = [(); 3].map(|()| block_on(manager.close()).is_ok());
            told.send(closes).unwrap();
        }
    })
    .unwrap();
    block_on(last.give_back()).unwrap();
    assert_eq!(closes.recv_timeout(Duration::from_secs(10)).unwrap(), [true; 3]);
    let (told, late) = std::sync::mpsc::channel();
    lost.on_end(move |reason| told.send(reason).unwrap()).unwrap();
    assert!(late.recv_timeout(Duration::from_secs(10)).unwrap().is_loss(), "told after the close too");
    drop((lost, kept, last));
    block_on(manager.close()).unwrap();
    block_on(other.close()).unwrap();
    no_thread_is_left();
}

/// Each call that closes comes to its end, also one that found another under way on its own thread.
#[test]
#[cfg(feature = "sqlite")]
fn closing_from_two_threads_at_once() {
    let _alone = alone();
    for (url, dir) in urls() {
        for _ in 0..20 {
            let manager = block_on(Manager::open(&url)).unwrap();
            let leases: Vec<_> = (0..8)
                .map(|at| block_on(manager.acquire(format!("n{at}")).into_future()).expect("the one before has left"))
                .collect();
            let together = std::sync::Barrier::new(2);
            thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        together.wait();
                        block_on(manager.close()).unwrap();
                    });
                }
            });
            drop(leases);
        }
        no_thread_is_left();
        dir.inspect(|dir| std::fs::remove_dir_all(dir).unwrap());
    }
}

/// How often each thread of the library went to sleep until now: who polls does so again and again.
fn sleeps() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let of = |task: std::fs::DirEntry| {
        let comm = std::fs::read_to_string(task.path().join("comm")).ok()?;
        let status = std::fs::read_to_string(task.path().join("status")).ok()?;
        let sleeps = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        comm.starts_with("lease").then(|| sleeps.trim().parse::<u64>().unwrap())
    };
    tasks.filter_map(of).sum()
}

#[test]
fn an_idle_manager_settles_to_no_wake_ups() {
    let _alone = alone();
    no_thread_is_left();
    let ttl = Duration::from_millis(100);
    for (url, dir) in urls() {
        let manager = lease_core::blocking::Manager::open(&url).unwrap();
        let before = sleeps();
        for name in ["a", "b"] {
            let lease = manager.acquire(name).ttl(ttl).wait().unwrap();
            let late = manager.acquire(name).ttl(ttl).timeout(ttl / 4).wait();
            assert_eq!(late.unwrap_err().kind(), ErrorKind::Timeout);
            lease.release().unwrap();
        }
        assert!(sleeps() > before, "{url}: what is counted counts");
        eventually("for three ttls nobody wakes up", || {
            let before = sleeps();
            thread::sleep(ttl * 3);
            sleeps() == before
        });
        manager.close().unwrap();
        dir.inspect(|dir| std::fs::remove_dir_all(dir).unwrap());
    }
}

/// Acquires and releases, sometimes handing over and sometimes giving up a wait. `CYCLES` of them, else few.
#[test]
fn cycles_leave_memory_descriptors_threads_and_files_as_they_were() {
    const MIB: u64 = 1 << 20;
    let _alone = alone();
    no_thread_is_left();
    let cycles: u64 = std::env::var("CYCLES").map_or(20_000, |cycles| cycles.parse().unwrap());
    for (url, dir) in urls() {
        let manager = lease_core::blocking::Manager::open(&url).unwrap();
        let cycles = if dir.is_some() && cycles < 100_000 { cycles / 4 } else { cycles };
        let run = |cycles: u64| {
            for at in 0..cycles {
                let name = format!("job/{}", at % 100);
                let lease = manager.acquire(&name).wait().unwrap();
                match at % 500 {
                    0 => thread::scope(|scope| {
                        let next = scope.spawn(|| manager.acquire(&name).wait().unwrap().release().unwrap());
                        lease.release().unwrap();
                        next.join().unwrap();
                    }),
                    250 => {
                        let late = manager.acquire(&name).timeout(Duration::from_millis(1)).wait();
                        assert_eq!(late.unwrap_err().kind(), ErrorKind::Timeout);
                        lease.release().unwrap();
                    }
                    _ => lease.release().unwrap(),
                }
            }
        };
        let measure = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
            let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
            let files = dir.iter().flat_map(|dir| std::fs::read_dir(dir).unwrap().flatten());
            let bytes: u64 = files.filter_map(|file| Some(file.metadata().ok()?.len())).sum();
            (kib * 1024, bytes)
        };
        // What is kept for good is there after half of them.
        run(cycles / 2);
        let ((memory, _), fds, tasks) = (measure(), entries("fd"), library_threads().len());
        run(cycles / 2);
        eventually("what a wait took is given back", || entries("fd") <= fds && library_threads().len() <= tasks);
        let (memory_now, files_now) = measure();
        assert!(memory_now <= memory + 2 * MIB, "{url}: {memory} bytes of memory, then {memory_now}");
        // The log of a file that is written all the time starts over at 20 MiB and what is written meanwhile. Without, a million
        // cycles would make it 3 GiB.
        assert!(files_now <= 160 * MIB, "{url}: {files_now} bytes in files");
        assert_eq!(manager.list("").unwrap(), []);
        manager.close().unwrap();
        dir.inspect(|dir| std::fs::remove_dir_all(dir).unwrap());
    }
}
