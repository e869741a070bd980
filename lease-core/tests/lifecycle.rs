//! The life of a lease under faults, in paused time: every wait is simulated, every instant exact to the timer's
//! millisecond. The store is the memory store behind a connection that can be cut, held, delayed and robbed of replies.

use std::future::{Future, IntoFuture};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use lease_core::clock::Moment;
use lease_core::runtime::Environment;
use lease_core::store::{Claim, ClaimId, Name, Standing, Store};
use lease_core::stores::memory::MemoryStore;
use lease_core::testing::{CutStore, Fault, Gate, Operation, TestEnvironment};
use lease_core::{EndReason, Error, ErrorKind, Lease, Manager};

const TTL: Duration = Duration::from_secs(30);
const HALF: Duration = Duration::from_secs(15);
/// A timer of tokio's fires up to a millisecond late.
const TICK: Duration = Duration::from_millis(2);

struct Rig {
    env: Arc<TestEnvironment>,
    memory: Arc<MemoryStore>,
    store: Arc<CutStore>,
    manager: Manager,
}

impl Rig {
    async fn new() -> Self {
        let env = TestEnvironment::new(1);
        let memory = MemoryStore::new(env.clone());
        let store = CutStore::new(memory.clone());
        let manager = open(&env, store.clone()).await;
        Self { env, memory, store, manager }
    }

    /// Another manager on the same lines, whose connection nobody cuts.
    async fn other(&self) -> Manager {
        open(&self.env, self.memory.beside(self.env.clone())).await
    }

    async fn lease(&self) -> Lease {
        self.manager.acquire("n").await.expect("the name is free")
    }

    fn now(&self) -> Moment {
        self.env.now()
    }

    /// What the store itself says, past the connection and past every manager.
    async fn waiting(&self) -> Option<u64> {
        self.memory.inspect(&name()).await.expect("memory answers").map(|record| record.waiting)
    }

    /// Waits until no claim of the name is left, which must be well before expiry would see to it.
    async fn empties(&self) {
        let empty = async {
            let mut seen = self.memory.inspect(&name()).await.unwrap().map(|record| record.token);
            while seen.is_some() {
                self.memory.changed(&name(), seen).await.unwrap();
                seen = self.memory.inspect(&name()).await.unwrap().map(|record| record.token);
            }
        };
        tokio::time::timeout(TTL / 3, empty).await.expect("nothing may be left of the name");
    }
}

async fn open(env: &Arc<TestEnvironment>, store: Arc<dyn Store>) -> Manager {
    let builder = Manager::builder().environment(env.clone()).store(store).ttl(TTL);
    builder.open().await.expect("opens")
}

fn name() -> Name {
    Name::new("n").unwrap()
}

async fn pass(time: Duration) {
    tokio::time::sleep(time).await;
}

/// Lets every task that can run do so.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

/// Polls a future a number of times, letting others run in between.
async fn poll_times<F: Future + Unpin>(future: &mut F, times: usize) -> Option<F::Output> {
    for _ in 0..times {
        if let Poll::Ready(output) = std::pin::Pin::new(&mut *future).poll(&mut Context::from_waker(Waker::noop())) {
            return Some(output);
        }
        settle().await;
    }
    None
}

fn kind<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorKind {
    result.expect_err("an error").kind()
}

// ---- renewal -------------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_held_lease_is_renewed_at_a_third_and_stays_held() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    assert_eq!(rig.store.calls(Operation::Renew), 0);
    pass(TTL / 3 - TICK).await;
    assert_eq!(rig.store.calls(Operation::Renew), 0, "not before a third");
    pass(TICK * 2).await;
    assert_eq!(rig.store.calls(Operation::Renew), 1, "at a third");
    pass(TTL * 10).await;
    assert!(lease.is_held());
    assert!((30..=31).contains(&rig.store.calls(Operation::Renew)), "once a third of a ttl");
}

/// The deadline counts from the send: a reply that was long on its way gives less time, not more.
#[tokio::test(start_paused = true)]
async fn deadline_counted_from_the_reply() {
    let rig = Rig::new().await;
    let gate = Gate::shut();
    rig.store.next(Operation::Claim, Fault::HoldReply(gate.clone()));
    let sent = rig.now();
    let acquiring = tokio::spawn(rig.manager.acquire("n").into_future());
    pass(Duration::from_secs(2)).await;
    gate.open();
    let lease = acquiring.await.unwrap().unwrap();
    let left = lease.remaining();
    assert!(left <= (sent + HALF).since(rig.now()), "{left:?} counts from the send");
    assert_eq!(rig.store.fired(), 1);
}

/// The reply to a renewal that comes late counts from its own send, though another was sent meanwhile.
#[tokio::test(start_paused = true)]
async fn late_reply_counts_from_its_own_send() {
    let rig = Rig::new().await;
    let gate = Gate::shut();
    let lease = rig.lease().await;
    let confirmed = rig.now();
    rig.store.always(Operation::Renew, Fault::HoldReply(gate.clone()));
    pass(TTL / 3 + Duration::from_secs(3)).await;
    assert!(rig.store.calls(Operation::Renew) >= 2, "a hung renewal is followed by another");
    rig.store.mend();
    gate.open();
    settle().await;
    let newest = confirmed + TTL / 3 + Duration::from_millis(2_500) + TICK;
    assert!(lease.remaining() <= (newest + HALF).since(rig.now()), "not from the reply");
    assert!(lease.remaining() > (confirmed + HALF).since(rig.now()), "but it counts");
}

/// One clock reading serves a request: a freeze between reading and sending gives no time.
#[tokio::test(start_paused = true)]
async fn two_clock_readings_for_one_request() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    let confirmed = rig.now();
    let gate = Gate::shut();
    // The request is on its way when the machine sleeps, and is applied and answered after it woke.
    rig.store.next(Operation::Renew, Fault::HoldRequest(gate.clone()));
    pass(TTL / 3 + TICK).await;
    rig.env.jump(Duration::from_secs(2));
    gate.open();
    settle().await;
    assert_eq!(rig.store.fired(), 1);
    assert!(lease.remaining() <= (confirmed + TTL / 3 + TICK + HALF).since(rig.now()), "counts from before the sleep");
}

/// A claim whose reply was lost is sent again; the yes to the second attempt counts from the first.
#[tokio::test(start_paused = true)]
async fn idempotent_yes_counted_from_the_retry() {
    let rig = Rig::new().await;
    rig.store.next(Operation::Claim, Fault::LoseReply);
    rig.store.next(Operation::Claim, Fault::LoseReply);
    let first = rig.now();
    let lease = rig.lease().await;
    assert_eq!(rig.store.calls(Operation::Claim), 3);
    assert_eq!(lease.token().get(), 1, "one claim, though sent three times");
    assert!(rig.now() > first);
    assert!(lease.remaining() <= (first + HALF).since(rig.now()));
}

