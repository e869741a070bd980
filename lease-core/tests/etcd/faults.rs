//! What machines and networks do to three servers and those who use them. While it happens contenders go round, and a lease is
//! held; after it nothing is left.
//!
//! Whatever happens: never two hold, tokens come in order, nobody waits for ever, no lease is lost while it could be renewed,
//! and one that could not is lost at half its ttl. Each fault is shown to have happened.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use lease_core::blocking::{Lease, Manager};
use lease_core::clock::Moment;
use lease_core::{EndReason, ErrorKind};

use crate::rules::{LIMIT, Rule, until};
use crate::support::etcd::Cluster;
use crate::support::proxy::{Fault, Proxy};

const MANAGERS: usize = 3;
const CONTENDERS: usize = 9;
/// A sixth of it is what an outage may last: longer than an election.
const TTL: Duration = Duration::from_secs(30);

pub(crate) const FAULTS: &[Rule] = &[
    ("frozen_servers", frozen_servers),
    ("killed_leaders", killed_leaders),
    ("leaders_that_change", leaders_that_change),
    ("a_power_failure_of_all", a_power_failure_of_all),
    ("all_frozen", all_frozen),
    ("a_partition", a_partition),
    ("a_slow_network", a_slow_network),
    ("lost_answers_and_lost_requests", lost_answers_and_lost_requests),
    ("connections_that_are_cut", connections_that_are_cut),
];

/// Of these tests two at a time: more servers than that starve each other, and elect leaders all the time.
pub(crate) fn in_turn(test: impl FnOnce()) {
    static FREE: (Mutex<u32>, Condvar) = (Mutex::new(2), Condvar::new());
    struct Turn;
    impl Drop for Turn {
        fn drop(&mut self) {
            *FREE.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) += 1;
            FREE.1.notify_one();
        }
    }
    let free = FREE.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut free = FREE.1.wait_while(free, |free| *free == 0).unwrap_or_else(std::sync::PoisonError::into_inner);
    *free -= 1;
    drop(free);
    let _turn = Turn;
    test();
}

/// How long hunts are longer: `make soak` sets it.
fn rounds(usual: u32) -> u32 {
    std::env::var("ETCD_ROUNDS").map_or(usual, |factor| usual * factor.parse::<u32>().expect("a number"))
}

/// Contenders for one name, and what they saw.
#[derive(Default)]
struct Contest {
    over: AtomicBool,
    held: Mutex<Vec<Arc<Lease>>>,
    last: AtomicI64,
    grants: AtomicU64,
    lost: AtomicU64,
    unavailable: AtomicU64,
}

impl Contest {
    fn contend(&self, manager: &Manager) {
        while !self.over.load(Ordering::SeqCst) {
            let lease = match manager.acquire("contest").timeout(LIMIT).wait() {
                Ok(lease) => Arc::new(lease),
                Err(error) => {
                    assert!(error.is_retryable(), "{error}");
                    self.unavailable.fetch_add(1, Ordering::SeqCst);
                    continue;
                }
            };
            if lease.is_held() {
                self.granted(&lease);
                thread::sleep(Duration::from_millis(1));
                self.held.lock().unwrap().retain(|held| !Arc::ptr_eq(held, &lease));
            }
            if !lease.is_held() {
                self.lost.fetch_add(1, Ordering::SeqCst);
            }
            let lease = Arc::into_inner(lease).expect("nobody else has it");
            if let Err(error) = lease.release() {
                assert!(matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Lost), "{error}");
            }
        }
    }

    /// Nobody else may believe now that he holds, and its token is the highest.
    fn granted(&self, lease: &Arc<Lease>) {
        let mut held = self.held.lock().unwrap();
        let other = held.iter().find(|other| other.is_held());
        assert!(other.is_none(), "{lease:?} was granted beside {other:?}");
        let before = self.last.fetch_max(lease.token().get(), Ordering::SeqCst);
        assert!(before < lease.token().get(), "{lease:?} was granted after token {before}");
        held.push(lease.clone());
        self.grants.fetch_add(1, Ordering::SeqCst);
    }

    /// Waits until so many more were granted.
    fn goes_on(&self, more: u64) {
        let before = self.grants.load(Ordering::SeqCst);
        until("the contest goes on", || {
            assert!(!self.over.load(Ordering::SeqCst), "a contender panicked");
            self.grants.load(Ordering::SeqCst) >= before + more
        });
    }
}

/// Ends the contest however the test ends.
struct Ending<'a>(&'a Contest);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
    }
}

