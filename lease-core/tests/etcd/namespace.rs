//! Real packet loss: a network of two machines with one cable, of which the other end is pulled. Both are network
//! namespaces of our own. The server and a rival are here, and who loses his connection is a process over there.

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lease_core::blocking::{Lease, Manager};
use lease_core::clock::Moment;
use lease_core::{EndReason, ErrorKind};

use crate::alone;
use crate::faults::{in_turn, lost_in_time};
use crate::rules::{LIMIT, Rule, until};
use crate::support::etcd::Cluster;
use crate::support::process::{Worker, told, within};

const HERE: &str = "10.77.0.1";
const THERE: &str = "10.77.0.2";
const ETCD_URL: &str = "ETCD_ALONE_URL";
/// A sixth of it is what a renewal has.
const TTL: Duration = Duration::from_secs(12);

pub(crate) const NAMESPACE: &[Rule] = &[
    ("a_pulled_cable", |version| network("a_pulled_cable", version)),
    ("a_cable_that_is_put_back_in_time", |version| network("a_cable_that_is_put_back_in_time", version)),
    ("a_waiter_without_a_cable", |version| network("a_waiter_without_a_cable", version)),
];

pub(crate) const ALONE: &[Rule] = &[
    ("a_pulled_cable", a_pulled_cable),
    ("a_cable_that_is_put_back_in_time", a_cable_that_is_put_back_in_time),
    ("a_waiter_without_a_cable", a_waiter_without_a_cable),
    ("over_there", over_there),
];

/// Why there can be no network of our own, and whether it is for want of a program only.
pub(crate) fn missing() -> Option<(&'static str, bool)> {
    let works = |arguments: &[&str]| {
        let mut unshare = Command::new("unshare");
        let unshare = unshare.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        unshare.status().is_ok_and(|status| status.success())
    };
    if !works(&["-Urn", "true"]) {
        return Some(("no namespaces are to be had here", false));
    }
    (!works(&["-Urn", "ip", "link", "set", "lo", "up"])).then_some(("there is no program `ip`", true))
}

