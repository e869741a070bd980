//! Who held when, as the holders themselves saw it, and whether that can be true.
//!
//! Every process appends to a file of its own: one `write` a line, so that a kill loses no line and tears none. The clock
//! is the machine's, the same in every process. A holding lasts from `acquire` having returned to `release` being called:
//! the longest that any user could believe, and not a nanosecond more.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use lease_core::Token;
use lease_core::clock::Moment;

/// An append-only file of one process.
pub(crate) struct Journal {
    file: File,
    pid: u32,
}

/// How a holding ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Its holder called `release`.
    Released,
    /// Its holder was told that it was lost.
    Lost,
    /// Its holder was killed.
    Killed,
}

/// One grant, and how long its holder could believe in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holding {
    pub(crate) pid: u32,
    pub(crate) contender: usize,
    pub(crate) token: i64,
    /// When `acquire` was called.
    pub(crate) asked: Moment,
    /// When it had returned.
    pub(crate) granted: Moment,
    /// `None`: its holder still believes in it, as far as the journal knows.
    pub(crate) end: Option<(Moment, End)>,
}

impl Journal {
    /// Begins this process's journal in the directory.
    pub(crate) fn create(directory: &Path) -> io::Result<Self> {
        let pid = std::process::id();
        let path = directory.join(format!("{pid}.journal"));
        Ok(Self { file: OpenOptions::new().create(true).append(true).open(path)?, pid })
    }

    /// `acquire`, called by this contender at `asked`, has returned at `granted`.
    pub(crate) fn grant(&self, contender: usize, token: Token, asked: Moment, granted: Moment) -> io::Result<()> {
        let (pid, asked, granted) = (self.pid, asked.as_nanos(), granted.as_nanos());
        self.line(&format!("grant {pid} {contender} {token} {asked} {granted}\n"))
    }

    /// The belief of this process ended at that instant.
    pub(crate) fn end(&self, token: Token, at: Moment, end: End) -> io::Result<()> {
        self.end_of(self.pid, token, at, end)
    }

    /// The same, of a process that cannot write any more.
    pub(crate) fn end_of(&self, pid: u32, token: Token, at: Moment, end: End) -> io::Result<()> {
        self.line(&format!("end {pid} {token} {} {end:?}\n", at.as_nanos()))
    }

    fn line(&self, line: &str) -> io::Result<()> {
        (&self.file).write_all(line.as_bytes())
    }
}

/// All holdings of all journals in the directory, in the order in which they were granted.
pub(crate) fn read(directory: &Path) -> io::Result<Vec<Holding>> {
    let mut holdings = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "journal") {
            holdings.push(fs::read_to_string(&path)?);
        }
    }
    parse(&holdings.concat())
}

fn parse(text: &str) -> io::Result<Vec<Holding>> {
    fn number<T: FromStr>(word: &str) -> Option<T> {
        word.parse().ok()
    }
    let moment = |word: &str| number(word).map(Moment::from_nanos);
    let grant = |words: &[&str]| match *words {
        ["grant", pid, contender, token, asked, granted] => Some(Holding {
            pid: number(pid)?,
            contender: number(contender)?,
            token: number(token)?,
            asked: moment(asked)?,
            granted: moment(granted)?,
            end: None,
        }),
        _ => None,
    };
    let end = |words: &[&str]| match *words {
        ["end", pid, token, at, end] => {
            let end = [End::Released, End::Lost, End::Killed].into_iter().find(|known| format!("{known:?}") == end)?;
            Some(((number::<u32>(pid)?, number::<i64>(token)?), (moment(at)?, end)))
        }
        _ => None,
    };
    let (mut holdings, mut ends) = (Vec::new(), HashMap::new());
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        if let Some(holding) = grant(&words) {
            holdings.push(holding);
        } else if let Some((of, end)) = end(&words) {
            ends.insert(of, end);
        } else {
            return Err(io::Error::other(format!("not a line of a journal: {line:?}")));
        }
    }
    for holding in &mut holdings {
        holding.end = ends.get(&(holding.pid, holding.token)).copied();
    }
    holdings.sort_by_key(|holding| holding.granted);
    Ok(holdings)
}

/// What the holdings show.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    /// Two holders at once.
    pub(crate) overlaps: Vec<String>,
    /// Tokens given twice, or not in the order of the grants.
    pub(crate) disorder: Vec<String>,
    /// Grants a contender.
    pub(crate) shares: BTreeMap<usize, usize>,
    /// From `release` being called in one process to `acquire` having returned in another that waited; sorted.
    pub(crate) handovers: Vec<Duration>,
}

/// Looks for everything that must not be, in holdings in the order of their grants.
pub(crate) fn judge(holdings: &[Holding]) -> Verdict {
    let mut verdict = Verdict::default();
    let mut seen = HashMap::new();
    // The last to end of those granted before, and the newest token of those.
    let mut last: Option<&Holding> = None;
    let mut newest: Option<&Holding> = None;
    for holding in holdings {
        *verdict.shares.entry(holding.contender).or_default() += 1;
        if let Some(other) = seen.insert(holding.token, holding) {
            verdict.disorder.push(format!("token {} was given twice: {other:?} and {holding:?}", holding.token));
        } else if let Some(newer) = newest.filter(|newest| newest.token > holding.token) {
            verdict.disorder.push(format!("an older token was granted after a newer one: {newer:?}, then {holding:?}"));
        }
        if let Some(last) = last {
            if holding.granted < belief(last) {
                verdict.overlaps.push(format!("two holders at once: {last:?} and {holding:?}"));
            }
            if let Some((released, End::Released)) = last.end
                && last.pid != holding.pid
                && holding.asked < released
            {
                verdict.handovers.push(holding.granted.since(released));
            }
        }
        last = last.filter(|last| belief(last) > belief(holding)).or(Some(holding));
        newest = newest.filter(|newest| newest.token > holding.token).or(Some(holding));
    }
    verdict.handovers.sort_unstable();
    verdict
}

/// Until when its holder believed. Without an end there is none.
fn belief(holding: &Holding) -> Moment {
    holding.end.map_or(Moment::FAR, |(at, _)| at)
}

/// The value that this share of the sorted values does not exceed.
pub(crate) fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or_default()
}
