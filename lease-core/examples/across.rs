//! Contenders in Rust for a name that those of other languages want too, and the judge of them all: see `tests/across`.
//!
//! ```text
//! across work|unlocked URL DIRECTORY GRANTS CONTENDERS
//! across hold URL DIRECTORY
//! across judge DIRECTORY
//! ```

// Shared with the tests, which use other parts of it.
#[allow(dead_code)]
#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{ExitCode, exit};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use lease_core::blocking::{Lease, Manager};
use lease_core::clock::Moment;
use lease_core::{Error, Token};
use support::journal::{self, End, Journal};
use support::process::told;

const USAGE: &str =
    "usage: across work|unlocked URL DIRECTORY GRANTS CONTENDERS | hold URL DIRECTORY | judge DIRECTORY";
const NAME: &str = "across";
/// Whoever waits longer than this has met a hang.
const PATIENCE: Duration = Duration::from_secs(60);

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["work", url, directory, grants, contenders] => work(Some(url), Path::new(directory), grants, contenders),
        ["unlocked", _, directory, grants, contenders] => work(None, Path::new(directory), grants, contenders),
        ["hold", url, directory] => hold(url, Path::new(directory)),
        ["judge", directory] => judge(Path::new(directory)),
        _ => Err(USAGE.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("across: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A count and the newest token. Nothing but the lease keeps it from losing updates.
struct Resource(File);

impl Resource {
    fn open(directory: &Path) -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(directory.join("resource")).map(Self)
    }

    /// Counts one more under a token. `false`: refused, because a newer token has written.
    fn write(&self, token: Token) -> io::Result<bool> {
        let mut fields = [[0; 8]; 2];
        self.0.read_exact_at(fields.as_flattened_mut(), 0)?;
        let [count, fence] = fields.map(i64::from_le_bytes);
        if token.get() < fence {
            return Ok(false);
        }
        // Here another comes in between, if another can.
        thread::sleep(Duration::from_micros(200));
        self.0.write_all_at([count + 1, token.get()].map(i64::to_le_bytes).as_flattened(), 0)?;
        Ok(true)
    }
}

/// Takes so many grants a contender, and more until our standard input ends. Without a URL it takes no lease.
fn work(url: Option<&str>, directory: &Path, grants: &str, contenders: &str) -> Outcome {
    let (grants, contenders): (usize, usize) = (grants.parse()?, contenders.parse()?);
    let (journal, resource) = (Journal::create(directory)?, Resource::open(directory)?);
    let manager = url.map(Manager::open).transpose()?;
    let (made_up, over) = (AtomicI64::new(1), AtomicBool::new(false));
    let (granted, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    println!("ready");
    told()?;
    let turn = |contender| -> Outcome {
        let asked = Moment::now();
        let lease = manager.as_ref().map(acquire).transpose()?;
        let token = match &lease {
            Some(lease) => lease.token(),
            None => Token::try_from(made_up.fetch_add(1, Ordering::Relaxed))?,
        };
        journal.grant(contender, token, asked, Moment::now())?;
        granted.fetch_add(1, Ordering::Relaxed);
        lease.as_ref().map_or(Ok(()), |lease| lease.check())?;
        if !resource.write(token)? {
            refused.fetch_add(1, Ordering::Relaxed);
        }
        journal.end(token, Moment::now(), End::Released)?;
        Ok(lease.map_or(Ok(()), Lease::release)?)
    };
    let contend = |contender| {
        let mut taken = 0;
        while taken < grants || !over.load(Ordering::Relaxed) {
            if let Err(error) = turn(contender) {
                // At once: who waits for this process waits for nothing.
                eprintln!("across: contender {contender}: {error}");
                exit(1);
            }
            taken += 1;
        }
    };
    thread::scope(|scope| -> io::Result<()> {
        for contender in 0..contenders {
            let contend = &contend;
            scope.spawn(move || contend(contender));
        }
        while told()?.is_some() {}
        over.store(true, Ordering::Relaxed);
        Ok(())
    })?;
    manager.map_or(Ok(()), |manager| manager.close())?;
    println!("done {} {}", granted.into_inner(), refused.into_inner());
    Ok(())
}

fn acquire(manager: &Manager) -> Result<Lease, Error> {
    manager.acquire(NAME).timeout(PATIENCE).wait()
}

/// Holds, and does what it is told; it may be killed or stopped meanwhile.
fn hold(url: &str, directory: &Path) -> Outcome {
    let (journal, resource) = (Journal::create(directory)?, Resource::open(directory)?);
    let manager = Manager::open(url)?;
    let asked = Moment::now();
    let lease = acquire(&manager)?;
    let (token, granted) = (lease.token(), Moment::now());
    journal.grant(0, token, asked, granted)?;
    // Until then at least it may believe without asking anybody.
    let until = granted + lease.remaining();
    if !resource.write(token)? {
        return Err("the write of a holder was refused".into());
    }
    println!("holding {token} {}", until.as_nanos());
    let lost = |error: &Error| -> Outcome {
        let reason = error.reason().ok_or_else(|| format!("not a loss: {error}"))?;
        println!("lost {}", reason.code());
        Ok(())
    };
    while let Some(command) = told()? {
        match &*command {
            "check" => match lease.check() {
                Ok(()) => println!("held"),
                Err(error) => {
                    journal.end(token, until, End::Lost)?;
                    lost(&error)?;
                }
            },
            // What a program does that does not ask: it goes on writing.
            "write" => println!("{}", if resource.write(token)? { "written" } else { "refused" }),
            "release" => {
                if lease.is_held() {
                    journal.end(token, Moment::now(), End::Released)?;
                }
                match lease.release() {
                    Ok(()) => println!("released"),
                    Err(error) => lost(&error)?,
                }
                break;
            }
            _ => return Err(format!("no command: {command:?}").into()),
        }
    }
    Ok(manager.close()?)
}

/// Judges all journals in the directory.
fn judge(directory: &Path) -> Outcome {
    let holdings = journal::read(directory)?;
    let verdict = journal::judge(&holdings);
    let processes: BTreeSet<u32> = holdings.iter().map(|holding| holding.pid).collect();
    let (overlaps, disorder) = (verdict.overlaps.len(), verdict.disorder.len());
    println!("holdings={} processes={} overlaps={overlaps} disorder={disorder}", holdings.len(), processes.len());
    verdict.overlaps.iter().chain(&verdict.disorder).take(10).for_each(|broken| eprintln!("across: {broken}"));
    if overlaps + disorder > 0 {
        return Err("the journals cannot be true".into());
    }
    Ok(())
}
