//! What the `SQLite` store refuses, and what it says: with real files, file systems, limits, users and processes.
//!
//! Who wants a namespace, or to be somebody else, is this program run once more. What this machine cannot do is shown as
//! ignored, and why; with `TEST_TOOLS=required`, it fails if a program is all that is missing.

// Shared with programs that use other parts of it.
#[allow(dead_code)]
#[path = "../support/mod.rs"]
mod support;

mod files;
mod limits;
mod mounts;
mod users;
mod worker;

use std::process::{Command, ExitCode, Stdio};

use libtest_mimic::{Arguments, Failed, Trial};

/// A test by its name.
type Test = (&'static str, fn());

/// What makes a function of the module a test.
#[macro_export]
macro_rules! tests {
    ($($test:ident),+ $(,)?) => { &[$((stringify!($test), $test)),+] };
}

/// What a test cannot do without: how it is called, how it is tried, and whether a program is all it takes.
struct Need {
    name: &'static str,
    by: &'static [&'static str],
    curable: bool,
}

const MOUNTS: Need = Need { name: "mount namespaces (unshare -Urm)", by: mounts::UNSHARE, curable: false };
const ROOT: Need = Need { name: "root (with setpriv)", by: users::NOBODY, curable: false };

impl Need {
    /// Whether it can run this program.
    fn is_met(&self) -> bool {
        let mut command = Command::new(self.by[0]);
        command.args(&self.by[1..]).args(["test", "-x"]).arg(std::env::current_exe().expect("a path"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }
}

fn main() -> ExitCode {
    if worker::is_wanted() || worker::is_alone() {
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = Vec::new();
    for (module, tests) in [("files", files::TESTS), ("users", users::TESTS)] {
        trials.extend(tests.iter().map(|&(name, test)| trial(module, name, None, test)));
    }
    let alone = |module, tests: &'static [Test], need: Option<Need>| {
        let by = need.as_ref().map_or(&[][..], |need| need.by);
        let lacking = need.filter(|need| !need.is_met());
        if let Some(need) = &lacking {
            eprintln!("THERE IS NO {}: what takes it is not tested.", need.name.to_uppercase());
        }
        let lacks = lacking.map(|need| (need.name, need.curable));
        tests.iter().map(move |&(name, _)| trial(module, name, lacks, move || worker::alone(by, name)))
    };
    trials.extend(alone("limits", limits::TESTS, None));
    trials.extend(alone("mounts", mounts::TESTS, Some(MOUNTS)));
    // Who is not root is nobody already.
    let nobody = rustix::process::geteuid().is_root().then_some(ROOT);
    trials.extend(alone("nobody", users::AS_NOBODY, nobody));
    let is_root = ROOT.is_met();
    let lacks = (!is_root).then_some((ROOT.name, ROOT.curable));
    trials.extend(users::AS_ROOT.iter().map(|&(name, test)| trial("accounts", name, lacks, test)));
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(module: &str, name: &str, lacks: Option<(&'static str, bool)>, test: impl FnOnce() + Send + 'static) -> Trial {
    let required = std::env::var("TEST_TOOLS").is_ok_and(|value| value == "required");
    let run = move || {
        if let Some((what, _)) = lacks {
            return Err(Failed::from(format!("this machine lacks {what}")));
        }
        test();
        Ok(())
    };
    let trial = Trial::test(format!("{module}_{name}"), run);
    match lacks {
        Some((what, curable)) => trial.with_kind(format!("lacks {what}")).with_ignored_flag(!(required && curable)),
        None => trial,
    }
}
