//! Fifty contenders in ten processes want one name. Meanwhile one holder is killed, and another is frozen past its ttl.
//!
//! ```text
//! cargo run --release -p lease-core --example demo -- [--contenders 50] [--processes 10] [--seconds 8] [--url URL]
//! ```
//!
//! Each holder adds one to a number in a database that the lease guards, by reading it and then writing it: without the
//! lease, updates would be lost. The write carries the fencing token in its own condition, `WHERE fence <= token`, which is
//! the durable form of a fence. Each process writes a journal of its own; at the end they are put together and judged. The
//! exit status is 0 only if every guarantee held and everything that was to happen did.

// Shared with the tests, which use other parts of it.
#[allow(dead_code)]
#[path = "../tests/support/mod.rs"]
mod support;

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lease_core::blocking::{Lease, Manager};
use lease_core::clock::Moment;
use lease_core::{ErrorKind, Token};
use rusqlite::{Connection, params};
use rustix::process::{Pid, Signal, kill_process};
use support::journal::{self, End, Holding, Journal, Verdict, judge, percentile};
use support::process::{Worker, told, within};
use support::scratch::Scratch;

const NAME: &str = "nightly";
const TTL: Duration = Duration::from_secs(2);
/// How much later than a ttl a name may stay taken: the stores' documented slack.
const SLACK: Duration = Duration::from_millis(500);
/// The holder is frozen for so long. Its ttl ends meanwhile, and so does every excuse to keep the name for it.
const FROZEN: Duration = Duration::from_millis(2_600);
const SHORTEST: Duration = Duration::from_secs(6);
/// Whoever waits longer than this has met a hang.
const PATIENCE: Duration = Duration::from_secs(15);

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["--be", "contenders", url, directory, first, count] => contenders(url, Path::new(directory), first, count),
        ["--be", "killed", url, directory] => to_be_killed(url, Path::new(directory)),
        ["--be", "frozen", url, directory] => to_be_frozen(url, Path::new(directory)),
        _ => Settings::parse(&words).and_then(|settings| direct(&settings)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

struct Settings {
    contenders: usize,
    processes: usize,
    run: Duration,
    url: Option<String>,
}

impl Settings {
    fn parse(words: &[&str]) -> Outcome<Self> {
        const USAGE: &str = "usage: demo [--contenders N] [--processes N] [--seconds N] [--url URL]";
        let mut settings = Self { contenders: 50, processes: 10, run: Duration::from_secs(8), url: None };
        let (pairs, rest) = words.as_chunks();
        for [key, value] in pairs {
            let number = || value.parse::<u32>().map_err(|_| format!("{key} {value:?} is no number; {USAGE}"));
            match *key {
                "--contenders" => settings.contenders = number()? as usize,
                "--processes" => settings.processes = number()? as usize,
                "--seconds" => settings.run = Duration::from_secs(number()?.into()),
                "--url" => settings.url = Some((*value).to_owned()),
                _ => return Err(format!("unknown option {key:?}; {USAGE}").into()),
            }
        }
        if !rest.is_empty() {
            return Err(USAGE.into());
        }
        if settings.run < SHORTEST {
            return Err(
                format!("--seconds must be at least {}: a ttl of {TTL:?} has to pass", SHORTEST.as_secs()).into()
            );
        }
        if settings.processes == 0 || settings.contenders < settings.processes {
            return Err("--processes must be at least 1, and --contenders at least as many".into());
        }
        if settings.url.as_deref().is_some_and(|url| url.starts_with("memory:")) {
            return Err("--url: a memory store is one process's own; give one that several can share".into());
        }
        Ok(settings)
    }
}

// ------------------------------------------------------------------ in the processes that contend

/// A number that the lease guards, in a database of its own.
struct Resource(Connection);

impl Resource {
    fn open(directory: &Path) -> Outcome<Self> {
        let sql = Connection::open(directory.join("resource.db"))?;
        sql.busy_timeout(PATIENCE)?;
        sql.pragma_update(None, "synchronous", "off")?;
        Ok(Self(sql))
    }

    fn create(directory: &Path) -> Outcome<Self> {
        let this = Self::open(directory)?;
        this.0.pragma_update(None, "journal_mode", "wal")?;
        this.0.execute_batch("CREATE TABLE resource (number, fence); INSERT INTO resource VALUES (0, 0)")?;
        Ok(this)
    }

    fn read(&self) -> Outcome<(i64, i64)> {
        Ok(self.0.query_row("SELECT number, fence FROM resource", [], |row| Ok((row.get(0)?, row.get(1)?)))?)
    }

    /// Writes under a token. `false`: refused, because a newer token has written.
    fn write(&self, number: i64, token: Token) -> Outcome<bool> {
        let write = "UPDATE resource SET number = ?1, fence = ?2 WHERE fence <= ?2";
        Ok(self.0.execute(write, params![number, token.get()])? == 1)
    }
}

/// Some threads that acquire, count and release, until our standard input ends.
fn contenders(url: &str, directory: &Path, first: &str, count: &str) -> Outcome {
    let (first, count): (usize, usize) = (first.parse()?, count.parse()?);
    let (manager, journal) = (Manager::open(url)?, Journal::create(directory)?);
    let over = AtomicBool::new(false);
    println!("ready");
    told()?;
    let contend = |contender| -> Outcome {
        let resource = Resource::open(directory)?;
        while !over.load(Ordering::Relaxed) {
            let lease = acquire(&manager, &journal, contender)?;
            let (number, _) = resource.read()?;
            if !resource.write(number + 1, lease.token())? {
                return Err(format!("the write of the holder of token {} was refused", lease.token()).into());
            }
            if let Some(reason) = lease.end_reason() {
                // The machine was too busy to renew for a second. That is no broken promise: we were told.
                journal.end(lease.token(), Moment::now(), End::Lost)?;
                eprintln!("token {} was lost: {reason}", lease.token());
                continue;
            }
            journal.end(lease.token(), Moment::now(), End::Released)?;
            lease.release()?;
        }
        Ok(())
    };
    thread::scope(|scope| -> Outcome {
        let contend = &contend;
        let threads: Vec<_> = (first..first + count).map(|one| scope.spawn(move || contend(one))).collect();
        told()?;
        over.store(true, Ordering::Relaxed);
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| Err("a contender panicked".into())))
    })?;
    Ok(manager.close()?)
}

