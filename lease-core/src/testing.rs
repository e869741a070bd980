//! For testing your own loss handling (feature `test-util`): a clock you move, and a store whose connection you cut.
//!
//! ```
//! # tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap().block_on(async {
//! use std::time::Duration;
//! use lease_core::testing::{CutStore, TestEnvironment};
//! use lease_core::{EndReason, Manager, stores::memory::MemoryStore};
//!
//! let env = TestEnvironment::new(7);
//! let store = CutStore::new(MemoryStore::new(env.clone()));
//! let manager = Manager::builder().environment(env.clone()).store(store.clone()).open().await?;
//! let lease = manager.acquire("nightly").ttl(Duration::from_secs(30)).await?;
//! store.cut();
//! assert_eq!(lease.cancelled().await.reason, EndReason::Unreachable);
//! # Ok::<_, lease_core::Error>(()) }).unwrap();
//! ```
//!
//! The library's tasks run on the calling runtime: what blocks its thread, such as [`crate::blocking`], blocks them too. For
//! threads use a multi-thread runtime, its real clock, and [`CutStore`] alone. `tokio::time::advance` skips the heartbeats,
//! as a suspend does: sleep instead.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::clock::Moment;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{Environment, Job, Task, lock};
use crate::store::{Ahead, Claim, ClaimId, Departure, Limits, Name, Place, Record, Renewal, Standing, Store, Token};

/// Runs a manager on the calling tokio runtime, with its clock (pause it), and random numbers from a seed.
pub struct TestEnvironment {
    state: Arc<TestState>,
    tasks: TaskTracker,
}

struct TestState {
    runtime: Handle,
    start: Instant,
    jumped: AtomicU64,
    jump: Notify,
    random: AtomicU64,
    frozen: AtomicBool,
    asleep: Mutex<Vec<Waker>>,
}

impl TestEnvironment {
    /// An environment on the runtime that this is called in.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(seed: u64) -> Arc<Self> {
        let state = TestState {
            runtime: Handle::current(),
            start: Instant::now(),
            jumped: AtomicU64::new(1_000_000_000),
            jump: Notify::new(),
            random: AtomicU64::new(seed),
            frozen: AtomicBool::new(false),
            asleep: Mutex::default(),
        };
        Arc::new(Self { state: Arc::new(state), tasks: TaskTracker::new() })
    }

    /// Moves the clock while nothing runs: the machine slept. Timers that came due fire next.
    pub fn jump(&self, by: Duration) {
        self.state.jumped.fetch_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX >> 3), Ordering::SeqCst);
        self.state.jump.notify_waiters();
    }

    /// Stops the library's tasks, as a starved or wedged thread would, until [`thaw`](Self::thaw).
    pub fn freeze(&self) {
        self.state.frozen.store(true, Ordering::SeqCst);
    }

    /// Lets the library's tasks run again.
    pub fn thaw(&self) {
        self.state.frozen.store(false, Ordering::SeqCst);
        let asleep = std::mem::take(&mut *lock(&self.state.asleep));
        asleep.into_iter().for_each(Waker::wake);
    }

    /// How many of the library's tasks have not ended.
    pub fn tasks(&self) -> usize {
        self.tasks.len()
    }
}

impl fmt::Debug for TestEnvironment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestEnvironment").field("now", &self.state.now()).finish_non_exhaustive()
    }
}

impl TestState {
    fn now(&self) -> Moment {
        // A thread of a store has no clock of tokio's but the one it enters.
        let _entered = self.runtime.enter();
        Moment::from_nanos(self.jumped.load(Ordering::SeqCst)) + self.start.elapsed()
    }
}

impl Environment for TestEnvironment {
    fn now(&self) -> Moment {
        self.state.now()
    }

    fn sleep_until(&self, at: Moment) -> Task {
        if at >= Moment::FAR {
            // No timer: paused time would run to it when everything else waits for a real thread.
            return Box::pin(std::future::pending());
        }
        let state = self.state.clone();
        Box::pin(async move {
            loop {
                let jump = state.jump.notified();
                let left = at.since(state.now());
                if left.is_zero() {
                    return;
                }
                futures_lite::future::or(tokio::time::sleep(left), jump).await;
            }
        })
    }

    fn random(&self) -> u64 {
        // SplitMix64: every seed gives a full period, and every run of a seed the same numbers.
        let mut word = self.state.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::SeqCst);
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    }

    fn spawn(&self, task: Task) {
        self.tasks.spawn_on(Freezable { task, state: self.state.clone() }, &self.state.runtime);
    }

    fn deliver(&self, job: Job) {
        job();
    }

    fn log(&self, job: Job) {
        job();
    }

    fn start_calls(&self) -> Result<()> {
        Ok(())
    }

    fn call(&self, job: Job) -> Option<Job> {
        job();
        None
    }

    fn is_library_thread(&self) -> bool {
        false
    }

    fn stop(&self, limit: Moment) -> Task {
        let (tasks, limit) = (self.tasks.clone(), self.sleep_until(limit));
        Box::pin(async move {
            tasks.close();
            futures_lite::future::or(tasks.wait(), limit).await;
        })
    }
}

