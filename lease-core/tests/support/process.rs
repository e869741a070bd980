//! Processes of our own that are told what to do by lines, and tell by lines what they did. Every wait has a deadline.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// This program, run once more. Killed when dropped, unless it was waited for.
pub(crate) struct Worker {
    what: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Worker {
    /// Runs this program once more. A worker that is left alone ends: its standard input does, when we do.
    pub(crate) fn start<A: AsRef<OsStr>, K: AsRef<OsStr>, V: AsRef<OsStr>>(
        what: impl Into<String>,
        arguments: impl IntoIterator<Item = A>,
        variables: impl IntoIterator<Item = (K, V)>,
    ) -> io::Result<Self> {
        Self::start_by(Command::new(std::env::current_exe()?), what, arguments, variables)
    }

    /// The same by another program, which becomes this one.
    pub(crate) fn start_by<A: AsRef<OsStr>, K: AsRef<OsStr>, V: AsRef<OsStr>>(
        mut command: Command,
        what: impl Into<String>,
        arguments: impl IntoIterator<Item = A>,
        variables: impl IntoIterator<Item = (K, V)>,
    ) -> io::Result<Self> {
        command.args(arguments).envs(variables).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().expect("it is piped"));
        let (tx, lines) = mpsc::channel();
        thread::spawn(move || BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| tx.send(line)));
        Ok(Self { what: what.into(), child, stdin, lines })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Tells it a line.
    pub(crate) fn tell(&mut self, line: &str) -> Result<(), String> {
        let stdin = self.stdin.as_mut().expect("it is open until `finish`");
        writeln!(stdin, "{line}").map_err(|error| format!("{} does not listen: {error}", self.what))
    }

    /// Waits for a line with this word, and gives what follows it. Other lines are passed over.
    pub(crate) fn hear(&self, word: &str, until: Instant) -> Result<String, String> {
        loop {
            match self.line(until)? {
                Some(line) => {
                    if let Some((_, rest)) = line.split_once(word) {
                        return Ok(rest.trim().to_owned());
                    }
                }
                None => return Err(format!("{} ended without saying {word:?}", self.what)),
            }
        }
    }

    /// Shuts its standard input, and waits for it to end well.
    pub(crate) fn finish(mut self, until: Instant) -> Result<(), String> {
        drop(self.stdin.take());
        while self.line(until)?.is_some() {}
        let status = self.child.wait().map_err(|error| error.to_string())?;
        if status.success() { Ok(()) } else { Err(format!("{} failed: {status}", self.what)) }
    }

    /// Its next line, or `None` when it has ended.
    pub(crate) fn line(&self, until: Instant) -> Result<Option<String>, String> {
        match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => Err(format!("{} hangs: it was waited for in vain", self.what)),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended: then there is nothing to kill, and its number is still its own until it was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits on the side of the worker until its standard input has a line, or ends.
pub(crate) fn told() -> io::Result<Option<String>> {
    let mut line = String::new();
    Ok((io::stdin().read_line(&mut line)? > 0).then(|| line.trim().to_owned()))
}

/// From now.
pub(crate) fn within(limit: Duration) -> Instant {
    Instant::now() + limit
}
