//! The memory store: the reference. Read it to learn what the clauses S1 to S12 of [`crate::store`] ask of a store.
//!
//! 1. A line is its claims in token order, and the first one holds (S1, S8). One counter for all names gives the tokens,
//!    so they increase although nothing of a name remains once its line is empty (S2).
//! 2. Every call is one step under one mutex, applied at once. So nothing of a claim can still be on its way when its
//!    `leave` is answered (S9), and a dropped future was applied or was not (S11).
//! 3. Every step first removes the claims of its line whose deadline has passed (S6). There are no offers: the next claim
//!    is the head as soon as those before it are gone.
//! 4. A claim has a latch, made by the first who waits for its leaving and opened when it leaves, after the mutex is
//!    free. As `turn` waits for the one claim before its own, a hand-over wakes one waiter (S7).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use async_trait::async_trait;
use foldhash::HashMap;
use tokio_util::sync::CancellationToken as Latch;

use crate::clock::Moment;
use crate::error::{Error, Result};
use crate::fork::keep_waiting;
use crate::runtime::{Environment, lock};
use crate::store::{Ahead, Claim, ClaimId, Departure, Limits, Name, Place, Record, Renewal, Standing, Store, Token};

/// One manager's store on lines that are kept in the memory of this process.
pub struct MemoryStore {
    lines: Arc<Mutex<Lines>>,
    env: Arc<dyn Environment>,
    closed: AtomicBool,
    /// Opened when it is closed.
    closing: Latch,
}

#[derive(Default)]
struct Lines {
    revision: i64,
    of: HashMap<Name, Line>,
}

/// The claims of one name. Never kept empty, unless it is watched.
#[derive(Default)]
struct Line {
    rows: VecDeque<Row>,
    watchers: usize,
    /// Opened when a claim enters the empty line.
    entered: Option<Latch>,
}

/// A claim in its line.
struct Row {
    id: ClaimId,
    token: Token,
    ttl: Duration,
    owner: Arc<str>,
    deadline: Moment,
    /// When it became the head, if it is.
    head_since: Moment,
    left: Option<Latch>,
}

/// What one step has at hand.
struct Step<'a> {
    now: Moment,
    revision: &'a mut i64,
    /// To be opened once the mutex is free.
    opened: &'a mut Vec<Latch>,
}

impl MemoryStore {
    /// A store with lines of its own.
    pub fn new(env: Arc<dyn Environment>) -> Arc<Self> {
        Self::on(Arc::default(), env)
    }

    /// A store on the lines of that name, which live as long as one of this process uses them. A forked child begins with
    /// none: what it inherited is a copy that nobody keeps.
    pub fn named(name: &str, env: Arc<dyn Environment>) -> Arc<Self> {
        /// Of a process, a name.
        type Named = (u32, String, Weak<Mutex<Lines>>);
        static NAMED: Mutex<Vec<Named>> = Mutex::new(Vec::new());
        let process = std::process::id();
        let _still = keep_waiting();
        let mut named = lock(&NAMED);
        named.retain(|(of, _, lines)| *of == process && lines.strong_count() > 0);
        let known = named.iter().find(|(_, known, _)| known == name).and_then(|(_, _, lines)| lines.upgrade());
        let lines = known.unwrap_or_else(|| {
            let lines = Arc::default();
            named.push((process, name.into(), Arc::downgrade(&lines)));
            lines
        });
        Self::on(lines, env)
    }

    /// Another manager's store on the same lines.
    pub fn beside(&self, env: Arc<dyn Environment>) -> Arc<Self> {
        Self::on(self.lines.clone(), env)
    }

    fn on(lines: Arc<Mutex<Lines>>, env: Arc<dyn Environment>) -> Arc<Self> {
        Arc::new(Self { lines, env, closed: AtomicBool::new(false), closing: Latch::new() })
    }

