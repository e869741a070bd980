//! When am I told that I lost it? Here, and nowhere else.
//!
//! Two halves: the pure decision ([`Beat`]: when to renew; the [`Deadline`] cell: when it is lost), and the one loop that
//! drives it for all claims of a manager, waiting and holding. The loop never waits for a store: attempts run beside it,
//! so a hung request delays no deadline.
//!
//! ```text
//! confirmed          +ttl/3            +ttl/2                                    +ttl
//!    |-----------------|-----------------|----------------------------------------|
//!    held              renew (CAS)       LOST here if no renewal was confirmed    earliest the store
//!                      retry, backoff    (a waiting claim is kept up to the ttl)  may let the next one in
//! ```

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use futures_lite::future::or;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::clock::Moment;
use crate::deadline::{Deadline, End, State, Tried};
use crate::error::{EndReason, Error, ErrorKind, Result};
use crate::observe;
use crate::runtime::{Environment, lock, until};
use crate::store::{ClaimId, Place, Renewal, Store};

/// When a claim is renewed next. Pure: every instant comes from outside, `confirmed` from the claim's deadline cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Beat {
    ttl: Duration,
    /// When the next attempt is due.
    due: Moment,
    /// Failed attempts since the last confirmed one.
    failures: u32,
}

impl Beat {
    pub(crate) fn new(confirmed: Moment, ttl: Duration) -> Self {
        Self { ttl, due: confirmed + ttl / 3, failures: 0 }
    }

    /// Whether to renew now. Renewals that fall due within ttl/100 of one another share a request.
    pub(crate) fn is_due(&self, now: Moment) -> bool {
        now + self.ttl / 100 >= self.due
    }

    /// When there is something to do next: a renewal, or the end.
    pub(crate) fn next(&self, confirmed: Moment, limit: Duration) -> Moment {
        self.due.min(confirmed + limit)
    }

    /// An attempt goes out. If it hangs, another follows beside it: a late answer to either counts.
    pub(crate) fn sent(&mut self, sent: Moment) {
        self.due = sent + self.ttl / 12;
    }

    /// An attempt failed: its outcome is unknown, so nothing is confirmed. Capped exponential backoff with jitter.
    pub(crate) fn failed(&mut self, now: Moment, random: u64) {
        let longest = (self.ttl / 128 * 2_u32.pow(self.failures.min(8))).min(self.ttl / 24);
        self.failures += 1;
        self.due = now + longest / 2 + jitter(longest / 2, random);
    }
}

/// A part of `span` chosen by 64 random bits.
pub(crate) fn jitter(span: Duration, random: u64) -> Duration {
    let nanos = u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(random.checked_rem(nanos).unwrap_or(0))
}

/// A claim that is in the line, as long as the heartbeat keeps it there.
pub(crate) struct Pulse {
    pub(crate) place: Place,
    deadline: Deadline,
    /// When it was handed out, if it is a lease.
    held_at: AtomicU64,
    /// Where the schedule has it, if it does: changed with the schedule locked.
    filed_at: AtomicU64,
    /// Wakes the pursuit of a waiting claim: it ended, or has been offered its turn.
    pub(crate) news: Notify,
    /// Wakes users. Made for the first who asks.
    ended: OnceLock<CancellationToken>,
}

impl Pulse {
    pub(crate) fn new(place: Place, confirmed: Moment) -> Arc<Self> {
        Arc::new(Self {
            place,
            deadline: Deadline::new(confirmed),
            held_at: AtomicU64::new(0),
            filed_at: AtomicU64::new(0),
            news: Notify::new(),
            ended: OnceLock::new(),
        })
    }

    /// Cancelled where user code may run, after the deadline cell says that it ended.
    pub(crate) fn ended(&self) -> &CancellationToken {
        let ended = self.ended.get_or_init(CancellationToken::new);
        // Of one who asks and one who ends it at the same time, at least one sees what the other did.
        fence(Ordering::SeqCst);
        if self.end_reason().is_some() {
            ended.cancel();
        }
        ended
    }

    /// When it was handed out, if it is a lease.
    pub(crate) fn held_at(&self) -> Option<Moment> {
        let at = self.held_at.load(Ordering::Acquire);
        (at > 0).then(|| Moment::from_nanos(at))
    }

    /// A holder is lost at half the ttl; a waiting claim is worth keeping until the store may drop it.
    fn limit(&self) -> Duration {
        let ttl = self.place.claim.ttl;
        if self.held_at().is_some() { ttl / 2 } else { ttl }
    }

