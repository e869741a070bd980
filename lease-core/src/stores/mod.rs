//! The stores: one file or folder each, one cargo feature each, all of one shape.

use std::sync::Arc;

use crate::config::{Access, Config, Url, unknown};
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::Environment;
use crate::store::Store;

#[cfg(feature = "etcd")]
pub mod etcd;
pub mod memory;
#[cfg(feature = "sqlite")]
pub mod sqlite;

/// The URL schemes of the stores of this build. A test of the conformance suite fails when one of them lacks it.
pub const SCHEMES: &[&str] = &[
    "memory",
    #[cfg(feature = "sqlite")]
    "sqlite",
    #[cfg(feature = "etcd")]
    "etcd",
    #[cfg(feature = "etcd")]
    "etcds",
];

/// All schemes there are, and the cargo features that bring them.
const KNOWN: &[(&str, &str)] = &[("memory", ""), ("sqlite", "sqlite"), ("etcd", "etcd"), ("etcds", "etcd")];

/// Stores of many machines, which nobody should replace by one of a single machine on a hint of ours.
const ELSEWHERE: &[&str] = &["postgres", "postgresql", "redis", "rediss", "valkey", "nats"];

/// Opens the store of a URL that was taken apart.
pub(crate) fn open(url: &Url, config: &Config, env: &Arc<dyn Environment>) -> Result<Arc<dyn Store>> {
    let (scheme, rest) = (&*url.scheme, &*url.rest);
    if config.access != Access::default() && !matches!(scheme, "etcd" | "etcds") {
        let message = format!("a {scheme}: store lets everybody in: it takes no user, password or certificates");
        return Err(Error::invalid(message));
    }
    match scheme {
        "memory" if rest.is_empty() => Ok(memory::MemoryStore::new(env.clone())),
        "memory" if rest.starts_with('/') => {
            let name = rest.trim_start_matches('/');
            Err(Error::invalid(format!(
                "memory:{rest} has a path: write memory:{name}, or memory: for a private store"
            )))
        }
        "memory" => Ok(memory::MemoryStore::named(rest, env.clone())),
        #[cfg(feature = "etcd")]
        "etcd" | "etcds" => Ok(etcd::EtcdStore::at(url, config, env.clone())?),
        #[cfg(feature = "sqlite")]
        "sqlite" => Ok(sqlite::SqliteStore::open(path(rest)?, env.clone())?),
        _ => Err(no_store(scheme)),
    }
}

fn no_store(scheme: &str) -> Error {
    match KNOWN.iter().find(|(known, _)| *known == scheme) {
        Some((_, feature)) => Error::new(
            ErrorKind::Unsupported,
            format!("this build has no {scheme:?} store: enable the cargo feature {feature:?} of lease-core"),
        ),
        None if ELSEWHERE.contains(&scheme) => Error::new(
            ErrorKind::Unsupported,
            format!("there is no {scheme:?} store yet; memory: and sqlite: reach one machine only"),
        ),
        None => unknown("scheme", scheme, &KNOWN.iter().map(|(known, _)| *known).collect::<Vec<_>>()),
    }
}

/// The path of `sqlite:jobs.db`, `sqlite:/var/lib/jobs.db` or `sqlite:///var/lib/jobs.db`.
#[cfg(feature = "sqlite")]
fn path(rest: &str) -> Result<&std::path::Path> {
    let path = rest.strip_prefix("//").unwrap_or(rest);
    if path.is_empty() || path.contains('\0') {
        return Err(Error::invalid("the URL names no file: write sqlite:PATH, such as sqlite:jobs.db"));
    }
    if path.len() < rest.len() && !path.starts_with('/') {
        let hint = format!("sqlite:{path} from the working directory, or sqlite:///{path} from the root");
        return Err(Error::invalid(format!(
            "after sqlite:// there is a host in a URL, and a file has none: write {hint}"
        )));
    }
    if path == ":memory:" || path.starts_with("file:") {
        return Err(Error::invalid(format!(
            "{path:?} is no path of a file: write memory: for memory, or the path alone"
        )));
    }
    Ok(std::path::Path::new(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scheme_without_its_feature_says_which_to_enable() {
        let error = no_store("sqlite");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.message().contains("cargo feature \"sqlite\""), "{error}");
        assert_eq!(no_store("redis").kind(), ErrorKind::Unsupported);
        assert!(!no_store("mongodb").message().contains("did you mean"));
        assert!(no_store("sqlit").message().contains("did you mean \"sqlite\""));
        assert!(SCHEMES.iter().all(|scheme| KNOWN.iter().any(|(known, _)| known == scheme)));
    }

    #[cfg(feature = "sqlite")]
    #[test]
    fn paths_are_taken_as_they_are_meant() {
        for (rest, meant) in [("jobs.db", "jobs.db"), ("/a/jobs.db", "/a/jobs.db"), ("///a/jobs.db", "/a/jobs.db")] {
            assert_eq!(path(rest).unwrap(), std::path::Path::new(meant));
        }
        for wrong in ["", "//", "//jobs.db", "//var/lib/jobs.db", "a\0b", ":memory:", "file:jobs.db"] {
            assert_eq!(path(wrong).unwrap_err().kind(), ErrorKind::Invalid, "{wrong:?}");
        }
    }
}
