//! What a lease on etcd costs, as ratios to a raw floor measured in the same run.
//!
//! ```text
//! cargo bench -p lease-core --features etcd --bench etcd [-- --quick]
//! ```
//!
//! One server of version 3.5, on this machine. The floors are raw requests of the client stack that the store uses, on a
//! thread of its own and with a caller that blocks, as the subject is. Otherwise as `figures.rs`: in turns, medians, and a
//! missed bound is printed as such. A row has two bounds: what is to be kept, and in brackets what is aimed at.

// Shared with the tests, which use other parts of it.
#[allow(dead_code)]
#[path = "../tests/support/mod.rs"]
mod support;

#[path = "etcd/raw.rs"]
mod raw;

use std::cell::RefCell;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::{Duration, Instant};

use lease_core::Token;
use lease_core::blocking::Manager;
use lease_core::clock::Moment;
use raw::Raw;
use raw::proto::compare::{CompareResult, CompareTarget, TargetUnion};
use raw::proto::range_request::{SortOrder, SortTarget};
use raw::proto::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, ResponseHeader, TxnRequest, request_op,
};
use rustix::time::{ClockId, clock_gettime};
use support::etcd::{Cluster, is_there};
use support::journal::{self, End, Journal, judge, percentile};
use support::measure::{Effort, Outcome, head, in_turns, median, nanos, per_operation, print_row};
use support::process::{Worker, told, within};
use support::scratch::Scratch;

const VERSION: &str = "3.5";
const NAME: &str = "nightly";
const HELD: u32 = 10_000;
const TTL: Duration = Duration::from_secs(10);
/// Whatever takes longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// As long as what a claim writes.
const VALUE: &[u8] = b"1 30000 1700000000000 host.example:12345";

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["--be", who @ ("lease" | "lock"), server, directory, threads, hold] => {
            let hold = Duration::from_millis(hold.parse()?);
            contend(who == "lock", server, Path::new(directory), threads.parse()?, hold)
        }
        ["--be", "holder", url] => holder(url),
        _ => {
            if let Some(unknown) = words.iter().find(|word| !["--bench", "--quick"].contains(word)) {
                return Err(format!("unknown option {unknown:?}; usage: etcd [--quick]").into());
            }
            // `cargo bench` says --bench; whoever else runs this wants to see it work, not the figures.
            let quick = words.contains(&"--quick") || !words.contains(&"--bench");
            figures(&if quick { Effort::QUICK } else { Effort::FULL })
        }
    }
}

fn figures(effort: &Effort) -> Outcome {
    if !is_there(VERSION) {
        return Err(format!("there is no etcd {VERSION}, so nothing is measured: `make etcd` gets it").into());
    }
    let cluster = Cluster::start(VERSION, 1, &[]);
    println!("etcd {VERSION}, one node, data {}.", where_data_is()?);
    head(effort);
    pair(effort, &cluster)?;
    processes(effort, &cluster)?;
    held(effort, &cluster)
}

/// The cluster takes memory if there is any to be had as a folder.
fn where_data_is() -> Outcome<&'static str> {
    let ours = format!("lease-etcd-{}-", std::process::id());
    let Ok(entries) = fs::read_dir("/dev/shm") else { return Ok("on disk") };
    for entry in entries {
        if entry?.file_name().to_string_lossy().starts_with(&ours) {
            return Ok("in /dev/shm: nothing waits for a disk");
        }
    }
    Ok("on disk")
}

// ------------------------------------------------------------------------------- the rows

fn pair(effort: &Effort, cluster: &Cluster) -> Outcome {
    let raw = Raw::connect(cluster.nodes[0].port)?;
    let lease = raw.grant(600)?;
    let manager = Manager::open(cluster.url("pair"))?;
    manager.acquire(NAME).wait()?.release()?;
    let operations = effort.operations / 50;
    let mut costs = Costs::default();
    let [puts, transactions, pair] = in_turns(
        effort,
        [
            &mut || {
                per_operation(operations, |_| {
                    raw.put("raw/put", VALUE, 0)?;
                    raw.put("raw/put", VALUE, 0).map(drop)
                })
            },
            &mut || per_operation(operations, |_| enter_and_leave(&raw, lease)),
            &mut || {
                let before = Counts::read(cluster)?;
                let time = per_operation(operations, |_| Ok(manager.acquire(NAME).wait()?.release()?))?;
                costs.add(&before, &Counts::read(cluster)?, f64::from(operations));
                Ok(time)
            },
        ],
    )?;
    times("acquire + release", "two raw puts", puts, pair, Some(Bound::AtMost { kept: 1.2, aim: 1.1 }));
    times("acquire + release", "the same transactions, raw", transactions, pair, None);
    costs.print();
    Ok(manager.close()?)
}

