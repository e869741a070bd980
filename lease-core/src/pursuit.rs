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

use crate::clock::Moment;
use crate::engine::{Backoff, Core, Handle, Unsettled};
use crate::error::{EndReason, Error, ErrorKind, Holder, Result};
use crate::heartbeat::Pulse;
use crate::lease::Lease;
use crate::line::{OnWait, Terms, Waiter};
use crate::manager::Acquiring;
use crate::observe;
use crate::runtime::{at_once, lock, reply, start_near};
use crate::store::{Claim, ClaimId, Name, Place, Standing, Token};

/// A wait that was not disturbed for so long begins anew with short pauses when it is.
const QUIET: Duration = Duration::from_secs(10);

/// What came of an acquire where it began.
pub(crate) enum Begun {
    Done(Result<Lease>),
    /// It has to wait: somebody does so by this. He polls only an answer, and holds no timer and no store.
    Waits(Acquiring<Lease>),
}

/// Gets the lease if that takes no waiting, or else joins the local line.
pub(crate) fn begin(
    handle: Arc<Handle>,
    name: &Name,
    terms: Terms,
    timeout: Option<Duration>,
    on_wait: Option<OnWait>,
) -> Begun {
    let core = handle.core.clone();
    let since = core.env.now();
    let arrival = match lock(&core.lines).arrive(name, since) {
        Ok(arrival) => arrival,
        Err(error) => return Begun::Done(Err(error)),
    };
    // Before anything of the user's runs: from here on nobody relies on who does not pursue.
    let mut pursuit = arrival.pursues.then(|| Pursuit::new(&core, name, terms.clone(), arrival.follows));
    if let Some((token, held_for)) = arrival.own_holder {
        observe::own_holder(name, token, held_for);
    }
    if let Some(lease) = pursuit.as_mut().and_then(|pursuit| pursuit.at_once(&handle, since)) {
        if let Some(pursuit) = pursuit {
            pursuit.end();
        }
        return Begun::Done(lease);
    }
    let name = name.clone();
    Begun::Waits(Box::pin(async move {
        let (answer, lease) = reply();
        let deadline = timeout.map(|timeout| since + timeout);
        let waiter = Waiter { terms: terms.clone(), since, deadline, on_wait, handle, answer };
        let (pursues, changed) = lock(&core.lines).join(&name, arrival.number, waiter)?;
        changed.inspect(|changed| changed.notify_one());
        let _ticket = Ticket { core: &core, name: &name, arrival: arrival.number };
        observe::waiters(&*core.env, 1);
        if let Some(pursuit) = pursuit.or_else(|| pursues.then(|| Pursuit::new(&core, &name, terms, arrival.follows))) {
            pursuit.start();
        }
        lease.await.unwrap_or_else(|| Err(Error::closed()))
    }))
}

/// A waiter's place in the local line: given up when the waiter goes, however he goes.
struct Ticket<'a> {
    core: &'a Core,
    name: &'a Name,
    arrival: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let left = lock(&self.core.lines).depart(self.name, self.arrival);
        // Outside the lock: what is woken may be dropped at once, and the waiter may hold the last handle.
        if let Some((_waiter, changed)) = left {
            changed.notify_one();
        }
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
    let follows = lock(&core.lines).held(&name);
    let mut entry = Entry::new(core.clone(), Entry::claim(&core, &name, terms, false, follows));
    let lost = || Error::unavailable("the claim was lost while it was made");
    match entry.claim_once().await? {
        Standing::Head(token) => {
            let pulse = entry.pulse(token);
            loop {
                if let Some(now) = core.heartbeat.hold(&pulse) {
                    return entry.lease(handle, pulse, now.since(since));
                }
                let renewed = core.heartbeat.renew_now(&pulse).await;
                renewed.map_err(|error| if error.kind() == ErrorKind::Lost { lost() } else { error })?;
            }
        }
        Standing::Busy(ahead) | Standing::Behind(_, ahead) => {
            let holder = Holder::new(ahead.holder, ahead.owner);
            Err(Error::new(ErrorKind::Timeout, "held by another").with_holder(holder, ahead.count))
        }
        Standing::Lost => Err(lost()),
    }
}

/// Gets leases for the waiters of one name until none is left. One that is dropped before it is over, by a panic of a store or
/// because the library's thread ends, must not leave its waiters waiting.
struct Pursuit {
    entry: Entry,
    over: bool,
}

impl Pursuit {
    fn new(core: &Arc<Core>, name: &Name, terms: Terms, follows: Option<ClaimId>) -> Self {
        Self { entry: Entry::new(core.clone(), Entry::claim(core, name, terms, true, follows)), over: false }
    }

    /// The lease for who began this, if it can be had without waiting.
    fn at_once(&mut self, handle: &Arc<Handle>, since: Moment) -> Option<Result<Lease>> {
        let entry = &mut self.entry;
        let core = &entry.core;
        // As in `claim_once`.
        core.open().ok()?;
        entry.first_sent = Some(since);
        entry.standing = at_once(|| core.store.claim_at_once(since, &entry.claim));
        match &entry.standing {
            None => entry.first_sent = None,
            Some(Ok(Standing::Head(token))) => {
                let pulse = entry.pulse(*token);
                if let Some(now) = entry.core.heartbeat.hold(&pulse) {
                    return Some(entry.lease(handle.clone(), pulse, now.since(since)));
                }
            }
            Some(_) => {}
        }
        None
    }

