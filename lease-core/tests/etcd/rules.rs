//! The rules of the store, one by one, each seen from outside on a real server: what it sends, what it leaves, what it
//! survives. One node.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use futures_lite::future::{block_on, or, poll_once};
use lease_core::blocking::Manager;
use lease_core::runtime::system;
use lease_core::store::{Claim, ClaimId, Departure, Name, Place, Renewal, Standing, Store, Token};
use lease_core::stores::etcd::EtcdStore;
use lease_core::{EndReason, ErrorKind};

use crate::support::etcd::Cluster;
use crate::support::proxy::{Fault, Proxy};

/// For what is sure to come.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(60);

pub(crate) type Rule = (&'static str, fn(&str));

pub(crate) const RULES: &[Rule] = &[
    ("an_uncontended_acquire_is_one_transaction_and_so_is_its_release", an_uncontended_acquire_is_one_transaction),
    ("the_next_of_a_manager_enters_as_the_last_one_leaves", the_next_of_a_manager_enters_as_the_last_one_leaves),
    ("renewals_share_transactions_and_no_lease_is_kept_alive", renewals_share_transactions),
    ("waiters_watch_their_predecessors_on_one_stream", waiters_watch_their_predecessors),
    ("a_hand_over_is_no_matter_of_100_ms", a_hand_over_is_no_matter_of_100_ms),
    ("a_lease_is_named_only_while_it_is_young", a_lease_is_named_only_while_it_is_young),
    ("an_unanswered_claim_is_found_again", an_unanswered_claim_is_found_again),
    ("a_late_claim_does_not_enter_after_a_release", a_late_claim_does_not_enter_after_a_release),
    ("a_late_claim_does_not_enter_after_a_withdrawal", a_late_claim_does_not_enter_after_a_withdrawal),
    ("a_refused_copy_says_nothing_of_the_other", a_refused_copy_says_nothing_of_the_other),
    ("unanswered_renewals_are_no_loss", unanswered_renewals_are_no_loss),
    ("an_eviction_is_noticed_at_once", an_eviction_is_noticed_at_once),
    ("a_key_that_the_server_never_expires_is_taken_away", a_key_that_the_server_never_expires_is_taken_away),
    ("a_loss_waits_for_nothing_else", a_loss_waits_for_nothing_else),
    ("prefixes_within_one_another_do_not_mix", prefixes_within_one_another_do_not_mix),
    ("a_manager_that_is_dropped_while_etcd_is_frozen_ends", a_manager_that_is_dropped_while_etcd_is_frozen_ends),
    ("what_another_program_keeps_is_not_touched", what_another_program_keeps_is_not_touched),
    ("what_another_program_writes_to_our_key_is_not_overwritten", what_another_program_writes_to_our_key),
    ("another_cluster_at_the_same_place_ends_the_leases", another_cluster_at_the_same_place),
    ("an_answer_from_the_past_ends_the_leases", an_answer_from_the_past),
    ("nothing_is_left_when_a_manager_is_closed", nothing_is_left_when_a_manager_is_closed),
    ("a_full_database_says_so_and_lets_go", a_full_database_says_so_and_lets_go),
    ("compaction_and_defragmentation_disturb_no_waiter", compaction_and_defragmentation_disturb_no_waiter),
    ("silence_counts_from_the_answer", silence_counts_from_the_answer),
    ("a_server_without_a_leader_ends_its_watches", a_server_without_a_leader_ends_its_watches),
    ("what_was_watched_is_watched_anew", what_was_watched_is_watched_anew),
    ("a_token_that_is_not_valid_any_more_is_replaced", a_token_that_is_not_valid_any_more_is_replaced),
    ("leases_that_the_server_does_not_know_are_replaced", leases_that_the_server_does_not_know_are_replaced),
    ("a_list_of_several_pages_is_whole", a_list_of_several_pages_is_whole),
    ("a_late_copy_is_made_harmless_before_a_release_is_answered", a_late_copy_is_made_harmless),
    ("what_is_left_is_left_for_others_as_it_is", what_is_left_is_left_for_others),
    ("an_unanswered_renewal_is_sent_again", an_unanswered_renewal_is_sent_again),
    ("an_etcd_lease_is_as_old_as_its_request", an_etcd_lease_is_as_old_as_its_request),
    ("an_unanswered_claim_whose_etcd_lease_is_gone_enters", an_unanswered_claim_whose_etcd_lease_is_gone),
    ("a_late_claim_does_not_enter_after_a_loss", a_late_claim_does_not_enter_after_a_loss),
    ("an_eviction_before_there_is_a_watch_is_noticed_at_once", an_eviction_before_there_is_a_watch),
    ("a_sign_of_life_in_the_last_moment_counts", a_sign_of_life_in_the_last_moment_counts),
    ("a_database_that_is_full_to_the_last_lets_go", a_database_that_is_full_to_the_last),
    ("a_change_before_there_is_a_watch_is_seen", a_change_before_there_is_a_watch),
    ("renewals_fill_a_transaction_and_not_more", renewals_fill_a_transaction),
    ("what_lasts_moves_with_the_connection", what_lasts_moves_with_the_connection),
    ("a_store_whose_closing_is_given_up_is_closed", a_store_whose_closing_is_given_up),
    ("a_lease_that_others_hang_on_stays", a_lease_that_others_hang_on_stays),
];

fn open(url: &str) -> Manager {
    Manager::builder().url(url).ttl(LONG).open_blocking().unwrap()
}

/// Waits for what is sure to come.
pub(crate) fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let limit = Instant::now() + LIMIT;
    while !happened() {
        assert!(Instant::now() < limit, "in vain waited for: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn an_uncontended_acquire_is_one_transaction(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let manager = open(&cluster.url("p"));
    // From the second on the lease to enter with is at hand.
    for _ in 0..2 {
        manager.acquire("n").wait().unwrap().release().unwrap();
    }
    until("spare leases", || cluster.leases() >= 2);
    let figures =
        || ["Txn", "Range", "Put", "DeleteRange", "LeaseGrant", "LeaseRevoke"].map(|call| cluster.calls(0, call));
    let [before, proposals] = [figures(), [cluster.metric(0, "etcd_server_proposals_committed_total", ""); 6]];
    for _ in 0..10 {
        let lease = manager.acquire("n").wait().unwrap();
        lease.release().unwrap();
    }
    let after = figures();
    let made: Vec<u64> = after.iter().zip(before).map(|(after, before)| after - before).collect();
    assert_eq!(made, [20, 0, 0, 0, 0, 0], "Txn, Range, Put, DeleteRange, LeaseGrant, LeaseRevoke of ten pairs");
    let proposed = cluster.metric(0, "etcd_server_proposals_committed_total", "") - proposals[0];
    assert_eq!(proposed, 20, "proposals of ten pairs");
    manager.close().unwrap();
}

fn the_next_of_a_manager_enters_as_the_last_one_leaves(version: &str) {
    const WAITERS: usize = 4;
    const ROUNDS: usize = 15;
    let cluster = Cluster::start(version, 1, &[]);
    let manager = open(&cluster.url("p"));
    for _ in 0..2 {
        manager.acquire("n").wait().unwrap().release().unwrap();
    }
    until("spare leases", || cluster.leases() >= 2);
    let (before, last) = (cluster.calls(0, "Txn"), AtomicI64::new(0));
    thread::scope(|scope| {
        for _ in 0..WAITERS {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    let lease = manager.acquire("n").timeout(LIMIT).wait().unwrap();
                    let earlier = last.swap(lease.token().get(), Ordering::SeqCst);
                    assert!(earlier < lease.token().get(), "{lease:?} after {earlier}");
                    lease.release().unwrap();
                }
            });
        }
    });
    let (made, grants) = (cluster.calls(0, "Txn") - before, (WAITERS * ROUNDS) as u64);
    assert!(made <= grants + grants / 3, "{made} transactions for {grants} grants");
    assert_eq!(cluster.keys("p/"), 0);
    // One who holds for long does not keep the next one out of the line.
    let held = manager.acquire("n").wait().unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| manager.acquire("n").timeout(LIMIT).wait().unwrap());
        until("the next one is in the line", || cluster.keys("p/n/") == 2);
        held.release().unwrap();
        waiting.join().unwrap().release().unwrap();
    });
    manager.close().unwrap();
    assert_eq!((cluster.keys("p/"), cluster.leases()), (0, 0), "keys and leases that are left");
}

