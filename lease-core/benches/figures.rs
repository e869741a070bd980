//! What a lease costs, as ratios to a raw floor measured in the same run.
//!
//! ```text
//! cargo bench -p lease-core [-- --quick]
//! ```
//!
//! A figure alone says more of the machine than of the library. So each row has a floor that no lock of its kind can go
//! below, floor and subject are measured in turns, and medians of the rounds are compared. A missed aim is printed as such;
//! the exit status is about whether it could be measured.

// Shared with the tests, which use other parts of it.
#[allow(dead_code)]
#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::fs::{self, File};
use std::future::Future;
use std::hint::black_box;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use lease_core::blocking::Manager;
use lease_core::clock::Moment;
use rusqlite::{Connection, params};
use rustix::fs::{FlockOperation, flock};
use rustix::time::{ClockId, clock_gettime};
use support::journal::{self, End, Journal, judge, percentile};
use support::measure::{Aim, Effort, Outcome, head, in_turns, median, nanos, per_operation, print_row, rates, row};
use support::process::{Worker, told, within};
use support::scratch::Scratch;

const NAME: &str = "nightly";
const PROCESSES: usize = 8;
const TASKS: usize = 50;
const HELD: usize = 10_000;
/// Whatever takes longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["--be", "contender", directory] => contender(Path::new(directory)),
        ["--be", "echo", directory] => echo(Path::new(directory)),
        ["--be", "holder", url, seconds] => holder(url, seconds),
        ["--be", "victim", url] => victim(url),
        _ => {
            if let Some(unknown) = words.iter().find(|word| !["--bench", "--quick"].contains(word)) {
                return Err(format!("unknown option {unknown:?}; usage: figures [--quick]").into());
            }
            // `cargo bench` says --bench; whoever else runs this wants to see it work, not the figures.
            let quick = words.contains(&"--quick") || !words.contains(&"--bench");
            figures(&if quick { Effort::QUICK } else { Effort::FULL })
        }
    }
}

fn figures(effort: &Effort) -> Outcome {
    head(effort);
    memory_pair(effort)?;
    tasks(effort)?;
    check(effort)?;
    sqlite_pair(effort)?;
    sqlite_processes(effort)?;
    sqlite_kill(effort)?;
    held(effort)
}

// ------------------------------------------------------------------------------- the rows

fn memory_pair(effort: &Effort) -> Outcome {
    let scratch = Scratch::new("lease-bench")?;
    let manager = Manager::open("memory:")?;
    let table = Mutex::new(HashMap::new());
    let file = File::create(scratch.path().join("flock"))?;
    let [map, flocks, pair] = in_turns(
        effort,
        [
            &mut || {
                per_operation(effort.operations, |at| {
                    table.lock().expect("nobody panics").insert(NAME.to_owned(), at);
                    black_box(table.lock().expect("nobody panics").remove(NAME));
                    Ok(())
                })
            },
            &mut || {
                per_operation(effort.operations, |_| {
                    flock(&file, FlockOperation::LockExclusive)?;
                    Ok(flock(&file, FlockOperation::Unlock)?)
                })
            },
            &mut || per_operation(effort.operations, |_| Ok(manager.acquire(NAME).wait()?.release()?)),
        ],
    )?;
    row("memory: acquire + release", "Mutex<HashMap> insert + remove", map, pair, Aim::AtMost(8.0));
    row("memory: acquire + release", "flock + unlock", flocks, pair, Aim::None);
    Ok(manager.close()?)
}

/// Each holds while the others get to run, so that they queue: else a task would meet nobody and hand nothing over.
fn tasks(effort: &Effort) -> Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let manager = runtime.block_on(lease_core::Manager::open("memory:"))?;
    let mutex = Arc::new(tokio::sync::Mutex::new(()));
    let (mut floor_shares, mut shares) = (Vec::new(), Vec::new());
    let [floor, leases] = in_turns(
        effort,
        [
            &mut || {
                let mutex = mutex.clone();
                hand_over(&runtime, effort.round, &mut floor_shares, move || {
                    let mutex = mutex.clone();
                    async move {
                        let _held = mutex.lock().await;
                        tokio::task::yield_now().await;
                        Ok(())
                    }
                })
            },
            &mut || {
                let manager = manager.clone();
                hand_over(&runtime, effort.round, &mut shares, move || {
                    let manager = manager.clone();
                    async move {
                        let lease = manager.acquire(NAME).await?;
                        tokio::task::yield_now().await;
                        Ok(lease.release().await?)
                    }
                })
            },
        ],
    )?;
    // Rates, so the other way round.
    let what = format!("memory: {TASKS} tasks, hand-overs/s");
    rates(&what, "tokio::sync::Mutex", 1.0 / floor.as_secs_f64(), 1.0 / leases.as_secs_f64(), 0.5);
    let (most, floor_most) = (median(&mut shares), median(&mut floor_shares));
    print_row("  the most of a task / the fewest", "", &format!("{floor_most:.2}"), &format!("{most:.2}"), "", "");
    Ok(runtime.block_on(manager.close())?)
}

