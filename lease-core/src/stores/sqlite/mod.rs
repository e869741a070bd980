//! The `SQLite` file store (`sqlite:path.db`): the managers of one machine, on one database file.
//!
//! How it works, from the outside in:
//!
//! 0. `file`: which file it is, and what is refused before it is used.
//! 1. `gate`: writers queue at a lock on a side file, and read the clock once they are in.
//! 2. `database`: one connection, one transaction at a time; tokens that a power failure cannot bring back.
//! 3. `line`: what a transaction does to a line of claims. The rules that make one holder are there.
//! 4. `bell`: after COMMIT the manager whose claim got its turn is woken through a socket beside the file.
//! 5. `process`: the claims of a process that died are removed at once, if the kernel proves that it died.
//! 6. `queue`: who has to wait for the file does not do so on the library's thread, and shares a commit with others.
//!
//! Beside `jobs.db` there are `jobs.db-wal` and `jobs.db-shm`, the lock files `jobs.db-gate` and `jobs.db-live`,
//! and a socket `jobs.db-bell-…` for each open manager. Another copy of `SQLite` in the same process must not open the
//! file: it would drop our locks.

mod bell;
mod database;
mod failure;
mod file;
mod gate;
mod line;
mod process;
mod queue;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_lite::future::or;

use self::bell::Bell;
use self::database::Database;
use self::gate::Gate;
use self::line::{Peer, Transaction};
use self::queue::{Shared, Urgency};
use crate::clock::Moment;
use crate::error::{Error, Result};
use crate::runtime::Environment;
use crate::store::{Ahead, Claim, Departure, Limits, Name, Place, Record, Renewal, Standing, Store, Token};

/// Who gets his turn so soon need not hear whether those before him die: to watch them takes a thread and four system calls.
const SOON: Duration = Duration::from_millis(5);

/// One manager's store on a database file.
pub struct SqliteStore {
    shared: Arc<Shared>,
}

impl SqliteStore {
    /// Opens the database file, which is created if it does not exist. What may have to wait for others, such as making
    /// its tables, is done by the first request.
    ///
    /// # Errors
    /// `Invalid` when the path cannot be one of a database file, `Denied` when it cannot be written, `Incompatible` when
    /// the file is another program's, `Limit` when a file or a thread cannot be had.
    pub fn open(path: &Path, env: Arc<dyn Environment>) -> Result<Arc<Self>> {
        let gate = Gate::open(path, database::check_file)?;
        let bell = Bell::bind(&gate.path, gate.mode, env.random())
            .map_err(|failure| Error::from(failure).at(gate.path.display()))?;
        Ok(Arc::new(Self { shared: Shared::start(env, bell, Database::new(gate)?)? }))
    }

    /// Notes where the claim stands.
    fn stands(&self, claim: &Claim, answer: Result<(Standing, Vec<Peer>)>) -> Result<Standing> {
        // An error: it may be in the line.
        let (standing, ahead) = answer?;
        if let Standing::Behind(..) = standing {
            self.shared.bell.waits(claim.id, ahead);
        } else {
            self.shared.bell.forget(claim.id);
        }
        Ok(standing)
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

impl std::fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqliteStore").field("path", &self.shared.path).finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for SqliteStore {
    /// A claim may be passed over late by the time its successor needs to wake up and to get at the file.
    fn limits(&self) -> Limits {
        Limits { min_ttl: Duration::from_millis(50), slack: Duration::from_millis(500) }
    }

    fn claim_at_once(&self, sent: Moment, claim: &Claim) -> Option<Result<Standing>> {
        self.shared.bell.turn(claim.id);
        Some(self.stands(claim, self.shared.run_here(|line| line.claim(sent, claim)).ok()?))
    }

    fn leave_at_once(&self, claim: &Claim) -> Option<Result<Departure>> {
        let departure = self.shared.run_here(|line| line.leave(claim)).ok()?;
        self.shared.bell.forget(claim.id);
        Some(departure)
    }

    async fn claim(&self, sent: Moment, claim: &Claim) -> Result<Standing> {
        // Before the claim is in the line: its bell may ring before this call has answered.
        self.shared.bell.turn(claim.id);
        let wish = claim.clone();
        self.stands(claim, self.shared.call(Urgency::Other, move |line| line.claim(sent, &wish)).await)
    }

    async fn turn(&self, place: &Place, ahead: &Ahead) -> Result<()> {
        let (id, turn) = (place.claim.id, self.shared.bell.turn(place.claim.id));
        let soon = self.shared.env.now() + SOON;
        let attend = async {
            self.shared.env.sleep_until(soon).await;
            let _attending: Vec<_> =
                self.shared.bell.ahead(id).into_iter().map(|peer| self.shared.attend(peer)).collect();
            std::future::pending::<()>().await;
        };
        self.shared.wait(or(turn.notified(), attend), ahead.look_at).await
    }

    async fn look(&self, place: &Place) -> Result<Standing> {
        let known = place.clone();
        self.stands(&place.claim, self.shared.call(Urgency::Other, move |line| line.look(&known)).await)
    }

    async fn renew(&self, sent: Moment, places: &[Place]) -> Vec<Result<Renewal>> {
        let known = places.to_vec();
        match self.shared.call(Urgency::Renewal, move |line| line.renew(sent, &known)).await {
            Ok(renewals) => renewals.into_iter().map(Ok).collect(),
            Err(error) => places.iter().map(|_| Err(error.clone())).collect(),
        }
    }

    async fn leave(&self, claim: &Claim) -> Result<Departure> {
        let leaving = claim.clone();
        let departure = self.shared.call(Urgency::Other, move |line| line.leave(&leaving)).await;
        self.shared.bell.forget(claim.id);
        departure
    }

    async fn inspect(&self, name: &Name) -> Result<Option<Record>> {
        let name = name.clone();
        let work = move |line: &mut Transaction<'_>| {
            line.remove_gone(&name)?;
            line.records(&name, |other| name == *other)
        };
        let records = self.shared.call(Urgency::Other, work).await?;
        Ok(records.into_iter().next())
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Record>> {
        let prefix = prefix.to_owned();
        self.shared.call(Urgency::Other, move |line| line.records(&prefix, |name| name.starts_with(&prefix))).await
    }

    async fn changed(&self, name: &Name, seen: Option<Token>) -> Result<()> {
        let watch = self.shared.bell.watch(name);
        loop {
            // Made before the look, so that it hears what rings during it.
            let rung = watch.notify.notified();
            let name = name.clone();
            let (holder, look_at, peer) = self.shared.call(Urgency::Other, move |line| line.watch(&name, seen)).await?;
            if holder != seen {
                return Ok(());
            }
            let _attending = peer.map(|peer| self.shared.attend(peer));
            self.shared.wait(rung, look_at).await?;
        }
    }

    async fn evict(&self, name: &Name, token: Token) -> Result<bool> {
        let name = name.clone();
        self.shared.call(Urgency::Other, move |line| line.evict(&name, token)).await
    }

    async fn ping(&self) -> Result<()> {
        self.shared.call(Urgency::Other, |_| Ok(())).await
    }

    /// Waits for the transaction that runs, if one does.
    async fn close(&self) {
        self.shared.close().await;
    }
}