fn renewals_share_transactions(version: &str) {
    const HELD: usize = 300;
    let cluster = Cluster::start(version, 1, &[]);
    let manager = Manager::builder().url(cluster.url("p")).ttl(Duration::from_secs(6)).open_blocking().unwrap();
    let leases: Vec<_> = (0..HELD).map(|at| manager.acquire(format!("n{at}")).wait().unwrap()).collect();
    let last = manager.acquire("last").wait().unwrap();
    let lease_of = |name: &str| {
        let text = cluster.ctl(&["get", "--prefix", &format!("p/{name}/"), "--write-out=fields"]);
        text.lines().find_map(|line| line.strip_prefix("\"Lease\" : ")).unwrap().to_owned()
    };
    let entered_with = lease_of("last");
    until("the first renewal of the last", || lease_of("last") != entered_with);
    // A whole round of all of them.
    let transactions = cluster.calls(0, "Txn");
    let (now, round) = (Instant::now(), Duration::from_secs(2));
    let moved = lease_of("last");
    until("the next one", || lease_of("last") != moved && now.elapsed() >= round);
    let made = cluster.calls(0, "Txn") - transactions;
    assert!(made >= 3, "{made} transactions renew nothing");
    assert!(made <= HELD as u64 / 4, "{made} transactions for {HELD} renewals");
    assert_eq!(cluster.calls(0, "LeaseKeepAlive"), 0, "a lease was kept alive");
    // Those to enter with have gone, and those that were replaced.
    until("the leases that carry nothing are revoked", || cluster.leases() <= 80);
    assert!(leases.iter().all(|lease| lease.is_held()) && last.is_held());
    drop((leases, last));
    manager.close().unwrap();
    assert_eq!((cluster.keys("p/"), cluster.leases()), (0, 0), "keys and leases that are left");
}

fn waiters_watch_their_predecessors(version: &str) {
    const NAMES: usize = 10;
    const WAITERS: usize = 5;
    let cluster = Cluster::start(version, 1, &[]);
    let holder = open(&cluster.url("p"));
    let held: Vec<_> = (0..NAMES).map(|at| holder.acquire(format!("n{at}")).wait().unwrap()).collect();
    let waiters: Vec<_> = (0..WAITERS).map(|_| open(&cluster.url("p"))).collect();
    let (tx, granted) = mpsc::channel();
    thread::scope(|scope| {
        for (number, waiter) in waiters.iter().enumerate() {
            for at in 0..NAMES {
                let tx = tx.clone();
                scope.spawn(move || {
                    let lease = waiter.acquire(format!("n{at}")).timeout(LIMIT).wait().unwrap();
                    tx.send((number, at)).unwrap();
                    lease.release().unwrap();
                });
            }
        }
        until("all wait", || cluster.keys("p/") == NAMES * (WAITERS + 1));
        // Two for each that waits, and one for each holder's own key.
        until("all watch", || {
            cluster.metric(0, "etcd_debugging_mvcc_watcher_total", "") == (NAMES * (2 * WAITERS + 1)) as u64
        });
        assert_eq!(cluster.calls(0, "Watch"), WAITERS as u64 + 1, "streams");
        let events = cluster.metric(0, "etcd_debugging_mvcc_events_total", "");
        for lease in held {
            lease.release().unwrap();
        }
        for _ in 0..NAMES * WAITERS {
            granted.recv_timeout(LIMIT).expect("everybody gets it");
        }
        // Each leaving is one event for one waiter. Of a herd it would be as many as wait.
        let events = cluster.metric(0, "etcd_debugging_mvcc_events_total", "") - events;
        let most = NAMES * (WAITERS + 1) * 3;
        assert!(events > 0 && events <= most as u64, "{events} events for {} leavings", NAMES * (WAITERS + 1));
    });
    assert_eq!(cluster.calls(0, "Watch"), WAITERS as u64 + 1, "streams");
    for manager in waiters.into_iter().chain([holder]) {
        manager.close().unwrap();
    }
    until("no watch is left", || cluster.metric(0, "etcd_debugging_mvcc_watcher_total", "") == 0);
}

/// Watches from an old revision are served by a loop of 100 ms: then the median is near 100 ms.
fn a_hand_over_is_no_matter_of_100_ms(version: &str) {
    const ROUNDS: usize = 31;
    let cluster = Cluster::start(version, 1, &[]);
    let managers = [open(&cluster.url("p")), open(&cluster.url("p"))];
    let mut took = Vec::new();
    for round in 0..ROUNDS {
        let held = managers[round % 2].acquire("n").wait().unwrap();
        let waiter = &managers[(round + 1) % 2];
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let lease = waiter.acquire("n").timeout(LIMIT).wait().unwrap();
                (Instant::now(), lease)
            });
            until("it waits", || waiter.inspect("n").unwrap().is_some_and(|record| record.waiting == 1));
            until("it watches", || cluster.metric(0, "etcd_debugging_mvcc_watcher_total", "") >= 1);
            let released = Instant::now();
            held.release().unwrap();
            let (granted, lease) = waiting.join().unwrap();
            took.push(granted.duration_since(released));
            lease.release().unwrap();
        });
    }
    took.sort();
    assert!(took[ROUNDS / 2] < Duration::from_millis(50), "{took:?}");
}

/// etcd takes a put onto a lease that is about to expire, and the key vanishes: before the ttl that was asked for.
fn a_lease_is_named_only_while_it_is_young(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let ttl = Duration::from_secs(6);
    let manager = Manager::builder().url(cluster.url("p")).ttl(ttl).open_blocking().unwrap();
    for _ in 0..4 {
        // 8 s are granted, so it may be named for 2 s.
        for _ in 0..8 {
            manager.acquire("n").wait().unwrap().release().unwrap();
            thread::sleep(Duration::from_millis(70));
        }
        thread::sleep(Duration::from_millis(1_500));
        let lease = manager.acquire("n").wait().unwrap();
        let text = cluster.ctl(&["get", "--prefix", "p/n/", "--write-out=fields"]);
        let id: u64 = text.lines().find_map(|line| line.strip_prefix("\"Lease\" : ")).unwrap().parse().unwrap();
        let told = cluster.ctl(&["lease", "timetolive", &format!("{id:x}")]);
        let (_, rest) = told.split_once("remaining(").unwrap_or_else(|| panic!("{told}"));
        let remaining: u64 = rest.split_once("s)").unwrap().0.parse().unwrap();
        // It is told in whole seconds, and asked a moment later.
        assert!(remaining >= ttl.as_secs() - 1, "{remaining} s are left of a claim that was just made: {told}");
        lease.release().unwrap();
    }
    manager.close().unwrap();
}

/// A manager that reaches the server by a bad network.
struct Far {
    cluster: Cluster,
    proxy: Proxy,
    manager: Manager,
}

