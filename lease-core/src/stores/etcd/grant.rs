//! etcd's leases, and when one may be used. None is ever kept alive: a claim lives on by moving to a fresh one.
//!
//! - A grant counts from the instant before it was asked for. It may be named by a request sent at `s` only if it was then
//!   young enough to last for the claim's ttl: etcd takes a put onto a lease that has expired, and lets it vanish.
//! - A lease that is named by an attempt to enter is named by nothing else at that time: revoking it is how an attempt that
//!   was not answered is made harmless. It is used again only if all that named it was answered, and nothing hangs on it.
//! - Renewals share one lease, as long as it is young.
//! - Whoever may hang on a lease keeps it (`Arc`). When nobody does it goes back, or is revoked: empty leases that are left
//!   to expire hold up everybody's expiry.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use foldhash::HashMap;
use tokio_util::task::TaskTracker;

use super::client::Client;
use super::failure::{Cause, Failure};
use super::proto::{LeaseGrantRequest, LeaseRevokeRequest};
use crate::clock::Moment;
use crate::engine::Backoff;
use crate::error::{Error, ErrorKind};
use crate::runtime::{lock, until};

/// As many spare leases are kept for the claims of one ttl.
const SPARES: usize = 64;

/// A lease of etcd's.
pub(super) struct Grant {
    pub(super) id: i64,
    /// Just before it was asked for.
    asked: Moment,
    lasts: Duration,
    /// What it is for: claims of that ttl.
    ttl: Duration,
    /// Whether nothing that names it is without an answer, and nothing hangs on it: set by who used it.
    clean: AtomicBool,
    /// Whether it is gone in etcd.
    gone: AtomicBool,
    home: Weak<Grants>,
}

pub(super) struct Grants {
    client: Arc<Client>,
    /// By ttl.
    kept: Mutex<HashMap<Duration, Kept>>,
    revoking: TaskTracker,
    closed: AtomicBool,
    this: Weak<Self>,
}

#[derive(Default)]
struct Kept {
    /// For entering, oldest first.
    spares: Vec<Arc<Grant>>,
    refilling: bool,
    /// The one that renewals share.
    shared: Option<Arc<Grant>>,
}

impl Grant {
    /// Whether a request sent at that instant may name it.
    pub(super) fn may_be_named(&self, sent: Moment) -> bool {
        !self.gone.load(Ordering::Relaxed) && sent.since(self.asked) + self.ttl <= self.lasts
    }

