//! The line of one process: who waits here for a name, first come first served.
//!
//! However many wait in a process, its manager has at most two claims of a name in the store: the one that holds and
//! the next. The next belongs to whoever is first here; when he gives up, the one behind him with the same terms takes
//! the place over. Plain data behind one lock: nothing here waits, and no user code runs under the lock.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use tokio::sync::{Notify, oneshot};

use crate::clock::Moment;
use crate::engine::Handle;
use crate::error::{Error, ErrorKind, Holder, Result};
use crate::heartbeat::Pulse;
use crate::lease::Lease;
use crate::store::{Ahead, ClaimId, Name, Token};

/// The least time between two warnings of the same kind.
const WARN_EVERY: Duration = Duration::from_secs(10);

/// Who waits for longer is told who holds the name.
const LONG_WAIT: Duration = Duration::from_secs(1);

/// What a waiter asks the store for. A place in the store's line serves any waiter of the same terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) ttl: Duration,
    pub(crate) owner: Arc<str>,
}

/// A callback of somebody who waits.
pub(crate) type OnWait = Box<dyn FnOnce(Waiting) + Send>;

/// Why a wait goes on, told to who has waited for a second.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Waiting {
    /// What is waited for.
    pub name: Name,
    /// Who holds it, as far as it is known: nobody when the store does not answer.
    pub holder: Option<Holder>,
    /// How many claims and local waiters stand before this one.
    pub place: u64,
}

pub(crate) struct Waiter {
    pub(crate) terms: Terms,
    pub(crate) since: Moment,
    pub(crate) deadline: Option<Moment>,
    pub(crate) on_wait: Option<OnWait>,
    pub(crate) handle: Arc<Handle>,
    pub(crate) answer: oneshot::Sender<Result<Lease>>,
}

/// An answer on its way to a waiter, to be sent where user code may run.
pub(crate) type Answer = (oneshot::Sender<Result<Lease>>, Result<Lease>);

#[derive(Default)]
pub(crate) struct Lines {
    names: HashMap<Name, Line>,
    closed: bool,
    arrivals: u64,
}

#[derive(Default)]
pub(crate) struct Line {
    waiters: BTreeMap<u64, Waiter>,
    deadlines: BTreeSet<(Moment, u64)>,
    /// The latest arrival that was told that it has to wait.
    told: u64,
    /// Whether a pursuit runs: it owns the next claim, and there is one of them.
    pursued: bool,
    /// Wakes the pursuit when somebody gave up or has an earlier deadline.
    changed: Arc<Notify>,
    /// The claim handed out last.
    held: Option<(Arc<Pulse>, Moment)>,
    /// What stood before the next claim when the store was asked last.
    ahead: Option<Ahead>,
    /// Why the store could not be asked.
    trouble: Option<Error>,
    warned: Option<Moment>,
    /// When somebody was warned that he waits for a lease of this very manager.
    warned_of_own: Option<Moment>,
}

/// What a pursuit needs to know of its line before it waits.
pub(crate) struct Interest {
    pub(crate) changed: Arc<Notify>,
    /// When the next waiter is late, or has waited for long.
    pub(crate) look_at: Moment,
}

impl Lines {
    fn line(&mut self, name: &Name) -> &mut Line {
        self.names.entry(name.clone()).or_default()
    }

    /// Queues a waiter. Says its arrival number, and whether the caller has to start the pursuit.
    pub(crate) fn join(&mut self, name: &Name, waiter: Waiter) -> Result<(u64, bool)> {
        if self.closed {
            return Err(Error::closed());
        }
        self.arrivals += 1;
        let arrival = self.arrivals;
        let line = self.line(name);
        if let Some(deadline) = waiter.deadline {
            line.deadlines.insert((deadline, arrival));
            if line.deadlines.first() == Some(&(deadline, arrival)) {
                line.changed.notify_one();
            }
        }
        line.waiters.insert(arrival, waiter);
        Ok((arrival, !std::mem::replace(&mut line.pursued, true)))
    }

    /// A waiter gave up, or has its answer.
    pub(crate) fn depart(&mut self, name: &Name, arrival: u64) -> Option<Waiter> {
        let line = self.names.get_mut(name)?;
        let waiter = line.waiters.remove(&arrival)?;
        if let Some(deadline) = waiter.deadline {
            line.deadlines.remove(&(deadline, arrival));
        }
        line.changed.notify_one();
        Some(waiter)
    }

