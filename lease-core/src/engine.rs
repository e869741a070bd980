//! What every task of a manager works on, and how anything leaves: releasing, withdrawing, closing.
//!
//! Whatever ends a claim, it leaves the store's line for certain: tried until the store has answered or its ttl has
//! passed, in the background where nobody waits for it. Closing waits for the last of these before it closes the store.

use std::future::Future;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::error::{EndReason, Error, ErrorKind, Result};
use crate::heartbeat::{Heartbeat, Pulse, jitter};
use crate::line::{Answer, Lines, Waiter};
use crate::observe;
use crate::runtime::{Environment, lock, run, start, until};
use crate::store::{Claim, ClaimId, Store};

/// How long `release` and `close` take at the most.
pub(crate) const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// What every task of a manager works on.
pub(crate) struct Core {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) env: Arc<dyn Environment>,
    pub(crate) heartbeat: Arc<Heartbeat>,
    pub(crate) config: Config,
    pub(crate) lines: Mutex<Lines>,
    closed: AtomicBool,
    /// Cancelled when the call that closes has come to its end.
    shut: CancellationToken,
    /// How many [`Unsettled`] there are.
    unsettled: AtomicUsize,
    /// Told when there are none any more and the manager is closed.
    settled: Notify,
    ids: (u128, AtomicU64),
}

/// A claim that is no lease, or one that is leaving: the store is closed after the last.
pub(crate) struct Unsettled<C: Deref<Target = Core>>(C);

impl<C: Deref<Target = Core>> Unsettled<C> {
    pub(crate) fn new(core: C) -> Self {
        core.unsettled.fetch_add(1, Ordering::SeqCst);
        Self(core)
    }
}

impl<C: Deref<Target = Core>> Drop for Unsettled<C> {
    fn drop(&mut self) {
        if self.0.unsettled.fetch_sub(1, Ordering::SeqCst) == 1 && self.0.closed.load(Ordering::SeqCst) {
            self.0.settled.notify_waiters();
        }
    }
}

impl<C: Deref<Target = Core>> Deref for Unsettled<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.0
    }
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

impl Core {
    pub(crate) fn new(config: Config, store: Arc<dyn Store>, env: Arc<dyn Environment>) -> Arc<Self> {
        let heartbeat = Heartbeat::new(store.clone(), env.clone(), config.request_timeout);
        let (lines, closed, unsettled) = (Mutex::default(), AtomicBool::new(false), AtomicUsize::new(0));
        let (shut, settled) = (CancellationToken::new(), Notify::new());
        let first_id = u128::from(env.random()) << 64 | u128::from(env.random());
        let ids = (first_id, AtomicU64::new(0));
        Arc::new(Self { store, env, heartbeat, config, lines, closed, shut, unsettled, settled, ids })
    }

    /// An id that no claim has had: the manager's 128 random bits, counted up.
    pub(crate) fn new_id(&self) -> ClaimId {
        let (first, used) = &self.ids;
        ClaimId(first.wrapping_add(u128::from(used.fetch_add(1, Ordering::Relaxed))))
    }

    /// Fails once the manager is closed. If it does not, closing waits for every [`Unsettled`] that was there when it was asked.
    pub(crate) fn open(&self) -> Result<()> {
        if self.closed.load(Ordering::SeqCst) { Err(Error::closed()) } else { Ok(()) }
    }

    /// One store request, bounded by the request timeout.
    pub(crate) async fn bounded<T>(&self, request: impl Future<Output = Result<T>>) -> Result<T> {
        let late = || Error::unavailable("the store did not answer within the request timeout").with_doubt();
        let at = self.env.now() + self.config.request_timeout;
        until(&*self.env, at, request).await.unwrap_or_else(|| Err(late()))
    }

    /// Answers a waiter where user code may run.
    pub(crate) fn answer(&self, answer: Answer) {
        let (Waiter { answer: to, on_wait, .. }, answer) = answer;
        // What it has captured is the user's.
        if on_wait.is_some() {
            self.env.deliver(Box::new(move || drop(on_wait)));
        }
        // One who has gone meanwhile drops the lease, which releases it.
        to.answer(&*self.env, answer);
    }

