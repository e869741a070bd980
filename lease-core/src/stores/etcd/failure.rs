//! What went wrong with a request, and what that says about its outcome. Mapped here, once, to the public error.

use tonic::{Code, Status};

use super::address::Endpoint;
use crate::error::{Error, ErrorKind};

/// A request without the answer that was asked for.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) error: Error,
    pub(super) cause: Cause,
}

/// What is to be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// It may have been applied. Another endpoint may do better.
    Unknown,
    /// It was not applied, because the token is not valid any more.
    Token,
    /// It was not applied, because it names a lease that is not there.
    NoLease,
    /// It was not applied, because there is no space for it.
    NoSpace,
    /// It was not applied.
    Refused,
}

impl Failure {
    pub(super) fn refused(error: Error) -> Self {
        Self { error, cause: Cause::Refused }
    }

    /// The same of a request that could not even be sent.
    pub(super) fn not_sent(self) -> Self {
        if self.cause == Cause::Unknown { Self::refused(self.error.without_doubt()) } else { self }
    }

    /// The same, and who said so.
    pub(super) fn at(self, endpoint: &Endpoint) -> Self {
        Self { error: self.error.at(endpoint), ..self }
    }

    fn unanswered(status: &Status) -> Self {
        let mut causes = String::new();
        let mut source = std::error::Error::source(status);
        while let Some(error) = source {
            causes = format!(": {error}");
            source = error.source();
        }
        Self::unknown(format!("etcd did not answer: {:?}, {}{causes}", status.code(), status.message()))
    }

    /// No answer, or one that says that the server does not know.
    pub(super) fn unknown(message: impl Into<String>) -> Self {
        Self { error: Error::unavailable(message).with_doubt(), cause: Cause::Unknown }
    }
}

/// etcd takes no writes.
pub(super) fn no_space() -> Failure {
    let hint = "turn on auto-compaction, compact, defragment, and disarm the alarm";
    Failure {
        error: Error::unavailable(format!("etcd refuses it: NOSPACE, its database is full: {hint}")),
        cause: Cause::NoSpace,
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::refused(error)
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let message = status.message();
        let says = |text: &str| message.contains(text);
        let refused = |kind, hint: &str| Self::refused(Error::new(kind, format!("etcd refuses it: {message}{hint}")));
        // What etcd itself says begins so. The same codes come from the transport, which knows nothing of the outcome.
        match status.code() {
            // Servers that forget to say it as below.
            Code::Unknown if message == "auth: revision in header is old" => {
                Self { cause: Cause::Token, ..refused(ErrorKind::Denied, "") }
            }
            code if !says("etcdserver: ") && code != Code::Unimplemented => Self::unanswered(&status),
            Code::Unauthenticated => Self { cause: Cause::Token, ..refused(ErrorKind::Denied, "") },
            Code::InvalidArgument if says("auth store is old") => {
                Self { cause: Cause::Token, ..refused(ErrorKind::Denied, "") }
            }
            Code::InvalidArgument if says("user name is empty") => {
                Self { cause: Cause::Token, ..refused(ErrorKind::Denied, ": give user and password") }
            }
            Code::InvalidArgument if says("authentication failed") => {
                refused(ErrorKind::Denied, ": check user and password")
            }
            Code::PermissionDenied => {
                refused(ErrorKind::Denied, ": the user needs to read and write all keys below the prefix")
            }
            Code::FailedPrecondition if says("user name not found") => refused(ErrorKind::Denied, ""),
            Code::NotFound if says("lease not found") => {
                let error = Error::unavailable("the etcd lease of the claim is gone");
                Self { error, cause: Cause::NoLease }
            }
            Code::ResourceExhausted if says("space exceeded") => no_space(),
            Code::ResourceExhausted | Code::OutOfRange => {
                Self::refused(Error::unavailable(format!("etcd refuses it for now: {message}")))
            }
            Code::Unimplemented => refused(ErrorKind::Unsupported, ": it needs etcd 3.4 or later"),
            Code::InvalidArgument | Code::FailedPrecondition | Code::NotFound if !says("not leader") => {
                refused(ErrorKind::Unsupported, "")
            }
            _ => Self::unanswered(&status),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guess in either direction is wrong: a lost write that is retried blindly, or a refusal that is retried for ever.
    #[test]
    fn only_what_the_server_refused_has_a_known_outcome() {
        for (code, message, kind, cause) in [
            (Code::Unavailable, "etcdserver: leader changed", ErrorKind::Unavailable, Cause::Unknown),
            (Code::DeadlineExceeded, "", ErrorKind::Unavailable, Cause::Unknown),
            (Code::Internal, "", ErrorKind::Unavailable, Cause::Unknown),
            (Code::Unknown, "transport error", ErrorKind::Unavailable, Cause::Unknown),
            (Code::ResourceExhausted, "h2: enhance your calm", ErrorKind::Unavailable, Cause::Unknown),
            (Code::PermissionDenied, "inadequate security", ErrorKind::Unavailable, Cause::Unknown),
            (Code::Unauthenticated, "etcdserver: invalid auth token", ErrorKind::Denied, Cause::Token),
            (Code::InvalidArgument, "etcdserver: revision of auth store is old", ErrorKind::Denied, Cause::Token),
            (Code::Unknown, "auth: revision in header is old", ErrorKind::Denied, Cause::Token),
            (Code::InvalidArgument, "etcdserver: user name is empty", ErrorKind::Denied, Cause::Token),
            (Code::PermissionDenied, "etcdserver: permission denied", ErrorKind::Denied, Cause::Refused),
            (Code::NotFound, "etcdserver: requested lease not found", ErrorKind::Unavailable, Cause::NoLease),
            (
                Code::ResourceExhausted,
                "etcdserver: mvcc: database space exceeded",
                ErrorKind::Unavailable,
                Cause::NoSpace,
            ),
            (Code::Unimplemented, "", ErrorKind::Unsupported, Cause::Refused),
        ] {
            let failure = Failure::from(Status::new(code, message));
            assert_eq!((failure.error.kind(), failure.cause), (kind, cause), "{code:?} {message}");
            assert_eq!(failure.error.is_in_doubt(), cause == Cause::Unknown, "{code:?} {message}");
        }
    }
}