/// Runs a contest, and a holder that must not lose its lease, while something is done to the cluster.
fn disturbed(cluster: Cluster, url: &str, disturb: impl FnOnce(&mut Cluster, &Contest)) {
    let mut cluster = cluster;
    let open = || Manager::builder().url(url).ttl(TTL).open_blocking().unwrap();
    let managers: Vec<_> = (0..MANAGERS).map(|_| open()).collect();
    let holder = open();
    let lease = holder.acquire("held").timeout(LIMIT).wait().unwrap();
    let contest = Contest::default();
    thread::scope(|scope| {
        let _ending = Ending(&contest);
        for at in 0..CONTENDERS {
            let (contest, manager) = (&contest, &managers[at % MANAGERS]);
            scope.spawn(move || {
                let _ending = Ending(contest);
                contest.contend(manager);
            });
        }
        contest.goes_on(20);
        disturb(&mut cluster, &contest);
        contest.goes_on(20);
    });
    assert!(lease.is_held(), "lost though it could be renewed: {lease:?}");
    lease.confirm().unwrap();
    assert_eq!(contest.lost.load(Ordering::SeqCst), 0, "leases of contenders were lost");
    println!("{} grants, {} unavailable", contest.grants.into_inner(), contest.unavailable.into_inner());
    lease.release().unwrap();
    for manager in managers.into_iter().chain([holder]) {
        manager.close().unwrap();
    }
    until("no key is left", || cluster.keys("p/") == 0);
    // A request to grant one that was not answered leaves one that expires.
    until("no lease is left", || cluster.leases() == 0);
    for at in 0..cluster.nodes.len() {
        until("no watch is left", || cluster.metric(at, "etcd_debugging_mvcc_watcher_total", "") == 0);
    }
}

fn frozen_servers(version: &str) {
    let cluster = Cluster::start(version, 3, &[]);
    let url = cluster.url("p");
    disturbed(cluster, &url, |cluster, contest| {
        for at in 0..3 * rounds(1) as usize {
            cluster.freeze(at % 3);
            assert!(cluster.is_frozen(at % 3));
            contest.goes_on(30);
            cluster.thaw(at % 3);
            cluster.wait_until_all_healthy();
        }
    });
}

fn killed_leaders(version: &str) {
    let cluster = Cluster::start(version, 3, &[]);
    let url = cluster.url("p");
    disturbed(cluster, &url, |cluster, contest| {
        for _ in 0..rounds(2) {
            let leader = cluster.wait_for_leader();
            cluster.kill(leader);
            contest.goes_on(30);
            assert_ne!(cluster.wait_for_leader(), leader);
            cluster.revive(leader);
            cluster.wait_until_all_healthy();
        }
    });
}

fn leaders_that_change(version: &str) {
    let cluster = Cluster::start(version, 3, &[]);
    let url = cluster.url("p");
    disturbed(cluster, &url, |cluster, contest| {
        for _ in 0..rounds(3) {
            let leader = cluster.wait_for_leader();
            let next = (leader + 1) % 3;
            cluster.move_leader(leader, next);
            until("another leads", || cluster.leader() == Some(next));
            contest.goes_on(50);
        }
    });
}

fn a_power_failure_of_all(version: &str) {
    let cluster = Cluster::start(version, 3, &[]);
    let url = cluster.url("p");
    disturbed(cluster, &url, |cluster, contest| {
        (0..3).for_each(|at| cluster.kill(at));
        assert!(cluster.try_ctl(&["get", "x"]).is_err());
        (0..3).for_each(|at| cluster.revive(at));
        cluster.wait_until_all_healthy();
        contest.goes_on(20);
    });
}

/// Waits until a lease that cannot be renewed any more is lost, which must be no later than half its ttl after the last good
/// renewal was sent. Gives back that instant.
pub(crate) fn lost_in_time(lease: &Lease, ttl: Duration, reason: EndReason) -> Moment {
    let (mut confirmed, half) = (None, ttl / 2);
    loop {
        let now = Moment::now();
        let left = lease.remaining();
        if left.is_zero() {
            break;
        }
        // What is left, to the nanosecond, tells from when it counts; a renewal that was under way may still be answered.
        let until = u64::try_from((half - left).as_nanos()).unwrap();
        confirmed = confirmed.max(Some(Moment::from_nanos(now.as_nanos() - until)));
        thread::sleep(Duration::from_millis(1).min(left));
    }
    let confirmed = confirmed.expect("it was held");
    assert!(Moment::now() >= confirmed + half, "given up early");
    assert!(!lease.is_held());
    // The signal comes by a timer and two threads; how long they need on a busy machine is not the library's.
    let told = lease.cancelled();
    assert!(Moment::now() <= confirmed + half + Duration::from_secs(1), "told late");
    assert_eq!(told.reason, reason);
    confirmed
}

