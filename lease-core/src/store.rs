//! What a store must promise.
//!
//! A store keeps, for every name, a **line of claims**. A claim enters at the end and gets the store's revision as its
//! token; the claim with the lowest token holds the name; a claim leaves when it is released, withdrawn, evicted, or
//! not renewed for its ttl. That is all there is: no lock record beside the waiters, no counters a name.
//!
//! The clauses, each tested by the function of its number in the conformance suite (feature `conformance`):
//!
//! - **S1 exclusion.** Of a name's claims, only the one with the lowest token holds.
//! - **S2 tokens.** A token is the store's revision at entry, at least 1, and greater than every token given before for
//!   that name within one incarnation of the store: across release, expiry, eviction and restart, and for a durable
//!   store across a crash of the machine. A changed incarnation, or an answer older than one already seen, is
//!   [`Incompatible`](crate::ErrorKind::Incompatible). Nothing of a name remains when its line is empty.
//! - **S3 idempotent claim.** The same claim again, its first answer lost, has the same place and token while it is in
//!   the line, and is never behind itself. No two claims of one name have equal tokens.
//! - **S4 renewal is compare-and-swap.** It succeeds only while that very claim is in the line. A renewal whose own
//!   earlier write was applied and not answered is no loss. One that is applied late shortens nothing.
//! - **S5 leaving is compare-and-delete.** One atomic step, harmless when repeated; it never removes another claim.
//! - **S6 expiry.** Nobody passes over a claim before its ttl has gone by since its last good renewal was *sent*,
//!   except on proof that its process or machine is gone, by [`evict`](Store::evict), or, while it only waits, when it
//!   lets an offered turn lapse. Who waits behind it passes over it no later than ttl + [`Limits::slack`], and for everybody
//!   else it is gone after [`gone_after`](Store::gone_after).
//! - **S7 no lost wake-up.** If what was ahead left after `Behind` was answered, [`turn`](Store::turn) resolves. It may
//!   resolve too early; that is no polling. One hand-over wakes one waiter.
//! - **S8 order.** Token order. A waiter that died is skipped after at most its ttl; where the store offers turns,
//!   after min(ttl, 1 s).
//! - **S9 final leave.** After [`leave`](Store::leave) says yes, that claim id neither holds nor waits, and cannot enter
//!   later, even if an attempt of its to enter is still on the way.
//! - **S10 errors.** `Unavailable` (the outcome is unknown), `Denied`, `Invalid`, `Incompatible`. Never a guess.
//! - **S11 cancel safety.** A dropped future leaves nothing behind that `leave` or expiry does not clean.
//! - **S12 names.** Names never meet: not `a`, `a/b` and `ab`. [`list`](Store::list) takes any prefix.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::clock::Moment;
use crate::error::{Error, Result};

/// What is leased: UTF-8, 1 to 512 bytes, without NUL.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>);

impl Name {
    /// The longest name, in bytes.
    pub const MAX_BYTES: usize = 512;

