//! Where the library runs: its own thread for timers, heartbeats and stores, and threads beside it for user code.
//!
//! Invariant: no user code (waker, callback, log subscriber, metrics recorder) runs on the library's thread, so nothing
//! a user does can delay a heartbeat or a deadline. Everything the core takes from outside (clock, sleep, randomness,
//! spawning, delivery) comes through [`Environment`], so that it can be run from a seed.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use async_task::Runnable;
use futures_lite::future::or;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::coop::unconstrained;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock::Moment;
use crate::error::{Error, ErrorKind, Result};

/// A future that the library runs.
pub type Task = Pin<Box<dyn Future<Output = ()> + Send>>;
/// Something to run where user code may run.
pub type Job = Box<dyn FnOnce() + Send>;

/// What the core takes from outside.
pub trait Environment: Send + Sync + 'static {
    /// The clock.
    fn now(&self) -> Moment;
    /// Resolves once the clock has reached `at`, through suspend too.
    fn sleep_until(&self, at: Moment) -> Task;
    /// 64 random bits.
    fn random(&self) -> u64;
    /// Runs a task on the library's thread.
    fn spawn(&self, task: Task);
    /// Runs a job that may wake or call users: at once, unless this is a library thread. Kept in order, and
    /// dropped only after [`stop`](Self::stop).
    fn deliver(&self, job: Job);
    /// Runs a job that writes a log line or a figure. Dropped when the user's subscriber cannot keep up.
    fn log(&self, job: Job);
    /// Makes sure that there is a thread for callbacks.
    ///
    /// # Errors
    /// `Limit` when there cannot be one.
    fn start_calls(&self) -> Result<()>;
    /// Runs a callback of the user's, which may block and call the library, on that thread. Kept in order. Gives it back
    /// after [`stop`](Self::stop).
    fn call(&self, job: Job) -> Option<Job>;
    /// Whether this thread is the library's, which must not block.
    fn is_library_thread(&self) -> bool;
    /// Lets running tasks end, at most until `limit`, then stops all threads. Resolves when they are gone.
    fn stop(&self, limit: Moment) -> Task;
}

/// Waits at most until `at`; `None` when that came first.
pub(crate) async fn until<T>(env: &dyn Environment, at: Moment, work: impl Future<Output = T>) -> Option<T> {
    or(async { Some(work.await) }, async {
        env.sleep_until(at).await;
        None
    })
    .await
}

/// Goes as far as it can without waiting, in this thread if it may succeed `here`; what has to wait goes on on the library's.
pub(crate) fn start(env: &dyn Environment, here: bool, mut task: Task) {
    if !here {
        return env.spawn(task);
    }
    let first = AssertUnwindSafe(|| task.as_mut().poll(&mut Context::from_waker(Waker::noop())));
    // A store's panic ends its task here as it would on the library's thread; what the task guards tells who waits.
    if let Ok(Poll::Pending) = catch_unwind(first) {
        env.spawn(task);
    }
}

/// A task that was started by [`start_near`].
pub(crate) type Near = async_task::Task<()>;

/// The same for a task of the core's own, none of it a user's, that may also go on where it is woken: see [`near`]. It is dropped
/// with what this gives.
pub(crate) fn start_near(env: &Arc<dyn Environment>, here: bool, task: Task) -> Near {
    let soon = env.clone();
    let schedule = move |woken: Runnable| {
        if let Some(woken) = keep_near(woken) {
            soon.spawn(Box::pin(async move { step(woken) }));
        }
    };
    // However much of its time with its own runtime the user's task has used up in which this goes on.
    let (task, kept) = async_task::spawn(unconstrained(task), schedule);
    if here {
        step(task);
    } else {
        task.schedule();
    }
    kept
}

