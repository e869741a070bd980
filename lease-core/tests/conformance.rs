//! Runs the conformance suite on every store of this build.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_lite::future::block_on;
use lease_core::conformance::{Clause, Harness};
use lease_core::runtime::{Environment, system};
use lease_core::store::Store;
use lease_core::stores::SCHEMES;
use lease_core::stores::memory::MemoryStore;
use lease_core::testing::TestEnvironment;

struct Memory {
    env: Arc<dyn Environment>,
    lines: Arc<MemoryStore>,
}

impl Memory {
    fn on(env: Arc<dyn Environment>) -> Self {
        Self { lines: MemoryStore::new(env.clone()), env }
    }
}

#[async_trait]
impl Harness for Memory {
    async fn open(&self) -> Arc<dyn Store> {
        self.lines.beside(self.env.clone())
    }

    fn environment(&self) -> Arc<dyn Environment> {
        self.env.clone()
    }

    fn ttl(&self) -> Duration {
        Duration::from_millis(200)
    }
}

/// Time moves when nothing else can: waits are exact and cost nothing.
mod memory {
    use super::*;

    pub(super) const SCHEME: &str = "memory";

    fn run(clause: Clause) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async { clause(&Memory::on(TestEnvironment::new(1))).await });
    }

    lease_core::conformance_tests!(volatile, run);
}

/// With the library's thread and its real timers.
mod memory_on_threads {
    use super::*;

    fn run(clause: Clause) {
        block_on(clause(&Memory::on(system().unwrap())));
    }

    lease_core::conformance_tests!(volatile, run);
}

#[cfg(feature = "sqlite")]
mod sqlite {
    use std::path::{Path, PathBuf};

    use lease_core::stores::sqlite::SqliteStore;

    use super::*;

    pub(super) const SCHEME: &str = "sqlite";

    /// A file in a folder of its own, which is removed with it.
    struct Sqlite {
        env: Arc<dyn Environment>,
        folder: PathBuf,
    }

    impl Drop for Sqlite {
        fn drop(&mut self) {
            // What is left over by a failed test is in cargo's folder for that.
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }

    #[async_trait]
    impl Harness for Sqlite {
        async fn open(&self) -> Arc<dyn Store> {
            SqliteStore::open(&self.folder.join("lines.db"), self.env.clone()).unwrap()
        }

        fn environment(&self) -> Arc<dyn Environment> {
            self.env.clone()
        }

        fn ttl(&self) -> Duration {
            Duration::from_millis(300)
        }

        /// The file is all that there is: nothing has to be stopped.
        async fn restart(&self) -> bool {
            true
        }
    }

    fn run(clause: Clause) {
        let env = system().unwrap();
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("sqlite-{:016x}", env.random()));
        std::fs::create_dir_all(&folder).unwrap();
        block_on(clause(&Sqlite { env, folder }));
    }

    lease_core::conformance_tests!(durable, run);
}

/// A store that promises what nobody checked is worse than no store.
#[test]
fn every_store_has_the_suite() {
    let suites = [
        memory::SCHEME,
        #[cfg(feature = "sqlite")]
        sqlite::SCHEME,
        // Run by `etcd.rs`, which needs servers.
        #[cfg(feature = "etcd")]
        "etcd",
        #[cfg(feature = "etcd")]
        "etcds",
    ];
    let missing: Vec<_> = SCHEMES.iter().filter(|scheme| !suites.contains(scheme)).collect();
    assert!(missing.is_empty(), "no conformance suite for {missing:?}: add a harness to this file");
}

/// A clause that the macro forgets would be run by nobody.
#[test]
fn every_clause_is_a_test() {
    let source = include_str!("../src/conformance.rs");
    let clauses: Vec<_> = source
        .lines()
        .filter_map(|line| line.strip_prefix("pub async fn ")?.split_once('('))
        .map(|(name, _)| name)
        .collect();
    let forgotten: Vec<_> =
        clauses.iter().filter(|clause| !source.lines().any(|line| line.trim() == **clause)).collect();
    assert!(clauses.len() > 30 && forgotten.is_empty(), "not in conformance_tests!: {forgotten:?}");
    for number in 1..=12 {
        let prefix = format!("s{number}_");
        assert!(clauses.iter().any(|clause| clause.starts_with(&prefix)), "no test of clause S{number}");
    }
}