    /// One step on one line, unless this handle is closed.
    fn step<T>(&self, name: &Name, step: impl FnOnce(&mut Line, &mut Step<'_>) -> T) -> Result<T> {
        self.check_open().map(|()| self.step_at(None, name, step))
    }

    fn check_open(&self) -> Result<()> {
        if self.closed.load(Ordering::Relaxed) { Err(Error::closed()) } else { Ok(()) }
    }

    /// One step at an instant that was read before, or now. What is not past its deadline then may be so now: it is removed later.
    fn step_at<T>(&self, at: Option<Moment>, name: &Name, step: impl FnOnce(&mut Line, &mut Step<'_>) -> T) -> T {
        let mut opened = Vec::new();
        let answer = {
            let mut lines = lock(&self.lines);
            let Lines { revision, of } = &mut *lines;
            let now = at.unwrap_or_else(|| self.env.now());
            let line = of.entry(name.clone()).or_default();
            line.expire(now, &mut opened);
            let answer = step(line, &mut Step { now, revision, opened: &mut opened });
            if line.is_unused() {
                of.remove(name);
            }
            answer
        };
        // Wakers are code of others: never under the mutex.
        opened.iter().for_each(Latch::cancel);
        answer
    }

    fn enter(&self, sent: Moment, claim: &Claim) -> Result<Standing> {
        self.check_open()?;
        self.step_at(Some(sent), &claim.name, |line, step| match line.position(claim.id) {
            // The answer to the first attempt was lost: this is no second entry, and no renewal (S3).
            Some(at) => Ok(line.standing(at)),
            None if !claim.queues && !line.rows.is_empty() => Ok(Standing::Busy(line.ahead(line.rows.len()))),
            None => line.enter(claim, step).map(|()| line.standing(line.rows.len() - 1)),
        })
    }

    fn depart(&self, claim: &Claim) -> Result<Departure> {
        self.step(&claim.name, |line, step| match line.position(claim.id) {
            Some(at) => {
                line.remove(at, step.now, step.opened);
                Departure::Left
            }
            None => Departure::Gone,
        })
    }

    /// Resolves when the latch is open, at `until`, or, as an error, when this handle is closed.
    async fn wait(&self, latch: &Latch, until: Moment) -> Result<()> {
        let closed = async {
            self.closing.cancelled().await;
            Err(Error::closed())
        };
        let open_or_late = async {
            futures_lite::future::or(latch.cancelled(), self.env.sleep_until(until)).await;
            Ok(())
        };
        futures_lite::future::or(closed, open_or_late).await
    }
}

impl std::fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryStore").field("closed", &self.closed).finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for MemoryStore {
    fn limits(&self) -> Limits {
        Limits { min_ttl: Duration::from_millis(50), slack: Duration::ZERO }
    }

    fn claim_at_once(&self, sent: Moment, claim: &Claim) -> Option<Result<Standing>> {
        Some(self.enter(sent, claim))
    }

    fn leave_at_once(&self, claim: &Claim) -> Option<Result<Departure>> {
        Some(self.depart(claim))
    }

    async fn claim(&self, sent: Moment, claim: &Claim) -> Result<Standing> {
        self.enter(sent, claim)
    }

    async fn turn(&self, place: &Place, ahead: &Ahead) -> Result<()> {
        let latch = self.step(&place.claim.name, |line, _| {
            line.rows.iter_mut().find(|row| row.token == ahead.predecessor).map(Row::latch)
        })?;
        match latch {
            Some(latch) => self.wait(&latch, ahead.look_at).await,
            None => Ok(()),
        }
    }

    async fn look(&self, place: &Place) -> Result<Standing> {
        self.step(&place.claim.name, |line, _| match line.position_of(place) {
            Some(at) => line.standing(at),
            None => Standing::Lost,
        })
    }

    async fn renew(&self, sent: Moment, places: &[Place]) -> Vec<Result<Renewal>> {
        let renew = |place: &Place| {
            self.step(&place.claim.name, |line, step| match line.position_of(place) {
                Some(at) => {
                    let row = &mut line.rows[at];
                    row.deadline = row.deadline.max(step.now + row.ttl);
                    Renewal::Renewed { confirmed: sent, offered: false }
                }
                None => Renewal::Lost { superseded: !line.rows.is_empty() },
            })
        };
        places.iter().map(renew).collect()
    }

    async fn leave(&self, claim: &Claim) -> Result<Departure> {
        self.depart(claim)
    }

    async fn inspect(&self, name: &Name) -> Result<Option<Record>> {
        self.step(name, |line, step| line.record(name, step.now))
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Record>> {
        self.check_open()?;
        let names: Vec<Name> = lock(&self.lines).of.keys().filter(|name| name.starts_with(prefix)).cloned().collect();
        let mut records = Vec::new();
        for name in names {
            records.extend(self.step(&name, |line, step| line.record(&name, step.now))?);
        }
        records.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(records)
    }

    async fn changed(&self, name: &Name, seen: Option<Token>) -> Result<()> {
        let _watcher = Watcher::new(self, name);
        loop {
            let watched = self.step(name, |line, _| match line.rows.front_mut() {
                head if head.as_ref().map(|row| row.token) != seen => None,
                // Lowest once is lowest until it leaves: the head changes when this one leaves.
                Some(head) => Some((head.latch(), head.deadline)),
                None => Some((line.entered.get_or_insert_default().clone(), Moment::FAR)),
            })?;
            match watched {
                Some((latch, until)) => self.wait(&latch, until).await?,
                None => return Ok(()),
            }
        }
    }

    async fn evict(&self, name: &Name, token: Token) -> Result<bool> {
        self.step(name, |line, step| match line.rows.iter().position(|row| row.token == token) {
            Some(at) => {
                line.remove(at, step.now, step.opened);
                true
            }
            None => false,
        })
    }

    async fn ping(&self) -> Result<()> {
        self.check_open()
    }

    /// Claims that are still in their lines stay there until they expire: only `leave` says that the work has stopped.
    async fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.closing.cancel();
    }
}

impl Line {
    fn position(&self, id: ClaimId) -> Option<usize> {
        self.rows.iter().position(|row| row.id == id)
    }