/// Runs what wakes tasks of the core's own, and then those tasks, in this thread: to wake another for them costs more than
/// what they have to do. Not for the library's thread, which is where they go on otherwise.
pub(crate) fn near<T>(wakes: impl FnOnce() -> T) -> T {
    struct Outermost(bool);
    impl Drop for Outermost {
        fn drop(&mut self) {
            while self.0
                && let Some(woken) = of_this_thread(|near| near.as_mut()?.pop_front())
            {
                step(woken);
            }
            if self.0 {
                of_this_thread(Option::take);
            }
        }
    }
    let outermost = of_this_thread(|near| near.is_none().then(|| near.insert(VecDeque::new()).clear()));
    let _outermost = Outermost(outermost.is_some());
    wakes()
}

/// Gives it back if this thread does not run it.
fn keep_near(woken: Runnable) -> Option<Runnable> {
    let mut woken = Some(woken);
    of_this_thread(|near| {
        near.as_mut()?.extend(woken.take());
        Some(())
    });
    woken
}

/// `None` too at the very end of a thread, when what it had is gone.
fn of_this_thread<T>(f: impl FnOnce(&mut Option<VecDeque<Runnable>>) -> Option<T>) -> Option<T> {
    NEAR.try_with(|near| f(&mut near.borrow_mut())).ok().flatten()
}

fn step(task: Runnable) {
    // A panic of a store ends the task; what the task guards tells who waits.
    drop(catch_unwind(AssertUnwindSafe(|| task.run())));
}

/// What a store answers at once, in the user's thread. Its panic is an answer of unknown outcome, as elsewhere.
pub(crate) fn at_once<T>(answer: impl FnOnce() -> Option<Result<T>>) -> Option<Result<T>> {
    catch_unwind(AssertUnwindSafe(answer)).unwrap_or_else(|_| Some(Err(Error::dropped())))
}

/// [`start`]s the work and waits for its result under any executor. Dropping this drops the work.
pub(crate) async fn run<T: Send + 'static>(
    env: &Arc<dyn Environment>,
    here: bool,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let dropped = CancellationToken::new();
    let _drop = dropped.clone().drop_guard();
    let work = async move { dropped.run_until_cancelled(work).await.unwrap_or_else(|| Err(Error::closed())) };
    see_through(env, here, work).await
}

/// [`start`]s the work and waits for its result under any executor. Dropping this leaves the work going on.
pub(crate) async fn see_through<T: Send + 'static>(
    env: &Arc<dyn Environment>,
    here: bool,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    /// Tells the caller though the work is dropped half way.
    struct Answer<T: Send + 'static>(Option<Caller<Result<T>>>, Arc<dyn Environment>);
    impl<T: Send + 'static> Drop for Answer<T> {
        fn drop(&mut self) {
            if let Some(unanswered) = self.0.take() {
                unanswered.answer(&*self.1, Err(Error::dropped()));
            }
        }
    }
    let (caller, reply) = reply();
    let mut answer = Answer(Some(caller), env.clone());
    let task = async move {
        let result = work.await;
        if let Some(caller) = answer.0.take() {
            caller.answer(&*answer.1, result);
        }
    };
    start(&**env, here, Box::pin(task));
    reply.await.unwrap_or_else(|| Err(Error::dropped()))
}

/// A way for one answer to somebody who waits.
pub(crate) fn reply<T>() -> (Caller<T>, Reply<T>) {
    let ((tx, rx), is_plain) = (oneshot::channel(), Arc::new(AtomicBool::new(false)));
    (Caller { tx, is_plain: is_plain.clone() }, Reply { rx, is_plain })
}

/// Who waits for a [`Reply`].
pub(crate) struct Caller<T> {
    tx: oneshot::Sender<T>,
    is_plain: Arc<AtomicBool>,
}

impl<T: Send + 'static> Caller<T> {
    /// Answers from here if that only wakes a thread, or else where user code may run. To one who has gone it is dropped.
    pub(crate) fn answer(self, env: &dyn Environment, answer: T) {
        let Self { tx, is_plain } = self;
        if is_plain.load(Ordering::Acquire) {
            drop(tx.send(answer));
        } else {
            env.deliver(Box::new(move || drop(tx.send(answer))));
        }
    }
}

