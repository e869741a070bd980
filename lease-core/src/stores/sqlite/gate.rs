//! The locks beside the database file: `-gate`, where writers queue, and `-live`, held by all who have it open.
//!
//! They are POSIX record locks, which belong to the process: a `flock` or an open-file lock would be inherited by a
//! forked child and stay locked after its parent was killed. The price: they do not exclude threads, and closing *any*
//! descriptor of a file drops the process's locks on it. So each database file has one [`Files`] a process, with a mutex
//! for the threads, kept until the last of its stores is gone; nothing here ever opens an existing database file itself.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::thread;
use std::time::Duration;

use rusqlite::Connection;
use rusqlite::config::DbConfig;
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;

use super::failure::Failure;
use super::file::{Identity, Log, Record, beside, check_file_system, check_one_path, identity, taken_away, writable};
use crate::error::{Error, ErrorKind};
use crate::fork;
use crate::runtime::lock;

/// By the gate file, which may outlive the database file beside it: its locks must be dropped by nobody but the last.
static OPEN: Mutex<BTreeMap<Identity, Open>> = Mutex::new(BTreeMap::new());

struct Open {
    database: Identity,
    files: Arc<Files>,
    stores: Vec<Weak<Mutex<Option<Connection>>>>,
    process: u32,
}

/// One store's share in the locks of a database file.
pub(super) struct Gate {
    /// The database file, without symbolic links.
    pub(super) path: PathBuf,
    pub(super) mode: u32,
    database: Identity,
    files_identity: Identity,
    files: Option<Arc<Files>>,
    /// Locked only while a fork is kept waiting.
    pub(super) connection: Arc<Mutex<Option<Connection>>>,
}

struct Files {
    gate: File,
    live: File,
    identities: [Identity; 2],
    threads: Mutex<()>,
    /// Whether this process says that it has the database open. Changed inside the gate only.
    is_live: AtomicBool,
}

/// Alone among all writers, until dropped.
pub(super) struct Entered<'a> {
    gate: &'a File,
    _thread: MutexGuard<'a, ()>,
}