    /// Ends it, unless others wait for the name meanwhile.
    fn end(mut self) {
        if self.goes_on() {
            self.start();
        }
    }

    fn start(self) {
        let (core, name) = (self.entry.core.clone(), self.entry.claim.name.clone());
        let pursuit = start_near(&core.env, core.store.answers_at_once(), Box::pin(self.run()));
        lock(&core.lines).pursued_by(&name, pursuit);
    }

    /// Begins anew for the next who waits, if somebody does.
    fn goes_on(&mut self) -> bool {
        let (core, name): (&Arc<Core>, _) = (&self.entry.core, &self.entry.claim.name);
        let next = lock(&core.lines).next(name);
        match next {
            Some((terms, follows)) => {
                self.entry = Entry::new(core.clone(), Entry::claim(core, name, terms, true, follows));
            }
            None => self.over = true,
        }
        !self.over
    }

    async fn run(mut self) {
        loop {
            let (core, name, terms) = (self.entry.core.clone(), self.entry.claim.name.clone(), self.entry.terms());
            if let Some(Err(error)) = tend(&core, &name, &terms, self.entry.pursue()).await {
                let failed = lock(&core.lines).fail(&name, error);
                if let Some(answer) = failed {
                    core.answer(answer);
                }
            }
            if !self.goes_on() {
                return;
            }
        }
    }
}

impl Drop for Pursuit {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let core = &self.entry.core;
        let stranded = lock(&core.lines).abandon(&self.entry.claim.name);
        for waiter in stranded {
            let error = core.open().err();
            let error = error.unwrap_or_else(Error::dropped);
            core.answer((waiter, Err(error)));
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
    core: Unsettled<Arc<Core>>,
    claim: Claim,
    /// When it was first sent: an idempotent yes to a retry counts from here.
    first_sent: Option<Moment>,
    /// The answer to that, if it was given at once.
    standing: Option<Result<Standing>>,
    pulse: Option<Arc<Pulse>>,
    handed_out: bool,
}

impl Entry {
    fn new(core: Arc<Core>, claim: Claim) -> Self {
        let core = Unsettled::new(core);
        Self { core, claim, first_sent: None, standing: None, pulse: None, handed_out: false }
    }

    fn claim(core: &Core, name: &Name, terms: Terms, queues: bool, follows: Option<ClaimId>) -> Claim {
        Claim { name: name.clone(), id: core.new_id(), ttl: terms.ttl, owner: terms.owner, queues, follows }
    }

    fn terms(&self) -> Terms {
        Terms { ttl: self.claim.ttl, owner: self.claim.owner.clone() }
    }

    async fn claim_once(&mut self) -> Result<Standing> {
        // This is unsettled: what is sent now can be withdrawn before the store is closed.
        self.core.open()?;
        let sent = self.core.env.now();
        self.first_sent.get_or_insert(sent);
        let core = self.core.clone();
        core.bounded(core.store.claim(sent, &self.claim)).await
    }

    /// From the first attempt to enter until a waiter has the lease. An error is final for the first waiter.
    async fn pursue(&mut self) -> Result<()> {
        let mut backoff = Backoff::default();
        let mut standing = loop {
            let answer = match self.standing.take() {
                Some(answer) => answer,
                None => self.claim_once().await,
            };
            match answer {
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
                    if let Some(now) = self.core.heartbeat.hold(&pulse) {
                        self.hand_out(&pulse, now);
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
    fn hand_out(&mut self, pulse: &Arc<Pulse>, now: Moment) {
        let taken = lock(&self.core.lines).take(&self.claim.name, &self.terms());
        if let Some(waiter) = taken {
            let lease = self.lease(waiter.handle.clone(), pulse.clone(), now.since(waiter.since));
            self.core.answer((waiter, lease));
        }
    }

    /// The claim becomes a lease: from here on the lease's own drop cleans up.
    fn lease(&mut self, handle: Arc<Handle>, pulse: Arc<Pulse>, waited: Duration) -> Result<Lease> {
        let before = lock(&self.core.lines).hold(&self.claim.name, &pulse)?;
        if let Some(before) = before {
            self.core.heartbeat.end(&before, EndReason::Superseded);
        }
        self.handed_out = true;
        observe::granted(&*self.core.env, &pulse.place, waited);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::runtime::{block_on, system};
    use crate::stores::memory::MemoryStore;

    /// One who came before the manager was closed, and is slow: what he would send could not be withdrawn any more.
    #[test]
    fn nothing_is_sent_when_the_manager_is_closed() {
        let env = system().unwrap();
        let core = Core::new(Config::default(), MemoryStore::new(env.clone()), env.clone());
        let (name, terms) = (Name::new("n").unwrap(), Terms { ttl: Duration::from_secs(30), owner: "test".into() });
        let arrival = lock(&core.lines).arrive(&name, env.now()).unwrap();
        assert!(arrival.pursues);
        block_on(core.shut()).unwrap();
        let mut pursuit = Pursuit::new(&core, &name, terms, arrival.follows);
        let handle = Arc::new(Handle { core: core.clone() });
        assert!(pursuit.at_once(&handle, env.now()).is_none());
        assert_eq!(pursuit.entry.first_sent, None);
        assert_eq!(block_on(pursuit.entry.claim_once()).unwrap_err().kind(), ErrorKind::Closed);
        assert_eq!(pursuit.entry.first_sent, None);
    }
}