fn processes(effort: &Effort, cluster: &Cluster) -> Outcome {
    let (a, b) = (Raw::connect(cluster.nodes[0].port)?, Raw::connect(cluster.nodes[0].port)?);
    let ball = Balls { seen_by_a: a.deletions("raw/b/")?, seen_by_b: b.deletions("raw/a/")?, a, b };
    let ball = RefCell::new(ball);
    let mut two = Contest::new(cluster, "lease", 2);
    let mut eight = Contest::new(cluster, "lease", 8);
    let mut fifty = Contest::new(cluster, "lease", 50);
    let mut crowds = Contest { threads: 3, ..Contest::new(cluster, "lease", 8) };
    let mut calm = Contest { hold: Duration::from_millis(10), ..Contest::new(cluster, "lease", 8) };
    let mut theirs = Contest::new(cluster, "lock", 8);
    let [seen, looked, of_two, of_eight, of_fifty, of_crowds, _, of_theirs] = in_turns(
        effort,
        [
            &mut || ball.borrow_mut().there_and_back(effort.operations / 50, false),
            &mut || ball.borrow_mut().there_and_back(effort.operations / 50, true),
            &mut || two.round(effort),
            &mut || eight.round(effort),
            &mut || fifty.round(effort),
            &mut || crowds.round(effort),
            &mut || calm.round(effort),
            &mut || theirs.round(effort),
        ],
    )?;
    let floor = "raw deletes seen by watch";
    let bound = Bound::AtLeast { kept: 0.25, aim: 0.4 };
    let contests = [
        ("2 processes", of_two, &two, Some(bound)),
        ("8 processes", of_eight, &eight, Some(bound)),
        ("50 processes", of_fifty, &fifty, Some(bound)),
        ("8 of 3 waiters", of_crowds, &crowds, None),
    ];
    for (who, change, contest, bound) in contests {
        rates(&format!("{who}: owner changes/s"), floor, seen, change, bound);
        contest.costs.print();
    }
    let bound = Bound::AtMost { kept: 3.5, aim: 2.0 };
    let contests = [
        ("2 processes", &mut two),
        ("8 processes", &mut eight),
        ("50 processes", &mut fifty),
        ("8, held 10 ms", &mut calm),
    ];
    for (who, contest) in contests {
        let (p50, p99) = (median(&mut contest.p50s), median(&mut contest.p99s));
        times(&format!("{who}: hand-over, p50"), "a raw delete seen by watch", seen, p50, Some(bound));
        times(&format!("{who}: hand-over, p50"), "the same, and one raw read", looked, p50, None);
        times(&format!("{who}: hand-over, p99"), "a raw delete seen by watch", seen, p99, None);
        println!("  the slowest 5 %: {:.0} % of the time", median(&mut contest.tails));
    }
    calm.costs.print();
    let bound = Bound::AtLeast { kept: 5.0, aim: 5.0 };
    rates("8 processes: owner changes/s", "etcd's own lock", of_theirs, of_eight, Some(bound));
    theirs.costs.print();
    Ok(())
}