fn all_frozen(version: &str) {
    let ttl = Duration::from_secs(4);
    let cluster = Cluster::start(version, 3, &[]);
    let open = || Manager::builder().url(cluster.url("p")).ttl(ttl).open_blocking().unwrap();
    let (holder, rival) = (open(), open());
    for _ in 0..rounds(1) {
        let lease = holder.acquire("n").timeout(LIMIT).wait().unwrap();
        thread::scope(|scope| {
            let next = scope.spawn(|| rival.acquire("n").timeout(LIMIT).wait().unwrap());
            until("the rival waits", || rival.inspect("n").unwrap().is_some_and(|record| record.waiting == 1));
            (0..3).for_each(|at| cluster.freeze(at));
            lost_in_time(&lease, ttl, EndReason::Unreachable);
            assert!(!next.is_finished());
            (0..3).for_each(|at| cluster.thaw(at));
            let next = next.join().unwrap();
            assert!(next.token() > lease.token());
            next.release().unwrap();
        });
        assert_eq!(lease.release().unwrap_err().kind(), ErrorKind::Lost);
    }
    holder.close().unwrap();
    rival.close().unwrap();
    until("no key is left", || cluster.keys("p/") == 0);
}

/// The holder is cut off from all servers, and his rival is not.
fn a_partition(version: &str) {
    let ttl = Duration::from_secs(4);
    let cluster = Cluster::start(version, 3, &[]);
    let proxies: Vec<Proxy> = cluster.nodes.iter().map(|node| Proxy::to(node.port)).collect();
    let ports: Vec<u16> = proxies.iter().map(Proxy::port).collect();
    let holder = Manager::builder().url(cluster.url_by(&ports, "p")).ttl(ttl).open_blocking().unwrap();
    let rival = Manager::builder().url(cluster.url("p")).ttl(ttl).open_blocking().unwrap();
    for fault in [Fault::BlackHole, Fault::LoseAnswers, Fault::LoseRequests] {
        let lease = holder.acquire("n").timeout(LIMIT).wait().unwrap();
        thread::scope(|scope| {
            let next = scope.spawn(|| {
                let lease = rival.acquire("n").timeout(LIMIT).wait().unwrap();
                (lease, Moment::now())
            });
            until("the rival waits", || rival.inspect("n").unwrap().is_some_and(|record| record.waiting == 1));
            all(&proxies, fault);
            let confirmed = lost_in_time(&lease, ttl, EndReason::Unreachable);
            let (next, granted) = next.join().unwrap();
            assert!(granted >= confirmed + ttl, "passed over after {:?}", granted.since(confirmed));
            assert!(next.token() > lease.token());
            next.release().unwrap();
        });
        assert!(proxies.iter().map(Proxy::fired).sum::<u64>() > 0, "{fault:?} did not happen");
        all(&proxies, Fault::None);
        assert_eq!(lease.release().unwrap_err().kind(), ErrorKind::Lost);
    }
    holder.close().unwrap();
    rival.close().unwrap();
    until("no key is left", || cluster.keys("p/") == 0);
}

fn all(proxies: &[Proxy], fault: Fault) {
    for proxy in proxies {
        proxy.set(fault);
    }
}

/// The cluster behind proxies.
fn by_proxies(version: &str) -> (Cluster, Vec<Proxy>, String) {
    let cluster = Cluster::start(version, 3, &[]);
    let proxies: Vec<Proxy> = cluster.nodes.iter().map(|node| Proxy::to(node.port)).collect();
    let url = cluster.url_by(&proxies.iter().map(Proxy::port).collect::<Vec<_>>(), "p");
    (cluster, proxies, url)
}

fn a_slow_network(version: &str) {
    let (cluster, proxies, url) = by_proxies(version);
    disturbed(cluster, &url, |_, contest| {
        for millis in [20, 100] {
            let fired: u64 = proxies.iter().map(Proxy::fired).sum();
            all(&proxies, Fault::Delay(Duration::from_millis(millis)));
            contest.goes_on(u64::from(rounds(10)));
            assert!(proxies.iter().map(Proxy::fired).sum::<u64>() > fired);
        }
        all(&proxies, Fault::None);
    });
}

/// By the server that is used; the others are well.
fn lost_answers_and_lost_requests(version: &str) {
    let (cluster, proxies, url) = by_proxies(version);
    disturbed(cluster, &url, |_, contest| {
        for _ in 0..rounds(1) {
            for proxy in &proxies {
                for fault in [Fault::LoseAnswers, Fault::LoseRequests, Fault::BlackHole] {
                    proxy.set(fault);
                    contest.goes_on(20);
                    proxy.set(Fault::None);
                    // What has lost bytes is no connection any more.
                    proxy.cut();
                }
            }
        }
        assert!(proxies.iter().map(Proxy::fired).sum::<u64>() > 0);
    });
}

fn connections_that_are_cut(version: &str) {
    let (cluster, proxies, url) = by_proxies(version);
    disturbed(cluster, &url, |_, contest| {
        let opened = || proxies.iter().map(Proxy::opened).sum::<u64>();
        let (before, began) = (opened(), Instant::now());
        for _ in 0..rounds(25) {
            proxies.iter().for_each(Proxy::cut);
            contest.goes_on(3);
        }
        assert!(opened() > before + 20, "{} connections in {:?}", opened() - before, began.elapsed());
    });
}