    /// Fails when somebody holds or waits here: then an attempt that does not queue need not ask the store.
    pub(crate) fn check_free(&self, name: &Name) -> Result<()> {
        if self.closed {
            return Err(Error::closed());
        }
        match self.names.get(name) {
            Some(line) if line.holder().is_some() || !line.waiters.is_empty() => {
                let unknown = || Error::new(ErrorKind::Timeout, "others of this process wait for it");
                Err(line.obstacle(line.waiters.len() as u64).unwrap_or_else(unknown))
            }
            _ => Ok(()),
        }
    }

    /// The claim that holds the name here, or is about to leave.
    pub(crate) fn held(&self, name: &Name) -> Option<ClaimId> {
        let (pulse, _) = self.names.get(name)?.held.as_ref()?;
        Some(pulse.place.claim.id)
    }

    /// The token of who holds the name here, and for how long, if a warning about that is due: not for each of many who wait
    /// for each other as they should.
    pub(crate) fn own_holder(&mut self, name: &Name, now: Moment) -> Option<(Token, Duration)> {
        let line = self.names.get_mut(name)?;
        if line.warned_of_own.is_some_and(|at| now.since(at) < WARN_EVERY) {
            return None;
        }
        let (pulse, since) = line.held.as_ref()?;
        let held = pulse.end_reason().is_none().then(|| (pulse.place.token, now.since(*since)))?;
        line.warned_of_own = Some(now);
        Some(held)
    }

    /// The terms of the first waiter. With none left the pursuit is over, and an idle line forgotten.
    pub(crate) fn next_terms(&mut self, name: &Name) -> Option<Terms> {
        let line = self.names.get_mut(name)?;
        (line.ahead, line.trouble, line.warned) = (None, None, None);
        let terms = line.waiters.first_key_value().map(|(_, waiter)| waiter.terms.clone());
        line.pursued = terms.is_some();
        self.settle(name);
        terms
    }

    /// Whether the first waiter still has these terms; what to wait for if so. Takes out those whose time is up.
    pub(crate) fn tend(&mut self, name: &Name, terms: &Terms, now: Moment) -> (Option<Interest>, Vec<Answer>) {
        let mut late = Vec::new();
        while let Some((waiter, error)) = self.expired(name, now) {
            late.push((waiter.answer, Err(error)));
        }
        let interest = self.names.get(name).and_then(|line| {
            let (_, first) = line.waiters.first_key_value()?;
            let deadline = line.deadlines.first().map_or(Moment::FAR, |(at, _)| *at);
            let look_at = line.untold().map_or(Moment::FAR, |(_, since)| since + LONG_WAIT).min(deadline);
            (first.terms == *terms).then(|| Interest { changed: line.changed.clone(), look_at })
        });
        (interest, late)
    }

    /// Who has waited for long and was not told yet, and what is to be told.
    pub(crate) fn long_waiting(&mut self, name: &Name, now: Moment) -> Vec<(Waiting, Option<OnWait>)> {
        let mut telling = Vec::new();
        let Some(line) = self.names.get_mut(name) else { return telling };
        while let Some((arrival, since)) = line.untold()
            && now.since(since) >= LONG_WAIT
        {
            let place = line.place(line.waiters.range(..arrival).count() as u64);
            let waiting = Waiting { name: name.clone(), holder: line.holder().or_else(|| line.seen_holder()), place };
            line.told = arrival;
            telling.push((waiting, line.waiters.get_mut(&arrival).and_then(|waiter| waiter.on_wait.take())));
        }
        telling
    }

    fn expired(&mut self, name: &Name, now: Moment) -> Option<(Waiter, Error)> {
        let line = self.names.get(name)?;
        let (_, arrival) = *line.deadlines.first().filter(|(at, _)| *at <= now)?;
        let here = line.waiters.range(..arrival).count() as u64;
        let unanswered = || Error::unavailable("the store gave no answer within the timeout").with_doubt();
        let error = line.obstacle(here).unwrap_or_else(unanswered);
        Some((self.depart(name, arrival)?, error.during("acquire", Some(name))))
    }

    /// Takes the first waiter out for the lease it gets, if it still has these terms.
    pub(crate) fn take(&mut self, name: &Name, terms: &Terms) -> Option<Waiter> {
        let line = self.names.get_mut(name)?;
        let arrival = line.waiters.first_key_value().filter(|(_, waiter)| waiter.terms == *terms).map(|(at, _)| *at)?;
        self.depart(name, arrival)
    }

