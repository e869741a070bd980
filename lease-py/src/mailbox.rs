//! How an event loop waits for the core: what is ready is put into a mailbox, and one descriptor of it wakes the loop. No thread
//! of the library ever takes the interpreter's lock for it, or calls into a loop that may be closed.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use lease_core::signal::Signal;
use lease_core::{EndReason, Lease, Record, Result, Waiting};
use pyo3::PyTraverseError;
use pyo3::exceptions::PyStopAsyncIteration;
use pyo3::gc::PyVisit;
use pyo3::prelude::*;

use crate::errors::{raise, raise_with, wrong_use};
use crate::interpreter::{detached, unraisable};
use crate::process::Own;
use crate::values;
use crate::wait::step;

/// Who holds a name: `None` when it is free.
pub(crate) type Holder = Option<Record>;

/// What the core answers.
pub(crate) enum Answer {
    Nothing,
    Lease(Option<Lease>),
    Record(Option<Record>),
    Records(Vec<Record>),
    Reason(EndReason),
    /// `None`: the wait was over before there was anything to tell.
    Waiting(Option<Waiting>),
    /// `None`: the watch is over.
    Change(Option<Holder>),
}

pub(crate) type Work = Pin<Box<dyn Future<Output = Result<Answer>> + Send>>;

enum State {
    Working(Work),
    Done(Result<Answer>),
    Taken,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something that the core is asked for. For the asyncio side of this package.
#[pyclass(frozen, module = "lease._lease")]
pub(crate) struct Pending {
    state: Own<Mutex<State>>,
    /// Of the lease that it is about.
    token: Option<i64>,
}

impl Pending {
    pub(crate) fn new(work: impl Future<Output = Result<Answer>> + Send + 'static) -> Self {
        Self { state: Own::new(Mutex::new(State::Working(Box::pin(work)))), token: None }
    }

    pub(crate) fn about(token: i64, work: impl Future<Output = Result<Answer>> + Send + 'static) -> Self {
        Self { token: Some(token), ..Self::new(work) }
    }

    /// Whether it is done, or was taken.
    fn poll(&self, waker: &Waker) -> bool {
        let Some(state) = self.state.get() else { return true };
        let mut state = lock(state);
        let State::Working(work) = &mut *state else { return true };
        let Poll::Ready(done) = step(work.as_mut(), &mut Context::from_waker(waker)) else { return false };
        *state = State::Done(done);
        true
    }

    /// The answer, once.
    pub(crate) fn answer(&self, py: Python<'_>) -> PyResult<Answer> {
        let raise = |error| raise_with(py, &error, self.token);
        let state = self.state.here("call").map_err(raise)?;
        match std::mem::replace(&mut *lock(state), State::Taken) {
            State::Done(done) => done.map_err(raise),
            State::Working(_) | State::Taken => Err(wrong_use(py, "there is no answer to be taken")),
        }
    }
}

#[pymethods]
impl Pending {
    /// Goes as far as it can without waiting; whether it is done.
    fn begin(&self, py: Python<'_>) -> bool {
        detached(py, || self.poll(Waker::noop()))
    }

    /// The answer, once.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self.answer(py)? {
            Answer::Nothing | Answer::Lease(_) | Answer::Record(None) | Answer::Waiting(None) => Ok(None),
            Answer::Record(Some(record)) => values::record(py, record).map(Some),
            Answer::Records(records) => {
                let records: Vec<_> =
                    records.into_iter().map(|one| values::record(py, one)).collect::<PyResult<_>>()?;
                Ok(Some(records.into_pyobject(py)?.into_any()))
            }
            Answer::Reason(reason) => values::reason(py, reason).map(Some),
            Answer::Waiting(Some(waiting)) => values::waiting(py, waiting).map(Some),
            Answer::Change(change) => {
                let record = change.ok_or_else(|| PyStopAsyncIteration::new_err(()))?;
                record.map(|record| values::record(py, record)).transpose()
            }
        }
    }

    /// Whether it is done and there is no lease in it.
    fn is_empty(&self) -> bool {
        self.state.get().is_some_and(|state| matches!(&*lock(state), State::Done(Ok(Answer::Lease(None)))))
    }

    /// Gives it up: what is under way is withdrawn, and a lease that came meanwhile is released.
    fn cancel(&self, py: Python<'_>) {
        if let Some(state) = self.state.get() {
            let state = std::mem::replace(&mut *lock(state), State::Taken);
            detached(py, || drop(state));
        }
    }
}

