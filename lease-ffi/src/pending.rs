//! An acquire for event loops, which may not block.

use std::ffi::{c_char, c_int};
use std::future::IntoFuture;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

use lease_core::signal::Signal;
use lease_core::{Acquiring, Error, ErrorKind, Lease, Name, Result};
use rustix::event::epoll;

use crate::error::{cancelled, lease_error_t, lease_status};
use crate::handle::{export, find, insert, invalid, remove, value};
use crate::lease::{Held, lease_t};
use crate::manager::{lease_manager_t, prepare};
use crate::options::{Set, lease_options_t};
use crate::wait::{borrowed, is_readable, step};

/// An acquire that goes on in the background. Free it with `lease_pending_free`.
pub struct lease_pending_t {
    _private: [u8; 0],
}

struct Pending {
    name: Name,
    signal: Arc<Signal>,
    /// With a cancel fd: readable when either is.
    either: Mutex<Option<OwnedFd>>,
    set: Set,
    state: Mutex<State>,
}

enum State {
    Waiting(Acquiring<Lease>),
    Done(Result<Lease>),
    Taken,
}

impl Pending {
    fn start(mut acquiring: Acquiring<Lease>, name: Name, set: Set) -> Result<Self> {
        let signal = Arc::new(Signal::new()?);
        let either = set.cancel().map(|cancel| {
            let both = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| {
                Error::new(ErrorKind::Limit, "cannot open an epoll: raise the limit of open files").with_source(error)
            })?;
            let data = epoll::EventData::new_u64(0);
            let added = epoll::add(&both, borrowed(&signal), data, epoll::EventFlags::IN)
                .and_then(|()| epoll::add(&both, cancel, data, epoll::EventFlags::IN));
            added.map_err(|error| match error {
                rustix::io::Errno::PERM => invalid("opts", "has a cancel fd that cannot be waited for: give a pipe"),
                _ => Error::new(ErrorKind::Limit, "cannot watch the cancel fd").with_source(error),
            })?;
            Ok::<_, Error>(both)
        });
        let either = either.transpose()?;
        let waker = Waker::from(signal.clone());
        let state = match step(acquiring.as_mut(), &waker) {
            Poll::Pending => State::Waiting(acquiring),
            Poll::Ready(done) => {
                signal.set();
                State::Done(done)
            }
        };
        Ok(Self { name, signal, either: Mutex::new(either), set, state: Mutex::new(state) })
    }

    fn take(&self) -> Result<Lease> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Waiting(acquiring) = &mut *state {
            self.signal.clear();
            let waker = Waker::from(self.signal.clone());
            if let Poll::Ready(done) = step(acquiring.as_mut(), &waker) {
                *state = State::Done(done);
            } else if self.set.cancel().map_or(Ok(false), is_readable)? {
                *state = State::Done(Err(cancelled(&self.name)));
            } else {
                let message = "it still waits: take it when its descriptor is readable";
                return Err(Error::new(ErrorKind::Timeout, message).during("acquire", Some(&self.name)));
            }
            // From now on it is done, and its descriptor says so.
            self.signal.set();
        }
        match std::mem::replace(&mut *state, State::Taken) {
            State::Done(done) => done,
            _ => Err(invalid("p", "was taken before: start another acquire")),
        }
    }
}

fn pending(p: *const lease_pending_t) -> Result<Arc<Pending>> {
    find(p.cast(), "p", "lease_pending_t")
}

/// As `lease_manager_acquire`, without waiting for the name: `*out` becomes an acquire that goes on in the background, to be freed
/// with `lease_pending_free`. When its descriptor is readable, take the outcome. (On an SQLite file that nobody else uses, the write
/// is done by this very call, as it is by those that release.)
///
/// Errors: INVALID, LIMIT; all others come from `lease_pending_take`.
#[unsafe(no_mangle)]
pub extern "C" fn lease_manager_acquire_start(
    m: *mut lease_manager_t,
    name: *const c_char,
    timeout_ms: i64,
    opts: *const lease_options_t,
    out: *mut *mut lease_pending_t,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let out = crate::handle::out(out)?;
        let (acquire, name, set) = prepare(m, name, timeout_ms, opts)?;
        let handle = insert(Arc::new(Pending::start(acquire.into_future(), name, set)?))?;
        out.put(handle);
        Ok(())
    })
}

/// A descriptor that is readable, and stays so, when the acquire is done, with a lease or an error, or its cancel fd is readable. Only
/// poll it. Closed by `lease_pending_free`: take it out of your loop before.
#[unsafe(no_mangle)]
pub extern "C" fn lease_pending_fd(
    p: *const lease_pending_t,
    out: *mut c_int,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let out = crate::handle::out(out)?;
        let pending = pending(p)?;
        let either = pending.either.lock().unwrap_or_else(PoisonError::into_inner);
        let fd = either.as_ref().map_or(pending.signal.fd(), AsRawFd::as_raw_fd);
        out.put(fd);
        Ok(())
    })
}

/// The outcome: once, when the descriptor is readable. Never waits. `*out` is freed with `lease_free`.
///
/// Errors: those of `lease_manager_acquire`, and then it is over. Before the descriptor is readable: TIMEOUT, "it still waits", and
/// nothing is over. INVALID when it was taken.
#[unsafe(no_mangle)]
pub extern "C" fn lease_pending_take(
    p: *mut lease_pending_t,
    out: *mut *mut lease_t,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let out = crate::handle::out(out)?;
        let handle = Held::insert(pending(p)?.take()?)?;
        out.put(handle);
        Ok(())
    })
}

/// Frees it and its descriptor: gives up waiting, and releases a lease that was not taken, in the background. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn lease_pending_free(p: *mut lease_pending_t) {
    value((), || {
        let pending = remove::<Pending>(p.cast())?;
        // Now, though another thread may be in a call with it.
        let state = std::mem::replace(&mut *pending.state.lock().unwrap_or_else(PoisonError::into_inner), State::Taken);
        drop(state);
        pending.either.lock().unwrap_or_else(PoisonError::into_inner).take();
        pending.signal.close();
        None
    });
}
