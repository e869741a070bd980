//! The one suite for every store, named after the clauses of [`crate::store`]. Your own store can run it too:
//!
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//! use lease_core::conformance::{Clause, Harness};
//! use lease_core::runtime::{Environment, system};
//! use lease_core::store::Store;
//! use lease_core::stores::memory::MemoryStore;
//!
//! struct Mine(Arc<dyn Environment>, Arc<MemoryStore>);
//!
//! #[async_trait::async_trait]
//! impl Harness for Mine {
//!     async fn open(&self) -> Arc<dyn Store> {
//!         self.1.beside(self.0.clone())
//!     }
//!     fn environment(&self) -> Arc<dyn Environment> {
//!         self.0.clone()
//!     }
//!     fn ttl(&self) -> Duration {
//!         Duration::from_millis(200)
//!     }
//! }
//!
//! fn run(clause: Clause) {
//!     let env = system().unwrap();
//!     futures_lite::future::block_on(clause(&Mine(env.clone(), MemoryStore::new(env))));
//! }
//!
//! // `durable` when the lines outlive a restart. Each clause becomes a `#[test]` of its own.
//! lease_core::conformance_tests!(volatile, run);
//! ```
//!
//! Nothing here sleeps to be right. An event is awaited with a limit; that something does *not* happen before an instant
//! is judged only when the clock, read after the answer, has not reached it.

#![expect(clippy::missing_panics_doc, reason = "the answer of a clause that is broken is a panic")]

use std::collections::BTreeSet;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use futures_lite::future::{yield_now, zip};

use crate::clock::Moment;
use crate::error::{ErrorKind, Result};
use crate::runtime::{Environment, together, until};
use crate::store::{Ahead, Claim, ClaimId, Departure, Name, Place, Record, Renewal, Standing, Store, Token};

/// How the suite reaches a store.
#[async_trait]
pub trait Harness: Send + Sync {
    /// One more manager's store, on the same lines as all others of this harness.
    async fn open(&self) -> Arc<dyn Store>;

    /// Where the stores run.
    fn environment(&self) -> Arc<dyn Environment>;

    /// A ttl to wait for: short, yet several requests long.
    fn ttl(&self) -> Duration;

    /// Stops and starts again whatever keeps the lines, all stores being closed. `false` when they do not outlive it.
    async fn restart(&self) -> bool {
        false
    }

    /// A name that nobody used before, beginning with the hint.
    fn unique_name(&self, hint: &str) -> Name {
        Name::new(&format!("{hint}-{:016x}", self.environment().random())).expect("a short hint")
    }
}