/// What the wakers and the mailbox share.
struct Post {
    signal: Signal,
    ready: Mutex<Vec<u64>>,
}

struct Ring {
    mailbox: Arc<Post>,
    key: u64,
}

impl Wake for Ring {
    fn wake(self: Arc<Self>) {
        let was_empty = {
            let mut ready = lock(&self.mailbox.ready);
            ready.push(self.key);
            ready.len() == 1
        };
        if was_empty {
            self.mailbox.signal.set();
        }
    }
}

#[derive(Default)]
struct Entries {
    next: u64,
    of: HashMap<u64, (Py<Pending>, Py<PyAny>)>,
}

/// The mailbox of one event loop. For the asyncio side of this package.
#[pyclass(frozen, module = "lease._lease", weakref)]
pub(crate) struct Mailbox {
    shared: Own<Arc<Post>>,
    entries: Mutex<Entries>,
}

impl Mailbox {
    fn waker(&self, key: u64) -> Option<Waker> {
        let mailbox = self.shared.get()?.clone();
        Some(Waker::from(Arc::new(Ring { mailbox, key })))
    }

    fn look(slf: &Bound<'_, Self>, key: u64) {
        let py = slf.py();
        let this = slf.get();
        let entry = lock(&this.entries).of.get(&key).map(|(pending, done)| (pending.clone_ref(py), done.clone_ref(py)));
        let (Some((pending, done)), Some(waker)) = (entry, this.waker(key)) else { return };
        if pending.get().poll(&waker) {
            let entry = lock(&this.entries).of.remove(&key);
            drop(entry);
            unraisable(py, done.bind(py).call0(), Some(done.bind(py)));
        }
    }
}

#[pymethods]
impl Mailbox {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        let signal = Signal::new().map_err(|error| raise(py, &error))?;
        let shared = Own::new(Arc::new(Post { signal, ready: Mutex::default() }));
        Ok(Self { shared, entries: Mutex::default() })
    }

    /// The descriptor that is readable when `run` is due.
    fn fileno(&self, py: Python<'_>) -> PyResult<i32> {
        self.shared.here("mailbox").map(|shared| shared.signal.fd()).map_err(|error| raise(py, &error))
    }

    /// Calls back, in `run` or at once, when it is done. Gives the key for `forget`.
    fn add(slf: &Bound<'_, Self>, pending: Py<Pending>, done: Py<PyAny>) -> u64 {
        let key = {
            let mut entries = lock(&slf.get().entries);
            entries.next += 1;
            let key = entries.next;
            entries.of.insert(key, (pending, done));
            key
        };
        Self::look(slf, key);
        key
    }

    /// Calls back no more.
    fn forget(&self, py: Python<'_>, key: u64) {
        let entry = lock(&self.entries).of.remove(&key);
        if let Some((pending, _done)) = entry {
            pending.get().cancel(py);
        }
    }

    /// Calls back for all that is done.
    fn run(slf: &Bound<'_, Self>) {
        let Some(shared) = slf.get().shared.get() else { return };
        shared.signal.clear();
        let ready = std::mem::take(&mut *lock(&shared.ready));
        for key in ready {
            Self::look(slf, key);
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Locked by nobody but who has the interpreter's lock, and does nothing else meanwhile.
        if let Ok(entries) = self.entries.try_lock() {
            for (pending, done) in entries.of.values() {
                visit.call(pending)?;
                visit.call(done)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let entries = std::mem::take(&mut lock(&self.entries).of);
        drop(entries);
    }
}
