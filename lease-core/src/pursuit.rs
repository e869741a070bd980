//! Why does my waiter wait? The path of an acquire.
//!
//! A waiter joins the local line of its name. One *pursuit* a name, started by the first waiter and ending with the last,
//! owns the manager's next claim in the store: it enters, waits for its turn, looks, and hands the lease to whoever is
//! first in the local line then. Everything a pursuit awaits is tended: it ends at once when nobody wants its claim any
//! more, and whatever ends it, the claim leaves the store's line unless it became a lease.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_lite::future::or;
use tokio::sync::oneshot;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::clock::Moment;
use crate::engine::{Backoff, Core, Handle};
use crate::error::{EndReason, Error, ErrorKind, Holder, Result};
use crate::heartbeat::Pulse;
use crate::lease::Lease;
use crate::line::{OnWait, Terms, Waiter};
use crate::observe;
use crate::runtime::{lock, start};
use crate::store::{Claim, Name, Place, Standing, Token};

/// A wait that was not disturbed for so long begins anew with short pauses when it is.
const QUIET: Duration = Duration::from_secs(10);

/// Joins the local line and waits there. The caller polls only this: it holds no timer and no store.
pub(crate) async fn wait(
    handle: Arc<Handle>,
    name: &Name,
    terms: Terms,
    timeout: Option<Duration>,
    on_wait: Option<OnWait>,
) -> Result<Lease> {
    let core = handle.core.clone();
    let since = core.env.now();
    let (answer, lease) = oneshot::channel();
    let deadline = timeout.map(|timeout| since + timeout);
    let (joined, held) = {
        let mut lines = lock(&core.lines);
        let held = lines.own_holder(name, since);
        (lines.join(name, Waiter { terms, since, deadline, on_wait, handle, answer })?, held)
    };
    let (arrival, first) = joined;
    let _ticket = Ticket { core: &core, name, arrival };
    observe::waiters(&*core.env, 1);
    if let Some((token, held_for)) = held {
        observe::own_holder(name, token, held_for);
    }
    if first {
        start(&*core.env, core.store.answers_at_once(), Box::pin(pursue(core.clone(), name.clone())));
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
        observe::waiters(&*self.core.env, -1);
    }
}

/// One attempt past the local line, bounded by the request timeout.
pub(crate) async fn attempt(handle: Arc<Handle>, name: &Name, terms: Terms) -> Result<Lease> {
    let core = handle.core.clone();
    lock(&core.lines).check_free(name)?;
    let (bounded, name) = (core.clone(), name.clone());
    let attempt = async move { bounded.bounded(attempt_in_store(handle, name, terms)).await };
    core.run(Box::pin(attempt)).await
}

/// The same with a claim that does not queue.
async fn attempt_in_store(handle: Arc<Handle>, name: Name, terms: Terms) -> Result<Lease> {
    let core = handle.core.clone();
    let since = core.env.now();
    let mut entry = Entry::new(core.clone(), &name, terms, false);
    let lost = || Error::unavailable("the claim was lost while it was made");
    match entry.claim_once().await? {
        Standing::Head(token) => {
            let pulse = entry.pulse(token);
            while !core.heartbeat.hold(&pulse) {
                let renewed = core.heartbeat.renew_now(&pulse).await;
                renewed.map_err(|error| if error.kind() == ErrorKind::Lost { lost() } else { error })?;
            }
            entry.lease(handle, pulse, since)
        }
        Standing::Busy(ahead) | Standing::Behind(_, ahead) => {
            let holder = Holder::new(ahead.holder, ahead.owner);
            Err(Error::new(ErrorKind::Timeout, "held by another").with_holder(holder, ahead.count))
        }
        Standing::Lost => Err(lost()),
    }
}

