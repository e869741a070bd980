//! The line of one process: who waits here for a name, first come first served.
//!
//! However many wait in a process, its manager has at most two claims of a name in the store: the one that holds and
//! the next. The next belongs to whoever is first here; when he gives up, the one behind him with the same terms takes
//! the place over. Plain data behind one lock: nothing here waits, nobody is woken and no user code runs under the lock.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use foldhash::HashMap;
use tokio::sync::Notify;

use crate::clock::Moment;
use crate::engine::Handle;
use crate::error::{Error, ErrorKind, Holder, Result};
use crate::heartbeat::Pulse;
use crate::lease::Lease;
use crate::runtime::{Caller, Near};
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
    pub(crate) answer: Caller<Result<Lease>>,
}

/// An answer on its way to a waiter, to be sent where user code may run.
pub(crate) type Answer = (Waiter, Result<Lease>);

/// What wakes the pursuit of a name, and what it ends with.
pub(crate) type Running = (Arc<Notify>, Vec<Near>);

#[derive(Default)]
pub(crate) struct Lines {
    names: HashMap<Name, Line>,
    closed: bool,
    arrivals: u64,
}

#[derive(Default)]
pub(crate) struct Line {
    /// Whether a pursuit runs: it owns the next claim, and there is one of them.
    pursued: bool,
    /// The claim handed out last.
    held: Option<Arc<Pulse>>,
    /// Made for the first who has to wait: most names have nobody who does.
    queue: Option<Box<Queue>>,
}

/// Who waits, and what is known of what for.
#[derive(Default)]
struct Queue {
    waiters: BTreeMap<u64, Waiter>,
    deadlines: BTreeSet<(Moment, u64)>,
    /// The one that runs, and any that is just about to end.
    pursuits: Vec<Near>,
    /// The latest arrival that was told that it has to wait.
    told: u64,
    /// Wakes the pursuit when somebody gave up or has an earlier deadline.
    changed: Arc<Notify>,
    /// What stood before the next claim when the store was asked last.
    ahead: Option<Ahead>,
    /// Why the store could not be asked.
    trouble: Option<Error>,
    warned: Option<Moment>,
    /// When somebody was warned that he waits for a lease of this very manager.
    warned_of_own: Option<Moment>,
}

/// One who came for a name.
pub(crate) struct Arrival {
    pub(crate) number: u64,
    /// Whether he has to pursue the name, because nobody does.
    pub(crate) pursues: bool,
    /// The claim that holds the name here, or is about to leave.
    pub(crate) follows: Option<ClaimId>,
    /// The token of that and for how long it has held, if a warning is due.
    pub(crate) own_holder: Option<(Token, Duration)>,
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

    fn queue(&mut self, name: &Name) -> Option<&mut Queue> {
        self.names.get_mut(name)?.queue.as_deref_mut()
    }

    /// Somebody comes for a name.
    pub(crate) fn arrive(&mut self, name: &Name, now: Moment) -> Result<Arrival> {
        if self.closed {
            return Err(Error::closed());
        }
        self.arrivals += 1;
        let number = self.arrivals;
        let line = self.line(name);
        let (pursues, follows) = (!std::mem::replace(&mut line.pursued, true), line.held_id());
        Ok(Arrival { number, pursues, follows, own_holder: line.own_holder(now) })
    }

    /// Queues a waiter that has arrived. Says whether it has to pursue the name now, because who did so may have ended since,
    /// and whom to wake.
    pub(crate) fn join(&mut self, name: &Name, arrival: u64, waiter: Waiter) -> Result<(bool, Option<Arc<Notify>>)> {
        if self.closed {
            return Err(Error::closed());
        }
        let line = self.line(name);
        let pursues = !std::mem::replace(&mut line.pursued, true);
        let queue = line.queue.get_or_insert_default();
        let mut looks_too_late = queue.untold().is_none();
        if let Some(deadline) = waiter.deadline {
            queue.deadlines.insert((deadline, arrival));
            looks_too_late |= queue.deadlines.first() == Some(&(deadline, arrival));
        }
        queue.waiters.insert(arrival, waiter);
        Ok((pursues, looks_too_late.then(|| queue.changed.clone())))
    }

    /// Keeps the pursuit of a name, which lives no longer than the line.
    pub(crate) fn pursued_by(&mut self, name: &Name, pursuit: Near) {
        if let Some(queue) = self.queue(name) {
            // None that runs is ever replaced: that would drop it.
            queue.pursuits.retain(|pursuit| !pursuit.is_finished());
            queue.pursuits.push(pursuit);
        }
    }

    /// A waiter gave up, or has its answer. Says whom to wake.
    pub(crate) fn depart(&mut self, name: &Name, arrival: u64) -> Option<(Waiter, Arc<Notify>)> {
        let queue = self.queue(name)?;
        Some((queue.remove(arrival)?, queue.changed.clone()))
    }

