//! What the contention test, the demo and the benches share.

#[cfg(feature = "etcd")]
pub(crate) mod etcd;
pub(crate) mod journal;
pub(crate) mod measure;
pub(crate) mod process;
#[cfg(feature = "etcd")]
pub(crate) mod proxy;
pub(crate) mod scratch;
