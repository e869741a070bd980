//! What went wrong, to which name, and what to do: one append-only list for every language.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use crate::store::{Name, Token};

/// The result of every call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! numbered {
    ($(#[$meta:meta])* $type:ident { $($(#[$doc:meta])* $variant:ident = $code:literal, $name:literal;)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        #[repr(i32)]
        pub enum $type { $($(#[$doc])* $variant = $code,)+ }

        impl $type {
            /// Every value, in the order of the numbers.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The number by which other languages know it. Numbers are only ever added.
            pub const fn code(self) -> i32 {
                self as i32
            }

            /// The name by which other languages know it, in capitals.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

numbered! {
    /// What kind of error it is. Code 0 is success and no error.
    ErrorKind {
        /// The deadline passed while somebody else held the name. Try again.
        Timeout = 1, "TIMEOUT";
        /// The lease has ended: stop the work, and acquire anew. Its reason says how.
        Lost = 2, "LOST";
        /// The store did not answer, or not in time. Try again.
        Unavailable = 3, "UNAVAILABLE";
        /// An argument is wrong. The message says which and why.
        Invalid = 4, "INVALID";
        /// This build or this store cannot do it.
        Unsupported = 5, "UNSUPPORTED";
        /// The store refuses these credentials or permissions.
        Denied = 6, "DENIED";
        /// The store is not what it was, or was written by something else.
        Incompatible = 7, "INCOMPATIBLE";
        /// The caller gave up waiting.
        Cancelled = 8, "CANCELLED";
        /// The manager is closed.
        Closed = 9, "CLOSED";
        /// The handle belongs to the parent of this forked process.
        Forked = 10, "FORKED";
        /// There is no such lease.
        NotFound = 11, "NOT_FOUND";
        /// A panic was caught: a defect of this library.
        Internal = 12, "INTERNAL";
        /// A limit of the system or of the store was reached. Try later.
        Limit = 13, "LIMIT";
    }
}

impl ErrorKind {
    /// Whether the same call may succeed later with nothing changed by you.
    pub const fn is_retryable(self) -> bool {
        matches!(self, Self::Timeout | Self::Unavailable | Self::Limit)
    }
}

numbered! {
    /// Why a lease ended. `Released` and `Closed` are the holder's own acts, all others are losses.
    EndReason {
        /// The holder released it.
        Released = 0, "RELEASED";
        /// The store says that the claim is gone and that another heads the line.
        Superseded = 1, "SUPERSEDED";
        /// The store says that the claim is gone (expired, deleted, broken by an operator), and names no other holder.
        Gone = 2, "GONE";
        /// Half the ttl passed since the last confirmed renewal; one had been tried and was not answered.
        Unreachable = 3, "UNREACHABLE";
        /// Half the ttl passed without a renewal even tried: this process was stopped, suspended or starved.
        Stalled = 4, "STALLED";
        /// As `Unreachable`, the last answer being a refusal (credentials, permission).
        Denied = 5, "DENIED";
        /// The manager was closed.
        Closed = 6, "CLOSED";
        /// Seen in the child of a `fork`: the lease is the parent's.
        Forked = 7, "FORKED";
    }
}

impl EndReason {
    /// Whether the lease was lost: ended, and not by the holder's own act.
    pub const fn is_loss(self) -> bool {
        !matches!(self, Self::Released | Self::Closed)
    }

    pub(crate) fn from_code(code: u64) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| u64::from(reason.code().unsigned_abs()) == code)
    }

    const fn explanation(self) -> &'static str {
        match self {
            Self::Released => "it was released",
            Self::Superseded => "the store says that the claim is gone and another holds the name",
            Self::Gone => {
                "the store says that the claim is gone: it expired, was deleted, or was broken by an operator"
            }
            Self::Unreachable => "no renewal was answered within half the ttl",
            Self::Stalled => "this process made no renewal for half the ttl: it was stopped, suspended or starved",
            Self::Denied => "the store refused to renew it: check credentials and permissions",
            Self::Closed => "its manager was closed",
            Self::Forked => "it belongs to the parent of this forked process",
        }
    }
}

/// An error of this crate: what happened, to which name, and what to do.
///
/// ```
/// # futures_lite::future::block_on(async {
/// let error = lease_core::Manager::open("memory:?ttl=0s").await.unwrap_err();
/// assert_eq!(error.kind(), lease_core::ErrorKind::Invalid);
/// assert!(!error.is_retryable());
/// # });
/// ```
#[derive(Clone)]
pub struct Error(Box<Details>);

#[derive(Clone)]
struct Details {
    kind: ErrorKind,
    message: String,
    operation: Option<&'static str>,
    name: Option<Name>,
    reason: Option<EndReason>,
    holder: Option<Holder>,
    place: Option<u64>,
    in_doubt: bool,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

/// Who holds a name, as far as it was known when the error was made.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// The holder's fencing token.
    pub token: Token,
    /// The text the holder shows to others: `host:pid` unless it chose another.
    pub owner: String,
}

impl Holder {
    /// A holder, for stores and their tests.
    pub fn new(token: Token, owner: impl Into<String>) -> Self {
        Self { token, owner: owner.into() }
    }
}

impl Error {
    /// An error of the given kind. Stores use it; the core adds operation and name.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Details {
            kind,
            message: message.into(),
            operation: None,
            name: None,
            reason: None,
            holder: None,
            place: None,
            in_doubt: false,
            source: None,
        }))
    }

    /// The same with the error that caused it.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into().into());
        self
    }

    /// The same marked as having an unknown outcome: the request may have been applied.
    #[must_use]
    pub fn with_doubt(mut self) -> Self {
        self.0.in_doubt = true;
        self
    }

    #[cfg(feature = "etcd")]
    pub(crate) fn without_doubt(mut self) -> Self {
        self.0.in_doubt = false;
        self
    }

    /// The same with the operation that failed, and the name, unless they are known: for bindings.
    #[must_use]
    pub fn during(mut self, operation: &'static str, name: Option<&Name>) -> Self {
        self.0.operation.get_or_insert(operation);
        if self.0.name.is_none() {
            self.0.name = name.cloned();
        }
        self
    }

    /// The same with the file or the server that it is about.
    #[cfg(any(feature = "sqlite", feature = "etcd"))]
    pub(crate) fn at(mut self, place: impl fmt::Display) -> Self {
        self.0.message = format!("{place}: {}", self.0.message);
        self
    }

    pub(crate) fn with_holder(mut self, holder: Holder, place: u64) -> Self {
        self.0.holder = Some(holder);
        self.0.place = Some(place);
        self
    }

    /// The error about a word that is none of those known, naming the nearest: for bindings.
    pub fn unknown(what: &str, word: &str, known: &[&str]) -> Self {
        crate::config::unknown(what, word, known)
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unavailable, message)
    }

    pub(crate) fn closed() -> Self {
        Self::new(ErrorKind::Closed, "the manager is closed: open a new one")
    }

    /// The work was dropped before it had an answer: only a panic does that, or the end of the library's thread.
    pub(crate) fn dropped() -> Self {
        Self::new(ErrorKind::Internal, "the store panicked: see its message")
    }

    /// The error about a lease that ended: for bindings.
    pub fn ended(reason: EndReason, name: &Name) -> Self {
        let kind = if reason == EndReason::Forked { ErrorKind::Forked } else { ErrorKind::Lost };
        let mut error = Self::new(kind, format!("not held any more: {}", reason.explanation()));
        error.0.reason = Some(reason);
        error.0.name = Some(name.clone());
        error
    }

    /// What kind of error it is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The message without operation and name; `Display` has all.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The operation that failed, such as `acquire`.
    pub fn operation(&self) -> Option<&'static str> {
        self.0.operation
    }

    /// The name it was about.
    pub fn name(&self) -> Option<&str> {
        self.0.name.as_deref()
    }

    /// Why the lease ended, when that is the error.
    pub fn reason(&self) -> Option<EndReason> {
        self.0.reason
    }

    /// Who held the name, when a wait for it timed out.
    pub fn holder(&self) -> Option<&Holder> {
        self.0.holder.as_ref()
    }

    /// How many claims and local waiters stood before the caller when its wait timed out.
    pub fn place(&self) -> Option<u64> {
        self.0.place
    }

    /// Whether the same call may succeed later with nothing changed by you.
    pub fn is_retryable(&self) -> bool {
        self.0.kind.is_retryable()
    }

    /// All of it with its causes, for languages that have no chain of them: one line, and nothing that a terminal would obey,
    /// for paths and names may have anything in them.
    pub fn to_line(&self) -> String {
        let mut message = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Many messages quote their cause.
            if !message.contains(&text) {
                message = format!("{message}: {text}");
            }
            cause = error.source();
        }
        message.chars().fold(String::new(), |mut line, letter| {
            if letter.is_control() {
                line.extend(letter.escape_default());
            } else {
                line.push(letter);
            }
            line
        })
    }

    /// Whether the outcome is unknown: the request may have been applied though its answer was not seen.
    pub fn is_in_doubt(&self) -> bool {
        self.0.in_doubt
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let d = &self.0;
        match (d.operation, &d.name) {
            (Some(operation), Some(name)) => write!(f, "{operation} {name:?}: ")?,
            (Some(operation), None) => write!(f, "{operation}: ")?,
            (None, Some(name)) => write!(f, "{name:?}: ")?,
            (None, None) => {}
        }
        f.write_str(&d.message)?;
        if let Some(holder) = &d.holder {
            write!(f, " (held by {:?} with token {}", holder.owner, holder.token)?;
            if let Some(place) = d.place {
                write!(f, ", {place} ahead")?;
            }
            f.write_str(")")?;
        }
        if d.in_doubt {
            f.write_str(" (outcome unknown: it may have been applied)")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {self}", self.0.kind)?;
        if let Some(source) = &self.0.source {
            write!(f, " (caused by: {source})")?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other languages know kinds and reasons by number: a changed number breaks every compiled user.
    #[test]
    fn numbers_are_append_only() {
        let kinds: Vec<_> = ErrorKind::ALL.iter().map(|k| format!("{}={}", k.name(), k.code())).collect();
        assert_eq!(
            kinds.join(" "),
            "TIMEOUT=1 LOST=2 UNAVAILABLE=3 INVALID=4 UNSUPPORTED=5 DENIED=6 INCOMPATIBLE=7 CANCELLED=8 CLOSED=9 \
             FORKED=10 NOT_FOUND=11 INTERNAL=12 LIMIT=13"
        );
        let reasons: Vec<_> = EndReason::ALL.iter().map(|r| format!("{}={}", r.name(), r.code())).collect();
        assert_eq!(
            reasons.join(" "),
            "RELEASED=0 SUPERSEDED=1 GONE=2 UNREACHABLE=3 STALLED=4 DENIED=5 CLOSED=6 FORKED=7"
        );
    }

    #[test]
    fn only_own_acts_are_no_loss() {
        let own: Vec<_> = EndReason::ALL.iter().filter(|reason| !reason.is_loss()).collect();
        assert_eq!(own, [&EndReason::Released, &EndReason::Closed]);
    }

    #[test]
    fn the_message_says_what_happened_to_which_name() {
        let name = Name::new("nightly").unwrap();
        let holder = Holder::new(Token::try_from(41).unwrap(), "host:7");
        let error = Error::new(ErrorKind::Timeout, "still held when the wait ended")
            .during("acquire", Some(&name))
            .with_holder(holder, 3);
        assert_eq!(
            error.to_string(),
            "acquire \"nightly\": still held when the wait ended (held by \"host:7\" with token 41, 3 ahead)"
        );
        assert!(error.is_retryable());
    }
}
