//! How a calling thread waits for the core: without the interpreter's lock, and until a signal's handler raises.

use std::collections::BTreeMap;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use lease_core::clock::Moment;
use lease_core::runtime::with_plain_waker;
use lease_core::{Error, ErrorKind, Result, fork};
use pyo3::prelude::*;

use crate::interpreter::{detached, gone, is_ending, is_main_thread};

/// How often the main thread looks whether a signal has arrived: the system may have given it to another thread.
const SIGNALS_EVERY: Duration = Duration::from_millis(50);

#[derive(Default)]
struct Parked {
    woken: Mutex<bool>,
    waking: Condvar,
}

impl Wake for Parked {
    fn wake(self: Arc<Self>) {
        *self.woken.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.waking.notify_one();
    }
}

/// Who waits, to be told when the interpreter ends.
static WAITING: Mutex<Waiters> = Mutex::new(Waiters { forks: 0, parked: BTreeMap::new() });

struct Waiters {
    forks: u32,
    parked: BTreeMap<usize, Weak<Parked>>,
}

/// Those of this process: what a forked child inherits may be locked by a thread that it does not have.
fn waiting() -> MutexGuard<'static, Waiters> {
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    if waiting.forks != fork::count() {
        *waiting = Waiters { forks: fork::count(), parked: BTreeMap::new() };
    }
    waiting
}

/// Tells all who wait that nobody will get what they wait for.
pub(crate) fn wake_all() {
    let parked = std::mem::take(&mut waiting().parked);
    parked.values().filter_map(Weak::upgrade).for_each(Wake::wake);
}

impl Parked {
    fn new() -> Arc<Self> {
        let parked = Arc::new(Self::default());
        waiting().parked.insert(Arc::as_ptr(&parked).addr(), Arc::downgrade(&parked));
        parked
    }

    /// Waits until it is woken, at most so long.
    fn park(&self, limit: Option<Duration>) {
        let woken = self.woken.lock().unwrap_or_else(PoisonError::into_inner);
        let asleep = |woken: &mut bool| !*woken;
        let mut woken = match limit {
            Some(limit) => {
                self.waking.wait_timeout_while(woken, limit, asleep).unwrap_or_else(PoisonError::into_inner).0
            }
            None => self.waking.wait_while(woken, asleep).unwrap_or_else(PoisonError::into_inner),
        };
        *woken = false;
    }
}

/// One entry of [`WAITING`].
struct Waiting<'a>(&'a Arc<Parked>);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        waiting().parked.remove(&Arc::as_ptr(self.0).addr());
    }
}

/// One step of the core's. A panic of it is an error.
pub(crate) fn step<T>(
    work: Pin<&mut (impl Future<Output = Result<T>> + ?Sized)>,
    context: &mut Context<'_>,
) -> Poll<Result<T>> {
    // All our wakers wake a thread or write to a descriptor.
    catch_unwind(AssertUnwindSafe(|| with_plain_waker(|| work.poll(context)))).unwrap_or_else(|_| {
        Poll::Ready(Err(Error::new(ErrorKind::Internal, "a defect of this package, please report it: it panicked")))
    })
}

fn poll<T>(work: Pin<&mut Option<impl Future<Output = Result<T>>>>, waker: &Waker) -> Poll<Result<T>> {
    let work = work.as_pin_mut().expect("given up only at the end");
    step(work, &mut Context::from_waker(waker))
}

/// Waits for the core. If a signal's handler raises, the work is dropped.
pub(crate) fn wait<T: Send>(py: Python<'_>, work: impl Future<Output = Result<T>> + Send) -> PyResult<Result<T>> {
    Ok(wait_within(py, work, None)?.expect("it has no limit"))
}

/// The same for at most so long: `None` when that is over.
pub(crate) fn wait_within<T: Send>(
    py: Python<'_>,
    work: impl Future<Output = Result<T>> + Send,
    limit: Option<Duration>,
) -> PyResult<Option<Result<T>>> {
    let mut work = pin!(Some(work));
    let first = detached(py, || poll(work.as_mut(), Waker::noop()));
    if let Poll::Ready(done) = first {
        return Ok(Some(done));
    }
    let deadline = limit.map(|limit| Moment::now() + limit);
    let signals_every = is_main_thread(py)?.then_some(SIGNALS_EVERY);
    let parked = Parked::new();
    let _waiting = Waiting(&parked);
    let waker = Waker::from(parked.clone());
    loop {
        // Signals are looked at between two parkings: one that came before is not slept over.
        py.check_signals()?;
        let done = detached(py, || {
            loop {
                if let Poll::Ready(done) = poll(work.as_mut(), &waker) {
                    return Some(Some(done));
                }
                if is_ending() {
                    work.set(None);
                    gone(());
                }
                let left = deadline.map(|deadline| deadline.since(Moment::now()));
                if left.is_some_and(|left| left.is_zero()) {
                    return Some(None);
                }
                parked.park([left, signals_every].into_iter().flatten().min());
                if signals_every.is_some() {
                    return None;
                }
            }
        });
        if let Some(done) = done {
            return Ok(done);
        }
    }
}