    /// Checks a name.
    ///
    /// # Errors
    /// `Invalid` when it is empty, longer than 512 bytes, or has a NUL.
    pub fn new(name: &str) -> Result<Self> {
        if name.is_empty() {
            return Err(Error::invalid("the name is empty: give 1 to 512 bytes"));
        }
        if name.len() > Self::MAX_BYTES {
            return Err(Error::invalid(format!("the name has {} bytes: give at most {}", name.len(), Self::MAX_BYTES)));
        }
        if let Some(at) = name.find('\0') {
            return Err(Error::invalid(format!("the name has a NUL at byte {at}: names have none")));
        }
        Ok(Self(name.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0.as_ref().into()
    }
}

impl Deref for Name {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl PartialEq<str> for Name {
    fn eq(&self, other: &str) -> bool {
        &*self.0 == other
    }
}

impl PartialEq<&str> for Name {
    fn eq(&self, other: &&str) -> bool {
        &*self.0 == *other
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

/// The fencing token: the store's revision at which the claim entered the line. At least 1, strictly increasing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(i64);

impl Token {
    /// The number, to be written beside the data that the lease guards.
    pub const fn get(self) -> i64 {
        self.0
    }
}

impl TryFrom<i64> for Token {
    type Error = Error;

    fn try_from(number: i64) -> Result<Self> {
        if number >= 1 {
            Ok(Self(number))
        } else {
            Err(Error::invalid(format!("{number} is no token: tokens are at least 1")))
        }
    }
}

impl std::str::FromStr for Token {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number: i64 =
            text.parse().map_err(|_| Error::invalid(format!("{text:?} is no token: tokens are numbers")))?;
        Self::try_from(number)
    }
}

impl From<Token> for i64 {
    fn from(token: Token) -> Self {
        token.0
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.0)
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Token {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i64(self.0)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Token {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = <i64 as serde::Deserialize>::deserialize(deserializer)?;
        Self::try_from(number).map_err(serde::de::Error::custom)
    }
}

/// The 128 bits that name one claim, chosen at random by its manager. Retries of entering reuse it; once it was found missing, left or evicted it
/// is never sent again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimId(pub u128);

impl fmt::Display for ClaimId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for ClaimId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One wish for a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// What it wishes for.
    pub name: Name,
    /// Its own id.
    pub id: ClaimId,
    /// How long the store keeps it unrenewed.
    pub ttl: Duration,
    /// Text shown to others.
    pub owner: Arc<str>,
    /// Whether it enters a line that is not empty. If not, [`Standing::Busy`] is the answer and nothing was written.
    pub queues: bool,
    /// The claim of the same manager that holds the name now, or is leaving, if one does. If it leaves soon, a store may enter this one by
    /// the same write.
    pub follows: Option<ClaimId>,
}

/// A claim that is known to have entered, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The claim.
    pub claim: Claim,
    /// Its token.
    pub token: Token,
}

/// What stands before a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// The claim just before, the only one whose leaving matters.
    pub predecessor: Token,
    /// How many claims are ahead, at least 1. As last seen.
    pub count: u64,
    /// The holder's token. As last seen.
    pub holder: Token,
    /// The holder's owner text. As last seen.
    pub owner: String,
    /// When [`Store::turn`] resolves at the latest, so that a predecessor which died is noticed.
    pub look_at: Moment,
}

/// Where a claim stands.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Standing {
    /// It holds the name.
    Head(Token),
    /// It waits behind another.
    Behind(Token, Ahead),
    /// It is not in the line, and its id is used up.
    Lost,
    /// It did not enter, because the line is not empty and it does not queue.
    Busy(Ahead),
}

/// The answer to a renewal that was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Renewal {
    /// The store restarted the ttl.
    Renewed {
        /// The instant from which the ttl counts: never later than the one given with the request.
        confirmed: Moment,
        /// Whether the claim, waiting until now, has been offered its turn and should look.
        offered: bool,
    },
    /// The claim is not in the line.
    Lost {
        /// Whether another claim heads the line.
        superseded: bool,
    },
}

/// The answer to leaving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Departure {
    /// It was in the line, and is no longer.
    Left,
    /// It was not in the line.
    Gone,
}

/// Who holds a name, and who waits.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Record {
    /// What is held.
    pub name: Name,
    /// The holder's fencing token.
    pub token: Token,
    /// The text the holder shows to others.
    pub owner: String,
    /// For how long it has held, as far as the store knows.
    pub held_for: Duration,
    /// The holder's ttl.
    pub ttl: Duration,
    /// How many claims wait behind it in the store. Waiters inside one process count as one.
    pub waiting: u64,
}

impl Record {
    /// A record, for stores.
    pub fn new(name: Name, token: Token, owner: String, held_for: Duration, ttl: Duration, waiting: u64) -> Self {
        Self { name, token, owner, held_for, ttl, waiting }
    }
}

