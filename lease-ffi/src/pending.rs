//! An acquire for event loops, which may not block.

use std::ffi::{CString, c_char, c_int};
use std::future::IntoFuture;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use lease_core::{Acquiring, Error, ErrorKind, Lease, Result};
use rustix::event::epoll;

use crate::error::{c_string, cancelled, lease_error_t, lease_status};
use crate::handle::{export, find, insert, invalid, place, remove, text, value};
use crate::lease::{Held, lease_t};
use crate::manager::{lease_manager_t, prepare};
use crate::options::{Set, lease_options_t};
use crate::wait::{Signal, is_readable};

/// An acquire that goes on in the background. Free it with `lease_pending_free`.
pub struct lease_pending_t {
    _private: [u8; 0],
}

struct Pending {
    name: CString,
    signal: Arc<Signal>,
    /// With a cancel fd: readable when either is.
    either: Option<OwnedFd>,
    set: Set,
    state: Mutex<State>,
}

enum State {
    Waiting(Acquiring<Lease>),
    Done(Result<Lease>),
    Taken,
}

impl Pending {
    fn start(mut acquiring: Acquiring<Lease>, name: &str, set: Set) -> Result<Self> {
        let signal = Arc::new(Signal::new()?);
        let either = set.cancel().map(|cancel| {
            let both = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| {
                Error::new(ErrorKind::Limit, "cannot open an epoll: raise the limit of open files").with_source(error)
            })?;
            let data = epoll::EventData::new_u64(0);
            let added = epoll::add(&both, &*signal, data, epoll::EventFlags::IN)
                .and_then(|()| epoll::add(&both, cancel, data, epoll::EventFlags::IN));
            added.map_err(|error| invalid("opts", "has a cancel fd that epoll cannot watch").with_source(error))?;
            Ok::<_, Error>(both)
        });
        let either = either.transpose()?;
        let waker = Waker::from(signal.clone());
        let state = match acquiring.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Pending => State::Waiting(acquiring),
            Poll::Ready(done) => {
                signal.set();
                State::Done(done)
            }
        };
        Ok(Self { name: c_string(name), signal, either, set, state: Mutex::new(state) })
    }

    fn take(&self) -> Result<Lease> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Waiting(acquiring) = &mut *state {
            self.signal.clear();
            let waker = Waker::from(self.signal.clone());
            if let Poll::Ready(done) = acquiring.as_mut().poll(&mut Context::from_waker(&waker)) {
                *state = State::Done(done);
            } else if self.set.cancel().map_or(Ok(false), is_readable)? {
                *state = State::Done(Err(cancelled(self.name.to_str().unwrap_or_default())));
            } else {
                let message = "the acquire still waits: take it when its fd is readable";
                return Err(Error::new(ErrorKind::Timeout, message));
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

/// As `lease_manager_acquire`, without waiting: `*out` becomes an acquire that goes on in the background. When its descriptor
/// is readable, take the outcome.
///
/// Errors: of the arguments only; all others come from `lease_pending_take`.
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
        let out = place(out)?;
        let (acquire, set) = prepare(m, name, timeout_ms, opts)?;
        let handle = insert(Arc::new(Pending::start(acquire.into_future(), text(name, "name")?, set)?))?;
        // SAFETY: `place` checked it, and the caller gave the address of a variable.
        unsafe { out.write(handle) };
        Ok(())
    })
}

/// A descriptor that is readable when the acquire is done, with a lease or an error, or its cancel fd is readable. Only poll it.
/// Valid until `lease_pending_free`.
#[unsafe(no_mangle)]
pub extern "C" fn lease_pending_fd(
    p: *const lease_pending_t,
    out: *mut c_int,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let out = place(out)?;
        let pending = pending(p)?;
        let fd = pending.either.as_ref().map_or(pending.signal.as_fd(), AsFd::as_fd).as_raw_fd();
        // SAFETY: as above.
        unsafe { out.write(fd) };
        Ok(())
    })
}

/// The outcome: once, when the descriptor is readable. Never waits.
///
/// Errors: those of `lease_manager_acquire`; TIMEOUT also while it still waits: then take it later. INVALID when it was taken.
#[unsafe(no_mangle)]
pub extern "C" fn lease_pending_take(
    p: *mut lease_pending_t,
    out: *mut *mut lease_t,
    err: *mut *mut lease_error_t,
) -> lease_status {
    export(err, || {
        let out = place(out)?;
        let handle = Held::insert(pending(p)?.take()?)?;
        // SAFETY: as above.
        unsafe { out.write(handle) };
        Ok(())
    })
}

/// Frees it: gives up waiting, and releases a lease that was not taken. NULL is fine.
#[unsafe(no_mangle)]
pub extern "C" fn lease_pending_free(p: *mut lease_pending_t) {
    value((), || {
        let pending = remove::<Pending>(p.cast())?;
        // Now, though another thread may be in a call with it.
        let state = std::mem::replace(&mut *pending.state.lock().unwrap_or_else(PoisonError::into_inner), State::Taken);
        drop(state);
        pending.signal.close();
        None
    });
}
