//! How a calling thread waits for the core: with a time limit, and with a descriptor that ends the wait.

use std::future::Future;
use std::os::fd::BorrowedFd;
use std::pin::{Pin, pin};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use lease_core::clock::Moment;
use lease_core::runtime::with_plain_waker;
use lease_core::signal::Signal;
use lease_core::{Error, ErrorKind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A signal for poll(2).
pub(crate) fn borrowed(signal: &Signal) -> BorrowedFd<'_> {
    // SAFETY: only its owner closes it before it is dropped, and does not use it after that.
    unsafe { BorrowedFd::borrow_raw(signal.fd()) }
}

/// Polls once. All our wakers wake a thread or write to a descriptor.
pub(crate) fn step<T>(future: Pin<&mut (impl Future<Output = T> + ?Sized)>, waker: &Waker) -> Poll<T> {
    with_plain_waker(|| future.poll(&mut Context::from_waker(waker)))
}

/// Waits as long as it takes, with nothing of this thread's own: C calls from `atexit` and from destructors of thread-specific
/// data, when what Rust keeps for a thread is gone.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    #[derive(Default)]
    struct Parked(Mutex<bool>, Condvar);
    impl Wake for Parked {
        fn wake(self: Arc<Self>) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
            self.1.notify_one();
        }
    }
    let mut future = pin!(future);
    if let Poll::Ready(done) = step(future.as_mut(), Waker::noop()) {
        return done;
    }
    let parked = Arc::new(Parked::default());
    let waker = Waker::from(parked.clone());
    loop {
        if let Poll::Ready(done) = step(future.as_mut(), &waker) {
            return done;
        }
        let woken = parked.0.lock().unwrap_or_else(PoisonError::into_inner);
        *parked.1.wait_while(woken, |woken| !*woken).unwrap_or_else(PoisonError::into_inner) = false;
    }
}

/// What ended a wait.
pub(crate) enum Waited<T> {
    Done(T),
    TimedOut,
    Cancelled,
}

/// Whether the user's descriptor tells to give up.
pub(crate) fn is_readable(fd: BorrowedFd<'_>) -> Result<bool> {
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    match poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(_) => Ok(readable(&polled[0])),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(cannot_poll(error)),
    }
}

fn cannot_poll(error: rustix::io::Errno) -> Error {
    Error::new(ErrorKind::Internal, "cannot poll").with_source(error)
}

/// Hang-up and error too: who gives it up wants no more waiting.
fn readable(polled: &PollFd<'_>) -> bool {
    !polled.revents().is_empty()
}

/// Waits for the future, at most so long, and gives up when the descriptor is readable. Signals do not end it.
pub(crate) fn wait<T>(
    mut future: Pin<&mut (impl Future<Output = T> + ?Sized)>,
    limit: Option<Duration>,
    cancel: Option<BorrowedFd<'_>>,
) -> Result<Waited<T>> {
    if let Some(cancel) = cancel
        && is_readable(cancel)?
    {
        return Ok(Waited::Cancelled);
    }
    if limit.is_none() && cancel.is_none() {
        return Ok(Waited::Done(block_on(future)));
    }
    let deadline = limit.map(|limit| Moment::now() + limit);
    if let Poll::Ready(done) = step(future.as_mut(), Waker::noop()) {
        return Ok(Waited::Done(done));
    }
    let signal = Arc::new(Signal::new()?);
    let waker = Waker::from(signal.clone());
    loop {
        signal.clear();
        if let Poll::Ready(done) = step(future.as_mut(), &waker) {
            return Ok(Waited::Done(done));
        }
        let left = deadline.map(|deadline| deadline.since(Moment::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(Waited::TimedOut);
        }
        let left = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        let own = PollFd::from_borrowed_fd(borrowed(&signal), PollFlags::IN);
        let polled = match cancel {
            Some(cancel) => {
                let mut both = [own, PollFd::from_borrowed_fd(cancel, PollFlags::IN)];
                let polled = poll(&mut both, left.as_ref());
                if polled.is_ok() && readable(&both[1]) {
                    return Ok(Waited::Cancelled);
                }
                polled
            }
            None => poll(&mut [own], left.as_ref()),
        };
        match polled {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(cannot_poll(error)),
        }
    }
}
