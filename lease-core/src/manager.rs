//! Why does my waiter wait? The path of an acquire, and the end of everything.
//!
//! A waiter joins the local line of its name. One *pursuit* a name, started by the first waiter and ending with the last,
//! owns the manager's next claim in the store: it enters, waits for its turn, looks, and hands the lease to whoever is
//! first in the local line then. Everything a pursuit awaits is tended: it ends at once when nobody wants its claim any
//! more, and whatever ends it, the claim leaves the store's line unless it became a lease.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_core::Stream;
use futures_lite::future::or;
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tracing::Instrument;

use crate::clock::Moment;
use crate::config::{Builder, Config};
use crate::error::{EndReason, Error, ErrorKind, Result};
use crate::heartbeat::{Heartbeat, Pulse, jitter};
use crate::lease::Lease;
use crate::line::{Lines, Waiter, Wish};
use crate::observe;
use crate::runtime::{Environment, lock, run, start, until};
use crate::store::{Claim, ClaimId, Name, Place, Record, Standing, Store, Token};

/// How long `release` and `close` take at the most.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// What every task of a manager works on.
pub(crate) struct Core {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) env: Arc<dyn Environment>,
    pub(crate) heartbeat: Arc<Heartbeat>,
    config: Config,
    lines: Mutex<Lines>,
    closed: AtomicBool,
    /// Claims that are not leases, and claims that are leaving: the store is closed after the last.
    unsettled: TaskTracker,
}

/// Held by managers, leases and waiters; when the last is gone, so is the reason to run.
pub(crate) struct Handle {
    pub(crate) core: Arc<Core>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let core = self.core.clone();
        // When the last task has ended nothing keeps the environment, and its threads end by themselves.
        self.core.env.spawn(Box::pin(async move { drop(core.shut().await) }));
    }
}

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
        config.check_ttl(config.ttl, store.limits())?;
        let heartbeat = Heartbeat::new(store.clone(), env.clone(), config.request_timeout);
        env.spawn(Box::pin(heartbeat.clone().drive()));
        let (lines, closed, unsettled) = (Mutex::default(), AtomicBool::new(false), TaskTracker::new());
        let core = Core { store, env, heartbeat, config, lines, closed, unsettled };
        Ok(Self { handle: Arc::new(Handle { core: Arc::new(core) }) })
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
            manager: self.clone(),
            name: Name::new(name.as_ref()),
            ttl: config.ttl,
            timeout: config.timeout,
            owner: config.owner.clone(),
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
        TryAcquire(self.acquire(name))
    }

    /// Who holds the name; `None` when it is free.
    ///
    /// # Errors
    /// `Unavailable`, `Denied`, `Invalid`, `Incompatible`, `Closed`.
    ///
    /// # Cancel safety
    /// Safe: it only reads.
    pub async fn inspect(&self, name: impl AsRef<str>) -> Result<Option<Record>> {
        let name = Name::new(name.as_ref())?;
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
    /// than you read are merged into the last. After an error the next item tries again; it ends when the manager is
    /// closed.
    ///
    /// ```
    /// # futures_lite::future::block_on(async {
    /// use futures_lite::StreamExt;
    /// # let manager = lease_core::Manager::open("memory:").await?;
    /// let mut changes = std::pin::pin!(manager.watch("nightly"));
    /// assert_eq!(changes.next().await.unwrap()?, lease_core::Change::Free);
    /// # Ok::<_, lease_core::Error>(()) }).unwrap();
    /// ```
    pub fn watch(&self, name: &str) -> impl Stream<Item = Result<Change>> + Send + use<> {
        struct Watch {
            manager: Manager,
            seen: Option<Option<Token>>,
            failed: bool,
            over: bool,
        }
        let watch = Watch { manager: self.clone(), seen: None, failed: false, over: false };
        let name = Name::new(name);
        futures_lite::stream::unfold((watch, name), |(mut watch, name)| async move {
            if watch.over {
                return None;
            }
            let item = match &name {
                Ok(name) => watch.manager.next_change(name, &mut watch.seen, watch.failed).await,
                Err(error) => Err(error.duplicate().during("watch", None)),
            };
            watch.failed = item.is_err();
            watch.over = matches!(&item, Err(error) if matches!(error.kind(), ErrorKind::Closed | ErrorKind::Invalid));
            Some((item, (watch, name)))
        })
    }

    async fn next_change(&self, name: &Name, seen: &mut Option<Option<Token>>, failed: bool) -> Result<Change> {
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
        let record = run(&self.handle.core.env, change).await.map_err(|error| error.during("watch", Some(name)))?;
        *seen = Some(record.as_ref().map(|record| record.token));
        Ok(record.map_or(Change::Free, Change::Held))
    }

    /// Takes the name from the holder with that token, for operators. The holder is told when it renews, at the latest
    /// at half its ttl: until then it may overlap its successor, and only the fencing token protects.
    ///
    /// # Errors
    /// `NotFound` when no claim of that token is there, and as [`inspect`](Self::inspect). `Unavailable` is in doubt.
    ///
    /// # Cancel safety
    /// Dropped before it ends, it may or may not have been done.
    pub async fn break_lease(&self, name: impl AsRef<str>, token: Token) -> Result<()> {
        let name = Name::new(name.as_ref())?;
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
        let (told, outcome) = oneshot::channel();
        start(
            &*core.env,
            Box::pin(async move {
                drop(told.send(closing.shut().await));
            }),
        );
        let left = outcome.await.unwrap_or(Ok(()));
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
        run(&self.handle.core.env, asking).await.map_err(|error| error.during(operation, name))
    }
}