impl Far {
    fn new(version: &str, ttl: Duration) -> Self {
        let cluster = Cluster::start(version, 1, &[]);
        let proxy = Proxy::to(cluster.nodes[0].port);
        let url = cluster.url_by(&[proxy.port()], "p");
        let manager = Manager::builder().url(url).ttl(ttl).open_blocking().unwrap();
        // The connection is there, and a lease to enter with.
        manager.acquire("warm").wait().unwrap().release().unwrap();
        until("spare leases", || cluster.leases() >= 2);
        Self { cluster, proxy, manager }
    }

    fn done(self) {
        self.manager.close().unwrap();
        assert_eq!((self.cluster.keys("p/"), self.cluster.leases()), (0, 0), "keys and leases that are left");
        assert!(self.proxy.fired() > 0, "there was no fault");
    }
}

fn an_unanswered_claim_is_found_again(version: &str) {
    let far = Far::new(version, LONG);
    thread::scope(|scope| {
        far.proxy.set(Fault::LoseAnswers);
        let acquiring = scope.spawn(|| far.manager.acquire("n").timeout(LIMIT).wait().unwrap());
        until("it has entered", || far.cluster.keys("p/n/") == 1);
        far.proxy.set(Fault::None);
        far.proxy.cut();
        let lease = acquiring.join().unwrap();
        let text = far.cluster.ctl(&["get", "--prefix", "p/n/", "--write-out=fields"]);
        assert!(text.contains(&format!("\"CreateRevision\" : {}\n", lease.token())), "{lease:?}: {text}");
        assert_eq!(far.cluster.keys("p/n/"), 1, "it entered a second time");
        lease.release().unwrap();
    });
    far.done();
}

/// A manager that reaches the server by two ways, and what of it arrives late.
struct Ghost {
    far: Far,
    /// The other way.
    direct: Proxy,
    manager: Manager,
}

impl Ghost {
    /// It has begun with the first way.
    fn new(version: &str) -> Self {
        let far = Far::new(version, LONG);
        let direct = Proxy::to(far.cluster.nodes[0].port);
        direct.set(Fault::BlackHole);
        let url = far.cluster.url_by(&[far.proxy.port(), direct.port()], "p");
        let manager = Manager::builder().url(url).ttl(LONG).open_blocking().unwrap();
        manager.acquire("warm").timeout(LIMIT).wait().unwrap().release().unwrap();
        Self { far, direct, manager }
    }

    /// Holds up what is sent, and cuts the connection once it was.
    fn hold_up(&self) {
        self.far.proxy.set(Fault::HoldRequests);
    }

    /// Whether it is an attempt to enter that is held up: a ping is of 17 bytes, and a request for a lease of less than 150.
    fn is_sent(&self) -> bool {
        self.far.proxy.fired() > 150
    }

    fn cut_once_sent(&self) {
        until("a request is held up", || self.is_sent());
        self.far.proxy.cut();
    }

    /// What was held up arrives. Its lease is gone, so it is refused.
    fn arrives(self) {
        let label = "grpc_code=\"NotFound\",grpc_method=\"Txn\"";
        let refused = |far: &Far| far.cluster.metric(0, "grpc_server_handled_total", label);
        let before = refused(&self.far);
        self.far.proxy.set(Fault::None);
        until("the late request is refused", || refused(&self.far) > before);
        assert_eq!(self.far.cluster.keys("p/n/"), 0, "a late attempt entered");
        self.manager.close().unwrap();
        self.far.done();
    }
}

/// The first attempt to enter is late, the second one gives the lease: once that is released the first must not come in.
fn a_late_claim_does_not_enter_after_a_release(version: &str) {
    let ghost = Ghost::new(version);
    ghost.hold_up();
    thread::scope(|scope| {
        let acquiring = scope.spawn(|| ghost.manager.acquire("n").timeout(LIMIT).wait().unwrap());
        ghost.direct.set(Fault::None);
        ghost.direct.cut();
        ghost.cut_once_sent();
        let lease = acquiring.join().unwrap();
        lease.release().unwrap();
    });
    assert_eq!(ghost.far.cluster.keys("p/n/"), 0, "it has left");
    ghost.arrives();
}

fn a_late_claim_does_not_enter_after_a_withdrawal(version: &str) {
    let ghost = Ghost::new(version);
    ghost.hold_up();
    thread::scope(|scope| {
        let acquiring = scope.spawn(|| ghost.manager.acquire("n").timeout(Duration::from_secs(1)).wait().unwrap_err());
        ghost.cut_once_sent();
        let error = acquiring.join().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    });
    let revoked = ghost.far.cluster.calls(0, "LeaseRevoke");
    ghost.direct.set(Fault::None);
    ghost.direct.cut();
    until("its lease is revoked", || ghost.far.cluster.calls(0, "LeaseRevoke") > revoked);
    ghost.arrives();
}

/// One copy of the entering is on its way, and the other is refused: then it may still enter, on its lease.
fn a_refused_copy_says_nothing_of_the_other(version: &str) {
    let cluster = Cluster::start(version, 1, &["--quota-backend-bytes=1000000"]);
    let proxies = [Proxy::to(cluster.nodes[0].port), Proxy::to(cluster.nodes[0].port)];
    let url = cluster.url_by(&[proxies[0].port(), proxies[1].port()], "p");
    let env = system().unwrap();
    let store = EtcdStore::open(&url, env.clone()).unwrap();
    let claim = |name, id| Claim {
        name: Name::new(name).unwrap(),
        id: ClaimId(id),
        ttl: LONG,
        owner: "test".into(),
        queues: true,
        follows: None,
    };
    let warm = claim("warm", 1);
    assert!(matches!(block_on(store.claim(env.now(), &warm)).unwrap(), Standing::Head(_)));
    until("spare leases", || cluster.leases() >= 2);
    block_on(store.leave(&warm)).unwrap();
    let (used, other) = if proxies[0].opened() > 0 { (&proxies[0], &proxies[1]) } else { (&proxies[1], &proxies[0]) };
    cluster.raise_no_space();
    let wanted = claim("n", 2);
    used.set(Fault::HoldRequests);
    other.set(Fault::HoldRequests);
    thread::scope(|scope| {
        let entering = scope.spawn(|| block_on(store.claim(env.now(), &wanted)).unwrap_err());
        until("there is a second copy", || used.fired() > 0 && other.fired() > 0);
        used.cut();
        other.set(Fault::None);
        let error = entering.join().unwrap();
        assert!(error.kind() == ErrorKind::Unavailable && error.is_in_doubt(), "{error}");
        assert!(error.to_string().contains("NOSPACE"), "{error}");
    });
    cluster.ctl(&["alarm", "disarm"]);
    // No other claim may use what its lease may come to carry.
    let next = claim("m", 3);
    assert!(matches!(block_on(store.claim(env.now(), &next)).unwrap(), Standing::Head(_)));
    assert_eq!(block_on(store.leave(&wanted)).unwrap(), Departure::Gone);
    let refused = || cluster.metric(0, "grpc_server_handled_total", "grpc_code=\"NotFound\",grpc_method=\"Txn\"");
    let before = refused();
    used.set(Fault::None);
    until("the late copy is refused", || refused() > before);
    assert_eq!((cluster.keys("p/n/"), cluster.keys("p/m/")), (0, 1), "the late copy entered, or took another's along");
    block_on(store.leave(&next)).unwrap();
    block_on(store.close());
}