fn check(effort: &Effort) -> Outcome {
    let manager = Manager::open("memory:")?;
    let lease = manager.acquire(NAME).wait()?;
    let [clock, check] = in_turns(
        effort,
        [
            &mut || {
                per_operation(effort.operations, |_| {
                    black_box(Moment::now());
                    Ok(())
                })
            },
            &mut || per_operation(effort.operations, |_| Ok(lease.check()?)),
        ],
    )?;
    row("lease.check()", "one reading of the clock", clock, check, Aim::None);
    Ok(manager.close()?)
}

fn sqlite_pair(effort: &Effort) -> Outcome {
    let scratch = Scratch::new("lease-bench")?;
    let manager = Manager::open(scratch.sqlite())?;
    let raw = Raw::create(scratch.path())?;
    manager.acquire(NAME).wait()?.release()?;
    let operations = effort.operations / 50;
    let [floor, pair] = in_turns(
        effort,
        [&mut || per_operation(operations, |_| raw.pair()), &mut || {
            per_operation(operations, |_| Ok(manager.acquire(NAME).wait()?.release()?))
        }],
    )?;
    row("sqlite: acquire + release", "two raw commits", floor, pair, Aim::AtMost(1.2));
    Ok(manager.close()?)
}

fn sqlite_processes(effort: &Effort) -> Outcome {
    let scratch = Scratch::new("lease-bench")?;
    let raw = Raw::create(scratch.path())?;
    let wakes = Wakes::start(scratch.path())?;
    let operations = effort.operations / 50;
    let (mut handovers, mut p99s) = (Vec::new(), Vec::new());
    let [pair, wake, change] = in_turns(
        effort,
        [
            &mut || per_operation(operations, |_| raw.pair()),
            // There and back are two.
            &mut || Ok(per_operation(operations, |_| wakes.there_and_back())? / 2),
            &mut || {
                let (change, of_round) = owner_changes(effort)?;
                handovers.push(percentile(&of_round, 50));
                p99s.push(percentile(&of_round, 99));
                Ok(change)
            },
        ],
    )?;
    let (change_floor, hand_over_floor) = (pair / 2 + wake, pair + wake);
    let what = format!("sqlite: {PROCESSES} processes, owner changes/s");
    rates(&what, "one raw commit + one wake", 1.0 / change_floor.as_secs_f64(), 1.0 / change.as_secs_f64(), 0.2);
    let aim = Aim::AtMost(3.0);
    row(
        "sqlite: release -> next returned, p50",
        "two raw commits + one wake",
        hand_over_floor,
        median(&mut handovers),
        aim,
    );
    row("sqlite: release -> next returned, p99", "two raw commits + one wake", hand_over_floor, median(&mut p99s), aim);
    Ok(())
}

/// From the kill of a holder to the next one's return.
fn sqlite_kill(effort: &Effort) -> Outcome {
    let scratch = Scratch::new("lease-bench")?;
    let manager = Manager::open(scratch.sqlite())?;
    let mut times = Vec::new();
    for _ in 0..effort.rounds * 3 {
        let victim = Worker::start("the victim", ["--be", "victim", &scratch.sqlite()], [("", ""); 0])?;
        victim.hear("held", within(PATIENCE))?;
        let pid = rustix::process::Pid::from_raw(victim.pid().try_into()?).ok_or("no process")?;
        times.push(thread::scope(|scope| -> Outcome<Duration> {
            let next = scope.spawn(|| {
                let lease = manager.acquire(NAME).timeout(PATIENCE).wait()?;
                Ok::<_, lease_core::Error>((Instant::now(), lease.release()?))
            });
            // It waits by then; if not, it comes later, and asks the kernel itself.
            thread::sleep(Duration::from_millis(20));
            let killed = Instant::now();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
            let (got, ()) = next.join().map_err(|_| "a thread panicked")??;
            Ok(got.saturating_duration_since(killed))
        })?);
    }
    times.sort_unstable();
    let figure = format!("{:.1?}, at most {:.1?}", times[times.len() / 2], times[times.len() - 1]);
    print_row("sqlite: SIGKILL of the holder, ttl 30 s", "", "", &figure, "", "<= 50ms");
    Ok(manager.close()?)
}

/// Holds until it is killed.
fn victim(url: &str) -> Outcome {
    let manager = Manager::open(url)?;
    let _lease = manager.acquire(NAME).ttl(Duration::from_secs(30)).wait()?;
    println!("held");
    drop(told());
    Ok(())
}

