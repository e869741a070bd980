//! What the C boundary costs, as ratios to floors of the same run.
//!
//! ```text
//! cargo bench -p lease-ffi [-- --quick]
//! ```
//!
//! `figures.c` is built against the library as `make install` installs it, and measures on its side of the boundary.

// Shared with the benches of the core, which use all of it.
#[allow(dead_code)]
#[path = "../../lease-core/tests/support/measure.rs"]
mod measure;

use std::cell::RefCell;
use std::env;
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use lease_core::blocking::Manager;
use measure::{Aim, Effort, Outcome, head, in_turns, nanos, per_operation, row};

fn main() -> Outcome {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let Some(unknown) = arguments.iter().find(|word| !["--bench", "--quick"].contains(&word.as_str())) {
        return Err(format!("unknown option {unknown:?}; usage: figures [--quick]").into());
    }
    // `cargo bench` says --bench; whoever else runs this wants to see it work, not the figures.
    let full = arguments.iter().any(|word| word == "--bench") && !arguments.iter().any(|word| word == "--quick");
    figures(&if full { Effort::FULL } else { Effort::QUICK })
}

fn figures(effort: &Effort) -> Outcome {
    let c = RefCell::new(Program::build_and_start()?);
    let in_c = |what: &str, times| c.borrow_mut().measure(what, times);
    let (many, few) = (effort.operations, effort.operations / 50);
    head(effort);

    let [clock, check] = in_turns(effort, [&mut || in_c("clock", many), &mut || in_c("check", many)])?;
    row("C: lease_check, at most 150 ns", "one reading of the clock", clock, check, Aim::None);

    let manager = Manager::open("memory:")?;
    let rust = || per_operation(many, |_| Ok(manager.acquire("pair").wait()?.release()?));
    let [rust, pair] = in_turns(effort, [&mut { rust }, &mut || in_c("pair", many)])?;
    row("C: memory: acquire + release", "the same in Rust", rust, pair, Aim::AtMost(1.5));

    let [raw, loss] = in_turns(effort, [&mut || in_c("raw", few), &mut || in_c("loss", few)])?;
    row("C: loss -> readable fd, p50", "eventfd wake of a thread", raw, loss, Aim::AtMost(3.0));
    // The heartbeat's way: timer, library thread, the thread that wakes, the waiter.
    let [timer, beat] = in_turns(effort, [&mut || in_c("timer", few / 20), &mut || in_c("beat", few / 20)])?;
    row("  renewal due -> readable fd, p50", "timerfd due -> read", timer, beat, Aim::None);
    manager.close()?;
    c.into_inner().finish()
}

struct Program {
    child: Child,
    stdin: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Program {
    fn build_and_start() -> Outcome<Self> {
        let (package, tmp) = (Path::new(env!("CARGO_MANIFEST_DIR")), Path::new(env!("CARGO_TARGET_TMPDIR")));
        let (stage, program) = (tmp.join("stage"), tmp.join("figures"));
        let mut install = Command::new("make");
        install.env_remove("MAKEFLAGS").env_remove("MAKELEVEL").arg("-C").arg(package.join("..")).arg("install");
        succeeds(install.arg(format!("PREFIX={}", stage.display())).arg("DESTDIR=").stdout(Stdio::null()))?;
        let mut cc = Command::new(env::var("CC").unwrap_or_else(|_| "cc".into()));
        cc.args(["-O2", "-pthread"]).arg(package.join("benches/figures.c")).arg("-o").arg(&program);
        cc.arg("-I").arg(stage.join("include")).arg("-L").arg(stage.join("lib")).arg("-llease");
        succeeds(cc.arg(format!("-Wl,-rpath,{}", stage.join("lib").display())))?;

        let mut start = Command::new(program);
        start.env_remove("LD_LIBRARY_PATH").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = start.spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (Some(stdin), Some(stdout)) = (stdin, stdout) else { return Err("no pipes".into()) };
        Ok(Self { child, stdin, answers: BufReader::new(stdout).lines() })
    }

    fn measure(&mut self, what: &str, times: u32) -> Outcome<Duration> {
        writeln!(self.stdin, "{what} {times}")?;
        let answer = self.answers.next().ok_or("the program in C ended")??;
        Ok(nanos(answer.parse()?))
    }

    fn finish(mut self) -> Outcome {
        drop(self.stdin);
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { Err(format!("the program in C: {status}").into()) }
    }
}

fn succeeds(command: &mut Command) -> Outcome {
    let status = command.status()?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}").into()) }
}