fn acquire(manager: &Manager, journal: &Journal, contender: usize) -> Outcome<Lease> {
    let asked = Moment::now();
    let lease = manager.acquire(NAME).ttl(TTL).timeout(PATIENCE).wait()?;
    journal.grant(contender, lease.token(), asked, Moment::now())?;
    Ok(lease)
}

const KILLED: usize = usize::MAX - 1;
const FREEZING: usize = usize::MAX;

/// Holds until it is killed.
fn to_be_killed(url: &str, directory: &Path) -> Outcome {
    let (manager, journal) = (Manager::open(url)?, Journal::create(directory)?);
    println!("ready");
    told()?;
    let lease = acquire(&manager, &journal, KILLED)?;
    println!("holding {}", lease.token());
    told()?;
    Err("nobody killed it".into())
}

/// Holds, is frozen, and does not know it: it asks its lease, as every holder should before each step of its work.
fn to_be_frozen(url: &str, directory: &Path) -> Outcome {
    let (manager, journal) = (Manager::open(url)?, Journal::create(directory)?);
    let resource = Resource::open(directory)?;
    println!("ready");
    told()?;
    let lease = acquire(&manager, &journal, FREEZING)?;
    let (number, _) = resource.read()?;
    // Until then at least it may believe without asking anybody. Renewals after this only make it later.
    let believes_until = Moment::now() + lease.remaining();
    // Read before it says so: from then on it may be frozen.
    let began = Moment::now();
    println!("holding {}", lease.token());
    // Work that takes long and asks nobody, until it finds that the time is another.
    let mut last = began;
    let thawed = loop {
        let now = Moment::now();
        if now.since(last) > TTL {
            break now;
        }
        if now.since(began) > PATIENCE {
            return Err("nobody froze it".into());
        }
        last = now;
        thread::yield_now();
    };
    let checked = lease.check();
    let told_at = Moment::now();
    let reason = match checked {
        Ok(()) => return Err("its first call after the freeze said that it still holds".into()),
        Err(error) => error.reason().ok_or_else(|| format!("not a loss: {error}"))?,
    };
    journal.end(lease.token(), believes_until, End::Lost)?;
    // What a program does that does not ask: it goes on writing.
    let written = resource.write(number + 1, lease.token())?;
    let (_, fence) = resource.read()?;
    println!("told {reason} {} {} {written} {fence}", thawed.as_nanos(), told_at.as_nanos());
    let released = lease.release().map(|()| "released").map_err(|error| error.kind());
    if released != Err(ErrorKind::Lost) {
        return Err(format!("releasing the lost lease said {released:?}").into());
    }
    told()?;
    Ok(manager.close()?)
}

