//! The stores: one file or folder each, one cargo feature each, all of one shape.

pub mod memory;
#[cfg(feature = "sqlite")]
pub mod sqlite;

/// The URL schemes of the stores of this build. A test of the conformance suite fails when one of them lacks it.
pub const SCHEMES: &[&str] = &[
    "memory",
    #[cfg(feature = "sqlite")]
    "sqlite",
];