/// The answer that one claim is gone is not held up, nor are those to others, by what else there is to ask.
fn a_loss_waits_for_nothing_else(version: &str) {
    let far = Far::new(version, LONG);
    let leases: Vec<_> = (0..20).map(|at| far.manager.acquire(format!("n{at}")).wait().unwrap()).collect();
    until("their keys are watched", || far.cluster.metric(0, "etcd_debugging_mvcc_watcher_total", "") == 20);
    let rival = open(&far.cluster.url("p"));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| rival.acquire("n0").timeout(LIMIT).wait().unwrap());
        until("the rival waits", || rival.inspect("n0").unwrap().is_some_and(|record| record.waiting == 1));
        let before = far.cluster.calls(0, "Range") + far.cluster.calls(0, "Txn");
        rival.break_lease("n0", leases[0].token()).unwrap();
        until("the holder knows", || !leases[0].is_held());
        assert_eq!(leases[0].end_reason(), Some(EndReason::Superseded));
        waiting.join().unwrap().release().unwrap();
        // The rival's: two to break, one or two to look, one to release. The holder's: one renewal that tells all.
        let made = far.cluster.calls(0, "Range") + far.cluster.calls(0, "Txn") - before;
        assert!((5..=8).contains(&made), "{made} requests");
    });
    assert!(leases[1..].iter().all(|lease| lease.is_held()));
    far.proxy.set(Fault::Delay(Duration::from_millis(1)));
    drop(leases);
    rival.close().unwrap();
    far.done();
}

/// The line of one would be all the lines of the other.
fn prefixes_within_one_another_do_not_mix(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let (outer, inner) = (open(&cluster.url("p")), open(&cluster.url("p/q")));
    let held = inner.acquire("n").wait().unwrap();
    let error = outer.acquire("q").timeout(LIMIT).wait().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    assert_eq!(outer.list("").unwrap_err().kind(), ErrorKind::Incompatible);
    outer.acquire("other").wait().unwrap().release().unwrap();
    held.confirm().unwrap();
    held.release().unwrap();
    outer.close().unwrap();
    inner.close().unwrap();
    assert_eq!((cluster.keys("p/"), cluster.leases()), (0, 0), "keys and leases that are left");
}

fn a_manager_that_is_dropped_while_etcd_is_frozen_ends(version: &str) {
    let far = Far::new(version, Duration::from_secs(2));
    let Far { cluster, proxy, manager } = far;
    let lease = manager.acquire("n").wait().unwrap();
    assert!(proxy.open() > 0);
    cluster.freeze(0);
    assert!(cluster.is_frozen(0));
    drop(lease);
    drop(manager);
    until("its connections are closed", || proxy.open() == 0);
    cluster.thaw(0);
}

fn unanswered_renewals_are_no_loss(version: &str) {
    let far = Far::new(version, LONG);
    let lease = far.manager.acquire("n").wait().unwrap();
    let applied = || {
        let label = "grpc_code=\"OK\",grpc_method=\"Txn\"";
        far.cluster.metric(0, "grpc_server_handled_total", label)
    };
    for _ in 0..5 {
        // Now there is a lease for the next renewal, so that it is one request.
        lease.confirm().unwrap();
        let before = applied();
        far.proxy.set(Fault::LoseAnswers);
        thread::scope(|scope| {
            let renewing = scope.spawn(|| lease.confirm());
            until("a renewal is applied", || applied() > before);
            far.proxy.set(Fault::None);
            far.proxy.cut();
            // Its answer never came. What is found there the next time is our own.
            // Unless it was sent again in time.
            if let Err(error) = renewing.join().unwrap() {
                assert!(error.kind() == ErrorKind::Unavailable && error.is_in_doubt(), "{error}");
            }
        });
        lease.confirm().unwrap();
    }
    lease.confirm().unwrap();
    lease.release().unwrap();
    far.done();
}

fn an_eviction_is_noticed_at_once(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let manager = open(&cluster.url("p"));
    for way in 0..3 {
        let lease = manager.acquire("n").wait().unwrap();
        if way > 0 {
            until("its own key is watched", || cluster.metric(0, "etcd_debugging_mvcc_watcher_total", "") == 1);
        }
        let text = cluster.ctl(&["get", "--prefix", "p/n/", "--write-out=fields"]);
        let id: u64 = text.lines().find_map(|line| line.strip_prefix("\"Lease\" : ")).unwrap().parse().unwrap();
        match way {
            // Before there can be a watch: the look after it has begun finds out.
            0 | 1 => drop(cluster.ctl(&["del", "--prefix", "p/n/"])),
            _ => drop(cluster.ctl(&["lease", "revoke", &format!("{id:x}")])),
        }
        let evicted = Instant::now();
        until("the holder knows", || !lease.is_held());
        // The next renewal is due 20 s after the acquire.
        assert!(evicted.elapsed() < Duration::from_secs(5), "noticed after {:?}", evicted.elapsed());
        assert_eq!(lease.end_reason(), Some(EndReason::Gone));
        until("the watch is gone", || cluster.metric(0, "etcd_debugging_mvcc_watcher_total", "") == 0);
    }
    manager.close().unwrap();
}

/// There are servers that never expire a lease: here the key has none.
fn a_key_that_the_server_never_expires_is_taken_away(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    cluster.ctl(&["put", "p/n/0123456789abcdef0123456789abcdef", "1 3000 0 a ghost"]);
    let manager = open(&cluster.url("p"));
    let began = Instant::now();
    let lease = manager.acquire("n").timeout(LIMIT).wait().unwrap();
    let waited = began.elapsed();
    assert!(waited >= Duration::from_secs(3), "passed over after {waited:?}, before its ttl");
    assert_eq!(cluster.keys("p/n/"), 1, "the ghost is still there");
    lease.release().unwrap();
    manager.close().unwrap();
}

fn what_another_program_keeps_is_not_touched(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let manager = open(&cluster.url("p"));
    for (key, value) in [("p/n/config", "x"), ("p/n/0123456789abcdef0123456789abcdef", "{\"json\": 1}")] {
        cluster.ctl(&["put", key, value]);
        let error = manager.acquire("n").timeout(LIMIT).wait().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
        assert!(error.to_string().contains(key), "{error}");
        assert_eq!(manager.inspect("n").unwrap_err().kind(), ErrorKind::Incompatible);
        until("only the foreign key is left", || cluster.keys("p/n/") == 1);
        assert_eq!(cluster.ctl(&["get", key, "--print-value-only"]).trim(), value);
        cluster.ctl(&["del", key]);
    }
    manager.acquire("n").timeout(LIMIT).wait().unwrap().release().unwrap();
    manager.close().unwrap();
}

fn what_another_program_writes_to_our_key(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let manager = Manager::builder().url(cluster.url("p")).ttl(Duration::from_secs(3)).open_blocking().unwrap();
    let lease = manager.acquire("n").wait().unwrap();
    let keys = cluster.ctl(&["get", "--prefix", "--keys-only", "p/n/"]);
    let key = keys.trim();
    cluster.ctl(&["put", key, "mine now"]);
    until("the holder knows", || !lease.is_held());
    assert_eq!(lease.end_reason(), Some(EndReason::Gone));
    assert_eq!(lease.release().unwrap_err().kind(), ErrorKind::Lost);
    manager.close().unwrap();
    assert_eq!(cluster.ctl(&["get", key, "--print-value-only"]).trim(), "mine now");
}

fn another_cluster_at_the_same_place(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let mut other = Cluster::start(version, 1, &["--initial-cluster-token=another"]);
    let ports = [cluster.nodes[0].port, other.nodes[0].port];
    let manager = Manager::builder().url(cluster.url_by(&ports[..1], "p")).ttl(LONG).open_blocking().unwrap();
    manager.ping().unwrap();
    drop(manager);
    // A URL that names servers of two clusters, of which one is down at first.
    other.kill(0);
    let manager =
        Manager::builder().url(cluster.url_by(&ports, "p")).ttl(Duration::from_secs(6)).open_blocking().unwrap();
    let lease = manager.acquire("n").timeout(LIMIT).wait().unwrap();
    other.revive(0);
    other.wait_until_healthy();
    drop(cluster);
    until("the holder knows", || !lease.is_held());
    assert_eq!(lease.end_reason(), Some(EndReason::Gone));
    let error = manager.acquire("n").timeout(LIMIT).wait().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    assert_eq!(other.keys("p/"), 0, "it wrote to the other one");
}