impl std::fmt::Debug for Manager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Manager").field("config", &self.handle.core.config).finish_non_exhaustive()
    }
}

/// The holder of a name, as [`Manager::watch`] tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// Held, by this one.
    Held(Record),
    /// Nobody holds it.
    Free,
}

/// An acquire that is being put together; await it.
#[must_use = "an acquire does nothing until it is awaited"]
#[derive(Debug)]
pub struct Acquire {
    manager: Manager,
    name: Result<Name>,
    ttl: Duration,
    timeout: Option<Duration>,
    owner: Arc<str>,
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

    async fn acquire(self) -> Result<Lease> {
        let core = &self.manager.handle.core;
        let name = self.name.map_err(|error| error.during("acquire", None))?;
        let checked =
            core.config.check_ttl(self.ttl, core.store.limits()).and_then(|()| Config::check_owner(&self.owner));
        checked.map_err(|error| error.during("acquire", Some(&name)))?;
        let wish = Wish { ttl: self.ttl, owner: self.owner };
        let handle = self.manager.handle.clone();
        let span = tracing::debug_span!("lease.acquire", %name);
        let acquired = async {
            match self.timeout {
                Some(Duration::ZERO) => attempt(handle, &name, wish).await,
                timeout => wait(handle, &name, wish, timeout).await,
            }
        };
        acquired.instrument(span).await.map_err(|error| error.during("acquire", Some(&name)))
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

/// Joins the local line and waits there. The caller polls only this: it holds no timer and no store.
async fn wait(handle: Arc<Handle>, name: &Name, wish: Wish, timeout: Option<Duration>) -> Result<Lease> {
    let core = handle.core.clone();
    let since = core.env.now();
    let (answer, lease) = oneshot::channel();
    let deadline = timeout.map(|timeout| since + timeout);
    let (joined, held) = {
        let mut lines = lock(&core.lines);
        let held = lines.held(name).map(|(pulse, since)| (pulse.place.token, since));
        (lines.join(name, Waiter { wish, since, deadline, handle, answer })?, held)
    };
    let (arrival, first) = joined;
    let _ticket = Ticket { core: &core, name, arrival };
    observe::waiters(&*core.env, 1.0);
    if let Some((token, at)) = held {
        observe::own_holder(name, token, since.since(at));
    }
    if first {
        start(&*core.env, Box::pin(pursue(core.clone(), name.clone())));
    }
    lease.await.unwrap_or_else(|_| Err(Error::closed()))
}

/// A waiter's place in the local line: given up when the waiter goes, however he goes.
struct Ticket<'a> {
    core: &'a Core,
    name: &'a Name,
    arrival: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let waiter = lock(&self.core.lines).depart(self.name, self.arrival);
        // Dropped outside the lock: it may hold the last handle.
        drop(waiter);
        observe::waiters(&*self.core.env, -1.0);
    }
}