/// After a long outage the yes is older than ttl/3: the claim is renewed before it is handed out.
#[tokio::test(start_paused = true)]
async fn age_is_judged_at_hand_out() {
    let rig = Rig::new().await;
    let gate = Gate::shut();
    rig.store.next(Operation::Claim, Fault::LoseReply);
    rig.store.always(Operation::Claim, Fault::Refuse(ErrorKind::Unavailable));
    let acquiring = tokio::spawn(rig.manager.acquire("n").into_future());
    pass(TTL / 3 + Duration::from_secs(2)).await;
    rig.store.mend();
    rig.store.next(Operation::Renew, Fault::HoldReply(gate.clone()));
    pass(Duration::from_millis(2_500)).await;
    assert!(!acquiring.is_finished(), "not handed out before it is renewed");
    gate.open();
    let lease = acquiring.await.unwrap().unwrap();
    assert_eq!(rig.store.calls(Operation::Renew), 1);
    assert!(lease.remaining() > HALF - Duration::from_secs(3), "as fresh as its renewal");
}

/// A renewal that was applied, its reply lost, is followed by one that must not take the first for another's.
#[tokio::test(start_paused = true)]
async fn renewed_by_its_own_lost_reply() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    for _ in 0..5 {
        rig.store.next(Operation::Renew, Fault::LoseReply);
        pass(TTL / 3).await;
    }
    assert_eq!(rig.store.fired(), 5);
    assert!(lease.is_held(), "{lease:?}");
}

#[tokio::test(start_paused = true)]
async fn delayed_old_renewal_shortens_nothing() {
    let rig = Rig::new().await;
    let gate = Gate::shut();
    let lease = rig.lease().await;
    rig.store.next(Operation::Renew, Fault::HoldRequest(gate.clone()));
    pass(TTL / 3 + Duration::from_secs(3)).await;
    assert_eq!(rig.store.calls(Operation::Renew), 2);
    let before = lease.remaining();
    gate.open();
    settle().await;
    assert!(lease.remaining() + TICK >= before, "the old one was applied late and changed nothing");
    pass(TTL * 2).await;
    assert!(lease.is_held());
}

/// One blip, or several, inside the window do not kill the holder.
#[tokio::test(start_paused = true)]
async fn one_blip_kills_the_holder() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    for _ in 0..20 {
        for _ in 0..3 {
            rig.store.next(Operation::Renew, Fault::Refuse(ErrorKind::Unavailable));
        }
        pass(TTL / 3).await;
    }
    assert!(rig.store.fired() >= 57, "{} blips", rig.store.fired());
    assert!(lease.is_held());
}

#[tokio::test(start_paused = true)]
async fn flapping_connection_keeps_the_lease_while_renewals_can_succeed() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    for _ in 0..200 {
        rig.store.cut();
        pass(Duration::from_millis(900)).await;
        rig.store.mend();
        pass(Duration::from_millis(1_300)).await;
    }
    assert!(rig.store.fired() > 20, "{} requests met the cut", rig.store.fired());
    assert!(lease.is_held());
}

/// Thousands of leases are no thousands of tasks, and what falls due together is renewed together.
#[tokio::test(start_paused = true)]
async fn many_leases_share_one_driver_and_few_requests() {
    let rig = Rig::new().await;
    let before = rig.env.tasks();
    let mut leases = Vec::new();
    for number in 0..3_000 {
        leases.push(rig.manager.acquire(format!("n{number}")).await.unwrap());
    }
    assert_eq!(rig.env.tasks(), before, "no task a lease");
    pass(TTL / 3 + TICK).await;
    assert_eq!(rig.store.calls(Operation::Renew), 3, "3,000 renewals, 1,024 a request");
    pass(TTL * 3).await;
    assert!(leases.iter().all(Lease::is_held));
    rig.manager.close().await.unwrap();
    assert_eq!(rig.other().await.list("").await.unwrap(), []);
}

/// However many wait in a process, the store sees one of them.
#[tokio::test(start_paused = true)]
async fn five_thousand_local_waiters_cost_no_more_than_one() {
    let rig = Rig::new().await;
    let held = rig.other().await.acquire("n").await.unwrap();
    let mut waiters = tokio::task::JoinSet::new();
    for _ in 0..5_000 {
        waiters.spawn(rig.manager.acquire("n").timeout(TTL * 2).into_future());
    }
    pass(TTL).await;
    assert_eq!(rig.waiting().await, Some(1));
    assert_eq!(rig.store.calls(Operation::Claim), 1);
    assert!(rig.env.tasks() < 10, "{} tasks", rig.env.tasks());
    while let Some(waiter) = waiters.join_next().await {
        assert_eq!(kind(waiter.unwrap()), ErrorKind::Timeout);
    }
    settle().await;
    assert_eq!(rig.waiting().await, Some(0));
    held.release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn confirm_is_a_renewal_now() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    pass(TTL / 6).await;
    lease.confirm().await.unwrap();
    assert!(lease.remaining() > HALF - TICK);
    rig.store.cut();
    assert_eq!(kind(lease.confirm().await), ErrorKind::Unavailable);
    assert!(lease.is_held(), "an error is no loss");
}

// ---- loss ----------------------------------------------------------------------------------------------------------

/// Lost at half the ttl after the last confirmed send, not before and at most 50 ms after.
#[tokio::test(start_paused = true)]
async fn unreachable_store_cancels_at_half_the_ttl() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    let confirmed = rig.now();
    rig.store.cut();
    pass(HALF - TICK).await;
    assert!(lease.is_held());
    let ended = lease.cancelled().await;
    let at = rig.now().since(confirmed);
    assert_eq!(ended.reason, EndReason::Unreachable);
    assert!(at >= HALF - TICK && at <= HALF + Duration::from_millis(50), "cancelled after {at:?}");
    assert!(rig.store.fired() >= 4, "it tried {} times", rig.store.fired());
}

#[tokio::test(start_paused = true)]
async fn hung_request_never_delays_the_deadline() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    let confirmed = rig.now();
    rig.store.always(Operation::Renew, Fault::HoldRequest(Gate::shut()));
    let ended = lease.cancelled().await;
    assert_eq!(ended.reason, EndReason::Unreachable);
    assert!(rig.now().since(confirmed) <= HALF + Duration::from_millis(50));
    assert!(rig.store.fired() >= 1);
}