    pub(crate) fn end_reason(&self) -> Option<EndReason> {
        match self.deadline.read() {
            State::Ended(reason) => Some(reason),
            State::Confirmed(..) => None,
        }
    }

    /// Its key in the schedule. The ids of a manager are counted up, so half of one tells them apart.
    #[expect(clippy::cast_possible_truncation, reason = "the lower half of an id")]
    fn key(&self, at: Moment) -> Key {
        (at, self.place.claim.id.0 as u64)
    }
}

/// When there is something to do next, and for whom.
type Key = (Moment, u64);

pub(crate) struct Heartbeat {
    store: Arc<dyn Store>,
    env: Arc<dyn Environment>,
    request_timeout: Duration,
    schedule: Mutex<Schedule>,
    wake: Notify,
}

#[derive(Default)]
struct Schedule {
    kept: BTreeMap<Key, (Arc<Pulse>, Beat)>,
    /// When the loop looks next: it is woken only for what is earlier.
    asleep_until: Option<Moment>,
    stopped: bool,
}

impl Schedule {
    /// Changes the beat of a claim that is kept, given what is confirmed, and files it under the time of its next step.
    fn update(&mut self, pulse: &Pulse, change: impl FnOnce(&mut Beat, Moment)) -> Option<Moment> {
        let State::Confirmed(confirmed, _) = pulse.deadline.read() else { return None };
        let (pulse, mut beat) = self.remove(pulse)?;
        change(&mut beat, confirmed);
        Some(self.file(pulse, beat, confirmed))
    }

    fn file(&mut self, pulse: Arc<Pulse>, beat: Beat, confirmed: Moment) -> Moment {
        let at = beat.next(confirmed, pulse.limit());
        pulse.filed_at.store(at.as_nanos(), Ordering::Relaxed);
        self.kept.insert(pulse.key(at), (pulse, beat));
        at
    }

    /// When to look next. A time that was told once is kept until it has passed, though what it was told for may be gone:
    /// else each of a row of short leases would wake the loop.
    fn next_look(&mut self, now: Moment) -> Moment {
        let first = self.kept.first_key_value().map_or(Moment::FAR, |((at, _), _)| *at);
        let told = self.asleep_until.filter(|at| *at > now);
        *self.asleep_until.insert(told.map_or(first, |told| told.min(first)))
    }

    fn remove(&mut self, pulse: &Pulse) -> Option<(Arc<Pulse>, Beat)> {
        match pulse.filed_at.swap(0, Ordering::Relaxed) {
            0 => None,
            at => self.kept.remove(&pulse.key(Moment::from_nanos(at))),
        }
    }
}

/// Renewals in one request. More would make one answer wait for too many.
const BATCH: usize = 1024;

impl Heartbeat {
    pub(crate) fn new(store: Arc<dyn Store>, env: Arc<dyn Environment>, request_timeout: Duration) -> Arc<Self> {
        Arc::new(Self { store, env, request_timeout, schedule: Mutex::default(), wake: Notify::new() })
    }

    /// Keeps a claim in the line from now on. Harmless when it is kept already.
    pub(crate) fn keep(&self, pulse: &Arc<Pulse>) {
        // Read under the lock, once: one that ends meanwhile is taken out after it was put in.
        let schedule = lock(&self.schedule);
        if let State::Confirmed(confirmed, _) = pulse.deadline.read() {
            self.keep_in(schedule, pulse, confirmed);
        }
    }

    fn keep_in(&self, mut schedule: MutexGuard<'_, Schedule>, pulse: &Arc<Pulse>, confirmed: Moment) {
        let kept = schedule.remove(pulse);
        let (pulse, beat) = kept.unwrap_or_else(|| (pulse.clone(), Beat::new(confirmed, pulse.place.claim.ttl)));
        let at = schedule.file(pulse, beat, confirmed);
        self.wake_by(at, schedule);
    }

    /// From now on the claim is a lease, lost at half its ttl. Not if it ended or is older than ttl/3: renew it first.
    /// Gives the clock reading by which its age was judged.
    pub(crate) fn hold(&self, pulse: &Arc<Pulse>) -> Option<Moment> {
        let age = pulse.place.claim.ttl / 3;
        let now = self.env.now();
        // As in `keep`: who ends it meanwhile knows that it was a lease.
        let schedule = lock(&self.schedule);
        let State::Confirmed(confirmed, _) = pulse.deadline.read() else { return None };
        (now <= confirmed + age).then(|| {
            if pulse.held_at.swap(now.as_nanos(), Ordering::AcqRel) == 0 {
                observe::holds();
            }
            self.keep_in(schedule, pulse, confirmed);
            now
        })
    }