impl Gate {
    /// Checks the path, and creates an empty database file if there is none. `check` sees a file that has no gate yet.
    pub(super) fn open(path: &Path, check: impl FnOnce(&Path) -> Result<(), Failure>) -> Result<Self, Failure> {
        let shown = path.display();
        let Some(name) = path.file_name() else {
            return Err(Error::invalid(format!("{shown} is no path of a file: give one like jobs.db")).into());
        };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let directory = fs::canonicalize(parent)
            .map_err(|error| Failure::io(format!("cannot use the directory {}", parent.display()), &error))?;
        check_file_system(&directory, path)?;
        // Two threads that open the same file for the first time must not make two `Files` of it.
        let _still = fork::keep_waiting();
        let mut open = lock(&OPEN);
        disinherit(&mut open);
        let path = match fs::canonicalize(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let path = directory.join(name);
                create(&path, 0o666)
                    .and_then(|_| fs::canonicalize(&path))
                    .map_err(|error| Failure::io(format!("cannot create {shown}"), &error))?
            }
            found => found.map_err(|error| Failure::io(format!("cannot use {shown}"), &error))?,
        };
        let meta = fs::metadata(&path).map_err(|error| Failure::io(format!("cannot use {shown}"), &error))?;
        if !meta.is_file() {
            return Err(Error::invalid(format!("{shown} is not a regular file: give the path of one")).into());
        }
        check_one_path(&path, meta.nlink())?;
        check_file_system(&path, &path)?;
        writable(&path)?;
        if meta.len() > 0 && !beside(&path, "-gate").exists() {
            check(&path).map_err(|failure| Error::from(failure).at(path.display()))?;
        }
        let connection = Arc::default();
        let (database, mode) = (of(&meta), meta.mode() & 0o777);
        // Looked at by its path: opening it, and closing it again, would drop the locks of a store that has it open.
        let known = identity(&beside(&path, "-gate"))?;
        let (files_identity, files) = if let Some(known) = known
            && let Some(entry) = open.get_mut(&known)
        {
            if entry.process != std::process::id() {
                return Err(inherited(&path).into());
            }
            if entry.database != database {
                return Err(Error::from(taken_away("the database file")).at(path.display()).into());
            }
            entry.stores.push(Arc::downgrade(&connection));
            (known, entry.files.clone())
        } else {
            let side = |suffix| {
                let side = beside(&path, suffix);
                let failed = |error| Failure::io(format!("cannot open {}", side.display()), &error);
                let file = create_like(&side, &meta).map_err(failed)?;
                let opened = file.metadata().map_err(failed)?;
                Ok::<_, Failure>((file, of(&opened)))
            };
            let ((gate, of_gate), (live, of_live)) = (side("-gate")?, side("-live")?);
            let (identities, is_live) = ([of_gate, of_live], AtomicBool::new(false));
            let files = Arc::new(Files { gate, live, identities, threads: Mutex::new(()), is_live });
            let stores = vec![Arc::downgrade(&connection)];
            open.insert(of_gate, Open { database, files: files.clone(), stores, process: std::process::id() });
            (of_gate, files)
        };
        Ok(Self { path, mode, database, files_identity, files: Some(files), connection })
    }

    /// Fails when the path leads to another file than it did: newcomers would have a holder of their own.
    pub(super) fn check_same_file(&self) -> Result<(), Failure> {
        match rustix::fs::stat(&self.path) {
            Ok(stat) if (stat.st_dev, stat.st_ino) == self.database && links(&stat) == 1 => Ok(()),
            Ok(stat) if (stat.st_dev, stat.st_ino) == self.database => check_one_path(&self.path, links(&stat)),
            Ok(_) | Err(Errno::NOENT) => Err(taken_away("the database file")),
            Err(cause) => Err(Failure::system("cannot find the database file", cause)),
        }
    }

    /// The same of the files beside it, without which newcomers are refused.
    pub(super) fn check_same_side_files(&self, log: Option<Log>) -> Result<(), Failure> {
        for (suffix, known) in ["-gate", "-live"].into_iter().zip(self.files().identities) {
            if identity(&beside(&self.path, suffix))? != Some(known) {
                return Err(taken_away(&format!("the {suffix} file beside it")));
            }
        }
        if log.is_some() && Log::find(&self.path)? != log {
            return Err(taken_away("the -wal or -shm file beside it"));
        }
        Ok(())
    }

    /// Whether anybody else, in this process or another, has the database open, and so knows its log. Like
    /// [`is_alone`](Self::is_alone), which it asks.
    pub(super) fn is_shared(&self) -> Result<bool, Failure> {
        let ours = |store: Arc<Mutex<Option<Connection>>>| {
            !Arc::ptr_eq(&store, &self.connection) && store.try_lock().map_or(true, |connection| connection.is_some())
        };
        let others = !self.is_alone()?;
        let open = lock(&OPEN);
        let stores = open.get(&self.files_identity).into_iter().flat_map(|entry| &entry.stores);
        Ok(others || stores.filter_map(Weak::upgrade).any(ours))
    }

    /// What the side files tell. To be called inside the gate.
    pub(super) fn record(&self) -> Result<Option<Record>, Failure> {
        Record::read(&self.files().gate)
    }

    pub(super) fn set_record(&self, record: &Record) -> Result<(), Failure> {
        record.write(&self.files().gate)
    }

    pub(super) fn set_next_token(&self, next: i64) -> Result<(), Failure> {
        Record::write_next_token(&self.files().gate, next)
    }

    pub(super) fn log(&self) -> Result<Option<Log>, Failure> {
        Log::read(&self.files().live)
    }

    pub(super) fn set_log(&self, log: &Log) -> Result<(), Failure> {
        log.write(&self.files().live)
    }

    /// Waits until no other process and no other thread is inside.
    pub(super) fn enter(&self) -> Result<Entered<'_>, Failure> {
        let files = self.files();
        let thread = files.threads.lock().unwrap_or_else(PoisonError::into_inner);
        record_lock(&files.gate, FlockOperation::LockExclusive)
            .map_err(|cause| Failure::system("cannot lock the gate of the database file", cause))?;
        Ok(Entered { gate: &files.gate, _thread: thread })
    }

    /// The same if it takes no waiting.
    pub(super) fn try_enter(&self) -> Option<Entered<'_>> {
        let files = self.files();
        let thread = match files.threads.try_lock() {
            Ok(thread) => thread,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        record_lock(&files.gate, FlockOperation::NonBlockingLockExclusive).ok()?;
        Some(Entered { gate: &files.gate, _thread: thread })
    }

    /// Says that this process has the store open. To be called inside the gate.
    pub(super) fn live(&self) -> Result<(), Failure> {
        self.files().is_live.store(true, Ordering::Relaxed);
        record_lock(&self.files().live, FlockOperation::NonBlockingLockShared)
            .map_err(|cause| Failure::system("cannot lock the live file beside the database file", cause))
    }

    /// What it said before [`is_alone`](Self::is_alone) asked.
    pub(super) fn as_live_as_before(&self) {
        if self.files().is_live.load(Ordering::Relaxed) {
            // Sharing what is one's own cannot fail.
            let _ = self.live();
        } else {
            self.not_live();
        }
    }

    fn not_live(&self) {
        self.files().is_live.store(false, Ordering::Relaxed);
        let _ = record_lock(&self.files().live, FlockOperation::NonBlockingUnlock);
    }

    /// Whether no other process has the store open. That stays so until [`live`](Self::live) or
    /// [`as_live_as_before`](Self::as_live_as_before), one of which must follow inside the gate.
    pub(super) fn is_alone(&self) -> Result<bool, Failure> {
        match record_lock(&self.files().live, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::AGAIN | Errno::ACCESS) => Ok(false),
            Err(cause) => Err(Failure::system("cannot lock the live file beside the database file", cause)),
        }
    }

    /// Closes the connection. The log is removed only by who alone says that it is in use, and takes that back in the same
    /// stay inside the gate. So who finds the word without the log knows that somebody took the log away.
    pub(super) fn disconnect(&self) {
        let entered = self.try_enter();
        let _still = fork::keep_waiting();
        let is_only = |entry: &Open| entry.stores.len() == 1 && entry.process == std::process::id();
        let is_last = entered.is_some()
            && lock(&OPEN).get(&self.files_identity).is_some_and(is_only)
            && self.is_alone().unwrap_or(false);
        if let Some(connection) = lock(&self.connection).take()
            && is_last
        {
            // If that cannot be set the log stays, and is moved into the file by the next.
            let _ = connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false);
        }
        if is_last {
            self.not_live();
        }
    }

    fn files(&self) -> &Files {
        self.files.as_ref().expect("taken by drop only")
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.disconnect();
        let _still = fork::keep_waiting();
        let mut open = lock(&OPEN);
        let last = open.get_mut(&self.files_identity).is_some_and(|entry| {
            entry.stores.retain(|store| !Weak::ptr_eq(store, &Arc::downgrade(&self.connection)));
            entry.stores.is_empty()
        });
        if last {
            open.remove(&self.files_identity);
        }
        // Closed with the table locked: a successor's locks on the same files would be dropped with them.
        self.files.take();
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        // Unlocking what is locked cannot fail.
        let _ = record_lock(self.gate, FlockOperation::NonBlockingUnlock);
    }
}