fn held(effort: &Effort) -> Outcome {
    let scratch = Scratch::new("lease-bench")?;
    for (store, url) in [("memory", "memory:".to_owned()), ("sqlite", scratch.sqlite())] {
        let arguments = ["--be", "holder", &url, &effort.held_seconds.to_string()];
        let worker = Worker::start("the holder of many", arguments, [("", ""); 0])?;
        let limit = within(PATIENCE);
        let answer = worker.hear("held", limit)?;
        worker.finish(limit)?;
        let [percent, bytes] = answer.split(' ').collect::<Vec<_>>()[..] else { return Err("odd answer".into()) };
        let what = format!("{store}: {HELD} leases held, ttl 10 s");
        print_row(&what, "", "", &format!("{percent} % of a core"), "", "-");
        print_row("", "", "", &format!("{bytes} bytes each"), "", "-");
    }
    Ok(())
}

// ------------------------------------------------------------------------------- the floors

/// A database without a lease manager: the rows that a claim writes, in transactions of the same kind.
struct Raw(Connection);

impl Raw {
    fn create(directory: &Path) -> Outcome<Self> {
        let sql = Connection::open(directory.join("raw.db"))?;
        sql.pragma_update(None, "journal_mode", "wal")?;
        sql.pragma_update(None, "synchronous", "normal")?;
        sql.execute_batch(
            "CREATE TABLE line (name TEXT NOT NULL, token INTEGER NOT NULL, claim BLOB NOT NULL, ttl INTEGER NOT NULL,
                deadline INTEGER NOT NULL, turn INTEGER NOT NULL, held_at INTEGER NOT NULL, bell TEXT NOT NULL,
                owner TEXT NOT NULL, PRIMARY KEY (name, token)) STRICT, WITHOUT ROWID;
             CREATE TABLE meta (id INTEGER PRIMARY KEY, next_token INTEGER NOT NULL) STRICT;
             INSERT INTO meta VALUES (1, 1);",
        )?;
        Ok(Self(sql))
    }

    /// One commit that enters, one that leaves.
    fn pair(&self) -> Outcome {
        let run = |text| -> rusqlite::Result<usize> { self.0.prepare_cached(text)?.execute([]) };
        run("BEGIN IMMEDIATE")?;
        let token: i64 = self.0.prepare_cached("SELECT next_token FROM meta")?.query_row([], |row| row.get(0))?;
        self.0.prepare_cached("INSERT INTO line VALUES (?1, ?2, ?3, 30, 60, 0, 0, ?4, ?5)")?.execute(params![
            NAME,
            token,
            [7_u8; 16],
            "raw.db-bell-0123456789abcdef",
            "host:12345"
        ])?;
        run("UPDATE meta SET next_token = next_token + 1")?;
        run("COMMIT")?;
        run("BEGIN IMMEDIATE")?;
        self.0.prepare_cached("DELETE FROM line WHERE name = ?1 AND token = ?2")?.execute(params![NAME, token])?;
        run("COMMIT")?;
        Ok(())
    }
}

/// A process that answers each datagram with one: what it costs at least to wake somebody.
struct Wakes {
    socket: UnixDatagram,
    _worker: Worker,
}

impl Wakes {
    fn start(directory: &Path) -> Outcome<Self> {
        let socket = UnixDatagram::bind(directory.join("caller"))?;
        let text = directory.to_str().ok_or("the temporary directory is not UTF-8")?;
        let worker = Worker::start("the echo", ["--be", "echo", text], [("", ""); 0])?;
        worker.hear("ready", within(PATIENCE))?;
        socket.connect(directory.join("echo"))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { socket, _worker: worker })
    }

    fn there_and_back(&self) -> Outcome {
        self.socket.send(&[1])?;
        self.socket.recv(&mut [0])?;
        Ok(())
    }
}

fn echo(directory: &Path) -> Outcome {
    let socket = UnixDatagram::bind(directory.join("echo"))?;
    socket.connect(directory.join("caller"))?;
    println!("ready");
    thread::spawn(|| {
        // Nobody sends any more, and a socket does not tell so.
        drop(told());
        std::process::exit(0);
    });
    loop {
        socket.recv(&mut [0])?;
        socket.send(&[1])?;
    }
}

// ------------------------------------------------------------------------------- processes of the subject

