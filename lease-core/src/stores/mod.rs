//! The stores: one file or folder each, one cargo feature each, all of one shape.

use std::sync::Arc;

use crate::config::no_store;
use crate::error::Result;
use crate::runtime::Environment;
use crate::store::Store;

pub mod memory;
#[cfg(feature = "sqlite")]
pub mod sqlite;

/// The URL schemes of the stores of this build. A test of the conformance suite fails when one of them lacks it.
pub const SCHEMES: &[&str] = &[
    "memory",
    #[cfg(feature = "sqlite")]
    "sqlite",
];

/// Schemes and the features that bring them.
const FEATURES: &[(&str, &str)] = &[("sqlite", "sqlite")];

/// Opens the store of a URL that was taken apart.
pub(crate) fn open(scheme: &str, rest: &str, env: &Arc<dyn Environment>) -> Result<Arc<dyn Store>> {
    match scheme {
        "memory" if rest.is_empty() => Ok(memory::MemoryStore::new(env.clone())),
        "memory" => Ok(memory::MemoryStore::named(rest, env.clone())),
        #[cfg(feature = "sqlite")]
        "sqlite" => Ok(sqlite::SqliteStore::open(path(rest)?, env.clone())?),
        _ => Err(no_store(scheme, FEATURES)),
    }
}

/// The path of `sqlite:jobs.db`, `sqlite:/var/lib/jobs.db` or `sqlite:///var/lib/jobs.db`.
#[cfg(feature = "sqlite")]
fn path(rest: &str) -> Result<&std::path::Path> {
    let path = rest.strip_prefix("//").unwrap_or(rest);
    if path.is_empty() || path.contains('\0') {
        return Err(crate::error::Error::invalid("the URL names no file: write sqlite:PATH, such as sqlite:jobs.db"));
    }
    Ok(std::path::Path::new(path))
}
