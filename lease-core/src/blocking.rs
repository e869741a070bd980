//! The same verbs for threads: each call blocks until it is done.
//!
//! ```
//! use std::time::Duration;
//! use lease_core::blocking::Manager;
//!
//! let manager = Manager::open("memory:")?;
//! let lease = manager.acquire("nightly").timeout(Duration::from_secs(5)).wait()?;
//! lease.check()?;
//! lease.release()?;
//! manager.close()?;
//! # Ok::<_, lease_core::Error>(())
//! ```

use std::future::IntoFuture;
use std::ops::Deref;
use std::time::Duration;

use crate::config::Builder;
use crate::error::Result;
use crate::lease::Ended;
use crate::manager::Changes;
use crate::runtime::block_on;
use crate::store::{Record, Token};

/// [`crate::Manager`] for threads.
#[derive(Clone, Debug)]
pub struct Manager(crate::Manager);

impl Manager {
    /// As [`crate::Manager::open`].
    ///
    /// # Errors
    /// The same.
    pub fn open(url: impl AsRef<str>) -> Result<Self> {
        block_on(crate::Manager::open(url)).map(Self)
    }

    /// As [`crate::Manager::builder`], to be opened with [`Builder::open_blocking`].
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// As [`crate::Manager::acquire`]; [`wait`](Acquire::wait) does it.
    pub fn acquire(&self, name: impl AsRef<str>) -> Acquire {
        Acquire(self.0.acquire(name))
    }

    /// As [`crate::Manager::try_acquire`], with the manager's own ttl and owner. For others: a timeout of zero.
    ///
    /// # Errors
    /// The same.
    pub fn try_acquire(&self, name: impl AsRef<str>) -> Result<Option<Lease>> {
        let lease = block_on(self.0.try_acquire(name).into_future())?;
        Ok(lease.map(Lease))
    }

    /// As [`crate::Manager::inspect`].
    ///
    /// # Errors
    /// The same.
    pub fn inspect(&self, name: impl AsRef<str>) -> Result<Option<Record>> {
        block_on(self.0.inspect(name))
    }

    /// As [`crate::Manager::list`].
    ///
    /// # Errors
    /// The same.
    pub fn list(&self, prefix: impl AsRef<str>) -> Result<Vec<Record>> {
        block_on(self.0.list(prefix))
    }

    /// As [`crate::Manager::watch`]: each step of the iterator blocks until there is a change.
    pub fn watch(&self, name: impl AsRef<str>) -> futures_lite::stream::BlockOn<Changes> {
        futures_lite::stream::block_on(self.0.watch(name))
    }

    /// As [`crate::Manager::break_lease`].
    ///
    /// # Errors
    /// The same.
    pub fn break_lease(&self, name: impl AsRef<str>, token: Token) -> Result<()> {
        block_on(self.0.break_lease(name, token))
    }

    /// As [`crate::Manager::ping`].
    ///
    /// # Errors
    /// The same.
    pub fn ping(&self) -> Result<()> {
        block_on(self.0.ping())
    }

    /// As [`crate::Manager::close`].
    ///
    /// # Errors
    /// The same.
    pub fn close(&self) -> Result<()> {
        block_on(self.0.close())
    }
}

impl From<crate::Manager> for Manager {
    fn from(manager: crate::Manager) -> Self {
        Self(manager)
    }
}

/// [`crate::Acquire`] for threads.
#[must_use = "an acquire does nothing until `wait` is called"]
#[derive(Debug)]
pub struct Acquire(crate::Acquire);

impl Acquire {
    /// As [`crate::Acquire::ttl`].
    pub fn ttl(self, ttl: Duration) -> Self {
        Self(self.0.ttl(ttl))
    }

    /// As [`crate::Acquire::timeout`].
    pub fn timeout(self, timeout: impl Into<Option<Duration>>) -> Self {
        Self(self.0.timeout(timeout))
    }

    /// As [`crate::Acquire::owner`].
    pub fn owner(self, owner: impl AsRef<str>) -> Self {
        Self(self.0.owner(owner))
    }

    /// Waits until the name is yours.
    ///
    /// # Errors
    /// As [`crate::Manager::acquire`].
    pub fn wait(self) -> Result<Lease> {
        self.0.acquire_blocking().map(Lease)
    }
}

/// [`crate::Lease`] for threads. By [`Deref`] it has `token`, `name`, `is_held`, `check`, `remaining` and all else that
/// does not wait.
#[must_use = "a lease that is dropped is released"]
#[derive(Debug)]
pub struct Lease(crate::Lease);

impl Lease {
    /// As [`crate::Lease::cancelled`]: blocks until the end.
    pub fn cancelled(&self) -> Ended {
        block_on(self.0.cancelled())
    }

    /// As [`crate::Lease::confirm`].
    ///
    /// # Errors
    /// The same.
    pub fn confirm(&self) -> Result<()> {
        block_on(self.0.confirm())
    }

    /// As [`crate::Lease::release`].
    ///
    /// # Errors
    /// The same.
    pub fn release(self) -> Result<()> {
        self.0.give_back_blocking()
    }
}

impl Deref for Lease {
    type Target = crate::Lease;

    fn deref(&self) -> &crate::Lease {
        &self.0
    }
}
