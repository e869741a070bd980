//! What a user asks for: the verbs, and the options of an acquire.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_core::Stream;
use futures_lite::StreamExt;
use tracing::Instrument;

use crate::config::{Builder, Config};
use crate::engine::{Core, Handle, LEAVE_LIMIT};
use crate::error::{Error, ErrorKind, Result};
use crate::lease::Lease;
use crate::line::{OnWait, Terms, Waiting};
use crate::pursuit::{Begun, attempt, begin};
use crate::runtime::{Environment, block_on, see_through};
use crate::store::{Name, Record, Store, Token};

/// A manager of leases on one store. Cheap to clone; all clones are the same manager.
///
/// ```
/// # futures_lite::future::block_on(async {
/// use std::time::Duration;
/// let manager = lease_core::Manager::open("memory:").await?;
/// let lease = manager.acquire("nightly").ttl(Duration::from_secs(15)).timeout(Duration::from_secs(5)).await?;
/// println!("ours, with fencing token {}", lease.token());
/// lease.release().await?;
/// manager.close().await?;
/// # Ok::<_, lease_core::Error>(()) }).unwrap();
/// ```
#[derive(Clone)]
pub struct Manager {
    handle: Arc<Handle>,
}

impl Manager {
    /// Opens a manager on the store of a URL, such as `memory:` or `sqlite:jobs.db?ttl=30s`.
    ///
    /// # Errors
    /// `Invalid` for a wrong URL or option, `Denied` for a path that cannot be written, `Limit` when the system has no
    /// thread or descriptor left. A store that does not answer is no error before the first call that needs it.
    ///
    /// # Cancel safety
    /// Safe: nothing is left behind.
    pub async fn open(url: impl AsRef<str>) -> Result<Self> {
        Self::builder().url(url.as_ref()).open().await
    }

    /// Settings that a URL cannot carry, and options by method.
    pub fn builder() -> Builder {
        Builder::default()
    }

    pub(crate) fn start(config: Config, store: Arc<dyn Store>, env: Arc<dyn Environment>) -> Result<Self> {
        Config::check_ttl(config.ttl, store.limits())?;
        let core = Core::new(config, store, env);
        core.env.spawn(Box::pin(core.heartbeat.clone().drive()));
        Ok(Self { handle: Arc::new(Handle { core }) })
    }

    /// Waits until the name is yours. Await the builder it gives; options are its methods.
    ///
    /// # Errors
    /// `Timeout` with holder and place when the timeout ended first, `Unavailable` if the store did not answer until
    /// then, `Invalid` for a wrong name or ttl, `Denied`, `Incompatible`, `Closed`.
    ///
    /// # Cancel safety
    /// Safe: a dropped wait leaves no claim behind, and a lease that was on its way is released.
    pub fn acquire(&self, name: impl AsRef<str>) -> Acquire {
        let config = &self.handle.core.config;
        Acquire {
            operation: "acquire",
            manager: self.clone(),
            name: Name::new(name.as_ref()),
            ttl: config.ttl,
            timeout: config.timeout,
            owner: config.owner.clone(),
            on_wait: None,
        }
    }

    /// One attempt: `None` when somebody else holds the name or waits for it. Options as for [`acquire`](Self::acquire).
    ///
    /// # Errors
    /// As [`acquire`](Self::acquire), without `Timeout`. Bounded by the request timeout.
    ///
    /// # Cancel safety
    /// Safe: nothing is left behind.
    pub fn try_acquire(&self, name: impl AsRef<str>) -> TryAcquire {
        TryAcquire(Acquire { operation: "try_acquire", ..self.acquire(name) })
    }

    /// Who holds the name; `None` when it is free.
    ///
    /// # Errors
    /// `Unavailable`, `Denied`, `Invalid`, `Incompatible`, `Closed`.
    ///
    /// # Cancel safety
    /// Safe: it only reads.
    pub async fn inspect(&self, name: impl AsRef<str>) -> Result<Option<Record>> {
        let name = Name::new(name.as_ref()).map_err(|error| error.during("inspect", None))?;
        let asked = name.clone();
        self.ask("inspect", Some(&name), move |store| async move { store.inspect(&asked).await }).await
    }

    /// Everything held whose name begins with the prefix, sorted by name; the empty prefix lists all.
    ///
    /// # Errors
    /// As [`inspect`](Self::inspect).
    ///
    /// # Cancel safety
    /// Safe: it only reads.
    pub async fn list(&self, prefix: impl AsRef<str>) -> Result<Vec<Record>> {
        let prefix = prefix.as_ref().to_owned();
        self.ask("list", None, move |store| async move { store.list(&prefix).await }).await
    }