/// The answer; `None` if nobody is left to give one.
pub(crate) struct Reply<T> {
    rx: oneshot::Receiver<T>,
    is_plain: Arc<AtomicBool>,
}

impl<T> Future for Reply<T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        self.is_plain.store(PLAIN_WAKER.get(), Ordering::Release);
        Pin::new(&mut self.rx).poll(cx).map(Result::ok)
    }
}

/// Polls with a waker of which the caller knows that it only wakes a thread, or makes a descriptor readable: it runs no code of users,
/// so any thread may call it, the library's too, and an answer comes without another thread's help.
pub fn with_plain_waker<T>(poll: impl FnOnce() -> T) -> T {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            PLAIN_WAKER.set(self.0);
        }
    }
    let _before = Before(PLAIN_WAKER.replace(true));
    poll()
}

/// Blocks this thread until it is done.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    futures_lite::future::block_on(poll_fn(|cx| with_plain_waker(|| future.as_mut().poll(cx))))
}

/// Runs all at once; the results in the order given.
#[cfg(any(feature = "conformance", feature = "etcd"))]
pub(crate) async fn together<F: Future>(work: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut work: Vec<_> = work.map(|one| (Some(Box::pin(one)), None)).collect();
    poll_fn(|cx| {
        for (one, result) in &mut work {
            if let Some(Poll::Ready(output)) = one.as_mut().map(|one| one.as_mut().poll(cx)) {
                (*one, *result) = (None, Some(output));
            }
        }
        if work.iter().all(|(one, _)| one.is_none()) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    work.into_iter().filter_map(|(_, result)| result).collect()
}

/// A lock whose holder never panics half way: what it guards is changed in steps that keep it whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    static LIBRARY_THREAD: Cell<bool> = const { Cell::new(false) };
    /// Tasks that were woken and go on in this thread.
    static NEAR: RefCell<Option<VecDeque<Runnable>>> = const { RefCell::new(None) };
    /// Whether what is polled here is polled with a waker that runs no code of users.
    static PLAIN_WAKER: Cell<bool> = const { Cell::new(false) };
}

/// A thread of the library, which can be waited for without blocking.
pub(crate) struct Thread {
    ended: oneshot::Receiver<()>,
    handle: JoinHandle<()>,
}

impl Thread {
    /// Starts it. It takes no signals: those are the program's.
    pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<Self> {
        let (tx, ended) = oneshot::channel();
        let body = move || {
            LIBRARY_THREAD.set(true);
            nix::sys::signal::SigSet::all().thread_block().expect("a set of signals can be blocked");
            body();
            // The last act of this thread, so whoever it wakes delays nobody.
            let _ = tx.send(());
        };
        let handle = thread::Builder::new().name(name.into()).spawn(body).map_err(|error| {
            Error::new(ErrorKind::Limit, "cannot start a thread: raise the limit of processes").with_source(error)
        })?;
        Ok(Self { ended, handle })
    }

    #[cfg(feature = "sqlite")]
    pub(crate) fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }

    /// Resolves when it has ended; at once when this is that very thread.
    pub(crate) async fn join(self) {
        if self.handle.thread().id() != thread::current().id() {
            let Self { ended, handle } = self;
            drop(ended.await);
            drop(handle.join());
        }
    }
}

/// The real environment: one thread for timers, input and tasks, and two for user code.
pub(crate) struct System {
    /// `None` once it has stopped: no descriptor is kept by who still knows a closed manager.
    handle: Arc<Mutex<Option<Handle>>>,
    timers: Arc<Timers>,
    tasks: TaskTracker,
    end: CancellationToken,
    thread: Mutex<Option<Thread>>,
    wakes: Arc<Dispatcher>,
    logs: Arc<Dispatcher>,
    /// Started by the first callback: most programs have none.
    calls: Arc<Mutex<Option<Arc<Dispatcher>>>>,
}