// ------------------------------------------------------------------ in the process that directs them

/// What was done to the holders, and what came of it.
#[derive(Default)]
struct Accidents {
    killed: Option<(i64, Moment)>,
    frozen: Option<Frozen>,
    /// Processes that should have ended well.
    failed: Vec<String>,
}

struct Frozen {
    token: i64,
    stopped: Moment,
    continued: Moment,
    thawed: Moment,
    told: Moment,
    reason: String,
    written: bool,
    fence: i64,
}

fn direct(settings: &Settings) -> Outcome {
    let mut scratch = Scratch::new("lease-demo")?;
    let url = settings.url.clone().unwrap_or_else(|| scratch.sqlite());
    let (contenders, processes) = (settings.contenders, settings.processes);
    println!("{contenders} contenders in {processes} processes want {NAME:?}, with a ttl of {TTL:?}, on {url}");
    println!();
    let done = run(settings, scratch.path(), &url).and_then(|accidents| {
        let holdings = journal::read(scratch.path())?;
        let (number, _) = Resource::open(scratch.path())?.read()?;
        Ok(report(settings, &accidents, &holdings, &judge(&holdings), number))
    });
    match done {
        Ok(broken) if broken.is_empty() => {
            println!("\nEvery guarantee held.");
            return Ok(());
        }
        Ok(broken) => {
            println!();
            broken.iter().take(10).for_each(|broken| println!("BROKEN: {broken}"));
            if broken.len() > 10 {
                println!("BROKEN: and {} more", broken.len() - 10);
            }
        }
        Err(error) => println!("\nFAILED: {error}"),
    }
    scratch.keep();
    Err("not every guarantee held".into())
}