/// One attempt past the local line, with a claim that does not queue.
async fn attempt(handle: Arc<Handle>, name: &Name, wish: Wish) -> Result<Lease> {
    let core = handle.core.clone();
    let timeout = |holder, place| {
        let error = Error::new(ErrorKind::Timeout, "held by another");
        Err(match holder {
            Some(holder) => error.with_holder(holder, place),
            None => error,
        })
    };
    if let Some((holder, place)) = lock(&core.lines).busy(name)? {
        return timeout(holder, place);
    }
    let name = name.clone();
    let work = async move {
        let core = handle.core.clone();
        let mut entry = Entry::new(core.clone(), &name, wish, false);
        let ahead = match entry.claim_once().await? {
            Standing::Head(token) => {
                let pulse = entry.pulse(token);
                while !core.heartbeat.hold(&pulse) {
                    core.heartbeat.renew_now(&pulse).await.map_err(|error| match error.kind() {
                        ErrorKind::Lost => Error::unavailable("the claim was lost while it was made"),
                        _ => error,
                    })?;
                }
                return entry.lease(handle, pulse);
            }
            Standing::Busy(ahead) | Standing::Behind(_, ahead) => ahead,
            Standing::Lost => return Err(Error::unavailable("the claim was lost while it was made")),
        };
        timeout(Some(crate::error::Holder::new(ahead.holder, ahead.owner)), ahead.count)
    };
    let bounded = core.clone();
    run(&core.env, async move { bounded.bounded(work).await }).await
}

/// Gets leases for the waiters of one name until none is left.
async fn pursue(core: Arc<Core>, name: Name) {
    loop {
        let Some(wish) = lock(&core.lines).next_wish(&name) else { return };
        let mut entry = Entry::new(core.clone(), &name, wish, true);
        if let Some(Err(error)) = core.tend(&name, &entry.wish(), entry.pursue()).await {
            let answer = lock(&core.lines).fail(&name, error);
            core.answer(answer);
        }
    }
}

/// One claim from its first attempt to enter until it is a lease. Whatever ends it before, it leaves the line.
struct Entry {
    core: Arc<Core>,
    claim: Claim,
    /// When it was first sent: an idempotent yes to a retry counts from here.
    first_sent: Option<Moment>,
    pulse: Option<Arc<Pulse>>,
    handed_out: bool,
    _unsettled: TaskTrackerToken,
}

impl Entry {
    fn new(core: Arc<Core>, name: &Name, wish: Wish, queues: bool) -> Self {
        let id = ClaimId(u128::from(core.env.random()) << 64 | u128::from(core.env.random()));
        let claim = Claim { name: name.clone(), id, ttl: wish.ttl, owner: wish.owner, queues };
        let _unsettled = core.unsettled.token();
        Self { core, claim, first_sent: None, pulse: None, handed_out: false, _unsettled }
    }

    fn wish(&self) -> Wish {
        Wish { ttl: self.claim.ttl, owner: self.claim.owner.clone() }
    }

    async fn claim_once(&mut self) -> Result<Standing> {
        let sent = self.core.env.now();
        self.first_sent.get_or_insert(sent);
        let core = self.core.clone();
        core.bounded(core.store.claim(sent, &self.claim)).await
    }

    /// From the first attempt to enter until a waiter has the lease. An error is final for the first waiter.
    async fn pursue(&mut self) -> Result<()> {
        let mut backoff = Backoff::default();
        let mut standing = loop {
            match self.claim_once().await {
                Ok(standing) => break standing,
                Err(error) => self.pause(&mut backoff, error).await?,
            }
        };
        loop {
            standing = match standing {
                Standing::Head(token) => {
                    let pulse = self.pulse(token);
                    if pulse.place.token != token || pulse.end_reason().is_some() {
                        return Ok(());
                    }
                    if self.core.heartbeat.hold(&pulse) {
                        self.hand_out(&pulse);
                        return Ok(());
                    }
                    match self.core.heartbeat.renew_now(&pulse).await {
                        Ok(()) => Standing::Head(token),
                        Err(_) if pulse.end_reason().is_some() => return Ok(()),
                        Err(error) => {
                            self.pause(&mut backoff, error).await?;
                            Standing::Head(token)
                        }
                    }
                }
                Standing::Behind(token, ahead) => {
                    let pulse = self.pulse(token);
                    self.core.heartbeat.keep(&pulse);
                    lock(&self.core.lines).saw(&self.claim.name, ahead.clone());
                    let turn = async { self.core.store.turn(&pulse.place, &ahead).await };
                    if let Err(error) = or(turn, async { Ok(pulse.news.notified().await) }).await {
                        self.pause(&mut backoff, error).await?;
                    }
                    self.look(&pulse, &mut backoff).await?
                }
                // Its id is used up: the next round of the pursuit claims anew.
                Standing::Lost | Standing::Busy(_) => return Ok(()),
            };
        }
    }

