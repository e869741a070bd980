//! How a calling thread waits for the core: without the interpreter's lock, and until a signal's handler raises.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use lease_core::clock::Moment;
use lease_core::{Error, ErrorKind, Result};
use pyo3::prelude::*;

use crate::interpreter::{detached, is_main_thread};

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

impl Parked {
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

/// One step of the core's. A panic of it is an error.
pub(crate) fn step<T>(
    work: Pin<&mut (impl Future<Output = Result<T>> + ?Sized)>,
    context: &mut Context<'_>,
) -> Poll<Result<T>> {
    catch_unwind(AssertUnwindSafe(|| work.poll(context))).unwrap_or_else(|_| {
        Poll::Ready(Err(Error::new(ErrorKind::Internal, "a defect of this package, please report it: it panicked")))
    })
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
    let mut work = pin!(work);
    let first = detached(py, || step(work.as_mut(), &mut Context::from_waker(Waker::noop())));
    if let Poll::Ready(done) = first {
        return Ok(Some(done));
    }
    let deadline = limit.map(|limit| Moment::now() + limit);
    let signals_every = is_main_thread(py)?.then_some(SIGNALS_EVERY);
    let parked = Arc::new(Parked::default());
    let waker = Waker::from(parked.clone());
    loop {
        // Signals are looked at between two parkings: one that came before is not slept over.
        py.check_signals()?;
        let done = detached(py, || {
            loop {
                if let Poll::Ready(done) = step(work.as_mut(), &mut Context::from_waker(&waker)) {
                    return Some(Some(done));
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