#[tokio::test(start_paused = true)]
async fn refusals_are_told_as_the_reason() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    rig.store.always(Operation::Renew, Fault::Refuse(ErrorKind::Denied));
    assert_eq!(lease.cancelled().await.reason, EndReason::Denied);
}

/// A store that is not the one any more proves nothing: the lease ends at once.
#[tokio::test(start_paused = true)]
async fn incompatible_store_ends_the_lease() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    let confirmed = rig.now();
    rig.store.always(Operation::Renew, Fault::Refuse(ErrorKind::Incompatible));
    assert_eq!(lease.cancelled().await.reason, EndReason::Gone);
    assert!(rig.now().since(confirmed) < TTL / 3 + TICK * 2);
}

/// The machine slept past the ttl: the first call says lost, before any timer or task has run.
#[tokio::test(start_paused = true)]
async fn clock_jump_is_seen_by_the_first_call() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    rig.env.jump(HALF);
    assert!(!lease.is_held());
    assert_eq!(lease.end_reason(), Some(EndReason::Stalled));
    assert_eq!(lease.check().unwrap_err().reason(), Some(EndReason::Stalled));
    assert_eq!(lease.remaining(), Duration::ZERO);
}

/// The machine slept past a third but not past half: the renewal that is due goes out at once.
#[tokio::test(start_paused = true)]
async fn short_suspend_is_survived() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    rig.env.jump(HALF - Duration::from_secs(1));
    settle().await;
    assert_eq!(rig.store.calls(Operation::Renew), 1);
    assert!(lease.remaining() > HALF - TICK);
}

/// A driver that makes no step cannot say it, so the clock does, at the call.
#[tokio::test(start_paused = true)]
async fn stalled_driver_is_no_excuse() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    rig.env.freeze();
    pass(HALF).await;
    assert!(!lease.is_held(), "found by the call though the driver is stuck");
    assert_eq!(lease.end_reason(), Some(EndReason::Stalled));
    rig.env.thaw();
    pass(TTL).await;
    assert!(!lease.is_held(), "and never undone");
    assert_eq!(lease.end_reason(), Some(EndReason::Stalled));
}

/// Delivered to everybody, once, and final though the store is back and would renew.
#[tokio::test(start_paused = true)]
async fn loss_never_delivered_twice_or_undone() {
    let rig = Rig::new().await;
    let lease = Arc::new(rig.lease().await);
    let told = Arc::new(AtomicUsize::new(0));
    let token = lease.cancellation();
    let mut watchers = Vec::new();
    for _ in 0..10 {
        let (lease, told) = (lease.clone(), told.clone());
        watchers.push(tokio::spawn(async move {
            lease.cancelled().await;
            told.fetch_add(1, Ordering::SeqCst);
        }));
    }
    rig.store.cut();
    pass(HALF + TICK).await;
    assert_eq!(told.load(Ordering::SeqCst), 10);
    assert!(token.is_cancelled());
    rig.store.mend();
    pass(TTL).await;
    assert!(!lease.is_held() && lease.cancelled().await.reason == EndReason::Unreachable);
    assert!(lease.confirm().await.is_err());
    for watcher in watchers {
        watcher.await.unwrap();
    }
}

/// A lost lease may still be worked under: its claim is left to expire, not deleted.
#[tokio::test(start_paused = true)]
async fn release_before_the_work_has_stopped() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    let confirmed = rig.now();
    rig.store.cut();
    lease.cancelled().await;
    rig.store.mend();
    let next = rig.other().await.acquire("n").await.unwrap();
    let at = rig.now().since(confirmed);
    assert!(at >= TTL && at <= TTL + TICK * 2, "the next one got it after {at:?}");
    assert!(next.token() > lease.token());
}

#[tokio::test(start_paused = true)]
async fn eviction_is_told_with_its_evidence() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    rig.other().await.break_lease("n", lease.token()).await.unwrap();
    assert_eq!(lease.cancelled().await.reason, EndReason::Gone);

    let lease = rig.lease().await;
    let other = rig.other().await;
    let waiting = tokio::spawn(async move { other.acquire("n").await });
    settle().await;
    rig.manager.break_lease("n", lease.token()).await.unwrap();
    let next = waiting.await.unwrap().unwrap();
    assert_eq!(lease.cancelled().await.reason, EndReason::Superseded);
    assert!(next.is_held());
    assert_eq!(kind(rig.manager.break_lease("n", lease.token()).await), ErrorKind::NotFound);
}

/// The manager that grants a name to its own next waiter knows thereby that the one before is over.
#[tokio::test(start_paused = true)]
async fn an_evicted_lease_ends_when_its_manager_grants_the_name_again() {
    let rig = Rig::new().await;
    let evicted = rig.lease().await;
    let next = tokio::spawn(rig.manager.acquire("n").into_future());
    settle().await;
    rig.manager.break_lease("n", evicted.token()).await.unwrap();
    let next = next.await.unwrap().unwrap();
    assert!(!evicted.is_held() && next.is_held());
    assert_eq!(evicted.cancelled().await.reason, EndReason::Superseded);
}

/// Evicted and not told yet when the manager is closed: nobody would tell it any more.
#[tokio::test(start_paused = true)]
async fn closing_ends_every_lease_whatever_became_of_its_claim() {
    let rig = Rig::new().await;
    let evicted = rig.lease().await;
    rig.other().await.break_lease("n", evicted.token()).await.unwrap();
    let again = rig.manager.try_acquire("n").await.unwrap();
    assert!(again.is_none(), "this process believes that it holds the name");
    rig.manager.close().await.unwrap();
    assert_eq!(evicted.cancelled().await.reason, EndReason::Closed);
}

/// Cancelling the token that was handed out cancels what hangs on it, and no lease.
#[tokio::test(start_paused = true)]
async fn cancelling_the_users_token_fakes_nothing() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    lease.cancellation().cancel();
    assert!(lease.is_held() && !lease.cancellation().is_cancelled());
    lease.release().await.unwrap();
}