    /// Where the claim stands, asked until there is an answer or the claim is dead.
    async fn look(&self, pulse: &Arc<Pulse>, backoff: &mut Backoff) -> Result<Standing> {
        loop {
            if pulse.end_reason().is_some() {
                return Ok(Standing::Lost);
            }
            match self.core.bounded(self.core.store.look(&pulse.place)).await {
                Ok(standing) => return Ok(standing),
                Err(error) => self.pause(backoff, error).await?,
            }
        }
    }

    /// Waits before the next try, if another can help.
    async fn pause(&self, backoff: &mut Backoff, error: Error) -> Result<()> {
        if !error.is_retryable() {
            return Err(error);
        }
        let (env, now) = (&self.core.env, self.core.env.now());
        if lock(&self.core.lines).trouble(&self.claim.name, error.duplicate(), now) {
            observe::retrying(&**env, &self.claim.name, &error);
        }
        env.sleep_until(now + backoff.next(env.random())).await;
        Ok(())
    }

    /// What the heartbeat keeps of this claim, made when the token is first known.
    fn pulse(&mut self, token: Token) -> Arc<Pulse> {
        let confirmed = self.first_sent.expect("a claim that stands was sent");
        let place = || Place { claim: self.claim.clone(), token };
        self.pulse.get_or_insert_with(|| Pulse::new(place(), confirmed)).clone()
    }

    /// Gives the lease to the first waiter, if he still wants it; else the claim leaves.
    fn hand_out(&mut self, pulse: &Arc<Pulse>) {
        let taken = lock(&self.core.lines).take(&self.claim.name, &self.wish());
        if let Some(waiter) = taken {
            observe::granted(&*self.core.env, &pulse.place, self.core.env.now().since(waiter.since));
            let lease = self.lease(waiter.handle, pulse.clone());
            self.core.answer(Some((waiter.answer, lease)));
        }
    }

    /// The claim becomes a lease: from here on the lease's own drop cleans up.
    fn lease(&mut self, handle: Arc<Handle>, pulse: Arc<Pulse>) -> Result<Lease> {
        let now = self.core.env.now();
        lock(&self.core.lines).hold(&self.claim.name, &pulse, now)?;
        self.handed_out = true;
        Ok(Lease::new(handle, pulse, now))
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if self.handed_out {
            return;
        }
        if let Some(pulse) = &self.pulse {
            self.core.heartbeat.end(pulse, EndReason::Released);
        }
        if self.first_sent.is_some() {
            self.core.withdraw(&self.claim);
        }
    }
}

/// Waits between tries: 20 ms, doubled up to 2 s, the later half of each by chance.
#[derive(Default)]
struct Backoff(u32);

impl Backoff {
    fn next(&mut self, random: u64) -> Duration {
        let longest = (Duration::from_millis(20) * 2_u32.pow(self.0.min(16))).min(Duration::from_secs(2));
        self.0 += 1;
        longest / 2 + jitter(longest / 2, random)
    }
}

