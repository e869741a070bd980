//! Other processes: this program, run once more, which uses a file, or does one test alone.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lease_core::blocking::{Lease, Manager};
use lease_core::{Error, ErrorKind};

use crate::support::process::{Worker, told, within};
use crate::{Test, limits, mounts, users};

const DATABASE: &str = "REFUSALS_WORKER";
const ALONE: &str = "REFUSALS_ALONE";
const UMASK: &str = "REFUSALS_UMASK";
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Does what this process was started for; `false` if it is one that runs tests.
pub(crate) fn is_alone() -> bool {
    let Ok(name) = std::env::var(ALONE) else { return false };
    let all: [&[Test]; 3] = [limits::TESTS, mounts::TESTS, users::AS_NOBODY];
    let (_, test) = all.into_iter().flatten().find(|(known, _)| *known == name).expect("it is in a table");
    test();
    true
}

/// Runs one test in a process of its own, which another program starts if one is named.
pub(crate) fn alone(by: &[&str], name: &str) {
    let output = this(by).env(ALONE, name).stdin(Stdio::null()).output().unwrap();
    let told = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{name}, alone: {}\n{told}", output.status);
}

fn this(by: &[&str]) -> Command {
    let this = std::env::current_exe().unwrap();
    let Some((program, arguments)) = by.split_first() else { return Command::new(this) };
    let mut command = Command::new(program);
    command.args(arguments).arg(this);
    command
}

/// Another process that has the file open, or tried to.
pub(crate) struct Other(Worker);

impl Other {
    pub(crate) fn start(db: &Path) -> Self {
        Self::start_by(&[], db, None)
    }

    pub(crate) fn start_by(by: &[&str], db: &Path, umask: Option<&str>) -> Self {
        let mut command = this(by);
        command.env_remove(ALONE);
        let variables = [(DATABASE, db.as_os_str())].into_iter().chain(umask.map(|umask| (UMASK, umask.as_ref())));
        Self(Worker::start_by(command, "the other process", [""; 0], variables).unwrap())
    }

    /// What it answers: `took 1`, `busy`, `held`, `done`, or an error's kind and text.
    pub(crate) fn ask(&mut self, command: &str) -> String {
        self.0.tell(command).unwrap();
        self.0.hear("@", within(PATIENCE)).unwrap()
    }
}

/// The other process. It opens the file when first asked for something.
pub(crate) fn is_wanted() -> bool {
    let Some(db) = std::env::var_os(DATABASE) else { return false };
    if let Ok(mask) = std::env::var(UMASK) {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(u32::from_str_radix(&mask, 8).unwrap()));
    }
    let mut manager = None;
    let mut lease = None;
    while let Some(command) = told().unwrap() {
        match answer(&command, Path::new(&db), &mut manager, &mut lease) {
            Ok(answer) => println!("@{answer}"),
            Err(error) => println!("@{} {error}", error.kind()),
        }
    }
    true
}

fn answer(
    command: &str,
    db: &Path,
    manager: &mut Option<Manager>,
    lease: &mut Option<Lease>,
) -> lease_core::Result<String> {
    if command == "read" {
        // As another program does, with a SQLite of its own.
        let raw = rusqlite::Connection::open(db).unwrap();
        raw.query_row("SELECT count(*) FROM meta", [], |row| row.get::<_, i64>(0)).unwrap();
        return Ok("done".to_owned());
    }
    let manager = match manager {
        Some(manager) => manager,
        None => manager.insert(open(db)?),
    };
    Ok(match command {
        "ping" => {
            manager.ping()?;
            "done".to_owned()
        }
        "take" => {
            *lease = manager.try_acquire("n")?;
            lease.as_ref().map_or("busy".to_owned(), |lease| format!("took {}", lease.token()))
        }
        "held" => match lease.as_ref().expect("it took one").end_reason() {
            None => "held".to_owned(),
            Some(reason) => reason.name().to_owned(),
        },
        "ended" => lease.as_ref().expect("it took one").cancelled().reason.name().to_owned(),
        "confirm" => {
            lease.as_ref().expect("it took one").confirm()?;
            "done".to_owned()
        }
        "release" => {
            lease.take().expect("it took one").release()?;
            "done".to_owned()
        }
        "close" => {
            manager.close()?;
            "done".to_owned()
        }
        other => panic!("no command: {other}"),
    })
}

/// A manager whose leases are renewed each second, and lost after one and a half.
pub(crate) fn open(db: &Path) -> lease_core::Result<Manager> {
    Manager::open(format!("sqlite:{}?ttl=3s", db.display()))
}

/// The error of the file, whoever finds it: opening it, or the first request.
pub(crate) fn refusal(db: &Path) -> Error {
    let opened = open(db).and_then(|manager| {
        let answer = manager.ping();
        manager.close().unwrap();
        answer
    });
    opened.expect_err("it is refused")
}

/// What is refused has to be refused as this, with each of these words in it, one of which is the file's name.
pub(crate) fn assert_refused(db: &Path, kind: ErrorKind, words: &[&str]) {
    let error = refusal(db);
    assert_eq!(error.kind(), kind, "{error}");
    for word in words.iter().chain([&db.file_name().unwrap().to_str().unwrap()]) {
        assert!(error.message().contains(word), "{word:?} is not in: {error}");
    }
}

pub(crate) fn until(what: &str, done: impl Fn() -> bool) {
    let limit = within(PATIENCE);
    while !done() {
        assert!(Instant::now() < limit, "not within {PATIENCE:?}: {what}");
        std::thread::yield_now();
    }
}

/// The same for what takes a while: it asks four times a second.
pub(crate) fn until_slowly(what: &str, mut done: impl FnMut() -> bool) {
    let limit = within(PATIENCE);
    while !done() {
        assert!(Instant::now() < limit, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(250));
    }
}