// ---- guard ---------------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn guarded_work_is_dropped_when_the_lease_is_lost() {
    struct Dropped(Arc<AtomicUsize>);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    let dropped = Arc::new(AtomicUsize::new(0));
    let canary = Dropped(dropped.clone());
    rig.store.cut();
    let work = async move {
        let _canary = canary;
        std::future::pending::<()>().await;
    };
    let error = lease.guard(work).await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Lost, Some(EndReason::Unreachable)));
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn guarded_work_that_ends_too_late_is_no_success() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    let env = rig.env.clone();
    assert_eq!(lease.guard(async { 42 }).await.unwrap(), 42);
    let late = lease.guard(async move { env.jump(HALF) }).await;
    assert_eq!(kind(late), ErrorKind::Lost);
    let polled = AtomicUsize::new(0);
    let refused = lease.guard(async { polled.fetch_add(1, Ordering::SeqCst) }).await;
    assert_eq!(kind(refused), ErrorKind::Lost);
    assert_eq!(polled.load(Ordering::SeqCst), 0, "work is not begun under a lost lease");
}

/// The work is woken after the process was stopped, before any timer has fired: it must not make another step.
#[tokio::test(start_paused = true)]
async fn guarded_work_makes_no_step_after_the_time_is_up() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    let polls = AtomicUsize::new(0);
    let mut guarded = Box::pin(lease.guard(std::future::poll_fn(|_| {
        polls.fetch_add(1, Ordering::SeqCst);
        Poll::<()>::Pending
    })));
    assert!(poll_times(&mut guarded, 1).await.is_none());
    rig.env.freeze();
    rig.env.jump(HALF);
    let error = poll_times(&mut guarded, 1).await.expect("told at once").unwrap_err();
    assert_eq!(error.reason(), Some(EndReason::Stalled));
    assert_eq!(polls.load(Ordering::SeqCst), 1);
}

// ---- waiting -------------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn waiters_of_one_manager_come_first_come_first_served_with_one_claim_waiting() {
    let rig = Rig::new().await;
    let mut lease = rig.lease().await;
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut waiters = Vec::new();
    for number in 0..20 {
        let (manager, order) = (rig.manager.clone(), order.clone());
        waiters.push(tokio::spawn(async move {
            let lease = manager.acquire("n").await.unwrap();
            order.lock().unwrap().push((number, lease.token()));
            lease.release().await.unwrap();
        }));
        settle().await;
    }
    assert_eq!(rig.waiting().await, Some(1), "twenty waiters, one claim");
    lease.release().await.unwrap();
    for waiter in waiters {
        waiter.await.unwrap();
    }
    let order = order.lock().unwrap().clone();
    assert_eq!(order.iter().map(|(number, _)| *number).collect::<Vec<_>>(), (0..20).collect::<Vec<_>>());
    assert!(order.is_sorted_by(|a, b| a.1 < b.1), "{order:?}");
    lease = rig.lease().await;
    assert_eq!(rig.waiting().await, Some(0));
    drop(lease);
}

/// A waiting claim is renewed like a holding one, however long it waits.
#[tokio::test(start_paused = true)]
async fn a_waiting_claim_is_kept() {
    let rig = Rig::new().await;
    let holder = rig.other().await.acquire("n").await.unwrap();
    let waiting = tokio::spawn(rig.manager.acquire("n").into_future());
    settle().await;
    let second = rig.memory.inspect(&name()).await.unwrap().unwrap();
    pass(TTL * 5).await;
    assert_eq!(rig.waiting().await, Some(1));
    holder.release().await.unwrap();
    let lease = waiting.await.unwrap().unwrap();
    assert_eq!(lease.token().get(), second.token.get() + 1, "the place was kept");
    assert!(lease.remaining() > HALF - TTL / 3, "and is fresh");
}

/// A waiter whose own claim died notices, and claims anew with a new id.
#[tokio::test(start_paused = true)]
async fn a_waiter_ignores_that_its_own_claim_died() {
    let rig = Rig::new().await;
    let holder = rig.other().await.acquire("n").await.unwrap();
    let waiting = tokio::spawn(rig.manager.acquire("n").into_future());
    settle().await;
    let died = lease_core::Token::try_from(holder.token().get() + 1).unwrap();
    assert!(rig.memory.evict(&name(), died).await.unwrap());
    pass(TTL).await;
    assert_eq!(rig.waiting().await, Some(1), "it claimed anew");
    holder.release().await.unwrap();
    let lease = waiting.await.unwrap().unwrap();
    assert!(lease.token() > died);
}

/// A waiting claim that cannot be renewed for a ttl is given up for a new one when the store is back.
#[tokio::test(start_paused = true)]
async fn a_waiter_outlives_an_outage_longer_than_its_ttl() {
    let rig = Rig::new().await;
    let holder = rig.other().await.acquire("n").await.unwrap();
    let waiting = tokio::spawn(rig.manager.acquire("n").into_future());
    settle().await;
    rig.store.cut();
    pass(TTL * 3).await;
    assert_eq!(rig.waiting().await, Some(0), "the store dropped it");
    rig.store.mend();
    pass(Duration::from_secs(5)).await;
    assert_eq!(rig.waiting().await, Some(1), "it is back");
    holder.release().await.unwrap();
    assert!(waiting.await.unwrap().unwrap().is_held());
}