    /// Forgets a lease that was given back.
    pub(crate) fn forget(&self, pulse: &Arc<Pulse>) {
        lock(&self.lines).release(&pulse.place.claim.name, pulse);
    }

    /// Runs what the caller waits for; dropping that drops the work.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let outcome = run(&self.env, self.store.answers_at_once(), work).await;
        outcome.map_err(
            |error| if error.kind() == ErrorKind::Internal { self.open().err().unwrap_or(error) } else { error },
        )
    }

    /// Takes a claim out of the line: until it is certain, or the store has dropped it, whether anybody waits for it or not.
    fn leaving(self: &Arc<Self>, claim: &Claim) -> oneshot::Receiver<Result<()>> {
        let (told, outcome) = oneshot::channel();
        let (core, claim) = (Unsettled::new(self.clone()), claim.clone());
        start(
            &*self.env,
            self.store.answers_at_once(),
            Box::pin(async move {
                let left = core.depart(&claim).await;
                if let Err(error) = &left {
                    observe::not_left(&*core.env, &claim.name, error);
                }
                drop(told.send(left));
            }),
        );
        outcome
    }

    /// Takes a claim out of the line in the background.
    pub(crate) fn withdraw(self: &Arc<Self>, claim: &Claim) {
        drop(self.leaving(claim));
    }

    /// Takes a claim out of the line and waits for it, 5 s at most; goes on in the background if dropped.
    pub(crate) async fn leave(self: &Arc<Self>, claim: &Claim) -> Result<()> {
        let (env, limit) = (self.env.clone(), self.env.now() + LEAVE_LIMIT);
        let mut outcome = self.leaving(claim);
        if let Ok(left) = outcome.try_recv() {
            return left;
        }
        let waiting =
            async move { until(&*env, limit, outcome).await.and_then(Result::ok).unwrap_or_else(Core::no_leave) };
        self.run(waiting).await
    }

    fn no_leave() -> Result<()> {
        Err(Error::unavailable("the store could not be told within 5 s; what it is not told later expires")
            .with_doubt())
    }

    async fn depart(&self, claim: &Claim) -> Result<()> {
        let (mut backoff, limit) = (Backoff::default(), self.env.now() + LEAVE_LIMIT.max(claim.ttl));
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
    pub(crate) async fn shut(self: &Arc<Self>) -> Result<()> {
        let limit = self.env.now() + LEAVE_LIMIT;
        // Those that have not ended by themselves when this is over are dropped.
        let (answers, held, pursuits) = lock(&self.lines).close();
        for (changed, _) in &pursuits {
            changed.notify_one();
        }
        if self.closed.swap(true, Ordering::SeqCst) {
            // Another call closes, perhaps on a thread that the environment does not know: stopping it would cut that off.
            until(&*self.env, limit, self.shut.cancelled()).await;
            return Ok(());
        }
        let _shut = self.shut.clone().drop_guard();
        for answer in answers {
            self.answer(answer);
        }
        let mut leaving = Vec::new();
        for pulse in held {
            let end = self.heartbeat.end(&pulse, EndReason::Closed);
            // The claim of one that was lost is left to expire, here too.
            if end.first && !end.reason.is_loss() {
                leaving.push(self.leaving(&pulse.place.claim));
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
        let settled = async {
            loop {
                let settled = self.settled.notified();
                if self.unsettled.load(Ordering::SeqCst) == 0 {
                    return;
                }
                settled.await;
            }
        };
        until(&*self.env, limit, settled).await;
        self.heartbeat.stop();
        until(&*self.env, limit, self.store.close()).await;
        left
    }
}

/// Waits between tries: 20 ms, doubled up to 2 s, the later half of each by chance.
#[derive(Default)]
pub(crate) struct Backoff(u32);

impl Backoff {
    pub(crate) fn next(&mut self, random: u64) -> Duration {
        let longest = (Duration::from_millis(20) * 2_u32.pow(self.0.min(16))).min(Duration::from_secs(2));
        self.0 += 1;
        longest / 2 + jitter(longest / 2, random)
    }
}