    /// Where a claim that entered is. With another token it is not the one that entered (S3).
    fn position_of(&self, place: &Place) -> Option<usize> {
        self.position(place.claim.id).filter(|at| self.rows[*at].token == place.token)
    }

    fn enter(&mut self, claim: &Claim, step: &mut Step<'_>) -> Result<()> {
        *step.revision += 1;
        // Most names have one claim.
        if self.rows.capacity() == 0 {
            self.rows.reserve_exact(1);
        }
        self.rows.push_back(Row {
            id: claim.id,
            token: Token::try_from(*step.revision)?,
            ttl: claim.ttl,
            owner: claim.owner.clone(),
            deadline: step.now + claim.ttl,
            head_since: step.now,
            left: None,
        });
        step.opened.extend(self.entered.take());
        Ok(())
    }

    fn remove(&mut self, at: usize, now: Moment, opened: &mut Vec<Latch>) {
        opened.extend(self.rows.remove(at).and_then(|row| row.left));
        if at == 0
            && let Some(head) = self.rows.front_mut()
        {
            head.head_since = now;
        }
    }

    fn expire(&mut self, now: Moment, opened: &mut Vec<Latch>) {
        while let Some(at) = self.rows.iter().position(|row| row.deadline <= now) {
            self.remove(at, now, opened);
        }
    }

    fn standing(&self, at: usize) -> Standing {
        let token = self.rows[at].token;
        if at == 0 { Standing::Head(token) } else { Standing::Behind(token, self.ahead(at)) }
    }

    /// What stands before that position; there is something.
    fn ahead(&self, at: usize) -> Ahead {
        let (holder, predecessor) = (&self.rows[0], &self.rows[at - 1]);
        Ahead {
            predecessor: predecessor.token,
            count: at as u64,
            holder: holder.token,
            owner: (*holder.owner).into(),
            look_at: predecessor.deadline,
        }
    }

    fn record(&self, name: &Name, now: Moment) -> Option<Record> {
        let (head, waiting) = (self.rows.front()?, self.rows.len() as u64 - 1);
        let (owner, held_for) = ((*head.owner).into(), now.since(head.head_since));
        Some(Record::new(name.clone(), head.token, owner, held_for, head.ttl, waiting))
    }

    fn is_unused(&self) -> bool {
        self.rows.is_empty() && self.watchers == 0
    }
}

impl Row {
    fn latch(&mut self) -> Latch {
        self.left.get_or_insert_default().clone()
    }
}

/// Keeps a line known while somebody watches it, empty or not; dropped with the watching future (S11).
struct Watcher<'a>(&'a MemoryStore, &'a Name);

impl<'a> Watcher<'a> {
    fn new(store: &'a MemoryStore, name: &'a Name) -> Self {
        store.step_at(None, name, |line, _| line.watchers += 1);
        Self(store, name)
    }
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        self.0.step_at(None, self.1, |line, _| line.watchers -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures_lite::future::{block_on, poll_once};

    use super::*;

    /// A service that leases a name per job would grow for ever: neither claims nor watchers leave a line behind.
    #[test]
    fn nothing_remains_of_a_line_that_is_empty_and_not_watched() {
        block_on(async {
            let env = crate::runtime::system().unwrap();
            let store = MemoryStore::new(env.clone());
            let claim = Claim {
                name: Name::new("job").unwrap(),
                id: ClaimId(1),
                ttl: Duration::from_secs(60),
                owner: "test".into(),
                queues: true,
                follows: None,
            };
            {
                let mut watching = std::pin::pin!(store.changed(&claim.name, None));
                assert!(poll_once(&mut watching).await.is_none());
                assert!(matches!(store.claim(env.now(), &claim).await, Ok(Standing::Head(_))));
                watching.await.unwrap();
            }
            assert_eq!(lock(&store.lines).of.len(), 1);
            assert_eq!(store.leave(&claim).await.unwrap(), Departure::Left);
            assert!(lock(&store.lines).of.is_empty());
        });
    }

    #[test]
    fn a_named_store_is_shared_while_it_is_used() {
        let env = crate::runtime::system().unwrap();
        let first = MemoryStore::named("shared", env.clone());
        assert!(Arc::ptr_eq(&first.lines, &MemoryStore::named("shared", env.clone()).lines));
        assert!(!Arc::ptr_eq(&first.lines, &MemoryStore::named("other", env.clone()).lines));
        let gone = Arc::downgrade(&first.lines);
        drop(first);
        assert!(gone.upgrade().is_none());
    }
}