#[tokio::test(start_paused = true)]
async fn a_timeout_names_the_holder_and_the_place() {
    let rig = Rig::new().await;
    let held = rig.other().await.acquire("n").owner("them").await.unwrap();
    let began = rig.now();
    let error = rig.manager.acquire("n").timeout(Duration::from_secs(5)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    let holder = error.holder().unwrap();
    assert_eq!((&*holder.owner, holder.token), ("them", held.token()));
    assert_eq!(error.place(), Some(1));
    assert!(rig.now().since(began) <= Duration::from_secs(5) + TICK);
}

#[tokio::test(start_paused = true)]
async fn timed_out_acquire_leaves_an_orphan() {
    let rig = Rig::new().await;
    let held = rig.other().await.acquire("n").await.unwrap();
    // The reply to its entering is lost, and so is the first reply to its withdrawal.
    rig.store.next(Operation::Claim, Fault::LoseReply);
    rig.store.next(Operation::Leave, Fault::LoseReply);
    let timeout = rig.manager.acquire("n").timeout(Duration::from_millis(5)).await;
    assert_eq!(kind(timeout), ErrorKind::Unavailable, "the store never answered");
    pass(Duration::from_secs(1)).await;
    assert_eq!(rig.waiting().await, Some(0));
    assert_eq!(rig.store.fired(), 2);
    held.release().await.unwrap();
}

/// The place in the store's line is the manager's: when its waiter gives up, the next one takes it over.
#[tokio::test(start_paused = true)]
async fn a_place_is_inherited_by_the_next_waiter_of_the_same_wish() {
    let rig = Rig::new().await;
    let (first, other) = (rig.other().await, rig.other().await);
    let held = first.acquire("n").await.unwrap();
    let gives_up = tokio::spawn(rig.manager.acquire("n").timeout(Duration::from_secs(1)).into_future());
    settle().await;
    let behind = tokio::spawn(async move { other.acquire("n").await });
    let inherits = tokio::spawn(rig.manager.acquire("n").into_future());
    settle().await;
    assert_eq!(kind(gives_up.await.unwrap()), ErrorKind::Timeout);
    held.release().await.unwrap();
    let lease = inherits.await.unwrap().unwrap();
    assert_eq!(rig.store.calls(Operation::Claim), 1, "one claim for both");
    lease.release().await.unwrap();
    behind.await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_waiter_of_another_ttl_gets_a_claim_of_its_own() {
    let rig = Rig::new().await;
    let held = rig.other().await.acquire("n").await.unwrap();
    let gives_up = tokio::spawn(rig.manager.acquire("n").timeout(Duration::from_secs(1)).into_future());
    settle().await;
    let other_ttl = tokio::spawn(rig.manager.acquire("n").ttl(TTL * 2).into_future());
    assert_eq!(kind(gives_up.await.unwrap()), ErrorKind::Timeout);
    settle().await;
    assert_eq!(rig.waiting().await, Some(1), "the first claim left, the second is in");
    assert_eq!((rig.store.calls(Operation::Claim), rig.store.calls(Operation::Leave)), (2, 1));
    held.release().await.unwrap();
    assert_eq!(other_ttl.await.unwrap().unwrap().ttl(), TTL * 2);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_does_not_wait() {
    let rig = Rig::new().await;
    let other = rig.other().await;
    let held = other.acquire("n").await.unwrap();
    assert!(rig.manager.try_acquire("n").await.unwrap().is_none());
    assert_eq!(rig.waiting().await, Some(0), "and leaves nothing");
    let error = rig.manager.acquire("n").timeout(Duration::ZERO).await.unwrap_err();
    assert_eq!((error.kind(), error.holder().unwrap().token), (ErrorKind::Timeout, held.token()));
    held.release().await.unwrap();
    let mine = rig.manager.try_acquire("n").await.unwrap().expect("free");
    assert!(rig.manager.try_acquire("n").await.unwrap().is_none(), "not re-entrant");
    rig.store.cut();
    assert_eq!(kind(rig.manager.try_acquire("other").await), ErrorKind::Unavailable);
    drop(mine);
}

#[tokio::test(start_paused = true)]
async fn acquire_retries_while_the_store_is_down_and_says_unavailable_at_its_deadline() {
    let rig = Rig::new().await;
    rig.store.cut();
    let began = rig.now();
    let error = rig.manager.acquire("n").timeout(Duration::from_secs(60)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(rig.now().since(began) >= Duration::from_secs(60));
    let tries = rig.store.calls(Operation::Claim);
    assert!((20..200).contains(&tries), "{tries} tries in a minute");
    let waiting = tokio::spawn(rig.manager.acquire("n").into_future());
    pass(TTL * 10).await;
    rig.store.mend();
    assert!(waiting.await.unwrap().unwrap().is_held());
}

/// What cannot be retried ends the wait at once.
#[tokio::test(start_paused = true)]
async fn refused_credentials_are_not_retried() {
    let rig = Rig::new().await;
    rig.store.always(Operation::Claim, Fault::Refuse(ErrorKind::Denied));
    let error = rig.manager.acquire("n").await.unwrap_err();
    assert_eq!((error.kind(), error.operation(), error.name()), (ErrorKind::Denied, Some("acquire"), Some("n")));
}

/// The turn came while the connection was cut: no watch tells it, so the waiter looks when it is back.
#[tokio::test(start_paused = true)]
async fn lost_wake_up_between_read_and_watch() {
    let rig = Rig::new().await;
    let held = rig.other().await.acquire("n").await.unwrap();
    rig.store.always(Operation::Turn, Fault::Refuse(ErrorKind::Unavailable));
    let waiting = tokio::spawn(rig.manager.acquire("n").into_future());
    settle().await;
    held.release().await.unwrap();
    let began = rig.now();
    let lease = waiting.await.unwrap().unwrap();
    assert!(rig.now().since(began) <= Duration::from_secs(2), "found by looking");
    assert!(lease.is_held());
}

// ---- release -------------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn release_leaves_nothing_and_is_certain() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    let ended = lease.cancellation();
    lease.release().await.unwrap();
    assert!(ended.is_cancelled());
    assert_eq!(rig.waiting().await, None);
}

#[tokio::test(start_paused = true)]
async fn retried_unlock_deletes_the_successor() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    let other = rig.other().await;
    let successor = tokio::spawn(async move { other.acquire("n").await });
    settle().await;
    for _ in 0..3 {
        rig.store.next(Operation::Leave, Fault::LoseReply);
    }
    lease.release().await.unwrap();
    assert_eq!((rig.store.fired(), rig.store.calls(Operation::Leave)), (3, 4));
    let successor = successor.await.unwrap().unwrap();
    successor.confirm().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn release_when_the_store_is_down_is_in_doubt_and_bounded() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    rig.store.cut();
    let began = rig.now();
    let error = lease.release().await.unwrap_err();
    assert_eq!((error.kind(), error.is_in_doubt(), error.operation()), (ErrorKind::Unavailable, true, Some("release")));
    assert!(rig.now().since(began) <= Duration::from_secs(5) + TICK);
    rig.store.mend();
    pass(Duration::from_secs(3)).await;
    assert_eq!(rig.waiting().await, None, "the library kept trying");
}

#[tokio::test(start_paused = true)]
async fn release_of_a_lost_lease_says_lost() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    rig.env.jump(TTL);
    let error = lease.release().await.unwrap_err();
    assert_eq!((error.kind(), error.reason()), (ErrorKind::Lost, Some(EndReason::Stalled)));
}

/// A renewal that is on its way when the lease is released neither revives it nor counts as a loss.
#[tokio::test(start_paused = true)]
async fn renewal_keeps_a_released_key_alive() {
    let rig = Rig::new().await;
    for fault in [Fault::HoldRequest, Fault::HoldReply] {
        let gate = Gate::shut();
        let lease = rig.lease().await;
        rig.store.next(Operation::Renew, fault(gate.clone()));
        pass(TTL / 3 + TICK).await;
        let ended = lease.cancellation();
        lease.release().await.unwrap();
        gate.open();
        settle().await;
        assert!(ended.is_cancelled());
        assert_eq!(rig.waiting().await, None);
    }
    assert_eq!(rig.store.fired(), 2);
    let renewals = rig.store.calls(Operation::Renew);
    pass(TTL * 3).await;
    assert_eq!(rig.store.calls(Operation::Renew), renewals, "nothing is renewed any more");
}

/// The entering took two attempts; the first arrives after the release.
#[tokio::test(start_paused = true)]
async fn a_ghost_of_the_first_attempt_after_a_release() {
    let rig = Rig::new().await;
    let gate = Gate::shut();
    rig.store.next(Operation::Claim, Fault::HoldRequest(gate.clone()));
    let lease = rig.lease().await;
    assert_eq!(rig.store.calls(Operation::Claim), 2);
    lease.release().await.unwrap();
    gate.open();
    settle().await;
    assert_eq!(rig.waiting().await, None);
}

#[tokio::test(start_paused = true)]
async fn a_late_first_attempt_enters_after_the_withdraw() {
    let rig = Rig::new().await;
    let gate = Gate::shut();
    rig.store.next(Operation::Claim, Fault::HoldRequest(gate.clone()));
    let error = rig.manager.acquire("n").timeout(Duration::from_millis(100)).await;
    assert_eq!(kind(error), ErrorKind::Unavailable);
    settle().await;
    assert!(rig.store.calls(Operation::Leave) >= 1, "an attempt of unknown outcome is withdrawn");
    gate.open();
    settle().await;
    assert_eq!(rig.waiting().await, None);
}

// ---- drop and cancel -----------------------------------------------------------------------------------------------

/// Every future is dropped after every number of polls, with the store slow at every step: nothing is left behind.
#[tokio::test(start_paused = true)]
async fn dropped_at_every_await_point() {
    let rig = Rig::new().await;
    let mut completed = 0;
    for held in [false, true] {
        for slow in [Operation::Claim, Operation::Turn, Operation::Look, Operation::Renew, Operation::Leave] {
            for polls in 0..6 {
                for attempt in [false, true] {
                    let other = rig.other().await;
                    let holder = if held { Some(other.acquire("n").await.unwrap()) } else { None };
                    let gate = Gate::shut();
                    rig.store.next(slow, Fault::HoldReply(gate.clone()));
                    let timeout = attempt.then_some(Duration::ZERO);
                    let mut acquiring = rig.manager.acquire("n").timeout(timeout).into_future();
                    let done = poll_times(&mut acquiring, polls).await;
                    completed += usize::from(done.is_some());
                    drop(acquiring);
                    drop(done);
                    drop(holder);
                    gate.open();
                    rig.store.mend();
                    rig.empties().await;
                }
            }
        }
    }
    assert!(completed > 0);
    rig.manager.close().await.unwrap();
    assert_eq!(rig.memory.inspect(&name()).await.map(drop).unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_release_goes_on() {
    let rig = Rig::new().await;
    for polls in 0..3 {
        let lease = rig.lease().await;
        let gate = Gate::shut();
        rig.store.next(Operation::Leave, Fault::HoldReply(gate.clone()));
        let mut releasing = Box::pin(lease.release());
        assert!(poll_times(&mut releasing, polls).await.is_none());
        drop(releasing);
        gate.open();
        rig.empties().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_dropped_lease_is_released() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    rig.store.next(Operation::Leave, Fault::LoseReply);
    drop(lease);
    rig.empties().await;
}

/// The lease was on its way when its waiter went: it goes to the next one.
#[tokio::test(start_paused = true)]
async fn a_waiter_that_goes_at_the_last_moment_passes_the_lease_on() {
    let rig = Rig::new().await;
    let held = rig.other().await.acquire("n").await.unwrap();
    let mut goes = rig.manager.acquire("n").into_future();
    assert!(poll_times(&mut goes, 2).await.is_none());
    let stays = tokio::spawn(rig.manager.acquire("n").into_future());
    settle().await;
    held.release().await.unwrap();
    settle().await;
    drop(goes);
    assert!(stays.await.unwrap().unwrap().is_held());
}

/// The claim of the last waiter leaves when he goes, though nothing else happens to the line.
#[tokio::test(start_paused = true)]
async fn a_dropped_wait_leaves_a_busy_line() {
    let rig = Rig::new().await;
    let _held = rig.other().await.acquire("n").await.unwrap();
    let began = rig.now();
    let mut goes = rig.manager.acquire("n").into_future();
    assert!(poll_times(&mut goes, 1).await.is_none());
    assert_eq!(rig.waiting().await, Some(1));
    drop(goes);
    settle().await;
    assert_eq!((rig.waiting().await, rig.now()), (Some(0), began));
}

/// A runtime that ends drops waiters, and what they wake is dropped at once: under no lock.
#[test]
fn waiters_end_with_their_runtime() {
    let (done, ends) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let (rig, _held) = runtime.block_on(async {
            let rig = Rig::new().await;
            let held = rig.other().await.acquire("n").await.unwrap();
            for _ in 0..3 {
                tokio::spawn(rig.manager.acquire("n").into_future());
            }
            settle().await;
            assert_eq!(rig.waiting().await, Some(1));
            (rig, held)
        });
        drop(runtime);
        drop(rig);
        done.send(()).unwrap();
    });
    ends.recv_timeout(Duration::from_secs(20)).expect("the runtime ends");
}

// ---- close ---------------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn close_ends_everything() {
    let rig = Rig::new().await;
    let other = rig.other().await;
    let blocker = other.acquire("blocked").await.unwrap();
    let lease = rig.lease().await;
    let waiting = tokio::spawn(rig.manager.acquire("blocked").into_future());
    let local = tokio::spawn(rig.manager.acquire("n").into_future());
    settle().await;
    rig.manager.close().await.unwrap();
    assert_eq!(lease.end_reason(), Some(EndReason::Closed));
    assert_eq!(lease.check().unwrap_err().kind(), ErrorKind::Lost);
    assert_eq!(kind(waiting.await.unwrap()), ErrorKind::Closed);
    assert_eq!(kind(local.await.unwrap()), ErrorKind::Closed);
    lease.release().await.unwrap();
    assert_eq!(other.inspect("n").await.unwrap(), None, "no claim is left");
    assert_eq!(other.inspect("blocked").await.unwrap().unwrap().waiting, 0);
    for error in [
        kind(rig.manager.acquire("n").await),
        kind(rig.manager.try_acquire("n").await),
        kind(rig.manager.inspect("n").await),
        kind(rig.manager.list("").await),
        kind(rig.manager.ping().await),
        kind(rig.manager.break_lease("n", blocker.token()).await),
    ] {
        assert_eq!(error, ErrorKind::Closed);
    }
    rig.manager.close().await.unwrap();
    drop(blocker);
}

/// A waiter's claim is leaving while the manager is closed: the store is closed after it.
#[tokio::test(start_paused = true)]
async fn close_waits_for_claims_that_are_leaving() {
    let rig = Rig::new().await;
    let other = rig.other().await;
    let held = other.acquire("n").await.unwrap();
    let waiting = tokio::spawn(rig.manager.acquire("n").into_future());
    settle().await;
    let gate = Gate::shut();
    rig.store.next(Operation::Leave, Fault::HoldRequest(gate.clone()));
    let (manager, closing) = (rig.manager.clone(), rig.manager.clone());
    let closing = tokio::spawn(async move { closing.close().await });
    let again = tokio::spawn(async move { manager.close().await });
    settle().await;
    assert!(!closing.is_finished() && !again.is_finished(), "both wait for it");
    gate.open();
    settle().await;
    assert_eq!(other.inspect("n").await.unwrap().unwrap().waiting, 0);
    drop((held, other));
    closing.await.unwrap().unwrap();
    again.await.unwrap().unwrap();
    assert_eq!(kind(waiting.await.unwrap()), ErrorKind::Closed);
}

/// A lease that was lost may still be worked under when the manager is closed.
#[tokio::test(start_paused = true)]
async fn close_leaves_the_claim_of_a_lost_lease_to_expire() {
    let rig = Rig::new().await;
    let other = rig.other().await;
    let lease = rig.lease().await;
    rig.env.freeze();
    rig.env.jump(HALF);
    rig.env.thaw();
    rig.manager.close().await.unwrap();
    assert_eq!(lease.end_reason(), Some(EndReason::Stalled));
    assert_eq!(other.inspect("n").await.unwrap().map(|record| record.token), Some(lease.token()));
}

#[tokio::test(start_paused = true)]
async fn close_leaves_no_task_behind() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    let waiting = tokio::spawn(rig.manager.acquire("n").into_future());
    settle().await;
    assert!(rig.env.tasks() > 0);
    rig.manager.close().await.unwrap();
    assert_eq!(rig.env.tasks(), 0);
    assert!(waiting.await.unwrap().is_err());
    drop(lease);
}

