//! What needs a process of its own, because it is about the whole process: this program, run once more.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use crate::rules::Rule;
use crate::{access, namespace, wall_clock};

const WHAT: &str = "ETCD_ALONE";
const VERSION: &str = "ETCD_ALONE_VERSION";

/// What is done alone, by its name.
const ALONE: &[&[Rule]] = &[access::ALONE, namespace::ALONE, wall_clock::ALONE];

/// Does what this process was started for; `false` if it is one that runs tests.
pub(crate) fn is_wanted() -> bool {
    let Ok(what) = std::env::var(WHAT) else { return false };
    let version = std::env::var(VERSION).unwrap();
    let (_, rule) = ALONE.iter().copied().flatten().find(|(name, _)| *name == what).expect("it is in the table");
    rule(&version);
    true
}

/// The variables that make this program do it.
pub(crate) fn variables(what: &str, version: &str) -> [(&'static str, String); 2] {
    [(WHAT, what.to_owned()), (VERSION, version.to_owned())]
}

/// Runs this program, by a program that is given it as its last argument if there is one, and fails when it does.
pub(crate) fn run<A: AsRef<OsStr>>(by: Option<(&str, &[A])>, what: &str, version: &str) {
    let this = std::env::current_exe().unwrap();
    let mut command = match by {
        None => Command::new(this),
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments).arg(this);
            command
        }
    };
    command.envs(variables(what, version)).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = command.output().unwrap();
    let told = [&*String::from_utf8_lossy(&output.stdout), &*String::from_utf8_lossy(&output.stderr)].concat();
    println!("{told}");
    assert!(output.status.success(), "{what}, alone: {}\n{told}", output.status);
}
