//! What a crash, a power failure and a freeze do to the `SQLite` store, between any two of its system calls.
//!
//! They befall this program, run once more with a small library preloaded that counts the calls and acts at the one it was told
//! (`faults.c`). It takes a C compiler; without one the tests are counted as ignored, and with `TEST_TOOLS=required` they
//! fail. With `SQLITE_ROUNDS=20` the power fails twenty times as often.

// Shared with programs that use other parts of it.
#[allow(dead_code)]
#[path = "../support/mod.rs"]
mod support;

mod crash;
mod frozen;
mod power;
mod subject;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

/// How often what is random is done, compared with a plain run.
fn rounds() -> u64 {
    std::env::var("SQLITE_ROUNDS").map_or(1, |rounds| rounds.parse().expect("SQLITE_ROUNDS is a number"))
}

fn main() -> ExitCode {
    if subject::is_wanted() {
        return ExitCode::SUCCESS;
    }
    let mut arguments = Arguments::from_args();
    // They wait much more than they work.
    arguments.test_threads.get_or_insert(16);
    let library = if arguments.list { Ok(()) } else { subject::build() };
    let is_required = std::env::var("TEST_TOOLS").is_ok_and(|value| value == "required");
    let trial = |name: String, test: Box<dyn FnOnce() + Send>| {
        let lack = library.clone().err();
        let is_ignored = lack.is_some() && !is_required;
        let run = move || {
            if let Some(lack) = lack {
                return Err(lack.into());
            }
            test();
            Ok(())
        };
        Trial::test(name, run).with_ignored_flag(is_ignored)
    };
    let crashes = crash::OPERATIONS
        .iter()
        .map(|operation| trial(format!("crash_{}", operation.name()), Box::new(|| crash::at_every_step(*operation))));
    let freezes =
        frozen::FREEZES.iter().map(|freeze| trial(format!("frozen_{freeze}"), Box::new(|| frozen::run(freeze))));
    let power = trial("power_failure".into(), Box::new(power::failures));
    let trials = std::iter::once(power).chain(crashes).chain(freezes).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if let Err(lack) = &library {
        eprintln!("sqlite_faults: {lack}");
    }
    subject::clean_up();
    conclusion.exit_code()
}