/// The environment of this machine, for running a store without a manager.
///
/// # Errors
/// `Limit` when a thread or a timer cannot be had.
pub fn system() -> Result<Arc<dyn Environment>> {
    Ok(System::start()?)
}

impl System {
    pub(crate) fn start() -> Result<Arc<Self>> {
        let no_timer = |error: std::io::Error| {
            Error::new(ErrorKind::Limit, "cannot open a timer: raise the limit of open files").with_source(error)
        };
        let mut builder = Builder::new_current_thread();
        // For the keep-alive of connections, which may stop in suspend. No deadline is tokio's.
        #[cfg(feature = "etcd")]
        builder.enable_time();
        let runtime = builder.enable_io().build().map_err(no_timer)?;
        let timers = Arc::new(Timers::new().map_err(|error| no_timer(error.into()))?);
        let end = CancellationToken::new();
        let handle = Arc::new(Mutex::new(Some(runtime.handle().clone())));
        let wakes = Dispatcher::start("lease-wake", usize::MAX)?;
        let logs = Dispatcher::start("lease-log", 1024).inspect_err(|_| drop(wakes.stop()))?;
        let thread = Thread::spawn("lease", {
            let (timers, end) = (timers.clone(), end.clone());
            move || {
                runtime.block_on(end.run_until_cancelled(timers.drive()));
                // A look-up of a host's name blocks a thread, for minutes perhaps: not this one.
                runtime.shutdown_background();
            }
        });
        let thread = thread.inspect_err(|_| drop((wakes.stop(), logs.stop())))?;
        Ok(Arc::new(Self {
            handle,
            timers,
            tasks: TaskTracker::new(),
            end,
            thread: Mutex::new(Some(thread)),
            wakes,
            logs,
            calls: Arc::default(),
        }))
    }
}

impl Environment for System {
    fn now(&self) -> Moment {
        Moment::now()
    }

    fn sleep_until(&self, at: Moment) -> Task {
        Box::pin(Sleep::new(self.timers.clone(), at))
    }

    fn random(&self) -> u64 {
        getrandom::u64().expect("the operating system has randomness")
    }

    fn spawn(&self, task: Task) {
        // Dropped after the end, which tells whoever waits for it.
        if let Some(handle) = lock(&self.handle).clone() {
            self.tasks.spawn_on(task, &handle);
        }
    }

    fn deliver(&self, job: Job) {
        // After `stop` there is no other thread, and dropping the job would wake from here too.
        let here = if LIBRARY_THREAD.get() { self.wakes.try_send(job) } else { Some(job) };
        here.into_iter().for_each(call);
    }

    fn log(&self, job: Job) {
        if LIBRARY_THREAD.get() { self.logs.send(job) } else { call(job) }
    }

    fn start_calls(&self) -> Result<()> {
        let mut calls = lock(&self.calls);
        if calls.is_none() && !lock(&self.wakes.queue).stopped {
            *calls = Some(Dispatcher::start("lease-call", usize::MAX)?);
        }
        Ok(())
    }

    fn call(&self, job: Job) -> Option<Job> {
        match lock(&self.calls).clone() {
            Some(calls) => calls.try_send(job),
            None => Some(job),
        }
    }

    fn is_library_thread(&self) -> bool {
        LIBRARY_THREAD.get()
    }

