//! A linearizable lease manager: be *the one* that runs the nightly job, owns a shard, writes a file.
//!
//! [`Manager::acquire`] waits until a name is yours and gives a [`Lease`] with a fencing [`Token`]. A heartbeat keeps it.
//! What is guaranteed, as long as clocks run at the same rate and a signal to stop is heeded:
//!
//! - **One holder.** Of all claims for a name, in all processes on one store, only one holds.
//! - **Tokens strictly increase** in the order of grant, so that what you write to can refuse a holder that woke up late.
//! - **Cancelled before the next.** A lease that can no longer be proven yours ends at half its ttl, for good; nobody else
//!   gets the name before the whole ttl has passed.
//! - **No orphan, no lost wake-up, no polling.** Whatever is dropped, lost or cut leaves nothing that keeps others waiting
//!   longer than the ttl.
//!
//! A process that was paused sees *lost* at its first call; only the token protects what it had already sent.
//!
//! ```
//! # futures_lite::future::block_on(async {
//! use std::time::Duration;
//! use lease_core::Manager;
//!
//! let manager = Manager::open("memory:").await?; // or sqlite:jobs.db, to share it between processes
//! let lease = manager.acquire("nightly").ttl(Duration::from_secs(15)).await?;
//! for row in 0..3 {
//!     lease.check()?; // Err(Lost): stop
//!     println!("UPDATE t SET v = {row} WHERE fence <= {}", lease.token());
//! }
//! lease.release().await?;
//! manager.close().await?;
//! # Ok::<_, lease_core::Error>(()) }).unwrap();
//! ```
//!
//! For threads there is [`blocking`]; for the resource's side, [`Fence`]; for a store of your own, [`store`] and the
//! `conformance` feature; for testing what your code does when a lease is lost, the `test-util` feature.
#![cfg_attr(not(feature = "atfork"), forbid(unsafe_code))]
#![deny(unsafe_code)]

pub mod blocking;
pub mod clock;
mod config;
#[cfg(feature = "conformance")]
pub mod conformance;
mod deadline;
mod engine;
mod error;
mod fence;
#[cfg(feature = "atfork")]
pub mod fork;
#[cfg(not(feature = "atfork"))]
mod fork;
mod heartbeat;
mod lease;
mod line;
mod manager;
mod observe;
mod pursuit;
pub mod runtime;
pub mod signal;
pub mod store;
pub mod stores;
#[cfg(feature = "test-util")]
pub mod testing;

pub use config::Builder;
pub use error::{EndReason, Error, ErrorKind, Holder, Result};
pub use fence::{Admitted, Fence};
pub use lease::{Ended, Lease};
pub use line::Waiting;
pub use manager::{Acquire, Acquiring, Change, Changes, Manager, TryAcquire};
pub use observe::line_of;
pub use store::{Name, Record, Token};

// Of other crates, in signatures of this one.
pub use async_trait::async_trait;
pub use futures_core::Stream;
pub use tokio_util::sync::CancellationToken;

#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
