//! The C library. No policy here: what it does, the core does. `include/lease.h` is its manual.
//!
//! One C noun a file. All handle, pointer and panic policy is in `handle.rs`; how a thread waits is in `wait.rs`.
#![allow(non_camel_case_types, clippy::missing_safety_doc, reason = "the names and the contract are those of lease.h")]
#![allow(clippy::not_unsafe_ptr_arg_deref, unreachable_pub, reason = "handles are never dereferenced; exports are C's")]
#![allow(clippy::doc_markdown, reason = "the documentation is that of a C header")]

#[cfg(not(target_pointer_width = "64"))]
compile_error!("a handle is an index and a generation, and takes the 64 bits of a pointer");

mod cancelled;
mod error;
mod fence;
mod handle;
mod lease;
mod log;
mod manager;
mod options;
#[cfg(test)]
mod panics;
mod pending;
mod record;
mod version;
mod wait;
mod watch;