    fn stop(&self, limit: Moment) -> Task {
        let (told, idle) = oneshot::channel::<()>();
        let (tasks, wakes, late) = (self.tasks.clone(), self.wakes.clone(), Sleep::new(self.timers.clone(), limit));
        if let Some(handle) = &*lock(&self.handle) {
            handle.spawn(async move {
                tasks.close();
                or(tasks.wait(), late).await;
                wakes.send(Box::new(move || drop(told)));
            });
        }
        let (wakes, logs, late) = (self.wakes.clone(), self.logs.clone(), Sleep::new(self.timers.clone(), limit));
        let calls = self.calls.clone();
        let (end, thread) = (self.end.clone(), lock(&self.thread).take());
        let (handle, timers) = (self.handle.clone(), self.timers.clone());
        Box::pin(async move {
            // After the last task, so that every answer is delivered. User code that never returns keeps its thread, but
            // not the caller.
            let drained = async {
                drop(idle.await);
                wakes.stop().await;
                let calls = lock(&calls).clone();
                if let Some(calls) = calls {
                    calls.stop().await;
                }
                logs.stop().await;
            };
            or(drained, late).await;
            drop((wakes.stop(), logs.stop()));
            end.cancel();
            if let Some(thread) = thread {
                thread.join().await;
                lock(&handle).take();
                lock(&timers.fd).take();
            }
        })
    }
}

impl Drop for System {
    fn drop(&mut self) {
        self.end.cancel();
        drop(self.wakes.stop());
        drop(self.logs.stop());
        if let Some(calls) = &*lock(&self.calls) {
            drop(calls.stop());
        }
    }
}

/// Runs user code. Its panic ends it, and nothing else: not the delivery to others, nor what the caller has still to do.
pub(crate) fn call(job: Job) {
    // What it polls has wakers of its own.
    let plain = PLAIN_WAKER.replace(false);
    // The panic hook has printed it.
    drop(catch_unwind(AssertUnwindSafe(job)));
    PLAIN_WAKER.set(plain);
}

/// All sleeping futures, woken by one timer on the clock that counts through suspend.
struct Timers {
    /// `None` once there is nobody to wake any more.
    fd: Mutex<Option<Arc<OwnedFd>>>,
    queue: Mutex<Sleepers>,
    next_id: AtomicU64,
}

#[derive(Default)]
struct Sleepers {
    wakers: BTreeMap<(Moment, u64), Waker>,
    /// When the kernel fires, if it does. A sleep that is given up leaves this as it is: to fire for nobody once costs less than
    /// to tell the kernel of each.
    armed: Option<Moment>,
}

impl Timers {
    fn new() -> Result<Self, rustix::io::Errno> {
        let fd = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        Ok(Self { fd: Mutex::new(Some(Arc::new(fd))), queue: Mutex::default(), next_id: AtomicU64::new(0) })
    }