    /// Ends a claim by an act of the holder or of the manager.
    pub(crate) fn end(&self, pulse: &Arc<Pulse>, reason: EndReason) -> End {
        let end = pulse.deadline.end(self.env.now(), pulse.limit(), reason);
        self.ended(pulse, end);
        end
    }

    /// The time left, or why there is none. Whoever finds the time up makes the end known.
    pub(crate) fn check(&self, pulse: &Arc<Pulse>) -> Result<Duration, EndReason> {
        let (now, limit) = (self.env.now(), pulse.limit());
        pulse.deadline.judge(now, limit).map(|at| (at + limit).since(now)).map_err(|end| {
            self.ended(pulse, end);
            end.reason
        })
    }

    /// Makes an end known, once: stops renewing, tells the waiting pursuit, then users.
    fn ended(&self, pulse: &Arc<Pulse>, end: End) {
        if !end.first {
            return;
        }
        let kept = lock(&self.schedule).remove(pulse);
        drop(kept);
        let held_at = pulse.held_at();
        if held_at.is_none() {
            pulse.news.notify_one();
        }
        fence(Ordering::SeqCst);
        if let Some(ended) = pulse.ended.get().cloned() {
            self.env.deliver(Box::new(move || ended.cancel()));
        }
        if let Some(held_at) = held_at {
            observe::ended(&*self.env, &pulse.place, held_at, end.reason);
        }
    }

    /// Renews now, whatever the schedule says.
    pub(crate) async fn renew_now(&self, pulse: &Arc<Pulse>) -> Result<()> {
        let outcome = self.attempt(self.env.now(), std::slice::from_ref(pulse)).await;
        if let Some(reason) = pulse.end_reason() {
            return Err(Error::ended(reason, &pulse.place.claim.name));
        }
        outcome.into_iter().next().unwrap_or_else(|| Err(Error::unavailable("the store gave no answer")))
    }

    /// One attempt for some claims. `sent` is the one clock reading that serves all of it.
    async fn attempt(&self, sent: Moment, pulses: &[Arc<Pulse>]) -> Vec<Result<()>> {
        let places: Vec<Place> = pulses.iter().map(|pulse| pulse.place.clone()).collect();
        for pulse in pulses {
            pulse.deadline.note(sent, Tried::Unanswered);
        }
        let answers = until(&*self.env, sent + self.request_timeout, self.store.renew(sent, &places)).await;
        let now = self.env.now();
        let mut answers = answers.unwrap_or_default().into_iter();
        let settle = |pulse| {
            let silence = || Err(Error::unavailable("the renewal was not answered in time").with_doubt());
            self.settle(pulse, sent, now, answers.next().unwrap_or_else(silence))
        };
        pulses.iter().map(settle).collect()
    }