/// Closes what a forked child inherited, before it opens a file of its own. It has the descriptors and none of the locks, and
/// so has `SQLite`, whose tables tell it that the locks are there: a new connection would count on them, and another process
/// would delete the log under it. Closing the inherited connections empties the tables. It writes nothing, gives up no lock of
/// the parent's (they belong to that process), and leaves the log alone, as every connection is told to.
///
/// What was not whole at the fork is left, and refused by `open`.
fn disinherit(open: &mut BTreeMap<Identity, Open>) {
    let process = std::process::id();
    open.retain(|_, entry| {
        let close =
            |store: Arc<Mutex<Option<Connection>>>| store.try_lock().map(|mut connection| drop(connection.take())).ok();
        let kept =
            |entry: &Open| entry.stores.iter().filter_map(Weak::upgrade).map(close).any(|closed| closed.is_none());
        entry.process == process || !fork::is_whole() || kept(entry)
    });
}

fn inherited(path: &Path) -> Error {
    let message = format!(
        "{} was open when this process was forked: open it in the child only, close its managers before the fork, or \
         start the child with exec",
        path.display()
    );
    Error::new(ErrorKind::Forked, message)
}

#[allow(clippy::useless_conversion, reason = "narrower on some machines")]
fn links(stat: &rustix::fs::Stat) -> u64 {
    stat.st_nlink.into()
}

fn create(path: &Path, mode: u32) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(mode).open(path)
}

/// The same with the permissions of the database file, whatever the umask: who may use the one has to use the others.
fn create_like(path: &Path, database: &Metadata) -> std::io::Result<File> {
    let mode = database.mode() & 0o777;
    match OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(path) {
        Ok(file) => {
            file.set_permissions(Permissions::from_mode(mode))?;
            // Where that is not allowed, who created it has another group than the database file: see the documentation.
            let owner = rustix::process::geteuid().is_root().then_some(database.uid());
            let _ = fchown(&file, owner, Some(database.gid()));
            Ok(file)
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => create(path, mode),
        Err(error) => Err(error),
    }
}

fn of(meta: &Metadata) -> Identity {
    (meta.dev(), meta.ino())
}

fn record_lock(file: &File, operation: FlockOperation) -> Result<(), Errno> {
    loop {
        match fcntl_lock(file, operation) {
            Err(Errno::INTR) => {}
            // The kernel sees processes, not threads, and so a circle where there is none.
            Err(Errno::DEADLK) => thread::sleep(Duration::from_millis(1)),
            done => return done,
        }
    }
}