/// Starts everybody, does the harm, and waits until everybody has ended.
fn run(settings: &Settings, directory: &Path, url: &str) -> Outcome<Accidents> {
    Resource::create(directory)?;
    let journal = Journal::create(directory)?;
    let directory_text = directory.to_str().ok_or("the temporary directory is not UTF-8")?;
    let start = |what: String, role: &[&str]| {
        let arguments = [&["--be", role[0], url, directory_text], &role[1..]].concat();
        Worker::start(what, arguments, [("", ""); 0])
    };
    let mut workers = Vec::new();
    for process in 0..settings.processes {
        let share = |process| settings.contenders * process / settings.processes;
        let (first, count) = (share(process), share(process + 1) - share(process));
        workers.push(start(format!("process {process}"), &["contenders", &first.to_string(), &count.to_string()])?);
    }
    let mut victim = start("the process to be killed".into(), &["killed"])?;
    let mut sleeper = start("the process to be frozen".into(), &["frozen"])?;
    let limit = within(settings.run + PATIENCE);
    for worker in workers.iter().chain([&victim, &sleeper]) {
        worker.hear("ready", limit)?;
    }
    for worker in &mut workers {
        worker.tell("go")?;
    }

    let screen = Screen::new(Manager::open(url)?);
    let mut accidents = Accidents::default();
    let quiet = (settings.run.saturating_sub(FROZEN)) / 4;
    screen.pass(quiet)?;

    victim.tell("go")?;
    let token = victim.hear("holding", limit)?;
    // Its belief ends with it, a little after this.
    let killed = Moment::now();
    signal(&victim, Signal::KILL)?;
    journal.end_of(victim.pid(), Token::try_from(token.parse::<i64>()?)?, killed, End::Killed)?;
    accidents.killed = Some((token.parse()?, killed));
    screen.say(format!("process {} was killed (SIGKILL) while it held token {}", victim.pid(), grouped(&token)));
    if victim.finish(limit).is_ok() {
        return Err("the holder that was to be killed ended by itself".into());
    }
    screen.pass(quiet)?;

    sleeper.tell("go")?;
    let token = sleeper.hear("holding", limit)?;
    signal(&sleeper, Signal::STOP)?;
    let stopped = Moment::now();
    screen.say(format!("process {} was frozen (SIGSTOP) while it held token {}", sleeper.pid(), grouped(&token)));
    screen.pass(FROZEN)?;
    let continued = Moment::now();
    signal(&sleeper, Signal::CONT)?;
    screen.say(format!("process {} may go on (SIGCONT); its ttl is long over", sleeper.pid()));
    let told = sleeper.hear("told", limit)?;
    let words: Vec<&str> = told.split(' ').collect();
    let [reason, thawed, told, written, fence] = words[..] else { return Err(format!("odd: {told:?}").into()) };
    let moment = |word: &str| word.parse().map(Moment::from_nanos);
    accidents.frozen = Some(Frozen {
        token: token.parse()?,
        stopped,
        continued,
        thawed: moment(thawed)?,
        told: moment(told)?,
        reason: reason.into(),
        written: written.parse()?,
        fence: fence.parse()?,
    });
    screen.pass(settings.run.saturating_sub(screen.begun.elapsed()))?;

    let limit = within(PATIENCE);
    workers.push(sleeper);
    // All at once: while they end one after the other, they go on contending.
    let ends: Vec<_> = workers.into_iter().map(|worker| thread::spawn(move || worker.finish(limit))).collect();
    for end in ends {
        accidents.failed.extend(end.join().map_err(|_| "a thread panicked")?.err());
    }
    if screen.terminal {
        println!();
    }
    screen.manager.close()?;
    Ok(accidents)
}

fn signal(worker: &Worker, signal: Signal) -> Outcome {
    let pid = i32::try_from(worker.pid()).ok().and_then(Pid::from_raw).ok_or("no process")?;
    Ok(kill_process(pid, signal)?)
}

/// A line that is kept up to date on a terminal; elsewhere one line a pass.
struct Screen {
    begun: Instant,
    manager: Manager,
    terminal: bool,
}

impl Screen {
    fn new(manager: Manager) -> Self {
        Self { begun: Instant::now(), manager, terminal: std::io::stdout().is_terminal() }
    }

    /// Lets the time pass, and shows who holds the name meanwhile.
    fn pass(&self, time: Duration) -> Outcome {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if self.terminal || left.is_zero() {
                let line = match self.manager.inspect(NAME)? {
                    Some(held) => format!("{} holds token {}", held.owner, grouped(held.token)),
                    None => "nobody holds it".into(),
                };
                let (start, end) = if self.terminal { ("\r\x1b[K", "") } else { ("", "\n") };
                print!("{start}{} {line}{end}", self.time());
                std::io::stdout().flush()?;
            }
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(Duration::from_millis(100)));
        }
    }

    fn say(&self, line: impl Display) {
        let start = if self.terminal { "\r\x1b[K" } else { "" };
        println!("{start}{} {line}", self.time());
    }

    fn time(&self) -> String {
        format!("{:5.1} s ", self.begun.elapsed().as_secs_f64())
    }
}