/// The time between two grants while some processes contend, and the hand-overs, sorted.
fn owner_changes(effort: &Effort) -> Outcome<(Duration, Vec<Duration>)> {
    let scratch = Scratch::new("lease-bench")?;
    let text = scratch.path().to_str().ok_or("the temporary directory is not UTF-8")?;
    let limit = within(PATIENCE);
    let start = |one| Worker::start(format!("contender {one}"), ["--be", "contender", text], [("", ""); 0]);
    let mut workers = (0..PROCESSES).map(start).collect::<Result<Vec<_>, _>>()?;
    for worker in &workers {
        worker.hear("ready", limit)?;
    }
    for worker in &mut workers {
        worker.tell("go")?;
    }
    thread::sleep(effort.round);
    let ends: Vec<_> = workers.into_iter().map(|worker| thread::spawn(move || worker.finish(limit))).collect();
    for end in ends {
        end.join().map_err(|_| "a thread panicked")??;
    }
    let holdings = journal::read(scratch.path())?;
    let verdict = judge(&holdings);
    let (Some(first), Some(last)) = (holdings.first(), holdings.last()) else { return Err("no grant".into()) };
    if !verdict.overlaps.is_empty() || !verdict.disorder.is_empty() {
        return Err(format!("the figures of a broken lock are worth nothing: {verdict:?}").into());
    }
    let changes = u32::try_from(holdings.len() - 1)?;
    Ok((last.granted.since(first.granted) / changes.max(1), verdict.handovers))
}

/// Acquires and releases until its standard input ends. Writes its journal then, so as not to measure that.
fn contender(directory: &Path) -> Outcome {
    let manager = Manager::open(format!("sqlite:{}", directory.join("leases.db").display()))?;
    manager.ping()?;
    let over = AtomicBool::new(false);
    println!("ready");
    told()?;
    let mut grants = Vec::new();
    thread::scope(|scope| -> Outcome {
        scope.spawn(|| {
            // Its end is what is waited for; that of a broken pipe is one too.
            drop(told());
            over.store(true, Ordering::Relaxed);
        });
        while !over.load(Ordering::Relaxed) {
            let asked = Moment::now();
            let lease = manager.acquire(NAME).timeout(PATIENCE).wait()?;
            let granted = Moment::now();
            let token = lease.token();
            let released = Moment::now();
            lease.release()?;
            grants.push((token, asked, granted, released));
        }
        Ok(())
    })?;
    let journal = Journal::create(directory)?;
    for (token, asked, granted, released) in grants {
        journal.grant(0, token, asked, granted)?;
        journal.end(token, released, End::Released)?;
    }
    Ok(manager.close()?)
}

/// Holds many leases for so many seconds, and tells what that took.
fn holder(url: &str, seconds: &str) -> Outcome {
    let manager = Manager::open(url)?;
    let acquire = |at| manager.acquire(format!("job/{at}")).ttl(Duration::from_secs(10)).wait();
    // What the first lease costs once is not what each costs.
    let first = acquire(0)?;
    let resident = || -> Outcome<usize> {
        let status = fs::read_to_string("/proc/self/status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS in /proc")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<usize>()? * 1024)
    };
    let used = || {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0)).as_secs_f64()
    };
    let before = resident()?;
    let mut leases = (1..HELD).map(acquire).collect::<Result<Vec<_>, _>>()?;
    leases.push(first);
    let bytes = resident()?.saturating_sub(before) / HELD;
    let (began, cpu) = (Instant::now(), used());
    thread::sleep(Duration::from_secs(seconds.parse()?));
    let percent = 100.0 * (used() - cpu) / began.elapsed().as_secs_f64();
    if let Some(lost) = leases.iter().find_map(|lease| lease.check().err()) {
        return Err(lost.into());
    }
    println!("held {percent:.1} {bytes}");
    Ok(manager.close()?)
}

/// The time between two grants while tasks contend. Notes how unequal their shares were.
fn hand_over<F>(
    runtime: &tokio::runtime::Runtime,
    round: Duration,
    unequal: &mut Vec<f64>,
    hold: impl Fn() -> F + Clone + Send + 'static,
) -> Outcome<Duration>
where
    F: Future<Output = Outcome> + Send,
{
    let over = Arc::new(AtomicBool::new(false));
    let began = Instant::now();
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let (over, hold) = (over.clone(), hold.clone());
            runtime.spawn(async move {
                let mut share = 0_u32;
                while !over.load(Ordering::Relaxed) {
                    hold().await?;
                    share += 1;
                }
                Outcome::Ok(share)
            })
        })
        .collect();
    thread::sleep(round);
    over.store(true, Ordering::Relaxed);
    let shares = tasks.into_iter().map(|task| runtime.block_on(task)?).collect::<Outcome<Vec<u32>>>()?;
    let (least, most) = (shares.iter().min(), shares.iter().max());
    unequal.push(f64::from(*most.unwrap_or(&0)) / f64::from(*least.unwrap_or(&0)));
    Ok(nanos(began.elapsed().as_secs_f64() * 1e9 / f64::from(shares.iter().sum::<u32>())))
}