fn held(effort: &Effort, cluster: &Cluster) -> Outcome {
    let none = Counts::read(cluster)?;
    let mut worker = Worker::start("the holder of many", ["--be", "holder", &cluster.url("held")], [("", ""); 0])?;
    let limit = within(PATIENCE);
    let bytes: f64 = worker.hear("held", limit)?.parse()?;
    // Until each was renewed, and what that frees is given back.
    thread::sleep(TTL / 2);
    let mut costs = Costs::default();
    costs.add(&none, &Counts::read(cluster)?, HELD.into());
    let (before, began) = (Counts::read(cluster)?, Instant::now());
    worker.tell("go")?;
    thread::sleep(Duration::from_secs(effort.held_seconds.into()));
    worker.tell("enough")?;
    let (after, seconds) = (Counts::read(cluster)?, began.elapsed().as_secs_f64());
    let client: f64 = worker.hear("used", limit)?.parse()?;
    worker.finish(limit)?;
    let a_second = |what| after.since(&before, what) / seconds;
    let bounded = |what: &str, unit: &str, value: f64, most: f64| {
        let bound = Bound::AtMost { kept: most, aim: most };
        print_row(what, "", "", &format!("{value:.1} {unit}"), "", &bound.verdict(value));
    };
    let (proposals, transactions) = (a_second(PROPOSALS), a_second(method!("Txn")));
    bounded(&format!("{HELD} leases held, ttl 10 s"), "proposals/s", proposals, 40.0);
    bounded("", "% of a core", client, 8.0);
    bounded("", "bytes each", bytes, 1024.0);
    let unbounded = |text: String| print_row("", "", "", &text, "", "-");
    unbounded(format!("{transactions:.1} transactions/s"));
    unbounded(format!("{:.1} % of a core, server", 100.0 * a_second("process_cpu_seconds_total")));
    unbounded(format!("{:.0} kB/s of history", a_second("etcd_mvcc_db_total_size_in_use_in_bytes") / 1e3));
    println!("  to get them and renew them once:");
    costs.print();
    Ok(())
}

/// What is to be kept, and what is aimed at.
#[derive(Clone, Copy)]
enum Bound {
    AtMost { kept: f64, aim: f64 },
    AtLeast { kept: f64, aim: f64 },
}

impl Bound {
    fn verdict(self, value: f64) -> String {
        let (sign, kept, aim, keeps, meets) = match self {
            Self::AtMost { kept, aim } => ("<=", kept, aim, value <= kept, value <= aim),
            Self::AtLeast { kept, aim } => (">=", kept, aim, value >= kept, value >= aim),
        };
        let brackets = if kept.total_cmp(&aim).is_eq() { String::new() } else { format!(" ({aim})") };
        let missed = match (keeps, meets) {
            (true, true) => "",
            (true, false) => "  aim missed",
            (false, _) => "  missed",
        };
        format!("{sign} {kept}{brackets}{missed}")
    }
}

fn times(what: &str, floor_is: &str, floor: Duration, measured: Duration, bound: Option<Bound>) {
    let ratio = measured.as_secs_f64() / floor.as_secs_f64();
    let bound = bound.map_or("-".into(), |bound| bound.verdict(ratio));
    print_row(what, floor_is, &format!("{floor:.1?}"), &format!("{measured:.1?}"), &format!("{ratio:.2}"), &bound);
}

/// The same of what is shown as so many a second.
fn rates(what: &str, floor_is: &str, floor: Duration, measured: Duration, bound: Option<Bound>) {
    let (floor, measured) = (1.0 / floor.as_secs_f64(), 1.0 / measured.as_secs_f64());
    let ratio = measured / floor;
    let bound = bound.map_or("-".into(), |bound| bound.verdict(ratio));
    print_row(what, floor_is, &format!("{floor:.0}/s"), &format!("{measured:.0}/s"), &format!("{ratio:.3}"), &bound);
}

// ------------------------------------------------------------------------------- what the server counts

const PROPOSALS: &str = "etcd_server_proposals_committed_total";

/// How the server counts the calls of a method.
macro_rules! method {
    ($name:literal) => {
        concat!("grpc_server_started_total{grpc_method=\"", $name, "\"")
    };
}
use method;

/// The figures of the server at one instant.
struct Counts(String);

impl Counts {
    fn read(cluster: &Cluster) -> Outcome<Self> {
        let mut stream = TcpStream::connect(("127.0.0.1", cluster.nodes[0].port))?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(Self(text))
    }

