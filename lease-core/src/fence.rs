//! The resource's side: refuse a holder that woke up too late.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::runtime::lock;
use crate::store::{Name, Token};

/// How long a newer holder waits for an older one's write that is still under way.
const ADMIT_LIMIT: Duration = Duration::from_secs(5);

/// Guards a resource of this process against stale holders: check *and* act.
///
/// [`admit`](Self::admit) refuses a token that is older than the newest it has seen, and gives a guard to be held over
/// the write, so that no older write is under way when a newer one begins. It lives in one process and forgets when that
/// ends: the durable form is a condition in the write's own transaction, `… WHERE fence <= token`.
///
/// ```
/// use lease_core::{Fence, Token};
/// let fence = Fence::new();
/// let (old, new) = (Token::try_from(7)?, Token::try_from(8)?);
/// {
///     let _admitted = fence.admit("nightly", new)?;
///     // write here
/// }
/// assert!(fence.admit("nightly", old).is_err());
/// # Ok::<_, lease_core::Error>(())
/// ```
#[derive(Default)]
pub struct Fence {
    names: Mutex<HashMap<Name, Seen>>,
    left: Condvar,
}

#[derive(Default)]
struct Seen {
    /// The newest token seen. Kept for ever: forgetting it would let an older one in.
    newest: Option<Token>,
    /// Writes under way, by token.
    inside: BTreeMap<Token, usize>,
}

/// Leave to write, until it is dropped.
#[must_use = "hold it over the write"]
#[derive(Debug)]
pub struct Admitted<'a> {
    fence: &'a Fence,
    name: Name,
    token: Token,
}

impl Fence {
    /// A fence that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Admits a write under this token. Blocks the thread while a write under an older token is under way, 5 s at most: in
    /// an async task use `spawn_blocking`.
    ///
    /// # Errors
    /// `Lost` when a newer token was seen: the write must not happen. `Timeout` when the older write did not end; no
    /// older token is admitted after that all the same. `Invalid` for a wrong name.
    pub fn admit(&self, name: impl AsRef<str>, token: Token) -> Result<Admitted<'_>> {
        let name = Name::new(name.as_ref())?;
        self.enter(&name, token)?;
        Ok(Admitted { fence: self, name, token })
    }

    /// [`admit`](Self::admit) without a guard, for languages that have none. Pair it with [`leave`](Self::leave).
    ///
    /// # Errors
    /// As [`admit`](Self::admit).
    pub fn enter(&self, name: impl AsRef<str>, token: Token) -> Result<()> {
        self.enter_within(name, token, ADMIT_LIMIT)
    }

    /// [`enter`](Self::enter) that blocks for at most so long. What it has seen counts, though it did not get in.
    ///
    /// # Errors
    /// As [`admit`](Self::admit).
    pub fn enter_within(&self, name: impl AsRef<str>, token: Token, limit: Duration) -> Result<()> {
        let name = Name::new(name.as_ref())?;
        self.pass(&name, token, limit).map_err(|error| error.during("admit", Some(&name)))
    }

    fn pass(&self, name: &Name, token: Token, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        let mut names = lock(&self.names);
        loop {
            let gate = names.entry(name.clone()).or_default();
            let newest = gate.newest.map_or(token, |newest| newest.max(token));
            gate.newest = Some(newest);
            if token < newest {
                let message = format!("token {token} is stale: {newest} was seen; this write must not happen");
                return Err(Error::new(ErrorKind::Lost, message));
            }
            if gate.inside.keys().all(|inside| *inside == token) {
                *gate.inside.entry(token).or_default() += 1;
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::Timeout, "a write under an older token is still under way"));
            }
            names = self.left.wait_timeout(names, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Ends a write that was [`enter`](Self::enter)ed.
    ///
    /// # Errors
    /// `NotFound` when no write under this token is under way.
    pub fn leave(&self, name: impl AsRef<str>, token: Token) -> Result<()> {
        let name = Name::new(name.as_ref())?;
        let mut names = lock(&self.names);
        let inside = names.get_mut(&name).map(|gate| &mut gate.inside);
        let Some((inside, count)) = inside.and_then(|inside| inside.get(&token).copied().map(|count| (inside, count)))
        else {
            let message = format!("no write under token {token} is under way");
            return Err(Error::new(ErrorKind::NotFound, message).during("leave", Some(&name)));
        };
        if count > 1 {
            inside.insert(token, count - 1);
        } else {
            inside.remove(&token);
        }
        drop(names);
        self.left.notify_all();
        Ok(())
    }
}

impl fmt::Debug for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fence").finish_non_exhaustive()
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        // Entered by `admit` and left only here, so it is inside.
        drop(self.fence.leave(&self.name, self.token));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(number: i64) -> Token {
        Token::try_from(number).unwrap()
    }

    #[test]
    fn an_older_token_is_refused_and_names_do_not_meet() {
        let fence = Fence::new();
        drop(fence.admit("a", token(2)).unwrap());
        assert_eq!(fence.admit("a", token(1)).unwrap_err().kind(), ErrorKind::Lost);
        drop(fence.admit("a", token(2)).unwrap());
        drop(fence.admit("b", token(1)).unwrap());
    }

    #[test]
    fn a_newer_write_begins_only_when_the_older_has_ended() {
        let (fence, started) = (Fence::new(), std::sync::Barrier::new(2));
        let log = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            let old = fence.admit("a", token(1)).unwrap();
            scope.spawn(|| {
                started.wait();
                let _new = fence.admit("a", token(2)).unwrap();
                lock(&log).push("new");
            });
            started.wait();
            // The newer one shuts the gate before it waits: from then on the older is refused.
            while fence.admit("a", token(1)).is_ok() {}
            lock(&log).push("old");
            drop(old);
        });
        assert_eq!(*lock(&log), ["old", "new"]);
    }

    #[test]
    fn one_holder_may_write_from_many_threads() {
        let fence = Fence::new();
        let (one, two) = (fence.admit("a", token(1)).unwrap(), fence.admit("a", token(1)).unwrap());
        drop((one, two));
        assert_eq!(fence.leave("a", token(1)).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