    /// What an answer changes: `Renewed`, `Lost`, or an error, which means unknown and confirms nothing.
    fn settle(&self, pulse: &Arc<Pulse>, sent: Moment, now: Moment, answer: Result<Renewal>) -> Result<()> {
        match answer {
            Ok(Renewal::Renewed { confirmed, offered }) => {
                // A store cannot have restarted the ttl for a request before it was sent.
                let confirmed = confirmed.min(sent);
                if let State::Confirmed(before, _) = pulse.deadline.read() {
                    let headroom = (before + pulse.place.claim.ttl).since(now);
                    observe::renewed(&*self.env, &pulse.place, now.since(sent), headroom);
                }
                match pulse.deadline.confirm(now, pulse.limit(), confirmed) {
                    Ok(()) => {
                        let ttl = pulse.place.claim.ttl;
                        self.change(pulse, |beat, confirmed| *beat = Beat::new(confirmed, ttl));
                        if offered {
                            pulse.news.notify_one();
                        }
                    }
                    Err(end) => self.ended(pulse, end),
                }
                Ok(())
            }
            Ok(Renewal::Lost { superseded }) => {
                let reason = if superseded { EndReason::Superseded } else { EndReason::Gone };
                self.end(pulse, reason);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Incompatible => {
                // What answers is not the store that keeps the claim: nothing proves any more that it is ours.
                observe::incompatible(&*self.env, &pulse.place, &error);
                self.end(pulse, EndReason::Gone);
                Err(error)
            }
            Err(error) => {
                let tried = if error.kind() == ErrorKind::Denied { Tried::Refused } else { Tried::Unanswered };
                pulse.deadline.note(sent, tried);
                let random = self.env.random();
                self.change(pulse, |beat, confirmed| {
                    // A renewal sent later may have been confirmed meanwhile: then this failure is history.
                    if sent >= confirmed {
                        beat.failed(now, random);
                    }
                });
                observe::not_renewed(&*self.env, &pulse.place, &error);
                Err(error)
            }
        }
    }

    fn change(&self, pulse: &Pulse, change: impl FnOnce(&mut Beat, Moment)) {
        let mut schedule = lock(&self.schedule);
        if let Some(at) = schedule.update(pulse, change) {
            self.wake_by(at, schedule);
        }
    }

    /// Wakes the loop if it would sleep for longer.
    fn wake_by(&self, at: Moment, mut schedule: MutexGuard<'_, Schedule>) {
        if schedule.asleep_until.is_some_and(|until| at < until) {
            schedule.asleep_until = Some(at);
            drop(schedule);
            self.wake.notify_one();
        }
    }

    pub(crate) fn stop(&self) {
        lock(&self.schedule).stopped = true;
        self.wake.notify_one();
    }

    /// The loop: runs on the library's thread until [`stop`](Self::stop).
    pub(crate) async fn drive(self: Arc<Self>) {
        let mut gone = self.store.gone();
        loop {
            let now = self.env.now();
            let (due, late, next) = {
                let mut schedule = lock(&self.schedule);
                if schedule.stopped {
                    return;
                }
                let (due, late) = collect(&mut schedule, now);
                let next = schedule.next_look(now);
                (due, late, next)
            };
            for (pulse, end) in late {
                self.ended(&pulse, end);
            }
            for batch in batches(due) {
                let this = self.clone();
                self.env.spawn(Box::pin(async move {
                    this.attempt(now, &batch).await;
                }));
            }
            let woken = async {
                or(self.env.sleep_until(next), self.wake.notified()).await;
                None
            };
            if let Some(id) = or(woken, async { Some(gone.as_mut().await) }).await {
                gone = self.store.gone();
                self.suspect(id);
            }
        }
    }

    /// The store has heard that the claim may be gone: its renewal tells.
    fn suspect(self: &Arc<Self>, id: ClaimId) {
        // Seldom: an eviction. All are looked at.
        let is_it = |pulse: &&Arc<Pulse>| pulse.place.claim.id == id;
        let pulse = lock(&self.schedule).kept.values().map(|(pulse, _)| pulse).find(is_it).cloned();
        if let Some(pulse) = pulse {
            let this = self.clone();
            self.env.spawn(Box::pin(async move {
                this.attempt(this.env.now(), std::slice::from_ref(&pulse)).await;
            }));
        }
    }
}

/// A claim whose time is up.
type Late = (Arc<Pulse>, End);

/// What is due now, and what is too late.
fn collect(schedule: &mut Schedule, now: Moment) -> (Vec<Arc<Pulse>>, Vec<Late>) {
    let (mut due, mut late) = (Vec::new(), Vec::new());
    // What falls due soon after may share the request of the first.
    let share = match schedule.kept.first_key_value() {
        Some(((first, _), (_, beat))) if *first <= now => beat.ttl / 100,
        _ => return (due, late),
    };
    let near = schedule.kept.range(..=(now + share, u64::MAX));
    let near: Vec<_> = near.map(|(_, (pulse, beat))| (pulse.clone(), beat.is_due(now))).collect();
    for (pulse, is_due) in near {
        if let Err(end) = pulse.deadline.judge(now, pulse.limit()) {
            schedule.remove(&pulse);
            late.push((pulse, end));
            continue;
        }
        schedule.update(&pulse, |beat, _| {
            if is_due {
                beat.sent(now);
            }
        });
        if is_due {
            due.push(pulse);
        }
    }
    (due, late)
}

/// Requests of a bounded size and of one ttl each.
fn batches(mut due: Vec<Arc<Pulse>>) -> Vec<Vec<Arc<Pulse>>> {
    due.sort_by_key(|pulse| pulse.place.claim.ttl);
    due.chunk_by(|a, b| a.place.claim.ttl == b.place.claim.ttl)
        .flat_map(|same| same.chunks(BATCH))
        .map(<[_]>::to_vec)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(30);
    const HALF: Duration = Duration::from_secs(15);

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(millis * 1_000_000)
    }

    #[test]
    fn renewal_is_due_at_exactly_a_third_of_the_ttl() {
        let beat = Beat::new(at(0), TTL);
        assert_eq!(beat.next(at(0), HALF), at(10_000));
        assert!(!beat.is_due(at(9_699)), "earlier only to share a request");
        assert!(beat.is_due(at(9_700)) && beat.is_due(at(10_000)));
    }