    /// The holder of the name now, and again whenever it changes. By watching; changes that follow each other faster
    /// than you read are merged into the last.
    ///
    /// # Errors
    /// As items, the kinds of [`inspect`](Self::inspect). The next item tries again, a second later; `Closed` and
    /// `Invalid` are the last.
    ///
    /// # Cancel safety
    /// Safe: a dropped stream leaves nothing behind, and a dropped wait for an item loses no change.
    ///
    /// ```
    /// # futures_lite::future::block_on(async {
    /// use futures_lite::StreamExt;
    /// # let manager = lease_core::Manager::open("memory:").await?;
    /// let mut changes = manager.watch("nightly");
    /// assert_eq!(changes.next().await.unwrap()?, lease_core::Change::Free);
    /// # Ok::<_, lease_core::Error>(()) }).unwrap();
    /// ```
    pub fn watch(&self, name: impl AsRef<str>) -> Changes {
        struct Watch {
            manager: Manager,
            seen: Option<Seen>,
            failed: bool,
            over: bool,
        }
        let watch = Watch { manager: self.clone(), seen: None, failed: false, over: false };
        let name = Name::new(name.as_ref());
        let changes = futures_lite::stream::unfold((watch, name), |(mut watch, name)| async move {
            if watch.over {
                return None;
            }
            let item = match &name {
                Ok(name) => watch.manager.next_change(name, &mut watch.seen, watch.failed).await,
                Err(error) => Err(error.clone().during("watch", None)),
            };
            watch.failed = item.is_err();
            watch.over = matches!(&item, Err(error) if matches!(error.kind(), ErrorKind::Closed | ErrorKind::Invalid));
            Some((item, (watch, name)))
        });
        // Whoever asks on after the last gets nothing, and no panic.
        Box::pin(changes.fuse())
    }

    async fn next_change(&self, name: &Name, seen: &mut Option<Seen>, failed: bool) -> Result<Change> {
        let core = self.handle.core.clone();
        let (wanted, last) = (name.clone(), *seen);
        let change = async move {
            core.open()?;
            if failed {
                core.env.sleep_until(core.env.now() + Duration::from_secs(1)).await;
            }
            loop {
                if let Some(last) = last {
                    core.store.changed(&wanted, last).await?;
                }
                let record = core.bounded(core.store.inspect(&wanted)).await?;
                if last != Some(record.as_ref().map(|record| record.token)) {
                    return Ok(record);
                }
            }
        };
        let record = self.handle.core.run(change).await.map_err(|error| error.during("watch", Some(name)))?;
        *seen = Some(record.as_ref().map(|record| record.token));
        Ok(record.map_or(Change::Free, Change::Held))
    }

    /// Takes the claim with that token out of its line, for operators. A holder is told when it renews, at the latest at
    /// half its ttl: until then it may overlap its successor, and only the fencing token protects.
    ///
    /// # Errors
    /// `NotFound` when no claim of that token is there, and as [`inspect`](Self::inspect). `Unavailable` is in doubt.
    ///
    /// # Cancel safety
    /// Dropped before it ends, it may or may not have been done.
    pub async fn break_lease(&self, name: impl AsRef<str>, token: Token) -> Result<()> {
        let name = Name::new(name.as_ref()).map_err(|error| error.during("break_lease", None))?;
        let asked = name.clone();
        let evicted =
            self.ask("break_lease", Some(&name), move |store| async move { store.evict(&asked, token).await });
        if evicted.await? {
            return Ok(());
        }
        let message = format!("no lease with token {token}: it was released, lost, or broken before");
        Err(Error::new(ErrorKind::NotFound, message).during("break_lease", Some(&name)))
    }

    /// Whether the store answers.
    ///
    /// # Errors
    /// As [`inspect`](Self::inspect).
    ///
    /// # Cancel safety
    /// Safe: it only reads.
    pub async fn ping(&self) -> Result<()> {
        self.ask("ping", None, |store| async move { store.ping().await }).await
    }

    /// Ends every wait with `Closed`, releases every lease, and leaves no task, thread, descriptor or claim behind.
    /// Finish the work first. Bounded by 5 s; harmless when repeated.
    ///
    /// # Errors
    /// `Unavailable`, with the outcome unknown, if the store could not be told of every release.
    ///
    /// # Cancel safety
    /// Once polled, closing goes on in the background though this is dropped.
    pub async fn close(&self) -> Result<()> {
        let core = self.handle.core.clone();
        let limit = core.env.now() + LEAVE_LIMIT;
        let closing = core.clone();
        let left = see_through(&core.env, true, async move { closing.shut().await }).await;
        core.env.stop(limit).await;
        left.map_err(|error| error.during("close", None))
    }

    async fn ask<T, F>(
        &self,
        operation: &'static str,
        name: Option<&Name>,
        question: impl FnOnce(Arc<dyn Store>) -> F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let core = self.handle.core.clone();
        let question = question(core.store.clone());
        let asking = async move {
            core.open()?;
            core.bounded(question).await
        };
        self.handle.core.run(asking).await.map_err(|error| error.during(operation, name))
    }
}

impl std::fmt::Debug for Manager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Manager").field("config", &self.handle.core.config).finish_non_exhaustive()
    }
}

/// The holder that a watch has told of; `None`: that the name was free.
type Seen = Option<Token>;

/// The holder of a name, as [`Manager::watch`] tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// Held, by this one.
    Held(Record),
    /// Nobody holds it.
    Free,
}