fn an_answer_from_the_past(version: &str) {
    let mut cluster = Cluster::start(version, 1, &[]);
    let manager = Manager::builder().url(cluster.url("p")).ttl(Duration::from_secs(6)).open_blocking().unwrap();
    for _ in 0..50 {
        manager.acquire("n").wait().unwrap().release().unwrap();
    }
    let lease = manager.acquire("n").wait().unwrap();
    cluster.kill(0);
    cluster.forget(0);
    cluster.revive(0);
    cluster.wait_until_healthy();
    until("the holder knows", || !lease.is_held());
    assert_eq!(lease.end_reason(), Some(EndReason::Gone));
    let error = manager.inspect("n").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    assert!(error.to_string().contains("from the past"), "{error}");
}

fn nothing_is_left_when_a_manager_is_closed(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let manager = open(&cluster.url("p"));
    let rival = open(&cluster.url("p"));
    let held = rival.acquire("n").wait().unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| manager.acquire("n").wait().unwrap_err().kind());
        let _held: Vec<_> = (0..20).map(|at| manager.acquire(format!("m{at}")).wait().unwrap()).collect();
        let timed_out = rival.acquire("m3").timeout(Duration::from_millis(50)).wait().unwrap_err();
        assert_eq!(timed_out.kind(), ErrorKind::Timeout);
        assert!(rival.try_acquire("m3").unwrap().is_none());
        until("all are there", || cluster.keys("p/") == 22);
        manager.close().unwrap();
        assert_eq!(waiting.join().unwrap(), ErrorKind::Closed);
    });
    assert_eq!(cluster.keys("p/"), 1, "the rival's");
    held.release().unwrap();
    rival.close().unwrap();
    assert_eq!((cluster.keys("p/"), cluster.leases()), (0, 0), "keys and leases that are left");
    for (metric, what) in
        [("etcd_debugging_mvcc_watcher_total", "watches"), ("etcd_debugging_mvcc_watch_stream_total", "streams")]
    {
        until(what, || cluster.metric(0, metric, "") == 0);
    }
}

fn a_full_database_says_so_and_lets_go(version: &str) {
    let cluster = Cluster::start(version, 1, &["--quota-backend-bytes=1000000"]);
    let manager = open(&cluster.url("p"));
    let held = manager.acquire("n").wait().unwrap();
    cluster.raise_no_space();
    let error = manager.acquire("m").timeout(Duration::from_secs(1)).wait().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("NOSPACE"), "{error}");
    let error = manager.ping().unwrap_err();
    assert!(error.to_string().contains("NOSPACE") && error.to_string().contains("auto-compaction"), "{error}");
    held.release().unwrap();
    assert_eq!(cluster.keys("p/"), 0, "a release frees the name even then");
    manager.close().unwrap();
}

fn compaction_and_defragmentation_disturb_no_waiter(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let (holder, waiter) = (open(&cluster.url("p")), open(&cluster.url("p")));
    let held = holder.acquire("n").wait().unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| waiter.acquire("n").timeout(LIMIT).wait().unwrap());
        until("it watches", || cluster.metric(0, "etcd_debugging_mvcc_watcher_total", "") == 3);
        for round in 0..5 {
            cluster.ctl(&["put", "other", &round.to_string()]);
            let text = cluster.ctl(&["get", "other", "--write-out=fields"]);
            let revision = text.lines().find_map(|line| line.strip_prefix("\"Revision\" : ")).unwrap();
            cluster.ctl(&["compact", revision]);
            cluster.ctl(&["defrag"]);
        }
        assert!(held.is_held() && !waiting.is_finished());
        held.release().unwrap();
        waiting.join().unwrap().release().unwrap();
    });
    for manager in [holder, waiter] {
        manager.close().unwrap();
    }
    assert_eq!((cluster.keys("p/"), cluster.leases()), (0, 0), "keys and leases that are left");
}

fn claim(name: &str, id: u128, ttl: Duration) -> Claim {
    Claim { name: Name::new(name).unwrap(), id: ClaimId(id), ttl, owner: "test".into(), queues: true, follows: None }
}

fn place(claim: &Claim, token: Token) -> Place {
    Place { claim: claim.clone(), token }
}

/// A predecessor that was written while the look was on its way was not silent before: it would be passed over too early.
fn silence_counts_from_the_answer(version: &str) {
    const ON_ITS_WAY: Duration = Duration::from_millis(500);
    const TTL: Duration = Duration::from_secs(6);
    let cluster = Cluster::start(version, 1, &[]);
    let proxy = Proxy::to(cluster.nodes[0].port);
    let env = system().unwrap();
    let holder = EtcdStore::open(&cluster.url("p"), env.clone()).unwrap();
    let waiter = EtcdStore::open(&cluster.url_by(&[proxy.port()], "p"), env.clone()).unwrap();
    let (first, second) = (claim("n", 1, TTL), claim("n", 2, TTL));
    let Standing::Head(held) = block_on(holder.claim(env.now(), &first)).unwrap() else {
        panic!("nobody else is there")
    };
    let Standing::Behind(token, _) = block_on(waiter.claim(env.now(), &second)).unwrap() else {
        panic!("it has to wait")
    };
    // What was known of it is old.
    let renewed = block_on(holder.renew(env.now(), &[place(&first, held)]));
    assert!(matches!(renewed[..], [Ok(Renewal::Renewed { .. })]), "{renewed:?}");
    proxy.set(Fault::Delay(ON_ITS_WAY));
    let sent = env.now();
    let standing = block_on(waiter.look(&place(&second, token))).unwrap();
    let Standing::Behind(_, ahead) = standing else { panic!("it has to wait: {standing:?}") };
    assert!(proxy.fired() > 0);
    let least = sent + ON_ITS_WAY * 2 + TTL;
    assert!(ahead.look_at >= least, "to be taken away {:?} early", least.since(ahead.look_at));
    proxy.set(Fault::None);
    block_on(waiter.leave(&second)).unwrap();
    block_on(holder.leave(&first)).unwrap();
    block_on(waiter.close());
    block_on(holder.close());
}

/// A server that is cut off from the others hears of nothing, and a watch there would be deaf.
fn a_server_without_a_leader_ends_its_watches(version: &str) {
    let mut cluster = Cluster::start(version, 3, &[]);
    let url = cluster.url_by(&[cluster.nodes[0].port], "p");
    let manager = Manager::builder().url(url).ttl(LONG * 10).open_blocking().unwrap();
    let lease = manager.acquire("n").timeout(LIMIT).wait().unwrap();
    let watches = |cluster: &Cluster| cluster.metric(0, "etcd_debugging_mvcc_watcher_total", "");
    until("its own key is watched", || watches(&cluster) == 1);
    for at in [1, 2] {
        cluster.kill(at);
    }
    until("the watch has ended", || watches(&cluster) == 0);
    for at in [1, 2] {
        cluster.revive(at);
    }
    until("its own key is watched again", || watches(&cluster) == 1);
    assert!(lease.is_held());
    lease.release().unwrap();
    manager.close().unwrap();
}

