//! The connection: what is checked before the file is used, and the frame around each transaction.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, params};

use super::failure::Failure;
use super::file::{Log, Record, copied, taken_away, writable};
use super::gate::{Entered, Gate};
use super::line::{Effects, SharedClock, Transaction};
use super::process::Process;
use crate::clock::Moment;
use crate::error::{Error, ErrorKind};
use crate::fork::keep_waiting;
use crate::runtime::{Environment, lock};

type Result<T, E = Failure> = std::result::Result<T, E>;

const SCHEMA: &str = include_str!("schema.sql");
/// "LEAS" in the header of the file.
const APPLICATION: i32 = 0x4c45_4153;
const VERSION: i32 = 2;
/// How many tokens one commit that is synced to the disk reserves.
const TOKENS: i64 = 65_536;
/// More claims never share a transaction.
pub(super) const BATCH: usize = 256;
const LOG: &str = "the -wal or -shm file beside it";
/// Between two looks at the side files: less than between two renewals, and many transactions.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Rows changed between two checkpoints.
const CHECKPOINT_EVERY: u64 = 1_000;
/// The pages of a log for which writers are made to pause.
const LONG_LOG: i64 = 20_000;

/// The database file of one store.
pub(super) struct Database {
    pub(super) gate: Gate,
    pub(super) session: Session,
}

pub(super) struct Session {
    /// Whether the gate has a connection: not before the first transaction, and not after one that failed.
    connected: bool,
    /// Rows changed by this connection.
    changes: u64,
    boot: String,
    clock: SharedClock,
    process: (Process, Option<i64>),
    seen: Option<([u8; 16], i64)>,
    /// The one that the connection uses.
    log: Option<Log>,
    look_at: Moment,
    swept_at: i64,
    checkpoint_at: u64,
}

impl Database {
    pub(super) fn new(gate: Gate) -> Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_err(|error| Failure::io("cannot read the boot id in /proc", &error))?;
        let session = Session {
            connected: false,
            changes: 0,
            boot: boot.trim().to_owned(),
            clock: SharedClock { offset: boottime_offset()? },
            process: Process::own(),
            seen: None,
            log: None,
            look_at: Moment::from_nanos(0),
            swept_at: i64::MIN / 2,
            checkpoint_at: CHECKPOINT_EVERY,
        };
        Ok(Self { gate, session })
    }
}

impl Session {
    /// Runs the work as one transaction. After an error nothing of it was applied, unless the error is in doubt.
    pub(super) fn transact<T>(
        &mut self,
        gate: &Gate,
        _entered: &Entered<'_>,
        env: &dyn Environment,
        bell: &str,
        work: impl FnOnce(&mut Transaction<'_>) -> Result<T>,
    ) -> Result<(T, Effects)> {
        let _still = keep_waiting();
        let mut kept = lock(&gate.connection);
        self.connected = false;
        gate.check_same_file()?;
        let now = env.now();
        if now >= self.look_at {
            gate.check_same_side_files(kept.as_ref().and(self.log))?;
            self.look_at = now + LOOK_EVERY;
        }
        if !self.process.0.is_own() {
            // A forked child: what it enters is not its parent's.
            self.process = Process::own();
        }
        // Whatever fails drops the connection, and with it what it had begun.
        let sql = match kept.take() {
            Some(sql) => sql,
            None => self.connect(gate)?,
        };
        // Read inside the gate: a transaction never judges by a clock older than the last one's.
        let now = self.clock.shared(env.now());
        let first_token = self.begin(&sql)?;
        let mut transaction = Transaction {
            sql: &sql,
            clock: self.clock,
            now,
            bell,
            process: &self.process,
            next_token: first_token,
            swept_at: &mut self.swept_at,
            changed: BTreeSet::new(),
            effects: Effects::default(),
        };
        let answer = work(&mut transaction)?;
        let (next_token, effects) = transaction.finish(first_token)?;
        sql.prepare_cached("COMMIT")?.execute([]).map_err(Failure::Commit)?;
        if next_token != first_token {
            // Before any of them is answered: a copy that knows less is found out by it.
            gate.set_next_token(next_token).map_err(|failure| Error::from(failure).with_doubt())?;
        }
        self.seen = self.seen.map(|(incarnation, _)| (incarnation, next_token));
        self.changes = sql.total_changes();
        *kept = Some(sql);
        self.connected = true;
        Ok((answer, effects))
    }

    /// Begins, and returns the next token, of which there are enough.
    fn begin(&mut self, sql: &Connection) -> Result<i64> {
        loop {
            sql.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
            let (incarnation, next, reserved) = sql
                .prepare_cached("SELECT incarnation, next_token, reserved_token FROM meta")?
                .query_row([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?)))?;
            let (first, highest) = *self.seen.get_or_insert((incarnation, next));
            if first != incarnation || next < highest {
                return Err(Failure::incompatible("the database file is not the one it was: open it anew"));
            }
            self.seen = Some((first, next));
            if reserved - next > i64::try_from(BATCH).unwrap_or(i64::MAX) {
                return Ok(next);
            }
            // Synced, so that no token is given twice after a power failure. The level cannot change in a transaction.
            sql.execute_batch("ROLLBACK; PRAGMA synchronous = FULL; BEGIN IMMEDIATE")?;
            sql.execute("UPDATE meta SET reserved_token = max(reserved_token, next_token) + ?1", [TOKENS])?;
            sql.execute_batch("COMMIT; PRAGMA synchronous = NORMAL")?;
        }
    }