/// Dropping the last handle closes too, though nobody said so.
#[tokio::test(start_paused = true)]
async fn the_last_drop_closes() {
    let rig = Rig::new().await;
    let (env, memory) = (rig.env.clone(), rig.memory.beside(rig.env.clone()));
    let lease = rig.lease().await;
    drop(rig);
    pass(TTL).await;
    assert!(lease.is_held(), "a lease keeps its manager at work");
    drop(lease);
    settle().await;
    assert_eq!(memory.inspect(&name()).await.unwrap(), None);
    assert_eq!(env.tasks(), 0);
}

#[tokio::test(start_paused = true)]
async fn close_is_bounded_when_the_store_hangs() {
    let rig = Rig::new().await;
    let _lease = rig.lease().await;
    rig.store.always(Operation::Leave, Fault::HoldRequest(Gate::shut()));
    let began = rig.now();
    let error = rig.manager.close().await.unwrap_err();
    assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unavailable, true));
    assert!(rig.now().since(began) <= Duration::from_secs(5) + TICK * 2, "{:?}", rig.now().since(began));
}

// ---- watching ------------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn watch_tells_each_holder_and_the_end() {
    use futures_lite::StreamExt;
    use lease_core::Change;
    let rig = Rig::new().await;
    let mut changes = pin!(rig.manager.watch("n"));
    assert_eq!(changes.next().await.unwrap().unwrap(), Change::Free);
    let other = rig.other().await;
    let lease = other.acquire("n").await.unwrap();
    let Change::Held(record) = changes.next().await.unwrap().unwrap() else { panic!("held") };
    assert_eq!((record.token, record.waiting), (lease.token(), 0));
    lease.release().await.unwrap();
    assert_eq!(changes.next().await.unwrap().unwrap(), Change::Free);
    rig.store.always(Operation::Changed, Fault::Refuse(ErrorKind::Unavailable));
    assert_eq!(kind(changes.next().await.unwrap()), ErrorKind::Unavailable);
    rig.store.mend();
    let lease = other.acquire("n").await.unwrap();
    assert!(matches!(changes.next().await.unwrap().unwrap(), Change::Held(record) if record.token == lease.token()));
    rig.manager.close().await.unwrap();
    lease.release().await.unwrap();
    assert_eq!(kind(changes.next().await.unwrap()), ErrorKind::Closed);
    assert!(changes.next().await.is_none());
}

