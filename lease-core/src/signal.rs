//! Descriptors for event loops: readable once something is so.

use std::fmt;
use std::future::Future;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use rustix::event::{EventfdFlags, eventfd};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::error::{Error, ErrorKind, Result};
use crate::runtime::lock;

/// A descriptor that is readable from [`set`](Self::set) to [`clear`](Self::clear). As a waker, it is set.
///
/// ```
/// use lease_core::signal::Signal;
/// let signal = Signal::new()?;
/// signal.set(); // poll(2) reports it as readable
/// signal.clear();
/// # Ok::<_, lease_core::Error>(())
/// ```
pub struct Signal {
    number: RawFd,
    /// `None` once it is closed, though somebody may be about to set it: the number may be another's then.
    open: Mutex<Option<OwnedFd>>,
}

impl Signal {
    /// A signal that is not set.
    ///
    /// # Errors
    /// `Limit` when no descriptor is left.
    pub fn new() -> Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|error| {
            Error::new(ErrorKind::Limit, "cannot open an eventfd: raise the limit of open files").with_source(error)
        })?;
        Ok(Self { number: fd.as_raw_fd(), open: Mutex::new(Some(fd)) })
    }

    /// The descriptor, to be polled and nothing else.
    pub fn fd(&self) -> RawFd {
        self.number
    }

    /// Makes it readable.
    pub fn set(&self) {
        if let Some(fd) = &*lock(&self.open) {
            // Full is as readable as it can be.
            let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
        }
    }

    /// Makes it not readable.
    pub fn clear(&self) {
        if let Some(fd) = &*lock(&self.open) {
            let _ = rustix::io::read(fd, &mut [0; 8]);
        }
    }

    /// Closes the descriptor now, whoever else still knows of it.
    pub fn close(&self) {
        lock(&self.open).take();
    }
}

impl fmt::Debug for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signal").field("fd", &self.number).finish_non_exhaustive()
    }
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.set();
    }
}

/// A descriptor that is readable once a lease ended, and stays so. Whoever ends the lease makes it so: no thread waits for it.
pub struct EndSignal {
    signal: Signal,
    /// Kept, so that what is dropped in a wake-up is never the last.
    ended: CancellationToken,
    waiting: Mutex<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl EndSignal {
    pub(crate) fn new(ended: CancellationToken) -> Result<Arc<Self>> {
        let waiting = Mutex::new(Box::pin(ended.clone().cancelled_owned()));
        let this = Arc::new(Self { signal: Signal::new()?, ended, waiting });
        this.clone().wake();
        Ok(this)
    }

    /// The descriptor, to be polled and nothing else.
    pub fn fd(&self) -> RawFd {
        self.signal.fd()
    }

    /// Closes the descriptor now, whoever else still knows of it.
    pub fn close(&self) {
        self.signal.close();
    }
}

impl Wake for EndSignal {
    fn wake(self: Arc<Self>) {
        let waker = Waker::from(self.clone());
        if self.ended.is_cancelled()
            || lock(&self.waiting).as_mut().poll(&mut Context::from_waker(&waker)) == Poll::Ready(())
        {
            self.signal.set();
        }
    }
}

impl fmt::Debug for EndSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EndSignal").field("signal", &self.signal).finish_non_exhaustive()
    }
}