    #[test]
    fn the_end_comes_before_an_attempt_that_is_due_later() {
        let mut beat = Beat::new(at(0), TTL);
        beat.sent(at(14_000));
        assert_eq!(beat.next(at(0), HALF), at(15_000));
        assert!(Deadline::new(at(0)).judge(at(15_000), HALF).is_err());
    }

    #[test]
    fn a_hung_request_is_followed_by_another_while_there_is_time() {
        let mut beat = Beat::new(at(0), TTL);
        beat.sent(at(10_000));
        assert_eq!(beat.next(at(0), HALF), at(12_500));
    }

    fn pulse(id: u128, confirmed: Moment) -> Arc<Pulse> {
        let name = crate::store::Name::new("n").unwrap();
        let claim =
            crate::store::Claim { name, id: ClaimId(id), ttl: TTL, owner: "test".into(), queues: true, follows: None };
        Pulse::new(Place { claim, token: crate::store::Token::try_from(1).unwrap() }, confirmed)
    }

    /// Ends a claim and does something with it, as nearly at the same time as it can be had, many times over. Says how often what
    /// came of it was wrong.
    fn while_it_ends<T>(act: impl Fn(&Heartbeat, &Arc<Pulse>) -> T, is_wrong: impl Fn(&Heartbeat, T) -> bool) -> usize {
        let env = crate::runtime::system().unwrap();
        let store = crate::stores::memory::MemoryStore::new(env.clone());
        let heartbeat = Heartbeat::new(store, env.clone(), TTL);
        let pulses: Vec<_> = (0..20_000).map(|id| pulse(id, env.now())).collect();
        let met = AtomicU64::new(0);
        let meet = |times: u64| {
            met.fetch_add(1, Ordering::SeqCst);
            for spins in 0.. {
                match met.load(Ordering::SeqCst) >= 2 * times {
                    true => return,
                    // Of one processor the other has to have its turn.
                    false if spins > 1_000 => std::thread::yield_now(),
                    false => std::hint::spin_loop(),
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for (pulse, round) in pulses.iter().zip(1..) {
                    meet(2 * round - 1);
                    heartbeat.end(pulse, EndReason::Gone);
                    meet(2 * round);
                }
            });
            let rounds = pulses.iter().zip(1..).filter(|(pulse, round)| {
                heartbeat.keep(pulse);
                // Not where a new one would be filed.
                heartbeat.change(pulse, Beat::sent);
                meet(2 * round - 1);
                (0..round % 50).for_each(|_| std::hint::spin_loop());
                let done = act(&heartbeat, pulse);
                meet(2 * round);
                is_wrong(&heartbeat, done)
            });
            rounds.count()
        })
    }

    /// It would be kept for ever, its time long past, and the loop would never sleep again.
    #[test]
    fn a_claim_that_ends_while_it_becomes_a_lease_is_not_kept() {
        let is_kept = |heartbeat: &Heartbeat, _| !std::mem::take(&mut lock(&heartbeat.schedule).kept).is_empty();
        assert_eq!(while_it_ends(Heartbeat::hold, is_kept), 0);
    }

    /// A token is made for the first who asks, perhaps at the very moment of the end.
    #[test]
    fn a_token_that_is_made_at_the_end_is_told_of_it() {
        assert_eq!(while_it_ends(|_, pulse| pulse.ended().clone(), |_, token| !token.is_cancelled()), 0);
    }

    /// One blip must not kill the holder, nor may a dead store be hammered.
    #[test]
    fn failures_are_retried_with_growing_capped_waits_inside_the_window() {
        for random in [0, 1, u64::MAX / 2, u64::MAX] {
            let (mut beat, mut now, mut waits) = (Beat::new(at(0), TTL), at(10_000), Vec::new());
            while now < at(0) + HALF {
                beat.failed(now, random);
                waits.push(beat.due.since(now));
                now = beat.due;
            }
            assert!((5..=16).contains(&waits.len()), "{} attempts", waits.len());
            assert!(waits[0] >= TTL / 256 && waits.iter().all(|wait| *wait <= TTL / 24), "{waits:?}");
        }
    }

    #[test]
    fn a_wait_is_never_zero_for_the_shortest_ttl_and_never_overflows_for_the_longest() {
        for ttl in [Duration::from_millis(50), Duration::from_secs(86_400)] {
            let mut beat = Beat::new(at(0), ttl);
            for _ in 0..100 {
                beat.failed(at(0), 0);
                assert!(beat.due > at(0) && beat.due <= at(0) + ttl / 24);
            }
        }
    }
}