/// What [`Manager::watch`] gives.
pub type Changes = Pin<Box<dyn Stream<Item = Result<Change>> + Send>>;

/// An acquire that is being put together; await it.
#[must_use = "an acquire does nothing until it is awaited"]
pub struct Acquire {
    operation: &'static str,
    manager: Manager,
    name: Result<Name>,
    ttl: Duration,
    timeout: Option<Duration>,
    owner: Arc<str>,
    on_wait: Option<OnWait>,
}

impl std::fmt::Debug for Acquire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut acquire = f.debug_struct("Acquire");
        acquire
            .field("name", &self.name)
            .field("ttl", &self.ttl)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl Acquire {
    /// The lifetime without renewal, from the store's minimum to 24 h. Renewed at a third, lost at half.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// How long to wait: `None` for ever, zero for one attempt.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// The text shown to others; `host:pid` by default.
    pub fn owner(mut self, owner: impl AsRef<str>) -> Self {
        self.owner = owner.as_ref().into();
        self
    }

    /// Called once, when the wait has lasted for a second: says who holds the name, and the place in line. On the thread for
    /// callbacks, as those of [`Lease::on_end`].
    pub fn on_wait(mut self, callback: impl FnOnce(Waiting) + Send + 'static) -> Self {
        self.on_wait = Some(Box::new(callback));
        self
    }

    /// Any option by its key and text, as in a URL: `option("ttl", "15s")`.
    ///
    /// # Errors
    /// `Invalid` for an unknown key or a wrong value, and for what belongs to the whole manager.
    pub fn option(mut self, key: impl AsRef<str>, value: impl AsRef<str>) -> Result<Self> {
        let key = key.as_ref();
        let mut config = self.manager.handle.core.config.clone();
        config.set(key, value.as_ref()).map_err(|error| error.during(self.operation, None))?;
        if !matches!(key, "ttl" | "timeout" | "owner") {
            let message = format!("option {key:?} is the manager's: give it to open");
            return Err(Error::invalid(message).during(self.operation, None));
        }
        match key {
            "ttl" => self.ttl = config.ttl,
            "timeout" => self.timeout = config.timeout,
            _ => self.owner = config.owner,
        }
        Ok(self)
    }

    fn begin(self) -> Begun {
        let Self { operation, manager, name, ttl, timeout, owner, on_wait } = self;
        let handle = manager.handle;
        let name = match name {
            Ok(name) => name,
            Err(error) => return Begun::Done(Err(error.during(operation, None))),
        };
        let span = tracing::debug_span!("lease.acquire", ?name);
        let begun = span.in_scope(|| {
            Config::check_ttl(ttl, handle.core.store.limits())?;
            Config::check_owner(&owner)?;
            let terms = Terms { ttl, owner };
            if timeout == Some(Duration::ZERO) {
                let name = name.clone();
                return Ok(Begun::Waits(Box::pin(async move { attempt(handle, &name, terms).await })));
            }
            if on_wait.is_some() {
                handle.core.env.start_calls()?;
            }
            Ok(begin(handle, &name, terms, timeout, on_wait))
        });
        match begun.unwrap_or_else(|error| Begun::Done(Err(error))) {
            Begun::Done(done) => Begun::Done(done.map_err(|error| error.during(operation, Some(&name)))),
            Begun::Waits(wait) => Begun::Waits(Box::pin(async move {
                wait.instrument(span).await.map_err(|error| error.during(operation, Some(&name)))
            })),
        }
    }

    async fn acquire(self) -> Result<Lease> {
        match self.begin() {
            Begun::Done(done) => done,
            Begun::Waits(wait) => wait.await,
        }
    }

    pub(crate) fn acquire_blocking(self) -> Result<Lease> {
        match self.begin() {
            Begun::Done(done) => done,
            Begun::Waits(wait) => block_on(wait),
        }
    }
}

/// The future of an [`Acquire`] or a [`TryAcquire`].
pub type Acquiring<T> = Pin<Box<dyn Future<Output = Result<T>> + Send>>;

impl IntoFuture for Acquire {
    type Output = Result<Lease>;
    type IntoFuture = Acquiring<Lease>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.acquire())
    }
}

/// One attempt that is being put together; await it.
#[must_use = "an attempt does nothing until it is awaited"]
#[derive(Debug)]
pub struct TryAcquire(Acquire);

impl TryAcquire {
    /// As [`Acquire::ttl`].
    pub fn ttl(self, ttl: Duration) -> Self {
        Self(self.0.ttl(ttl))
    }

    /// As [`Acquire::owner`].
    pub fn owner(self, owner: impl AsRef<str>) -> Self {
        Self(self.0.owner(owner))
    }
}

impl IntoFuture for TryAcquire {
    type Output = Result<Option<Lease>>;
    type IntoFuture = Acquiring<Option<Lease>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            match self.0.timeout(Duration::ZERO).acquire().await {
                Ok(lease) => Ok(Some(lease)),
                Err(error) if error.kind() == ErrorKind::Timeout => Ok(None),
                Err(error) => Err(error),
            }
        })
    }
}