    /// Fails when somebody holds or waits here: then an attempt that does not queue need not ask the store.
    pub(crate) fn check_free(&self, name: &Name) -> Result<()> {
        if self.closed {
            return Err(Error::closed());
        }
        match self.names.get(name) {
            Some(line) if line.holder().is_some() || line.waiting() > 0 => {
                let unknown = || Error::new(ErrorKind::Timeout, "others of this process wait for it");
                Err(line.obstacle(line.waiting()).unwrap_or_else(unknown))
            }
            _ => Ok(()),
        }
    }

    /// The claim that holds the name here, or is about to leave.
    pub(crate) fn held(&self, name: &Name) -> Option<ClaimId> {
        self.names.get(name)?.held_id()
    }

    /// The terms of the first waiter, and the claim that his would follow. With none left the pursuit is over, and an idle line
    /// forgotten.
    pub(crate) fn next(&mut self, name: &Name) -> Option<(Terms, Option<ClaimId>)> {
        let line = self.names.get_mut(name)?;
        let terms = line.queue.as_mut().and_then(|queue| {
            (queue.ahead, queue.trouble, queue.warned) = (None, None, None);
            queue.waiters.first_key_value().map(|(_, waiter)| waiter.terms.clone())
        });
        line.pursued = terms.is_some();
        let follows = line.held_id();
        if line.is_idle() {
            self.names.remove(name);
        }
        Some((terms?, follows))
    }

    /// Whether the first waiter still has these terms; what to wait for if so. Takes out those whose time is up.
    pub(crate) fn tend(&mut self, name: &Name, terms: &Terms, now: Moment) -> (Option<Interest>, Vec<Answer>) {
        let mut late = Vec::new();
        while let Some((waiter, error)) = self.expired(name, now) {
            late.push((waiter, Err(error)));
        }
        let interest = self.queue(name).and_then(|queue| {
            let (_, first) = queue.waiters.first_key_value()?;
            let deadline = queue.deadlines.first().map_or(Moment::FAR, |(at, _)| *at);
            let look_at = queue.untold().map_or(Moment::FAR, |(_, since)| since + LONG_WAIT).min(deadline);
            (first.terms == *terms).then(|| Interest { changed: queue.changed.clone(), look_at })
        });
        (interest, late)
    }

    /// Who has waited for long and was not told yet, and what is to be told.
    pub(crate) fn long_waiting(&mut self, name: &Name, now: Moment) -> Vec<(Waiting, Option<OnWait>)> {
        let mut telling = Vec::new();
        let Some(line) = self.names.get_mut(name) else { return telling };
        let own = line.holder();
        let Some(queue) = &mut line.queue else { return telling };
        while let Some((arrival, since)) = queue.untold()
            && now.since(since) >= LONG_WAIT
        {
            let place = queue.place(queue.before(arrival));
            let waiting = Waiting { name: name.clone(), holder: own.clone().or_else(|| queue.seen_holder()), place };
            queue.told = arrival;
            telling.push((waiting, queue.waiters.get_mut(&arrival).and_then(|waiter| waiter.on_wait.take())));
        }
        telling
    }

    fn expired(&mut self, name: &Name, now: Moment) -> Option<(Waiter, Error)> {
        let line = self.names.get(name)?;
        let queue = line.queue.as_ref()?;
        let (_, arrival) = *queue.deadlines.first().filter(|(at, _)| *at <= now)?;
        let here = queue.before(arrival);
        let unanswered = || Error::unavailable("the store gave no answer within the timeout").with_doubt();
        let error = line.obstacle(here).unwrap_or_else(unanswered);
        Some((self.queue(name)?.remove(arrival)?, error.during("acquire", Some(name))))
    }

    /// Takes the first waiter out for the lease it gets, if it still has these terms.
    pub(crate) fn take(&mut self, name: &Name, terms: &Terms) -> Option<Waiter> {
        let queue = self.queue(name)?;
        let arrival =
            queue.waiters.first_key_value().filter(|(_, waiter)| waiter.terms == *terms).map(|(at, _)| *at)?;
        queue.remove(arrival)
    }

    /// Notes a lease that is handed out. Gives back the one before it, which it proves to be over.
    pub(crate) fn hold(&mut self, name: &Name, pulse: &Arc<Pulse>) -> Result<Option<Arc<Pulse>>> {
        if self.closed {
            return Err(Error::closed());
        }
        Ok(self.line(name).held.replace(pulse.clone()))
    }

    /// Forgets a lease that was given back.
    pub(crate) fn release(&mut self, name: &Name, pulse: &Arc<Pulse>) {
        if let Some(line) = self.names.get_mut(name) {
            if line.held.as_ref().is_some_and(|held| Arc::ptr_eq(held, pulse)) {
                line.held = None;
            }
            if line.is_idle() {
                self.names.remove(name);
            }
        }
    }

    /// Fails the first waiter with what cannot be retried.
    pub(crate) fn fail(&mut self, name: &Name, error: Error) -> Option<Answer> {
        let queue = self.queue(name)?;
        let arrival = *queue.waiters.first_key_value()?.0;
        Some((queue.remove(arrival)?, Err(error)))
    }