/// What a store can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The shortest ttl.
    pub min_ttl: Duration,
    /// How much later than its ttl an unrenewed claim may be passed over by who waits behind it.
    pub slack: Duration,
}

/// A place where the lines are kept. The clauses S1 to S12 are at the top of this module.
///
/// Each manager opens a store of its own; what they share is behind it. `sent` is the manager's clock just before the
/// request, read once: the store counts the ttl from it or from later, and answers with it. A request whose caller has
/// given up may still be applied, but never after a `leave` of the same claim was answered (S9).
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// What this store can do.
    fn limits(&self) -> Limits;

    /// Whether requests may be answered without waiting. If none ever is, nothing is tried in the caller's thread: it would only
    /// be in the way of the library's.
    fn answers_at_once(&self) -> bool {
        true
    }

    /// [`claim`](Self::claim), if it takes no waiting; `None`, and nothing is done, if it would. Called in the user's thread.
    fn claim_at_once(&self, _sent: Moment, _claim: &Claim) -> Option<Result<Standing>> {
        None
    }

    /// [`leave`](Self::leave), likewise.
    fn leave_at_once(&self, _claim: &Claim) -> Option<Result<Departure>> {
        None
    }

    /// After how long an unrenewed claim is gone, for those too who did not see it grow old: who comes later, and `inspect`.
    fn gone_after(&self, ttl: Duration) -> Duration {
        ttl + self.limits().slack
    }

    /// Enters the line, or tells where the claim already stands. Restarts no ttl when it was already in.
    async fn claim(&self, sent: Moment, claim: &Claim) -> Result<Standing>;

    /// Resolves when what is ahead is gone, by `ahead.look_at` at the latest. By watching, never by polling. That the
    /// claim itself is gone need not end it: a renewal tells that.
    async fn turn(&self, place: &Place, ahead: &Ahead) -> Result<()>;

    /// Where the claim stands now. Never enters; takes a turn that was offered.
    async fn look(&self, place: &Place) -> Result<Standing>;

    /// Restarts the ttl of each claim by compare-and-swap. One answer a place, in the order given.
    async fn renew(&self, sent: Moment, places: &[Place]) -> Vec<Result<Renewal>>;

    /// Takes the claim out of the line: release and withdrawal alike.
    async fn leave(&self, claim: &Claim) -> Result<Departure>;

    /// Resolves with a claim of this store's that may have gone though it neither left nor expired: evicted, or deleted. A
    /// hint that saves time, so a store that gets no word of it need not have this: the next renewal tells.
    async fn gone(&self) -> ClaimId {
        std::future::pending().await
    }

    /// Who holds the name; `None` when its line is empty.
    async fn inspect(&self, name: &Name) -> Result<Option<Record>>;

    /// Everything held whose name begins with the prefix, sorted by name.
    async fn list(&self, prefix: &str) -> Result<Vec<Record>>;

    /// Resolves when the holder of the name is, or may be, another than `seen`. By watching, never by polling.
    async fn changed(&self, name: &Name, seen: Option<Token>) -> Result<()>;

    /// Removes the claim with that token, held or waiting; `false` when there is none.
    async fn evict(&self, name: &Name, token: Token) -> Result<bool>;

    /// Whether the store answers.
    async fn ping(&self) -> Result<()>;

    /// Stops everything the store runs and frees what it has open. Later calls are `Closed`.
    async fn close(&self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked_at_the_edge() {
        for wrong in ["", "a\0b", &"x".repeat(513)] {
            assert_eq!(Name::new(wrong).unwrap_err().kind(), crate::ErrorKind::Invalid, "{wrong:?}");
        }
        assert_eq!(Name::new(&"é".repeat(256)).unwrap().len(), 512);
    }

    #[test]
    fn tokens_are_at_least_one() {
        assert!(Token::try_from(0).is_err() && Token::try_from(-1).is_err());
        assert_eq!(Token::try_from(1).unwrap().get(), 1);
    }
}
