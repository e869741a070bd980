//! What the contention test, the demo and the benches share.

#[cfg(feature = "etcd")]
pub(crate) mod etcd;
pub(crate) mod journal;
#[cfg(feature = "sqlite")]
pub(crate) mod manager;
pub(crate) mod measure;
pub(crate) mod process;
#[cfg(feature = "etcd")]
pub(crate) mod proxy;
pub(crate) mod scratch;