    /// The sum of all that begin so.
    fn of(&self, what: &str) -> f64 {
        let rests = self.0.lines().filter_map(|line| line.strip_prefix(what));
        rests
            .filter(|rest| rest.starts_with([' ', '{', ',']))
            .filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    fn since(&self, before: &Self, what: &str) -> f64 {
        self.of(what) - before.of(what)
    }
}

/// What an operation costs the server, round by round.
#[derive(Default)]
struct Costs {
    rounds: Vec<[f64; Self::WHAT.len()]>,
}

impl Costs {
    const WHAT: [(&str, &str); 6] = [
        ("proposals", PROPOSALS),
        ("transactions", method!("Txn")),
        ("reads", method!("Range")),
        ("grants", method!("LeaseGrant")),
        ("revokes", method!("LeaseRevoke")),
        ("watch requests", "grpc_server_msg_received_total{grpc_method=\"Watch\""),
    ];

    fn add(&mut self, before: &Counts, after: &Counts, operations: f64) {
        self.rounds.push(Self::WHAT.map(|(_, what)| after.since(before, what) / operations));
    }

    fn print(&self) {
        let each = Self::WHAT.iter().enumerate().map(|(at, (what, _))| {
            let mut values: Vec<f64> = self.rounds.iter().map(|round| round[at]).collect();
            format!("{:.2} {what}", median(&mut values))
        });
        println!("  each: {}", each.collect::<Vec<_>>().join(", "));
    }
}

// ------------------------------------------------------------------------------- the floors

/// The transactions of an uncontended acquire and its release.
fn enter_and_leave(raw: &Raw, lease: i64) -> Outcome {
    let key = "raw/line/0123456789abcdef0123456789abcdef".as_bytes();
    let compare = |target: CompareTarget, union| Compare {
        result: CompareResult::Equal.into(),
        target: target.into(),
        key: key.into(),
        target_union: Some(union),
        range_end: Vec::new(),
    };
    let range = |order: SortOrder| {
        op(request_op::Request::RequestRange(RangeRequest {
            key: b"raw/line/".into(),
            range_end: b"raw/line0".into(),
            limit: 1,
            sort_order: order.into(),
            sort_target: SortTarget::Create.into(),
            ..RangeRequest::default()
        }))
    };
    let own = || op(request_op::Request::RequestRange(RangeRequest { key: key.into(), ..RangeRequest::default() }));
    let put = PutRequest { key: key.into(), value: VALUE.into(), lease, ignore_value: false };
    let entered = raw.txn(TxnRequest {
        compare: vec![compare(CompareTarget::Create, TargetUnion::CreateRevision(0))],
        success: vec![range(SortOrder::Descend), range(SortOrder::Ascend), op(request_op::Request::RequestPut(put))],
        failure: vec![own()],
    })?;
    let revision = revision(entered.header.as_ref());
    let delete = DeleteRangeRequest { key: key.into(), range_end: Vec::new() };
    let left = raw.txn(TxnRequest {
        compare: vec![compare(CompareTarget::Mod, TargetUnion::ModRevision(revision))],
        success: vec![op(request_op::Request::RequestDeleteRange(delete))],
        failure: vec![own()],
    })?;
    if entered.succeeded && left.succeeded { Ok(()) } else { Err("somebody else is in the line".into()) }
}

fn op(request: request_op::Request) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn revision(header: Option<&ResponseHeader>) -> i64 {
    header.map_or(0, |header| header.revision)
}

/// Two connections that see each other's deletions. All there is in turn is one proposal and one event.
struct Balls {
    a: Raw,
    b: Raw,
    seen_by_a: Receiver<()>,
    seen_by_b: Receiver<()>,
}

impl Balls {
    /// The time of one deletion that was seen, of twice so many. The keys are there before it begins. Who has seen one
    /// may have to look, as a waiter does: one linearizable read.
    fn there_and_back(&mut self, times: u32, looks: bool) -> Outcome<Duration> {
        let Self { a, b, seen_by_a, seen_by_b } = self;
        for beginning in ["raw/a/", "raw/b/"] {
            let keys: Vec<u32> = (0..times).collect();
            for some in keys.chunks(100) {
                let put = |at: &u32| {
                    let key = format!("{beginning}{at}").into_bytes();
                    let put = PutRequest { key, value: VALUE.into(), lease: 0, ignore_value: false };
                    op(request_op::Request::RequestPut(put))
                };
                a.txn(TxnRequest { success: some.iter().map(put).collect(), ..TxnRequest::default() })?;
            }
        }
        let seen = |raw: &Raw, told: &Receiver<()>| -> Outcome {
            told.recv_timeout(PATIENCE)?;
            if looks {
                raw.range(RangeRequest { key: b"raw/put".into(), ..RangeRequest::default() })?;
            }
            Ok(())
        };
        thread::scope(|scope| -> Outcome<Duration> {
            let answering = scope.spawn(move || -> Outcome {
                for at in 0..times {
                    seen(b, seen_by_b)?;
                    b.delete(&format!("raw/b/{at}"))?;
                }
                Ok(())
            });
            let time = per_operation(times, |at| {
                a.delete(&format!("raw/a/{at}"))?;
                seen(a, seen_by_a)
            })?;
            answering.join().map_err(|_| "a thread panicked")??;
            Ok(time / 2)
        })
    }
}

// ------------------------------------------------------------------------------- processes of the subject

/// Processes that want one name, and what came of it round by round.
struct Contest<'a> {
    cluster: &'a Cluster,
    /// `lease`, or `lock`: etcd's own.
    what: &'static str,
    processes: usize,
    /// Waiters in each.
    threads: usize,
    hold: Duration,
    p50s: Vec<Duration>,
    p99s: Vec<Duration>,
    /// How much of the time of all hand-overs the slowest twentieth takes, in percent.
    tails: Vec<f64>,
    costs: Costs,
}

