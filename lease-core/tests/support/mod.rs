//! What the contention test, the demo and the benches share.

pub(crate) mod journal;
pub(crate) mod measure;
pub(crate) mod process;
pub(crate) mod scratch;
