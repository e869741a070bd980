//! (docs follow)
#![forbid(unsafe_code)]

pub mod blocking;
pub mod clock;
mod config;
#[cfg(feature = "conformance")]
pub mod conformance;
mod deadline;
mod engine;
mod error;
mod fence;
mod heartbeat;
mod lease;
mod line;
mod manager;
mod observe;
mod pursuit;
pub mod runtime;
pub mod store;
pub mod stores;
#[cfg(feature = "test-util")]
pub mod testing;

pub use config::Builder;
pub use error::{EndReason, Error, ErrorKind, Holder, Result};
pub use fence::{Admitted, Fence};
pub use lease::{Ended, Lease};
pub use manager::{Acquire, Acquiring, Change, Manager, TryAcquire};
pub use store::{Name, Record, Token};