    /// Notes a lease that is handed out. Gives back the one before it, which it proves to be over.
    pub(crate) fn hold(&mut self, name: &Name, pulse: &Arc<Pulse>, now: Moment) -> Result<Option<Arc<Pulse>>> {
        if self.closed {
            return Err(Error::closed());
        }
        Ok(self.line(name).held.replace((pulse.clone(), now)).map(|(before, _)| before))
    }

    /// Forgets a lease that was given back.
    pub(crate) fn release(&mut self, name: &Name, pulse: &Arc<Pulse>) {
        if let Some(line) = self.names.get_mut(name) {
            if line.held.as_ref().is_some_and(|(held, _)| Arc::ptr_eq(held, pulse)) {
                line.held = None;
            }
            self.settle(name);
        }
    }

    /// Fails the first waiter with what cannot be retried.
    pub(crate) fn fail(&mut self, name: &Name, error: Error) -> Option<Answer> {
        let (arrival, _) = self.names.get(name)?.waiters.first_key_value()?;
        let arrival = *arrival;
        Some((self.depart(name, arrival)?.answer, Err(error)))
    }

    /// The pursuit of the name is gone, and not because it was over: gives back those who relied on it.
    pub(crate) fn abandon(&mut self, name: &Name) -> Vec<Waiter> {
        let Some(line) = self.names.get_mut(name) else { return Vec::new() };
        line.pursued = false;
        line.deadlines.clear();
        let stranded = std::mem::take(&mut line.waiters);
        self.settle(name);
        stranded.into_values().collect()
    }

    pub(crate) fn saw(&mut self, name: &Name, ahead: Ahead) {
        if let Some(line) = self.names.get_mut(name) {
            line.ahead = Some(ahead);
        }
    }

    /// Notes why the store could not be asked; says whether a warning is due.
    pub(crate) fn trouble(&mut self, name: &Name, error: Error, now: Moment) -> bool {
        let Some(line) = self.names.get_mut(name) else { return false };
        line.trouble = Some(error);
        let due = line.warned.is_none_or(|at| now.since(at) >= WARN_EVERY);
        if due {
            line.warned = Some(now);
        }
        due
    }

    /// Lets nobody in any more. Gives back who waited and what was held.
    pub(crate) fn close(&mut self) -> (Vec<Answer>, Vec<Arc<Pulse>>) {
        self.closed = true;
        let (mut answers, mut held) = (Vec::new(), Vec::new());
        for (name, line) in &mut self.names {
            let waiters = std::mem::take(&mut line.waiters);
            let closed = || Err(Error::closed().during("acquire", Some(name)));
            answers.extend(waiters.into_values().map(|waiter| (waiter.answer, closed())));
            line.deadlines.clear();
            line.changed.notify_one();
            held.extend(line.held.take().map(|(pulse, _)| pulse));
        }
        (answers, held)
    }

    fn settle(&mut self, name: &Name) {
        let idle = |line: &Line| !line.pursued && line.held.is_none() && line.waiters.is_empty();
        if self.names.get(name).is_some_and(idle) {
            self.names.remove(name);
        }
    }
}

impl Line {
    fn holder(&self) -> Option<Holder> {
        let (pulse, _) = self.held.as_ref().filter(|(pulse, _)| pulse.end_reason().is_none())?;
        Some(Holder::new(pulse.place.token, &*pulse.place.claim.owner))
    }

    /// The first who was not told yet that he has to wait, and since when he does.
    fn untold(&self) -> Option<(u64, Moment)> {
        self.waiters.range(self.told + 1..).next().map(|(arrival, waiter)| (*arrival, waiter.since))
    }

    /// What stands before a waiter with so many before it here.
    fn place(&self, here: u64) -> u64 {
        here + self.ahead.as_ref().map_or(1, |ahead| ahead.count)
    }

    fn seen_holder(&self) -> Option<Holder> {
        self.ahead.as_ref().map(|ahead| Holder::new(ahead.holder, &*ahead.owner))
    }

    /// What keeps a waiter with so many before it here, as far as it is known: a holder, or a store that does not answer.
    fn obstacle(&self, here: u64) -> Option<Error> {
        let (message, holder) = match self.holder() {
            Some(holder) => ("held by this process", Some(holder)),
            None => ("held by another", self.seen_holder()),
        };
        match holder {
            Some(holder) => Some(Error::new(ErrorKind::Timeout, message).with_holder(holder, self.place(here))),
            None => self.trouble.clone(),
        }
    }
}