// ---- arguments -----------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn bad_input_is_refused_and_loses_nothing() {
    let rig = Rig::new().await;
    let kept = rig.manager.acquire("kept").await.unwrap();
    let long = "x".repeat(513);
    for name in ["", "a\0b", &long] {
        assert_eq!(kind(rig.manager.acquire(name).await), ErrorKind::Invalid);
        assert_eq!(kind(rig.manager.inspect(name).await), ErrorKind::Invalid);
    }
    for ttl in [Duration::ZERO, Duration::from_millis(49), Duration::from_secs(86_401)] {
        let error = rig.manager.acquire("n").ttl(ttl).await.unwrap_err();
        assert_eq!((error.kind(), error.name()), (ErrorKind::Invalid, Some("n")), "{ttl:?}");
    }
    assert_eq!(kind(rig.manager.acquire("n").owner("a\0").await), ErrorKind::Invalid);
    for (url, says) in [
        ("memory:?tll=3s", "\"ttl\""),
        ("carrier-pigeon:x", "unknown scheme"),
        ("nothing", "no scheme"),
        ("memory:?ttl=49ms", "at least 50ms"),
        ("memory:?ttl=25h", "at most 24h"),
    ] {
        let error = Manager::open(url).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{url}");
        assert!(error.to_string().contains(says), "{url}: {error}");
    }
    assert!(kept.is_held());
    assert_eq!(rig.store.calls(Operation::Claim), 1, "nothing was sent");
}

/// A store that panics fails those who wait, and only them.
#[tokio::test(start_paused = true)]
async fn a_panic_in_a_store_strands_nobody() {
    let rig = Rig::new().await;
    let held = rig.other().await.acquire("n").await.unwrap();
    let gate = Gate::shut();
    rig.store.next(Operation::Claim, Fault::HoldReply(gate.clone()));
    rig.store.next(Operation::Turn, Fault::Panic);
    let first = tokio::spawn(rig.manager.acquire("n").into_future());
    let second = tokio::spawn(rig.manager.acquire("n").into_future());
    settle().await;
    gate.open();
    assert_eq!(kind(first.await.unwrap()), ErrorKind::Internal);
    assert_eq!(kind(second.await.unwrap()), ErrorKind::Internal);
    settle().await;
    assert_eq!(rig.waiting().await, Some(0), "the claim was withdrawn");
    held.release().await.unwrap();
    assert!(rig.lease().await.is_held(), "and the name can be acquired again");
}

