//! What a manager has of a database file: a store, and where it runs.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_lite::future::{block_on, or};
use lease_core::runtime::{Environment, system};
use lease_core::store::{Claim, Departure, Place, Standing, Store};
use lease_core::stores::sqlite::SqliteStore;

/// Whatever takes longer than this hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

pub(crate) struct Manager {
    pub(crate) env: Arc<dyn Environment>,
    pub(crate) store: Arc<SqliteStore>,
}

impl Manager {
    pub(crate) fn open(db: &Path) -> Self {
        let env = system().unwrap();
        let store = SqliteStore::open(db, env.clone()).unwrap();
        Self { env, store }
    }

    pub(crate) fn claim(&self, claim: &Claim) -> Standing {
        self.soon(self.store.claim(self.env.now(), claim)).unwrap()
    }

    pub(crate) fn head(&self, claim: &Claim) -> Place {
        match self.claim(claim) {
            Standing::Head(token) => Place { claim: claim.clone(), token },
            other => panic!("not the head: {other:?}"),
        }
    }

    pub(crate) fn leave(&self, claim: &Claim) -> Departure {
        self.soon(self.store.leave(claim)).unwrap()
    }

    pub(crate) fn soon<T>(&self, work: impl Future<Output = T>) -> T {
        block_on(or(work, async {
            self.env.sleep_until(self.env.now() + LIMIT).await;
            panic!("not within {LIMIT:?}")
        }))
    }
}