    /// The pursuit of the name is gone, and not because it was over: gives back those who relied on it.
    pub(crate) fn abandon(&mut self, name: &Name) -> Vec<Waiter> {
        let Some(line) = self.names.get_mut(name) else { return Vec::new() };
        line.pursued = false;
        let stranded = line.queue.as_mut().map(|queue| queue.empty()).unwrap_or_default();
        if line.is_idle() {
            self.names.remove(name);
        }
        stranded
    }

    pub(crate) fn saw(&mut self, name: &Name, ahead: Ahead) {
        if let Some(queue) = self.queue(name) {
            queue.ahead = Some(ahead);
        }
    }

    /// Notes why the store could not be asked; says whether a warning is due.
    pub(crate) fn trouble(&mut self, name: &Name, error: Error, now: Moment) -> bool {
        let Some(queue) = self.queue(name) else { return false };
        queue.trouble = Some(error);
        let due = queue.warned.is_none_or(|at| now.since(at) >= WARN_EVERY);
        if due {
            queue.warned = Some(now);
        }
        due
    }

    /// Lets nobody in any more. Gives back who waited, what was held, and what runs, to be woken.
    pub(crate) fn close(&mut self) -> (Vec<Answer>, Vec<Arc<Pulse>>, Vec<Running>) {
        self.closed = true;
        let (mut answers, mut held, mut pursuits) = (Vec::new(), Vec::new(), Vec::new());
        for (name, line) in &mut self.names {
            if let Some(queue) = &mut line.queue {
                let closed = || Err(Error::closed().during("acquire", Some(name)));
                answers.extend(queue.empty().into_iter().map(|waiter| (waiter, closed())));
                pursuits.push((queue.changed.clone(), std::mem::take(&mut queue.pursuits)));
            }
            held.extend(line.held.take());
        }
        (answers, held, pursuits)
    }
}

impl Line {
    fn is_idle(&self) -> bool {
        !self.pursued && self.held.is_none() && self.waiting() == 0
    }

    /// The token of who holds the name here, and for how long, if a warning about that is due: not for each of many who wait
    /// for each other as they should.
    fn own_holder(&mut self, now: Moment) -> Option<(Token, Duration)> {
        let pulse = self.held.as_ref().filter(|pulse| pulse.end_reason().is_none())?;
        let queue = self.queue.get_or_insert_default();
        if queue.warned_of_own.is_some_and(|at| now.since(at) < WARN_EVERY) {
            return None;
        }
        queue.warned_of_own = Some(now);
        Some((pulse.place.token, now.since(pulse.held_at()?)))
    }

    fn held_id(&self) -> Option<ClaimId> {
        self.held.as_ref().map(|pulse| pulse.place.claim.id)
    }

    fn holder(&self) -> Option<Holder> {
        let pulse = self.held.as_ref().filter(|pulse| pulse.end_reason().is_none())?;
        Some(Holder::new(pulse.place.token, &*pulse.place.claim.owner))
    }

    fn waiting(&self) -> u64 {
        self.queue.as_ref().map_or(0, |queue| queue.waiters.len() as u64)
    }

    /// What keeps a waiter with so many before it here, as far as it is known: a holder, or a store that does not answer.
    fn obstacle(&self, here: u64) -> Option<Error> {
        let seen = || self.queue.as_ref().and_then(|queue| queue.seen_holder());
        let (message, holder) = match self.holder() {
            Some(holder) => ("held by this process", Some(holder)),
            None => ("held by another", seen()),
        };
        let place = self.queue.as_ref().map_or(here + 1, |queue| queue.place(here));
        match holder {
            Some(holder) => Some(Error::new(ErrorKind::Timeout, message).with_holder(holder, place)),
            None => self.queue.as_ref()?.trouble.clone(),
        }
    }
}

impl Queue {
    /// The first who was not told yet that he has to wait, and since when he does.
    fn untold(&self) -> Option<(u64, Moment)> {
        self.waiters.range(self.told + 1..).next().map(|(arrival, waiter)| (*arrival, waiter.since))
    }

    fn before(&self, arrival: u64) -> u64 {
        self.waiters.range(..arrival).count() as u64
    }

    /// What stands before a waiter with so many before it here.
    fn place(&self, here: u64) -> u64 {
        here + self.ahead.as_ref().map_or(1, |ahead| ahead.count)
    }

    fn seen_holder(&self) -> Option<Holder> {
        self.ahead.as_ref().map(|ahead| Holder::new(ahead.holder, &*ahead.owner))
    }

    fn remove(&mut self, arrival: u64) -> Option<Waiter> {
        let waiter = self.waiters.remove(&arrival)?;
        if let Some(deadline) = waiter.deadline {
            self.deadlines.remove(&(deadline, arrival));
        }
        Some(waiter)
    }

    fn empty(&mut self) -> Vec<Waiter> {
        self.deadlines.clear();
        std::mem::take(&mut self.waiters).into_values().collect()
    }
}
