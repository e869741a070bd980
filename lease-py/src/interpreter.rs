//! The interpreter's lock, and its end.
//!
//! Invariant: once the interpreter began to end, no thread but the one that ends it takes the lock. `CPython` would end such a
//! thread by unwinding through our frames, which aborts the process. A thread that waits in a call of ours when the end
//! begins never comes back: it is one that Python does not wait for (a daemon), and goes with the process.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use lease_core::fork;
use pyo3::exceptions::{PyImportError, PyKeyboardInterrupt};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

/// How long the end waits for those who hold or await the lock: a callback that does not return may be one of them.
const EXIT_LIMIT: Duration = Duration::from_secs(5);

/// How many are about to take the lock, or have it on a thread of the library. The high half is the number of forks, so that a
/// child begins with none.
static INSIDE: AtomicU64 = AtomicU64::new(0);
/// The number of forks, and one, of the process whose interpreter ends: a child's does not.
static ENDING: AtomicU32 = AtomicU32::new(0);
static ENDED_BY: Mutex<Option<ThreadId>> = Mutex::new(None);
static LEFT: Condvar = Condvar::new();

/// Leave to take the lock, until dropped.
struct Inside {
    forks: u64,
}

fn forks() -> u64 {
    u64::from(fork::count()) << 32
}

impl Inside {
    /// `None` once the end began.
    fn enter() -> Option<Self> {
        let forks = forks();
        let enter = |inside: u64| Some(if inside >> 32 == forks >> 32 { inside + 1 } else { forks + 1 });
        let _ = INSIDE.fetch_update(Ordering::SeqCst, Ordering::SeqCst, enter);
        let inside = Self { forks };
        // Counted before it is asked: the end sees one of the two.
        if is_ending() { None } else { Some(inside) }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let leave = |inside: u64| (inside >> 32 == self.forks >> 32).then(|| inside - 1);
        let _ = INSIDE.fetch_update(Ordering::SeqCst, Ordering::SeqCst, leave);
        if has_begun_to_end() {
            let _ended_by = ENDED_BY.lock().unwrap_or_else(PoisonError::into_inner);
            LEFT.notify_all();
        }
    }
}

fn has_begun_to_end() -> bool {
    ENDING.load(Ordering::SeqCst) == fork::count() + 1
}

fn is_ending_thread() -> bool {
    *ENDED_BY.lock().unwrap_or_else(PoisonError::into_inner) == Some(thread::current().id())
}

/// Refuses a second interpreter of this process: what is static here, classes among it, would be shared.
pub(crate) fn only_one(py: Python<'_>) -> PyResult<()> {
    static FIRST: AtomicUsize = AtomicUsize::new(0);
    // Each has a module `sys` of its own.
    let this = py.import("sys")?.as_ptr().addr();
    match FIRST.compare_exchange(0, this, Ordering::Relaxed, Ordering::Relaxed) {
        Err(first) if first != this => Err(PyImportError::new_err(
            "lease does not support subinterpreters: import it in one interpreter of a process, or use processes",
        )),
        _ => Ok(()),
    }
}

/// Runs something without the interpreter's lock.
pub(crate) fn detached<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    let (done, inside) = py.detach(|| {
        let done = work();
        let Some(inside) = Inside::enter() else { gone(done) };
        (done, inside)
    });
    drop(inside);
    done
}

/// Whether the interpreter ends, and not on this thread: then nobody will ever get what is waited for here.
pub(crate) fn is_ending() -> bool {
    has_begun_to_end() && !is_ending_thread()
}

/// Gives up what nobody will get, which withdraws a claim and releases a lease, and never comes back.
pub(crate) fn gone<T>(kept: T) -> ! {
    drop(kept);
    loop {
        thread::park();
    }
}

/// Runs something with the interpreter's lock, on a thread that may be the library's. Not once the end began.
pub(crate) fn attached(work: impl FnOnce(Python<'_>)) {
    if let Some(_inside) = Inside::enter() {
        Python::try_attach(|py| {
            // This may be within a deallocation, while an exception passes: Python code must not run with it set.
            let passing = PyErr::take(py);
            work(py);
            if let Some(passing) = passing {
                passing.restore(py);
            }
        });
    }
}

/// Reports an exception that nobody is there to catch. A Ctrl-C is raised again, where somebody is.
pub(crate) fn unraisable(py: Python<'_>, outcome: PyResult<Bound<'_, PyAny>>, culprit: Option<&Bound<'_, PyAny>>) {
    let Err(error) = outcome else { return };
    let again = || py.import("_thread")?.call_method0("interrupt_main");
    if !(error.is_instance_of::<PyKeyboardInterrupt>(py) && again().is_ok()) {
        error.write_unraisable(py, culprit);
    }
}

/// Python code may run signal handlers on its main thread only.
pub(crate) fn is_main_thread(py: Python<'_>) -> PyResult<bool> {
    static THREADING: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let threading = THREADING.get_or_try_init(py, || py.import("threading").map(Bound::unbind))?.bind(py);
    let main = threading.call_method0("main_thread")?.getattr("ident")?;
    main.eq(threading.call_method0("get_ident")?)
}

/// The last thing that is called before the interpreter ends.
#[pyfunction(name = "_at_exit")]
pub(crate) fn at_exit(py: Python<'_>) {
    *ENDED_BY.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread::current().id());
    ENDING.store(fork::count() + 1, Ordering::SeqCst);
    py.detach(|| {
        crate::wait::wake_all();
        let ended_by = ENDED_BY.lock().unwrap_or_else(PoisonError::into_inner);
        let is_inside = |_: &mut Option<ThreadId>| {
            let inside = INSIDE.load(Ordering::SeqCst);
            inside >> 32 == forks() >> 32 && inside & u64::from(u32::MAX) > 0
        };
        drop(LEFT.wait_timeout_while(ended_by, EXIT_LIMIT, is_inside));
    });
}