impl<'a> Contest<'a> {
    fn new(cluster: &'a Cluster, what: &'static str, processes: usize) -> Self {
        Self {
            cluster,
            what,
            processes,
            threads: 1,
            hold: Duration::ZERO,
            p50s: Vec::new(),
            p99s: Vec::new(),
            tails: Vec::new(),
            costs: Costs::default(),
        }
    }

    /// The time between two changes of the owner, once all are at it.
    fn round(&mut self, effort: &Effort) -> Outcome<Duration> {
        let scratch = Scratch::new("lease-bench")?;
        let directory = scratch.path().to_str().ok_or("the temporary directory is not UTF-8")?;
        let server = match self.what {
            "lock" => self.cluster.nodes[0].port.to_string(),
            _ => self.cluster.url("contest"),
        };
        let (threads, hold) = (self.threads.to_string(), self.hold.as_millis().to_string());
        let limit = within(PATIENCE);
        let start = |one| {
            let arguments = ["--be", self.what, &server, directory, &threads, &hold];
            Worker::start(format!("contender {one}"), arguments, [("", ""); 0])
        };
        let mut workers = (0..self.processes).map(start).collect::<Result<Vec<_>, _>>()?;
        for worker in &workers {
            worker.hear("ready", limit)?;
        }
        for worker in &mut workers {
            worker.tell("go")?;
        }
        // Until all are in the line, and have what they get ahead.
        thread::sleep(effort.round / 2);
        let (before, began) = (Counts::read(self.cluster)?, Moment::now());
        thread::sleep(effort.round);
        let (ended, after) = (Moment::now(), Counts::read(self.cluster)?);
        let ends: Vec<_> = workers.into_iter().map(|worker| thread::spawn(move || worker.finish(limit))).collect();
        for end in ends {
            end.join().map_err(|_| "a thread panicked")??;
        }
        let holdings = journal::read(scratch.path())?;
        let verdict = judge(&holdings);
        if !verdict.overlaps.is_empty() || !verdict.disorder.is_empty() {
            return Err(format!("the figures of a broken lock are worth nothing: {verdict:?}").into());
        }
        let owner = |holding: &journal::Holding| (holding.pid, holding.contender);
        let changes = holdings
            .windows(2)
            .filter(|two| owner(&two[0]) != owner(&two[1]) && (began..ended).contains(&two[1].granted))
            .count();
        let changes = f64::from(u32::try_from(changes)?);
        if changes < 2.0 {
            return Err("nothing was handed over".into());
        }
        self.p50s.push(percentile(&verdict.handovers, 50));
        self.p99s.push(percentile(&verdict.handovers, 99));
        let total = |handovers: &[Duration]| handovers.iter().map(Duration::as_secs_f64).sum::<f64>();
        let slowest = &verdict.handovers[verdict.handovers.len() * 95 / 100..];
        self.tails.push(100.0 * total(slowest) / total(&verdict.handovers));
        self.costs.add(&before, &after, changes);
        Ok(nanos(ended.since(began).as_secs_f64() * 1e9 / changes))
    }
}