/// A task that makes no step while the environment is frozen.
struct Freezable {
    task: Task,
    state: Arc<TestState>,
}

impl Future for Freezable {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.state.frozen.load(Ordering::SeqCst) {
            lock(&self.state.asleep).push(cx.waker().clone());
            return Poll::Pending;
        }
        self.task.as_mut().poll(cx)
    }
}

/// The requests of a store, for saying which of them a fault meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// [`Store::claim`]
    Claim,
    /// [`Store::turn`]
    Turn,
    /// [`Store::look`]
    Look,
    /// [`Store::renew`]
    Renew,
    /// [`Store::leave`]
    Leave,
    /// [`Store::inspect`]
    Inspect,
    /// [`Store::list`]
    List,
    /// [`Store::changed`]
    Changed,
    /// [`Store::evict`]
    Evict,
    /// [`Store::ping`]
    Ping,
}

/// What happens to a request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Fault {
    /// It does not reach the store: an error of this kind at once.
    Refuse(ErrorKind),
    /// It reaches the store; the answer is lost, and the caller sees `Unavailable` at once.
    LoseReply,
    /// It reaches the store at once; the answer waits at the gate.
    HoldReply(Gate),
    /// It waits at the gate, and reaches the store then, though the caller may have given up.
    HoldRequest(Gate),
    /// The store panics.
    Panic,
}

/// Where requests or replies wait until it is opened.
#[derive(Clone, Debug)]
pub struct Gate(Arc<watch::Sender<bool>>);

impl Gate {
    /// A gate that is shut.
    pub fn shut() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }

    /// Lets everything through, now and later.
    pub fn open(&self) {
        self.0.send_replace(true);
    }

    async fn pass(&self) {
        // It fails only when the sender is gone, and this is one.
        let _ = self.0.subscribe().wait_for(|open| *open).await;
    }
}

/// A store whose connection can be cut, and whose requests and replies can be lost, held and delayed.
pub struct CutStore {
    store: Arc<dyn Store>,
    faults: Mutex<Faults>,
    /// Wakes what hangs in the store when the connection is cut.
    severed: Notify,
    /// Claims that have left.
    left: Arc<Mutex<HashSet<ClaimId>>>,
}

#[derive(Default)]
struct Faults {
    cut: bool,
    always: HashMap<Operation, Fault>,
    next: Vec<(Operation, Fault)>,
    calls: HashMap<Operation, u64>,
    fired: u64,
}

impl CutStore {
    /// Puts itself before a store.
    pub fn new(store: Arc<dyn Store>) -> Arc<Self> {
        Arc::new(Self { store, faults: Mutex::default(), severed: Notify::new(), left: Arc::default() })
    }

    /// Cuts the connection: every request fails with `Unavailable` and does not reach the store.
    pub fn cut(&self) {
        lock(&self.faults).cut = true;
        self.severed.notify_waiters();
    }

    /// Mends the connection, and ends the faults that were set for always.
    pub fn mend(&self) {
        let mut faults = lock(&self.faults);
        faults.cut = false;
        faults.always.clear();
    }

    /// The next request of this kind meets the fault; told again, the one after it.
    pub fn next(&self, operation: Operation, fault: Fault) {
        lock(&self.faults).next.push((operation, fault));
    }

    /// All requests of this kind meet the fault, until [`mend`](Self::mend).
    pub fn always(&self, operation: Operation, fault: Fault) {
        lock(&self.faults).always.insert(operation, fault);
    }

    /// How many requests of this kind were made.
    pub fn calls(&self, operation: Operation) -> u64 {
        lock(&self.faults).calls.get(&operation).copied().unwrap_or(0)
    }

    /// How many requests met a fault: a test that sets faults shows that they happened.
    pub fn fired(&self) -> u64 {
        lock(&self.faults).fired
    }

    fn fault(&self, operation: Operation) -> Option<Fault> {
        let mut faults = lock(&self.faults);
        *faults.calls.entry(operation).or_default() += 1;
        let next = faults.next.iter().position(|(meets, _)| *meets == operation);
        let fault = match next {
            _ if faults.cut => Some(Fault::Refuse(ErrorKind::Unavailable)),
            Some(at) => Some(faults.next.remove(at).1),
            None => faults.always.get(&operation).cloned(),
        };
        faults.fired += u64::from(fault.is_some());
        fault
    }

    /// A request that meets no fault may be answered at once; a panic is one at once too.
    fn at_once<T>(&self, operation: Operation, answer: impl FnOnce() -> Option<Result<T>>) -> Option<Result<T>> {
        let first = |faults: &Faults| {
            let next = faults.next.iter().find(|(meets, _)| *meets == operation).map(|(_, fault)| fault.clone());
            next.or_else(|| faults.always.get(&operation).cloned())
        };
        let (cut, fault) = {
            let faults = lock(&self.faults);
            (faults.cut, first(&faults))
        };
        match fault {
            Some(Fault::Panic) if !cut => {
                self.fault(operation);
                drop(answer());
                panic!("a store panics, as a test told it to");
            }
            None if !cut => {}
            _ => return None,
        }
        let answer = answer()?;
        *lock(&self.faults).calls.entry(operation).or_default() += 1;
        Some(answer)
    }