    /// Asks the kernel to fire for the first of the queue.
    fn arm(&self, queue: &mut Sleepers) {
        let Some(((at, _), _)) = queue.wakers.first_key_value() else { return };
        if queue.armed.is_some_and(|armed| armed <= *at) {
            return;
        }
        queue.armed = Some(*at);
        // An all-zero time would disarm it.
        let nanos = at.as_nanos().max(1);
        let it_value = Timespec {
            tv_sec: i64::try_from(nanos / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(nanos % 1_000_000_000).unwrap_or(0),
        };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        if let Some(fd) = &*lock(&self.fd) {
            timerfd_settime(fd, TimerfdTimerFlags::ABSTIME, &Itimerspec { it_interval, it_value })
                .expect("a valid time on a valid timer");
        }
    }

    async fn drive(&self) {
        #[expect(deprecated, reason = "sound for a descriptor that nobody replaces; its successor is an unsafe fn")]
        let Some(fd) = lock(&self.fd).clone().map(AsyncFd::new) else { return };
        let fd = fd.expect("the timer joins the runtime of its thread");
        loop {
            let mut ready = fd.readable().await.expect("the runtime lives as long as this task");
            let mut fired = [0; 8];
            let _ = rustix::io::read(fd.get_ref(), &mut fired);
            ready.clear_ready();
            let now = Moment::now();
            let due: Vec<Waker> = {
                let mut queue = lock(&self.queue);
                let later = queue.wakers.split_off(&(now + Duration::from_nanos(1), 0));
                let due = std::mem::replace(&mut queue.wakers, later);
                queue.armed = None;
                self.arm(&mut queue);
                due.into_values().collect()
            };
            due.into_iter().for_each(Waker::wake);
        }
    }
}

struct Sleep {
    timers: Arc<Timers>,
    key: (Moment, u64),
    queued: bool,
}

impl Sleep {
    fn new(timers: Arc<Timers>, at: Moment) -> Self {
        let id = timers.next_id.fetch_add(1, Ordering::Relaxed);
        Self { timers, key: (at, id), queued: false }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Moment::now() >= self.key.0 {
            return Poll::Ready(());
        }
        self.queued = true;
        let before = {
            let mut queue = lock(&self.timers.queue);
            let before = queue.wakers.insert(self.key, cx.waker().clone());
            self.timers.arm(&mut queue);
            before
        };
        // A waker may be the last to know of a task, which may sleep too.
        drop(before);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if self.queued {
            let waker = lock(&self.timers.queue).wakers.remove(&self.key);
            drop(waker);
        }
    }
}

/// A thread for user code, fed by a queue.
struct Dispatcher {
    bound: usize,
    queue: Mutex<Queue>,
    ready: Condvar,
    thread: Mutex<Option<Thread>>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    dropped: u64,
    stopped: bool,
}

impl Dispatcher {
    fn start(name: &str, bound: usize) -> Result<Arc<Self>> {
        let thread = Mutex::default();
        let this = Arc::new(Self { bound, queue: Mutex::default(), ready: Condvar::new(), thread });
        let working = this.clone();
        *lock(&this.thread) = Some(Thread::spawn(name, move || working.work())?);
        Ok(this)
    }

    fn send(&self, job: Job) {
        // When nobody would run it, dropping it tells whoever waits for it.
        drop(self.try_send(job));
    }

    /// Gives it back when the thread has stopped.
    fn try_send(&self, job: Job) -> Option<Job> {
        let mut queue = lock(&self.queue);
        if queue.stopped {
            return Some(job);
        }
        if queue.jobs.len() >= self.bound {
            queue.dropped += 1;
        } else {
            queue.jobs.push_back(job);
            self.ready.notify_one();
        }
        None
    }

