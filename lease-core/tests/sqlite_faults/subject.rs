//! The processes that the faults befall: this program once more, with `faults.c` preloaded.

use std::fmt::Display;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use crate::support::process::{Worker, told, within};
use crate::{crash, frozen, power};

const SUBJECT: &str = "SQLITE_FAULTS_SUBJECT";
/// The database file that it uses, and that is acted upon.
const FILE: &str = "FAULTS_FILE";
/// What has not happened by then does not happen.
pub(crate) const LIMIT: Duration = Duration::from_secs(40);

/// Does what this process was started for; `false` if it is one that runs tests.
pub(crate) fn is_wanted() -> bool {
    let Ok(what) = std::env::var(SUBJECT) else { return false };
    let file = PathBuf::from(std::env::var_os(FILE).unwrap());
    match &*what {
        "crash" => crash::subject(&file),
        "frozen" => frozen::subject(&file),
        _ => power::subject(&file),
    }
    true
}

fn library() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("sqlite-faults-{}.so", std::process::id()))
}

/// Compiles what is preloaded.
pub(crate) fn build() -> Result<(), String> {
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let mut words = compiler.split(' ');
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sqlite_faults/faults.c");
    let output = Command::new(words.next().unwrap_or_default())
        .args(words)
        .args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread", "-o"])
        .args([&library(), &source])
        .arg("-ldl")
        .output()
        .map_err(|error| format!("this machine lacks a C compiler ({compiler}: {error})"))?;
    // A compiler that is there has to understand it.
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

pub(crate) fn clean_up() {
    let _ = fs::remove_file(library());
}

/// Starts a process that is told what to do with the database file.
pub(crate) fn start(what: &str, file: &Path, more: &[(&str, &Path)]) -> Worker {
    let library = library();
    let variables = [(SUBJECT, Path::new(what)), (FILE, file), ("LD_PRELOAD", &library)];
    Worker::start(what, [""; 0], variables.into_iter().chain(more.iter().copied())).unwrap()
}

/// Tells it, and waits for its answer.
pub(crate) fn ask(subject: &mut Worker, command: impl Display) -> String {
    subject.tell(&command.to_string()).unwrap();
    answer(subject).expect("it lives")
}

/// Its next answer, or `None` if it is dead.
pub(crate) fn answer(subject: &Worker) -> Option<String> {
    let limit = within(LIMIT);
    loop {
        if let Some((_, answer)) = subject.line(limit).unwrap()?.split_once('@') {
            return Some(answer.to_owned());
        }
    }
}

/// On the side of the subject: does each command, and says what came of it.
pub(crate) fn obey(mut act: impl FnMut(&[&str]) -> String) {
    while let Some(command) = told().unwrap() {
        match *command.split(' ').collect::<Vec<_>>() {
            ["order", signal, step] => {
                order(signal, step);
                println!("@ordered");
            }
            ref words => println!("@{}", act(words)),
        }
    }
}

/// On the side of the subject: `KILL` or `STOP` at that step from now.
pub(crate) fn order(signal: &str, step: impl Display) {
    File::open(format!("/@faults/{signal}/{step}")).expect_err("there is no such file");
}

/// Whether the file is whole, and how many claims are in it.
pub(crate) fn claims_in(file: &Path) -> i64 {
    let raw = Connection::open(file).unwrap();
    let verdict: String = raw.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok", "{}", file.display());
    raw.query_row("SELECT count(*) FROM line", [], |row| row.get(0)).unwrap()
}

pub(crate) fn names_in(directory: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<_> = fs::read_dir(directory).unwrap().map(name).collect();
    names.sort();
    names
}

pub(crate) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let limit = within(LIMIT);
    while !done() {
        assert!(Instant::now() < limit, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