/// One clause, to be run on a harness of its own.
pub type Clause = for<'a> fn(&'a dyn Harness) -> Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Makes a `#[test]` of every clause, each calling `run(clause)`. For a store that is `volatile`, those about a restart
/// are shown as ignored. `conformance_tests!(clauses)` is a `Vec` of the names and clauses, for test harnesses of one's own.
#[macro_export]
macro_rules! conformance_tests {
    (durable, $run:expr) => {
        $crate::conformance_tests! { @clauses tests $run, cfg(all()) }
    };
    (volatile, $run:expr) => {
        $crate::conformance_tests! { @clauses tests $run, ignore = "the store is volatile" }
    };
    (clauses) => {{
        let mut clauses: ::std::vec::Vec<(&'static str, $crate::conformance::Clause)> = ::std::vec::Vec::new();
        $crate::conformance_tests! { @clauses list clauses, cfg(all()) }
        clauses
    }};
    (@clauses $how:ident $run:expr, $when_durable:meta) => {
        $crate::conformance_tests! { @$how $run, cfg(all()),
            s1_exclusion
            s1_evicted_waiter_is_no_second_head
            s1_evicted_waiter_does_not_hold_beside_the_holder
            s1_busy_writes_nothing
            s1_records_show_the_head
            s2_tokens_increase_across_release_expiry_and_eviction
            s2_nothing_remains_of_an_empty_line
            s3_claim_is_idempotent
            s3_at_once_is_the_same_claim
            s3_never_behind_itself
            s3_retry_restarts_no_ttl
            s3_another_token_is_lost
            s3_no_two_claims_have_equal_tokens
            s4_renewal_is_compare_and_swap
            s4_renewals_are_answered_in_order
            s4_renewal_restarts_the_ttl
            s4_late_renewal_shortens_nothing
            s4_unanswered_renewal_is_no_loss
            s5_leaving_is_compare_and_delete
            s5_evicting_is_compare_and_delete
            s6_not_before_ttl
            s6_not_after_ttl_and_slack
            s6_not_after_ttl_and_slack_of_a_renewal_while_waiting
            s7_no_lost_wake_up
            s7_every_way_of_leaving_wakes
            s7_one_handover_wakes_one_waiter
            s7_waiting_is_no_polling
            s7_changed_is_level_triggered
            s8_token_order
            s8_dead_waiter_is_skipped
            s8_dead_waiter_is_skipped_at_its_turn
            s9_final_leave
            s9_unanswered_claim_never_enters_after_leave
            s9_claim_that_expired_in_the_line_has_no_second_life
            s10_errors_after_close
            s11_cancel_safety
            s11_dropped_turn_takes_no_wake_up_along
            s12_names_never_meet
            s12_list_takes_any_prefix
        }
        $crate::conformance_tests! { @$how $run, $when_durable,
            s2_tokens_increase_across_a_restart
            s6_restart_passes_over_nobody
        }
    };
    (@list $clauses:expr, $attribute:meta, $($clause:ident)*) => {
        $($clauses.push((stringify!($clause), |harness| {
            ::std::boxed::Box::pin($crate::conformance::$clause(harness))
        }));)*
    };
    (@tests $run:expr, $attribute:meta, $($clause:ident)*) => {
        $(
            #[test]
            #[$attribute]
            fn $clause() {
                ($run)(|harness| ::std::boxed::Box::pin($crate::conformance::$clause(harness)));
            }
        )*
    };
}

/// Much longer than any clause takes.
const LONG: Duration = Duration::from_secs(600);
/// How long an event may take that has to come.
const LIMIT: Duration = Duration::from_secs(20);
/// How often a clause that the machine was too slow for is tried again.
const ATTEMPTS: usize = 10;
/// How many waits of a future are tried as the last before it is dropped.
const POLLS: u32 = 6;

/// Of a name's claims, only one holds: updates of something that nothing else guards are not lost, and tokens only grow.
pub async fn s1_exclusion(harness: &dyn Harness) {
    const ROUNDS: u32 = 25;
    let name = harness.unique_name("exclusion");
    let (updates, highest) = (AtomicU32::new(0), std::sync::Mutex::new(0));
    let parties = Party::several(harness, "S1", 4).await;
    let work = parties.iter().map(async |party| {
        for _ in 0..ROUNDS {
            let claim = party.claim(&name, LONG);
            let standing = party.enter(&claim).await;
            let (place, _) = party.follow(&claim, standing).await;
            let seen = updates.load(Relaxed);
            yield_now().await;
            party.ok("ping", party.store.ping().await);
            updates.store(seen + 1, Relaxed);
            let before = std::mem::replace(&mut *crate::runtime::lock(&highest), place.token.get());
            assert!(before < place.token.get(), "S1: {:?} was granted after {before}", place.token);
            party.leave(&claim).await;
        }
    });
    together(work).await;
    assert_eq!(updates.into_inner(), ROUNDS * 4, "S1: two held at once: updates were lost");
    close(&parties).await;
}

/// A waiter that was evicted never becomes a second head beside the one after it.
pub async fn s1_evicted_waiter_is_no_second_head(harness: &dyn Harness) {
    let parties = Party::several(harness, "S1", 3).await;
    let [a, b, c] = &parties[..] else { unreachable!() };
    let name = harness.unique_name("evicted");
    let claims = [a.claim(&name, LONG), b.claim(&name, LONG), c.claim(&name, LONG)];
    a.hold(&claims[0]).await;
    let (evicted, ahead) = b.queue(&claims[1]).await;
    let (last, last_ahead) = c.queue(&claims[2]).await;
    assert!(c.evict(&name, evicted.token).await, "S1: the waiter was there to be evicted");
    a.leave(&claims[0]).await;
    b.turn(&evicted, &ahead).await;
    assert_eq!(b.look(&evicted).await, Standing::Lost, "S1: an evicted waiter stands nowhere");
    c.turn(&last, &last_ahead).await;
    assert_eq!(c.look(&last).await, Standing::Head(last.token), "S1: the next one holds");
    c.leave(&claims[2]).await;
    close(&parties).await;
}

/// Nor beside the holder, who is the only one that is before it.
pub async fn s1_evicted_waiter_does_not_hold_beside_the_holder(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S1").await;
    let name = harness.unique_name("beside");
    let (first, second) = (a.claim(&name, LONG), b.claim(&name, LONG));
    let held = a.hold(&first).await;
    let (evicted, _) = b.queue(&second).await;
    assert!(a.evict(&name, evicted.token).await, "S1: the waiter was there to be evicted");
    assert_eq!(b.look(&evicted).await, Standing::Lost, "S1: an evicted waiter holds beside the holder");
    assert_eq!(a.look(&held).await, Standing::Head(held.token), "S1: the holder was evicted too");
    b.leave(&second).await;
    a.leave(&first).await;
    close(&[a, b]).await;
}

/// A claim that does not queue enters an empty line only, and is told who holds; its no leaves no trace.
pub async fn s1_busy_writes_nothing(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S1").await;
    let name = harness.unique_name("busy");
    let held = Claim { queues: false, ..a.claim(&name, LONG) };
    let place = a.hold(&held).await;
    let tried = Claim { queues: false, ..b.claim(&name, LONG) };
    for _ in 0..2 {
        match b.enter(&tried).await {
            Standing::Busy(ahead) => {
                let told = (ahead.holder, ahead.predecessor, ahead.count, &*ahead.owner);
                assert_eq!(told, (place.token, place.token, 1, &*held.owner), "S1: busy tells who holds");
            }
            other => panic!("S1: a line that is not empty is busy, not {other:?}"),
        }
    }
    assert_eq!(a.inspect(&name).await.map(|record| record.waiting), Some(0), "S1: busy writes nothing");
    assert_eq!(a.enter(&held).await, Standing::Head(place.token), "S3: a retry is not busy because of itself");
    a.leave(&held).await;
    assert_eq!(b.inspect(&name).await, None, "S1: busy wrote something");
    assert_eq!(b.leave(&tried).await, Departure::Gone, "S1: busy did not enter");
    close(&[a, b]).await;
}

/// `inspect` and `list` tell who heads the line and how many wait behind.
pub async fn s1_records_show_the_head(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S1").await;
    let name = harness.unique_name("records");
    assert_eq!(a.inspect(&name).await, None, "S1: nobody holds a new name");
    let (first, second) = (a.claim(&name, LONG), b.claim(&name, LONG / 2));
    let begun = a.env.now();
    let place = a.hold(&first).await;
    let (next, ahead) = b.queue(&second).await;
    let record = b.inspect(&name).await.expect("S1: the name is held");
    let told = (&record.name, record.token, &*record.owner, record.ttl, record.waiting);
    assert_eq!(told, (&name, place.token, &*first.owner, LONG, 1), "S1: the record shows the head");
    assert!(record.held_for <= b.env.now().since(begun), "S1: held for {:?}, longer than it is there", record.held_for);
    let listed = b.list(&name).await;
    assert_eq!(listed.iter().map(|r| (r.token, r.waiting)).collect::<Vec<_>>(), [(place.token, 1)], "S1: list");
    a.leave(&first).await;
    b.turn(&next, &ahead).await;
    assert_eq!(b.look(&next).await, Standing::Head(next.token), "S1: the next claim heads the line");
    let record = a.inspect(&name).await.expect("S1: the name is held");
    let told = (record.token, &*record.owner, record.ttl, record.waiting);
    assert_eq!(told, (next.token, &*second.owner, LONG / 2, 0), "S1: the record shows the new head");
    b.leave(&second).await;
    close(&[a, b]).await;
}

/// Whatever emptied the line, the next token is greater. Resource owners compare tokens: one reused lets a stale write in.
pub async fn s2_tokens_increase_across_release_expiry_and_eviction(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S2").await;
    let name = harness.unique_name("tokens");
    let mut highest = 0;
    for round in 0..9 {
        let party = if round % 2 == 0 { &a } else { &b };
        let claim = party.claim(&name, if round % 3 == 1 { harness.ttl() } else { LONG });
        let place = party.hold(&claim).await;
        let held = party.env.now();
        assert!(place.token.get() > highest, "S2: {:?} was given after {highest}", place.token);
        highest = place.token.get();
        match round % 3 {
            0 => drop(party.leave(&claim).await),
            1 => party.env.sleep_until(held + party.store.gone_after(claim.ttl)).await,
            _ => assert!(party.evict(&name, place.token).await, "S2: the holder was there to be evicted"),
        }
    }
    close(&[a, b]).await;
}

/// Tokens go on where they were when whatever keeps the lines was stopped and started.
pub async fn s2_tokens_increase_across_a_restart(harness: &dyn Harness) {
    let name = harness.unique_name("restart");
    let mut highest = 0;
    for _ in 0..3 {
        let party = Party::open(harness, "S2").await;
        for _ in 0..3 {
            let claim = party.claim(&name, LONG);
            let place = party.hold(&claim).await;
            assert!(place.token.get() > highest, "S2: {:?} was given after {highest}", place.token);
            highest = place.token.get();
            party.leave(&claim).await;
        }
        close(&[party]).await;
        assert!(harness.restart().await, "the harness cannot restart its store: run the suite as volatile");
    }
}

/// However a line became empty, nothing shows the name any more.
pub async fn s2_nothing_remains_of_an_empty_line(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S2").await;
    let name = harness.unique_name("remains");
    for how in 0..3 {
        let (head, waiter) = (a.claim(&name, harness.ttl()), b.claim(&name, harness.ttl()));
        let place = a.hold(&head).await;
        let entered = b.enter(&waiter).await;
        let both_in = b.env.now();
        match how {
            0 => {
                b.leave(&waiter).await;
                a.leave(&head).await;
            }
            1 => {
                if let Standing::Behind(token, _) | Standing::Head(token) = entered {
                    b.evict(&name, token).await;
                }
                b.evict(&name, place.token).await;
            }
            _ => a.env.sleep_until(both_in + a.store.gone_after(harness.ttl())).await,
        }
        assert_eq!(a.inspect(&name).await, None, "S2: inspect shows what is gone");
        assert_eq!(b.list(&name).await, [], "S2: list shows what is gone");
        assert_eq!(a.leave(&head).await, Departure::Gone, "S2: the head is gone");
        assert_eq!(b.leave(&waiter).await, Departure::Gone, "S2: the waiter is gone");
    }
    close(&[a, b]).await;
}

/// A claim whose answer was lost is sent again: it has the place and token that it had.
pub async fn s3_claim_is_idempotent(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S3").await;
    let name = harness.unique_name("idempotent");
    let (first, second) = (a.claim(&name, LONG), b.claim(&name, LONG));
    let place = a.hold(&first).await;
    let (next, _) = b.queue(&second).await;
    for _ in 0..3 {
        assert_eq!(a.enter(&first).await, Standing::Head(place.token), "S3: the head entered again");
        assert_eq!(b.queue(&second).await.0.token, next.token, "S3: the waiter entered again");
    }
    assert_eq!(a.inspect(&name).await.map(|record| record.waiting), Some(1), "S3: a retry is no second claim");
    assert_eq!(a.leave(&first).await, Departure::Left, "S3: one entry, one leaving");
    assert_eq!(b.leave(&second).await, Departure::Left, "S3: one entry, one leaving");
    assert_eq!(a.inspect(&name).await, None, "S3: a retry is no second claim");
    close(&[a, b]).await;
}

/// What is answered at once is one claim with what is answered later, and one leaving; what is not, was not done.
pub async fn s3_at_once_is_the_same_claim(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S3").await;
    let name = harness.unique_name("at-once");
    for _ in 0..3 {
        let (first, second) = (a.claim(&name, LONG), b.claim(&name, LONG));
        let head = a.store.claim_at_once(a.env.now(), &first).transpose().expect("S3: claim at once");
        if head.is_none() {
            assert_eq!(a.inspect(&name).await, None, "S3: nothing was done");
        }
        let place = a.hold(&first).await;
        assert!(head.is_none_or(|head| head == Standing::Head(place.token)), "S3: the head entered again");
        let behind = b.store.claim_at_once(b.env.now(), &second).transpose().expect("S3: claim at once");
        let (next, ahead) = b.queue(&second).await;
        if let Some(behind) = behind {
            assert!(
                matches!(behind, Standing::Behind(token, _) if token == next.token),
                "S3: the waiter entered again"
            );
        }
        assert_eq!(a.inspect(&name).await.map(|record| record.waiting), Some(1), "S3: a retry is no second claim");
        let left = a.store.leave_at_once(&first).transpose().expect("S5: leave at once");
        let later = a.leave(&first).await;
        let once = [left, Some(later)].into_iter().flatten().filter(|left| *left == Departure::Left).count();
        assert_eq!(once, 1, "S5: left once: {left:?}, {later:?}");
        b.turn(&next, &ahead).await;
        assert_eq!(b.look(&next).await, Standing::Head(next.token), "S7: leaving at once wakes");
        b.leave(&second).await;
        assert_eq!(a.inspect(&name).await, None, "S9: nothing is left");
    }
    close(&[a, b]).await;
}

/// What is ahead of a claim that is sent again is what was ahead of it before.
pub async fn s3_never_behind_itself(harness: &dyn Harness) {
    let parties = Party::several(harness, "S3", 3).await;
    let name = harness.unique_name("itself");
    let claims: Vec<_> = parties.iter().map(|party| party.claim(&name, LONG)).collect();
    let mut tokens = vec![parties[0].hold(&claims[0]).await.token];
    for (party, claim) in parties.iter().zip(&claims).skip(1) {
        tokens.push(party.queue(claim).await.0.token);
    }
    for at in 1..3 {
        let (place, ahead) = parties[at].queue(&claims[at]).await;
        let told = (place.token, ahead.predecessor, ahead.count, ahead.holder);
        assert_eq!(told, (tokens[at], tokens[at - 1], at as u64, tokens[0]), "S3: what is ahead of a retried claim");
    }
    parties[0].leave(&claims[0]).await;
    let standing = parties[1].enter(&claims[1]).await;
    let (place, _) = parties[1].follow(&claims[1], standing).await;
    assert_eq!(place.token, tokens[1], "S3: the claim that was retried at its turn is the head");
    for (party, claim) in parties.iter().zip(&claims) {
        party.leave(claim).await;
    }
    close(&parties).await;
}

/// Sending a claim again keeps nothing alive: its age counts from the first time.
pub async fn s3_retry_restarts_no_ttl(harness: &dyn Harness) {
    unless_slow(async || {
        let (a, b) = Party::pair(harness, "S3").await;
        let (name, ttl) = (harness.unique_name("retry"), harness.ttl());
        let claim = a.claim(&name, ttl);
        let sent = a.env.now();
        let place = a.hold(&claim).await;
        let next = b.claim(&name, LONG);
        let (behind, _) = b.queue(&next).await;
        let entered = b.env.now();
        a.env.sleep_until(sent + ttl / 2).await;
        let again = a.enter(&claim).await;
        let in_time = a.env.now() < sent + ttl;
        if in_time {
            assert_eq!(again, Standing::Head(place.token), "S3: the head entered again");
            b.env.sleep_until(entered + ttl + b.store.limits().slack).await;
            assert_eq!(b.look(&behind).await, Standing::Head(behind.token), "S3: a retry restarted the ttl");
        }
        a.leave(&claim).await;
        b.leave(&next).await;
        close(&[a, b]).await;
        in_time
    })
    .await;
}

/// A place with a token that the claim does not have is not in the line.
pub async fn s3_another_token_is_lost(harness: &dyn Harness) {
    let party = Party::open(harness, "S3").await;
    let claim = party.claim(&harness.unique_name("token"), LONG);
    let place = party.hold(&claim).await;
    let other = Place { token: Token::try_from(place.token.get() + 1).expect("at least 1"), ..place.clone() };
    assert_eq!(party.look(&other).await, Standing::Lost, "S3: look at another token");
    assert_eq!(party.renew(&other).await, Renewal::Lost { superseded: true }, "S3: renewal of another token");
    assert_eq!(party.look(&place).await, Standing::Head(place.token), "S3: the real one is still there");
    party.leave(&claim).await;
    close(&[party]).await;
}

/// Claims that enter at once get places and tokens of their own.
pub async fn s3_no_two_claims_have_equal_tokens(harness: &dyn Harness) {
    let parties = Party::several(harness, "S3", 4).await;
    let name = harness.unique_name("equal");
    let claims: Vec<_> = (0..24).map(|at| parties[at % 4].claim(&name, LONG)).collect();
    let entering = claims.iter().enumerate().map(async |(at, claim)| match parties[at % 4].enter(claim).await {
        Standing::Head(token) => (token, 0),
        Standing::Behind(token, ahead) => (token, ahead.count),
        other => panic!("S3: a claim that queues cannot be {other:?}"),
    });
    let mut entered = together(entering).await;
    entered.sort_unstable();
    assert!(entered.windows(2).all(|two| two[0].0 < two[1].0), "S3: equal tokens: {entered:?}");
    assert!(entered.iter().map(|(_, count)| *count).eq(0..24), "S3: equal places: {entered:?}");
    for (at, claim) in claims.iter().enumerate().rev() {
        parties[at % 4].leave(claim).await;
    }
    close(&parties).await;
}

/// Only a claim that is in the line is renewed. A renewal never puts one back.
pub async fn s4_renewal_is_compare_and_swap(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S4").await;
    let name = harness.unique_name("swap");
    let (first, second) = (a.claim(&name, LONG), b.claim(&name, LONG));
    let place = a.hold(&first).await;
    let (next, ahead) = b.queue(&second).await;
    assert!(matches!(a.renew(&place).await, Renewal::Renewed { .. }), "S4: the head is renewed");
    assert!(matches!(b.renew(&next).await, Renewal::Renewed { offered: false, .. }), "S4: the waiter is renewed");
    a.leave(&first).await;
    b.turn(&next, &ahead).await;
    assert_eq!(b.look(&next).await, Standing::Head(next.token), "S4: the renewed waiter holds");
    assert_eq!(a.renew(&place).await, Renewal::Lost { superseded: true }, "S4: left, and another holds");
    b.leave(&second).await;
    for (party, place) in [(&a, &place), (&b, &next)] {
        assert_eq!(party.renew(place).await, Renewal::Lost { superseded: false }, "S4: left, and nobody holds");
    }
    assert_eq!(a.inspect(&name).await, None, "S4: a renewal put a claim back");
    close(&[a, b]).await;
}

/// Each place of a batch has an answer of its own, whatever happened to the others.
pub async fn s4_renewals_are_answered_in_order(harness: &dyn Harness) {
    let party = Party::open(harness, "S4").await;
    let mut places = Vec::new();
    for at in 0..12 {
        places.push(party.hold(&party.claim(&harness.unique_name("batch"), LONG)).await);
        if at % 3 == 0 {
            party.leave(&places[at].claim).await;
        }
    }
    let sent = party.env.now();
    let answers = party.within("a batch of renewals", party.store.renew(sent, &places)).await;
    assert_eq!(answers.len(), places.len(), "S4: one answer a place");
    for (at, answer) in answers.into_iter().enumerate() {
        match party.ok("renewal", answer) {
            Renewal::Renewed { confirmed, .. } => {
                assert!(at % 3 != 0, "S4: answer {at} is another's: that claim had left");
                assert!(confirmed <= sent, "S4: confirmed later than sent");
            }
            lost @ Renewal::Lost { .. } => assert!(at % 3 == 0, "S4: answer {at} is another's: {lost:?}"),
        }
        party.leave(&places[at].claim).await;
    }
    assert!(party.within("an empty batch", party.store.renew(sent, &[])).await.is_empty(), "S4: no place, no answer");
    close(&[party]).await;
}

/// A renewal is worth a whole ttl from the instant before it was sent.
pub async fn s4_renewal_restarts_the_ttl(harness: &dyn Harness) {
    unless_slow(async || {
        let (a, b) = Party::pair(harness, "S4").await;
        let (name, ttl) = (harness.unique_name("restarts"), harness.ttl());
        let (claim, next) = (a.claim(&name, ttl), b.claim(&name, LONG));
        let sent = a.env.now();
        let place = a.hold(&claim).await;
        let (behind, _) = b.queue(&next).await;
        a.env.sleep_until(sent + ttl / 2).await;
        let renewed = a.renewed_before(sent + ttl, a.env.now(), &place).await;
        let observed = match renewed {
            Some(confirmed) => b.waits_until(confirmed, ttl, &behind).await,
            None => false,
        };
        a.leave(&claim).await;
        b.leave(&next).await;
        close(&[a, b]).await;
        observed
    })
    .await;
}

/// A renewal that was sent before another and is applied after it takes nothing back.
pub async fn s4_late_renewal_shortens_nothing(harness: &dyn Harness) {
    unless_slow(async || {
        let (a, b) = Party::pair(harness, "S4").await;
        let (name, ttl) = (harness.unique_name("late"), harness.ttl());
        let (claim, next) = (a.claim(&name, ttl), b.claim(&name, LONG));
        let early = a.env.now();
        let place = a.hold(&claim).await;
        let (behind, _) = b.queue(&next).await;
        a.env.sleep_until(early + ttl / 2).await;
        let mut observed = false;
        if let Some(confirmed) = a.renewed_before(early + ttl, a.env.now(), &place).await
            && a.renewed_before(confirmed + ttl, early, &place).await.is_some()
        {
            observed = b.waits_until(confirmed, ttl, &behind).await;
        }
        a.leave(&claim).await;
        b.leave(&next).await;
        close(&[a, b]).await;
        observed
    })
    .await;
}

/// A renewal whose answer nobody saw is followed by one that succeeds: the first is not taken for another's.
pub async fn s4_unanswered_renewal_is_no_loss(harness: &dyn Harness) {
    let party = Party::open(harness, "S4").await;
    let claim = party.claim(&harness.unique_name("unanswered"), LONG);
    let places = [party.hold(&claim).await];
    for polls in 0..POLLS {
        party.cut(polls, party.store.renew(party.env.now(), &places)).await;
        let renewal = party.renew(&places[0]).await;
        assert!(matches!(renewal, Renewal::Renewed { .. }), "S4: {renewal:?} after an unanswered renewal");
    }
    party.leave(&claim).await;
    close(&[party]).await;
}

/// Leaving removes that very claim, head or waiter, and said again removes nothing.
pub async fn s5_leaving_is_compare_and_delete(harness: &dyn Harness) {
    let parties = Party::several(harness, "S5", 3).await;
    let [a, b, c] = &parties[..] else { unreachable!() };
    let name = harness.unique_name("leave");
    let claims = [a.claim(&name, LONG), b.claim(&name, LONG), c.claim(&name, LONG)];
    let first = a.hold(&claims[0]).await;
    b.queue(&claims[1]).await;
    let (last, _) = c.queue(&claims[2]).await;
    assert_eq!(b.leave(&claims[1]).await, Departure::Left, "S5: a waiter leaves");
    assert_eq!(b.leave(&claims[1]).await, Departure::Gone, "S5: a waiter leaves again");
    assert_eq!(a.look(&first).await, Standing::Head(first.token), "S5: a waiter's leaving removed the head");
    match c.look(&last).await {
        Standing::Behind(_, ahead) => assert_eq!((ahead.predecessor, ahead.count), (first.token, 1), "S5: who is left"),
        other => panic!("S5: a waiter's leaving made another {other:?}"),
    }
    assert_eq!(a.leave(&claims[0]).await, Departure::Left, "S5: the head leaves");
    assert_eq!(c.look(&last).await, Standing::Head(last.token), "S5: the next one holds");
    for _ in 0..3 {
        assert_eq!(a.leave(&claims[0]).await, Departure::Gone, "S5: the former head leaves again");
        assert_eq!(c.look(&last).await, Standing::Head(last.token), "S5: a repeated leave removed the successor");
    }
    assert_eq!(c.leave(&claims[2]).await, Departure::Left, "S5: the last one leaves");
    close(&parties).await;
}

/// Evicting removes the claim with that token and no other, and said again removes nothing.
pub async fn s5_evicting_is_compare_and_delete(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S5").await;
    let name = harness.unique_name("evict");
    let (first, second) = (a.claim(&name, LONG), b.claim(&name, LONG));
    let place = a.hold(&first).await;
    let (next, ahead) = b.queue(&second).await;
    let unknown = Token::try_from(next.token.get() + 1).expect("at least 1");
    assert!(!b.evict(&name, unknown).await, "S5: nobody has that token");
    assert!(!b.evict(&harness.unique_name("other"), place.token).await, "S5: nobody of that name has that token");
    assert_eq!(a.look(&place).await, Standing::Head(place.token), "S5: the wrong token removed the holder");
    assert!(b.evict(&name, place.token).await, "S5: the holder has that token");
    b.turn(&next, &ahead).await;
    assert_eq!(b.look(&next).await, Standing::Head(next.token), "S5: the next one holds");
    assert!(!b.evict(&name, place.token).await, "S5: the evicted one is gone");
    assert_eq!(a.look(&place).await, Standing::Lost, "S5: the evicted one looks");
    assert_eq!(a.renew(&place).await, Renewal::Lost { superseded: true }, "S5: the evicted one renews");
    assert_eq!(a.leave(&first).await, Departure::Gone, "S5: the evicted one leaves");
    assert_eq!(b.leave(&second).await, Departure::Left, "S5: the successor was still there");
    close(&[a, b]).await;
}

/// Nobody passes over a claim before its ttl has gone by since it was sent.
pub async fn s6_not_before_ttl(harness: &dyn Harness) {
    unless_slow(async || {
        let (a, b) = Party::pair(harness, "S6").await;
        let (name, ttl) = (harness.unique_name("before"), harness.ttl());
        let (claim, next) = (a.claim(&name, ttl), b.claim(&name, LONG));
        let sent = a.env.now();
        a.hold(&claim).await;
        let standing = b.enter(&next).await;
        let observed = match &standing {
            Standing::Behind(token, _) => b.waits_until(sent, ttl, &Place { claim: next.clone(), token: *token }).await,
            other => {
                assert!(b.env.now() >= sent + ttl, "S6: passed over too early: {other:?}");
                false
            }
        };
        b.leave(&next).await;
        close(&[a, b]).await;
        observed
    })
    .await;
}

/// An unrenewed claim is passed over by ttl and slack, by a waiter and by `inspect`, and the wait ends by then.
pub async fn s6_not_after_ttl_and_slack(harness: &dyn Harness) {
    unless_slow(async || {
        let (a, b) = Party::pair(harness, "S6").await;
        let (name, ttl) = (harness.unique_name("after"), harness.ttl());
        let (claim, next) = (a.claim(&name, ttl), b.claim(&name, LONG));
        let place = a.hold(&claim).await;
        let standing = b.enter(&next).await;
        let latest = b.env.now() + ttl + b.store.limits().slack;
        let in_time = if let Standing::Behind(token, ahead) = standing {
            assert!(ahead.look_at <= latest, "S6: told to look at {:?}, later than {latest:?}", ahead.look_at);
            let behind = Place { claim: next.clone(), token };
            b.turn(&behind, &ahead).await;
            b.env.sleep_until(latest).await;
            assert_eq!(b.look(&behind).await, Standing::Head(token), "S6: not passed over at ttl and slack");
            assert_eq!(b.inspect(&name).await.map(|record| record.token), Some(token), "S6: the record shows the dead");
            assert_eq!(a.renew(&place).await, Renewal::Lost { superseded: true }, "S6: the dead one renews");
            assert_eq!(a.leave(&claim).await, Departure::Gone, "S6: the dead one leaves");
            true
        } else {
            false
        };
        b.leave(&next).await;
        close(&[a, b]).await;
        in_time
    })
    .await;
}

/// The last renewal counts though it came when the waiter had long begun to wait: he does not begin to count anew.
pub async fn s6_not_after_ttl_and_slack_of_a_renewal_while_waiting(harness: &dyn Harness) {
    unless_slow(async || {
        let (a, b) = Party::pair(harness, "S6").await;
        let (name, ttl) = (harness.unique_name("renewed"), harness.ttl());
        let (claim, next) = (a.claim(&name, ttl), b.claim(&name, LONG));
        let sent = a.env.now();
        let place = a.hold(&claim).await;
        let (behind, _) = b.queue(&next).await;
        let waiting = async {
            let standing = b.look(&behind).await;
            b.follow(&next, standing).await;
            b.env.now()
        };
        let renewing = async {
            a.env.sleep_until(sent + ttl / 4).await;
            (a.renewed_before(sent + ttl, a.env.now(), &place).await, a.env.now())
        };
        let (passed_over, (renewed, answered)) = zip(waiting, renewing).await;
        // A machine may be late, and a store that always is is wrong.
        let in_time = passed_over <= answered + ttl + b.store.limits().slack + Duration::from_millis(50);
        b.leave(&next).await;
        close(&[a, b]).await;
        renewed.is_some() && in_time
    })
    .await;
}

/// A claim that is held outlives the restart of whatever keeps it.
pub async fn s6_restart_passes_over_nobody(harness: &dyn Harness) {
    let party = Party::open(harness, "S6").await;
    let name = harness.unique_name("outlives");
    let claim = party.claim(&name, LONG);
    let place = party.hold(&claim).await;
    close(&[party]).await;
    assert!(harness.restart().await, "the harness cannot restart its store: run the suite as volatile");
    let party = Party::open(harness, "S6").await;
    let next = party.claim(&name, LONG);
    assert_eq!(party.queue(&next).await.1.holder, place.token, "S6: the restart passed over the holder");
    party.leave(&next).await;
    party.leave(&claim).await;
    close(&[party]).await;
}

/// The predecessor leaves before, while, or just after `turn` begins to wait: it resolves each time.
pub async fn s7_no_lost_wake_up(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S7").await;
    let name = harness.unique_name("wake");
    let mut head = a.hold(&a.claim(&name, LONG)).await;
    for round in 0..100 {
        let (holder, waiter) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        let claim = waiter.claim(&name, LONG);
        let (place, ahead) = waiter.queue(&claim).await;
        let turn = waiter.turn(&place, &ahead);
        match round % 4 {
            0 => {
                holder.leave(&head.claim).await;
                turn.await;
            }
            1 => drop(zip(turn, holder.leave(&head.claim)).await),
            2 => drop(zip(holder.leave(&head.claim), turn).await),
            _ => {
                let (store, gone) = (holder.store.clone(), head.claim.clone());
                holder.env.spawn(Box::pin(async move { drop(store.leave(&gone).await) }));
                turn.await;
            }
        }
        let standing = waiter.look(&place).await;
        head = waiter.follow(&claim, standing).await.0;
    }
    a.leave(&head.claim).await;
    close(&[a, b]).await;
}

/// Withdrawn, evicted, expired or released: whoever waits behind is woken.
pub async fn s7_every_way_of_leaving_wakes(harness: &dyn Harness) {
    unless_slow(async || {
        let parties = Party::several(harness, "S7", 3).await;
        let [a, b, c] = &parties[..] else { unreachable!() };
        let name = harness.unique_name("ways");
        let mut seen = 0;
        for way in 0..3 {
            let holding = a.claim(&name, LONG);
            a.hold(&holding).await;
            let going = b.claim(&name, if way == 2 { harness.ttl() } else { LONG });
            let goes = b.queue(&going).await.0.token;
            let waiting = c.claim(&name, LONG);
            let (place, ahead) = c.queue(&waiting).await;
            if ahead.predecessor == goes {
                let leaving = async {
                    match way {
                        0 => drop(b.leave(&going).await),
                        1 => drop(a.evict(&name, goes).await),
                        _ => (),
                    }
                };
                zip(c.turn(&place, &ahead), leaving).await;
                seen += 1;
            }
            let standing = c.look(&place).await;
            zip(c.follow(&waiting, standing), a.leave(&holding)).await;
            c.leave(&waiting).await;
        }
        close(&parties).await;
        seen == 3
    })
    .await;
}

/// A line of waiters is served with about one wake each: a leaving claim does not wake them all.
pub async fn s7_one_handover_wakes_one_waiter(harness: &dyn Harness) {
    const WAITERS: u32 = 12;
    let parties = Party::several(harness, "S7", WAITERS as usize + 1).await;
    let name = harness.unique_name("herd");
    let first = parties[0].claim(&name, LONG);
    parties[0].hold(&first).await;
    let mut waiting = Vec::new();
    for party in &parties[1..] {
        let claim = party.claim(&name, LONG);
        waiting.push((party, party.enter(&claim).await, claim));
    }
    let served = waiting.into_iter().map(async |(party, standing, claim)| {
        let (_, wakes) = party.follow(&claim, standing).await;
        // Held for a moment, so that a herd has the time to show itself.
        party.env.sleep_until(party.env.now() + Duration::from_millis(20)).await;
        party.leave(&claim).await;
        wakes
    });
    let leaving = async {
        // All of them wait before the first one leaves.
        yield_now().await;
        parties[0].leave(&first).await;
    };
    let (served, ()) = zip(together(served), leaving).await;
    let wakes: u32 = served.iter().sum();
    assert!(wakes <= 2 * WAITERS, "S7: {wakes} wakes for {WAITERS} hand-overs: a herd");
    close(&parties).await;
}

/// With nothing happening, neither `turn` nor `changed` keeps resolving.
pub async fn s7_waiting_is_no_polling(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S7").await;
    let name = harness.unique_name("polling");
    let (first, second) = (a.claim(&name, LONG), b.claim(&name, LONG));
    let held = a.hold(&first).await;
    let (place, ahead) = b.queue(&second).await;
    let (mut turns, mut changes) = (0, 0);
    while until(&*b.env, b.env.now() + harness.ttl(), b.store.turn(&place, &ahead)).await.is_some() {
        turns += 1;
        assert!(turns < 10, "S7: turn polls");
    }
    while until(&*b.env, b.env.now() + harness.ttl(), b.store.changed(&name, Some(held.token))).await.is_some() {
        changes += 1;
        assert!(changes < 10, "S7: changed polls");
    }
    b.leave(&second).await;
    a.leave(&first).await;
    close(&[a, b]).await;
}

/// `changed` resolves when the holder is another than the one seen, also if that had happened before it was called.
pub async fn s7_changed_is_level_triggered(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S7").await;
    let name = harness.unique_name("changed");
    for evicted in [false, true] {
        let claim = a.claim(&name, LONG);
        let ((), place) = zip(b.changed_from(&name, None), a.hold(&claim)).await;
        b.changed_from(&name, None).await;
        let ending = async {
            if evicted {
                a.evict(&name, place.token).await;
            } else {
                a.leave(&claim).await;
            }
        };
        zip(b.changed_from(&name, Some(place.token)), ending).await;
        b.changed_from(&name, Some(place.token)).await;
    }
    let dying = a.hold(&a.claim(&name, harness.ttl())).await;
    b.changed_from(&name, Some(dying.token)).await;
    let (first, second) = (a.claim(&name, LONG), b.claim(&name, LONG));
    let seen = a.hold(&first).await.token;
    let (next, ahead) = b.queue(&second).await;
    let handover = async {
        a.leave(&first).await;
        b.turn(&next, &ahead).await;
        b.look(&next).await
    };
    let ((), standing) = zip(a.changed_from(&name, Some(seen)), handover).await;
    assert_eq!(standing, Standing::Head(next.token), "S7: the next one holds");
    b.leave(&second).await;
    close(&[a, b]).await;
}

/// Who entered first is served first, and knows how many are ahead.
pub async fn s8_token_order(harness: &dyn Harness) {
    let parties = Party::several(harness, "S8", 8).await;
    let name = harness.unique_name("order");
    let granted = std::sync::Mutex::new(Vec::new());
    let (mut entered, mut tokens) = (Vec::new(), Vec::new());
    for (at, party) in parties.iter().enumerate() {
        let claim = party.claim(&name, LONG);
        let standing = party.enter(&claim).await;
        match &standing {
            Standing::Head(token) if at == 0 => tokens.push(*token),
            Standing::Behind(token, ahead) if at > 0 => {
                assert_eq!((ahead.predecessor, ahead.count), (tokens[at - 1], at as u64), "S8: who is ahead");
                tokens.push(*token);
            }
            other => panic!("S8: number {at} to enter is {other:?}"),
        }
        entered.push((party, claim, standing));
    }
    // The last is polled first: being asked first is no advantage.
    let served = entered.into_iter().rev().map(async |(party, claim, standing)| {
        let (place, _) = party.follow(&claim, standing).await;
        crate::runtime::lock(&granted).push(place.token);
        party.leave(&claim).await;
    });
    together(served).await;
    assert_eq!(*crate::runtime::lock(&granted), tokens, "S8: served in another order than entered");
    close(&parties).await;
}

/// A waiter that died far from the head is passed over after its ttl, and nobody behind it is stuck.
pub async fn s8_dead_waiter_is_skipped(harness: &dyn Harness) {
    unless_slow(async || {
        let parties = Party::several(harness, "S8", 3).await;
        let [a, b, c] = &parties[..] else { unreachable!() };
        let (name, ttl) = (harness.unique_name("dead"), harness.ttl());
        let claims = [a.claim(&name, LONG), b.claim(&name, ttl), c.claim(&name, LONG)];
        let first = a.hold(&claims[0]).await;
        let dead = b.queue(&claims[1]).await.0.token;
        let (last, ahead) = c.queue(&claims[2]).await;
        let latest = c.env.now() + ttl + c.store.limits().slack;
        let in_time = ahead.predecessor == dead;
        if in_time {
            c.turn(&last, &ahead).await;
            c.env.sleep_until(latest).await;
            match c.look(&last).await {
                Standing::Behind(_, ahead) => {
                    assert_eq!((ahead.predecessor, ahead.count), (first.token, 1), "S8: a dead waiter is still ahead");
                }
                other => panic!("S8: behind a holder, and {other:?}"),
            }
        }
        for (party, claim) in parties.iter().zip(&claims) {
            party.leave(claim).await;
        }
        close(&parties).await;
        in_time
    })
    .await;
}

/// A waiter that is dead when its turn comes holds up those behind it for its ttl at most.
pub async fn s8_dead_waiter_is_skipped_at_its_turn(harness: &dyn Harness) {
    let parties = Party::several(harness, "S8", 3).await;
    let [a, b, c] = &parties[..] else { unreachable!() };
    let (name, ttl) = (harness.unique_name("turn"), harness.ttl());
    let claims = [a.claim(&name, LONG), b.claim(&name, ttl), c.claim(&name, LONG)];
    a.hold(&claims[0]).await;
    b.queue(&claims[1]).await;
    let standing = c.enter(&claims[2]).await;
    a.leave(&claims[0]).await;
    let latest = c.env.now() + ttl + c.store.limits().slack;
    let token = match standing {
        Standing::Behind(token, ahead) => {
            c.turn(&Place { claim: claims[2].clone(), token }, &ahead).await;
            token
        }
        Standing::Head(token) => token,
        other => panic!("S8: entered, and is {other:?}"),
    };
    c.env.sleep_until(latest).await;
    let last = Place { claim: claims[2].clone(), token };
    assert_eq!(c.look(&last).await, Standing::Head(token), "S8: a dead waiter holds up the next one");
    assert_eq!(b.leave(&claims[1]).await, Departure::Gone, "S8: the dead waiter was passed over");
    c.leave(&claims[2]).await;
    close(&parties).await;
}

/// Once it has left, a claim neither holds nor waits.
pub async fn s9_final_leave(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S9").await;
    let name = harness.unique_name("final");
    let (first, second) = (a.claim(&name, LONG), b.claim(&name, LONG));
    let place = a.hold(&first).await;
    let (next, _) = b.queue(&second).await;
    b.leave(&second).await;
    assert_eq!(b.look(&next).await, Standing::Lost, "S9: a withdrawn claim stands somewhere");
    a.leave(&first).await;
    for (party, place) in [(&a, &place), (&b, &next)] {
        assert_eq!(party.look(place).await, Standing::Lost, "S9: looking put a claim back");
        assert_eq!(party.renew(place).await, Renewal::Lost { superseded: false }, "S9: renewing put a claim back");
    }
    assert_eq!(a.inspect(&name).await, None, "S9: a claim that left holds");
    close(&[a, b]).await;
}

/// An attempt to enter that nobody waits for any more comes to nothing once `leave` was answered.
pub async fn s9_unanswered_claim_never_enters_after_leave(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S9").await;
    let name = harness.unique_name("ghost");
    for (polls, again) in (0..POLLS).flat_map(|polls| (0..POLLS).map(move |again| (polls, again))) {
        let ghost = a.claim(&name, LONG);
        a.cut(polls, a.store.claim(a.env.now(), &ghost)).await;
        a.cut(again, a.store.claim(a.env.now(), &ghost)).await;
        a.leave(&ghost).await;
        // What that store had on the way is done when it has done this.
        let other = a.claim(&harness.unique_name("other"), LONG);
        a.hold(&other).await;
        a.leave(&other).await;
        assert_eq!(b.inspect(&name).await, None, "S9: a claim entered after it had left");
        let next = b.claim(&name, LONG);
        b.hold(&next).await;
        b.leave(&next).await;
        assert_eq!(a.leave(&ghost).await, Departure::Gone, "S9: a claim entered after it had left");
    }
    close(&[a, b]).await;
}

/// A claim that expired behind a living head, sent once more and then withdrawn, leaves nothing that could hold later.
pub async fn s9_claim_that_expired_in_the_line_has_no_second_life(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S9").await;
    let name = harness.unique_name("expired");
    let (holder, waiter) = (a.claim(&name, LONG), b.claim(&name, harness.ttl()));
    a.hold(&holder).await;
    b.queue(&waiter).await;
    b.env.sleep_until(b.env.now() + b.store.gone_after(harness.ttl())).await;
    // It may enter anew or be told that it is lost.
    drop(b.store.claim(b.env.now(), &waiter).await.expect("S9: an answer"));
    b.leave(&waiter).await;
    a.leave(&holder).await;
    assert_eq!(a.inspect(&name).await, None, "S9: a claim that left holds");
    close(&[a, b]).await;
}

/// After `close` every call says so, those that were waiting too. Claims stay, and other stores go on.
pub async fn s10_errors_after_close(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S10").await;
    let (name, other) = (harness.unique_name("closed"), harness.unique_name("open"));
    let (mine, theirs) = (a.claim(&name, LONG), b.claim(&other, LONG));
    let held = a.hold(&mine).await;
    let kept = b.hold(&theirs).await;
    let waiting = a.claim(&other, LONG);
    let (place, ahead) = a.queue(&waiting).await;
    a.ok("ping", a.store.ping().await);
    let pending = zip(a.store.turn(&place, &ahead), a.store.changed(&other, Some(kept.token)));
    let (pending, ()) = a.within("what waits when the store is closed", zip(pending, a.store.close())).await;
    let sent = a.env.now();
    let calls = async {
        let mut answers = vec![
            ("waiting turn", pending.0),
            ("waiting changed", pending.1),
            ("claim", a.store.claim(sent, &a.claim(&name, LONG)).await.map(drop)),
            ("turn", a.store.turn(&place, &ahead).await),
            ("look", a.store.look(&held).await.map(drop)),
            ("leave", a.store.leave(&mine).await.map(drop)),
            ("inspect", a.store.inspect(&name).await.map(drop)),
            ("list", a.store.list(&name).await.map(drop)),
            ("changed", a.store.changed(&name, Some(held.token)).await),
            ("evict", a.store.evict(&name, held.token).await.map(drop)),
            ("ping", a.store.ping().await),
        ];
        let renewed = a.store.renew(sent, &[held.clone(), place.clone()]).await;
        assert_eq!(renewed.len(), 2, "S10: one answer a place, closed or not");
        answers.extend(renewed.into_iter().map(|answer| ("renew", answer.map(drop))));
        answers
    };
    for (what, answer) in a.within("a call after close", calls).await {
        assert_eq!(answer.map_err(|error| error.kind()), Err(ErrorKind::Closed), "S10: {what} after close");
    }
    a.within("closing again", a.store.close()).await;
    assert_eq!(b.inspect(&name).await.map(|record| record.token), Some(held.token), "S10: close is no leave");
    assert!(matches!(b.renew(&kept).await, Renewal::Renewed { .. }), "S10: another store was closed too");
    assert!(b.evict(&name, held.token).await, "S10: the claim of a closed store stays");
    b.leave(&theirs).await;
    b.evict(&other, place.token).await;
    close(&[b]).await;
}

/// Any future may be dropped at any wait: `leave` cleans up.
pub async fn s11_cancel_safety(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S11").await;
    let name = harness.unique_name("cancel");
    for polls in 0..POLLS {
        let (head, entering) = (a.claim(&name, LONG), a.claim(&name, LONG));
        a.cut(polls, a.store.claim(a.env.now(), &head)).await;
        let trying = Claim { queues: false, ..a.claim(&name, LONG) };
        a.cut(polls, a.store.claim(a.env.now(), &trying)).await;
        a.cut(polls, a.store.claim(a.env.now(), &entering)).await;
        let waiter = b.claim(&name, LONG);
        let standing = b.enter(&waiter).await;
        let (Standing::Head(token) | Standing::Behind(token, _)) = standing else { panic!("S11: {standing:?}") };
        let places = [Place { claim: waiter.clone(), token }];
        if let Standing::Behind(_, ahead) = &standing {
            b.cut(polls, b.store.turn(&places[0], ahead)).await;
        }
        b.cut(polls, b.store.renew(b.env.now(), &places)).await;
        b.cut(polls, b.store.look(&places[0])).await;
        b.cut(polls, b.store.inspect(&name)).await;
        b.cut(polls, b.store.list(&name)).await;
        b.cut(polls, b.store.changed(&name, Some(token))).await;
        a.cut(polls, a.store.evict(&name, token)).await;
        b.cut(polls, b.store.leave(&waiter)).await;
        for (party, claim) in [(&a, &head), (&a, &trying), (&a, &entering), (&b, &waiter)] {
            party.cut(polls, party.store.leave(claim)).await;
            party.leave(claim).await;
        }
        assert_eq!(a.inspect(&name).await, None, "S11: {polls} polls of each future, and something remains");
        let fresh = b.claim(&name, LONG);
        b.hold(&fresh).await;
        b.leave(&fresh).await;
    }
    close(&[a, b]).await;
}

/// A wait that was given up does not take along the wake-up of the wait that followed it.
pub async fn s11_dropped_turn_takes_no_wake_up_along(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S11").await;
    let name = harness.unique_name("dropped");
    for polls in 0..POLLS {
        let (first, second) = (a.claim(&name, LONG), b.claim(&name, LONG));
        a.hold(&first).await;
        let (place, ahead) = b.queue(&second).await;
        let mut given_up = Box::pin(b.store.turn(&place, &ahead));
        b.cut(polls, &mut given_up).await;
        let giving_up = async {
            a.leave(&first).await;
            drop(given_up);
        };
        zip(b.turn(&place, &ahead), giving_up).await;
        let standing = b.look(&place).await;
        b.follow(&second, standing).await;
        b.leave(&second).await;
    }
    close(&[a, b]).await;
}

/// Every name has a line of its own, whatever characters it has.
pub async fn s12_names_never_meet(harness: &dyn Harness) {
    let (a, b) = Party::pair(harness, "S12").await;
    let names = awkward_names(&harness.unique_name("meet"));
    let mut places = Vec::new();
    for name in &names {
        places.push(a.hold(&a.claim(name, LONG)).await);
    }
    for (name, place) in names.iter().zip(&places) {
        let record = b.inspect(name).await.expect("S12: the name is held");
        let told = (&record.name, record.token, record.waiting);
        assert_eq!(told, (name, place.token, 0), "S12: the line of {name:?} is another's too");
    }
    for place in &places {
        assert_eq!(a.leave(&place.claim).await, Departure::Left, "S12: {:?} left with another", place.claim.name);
    }
    close(&[a, b]).await;
}

/// `list` shows what is held under exactly that prefix, sorted: no wildcard, no folding of case, no separator is special.
pub async fn s12_list_takes_any_prefix(harness: &dyn Harness) {
    let party = Party::open(harness, "S12").await;
    let root = harness.unique_name("list");
    let mut names = awkward_names(&root);
    names.sort();
    for name in &names {
        party.hold(&party.claim(name, LONG)).await;
    }
    let cuts = names.iter().flat_map(|name| name.char_indices().map(|(at, _)| &name[..at]));
    let mut prefixes: BTreeSet<_> = cuts.filter(|cut| cut.contains(&*root) && cut.len() < root.len() + 20).collect();
    prefixes.extend(names.iter().map(|name| &**name));
    let foreign = [format!("{root}never"), format!("_{}", &root[1..]), format!("{root}/_"), format!("{root}/*")];
    prefixes.extend(foreign.iter().map(|prefix| &**prefix));
    for prefix in prefixes {
        let listed: Vec<Name> = party.list(prefix).await.into_iter().map(|record| record.name).collect();
        let expected: Vec<Name> = names.iter().filter(|name| name.starts_with(prefix)).cloned().collect();
        assert_eq!(listed, expected, "S12: list({prefix:?})");
    }
    let everything = party.list("").await;
    assert!(names.iter().all(|name| everything.iter().any(|record| record.name == *name)), "S12: list of everything");
    for name in &names {
        if let Some(record) = party.inspect(name).await {
            party.evict(name, record.token).await;
        }
    }
    close(&[party]).await;
}

/// Names that a careless mapping to keys, patterns, paths or ranges makes meet.
fn awkward_names(root: &str) -> Vec<Name> {
    // Parted by `|`: nothing, separators, wildcards, escapes, quotes, control characters, and letters that look alike.
    let ends = "|/|//|/a|/a/|/a/b|/ab|/A|/a%|/a%2Fb|/a%2fb|/a_|/a*|/a?|/[a]|/.|/..|/../a|a|b|%|_|\\|\\x00|:|;|#|~|'|\"| |  |\t\
                |\n|\r\n|\u{1}|\u{7f}|\u{80}|\u{e9}|e\u{301}|\u{fffd}|\u{1f512}|\u{1f512}\u{fe0f}|\u{10ffff}";
    let mut names: Vec<String> = ends.split('|').map(|end| format!("{root}{end}")).collect();
    names.extend(["/", "%", "_", ".", " ", "\\", "\u{1f512}", "\u{1}"].map(|begin| format!("{begin}{root}")));
    for unit in ["x", "/", "%", "\u{e9}", "\u{1f512}"] {
        let fits = (Name::MAX_BYTES - root.len()) / unit.len();
        names.extend([fits, fits - 1].map(|units| format!("{root}{}", unit.repeat(units))));
    }
    names.iter().map(|name| Name::new(name).expect("awkward, yet a name")).collect()
}

/// One manager's store, and what the clauses do with it most. Its messages begin with the clause.
struct Party {
    clause: &'static str,
    store: Arc<dyn Store>,
    env: Arc<dyn Environment>,
}

impl Party {
    async fn open(harness: &dyn Harness, clause: &'static str) -> Self {
        let store = harness.open().await;
        let (ttl, min) = (harness.ttl(), store.limits().min_ttl);
        assert!(ttl >= min, "the harness has a ttl of {ttl:?}, and its store a minimum of {min:?}");
        Self { clause, store, env: harness.environment() }
    }

    async fn pair(harness: &dyn Harness, clause: &'static str) -> (Self, Self) {
        (Self::open(harness, clause).await, Self::open(harness, clause).await)
    }

    async fn several(harness: &dyn Harness, clause: &'static str, count: usize) -> Vec<Self> {
        let mut parties = Vec::new();
        for _ in 0..count {
            parties.push(Self::open(harness, clause).await);
        }
        parties
    }

    /// A claim that was never sent.
    fn claim(&self, name: &Name, ttl: Duration) -> Claim {
        let id = u128::from(self.env.random()) << 64 | u128::from(self.env.random());
        let owner = format!("conformance:{:08x}", id >> 96);
        Claim { name: name.clone(), id: ClaimId(id), ttl, owner: owner.into(), queues: true, follows: None }
    }

    async fn within<T>(&self, what: &str, work: impl Future<Output = T>) -> T {
        let done = until(&*self.env, self.env.now() + LIMIT, work).await;
        done.unwrap_or_else(|| panic!("{}: {what} took longer than {LIMIT:?}", self.clause))
    }

    fn ok<T>(&self, what: &str, result: Result<T>) -> T {
        result.unwrap_or_else(|error| panic!("{}: {what} failed: {error:?}", self.clause))
    }

    async fn enter(&self, claim: &Claim) -> Standing {
        self.ok("claim", self.within("claim", self.store.claim(self.env.now(), claim)).await)
    }

    /// Enters, and is the head at once.
    async fn hold(&self, claim: &Claim) -> Place {
        match self.enter(claim).await {
            Standing::Head(token) => Place { claim: claim.clone(), token },
            other => panic!("{}: entered an empty line, and is {other:?}", self.clause),
        }
    }

    /// Enters, and is behind another.
    async fn queue(&self, claim: &Claim) -> (Place, Ahead) {
        match self.enter(claim).await {
            Standing::Behind(token, ahead) => (Place { claim: claim.clone(), token }, ahead),
            other => panic!("{}: entered behind another, and is {other:?}", self.clause),
        }
    }

    async fn turn(&self, place: &Place, ahead: &Ahead) {
        self.ok("turn", self.within("turn", self.store.turn(place, ahead)).await);
    }

    async fn look(&self, place: &Place) -> Standing {
        self.ok("look", self.within("look", self.store.look(place)).await)
    }

    /// Waits from where the claim stands until it is the head; tells how often it was woken.
    async fn follow(&self, claim: &Claim, mut standing: Standing) -> (Place, u32) {
        let mut wakes = 0;
        loop {
            match standing {
                Standing::Head(token) => return (Place { claim: claim.clone(), token }, wakes),
                Standing::Behind(token, ahead) => {
                    assert!(ahead.holder <= ahead.predecessor && ahead.predecessor < token, "S3: behind {ahead:?}");
                    let place = Place { claim: claim.clone(), token };
                    self.turn(&place, &ahead).await;
                    wakes += 1;
                    assert!(wakes < 1000, "{}: woken {wakes} times, and still behind {ahead:?}", self.clause);
                    standing = self.look(&place).await;
                }
                other => panic!("{}: a waiting claim is {other:?}", self.clause),
            }
        }
    }

    /// Looks ever more often until `sent + ttl` and must be behind another that long; then waits to be the head, and not
    /// in vain. `false` when the machine was too slow to see anything.
    async fn waits_until(&self, sent: Moment, ttl: Duration, place: &Place) -> bool {
        let mut observed = false;
        for part in 1..8 {
            self.env.sleep_until(sent + ttl * ((1 << part) - 1) / (1 << part)).await;
            let standing = self.look(place).await;
            if self.env.now() < sent + ttl {
                let waits = matches!(standing, Standing::Behind(..));
                assert!(waits, "{}: passed over {part} halvings before its ttl: {standing:?}", self.clause);
                observed = true;
            }
        }
        let standing = self.look(place).await;
        self.follow(&place.claim, standing).await;
        assert!(self.env.now() >= sent + ttl, "{}: woken and passed over before its ttl", self.clause);
        observed
    }

    async fn renew_as_of(&self, sent: Moment, place: &Place) -> Renewal {
        let answers = self.within("renew", self.store.renew(sent, std::slice::from_ref(place))).await;
        let answer: Result<[_; 1], _> = answers.try_into();
        let [answer] = answer.unwrap_or_else(|_| panic!("{}: one answer a place", self.clause));
        let renewal = self.ok("renew", answer);
        if let Renewal::Renewed { confirmed, .. } = renewal {
            assert!(confirmed <= sent, "{}: confirmed {confirmed:?}, later than sent {sent:?}", self.clause);
        }
        renewal
    }

    async fn renew(&self, place: &Place) -> Renewal {
        self.renew_as_of(self.env.now(), place).await
    }

    /// What the renewal confirmed; `None` when it was answered only after the claim could have expired.
    async fn renewed_before(&self, deadline: Moment, sent: Moment, place: &Place) -> Option<Moment> {
        match self.renew_as_of(sent, place).await {
            Renewal::Renewed { confirmed, .. } => Some(confirmed),
            Renewal::Lost { .. } if self.env.now() >= deadline => None,
            lost @ Renewal::Lost { .. } => panic!("{}: {lost:?} before its ttl", self.clause),
        }
    }

    async fn leave(&self, claim: &Claim) -> Departure {
        self.ok("leave", self.within("leave", self.store.leave(claim)).await)
    }

    async fn evict(&self, name: &Name, token: Token) -> bool {
        self.ok("evict", self.within("evict", self.store.evict(name, token)).await)
    }

    async fn inspect(&self, name: &Name) -> Option<Record> {
        self.ok("inspect", self.within("inspect", self.store.inspect(name)).await)
    }

    async fn list(&self, prefix: &str) -> Vec<Record> {
        self.ok("list", self.within("list", self.store.list(prefix)).await)
    }

    /// Waits until the holder really is another: `changed` may resolve too early.
    async fn changed_from(&self, name: &Name, seen: Option<Token>) {
        let changed = async {
            loop {
                self.ok("changed", self.store.changed(name, seen).await);
                if self.inspect(name).await.map(|record| record.token) != seen {
                    return;
                }
            }
        };
        self.within("changed", changed).await;
    }

    /// Drops the work after so many polls, or when it waits for something that will not come.
    async fn cut<T>(&self, polls: u32, work: impl Future<Output = T>) {
        let mut work = pin!(work);
        let mut left = polls;
        let polled = poll_fn(|cx| {
            if left == 0 || work.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            left -= 1;
            if left == 0 { Poll::Ready(()) } else { Poll::Pending }
        });
        until(&*self.env, self.env.now() + Duration::from_millis(5), polled).await;
    }
}

async fn close(parties: &[Party]) {
    for party in parties {
        party.within("close", party.store.close()).await;
    }
}

/// Runs the attempt until the machine was fast enough for it to show something.
async fn unless_slow(attempt: impl AsyncFn() -> bool) {
    for _ in 0..ATTEMPTS {
        if attempt().await {
            return;
        }
    }
    panic!("the machine was too slow {ATTEMPTS} times: give the harness a longer ttl");
}