/// Gets leases for the waiters of one name until none is left.
async fn pursue(core: Arc<Core>, name: Name) {
    let mut pursuit = Pursuit { core: &core, name: &name, over: false };
    loop {
        let Some(terms) = lock(&core.lines).next_terms(&name) else {
            pursuit.over = true;
            return;
        };
        let mut entry = Entry::new(core.clone(), &name, terms, true);
        if let Some(Err(error)) = tend(&core, &name, &entry.terms(), entry.pursue()).await {
            let failed = lock(&core.lines).fail(&name, error);
            if let Some(answer) = failed {
                core.answer(answer);
            }
        }
    }
}

/// A pursuit that runs. One that is dropped before it is over, by a panic of a store or because the library's thread
/// ends, must not leave its waiters waiting.
struct Pursuit<'a> {
    core: &'a Core,
    name: &'a Name,
    over: bool,
}

impl Drop for Pursuit<'_> {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let stranded = lock(&self.core.lines).abandon(self.name);
        for waiter in stranded {
            let error = self.core.open().err();
            let error = error.unwrap_or_else(Error::dropped);
            self.core.answer((waiter.answer, Err(error)));
        }
    }
}

/// Runs the work while somebody first in the local line has these terms, and answers those whose time is up.
async fn tend<T>(core: &Core, name: &Name, terms: &Terms, work: impl Future<Output = T>) -> Option<T> {
    let tending = async {
        loop {
            let now = core.env.now();
            let (telling, (interest, late)) = {
                let mut lines = lock(&core.lines);
                (lines.long_waiting(name, now), lines.tend(name, terms, now))
            };
            for (waiting, on_wait) in telling {
                observe::waiting(&*core.env, &waiting);
                if let Some(on_wait) = on_wait {
                    drop(core.env.call(Box::new(move || on_wait(waiting))));
                }
            }
            for answer in late {
                core.answer(answer);
            }
            let interest = interest?;
            or(core.env.sleep_until(interest.look_at), interest.changed.notified()).await;
        }
    };
    or(async { Some(work.await) }, tending).await
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
    fn new(core: Arc<Core>, name: &Name, terms: Terms, queues: bool) -> Self {
        let follows = lock(&core.lines).held(name);
        let claim =
            Claim { name: name.clone(), id: core.new_id(), ttl: terms.ttl, owner: terms.owner, queues, follows };
        let unsettled = core.unsettled.token();
        Self { core, claim, first_sent: None, pulse: None, handed_out: false, _unsettled: unsettled }
    }

    fn terms(&self) -> Terms {
        Terms { ttl: self.claim.ttl, owner: self.claim.owner.clone() }
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
                // Another token than the known one: the first claim was lost, and this id is used up.
                Standing::Head(token) | Standing::Behind(token, _) if self.pulse(token).place.token != token => {
                    return Ok(());
                }
                Standing::Head(token) => {
                    let pulse = self.pulse(token);
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
                    let began = self.core.env.now();
                    let turn = async { self.core.store.turn(&pulse.place, &ahead).await };
                    let news = async {
                        pulse.news.notified().await;
                        Ok(())
                    };
                    if let Err(error) = or(turn, news).await {
                        // What went well for so long has nothing to do with the troubles before.
                        if self.core.env.now().since(began) > QUIET {
                            backoff = Backoff::default();
                        }
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
        if lock(&self.core.lines).trouble(&self.claim.name, error.clone(), now) {
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
        let taken = lock(&self.core.lines).take(&self.claim.name, &self.terms());
        if let Some(waiter) = taken {
            let lease = self.lease(waiter.handle, pulse.clone(), waiter.since);
            self.core.answer((waiter.answer, lease));
        }
    }

    /// The claim becomes a lease: from here on the lease's own drop cleans up.
    fn lease(&mut self, handle: Arc<Handle>, pulse: Arc<Pulse>, since: Moment) -> Result<Lease> {
        let now = self.core.env.now();
        let before = lock(&self.core.lines).hold(&self.claim.name, &pulse, now)?;
        if let Some(before) = before {
            self.core.heartbeat.end(&before, EndReason::Superseded);
        }
        self.handed_out = true;
        observe::granted(&*self.core.env, &pulse.place, now.since(since));
        Ok(Lease::new(handle, pulse))
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