/// With a connection its watches end: who does not watch anew waits for a timer.
fn what_was_watched_is_watched_anew(version: &str) {
    let far = Far::new(version, LONG * 10);
    let rival = Manager::builder().url(far.cluster.url("p")).ttl(LONG * 10).open_blocking().unwrap();
    let (held, waited_for) = (far.manager.acquire("n").wait().unwrap(), rival.acquire("m").wait().unwrap());
    thread::scope(|scope| {
        let waiting = scope.spawn(|| far.manager.acquire("m").timeout(LIMIT).wait().unwrap());
        let watches = || far.cluster.metric(0, "etcd_debugging_mvcc_watcher_total", "");
        until("two keys are watched by who holds them, and one twice by who waits", || watches() == 4);
        let streams = far.cluster.calls(0, "Watch");
        far.proxy.set(Fault::Delay(Duration::from_millis(1)));
        far.proxy.cut();
        until("there is another stream", || far.cluster.calls(0, "Watch") > streams && watches() == 4);
        waited_for.release().unwrap();
        waiting.join().unwrap().release().unwrap();
    });
    far.cluster.ctl(&["del", "--prefix", "p/n/"]);
    until("the holder knows", || !held.is_held());
    assert_eq!(held.release().unwrap_err().kind(), ErrorKind::Lost);
    rival.close().unwrap();
    far.done();
}

/// Auth is enabled while there are managers, and then the server forgets its tokens: those of this kind are kept in memory.
fn a_token_that_is_not_valid_any_more_is_replaced(version: &str) {
    let mut cluster = Cluster::start(version, 1, &[]);
    let url = cluster.url("p").replacen("//", "//root:secret@", 1);
    let manager = Manager::builder().url(url).ttl(LONG * 10).open_blocking().unwrap();
    manager.acquire("n").wait().unwrap().release().unwrap();
    cluster.ctl(&["user", "add", "root:secret"]);
    cluster.ctl(&["auth", "enable"]);
    let lease = manager.acquire("n").timeout(LIMIT).wait().unwrap();
    let watches = |cluster: &Cluster| cluster.metric(0, "etcd_debugging_mvcc_watcher_total", "");
    until("its own key is watched", || watches(&cluster) == 1);
    let asked = cluster.calls(0, "Authenticate");
    assert!(asked > 0);
    cluster.kill(0);
    cluster.revive(0);
    until("the server is back", || cluster.try_ctl(&["--user=root:secret", "get", "x"]).is_ok());
    // The next renewal is due in some minutes: so the stream finds out itself.
    until("its own key is watched again", || watches(&cluster) == 1);
    lease.confirm().unwrap();
    lease.release().unwrap();
    manager.close().unwrap();
}

/// A server whose clock jumped, or that is slow with what it applies, does not know leases that it has granted.
fn leases_that_the_server_does_not_know_are_replaced(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    // The lease for renewals may be named for half a minute.
    let manager = Manager::builder().url(cluster.url("p")).ttl(LONG * 10).open_blocking().unwrap();
    let lease = manager.acquire("n").wait().unwrap();
    lease.confirm().unwrap();
    lease.release().unwrap();
    until("one lease for renewals, and one to enter with", || cluster.leases() >= 2);
    for id in cluster.ctl(&["lease", "list"]).lines().skip(1) {
        cluster.ctl(&["lease", "revoke", id]);
    }
    let unknown = || cluster.metric(0, "grpc_server_handled_total", "grpc_code=\"NotFound\",grpc_method=\"Txn\"");
    let lease = manager.acquire("n").timeout(LIMIT).wait().unwrap();
    let of_entering = unknown();
    assert!(of_entering > 0, "no lease to enter with was missing");
    lease.confirm().unwrap();
    assert!(unknown() > of_entering, "the lease for renewals was not missing");
    lease.release().unwrap();
    manager.close().unwrap();
    assert_eq!((cluster.keys("p/"), cluster.leases()), (0, 0), "keys and leases that are left");
}

fn a_list_of_several_pages_is_whole(version: &str) {
    const NAMES: usize = 2_100;
    let cluster = Cluster::start(version, 1, &[]);
    let all: Vec<usize> = (0..NAMES).collect();
    for some in all.chunks(100) {
        let mut puts = String::new();
        for at in some {
            writeln!(puts, "put p/n{at:04}/{at:032x} \"1 60000 0 somebody\"").unwrap();
        }
        cluster.ctl_with(&[cluster.nodes[0].port], &["txn"], &format!("\n{puts}\n\n")).unwrap();
    }
    let manager = open(&cluster.url("p"));
    let names: Vec<String> = manager.list("").unwrap().iter().map(|record| record.name.to_string()).collect();
    let put: Vec<String> = all.iter().map(|at| format!("n{at:04}")).collect();
    assert_eq!(names, put);
    manager.close().unwrap();
}

/// Two copies of the entering are sent, and one is answered. Before the claim has left, the other is made harmless.
fn a_late_copy_is_made_harmless(version: &str) {
    let ghost = Ghost::new(version);
    let (far, direct) = (&ghost.far, &ghost.direct);
    let blocked = direct.fired();
    ghost.hold_up();
    direct.set(Fault::HoldRequests);
    direct.cut();
    thread::scope(|scope| {
        let acquiring = scope.spawn(|| ghost.manager.acquire("n").timeout(LIMIT).wait().unwrap());
        until("it goes the other way too", || ghost.is_sent() && direct.fired() > blocked);
        far.proxy.cut();
        direct.set(Fault::None);
        let lease = acquiring.join().unwrap();
        // Its key moves, and from what it entered with nothing is to be seen of it any more.
        lease.confirm().unwrap();
        ghost.manager.ping().unwrap();
        let revoked = far.cluster.calls(0, "LeaseRevoke");
        direct.set(Fault::LoseAnswers);
        let releasing = scope.spawn(|| lease.release());
        until("its lease is revoked first", || far.cluster.calls(0, "LeaseRevoke") > revoked);
        direct.set(Fault::None);
        direct.cut();
        releasing.join().unwrap().unwrap();
    });
    assert_eq!(far.cluster.keys("p/n/"), 0, "it has left");
    ghost.arrives();
}