/// Prints what happened. Gives back what must not have.
fn report(
    settings: &Settings,
    accidents: &Accidents,
    holdings: &[Holding],
    verdict: &Verdict,
    number: i64,
) -> Vec<String> {
    let mut broken = [&*accidents.failed, &verdict.disorder, &verdict.overlaps].concat();
    let mut demand = |holds: bool, what: String| broken.extend((!holds).then_some(what));
    let say = |what: &str, line: String| println!("{what:>27}  {line}");

    let shares: Vec<usize> =
        (0..settings.contenders).map(|one| verdict.shares.get(&one).copied().unwrap_or(0)).collect();
    let (least, most) = (shares.iter().min().copied().unwrap_or(0), shares.iter().max().copied().unwrap_or(0));
    let grants: usize = shares.iter().sum();
    println!();
    say("grants", format!("{}; every contender got {} to {}", grouped(grants), grouped(least), grouped(most)));
    demand(least > 0, "a contender got nothing".into());
    demand(grants >= 10 * settings.contenders, format!("only {grants} grants: too few to show anything"));

    let token = |holding: Option<&Holding>| holding.map_or_else(String::new, |holding| grouped(holding.token));
    let ordered =
        if verdict.disorder.is_empty() { "strictly increasing, none twice" } else { "NOT strictly increasing" };
    say("tokens", format!("{} to {}, {ordered}", token(holdings.first()), token(holdings.last())));
    let overlaps = verdict.overlaps.len();
    say("two holders at once", if overlaps == 0 { "never".into() } else { format!("{overlaps} TIMES") });
    let exact = usize::try_from(number) == Ok(grants);
    let updates = if exact { "no update lost" } else { "UPDATES WERE LOST" };
    say("the number they count", format!("{}: {updates}", grouped(number)));
    demand(exact, format!("{number} was counted by {grants} holders: an update was lost"));
    let handovers = &verdict.handovers;
    let (p50, p99) = (percentile(handovers, 50), percentile(handovers, 99));
    say("hand-over across processes", format!("{p50:.1?} p50, {p99:.1?} p99, of {}", grouped(handovers.len())));
    demand(settings.processes == 1 || !handovers.is_empty(), "the name never went from one process to another".into());
    let lost = holdings.iter().filter(|holding| matches!(holding.end, Some((_, End::Lost)))).count();
    if lost > 1 {
        say("lost besides", format!("{}: this machine was too busy to renew within half the ttl", lost - 1));
    }

    let next = |after: Moment| holdings.iter().find(|holding| holding.granted > after);
    match accidents.killed.and_then(|(_, killed)| Some(next(killed)?.granted.since(killed))) {
        Some(free) => {
            say("the killed holder's name", format!("went to the next after {free:.1?} (at most {:?})", TTL + SLACK));
            demand(free <= TTL + SLACK, format!("the killed holder's name was free only after {free:?}"));
        }
        None => demand(false, "nobody got the name of the killed holder".into()),
    }
    match &accidents.frozen {
        Some(frozen) => frozen.report(holdings, demand, say),
        None => demand(false, "no holder was frozen".into()),
    }
    broken
}

impl Frozen {
    fn report(&self, holdings: &[Holding], mut demand: impl FnMut(bool, String), say: impl Fn(&str, String)) {
        let own = holdings.iter().find(|holding| holding.token == self.token).and_then(|holding| holding.end);
        let next = holdings.iter().find(|holding| holding.granted > self.stopped);
        match (own, next) {
            (Some((believed, _)), Some(next)) => {
                let (idle, taken) = (next.granted.since(believed), next.granted < self.continued);
                say(
                    "the frozen holder's name",
                    format!("went to the next {idle:.1?} after it could not believe any more"),
                );
                demand(taken, "nobody got the name while its holder was frozen".into());
            }
            _ => demand(false, "nobody got the name of the frozen holder".into()),
        }
        let (call, since) = (self.told.since(self.thawed), self.told.since(self.continued));
        say(
            "",
            format!("told at its first call, which took {call:.1?}, {since:.1?} after it went on: {}", self.reason),
        );
        let (token, fence) = (grouped(self.token), grouped(self.fence));
        let refused = if self.written { "WAS NOT REFUSED" } else { "was refused as stale" };
        say("", format!("its write under token {token} {refused}: {fence} had written"));
        demand(!self.written, format!("a stale write under token {token} was not refused"));
        demand(self.fence > self.token, format!("nothing newer than {token} had written: the refusal shows nothing"));
    }
}

/// 1234567 as 1,234,567.
fn grouped(number: impl Display) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