    async fn through<T, F>(&self, operation: Operation, request: impl FnOnce(Arc<dyn Store>) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let request = request(self.store.clone());
        let lost = || Err(Error::new(ErrorKind::Unavailable, "the reply was lost by a test").with_doubt());
        match self.fault(operation) {
            None => request.await,
            Some(Fault::Refuse(kind)) => Err(Error::new(kind, "refused by a test")),
            Some(Fault::Panic) => panic!("a store panics, as a test told it to"),
            Some(Fault::LoseReply) => {
                drop(request.await);
                lost()
            }
            Some(Fault::HoldReply(gate)) => {
                let reply = request.await;
                gate.pass().await;
                reply
            }
            Some(Fault::HoldRequest(gate)) => {
                let (tx, rx) = oneshot::channel();
                tokio::spawn(async move {
                    gate.pass().await;
                    drop(tx.send(request.await));
                });
                rx.await.unwrap_or_else(|_| lost())
            }
        }
    }
}

impl fmt::Debug for CutStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CutStore").field("cut", &lock(&self.faults).cut).finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for CutStore {
    fn limits(&self) -> Limits {
        self.store.limits()
    }

    fn answers_at_once(&self) -> bool {
        self.store.answers_at_once()
    }

    fn gone_after(&self, ttl: Duration) -> Duration {
        self.store.gone_after(ttl)
    }

    fn claim_at_once(&self, sent: Moment, claim: &Claim) -> Option<Result<Standing>> {
        self.at_once(Operation::Claim, || self.store.claim_at_once(sent, claim))
    }

    fn leave_at_once(&self, claim: &Claim) -> Option<Result<Departure>> {
        self.at_once(Operation::Leave, || {
            lock(&self.left).insert(claim.id);
            self.store.leave_at_once(claim)
        })
    }

    async fn gone(&self) -> ClaimId {
        self.store.gone().await
    }

    async fn claim(&self, sent: Moment, claim: &Claim) -> Result<Standing> {
        let (asked, left) = (claim.clone(), self.left.clone());
        let request = |store: Arc<dyn Store>| async move {
            // S9 binds this store too: what was held up on its way must not enter after the claim has left.
            if lock(&left).contains(&asked.id) { Ok(Standing::Lost) } else { store.claim(sent, &asked).await }
        };
        self.through(Operation::Claim, request).await
    }

    async fn turn(&self, place: &Place, ahead: &Ahead) -> Result<()> {
        let (place, ahead) = (place.clone(), ahead.clone());
        let severed = async {
            self.severed.notified().await;
            Err(Error::new(ErrorKind::Unavailable, "cut by a test"))
        };
        let turn = self.through(Operation::Turn, |store| async move { store.turn(&place, &ahead).await });
        futures_lite::future::or(severed, turn).await
    }

    async fn look(&self, place: &Place) -> Result<Standing> {
        let place = place.clone();
        self.through(Operation::Look, |store| async move { store.look(&place).await }).await
    }

    async fn renew(&self, sent: Moment, places: &[Place]) -> Vec<Result<Renewal>> {
        let asked = places.to_vec();
        let request = |store: Arc<dyn Store>| async move { Ok(store.renew(sent, &asked).await) };
        let answer = self.through(Operation::Renew, request).await;
        answer.unwrap_or_else(|error| places.iter().map(|_| Err(error.clone())).collect())
    }

    async fn leave(&self, claim: &Claim) -> Result<Departure> {
        let (claim, left) = (claim.clone(), self.left.clone());
        let request = |store: Arc<dyn Store>| async move {
            lock(&left).insert(claim.id);
            store.leave(&claim).await
        };
        self.through(Operation::Leave, request).await
    }

    async fn inspect(&self, name: &Name) -> Result<Option<Record>> {
        let name = name.clone();
        self.through(Operation::Inspect, |store| async move { store.inspect(&name).await }).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Record>> {
        let prefix = prefix.to_owned();
        self.through(Operation::List, |store| async move { store.list(&prefix).await }).await
    }

    async fn changed(&self, name: &Name, seen: Option<Token>) -> Result<()> {
        let name = name.clone();
        self.through(Operation::Changed, |store| async move { store.changed(&name, seen).await }).await
    }

    async fn evict(&self, name: &Name, token: Token) -> Result<bool> {
        let name = name.clone();
        self.through(Operation::Evict, |store| async move { store.evict(&name, token).await }).await
    }

    async fn ping(&self) -> Result<()> {
        self.through(Operation::Ping, |store| async move { store.ping().await }).await
    }

    async fn close(&self) {
        self.store.close().await;
    }
}
