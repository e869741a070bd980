//! A linearizable lease manager.
#![forbid(unsafe_code)]

pub mod clock;
#[cfg(feature = "conformance")]
pub mod conformance;
mod error;
pub mod runtime;
pub mod store;
pub mod stores;

pub use error::{EndReason, Error, ErrorKind, Holder, Result};
pub use store::{Name, Record, Token};
