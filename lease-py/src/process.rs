//! What belongs to the process that made it. A forked child has none of the threads behind it, so it must not touch it.

use lease_core::{Error, ErrorKind, Result, fork};

/// Something of this process. In a forked child it is never used, and never dropped.
pub(crate) struct Own<T> {
    value: Option<T>,
    forks: u32,
}

impl<T> Own<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: Some(value), forks: fork::count() }
    }

    /// `None` in a forked child.
    pub(crate) fn get(&self) -> Option<&T> {
        if self.forks == fork::count() { self.value.as_ref() } else { None }
    }

    /// In a forked child too, for what is plain memory.
    pub(crate) fn peek(&self) -> Option<&T> {
        self.value.as_ref()
    }

    /// `Forked` in a forked child.
    pub(crate) fn here(&self, what: &str) -> Result<&T> {
        self.get().ok_or_else(|| {
            let message = format!("the {what} belongs to the parent of this forked process: make a new one here");
            Error::new(ErrorKind::Forked, message)
        })
    }
}

impl<T> Drop for Own<T> {
    fn drop(&mut self) {
        if self.get().is_none() {
            std::mem::forget(self.value.take());
        }
    }
}
