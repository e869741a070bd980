//! What a forked child inherits, and what of it is whole.
//!
//! A child has its parent's memory and descriptors, but none of its threads and none of its record locks. So it may use
//! nothing that a thread of its parent was in the midst of. The bindings, whose users fork, enable the feature `atfork`: then
//! a fork waits until no thread is inside of what a child has to take apart, and children are counted.
//!
//! Invariant: who keeps a fork waiting waits for nothing that another process has, and runs no user code.

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

/// Shared by all who are inside of what a child inherits as it is at that moment: tables of this process, and `SQLite`.
static STILL: RwLock<()> = RwLock::new(());

/// Keeps a fork waiting. Never twice on one thread.
pub(crate) fn keep_waiting() -> RwLockReadGuard<'static, ()> {
    STILL.read().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this process was forked by one that held still, so that what it inherited is whole.
#[cfg(feature = "sqlite")]
pub(crate) fn is_whole() -> bool {
    #[cfg(feature = "atfork")]
    return handlers::is_whole();
    #[cfg(not(feature = "atfork"))]
    return false;
}

#[cfg(feature = "atfork")]
pub use handlers::{count, is_noticed, undisturbed};

#[cfg(feature = "atfork")]
#[allow(unsafe_code, reason = "pthread_atfork, which nothing safe offers")]
mod handlers {
    use std::cell::RefCell;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::sync::{PoisonError, RwLockWriteGuard};

    use super::STILL;
    use crate::error::{Error, ErrorKind, Result};

    /// How many forks this process is away from the one that loaded the library.
    static COUNT: AtomicU32 = AtomicU32::new(0);
    /// The child whose parent held still.
    static WHOLE: AtomicU32 = AtomicU32::new(0);
    static REGISTERED: AtomicBool = AtomicBool::new(false);

    thread_local! {
        /// Kept by the thread that forks, while it does.
        static HELD_STILL: RefCell<Option<RwLockWriteGuard<'static, ()>>> = const { RefCell::new(None) };
    }

    /// Registered when the library is loaded: so before handlers of the program, which then run while this lock is not held,
    /// and may call the library.
    #[used]
    #[unsafe(link_section = ".init_array")]
    static AT_LOAD: extern "C" fn() = at_load;

    extern "C" fn at_load() {
        // A thread at its very end, which has no such places any more, forks without.
        extern "C" fn before() {
            let _ = HELD_STILL.try_with(|still| {
                *still.borrow_mut() = Some(STILL.write().unwrap_or_else(PoisonError::into_inner));
            });
        }
        extern "C" fn after() {
            let _ = HELD_STILL.try_with(RefCell::take);
        }
        extern "C" fn in_child() {
            COUNT.fetch_add(1, Ordering::Relaxed);
            let held_still = HELD_STILL.try_with(RefCell::take).is_ok_and(|still| still.is_some());
            WHOLE.store(if held_still { std::process::id() } else { 0 }, Ordering::Relaxed);
        }
        // SAFETY: the handlers take and give back a lock of this thread's, and store to atomics.
        let failed = unsafe { libc::pthread_atfork(Some(before), Some(after), Some(in_child)) };
        REGISTERED.store(failed == 0, Ordering::Relaxed);
    }

    /// How many forks this process is away from the one that loaded the library. What was made under another number belongs
    /// to a parent.
    pub fn count() -> u32 {
        COUNT.load(Ordering::Relaxed)
    }

    /// Keeps a fork waiting meanwhile: for what a child would inherit half done. The work waits for nothing, and is no user code.
    pub fn undisturbed<T>(work: impl FnOnce() -> T) -> T {
        let _still = super::keep_waiting();
        work()
    }

    /// Whether a fork would be counted.
    ///
    /// # Errors
    /// `Limit` when it would not: then nothing should be given that a child could mistake for its own.
    pub fn is_noticed() -> Result<()> {
        if REGISTERED.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Limit, "no memory was left for a handler of fork when the library was loaded"))
    }

    #[cfg(feature = "sqlite")]
    pub(super) fn is_whole() -> bool {
        WHOLE.load(Ordering::Relaxed) == std::process::id()
    }
}
