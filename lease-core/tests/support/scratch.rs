//! A directory of one's own, gone afterwards unless there is something to see in it.

use std::io;
use std::path::{Path, PathBuf};

/// A fresh directory. Dropping removes it, but not while panicking.
pub(crate) struct Scratch {
    path: PathBuf,
    kept: bool,
}

impl Scratch {
    pub(crate) fn new(what: &str) -> io::Result<Self> {
        Self::within(&std::env::temp_dir(), what)
    }

    /// Where nothing waits for a disk, if there is such a place.
    pub(crate) fn in_memory(what: &str) -> io::Result<Self> {
        Self::within(Path::new("/dev/shm"), what).or_else(|_| Self::new(what))
    }

    fn within(parent: &Path, what: &str) -> io::Result<Self> {
        let nanos = lease_core::clock::Moment::now().as_nanos();
        let path = parent.join(format!("{what}-{}-{nanos:x}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self { path, kept: false })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The URL of a database file in it.
    pub(crate) fn sqlite(&self) -> String {
        format!("sqlite:{}", self.path.join("leases.db").display())
    }

    /// Leaves it where it is.
    pub(crate) fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.kept || std::thread::panicking() {
            eprintln!("kept: {}", self.path.display());
        } else if let Err(error) = std::fs::remove_dir_all(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}