impl Core {
    fn open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) { Err(Error::closed()) } else { Ok(()) }
    }

    /// One store request, bounded by the request timeout.
    async fn bounded<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        let late = || Error::unavailable("the store did not answer within the request timeout").with_doubt();
        let at = self.env.now() + self.config.request_timeout;
        until(&*self.env, at, request).await.unwrap_or_else(|| Err(late()))
    }

    /// Runs the work while somebody first in the local line has this wish, and answers those whose time is up.
    async fn tend<T>(&self, name: &Name, wish: &Wish, work: impl Future<Output = T>) -> Option<T> {
        let tending = async {
            loop {
                let (interest, late) = lock(&self.lines).tend(name, wish, self.env.now());
                late.into_iter().for_each(|answer| self.answer(Some(answer)));
                let Some(interest) = interest else { return None };
                or(self.env.sleep_until(interest.next_deadline), interest.changed.notified()).await;
            }
        };
        or(async { Some(work.await) }, tending).await
    }

    /// Answers a waiter where user code may run.
    fn answer(&self, answer: Option<crate::line::Answer>) {
        if let Some((to, answer)) = answer {
            // One who has gone meanwhile drops the lease, which releases it.
            self.env.deliver(Box::new(move || drop(to.send(answer))));
        }
    }

    /// Forgets a lease that was given back.
    pub(crate) fn forget(&self, pulse: &Arc<Pulse>) {
        lock(&self.lines).release(&pulse.place.claim.name, pulse);
    }

    /// Takes a claim out of the line in the background: until it is certain, or the store has dropped it.
    pub(crate) fn withdraw(self: &Arc<Self>, claim: &Claim) {
        let (core, claim, unsettled) = (self.clone(), claim.clone(), self.unsettled.token());
        start(
            &*self.env,
            Box::pin(async move {
                let _unsettled = unsettled;
                if let Err(error) = core.depart(&claim, core.env.now() + claim.ttl).await {
                    observe::not_left(&*core.env, &claim.name, &error);
                }
            }),
        );
    }

    /// Takes a claim out of the line and waits for it, 5 s at most; goes on in the background if dropped.
    pub(crate) async fn leave(self: &Arc<Self>, claim: &Claim, operation: &'static str) -> Result<()> {
        let (told, outcome) = oneshot::channel();
        let (core, leaving, unsettled) = (self.clone(), claim.clone(), self.unsettled.token());
        let limit = self.env.now() + LEAVE_LIMIT;
        start(
            &*self.env,
            Box::pin(async move {
                let _unsettled = unsettled;
                drop(told.send(core.depart(&leaving, limit.max(core.env.now() + leaving.ttl)).await));
            }),
        );
        let env = self.env.clone();
        let waiting =
            async move { until(&*env, limit, outcome).await.and_then(Result::ok).unwrap_or_else(Core::no_leave) };
        run(&self.env, waiting).await.map_err(|error| error.during(operation, Some(&claim.name)))
    }

    fn no_leave() -> Result<()> {
        Err(Error::unavailable("the store could not be told within 5 s; the claim is left to expire").with_doubt())
    }

    async fn depart(&self, claim: &Claim, limit: Moment) -> Result<()> {
        let mut backoff = Backoff::default();
        loop {
            match self.bounded(self.store.leave(claim)).await {
                Ok(_left_or_gone) => return Ok(()),
                Err(error) if !error.is_retryable() => return Err(error.with_doubt()),
                Err(error) if self.env.now() >= limit => return Err(error.with_doubt()),
                Err(_) => self.env.sleep_until(self.env.now() + backoff.next(self.env.random())).await,
            }
        }
    }

    /// Ends everything: waits with `Closed`, leases by releasing them, then the heartbeat and the store.
    async fn shut(self: &Arc<Self>) -> Result<()> {
        let limit = self.env.now() + LEAVE_LIMIT;
        let (answers, held) = lock(&self.lines).close();
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        answers.into_iter().for_each(|answer| self.answer(Some(answer)));
        let mut leaving = Vec::new();
        for pulse in held {
            if self.heartbeat.end(&pulse, EndReason::Closed).first {
                let (core, (told, outcome)) = (self.clone(), oneshot::channel());
                leaving.push(outcome);
                self.env.spawn(Box::pin(async move {
                    drop(told.send(core.depart(&pulse.place.claim, limit).await));
                }));
            }
        }
        let all = async {
            let mut left = Ok(());
            for outcome in leaving {
                left = left.and(outcome.await.unwrap_or_else(|_| Self::no_leave()));
            }
            left
        };
        let left = until(&*self.env, limit, all).await.unwrap_or_else(Self::no_leave);
        self.unsettled.close();
        until(&*self.env, limit, self.unsettled.wait()).await;
        self.heartbeat.stop();
        until(&*self.env, limit, self.store.close()).await;
        left
    }
}