/// Leaving deletes the claim and nothing else, and says so when it was gone.
fn what_is_left_is_left_for_others(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let env = system().unwrap();
    let store = EtcdStore::open(&cluster.url("p"), env.clone()).unwrap();
    let (overwritten, evicted) = (claim("n", 1, LONG), claim("m", 2, LONG));
    for claim in [&overwritten, &evicted] {
        assert!(matches!(block_on(store.claim(env.now(), claim)).unwrap(), Standing::Head(_)));
    }
    let key = format!("p/n/{:032x}", 1);
    assert_eq!(cluster.keys(&key), 1);
    cluster.ctl(&["put", &key, "mine now"]);
    let error = block_on(store.leave(&overwritten)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    assert_eq!(cluster.ctl(&["get", &key, "--print-value-only"]).trim(), "mine now");
    cluster.ctl(&["del", "--prefix", "p/m/"]);
    assert_eq!(block_on(store.leave(&evicted)).unwrap(), Departure::Gone);
    block_on(store.close());
}

/// What is found there is an own renewal, and no proof of when it was applied: so it is no yes to the one that finds it.
fn an_unanswered_renewal_is_sent_again(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let proxy = Proxy::to(cluster.nodes[0].port);
    let env = system().unwrap();
    let store = EtcdStore::open(&cluster.url_by(&[proxy.port()], "p"), env.clone()).unwrap();
    let claim = claim("n", 1, LONG);
    let Standing::Head(token) = block_on(store.claim(env.now(), &claim)).unwrap() else {
        panic!("nobody else is there")
    };
    let places = [place(&claim, token)];
    let renew = || block_on(store.renew(env.now(), &places)).pop().unwrap();
    let written = || {
        let text = cluster.ctl(&["get", "--prefix", "p/n/", "--write-out=fields"]);
        text.lines().find_map(|line| line.strip_prefix("\"ModRevision\" : ")).unwrap().parse::<i64>().unwrap()
    };
    // From here on there is a lease for renewals.
    until("a spare lease", || cluster.leases() == 2);
    let granted = cluster.calls(0, "LeaseGrant");
    for _ in 0..2 {
        assert!(matches!(renew().unwrap(), Renewal::Renewed { .. }));
    }
    assert_eq!(cluster.calls(0, "LeaseGrant"), granted + 1, "renewals share a lease");
    let before = written();
    proxy.set(Fault::LoseAnswers);
    thread::scope(|scope| {
        let renewing = scope.spawn(renew);
        until("it is applied", || written() > before);
        proxy.cut();
        proxy.set(Fault::None);
        assert!(renewing.join().unwrap().unwrap_err().is_in_doubt());
    });
    // A connection that was made meanwhile has lost bytes.
    proxy.cut();
    let applied = written();
    until("it can be renewed again", || matches!(renew(), Ok(Renewal::Renewed { .. })));
    assert!(written() > applied, "taken for renewed by what was written before");
    block_on(store.leave(&claim)).unwrap();
    block_on(store.close());
}

/// Counted from the answer it would be named when it does not last for a ttl any more.
fn an_etcd_lease_is_as_old_as_its_request(version: &str) {
    // 7 s are granted for renewals, so it may be named for 1 s. One renewal with its grant takes longer, of which the half is
    // after the answer to the grant.
    const TTL: Duration = Duration::from_secs(6);
    const ON_ITS_WAY: Duration = Duration::from_millis(300);
    let cluster = Cluster::start(version, 1, &[]);
    let proxy = Proxy::to(cluster.nodes[0].port);
    let env = system().unwrap();
    let store = EtcdStore::open(&cluster.url_by(&[proxy.port()], "p"), env.clone()).unwrap();
    let claim = claim("n", 1, TTL);
    let Standing::Head(token) = block_on(store.claim(env.now(), &claim)).unwrap() else {
        panic!("nobody else is there")
    };
    until("a spare lease", || cluster.leases() == 2);
    proxy.set(Fault::Delay(ON_ITS_WAY));
    for _ in 0..2 {
        let granted = cluster.calls(0, "LeaseGrant");
        let renewed = block_on(store.renew(env.now(), &[place(&claim, token)]));
        assert!(matches!(renewed[..], [Ok(Renewal::Renewed { .. })]), "{renewed:?}");
        assert_eq!(cluster.calls(0, "LeaseGrant"), granted + 1, "a lease that is too old was named");
    }
    assert!(proxy.fired() > 0);
    proxy.set(Fault::None);
    block_on(store.leave(&claim)).unwrap();
    block_on(store.close());
}

fn an_unanswered_claim_whose_etcd_lease_is_gone(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let proxy = Proxy::to(cluster.nodes[0].port);
    let env = system().unwrap();
    let store = EtcdStore::open(&cluster.url_by(&[proxy.port()], "p"), env.clone()).unwrap();
    let (warm, wanted) = (claim("warm", 1, LONG), claim("n", 2, LONG));
    assert!(matches!(block_on(store.claim(env.now(), &warm)).unwrap(), Standing::Head(_)));
    until("a spare lease", || cluster.leases() == 2);
    proxy.set(Fault::LoseRequests);
    let error = thread::scope(|scope| {
        let entering = scope.spawn(|| block_on(store.claim(env.now(), &wanted)).unwrap_err());
        until("it was sent", || proxy.fired() > 0);
        // What has lost bytes is no connection any more.
        proxy.set(Fault::None);
        proxy.cut();
        entering.join().unwrap()
    });
    assert!(error.is_in_doubt(), "{error}");
    for id in cluster.ctl(&["lease", "list"]).lines().skip(1) {
        cluster.ctl(&["lease", "revoke", id]);
    }
    let standing = block_on(store.claim(env.now(), &wanted)).unwrap();
    assert!(matches!(standing, Standing::Head(_)), "{standing:?}");
    assert_eq!(block_on(store.leave(&wanted)).unwrap(), Departure::Left);
    block_on(store.close());
}

/// Who is evicted does not leave. What he sent to enter must not come in later all the same.
fn a_late_claim_does_not_enter_after_a_loss(version: &str) {
    let ghost = Ghost::new(version);
    ghost.hold_up();
    thread::scope(|scope| {
        let acquiring = scope.spawn(|| ghost.manager.acquire("n").timeout(LIMIT).wait().unwrap());
        ghost.direct.set(Fault::None);
        ghost.direct.cut();
        ghost.cut_once_sent();
        let lease = acquiring.join().unwrap();
        ghost.far.cluster.ctl(&["del", "--prefix", "p/n/"]);
        assert_eq!(lease.confirm().unwrap_err().kind(), ErrorKind::Lost);
        // Others enter with what is at hand.
        let others: Vec<_> = (0..3).map(|at| ghost.manager.acquire(format!("m{at}")).wait().unwrap()).collect();
        drop(others);
    });
    ghost.arrives();
}

/// A watch sees nothing of what was before it, so the key is read once when it has begun.
fn an_eviction_before_there_is_a_watch(version: &str) {
    let far = Far::new(version, LONG * 10);
    let watches = || far.cluster.metric(0, "etcd_debugging_mvcc_watcher_total", "");
    let lease = loop {
        let lease = far.manager.acquire("n").wait().unwrap();
        far.proxy.set(Fault::HoldRequests);
        until("its watch is held up, or was there before", || far.proxy.fired() > 0 || watches() > 0);
        if watches() == 0 {
            break lease;
        }
        far.proxy.set(Fault::None);
        lease.release().unwrap();
        until("the watch is gone", || watches() == 0);
    };
    far.cluster.ctl(&["del", "--prefix", "p/n/"]);
    far.proxy.set(Fault::None);
    // The next renewal is due in some minutes.
    until("the holder knows", || !lease.is_held());
    assert_eq!(lease.end_reason(), Some(EndReason::Gone));
    drop(lease);
    far.done();
}

/// A predecessor that is written after it was looked at, and before it is taken away, stays.
fn a_sign_of_life_in_the_last_moment_counts(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let proxy = Proxy::to(cluster.nodes[0].port);
    let write = || cluster.ctl(&["put", "p/n/0123456789abcdef0123456789abcdef", "1 2000 0 a ghost"]);
    write();
    let env = system().unwrap();
    let store = EtcdStore::open(&cluster.url_by(&[proxy.port()], "p"), env.clone()).unwrap();
    let claim = claim("n", 1, LONG);
    let Standing::Behind(token, ahead) = block_on(store.claim(env.now(), &claim)).unwrap() else {
        panic!("a ghost is there")
    };
    let place = place(&claim, token);
    block_on(store.turn(&place, &ahead)).unwrap();
    assert!(env.now() >= ahead.look_at);
    proxy.set(Fault::Delay(Duration::from_millis(500)));
    let (ranges, txns) = (cluster.calls(0, "Range"), cluster.calls(0, "Txn"));
    let standing = thread::scope(|scope| {
        let looking = scope.spawn(|| block_on(store.look(&place)).unwrap());
        until("it has looked", || cluster.calls(0, "Range") > ranges);
        proxy.set(Fault::HoldRequests);
        write();
        assert_eq!(cluster.calls(0, "Txn"), txns, "it was written too late");
        proxy.set(Fault::None);
        looking.join().unwrap()
    });
    assert!(cluster.calls(0, "Txn") > txns, "it did not try to take it away");
    assert!(matches!(standing, Standing::Behind(..)), "{standing:?}");
    assert_eq!(cluster.keys("p/n/"), 2);
    proxy.set(Fault::None);
    block_on(store.leave(&claim)).unwrap();
    block_on(store.close());
}

/// A put that is too large for it is refused while there is room for others. In one without any room some servers refuse every
/// transaction, also one that only deletes.
fn a_database_that_is_full_to_the_last(version: &str) {
    // Pages are of 4,096 bytes. So what fits into one is refused only when there is none left.
    let cluster = Cluster::start(version, 1, &["--quota-backend-bytes=1003520"]);
    let manager = open(&cluster.url("p"));
    let held = manager.acquire("n").wait().unwrap();
    let mut pieces = 0;
    until("it is full", || {
        pieces += 1;
        let is_far = cluster.metric(0, "etcd_mvcc_db_total_size_in_bytes", "") < 800_000;
        let piece = "x".repeat(if is_far { 50_000 } else { 3_000 });
        cluster.ctl_with(&[cluster.nodes[0].port], &["put", &format!("fill{pieces}")], &piece).is_err()
    });
    held.release().unwrap();
    assert_eq!(cluster.keys("p/"), 0, "a release frees the name even then");
    if version != "3.4" {
        let label = "grpc_code=\"ResourceExhausted\",grpc_method=\"Txn\"";
        assert!(cluster.metric(0, "grpc_server_handled_total", label) > 0, "it took a transaction");
    }
    manager.close().unwrap();
}

fn a_change_before_there_is_a_watch(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let proxy = Proxy::to(cluster.nodes[0].port);
    let env = system().unwrap();
    let watcher = EtcdStore::open(&cluster.url_by(&[proxy.port()], "p"), env.clone()).unwrap();
    cluster.ctl(&["put", "p/n/0123456789abcdef0123456789abcdef", "1 60000 0 a ghost"]);
    let name = Name::new("n").unwrap();
    let token = block_on(watcher.inspect(&name)).unwrap().unwrap().token;
    proxy.set(Fault::Delay(Duration::from_millis(500)));
    let ranges = cluster.calls(0, "Range");
    thread::scope(|scope| {
        let changed = scope.spawn(|| {
            let late = async {
                env.sleep_until(env.now() + LIMIT).await;
                panic!("it is not told");
            };
            block_on(or(watcher.changed(&name, Some(token)), late))
        });
        until("it has looked", || cluster.calls(0, "Range") > ranges);
        proxy.set(Fault::HoldRequests);
        cluster.ctl(&["del", "--prefix", "p/n/"]);
        assert_eq!(cluster.calls(0, "Watch"), 0, "there was a watch before");
        proxy.set(Fault::None);
        changed.join().unwrap().unwrap();
    });
    assert!(proxy.fired() > 0);
    block_on(watcher.close());
}

/// etcd refuses a whole transaction that has one operation too many.
fn renewals_fill_a_transaction(version: &str) {
    const HELD: u128 = 200;
    let cluster = Cluster::start(version, 1, &[]);
    let env = system().unwrap();
    let store = EtcdStore::open(&cluster.url("p"), env.clone()).unwrap();
    let claims: Vec<Claim> = (1..=HELD).map(|at| claim(&format!("n{at}"), at, LONG)).collect();
    let enter = |claim| match block_on(store.claim(env.now(), claim)).unwrap() {
        Standing::Head(token) => place(claim, token),
        other => panic!("nobody else is there: {other:?}"),
    };
    let places: Vec<Place> = claims.iter().map(enter).collect();
    let transactions = cluster.calls(0, "Txn");
    for renewed in block_on(store.renew(env.now(), &places)) {
        assert!(matches!(renewed, Ok(Renewal::Renewed { .. })), "{renewed:?}");
    }
    assert_eq!(cluster.calls(0, "Txn"), transactions + 2);
    block_on(store.close());
}

/// The server answers, and too slowly to be used: what was asked of it for long is asked of another.
fn what_lasts_moves_with_the_connection(version: &str) {
    let cluster = Cluster::start(version, 1, &[]);
    let proxies = [Proxy::to(cluster.nodes[0].port), Proxy::to(cluster.nodes[0].port)];
    let url = cluster.url_by(&[proxies[0].port(), proxies[1].port()], "p");
    let manager = Manager::builder().url(url).ttl(LONG * 10).open_blocking().unwrap();
    let lease = manager.acquire("n").wait().unwrap();
    let watches = || cluster.metric(0, "etcd_debugging_mvcc_watcher_total", "");
    until("its own key is watched", || watches() == 1);
    let (used, other) = if proxies[0].open() > 0 { (&proxies[0], &proxies[1]) } else { (&proxies[1], &proxies[0]) };
    assert_eq!(other.open(), 0);
    used.set(Fault::Delay(Duration::from_millis(700)));
    lease.confirm().unwrap();
    until("nothing goes by the slow one", || used.open() == 0);
    until("its own key is watched by the other", || other.open() == 1 && watches() == 1);
    assert!(used.fired() > 0);
    lease.release().unwrap();
    manager.close().unwrap();
}

/// Who has no time left to wait for it must not leave an open store behind.
fn a_store_whose_closing_is_given_up(version: &str) {
    let far = Far::new(version, LONG);
    let store = EtcdStore::open(&far.cluster.url_by(&[far.proxy.port()], "p"), system().unwrap()).unwrap();
    let (env, claim) = (system().unwrap(), claim("n", 1, LONG));
    let leases = far.cluster.leases();
    assert!(matches!(block_on(store.claim(env.now(), &claim)).unwrap(), Standing::Head(_)));
    until("a spare lease", || far.cluster.leases() == leases + 2);
    block_on(store.leave(&claim)).unwrap();
    // Now nothing that has to be revoked is.
    far.proxy.set(Fault::BlackHole);
    let closing = block_on(poll_once(store.close()));
    assert!(closing.is_none(), "there was nothing to wait for");
    assert_eq!(block_on(store.ping()).unwrap_err().kind(), ErrorKind::Closed);
    let Far { proxy, manager, cluster } = far;
    proxy.set(Fault::None);
    proxy.cut();
    drop((manager, cluster));
}

/// Renewals share a lease, and the claims on it do not get a new one at the same time.
fn a_lease_that_others_hang_on_stays(version: &str) {
    // 7 s are granted, so for 1 s it may be named.
    const TTL: Duration = Duration::from_secs(6);
    let cluster = Cluster::start(version, 1, &[]);
    let env = system().unwrap();
    let store = EtcdStore::open(&cluster.url("p"), env.clone()).unwrap();
    let enter = |claim| match block_on(store.claim(env.now(), claim)).unwrap() {
        Standing::Head(token) => place(claim, token),
        other => panic!("nobody else is there: {other:?}"),
    };
    let claims = [claim("n", 1, TTL), claim("m", 2, TTL)];
    let places: Vec<Place> = claims.iter().map(enter).collect();
    let renew = |places: &[Place]| {
        for renewed in block_on(store.renew(env.now(), places)) {
            assert!(matches!(renewed, Ok(Renewal::Renewed { .. })), "{renewed:?}");
        }
    };
    renew(&places);
    until("a spare lease", || cluster.leases() >= 2);
    let lease_of = |name: &str| {
        let text = cluster.ctl(&["get", "--prefix", &format!("p/{name}/"), "--write-out=fields"]);
        text.lines().find_map(|line| line.strip_prefix("\"Lease\" : ")).map(str::to_owned)
    };
    let shared = lease_of("m");
    until("there is another lease", || {
        renew(&places[..1]);
        lease_of("n") != shared
    });
    block_on(store.ping()).unwrap();
    assert_eq!(lease_of("m"), shared);
    renew(&places[1..]);
    block_on(store.close());
}