    fn connect(&mut self, gate: &Gate) -> Result<Connection> {
        let is_shared = gate.is_shared()?;
        let sql = self.connect_to(gate, is_shared).map_err(|failure| {
            gate.as_live_as_before();
            explain(failure, &gate.path)
        })?;
        gate.live()?;
        self.checkpoint_at = CHECKPOINT_EVERY;
        self.swept_at = i64::MIN / 2;
        Ok(sql)
    }

    fn connect_to(&mut self, gate: &Gate, is_shared: bool) -> Result<Connection> {
        // Before SQLite would make new ones: who is there already uses those.
        if is_shared && Log::find(&gate.path)?.is_none_or(|log| gate.log().ok() != Some(Some(log))) {
            return Err(taken_away(LOG));
        }
        let record = gate.record()?;
        if let Some(known) = record.filter(|known| known.next_token > 0) {
            known.check_file(&Record::of(&gate.path, known.incarnation)?)?;
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut sql = Connection::open_with_flags(&gate.path, flags)?;
        // Nobody of ours is to be waited for inside the gate. Another program is, for a moment: this may be the caller's
        // thread, and the manager tries again.
        sql.busy_timeout(Duration::from_millis(25))?;
        sql.set_prepared_statement_cache_capacity(32);
        // Else the planner looks at the values of parameters, and prepares a statement anew for each new one.
        sql.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
        keep_log(&sql)?;
        let is_new = check_identity(&sql)?;
        // Tables and no record, or the other way round. Who was killed in between had recorded no token yet.
        if record.map_or(!is_new, |known| is_new && known.next_token > 0) {
            return Err(copied());
        }
        // Small pages: a transaction changes a row or two, and writes the pages they are on. Fixed by the first.
        sql.pragma_update(None, "page_size", 1024)?;
        let mode: String = sql.pragma_update_and_check(None, "journal_mode", "wal", |row| row.get(0))?;
        if mode != "wal" {
            let message = "this file system cannot share memory between processes: put the file on a local one";
            return Err(Error::new(ErrorKind::Unsupported, message).into());
        }
        sql.execute_batch("PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0; PRAGMA trusted_schema = OFF")?;
        if is_new {
            let incarnation: [u8; 16] = random()?;
            // Told before: a file that has tables and no record is a copy.
            gate.set_record(&Record::of(&gate.path, incarnation)?)?;
            let create = sql.transaction()?;
            create.execute_batch(SCHEMA)?;
            create.pragma_update(None, "application_id", APPLICATION)?;
            create.pragma_update(None, "user_version", VERSION)?;
            create.execute("INSERT INTO meta VALUES (1, ?1, ?2, 1, 1)", params![incarnation, self.boot])?;
            create.commit()?;
            gate.set_next_token(1)?;
        }
        let (incarnation, boot, next, reserved): ([u8; 16], String, i64, i64) =
            sql.query_row("SELECT incarnation, boot, next_token, reserved_token FROM meta", [], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
            })?;
        let next = if boot == self.boot { next } else { reserved };
        if record.is_some_and(|known| !is_new && (known.incarnation != incarnation || known.next_token > next)) {
            return Err(copied());
        }
        if boot != self.boot {
            self.begin_boot(is_shared, &mut sql)?;
        }
        let log = Log::find(&gate.path)?;
        match &log {
            Some(log) if !is_shared => gate.set_log(log)?,
            Some(log) if gate.log()? == Some(*log) => {}
            _ => return Err(taken_away(LOG)),
        }
        self.log = log;
        sql.execute_batch("PRAGMA synchronous = NORMAL")?;
        Ok(sql)
    }

    /// The machine went down since, and every holder with it; what had not reached the disk is below the reserved mark.
    fn begin_boot(&mut self, is_shared: bool, sql: &mut Connection) -> Result<()> {
        if is_shared {
            return Err(Failure::incompatible(
                "a live process uses the database file under another boot id: containers must not fake theirs",
            ));
        }
        let reset = sql.transaction()?;
        reset.execute_batch("DELETE FROM line; DELETE FROM watch")?;
        reset.execute("UPDATE meta SET boot = ?1, next_token = reserved_token", [&self.boot])?;
        Ok(reset.commit()?)
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connected
    }