    fn work(&self) {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                let dropped = std::mem::take(&mut queue.dropped);
                drop(queue);
                if dropped > 0 {
                    tracing::warn!(dropped, "the log subscriber could not keep up: events were dropped");
                }
                call(job);
                queue = lock(&self.queue);
            } else if queue.stopped {
                return;
            } else {
                queue = self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Lets the queue run dry and the thread end; resolves then.
    fn stop(&self) -> impl Future<Output = ()> + Send + use<> {
        lock(&self.queue).stopped = true;
        self.ready.notify_one();
        let thread = lock(&self.thread).take();
        async {
            if let Some(thread) = thread {
                thread.join().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeps_end_in_order_and_late_ones_do_not_hold_up_early_ones() {
        let env = System::start().unwrap();
        let (tx, rx) = std::sync::mpsc::channel();
        let now = env.now();
        for millis in [30_u64, 10, 3_600_000, 20] {
            let (tx, sleep) = (tx.clone(), env.sleep_until(now + Duration::from_millis(millis)));
            env.spawn(Box::pin(async move {
                sleep.await;
                let _ = tx.send(millis);
            }));
        }
        assert_eq!(rx.iter().take(3).collect::<Vec<_>>(), [10, 20, 30]);
    }

    #[test]
    fn what_is_woken_near_goes_on_there_and_once() {
        let env: Arc<dyn Environment> = System::start().unwrap();
        let (tx, rx) = std::sync::mpsc::channel();
        let waits = |()| {
            let (tx, woken) = (tx.clone(), Arc::new(tokio::sync::Notify::new()));
            let waiting = woken.clone();
            let task = Box::pin(async move {
                waiting.notified().await;
                tx.send(thread::current().id()).unwrap();
            });
            (woken, start_near(&env, true, task))
        };
        let tasks = [(); 3].map(waits);
        near(|| {
            tasks[0].0.notify_one();
            // As a waker does that comes back into the library.
            near(|| tasks[1].0.notify_one());
            tasks[2].0.notify_one();
            assert!(rx.try_recv().is_err(), "not before everybody was woken");
        });
        assert_eq!(rx.try_iter().collect::<Vec<_>>(), [thread::current().id(); 3]);
        assert!(tasks.iter().all(|(_, task)| task.is_finished()));
    }

    #[test]
    fn what_users_code_polls_has_wakers_of_its_own() {
        let (tx, rx) = std::sync::mpsc::channel();
        let still = with_plain_waker(|| {
            call(Box::new(move || tx.send(PLAIN_WAKER.get()).unwrap()));
            PLAIN_WAKER.get()
        });
        assert_eq!((rx.recv(), still, PLAIN_WAKER.get()), (Ok(false), true, false));
    }

    /// A waker may be the last to know of a task: that is dropped with it, and sleeps too.
    #[test]
    fn a_waker_is_dropped_under_no_lock() {
        struct Last {
            _task: Mutex<Task>,
        }
        impl std::task::Wake for Last {
            fn wake(self: Arc<Self>) {}
        }
        let (tx, done) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let env = System::start().unwrap();
            let asleep = |waker: &Waker| {
                let mut sleep = env.sleep_until(env.now() + Duration::from_secs(3_600));
                assert!(sleep.as_mut().poll(&mut Context::from_waker(waker)).is_pending());
                sleep
            };
            let last = || Waker::from(Arc::new(Last { _task: Mutex::new(asleep(Waker::noop())) }));
            let mut sleep = asleep(&last());
            assert!(sleep.as_mut().poll(&mut Context::from_waker(&last())).is_pending());
            drop(sleep);
            tx.send(()).unwrap();
        });
        done.recv_timeout(Duration::from_secs(20)).expect("no lock is waited for");
    }

    #[test]
    fn user_code_never_runs_on_the_library_thread() {
        let env = System::start().unwrap();
        let (tx, rx) = std::sync::mpsc::channel();
        let inner = env.clone();
        env.spawn(Box::pin(async move {
            let library = thread::current().id();
            inner.deliver(Box::new(move || {
                tx.send((library, thread::current().id())).unwrap();
            }));
        }));
        let (library, user) = rx.recv().unwrap();
        assert_ne!(library, user);
    }

    #[test]
    fn a_slow_subscriber_costs_log_lines_and_nothing_else() {
        let dispatcher = Dispatcher::start("test", 4).unwrap();
        let (tx, rx) = std::sync::mpsc::channel::<()>();
        let (started, first) = std::sync::mpsc::channel();
        dispatcher.send(Box::new(move || {
            started.send(()).unwrap();
            let _ = rx.recv();
        }));
        first.recv().unwrap();
        for _ in 0..10 {
            dispatcher.send(Box::new(|| ()));
        }
        assert_eq!(lock(&dispatcher.queue).dropped, 6);
        drop(tx);
        futures_lite::future::block_on(dispatcher.stop());
    }

    #[test]
    fn stopping_waits_for_tasks_and_joins_every_thread() {
        let env = System::start().unwrap();
        let (tx, rx) = std::sync::mpsc::channel();
        let sleep = env.sleep_until(env.now() + Duration::from_millis(20));
        env.spawn(Box::pin(async move {
            sleep.await;
            let _ = tx.send(());
        }));
        futures_lite::future::block_on(env.stop(env.now() + Duration::from_secs(5)));
        assert!(rx.try_recv().is_ok(), "the task ended first");
    }
}
