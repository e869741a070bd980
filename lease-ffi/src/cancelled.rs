//! How C hears that a lease was lost: callbacks.

use std::ffi::c_void;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use lease_core::{Lease, Result};
use rustix::thread::{Pid, gettid};

/// How long `lease_free` waits for a callback that runs.
const CALLBACK_LIMIT: Duration = Duration::from_secs(5);

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