    /// Whether so much was written that the log should be moved into the file. Says so once.
    pub(super) fn is_checkpoint_due(&mut self) -> bool {
        let is_due = self.changes >= self.checkpoint_at;
        if is_due {
            self.checkpoint_at = self.changes + CHECKPOINT_EVERY;
        }
        is_due
    }
}

/// Moves the log into the file, and makes nobody wait for that. Whether the log now starts over or is still short: those
/// who write all the time keep it going.
pub(super) fn checkpoint(path: &Path) -> Result<bool> {
    let _still = keep_waiting();
    let sql = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    keep_log(&sql)?;
    let (pages, moved): (i64, i64) =
        sql.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| Ok((row.get(1)?, row.get(2)?)))?;
    Ok(moved == pages || pages < LONG_LOG)
}

/// Closing it leaves the log where it is: see [`Gate::disconnect`].
fn keep_log(sql: &Connection) -> Result<()> {
    Ok(sql.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map(drop)?)
}

/// Whether the file is still empty. Refuses files of others and of later versions, and changes nothing.
fn check_identity(sql: &Connection) -> Result<bool> {
    let application: i32 = sql.query_row("PRAGMA application_id", [], |row| row.get(0))?;
    let version: i32 = sql.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    match (application, version) {
        (APPLICATION, VERSION) => Ok(false),
        (APPLICATION, _) => Err(Failure::incompatible(format!(
            "the database file has version {version} and this library knows version {VERSION}: use the same library everywhere"
        ))),
        (0, 0) if !sql.prepare("SELECT 1 FROM sqlite_schema")?.exists([])? => Ok(true),
        _ => Err(Failure::incompatible("the file is a database of another program: give a file of its own")),
    }
}

/// The check of a file that was never used as a store here.
pub(super) fn check_file(path: &Path) -> Result<()> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    // Immutable: else a log and an index would be put beside it.
    let uri = format!("file:{}?immutable=1", percent_encode(path.as_os_str().as_bytes(), NON_ALPHANUMERIC));
    let check = |sql: Connection| {
        sql.busy_timeout(Duration::ZERO)?;
        check_identity(&sql)
    };
    match Connection::open_with_flags(uri, flags).map_err(Failure::from).and_then(check) {
        // It is looked at again before it is used.
        Err(Failure::Sqlite(error)) if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) => Ok(()),
        Err(failure) => Err(explain(failure, path)),
        Ok(false) => Err(copied()),
        Ok(true) => Ok(()),
    }
}

/// `SQLite` does not say why it cannot open a file.
fn explain(failure: Failure, path: &Path) -> Failure {
    match &failure {
        Failure::Sqlite(error) if error.sqlite_error_code() == Some(ErrorCode::CannotOpen) => {
            // As many as it takes: those that it had are closed again.
            let descriptors = (0..4).map(|_| File::open("/dev/null")).collect::<std::io::Result<Vec<_>>>();
            let descriptors = descriptors.map_err(|error| Failure::io("cannot open the files of a database", &error));
            writable(path).and(descriptors.map(drop)).err().unwrap_or(failure)
        }
        _ => failure,
    }
}

fn random() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| {
        Error::new(ErrorKind::Internal, "the operating system has no randomness").with_source(error)
    })?;
    Ok(bytes)
}

/// What this process's time namespace adds to `CLOCK_BOOTTIME`, in nanoseconds. The file tells of the namespace of its
/// children, which is its own unless it has just asked for another.
fn boottime_offset() -> Result<i64> {
    let offsets = match fs::read_to_string("/proc/self/timens_offsets") {
        Ok(offsets) => offsets,
        // A kernel without time namespaces.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Failure::io("cannot read /proc/self/timens_offsets", &error)),
    };
    if fs::read_link("/proc/self/ns/time").ok() != fs::read_link("/proc/self/ns/time_for_children").ok() {
        let message = "the process is between two time namespaces: start the program anew";
        return Err(Error::new(ErrorKind::Unsupported, message).into());
    }
    offset_of_boottime(&offsets)
        .ok_or_else(|| Error::new(ErrorKind::Unsupported, "cannot understand /proc/self/timens_offsets").into())
}

fn offset_of_boottime(offsets: &str) -> Option<i64> {
    let mut words = offsets.lines().find_map(|line| line.strip_prefix("boottime"))?.split_ascii_whitespace();
    let (seconds, nanos) = (words.next()?.parse::<i64>().ok()?, words.next()?.parse::<i64>().ok()?);
    seconds.checked_mul(1_000_000_000)?.checked_add(nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_of_a_time_namespace_is_understood() {
        let text = "monotonic           -5         7\nboottime           -86400         250000000\n";
        assert_eq!(offset_of_boottime(text), Some(-86_400_000_000_000 + 250_000_000));
        assert_eq!(offset_of_boottime("nonsense"), None);
        boottime_offset().unwrap();
    }
}
