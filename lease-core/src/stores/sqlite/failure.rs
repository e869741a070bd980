//! What can go wrong inside this store, mapped once to the public error.

use rusqlite::ErrorCode;
use rustix::io::Errno;

use crate::error::{Error, ErrorKind};

#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Own(#[from] Error),
    #[error("SQLite: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The one step of which a failure does not say whether it was taken.
    #[error("SQLite, committing: {0}")]
    Commit(rusqlite::Error),
    #[error("{what}: {cause}")]
    System { what: String, cause: Errno },
}

impl Failure {
    pub(super) fn system(what: impl Into<String>, cause: impl Into<Errno>) -> Self {
        Self::System { what: what.into(), cause: cause.into() }
    }

    pub(super) fn io(what: impl Into<String>, cause: &std::io::Error) -> Self {
        Self::system(what, Errno::from_io_error(cause).unwrap_or(Errno::IO))
    }

    /// The store is not what it was, or never was one.
    pub(super) fn incompatible(message: impl Into<String>) -> Self {
        Self::Own(Error::new(ErrorKind::Incompatible, message))
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Own(error) => error,
            Failure::Sqlite(error) => of_sqlite(error),
            Failure::Commit(error) => of_sqlite(error).with_doubt(),
            Failure::System { what, cause } => of_system(&what, cause),
        }
    }
}

fn of_sqlite(error: rusqlite::Error) -> Error {
    let (kind, message) = match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked | ErrorCode::FileLockingProtocolFailed) => {
            (ErrorKind::Unavailable, "another program keeps the database file locked")
        }
        Some(ErrorCode::DiskFull) => (ErrorKind::Unavailable, "the disk of the database file is full: make room"),
        Some(ErrorCode::SystemIoFailure) => (ErrorKind::Unavailable, "the database file cannot be read or written"),
        Some(ErrorCode::CannotOpen) => (ErrorKind::Unavailable, "the database file cannot be opened"),
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::AuthorizationForStatementDenied) => {
            (ErrorKind::Denied, "the database file or its directory is read-only: give write permission on both")
        }
        Some(ErrorCode::OutOfMemory | ErrorCode::TooBig) => (ErrorKind::Limit, "a limit of SQLite was reached"),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            (ErrorKind::Incompatible, "the file is no database, or is damaged: choose another file")
        }
        Some(ErrorCode::InternalMalfunction | ErrorCode::ApiMisuse | ErrorCode::ParameterOutOfRange) => {
            (ErrorKind::Internal, "a defect of this library")
        }
        // A table or a value is not what this version wrote.
        _ => (ErrorKind::Incompatible, "something else has written to the database file"),
    };
    Error::new(kind, format!("{message} ({error})")).with_source(error)
}

fn of_system(what: &str, cause: Errno) -> Error {
    let (kind, advice) = match cause {
        Errno::NOENT | Errno::NOTDIR => (ErrorKind::Invalid, "create it, or give another path"),
        Errno::ISDIR | Errno::EXIST | Errno::NAMETOOLONG | Errno::LOOP | Errno::INVAL => {
            (ErrorKind::Invalid, "give another path")
        }
        Errno::ACCESS | Errno::PERM | Errno::ROFS => (ErrorKind::Denied, "give write permission on file and directory"),
        Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOLCK => (ErrorKind::Limit, "raise that limit"),
        Errno::NOSPC | Errno::DQUOT => (ErrorKind::Unavailable, "make room on the disk"),
        _ => (ErrorKind::Unavailable, "try again"),
    };
    Error::new(kind, format!("{what}: {cause}: {advice}")).with_source(std::io::Error::from(cause))
}
