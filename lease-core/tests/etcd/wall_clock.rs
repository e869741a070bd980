//! The wall clock decides nothing: a holder whose clock is set an hour forward, an hour back, and ten years forward.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use lease_core::ErrorKind;
use lease_core::blocking::Manager;

use crate::alone;
use crate::faults::in_turn;
use crate::rules::{LIMIT, Rule, until};
use crate::support::etcd::{Cluster, servers};
use crate::support::process::{Worker, told, within};
use crate::support::scratch::Scratch;

const ETCD_URL: &str = "ETCD_ALONE_URL";
const TTL: Duration = Duration::from_secs(12);
/// How long the worker waits for what it does not get.
const IN_VAIN: Duration = Duration::from_secs(1);
/// What takes no time, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(5);

pub(crate) const WALL_CLOCK: &[Rule] = &[("that_is_set", |version| in_turn(|| a_wall_clock_that_is_set(version)))];

pub(crate) const ALONE: &[Rule] = &[("worker_with_a_wall_clock", worker)];

/// The library that shows a process another time: of `ci/etcd.sh`, or of the system.
pub(crate) fn library() -> Option<PathBuf> {
    let system = ["x86_64", "aarch64"].map(|machine| format!("/usr/lib/{machine}-linux-gnu/faketime/libfaketime.so.1"));
    let own = servers().join("libfaketime.so.1");
    std::iter::once(own).chain(system.map(PathBuf::from)).find(|path| path.exists())
}

fn set(clock: &Path, offset: &str) {
    // At once: a half-written file would be another time.
    let new = clock.with_extension("new");
    std::fs::write(&new, offset).unwrap();
    std::fs::rename(new, clock).unwrap();
}

fn a_wall_clock_that_is_set(version: &str) {
    let library = library().expect("there is no libfaketime: run `make etcd`");
    let scratch = Scratch::in_memory("lease-clock").unwrap();
    let clock = scratch.path().join("clock");
    set(&clock, "+0");
    let cluster = Cluster::start(version, 1, &[]);
    let rival = Manager::builder().url(cluster.url("p")).ttl(TTL).open_blocking().unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let variables = alone::variables("worker_with_a_wall_clock", version).into_iter().chain([
        (ETCD_URL, cluster.url("p")),
        ("LD_PRELOAD", text(&library)),
        ("FAKETIME_TIMESTAMP_FILE", text(&clock)),
        ("FAKETIME_NO_CACHE", "1".into()),
        ("DONT_FAKE_MONOTONIC", "1".into()),
    ]);
    let mut worker = Worker::start("the worker", [""; 0], variables).unwrap();
    let mut ask = |what: &str, word: &str| {
        worker.tell(what).unwrap();
        worker.hear(word, within(LIMIT)).unwrap()
    };
    ask("hold", "holds");
    let busy = rival.acquire("busy").wait().unwrap();
    let apart = |told: &str| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        told.parse::<i64>().unwrap() - i64::try_from(now).unwrap()
    };
    assert!(apart(&ask("time", "time")).abs() < 60);
    for (offset, seconds) in [("+1h", 3_600), ("-1h", -3_600), ("+10y", 10 * 365 * 86_400), ("+0", 0)] {
        // It waits for one that is held here, while its clock is set.
        let held = rival.acquire("n").timeout(LIMIT).wait().unwrap();
        worker.tell("acquire n").unwrap();
        until("the worker waits", || rival.inspect("n").unwrap().is_some_and(|record| record.waiting == 1));
        set(&clock, offset);
        worker.tell("time").unwrap();
        let apart = apart(&worker.hear("time", within(LIMIT)).unwrap());
        assert!((apart - seconds).abs() < 60 + seconds.abs() / 100, "{offset}: {apart} s apart");
        let released = Instant::now();
        held.release().unwrap();
        worker.hear("granted", within(LIMIT)).unwrap();
        assert!(released.elapsed() < AT_ONCE, "{offset}: granted after {:?}", released.elapsed());
        let began = Instant::now();
        worker.tell("acquire busy").unwrap();
        worker.hear("in vain", within(LIMIT)).unwrap();
        assert!((IN_VAIN..IN_VAIN + AT_ONCE).contains(&began.elapsed()), "{offset}: waited {:?}", began.elapsed());
        // Not the renewal that was on its way.
        for _ in 0..2 {
            worker.tell("renewed").unwrap();
            worker.hear("is renewed", within(TTL)).unwrap();
        }
        assert!(rival.try_acquire("held").unwrap().is_none(), "{offset}");
    }
    worker.finish(within(LIMIT)).unwrap();
    busy.release().unwrap();
    rival.close().unwrap();
    assert_eq!(cluster.keys("p/"), 0, "keys that are left");
}

/// Holds a lease all the time, and does what it is told besides.
fn worker(_: &str) {
    let manager = Manager::builder().url(std::env::var(ETCD_URL).unwrap()).ttl(TTL).open_blocking().unwrap();
    let mut held = None;
    std::thread::scope(|scope| {
        while let Some(line) = told().unwrap() {
            match &*line {
                "hold" => {
                    held = Some(manager.acquire("held").timeout(LIMIT).wait().unwrap());
                    println!("holds");
                }
                "time" => {
                    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
                    println!("time {}", now.as_secs());
                }
                "renewed" => {
                    let lease = held.as_ref().expect("it holds");
                    let mut left = lease.remaining();
                    until("it is renewed", || {
                        let before = std::mem::replace(&mut left, lease.remaining());
                        left > before || !lease.is_held()
                    });
                    lease.check().unwrap();
                    println!("is renewed");
                }
                "acquire n" => drop(scope.spawn(|| {
                    let lease = manager.acquire("n").timeout(LIMIT).wait().unwrap();
                    println!("granted");
                    lease.release().unwrap();
                })),
                "acquire busy" => {
                    let error = manager.acquire("busy").timeout(IN_VAIN).wait().unwrap_err();
                    assert_eq!(error.kind(), ErrorKind::Timeout);
                    println!("in vain");
                }
                _ => panic!("what is {line:?}?"),
            }
        }
    });
    held.expect("it holds").release().unwrap();
    manager.close().unwrap();
}