/// Acquires and releases until its standard input ends. Writes its journal then, so as not to measure that.
fn contend(theirs: bool, server: &str, directory: &Path, threads: usize, hold: Duration) -> Outcome {
    let (raw, manager) = if theirs {
        (Some(Raw::connect(server.parse()?)?), None)
    } else {
        let manager = Manager::open(server)?;
        manager.ping()?;
        (None, Some(manager))
    };
    let session = raw.as_ref().map(|raw| raw.grant(60)).transpose()?.unwrap_or(0);
    println!("ready");
    told()?;
    let over = AtomicBool::new(false);
    let contender = || -> Outcome<Vec<_>> {
        let mut grants = Vec::new();
        while !over.load(Ordering::Relaxed) {
            let asked = Moment::now();
            if let Some(manager) = &manager {
                let lease = manager.acquire(NAME).timeout(PATIENCE).wait()?;
                let granted = Moment::now();
                let token = lease.token();
                pause(hold);
                let released = Moment::now();
                lease.release()?;
                grants.push((token, asked, granted, released));
            } else if let Some(raw) = &raw {
                let key = raw.lock("theirs", session)?;
                let granted = Moment::now();
                // It has no tokens.
                let token = Token::try_from(i64::try_from(granted.as_nanos())?)?;
                pause(hold);
                let released = Moment::now();
                raw.unlock(key)?;
                grants.push((token, asked, granted, released));
            }
        }
        Ok(grants)
    };
    let grants = thread::scope(|scope| -> Outcome<Vec<_>> {
        let contenders: Vec<_> = (0..threads).map(|_| scope.spawn(contender)).collect();
        // Its end is what is waited for; that of a broken pipe is one too.
        drop(told());
        over.store(true, Ordering::Relaxed);
        contenders.into_iter().map(|one| one.join().map_err(|_| "a thread panicked")?).collect()
    })?;
    let journal = Journal::create(directory)?;
    for (contender, grants) in grants.into_iter().enumerate() {
        for (token, asked, granted, released) in grants {
            journal.grant(contender, token, asked, granted)?;
            journal.end(token, released, End::Released)?;
        }
    }
    Ok(manager.map_or(Ok(()), |manager| manager.close())?)
}

fn pause(hold: Duration) {
    if !hold.is_zero() {
        thread::sleep(hold);
    }
}

/// Holds many leases, tells what each takes, and what all took between two lines that it is told.
fn holder(url: &str) -> Outcome {
    let manager = Manager::open(url)?;
    let acquire = |at| manager.acquire(format!("job/{at}")).ttl(TTL).wait();
    // What the first lease costs once is not what each costs.
    let first = acquire(0)?;
    let resident = || -> Outcome<u32> {
        let status = fs::read_to_string("/proc/self/status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS in /proc")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u32>()? * 1024)
    };
    let used = || {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0)).as_secs_f64()
    };
    let before = resident()?;
    let mut leases = (1..HELD).map(acquire).collect::<Result<Vec<_>, _>>()?;
    leases.push(first);
    let bytes = resident()?.saturating_sub(before) / HELD;
    println!("held {bytes}");
    told()?;
    let (began, cpu) = (Instant::now(), used());
    told()?;
    let percent = 100.0 * (used() - cpu) / began.elapsed().as_secs_f64();
    if let Some(lost) = leases.iter().find_map(|lease| lease.check().err()) {
        return Err(lost.into());
    }
    println!("used {percent}");
    // So many releases may take longer than closing waits for; what is not told expires.
    drop(manager.close());
    Ok(())
}