/// A URL may carry a password: it is in no `Debug`.
#[tokio::test(start_paused = true)]
async fn secrets_in_debug_output() {
    let builder = Manager::builder().url("memory:?owner=s3cret-canary").option("owner", "s3cret-canary");
    assert!(!format!("{builder:?}").contains("s3cret-canary"));
}

/// The claim that a store gets is the one the contract speaks of.
#[tokio::test(start_paused = true)]
async fn own_stores_are_welcome() {
    let rig = Rig::new().await;
    let claim = Claim { name: name(), id: ClaimId(7), ttl: TTL, owner: "me".into(), queues: true, follows: None };
    let standing = rig.memory.claim(rig.now(), &claim).await.unwrap();
    assert!(matches!(standing, Standing::Head(_)));
    let late = rig.manager.acquire("n").timeout(Duration::from_secs(1)).await;
    assert_eq!(kind(late), ErrorKind::Timeout);
}

/// For bindings: a lease that is shared is given up without being dropped, and leaves nothing behind.
#[tokio::test(start_paused = true)]
async fn an_abandoned_lease_leaves_the_line() {
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    lease.abandon();
    assert_eq!(lease.end_reason(), Some(EndReason::Released));
    rig.empties().await;
    lease.abandon();
    lease.give_back().await.expect("harmless when repeated");
}

/// Options by their text are those of the methods, and what is not an acquire's is refused.
#[tokio::test(start_paused = true)]
async fn options_by_text() {
    let rig = Rig::new().await;
    let lease = rig.manager.acquire("n").option("ttl", "15s").unwrap().option("owner", "me").unwrap();
    let lease = lease.option("timeout", "1s").unwrap().await.unwrap();
    assert_eq!((lease.ttl(), lease.owner()), (Duration::from_secs(15), "me"));
    for (key, value, says) in [
        ("tll", "1s", "did you mean \"ttl\""),
        ("ttl", "15", "number and a unit"),
        ("request_timeout", "1s", "the manager's"),
    ] {
        let error = rig.manager.acquire("n").option(key, value).map(drop).unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains(says), "{error}");
    }
    assert!(Manager::builder().option("ttl", "1s").open().await.is_err(), "no URL");
    lease_core::Builder::check_option("ttl", "1s").unwrap();
    assert_eq!(lease_core::Builder::check_option("ttl", "soon").unwrap_err().kind(), ErrorKind::Invalid);
}

/// Told once, a second after the wait began, with the place in line then; who has the lease before that is told nothing.
#[tokio::test(start_paused = true)]
async fn who_waits_for_long_is_told_for_whom() {
    let rig = Rig::new().await;
    let (told, mut telling) = tokio::sync::mpsc::unbounded_channel();
    let other = rig.other().await;
    let lease = other.acquire("n").owner("the holder").await.unwrap();
    let began = rig.now();
    let wait = |late: Duration, after: Duration| {
        let (told, env, manager) = (told.clone(), rig.env.clone(), rig.manager.clone());
        tokio::spawn(async move {
            pass(late).await;
            let tell = move |waiting| told.send((env.now().since(began), waiting)).unwrap();
            let lease = manager.acquire("n").on_wait(tell).await.unwrap();
            pass(after).await;
            lease.release().await
        })
    };
    let second = Duration::from_secs(1);
    let waits = [wait(Duration::ZERO, second / 2), wait(second / 10, Duration::ZERO), wait(second, Duration::ZERO)];
    for (place, due) in [(1, second), (2, second + second / 10)] {
        let (at, waiting) = telling.recv().await.unwrap();
        assert!((due..due + TICK).contains(&at), "{at:?}");
        assert_eq!((waiting.name.as_str(), waiting.place), ("n", place));
        let holder = waiting.holder.unwrap();
        assert_eq!((&*holder.owner, holder.token), ("the holder", lease.token()));
    }
    pass(second / 10).await;
    lease.release().await.unwrap();
    for wait in waits {
        wait.await.unwrap().unwrap();
    }
    pass(10 * second).await;
    assert!(telling.try_recv().is_err(), "once, and the third never waited for a second");
    // Of a store that does not answer nobody knows who holds it.
    rig.store.cut();
    let manager = rig.manager.clone();
    let tell = move |waiting: lease_core::Waiting| assert!(told.send((Duration::ZERO, waiting)).is_ok());
    let wait = tokio::spawn(async move { manager.acquire("n").on_wait(tell).timeout(3 * second).await });
    assert_eq!(telling.recv().await.unwrap().1.holder, None);
    assert_eq!(wait.await.unwrap().unwrap_err().kind(), ErrorKind::Unavailable);
}

/// Who comes when everybody before him was told already is told in his turn, though nothing else happens to the line.
#[tokio::test(start_paused = true)]
async fn who_comes_late_is_told_too() {
    let rig = Rig::new().await;
    let _lease = rig.other().await.acquire("n").await.unwrap();
    let second = Duration::from_secs(1);
    let (told, mut telling) = tokio::sync::mpsc::unbounded_channel();
    for place in 1..=3 {
        let (told, manager, began) = (told.clone(), rig.manager.clone(), rig.now());
        let wait = manager.acquire("n").on_wait(move |waiting| told.send(waiting).unwrap()).into_future();
        tokio::spawn(wait);
        let waiting = tokio::time::timeout(TTL, telling.recv()).await.expect("told").unwrap();
        assert_eq!(waiting.place, place);
        assert!((second..second + TICK).contains(&rig.now().since(began)));
    }
}

/// For event loops: readable from the end on, also when it is asked for later.
#[tokio::test(start_paused = true)]
async fn a_descriptor_is_readable_once_the_lease_ended() {
    let readable = |fd: std::os::fd::RawFd| {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        !info.lines().any(|line| line.split_ascii_whitespace().eq(["eventfd-count:", "0"]))
    };
    let rig = Rig::new().await;
    let lease = rig.lease().await;
    let signal = lease.end_signal().unwrap();
    assert!(!readable(signal.fd()));
    rig.store.cut();
    pass(HALF - TICK).await;
    assert!(!readable(signal.fd()));
    pass(2 * TICK).await;
    assert!(readable(signal.fd()) && readable(lease.end_signal().unwrap().fd()));
    signal.close();
}
