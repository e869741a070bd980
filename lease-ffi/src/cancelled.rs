//! How C hears that a lease ended: a descriptor, and callbacks.

use std::ffi::{c_int, c_void};
use std::future::Future;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use lease_core::{CancellationToken, Lease, Result};
use rustix::thread::{Pid, gettid};
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::wait::Signal;

/// How long `lease_free` waits for a callback that runs.
const CALLBACK_LIMIT: Duration = Duration::from_secs(5);

/// A descriptor that is readable once the lease ended. Written to by whoever ends the lease: no thread waits for it.
pub(crate) struct Ended {
    signal: Signal,
    /// Kept, so that what is dropped in a wake-up is never the last.
    token: CancellationToken,
    waiting: Mutex<Option<Pin<Box<WaitForCancellationFutureOwned>>>>,
}

impl Ended {
    pub(crate) fn of(lease: &Lease) -> Result<Arc<Self>> {
        let token = lease.cancellation();
        let waiting = Mutex::new(Some(Box::pin(token.clone().cancelled_owned())));
        let this = Arc::new(Self { signal: Signal::new()?, token, waiting });
        this.clone().wake();
        Ok(this)
    }

    pub(crate) fn fd(&self) -> c_int {
        self.signal.as_fd().as_raw_fd()
    }

    pub(crate) fn close(&self) {
        self.signal.close();
    }
}

impl Wake for Ended {
    fn wake(self: Arc<Self>) {
        if self.token.is_cancelled() {
            self.signal.set();
            return;
        }
        let waker = Waker::from(self.clone());
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(future) = &mut *waiting
            && future.as_mut().poll(&mut Context::from_waker(&waker)) == Poll::Ready(())
        {
            self.signal.set();
        }
    }
}

/// What the user gave to a callback, freed exactly once.
pub(crate) struct UserData {
    data: *mut c_void,
    free: Option<extern "C" fn(*mut c_void)>,
}

// SAFETY: the header says that callbacks run on a thread of the library, so the user's data is made for that.
unsafe impl Send for UserData {}

impl UserData {
    pub(crate) fn new(data: *mut c_void, free: Option<extern "C" fn(*mut c_void)>) -> Self {
        Self { data, free }
    }
}

impl Drop for UserData {
    fn drop(&mut self) {
        if let Some(free) = self.free {
            free(self.data);
        }
    }
}

/// The callbacks of one lease.
#[derive(Default)]
pub(crate) struct Callbacks {
    state: Mutex<State>,
    idle: Condvar,
}

#[derive(Default)]
struct State {
    closed: bool,
    /// The threads of the callbacks that run: more than one after the manager was closed.
    running: Vec<Pid>,
}

impl Callbacks {
    pub(crate) fn add(
        self: &Arc<Self>,
        lease: &Lease,
        callback: extern "C" fn(i32, *mut c_void),
        data: UserData,
    ) -> Result<()> {
        let this = self.clone();
        lease.on_end(move |reason| {
            // Whole, not by its fields: it is freed at the end.
            let data = data;
            if reason.is_loss() && this.begin() {
                callback(reason.code(), data.data);
                let mut state = this.state.lock().unwrap_or_else(PoisonError::into_inner);
                // One entry: a callback that registers another after the close runs it within itself.
                if let Some(own) = state.running.iter().position(|thread| *thread == gettid()) {
                    state.running.swap_remove(own);
                }
                drop(state);
                this.idle.notify_all();
            }
        })
    }

    /// Whether a callback may start.
    fn begin(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.closed {
            state.running.push(gettid());
        }
        !state.closed
    }

    /// No callback starts from now on; waits for one that runs, unless it is this call's own caller.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.closed = true;
        let own = gettid();
        let wait = self
            .idle
            .wait_timeout_while(state, CALLBACK_LIMIT, |state| state.running.iter().any(|thread| *thread != own));
        drop(wait);
    }
}