fn network(what: &str, version: &str) {
    if let Some((why, _)) = missing() {
        panic!("{why}");
    }
    in_turn(|| alone::run(Some(("unshare", &["-Urn"])), what, version));
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The server, and a process at the other end of a cable.
struct Network {
    cluster: Cluster,
    rival: Manager,
    far: Worker,
}

impl Network {
    fn new(version: &str) -> Self {
        ip("link set lo up");
        let options = ["--listen-client-urls=http://127.0.0.1:{port},http://10.77.0.1:{port}"];
        // The address has to be there before the server.
        ip("link add near type veth peer name far");
        ip(&format!("address add {HERE}/24 dev near"));
        ip("link set near up");
        let cluster = Cluster::start(version, 1, &options);
        let url = cluster.url("p").replace("127.0.0.1", HERE);
        let variables = alone::variables("over_there", version).into_iter().chain([(ETCD_URL, url)]);
        let mut unshare = Command::new("unshare");
        unshare.arg("-n").arg(std::env::current_exe().unwrap());
        let far = Worker::start_by(unshare, "the far end", [""; 0], variables).unwrap();
        far.hear("started", within(LIMIT)).unwrap();
        ip(&format!("link set far netns {}", far.pid()));
        let rival = Manager::builder().url(cluster.url("p")).ttl(TTL).open_blocking().unwrap();
        let mut network = Self { cluster, rival, far };
        network.ask("plugged", "ready");
        network
    }

    /// Tells the far end something, and waits for what it says.
    fn ask(&mut self, what: &str, word: &str) -> String {
        self.far.tell(what).unwrap();
        self.far.hear(word, within(LIMIT)).unwrap()
    }

    fn nanos(&mut self, what: &str, word: &str) -> Duration {
        Duration::from_nanos(self.ask(what, word).parse().unwrap())
    }

    /// Packets are lost from now on, without a word to those who send them.
    fn pull(&mut self) {
        assert_eq!(self.ask("connect", "connect"), "true");
        ip("link set near down");
    }

    fn put_back() {
        ip("link set near up");
    }

    fn end(self) {
        self.far.finish(within(LIMIT)).unwrap();
        self.rival.close().unwrap();
        until("no key is left", || self.cluster.keys("p/") == 0);
    }
}

/// The holder ends before the rival begins.
fn a_pulled_cable(version: &str) {
    let mut network = Network::new(version);
    let mut soonest = Duration::MAX;
    for _ in 0..2 {
        let token: i64 = network.ask("acquire n", "granted").parse().unwrap();
        let rival = network.rival.clone();
        thread::scope(|scope| {
            let next = scope.spawn(|| {
                let lease = rival.acquire("n").timeout(LIMIT).wait().unwrap();
                (lease, Moment::now())
            });
            until("the rival waits", || rival.inspect("n").unwrap().is_some_and(|record| record.waiting == 1));
            network.pull();
            let lost = network.ask("until lost", "lost");
            let (confirmed, told) = lost.split_once(' ').unwrap();
            let [confirmed, told] = [confirmed, told].map(|nanos| Moment::from_nanos(nanos.parse().unwrap()));
            let (next, granted) = next.join().unwrap();
            assert!(told >= confirmed + TTL / 2);
            soonest = soonest.min(told.since(confirmed + TTL / 2));
            assert!(granted >= confirmed + TTL, "passed over after {:?}", granted.since(confirmed));
            assert!(granted > told, "granted before the holder was told");
            // What is after the ttl is the slack, and what a busy machine takes.
            assert!(granted < confirmed + TTL + Duration::from_secs(5), "after {:?}", granted.since(confirmed));
            assert!(next.token().get() > token);
            next.release().unwrap();
        });
        assert_eq!(network.ask("release", "released"), "lost");
        Network::put_back();
        until("they are connected", || network.ask("connect", "connect") == "true");
    }
    println!("told {soonest:?} after half the ttl");
    // A machine that was busy once is not busy always.
    assert!(soonest <= Duration::from_millis(50), "told {soonest:?} after half the ttl");
    network.end();
}

fn a_cable_that_is_put_back_in_time(version: &str) {
    let mut network = Network::new(version);
    network.ask("acquire n", "granted");
    for _ in 0..2 {
        // Until right before a renewal is due, when the least is left.
        let due = TTL / 2 - TTL / 3;
        network.nanos(&format!("until less {}", (due + Duration::from_millis(300)).as_nanos()), "less");
        network.pull();
        let out = Instant::now();
        // A renewal was due, and was not answered.
        let left = network.nanos(&format!("until less {}", (due - Duration::from_millis(400)).as_nanos()), "less");
        assert!(left > Duration::ZERO && left < due, "it was renewed without a cable");
        Network::put_back();
        assert!(out.elapsed() < due, "the machine is too busy: the cable was out for {:?}", out.elapsed());
        let left = network.nanos("until renewed", "renewed");
        assert!(left > due);
    }
    assert_eq!(network.ask("release", "released"), "well");
    network.end();
}

fn a_waiter_without_a_cable(version: &str) {
    let mut network = Network::new(version);
    let lease = network.rival.acquire("n").wait().unwrap();
    network.far.tell("acquire n").unwrap();
    let rival = network.rival.clone();
    until("the far end waits", || rival.inspect("n").unwrap().is_some_and(|record| record.waiting == 1));
    ip("link set near down");
    lease.release().unwrap();
    until("the far end is first, and does not know", || {
        rival.inspect("n").unwrap().is_some_and(|record| record.waiting == 0)
    });
    assert!(network.far.hear("granted", within(Duration::from_secs(1))).is_err(), "granted without a cable");
    Network::put_back();
    let back = Instant::now();
    network.far.hear("granted", within(LIMIT)).unwrap();
    println!("served {:?} after the cable was back", back.elapsed());
    // It would have to begin anew after its ttl.
    assert!(back.elapsed() < TTL, "served {:?} after the cable was back", back.elapsed());
    assert_eq!(network.ask("release", "released"), "well");
    network.end();
}

/// At the other end: does what it is told.
fn over_there(_: &str) {
    println!("started");
    let url = std::env::var(ETCD_URL).unwrap();
    let address = url.split('/').nth(2).unwrap();
    let manager = Manager::builder().url(&url).ttl(TTL).open_blocking().unwrap();
    let mut held: Option<Lease> = None;
    while let Some(line) = told().unwrap() {
        let lease = || held.as_ref().expect("it was acquired");
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["plugged"] => {
                ip("link set lo up");
                ip(&format!("address add {THERE}/24 dev far"));
                ip("link set far up");
                println!("ready");
            }
            ["connect"] => {
                let limit = Duration::from_millis(500);
                println!("connect {}", std::net::TcpStream::connect_timeout(&address.parse().unwrap(), limit).is_ok());
            }
            ["acquire", name] => {
                let lease = held.insert(manager.acquire(name).timeout(LIMIT).wait().unwrap());
                println!("granted {}", lease.token());
            }
            ["until", "less", nanos] => {
                let limit = Duration::from_nanos(nanos.parse().unwrap());
                until("little is left", || lease().remaining() < limit);
                println!("less {}", lease().remaining().as_nanos());
            }
            ["until", "renewed"] => {
                let before = lease().remaining();
                until("it is renewed", || lease().remaining() > before || !lease().is_held());
                println!("renewed {}", lease().remaining().as_nanos());
            }
            ["until", "lost"] => {
                let confirmed = lost_in_time(lease(), TTL, EndReason::Unreachable);
                println!("lost {} {}", confirmed.as_nanos(), Moment::now().as_nanos());
            }
            ["release"] => match held.take().expect("it was acquired").release() {
                Ok(()) => println!("released well"),
                Err(error) if error.kind() == ErrorKind::Lost => println!("released lost"),
                Err(error) => panic!("{error}"),
            },
            _ => panic!("what is {line:?}?"),
        }
    }
    drop(held);
    manager.close().unwrap();
}