    /// Nothing that names it is without an answer, and nothing hangs on it: another may use it.
    pub(super) fn free(&self) {
        self.clean.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_gone(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade() {
            home.take_back(self);
        }
    }
}

impl Grants {
    pub(super) fn new(client: Arc<Client>) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            client,
            kept: Mutex::default(),
            revoking: TaskTracker::new(),
            closed: AtomicBool::new(false),
            this: this.clone(),
        })
    }

    /// A lease for one claim to enter with.
    pub(super) async fn for_entry(&self, ttl: Duration, sent: Moment) -> Result<Arc<Grant>, Failure> {
        match self.at_hand(ttl, sent) {
            Some(grant) => Ok(grant),
            None => self.ask(ttl, ttl / 3).await,
        }
    }

    /// A spare one. Sees to it that there will be one the next time too.
    pub(super) fn at_hand(&self, ttl: Duration, sent: Moment) -> Option<Arc<Grant>> {
        let (old, spare) = {
            let mut kept = lock(&self.kept);
            let kept = kept.entry(ttl).or_default();
            let too_old = kept.spares.iter().take_while(|grant| !grant.may_be_named(sent)).count();
            let old: Vec<_> = kept.spares.drain(..too_old).collect();
            let spare = (!kept.spares.is_empty()).then(|| kept.spares.remove(0));
            // The next one should be at hand as well, and not about to be too old.
            let fresh = kept.spares.last().is_some_and(|grant| grant.may_be_named(sent + ttl / 6));
            if !fresh && !std::mem::replace(&mut kept.refilling, true) {
                self.refill(ttl);
            }
            (old, spare)
        };
        // Outside of the lock: they are revoked.
        drop(old);
        spare.inspect(|grant| grant.clean.store(false, Ordering::Relaxed))
    }

    /// The lease for all renewals that are sent now.
    pub(super) async fn for_renewal(&self, ttl: Duration, sent: Moment) -> Result<Arc<Grant>, Failure> {
        let shared = lock(&self.kept).get(&ttl).and_then(|kept| kept.shared.clone());
        if let Some(shared) = shared.filter(|shared| shared.may_be_named(sent)) {
            return Ok(shared);
        }
        let grant = self.ask(ttl, ttl / 20).await?;
        let before = lock(&self.kept).entry(ttl).or_default().shared.replace(grant.clone());
        // Outside of the lock: it may have been the last that knew it.
        drop(before);
        Ok(grant)
    }

    fn refill(&self, ttl: Duration) {
        let Some(this) = self.this.upgrade() else { return };
        let closed = self.client.closed.clone();
        let task = closed.run_until_cancelled_owned(async move {
            let grant = until(&*this.client.env, this.client.env.now() + ttl / 3, this.ask(ttl, ttl / 3)).await;
            let mut kept = lock(&this.kept);
            let kept = kept.entry(ttl).or_default();
            kept.refilling = false;
            if let Some(Ok(grant)) = grant {
                grant.free();
                kept.spares.push(grant);
            }
        });
        self.client.env.spawn(Box::pin(async move {
            task.await;
        }));
    }

    /// Asks etcd for one that can be named for `spare` at least.
    async fn ask(&self, ttl: Duration, spare: Duration) -> Result<Arc<Grant>, Failure> {
        let asked = self.client.env.now();
        // Whole seconds, rounded up.
        let wanted = i64::try_from((ttl + spare).as_nanos().div_ceil(1_000_000_000)).unwrap_or(i64::MAX);
        let answer = self.client.call(LeaseGrantRequest { ttl: wanted, id: 0 }).await?.answer;
        if answer.id == 0 || answer.ttl < wanted {
            return Err(Failure::unknown(format!("etcd granted no lease of {wanted} s: {:?}", answer.error)));
        }
        let lasts = Duration::from_secs(answer.ttl.unsigned_abs());
        Ok(Arc::new(Grant {
            id: answer.id,
            asked,
            lasts,
            ttl,
            clean: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            home: self.this.clone(),
        }))
    }

    /// Nobody hangs on it any more.
    fn take_back(&self, grant: &Grant) {
        if self.closed.load(Ordering::Relaxed) || grant.gone.load(Ordering::Relaxed) {
            return;
        }
        let now = self.client.env.now();
        if grant.clean.load(Ordering::Relaxed) && grant.may_be_named(now + grant.ttl / 12) {
            let mut kept = lock(&self.kept);
            let spares = &mut kept.entry(grant.ttl).or_default().spares;
            if spares.len() < SPARES {
                let again = Grant {
                    clean: AtomicBool::new(true),
                    gone: AtomicBool::new(false),
                    home: grant.home.clone(),
                    ..*grant
                };
                let at = spares.partition_point(|spare| spare.asked <= grant.asked);
                spares.insert(at, Arc::new(again));
                return;
            }
        }
        let (id, expires) = (grant.id, grant.asked + grant.lasts);
        let Some(this) = self.this.upgrade() else { return };
        let task = self.revoking.track_future(async move { this.revoke_until(id, expires).await });
        let closed = self.client.closed.clone();
        self.client.env.spawn(Box::pin(async move {
            closed.run_until_cancelled(task).await;
        }));
    }

    async fn revoke_until(&self, id: i64, expires: Moment) {
        let (env, mut backoff) = (&self.client.env, Backoff::default());
        // Once at least, though it has expired by our clock: a new leader may have given it more time.
        loop {
            let limit = expires.max(env.now() + Duration::from_secs(5));
            match until(&**env, limit, self.revoke(id)).await {
                Some(Err(failure)) if failure.error.is_retryable() && env.now() < expires => {
                    env.sleep_until(env.now() + backoff.next(env.random())).await;
                }
                // It is gone, or never will be; or it has expired.
                _ => return,
            }
        }
    }

    /// Revokes a lease, and with it all that hangs on it or comes to hang on it. That it is not there is a yes.
    pub(super) async fn revoke(&self, id: i64) -> Result<(), Failure> {
        match self.client.call(LeaseRevokeRequest { id }).await {
            Ok(_) => Ok(()),
            Err(failure) if failure.cause == Cause::NoLease => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    /// A request named a lease that is not there.
    pub(super) fn forget(&self, grant: &Arc<Grant>) {
        grant.is_gone();
        let mut kept = lock(&self.kept);
        let kept = kept.entry(grant.ttl).or_default();
        if kept.shared.as_ref().is_some_and(|shared| Arc::ptr_eq(shared, grant)) {
            kept.shared = None;
        }
    }

    /// Revokes what carries nothing, and waits for all that is being revoked, at most until then.
    pub(super) async fn close(&self, limit: Moment) {
        let kept = std::mem::take(&mut *lock(&self.kept));
        for (_, kept) in kept {
            kept.spares.iter().for_each(|spare| spare.clean.store(false, Ordering::Relaxed));
            // What claims still hang on goes with them: they keep it.
            drop(kept);
        }
        self.revoking.close();
        until(&*self.client.env, limit, self.revoking.wait()).await;
        self.closed.store(true, Ordering::Relaxed);
    }
}

/// How an error about a lease that is gone, again and again, is told.
pub(super) fn no_lease() -> Error {
    Error::new(ErrorKind::Unavailable, "etcd grants leases and does not know them: is its clock jumping?")
}
