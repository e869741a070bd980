//! The locks beside the database file: `-gate`, where writers queue, and `-live`, held by all who have it open.
//!
//! They are POSIX record locks, which belong to the process: a `flock` or an open-file lock would be inherited by a
//! forked child and stay locked after its parent was killed. The price: they do not exclude threads, and closing *any*
//! descriptor of a file drops the process's locks on it. So each database file has one [`Files`] a process, with a mutex
//! for the threads, kept until the last of its stores is gone; nothing here ever opens an existing database file itself.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::thread;
use std::time::Duration;

use rusqlite::Connection;
use rusqlite::config::DbConfig;
use rustix::fs::{Access, AtFlags, CWD, FlockOperation, StatxFlags, accessat, fcntl_lock, statx};
use rustix::io::Errno;

use super::failure::Failure;
use crate::error::{Error, ErrorKind};
use crate::fork;
use crate::runtime::lock;

/// Device and inode: which file it is, whatever its path.
type Identity = (u64, u64);

/// By the gate file, which may outlive the database file beside it: its locks must be dropped by nobody but the last.
static OPEN: Mutex<BTreeMap<Identity, Open>> = Mutex::new(BTreeMap::new());

struct Open {
    files: Arc<Files>,
    stores: Vec<Weak<Mutex<Option<Connection>>>>,
    process: u32,
}

/// One store's share in the locks of a database file.
pub(super) struct Gate {
    /// The database file, without symbolic links.
    pub(super) path: PathBuf,
    pub(super) mode: u32,
    identity: Identity,
    files_identity: Identity,
    files: Option<Arc<Files>>,
    /// Locked only while a fork is kept waiting.
    pub(super) connection: Arc<Mutex<Option<Connection>>>,
}

struct Files {
    gate: File,
    live: File,
    threads: Mutex<()>,
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
        one_path(&path, meta.nlink())?;
        writable(&path)?;
        if meta.len() > 0 && !beside(&path, "-gate").exists() {
            check(&path).map_err(|failure| Error::from(failure).at(path.display()))?;
        }
        let connection = Arc::default();
        let (identity, mode) = ((meta.dev(), meta.ino()), meta.mode() & 0o777);
        // Looked at by its path: opening it, and closing it again, would drop the locks of a store that has it open.
        let known = rustix::fs::stat(beside(&path, "-gate")).ok().map(|stat| (stat.st_dev, stat.st_ino));
        let (files_identity, files) = if let Some(known) = known
            && let Some(entry) = open.get_mut(&known)
        {
            if entry.process != std::process::id() {
                return Err(inherited(&path).into());
            }
            entry.stores.push(Arc::downgrade(&connection));
            (known, entry.files.clone())
        } else {
            let side = |suffix| {
                let side = beside(&path, suffix);
                let failed = |error| Failure::io(format!("cannot open {}", side.display()), &error);
                let file = create(&side, mode).map_err(failed)?;
                let meta = file.metadata().map_err(failed)?;
                Ok::<_, Failure>((file, (meta.dev(), meta.ino())))
            };
            let ((gate, identity), (live, _)) = (side("-gate")?, side("-live")?);
            let files = Arc::new(Files { gate, live, threads: Mutex::new(()) });
            let stores = vec![Arc::downgrade(&connection)];
            open.insert(identity, Open { files: files.clone(), stores, process: std::process::id() });
            (identity, files)
        };
        Ok(Self { path, mode, identity, files_identity, files: Some(files), connection })
    }

    /// Fails when the path leads to another file than it did: two files would have two holders.
    pub(super) fn check_same_file(&self) -> Result<(), Failure> {
        match rustix::fs::stat(&self.path) {
            Ok(stat) if (stat.st_dev, stat.st_ino) == self.identity && links(&stat) == 1 => Ok(()),
            Ok(stat) if (stat.st_dev, stat.st_ino) == self.identity => one_path(&self.path, links(&stat)),
            Ok(_) | Err(Errno::NOENT) => Err(Failure::incompatible("the database file was deleted or replaced")),
            Err(cause) => Err(Failure::system("cannot find the database file", cause)),
        }
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
        record_lock(&self.files().live, FlockOperation::NonBlockingLockShared)
            .map_err(|cause| Failure::system("cannot lock the live file beside the database file", cause))
    }

    /// Takes it back.
    pub(super) fn not_live(&self) {
        let _ = record_lock(&self.files().live, FlockOperation::NonBlockingUnlock);
    }

    /// Whether no other process has the store open. That stays so until [`live`](Self::live) or
    /// [`not_live`](Self::not_live), one of which must follow inside the gate.
    pub(super) fn is_alone(&self) -> Result<bool, Failure> {
        match record_lock(&self.files().live, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::AGAIN | Errno::ACCESS) => Ok(false),
            Err(cause) => Err(Failure::system("cannot lock the live file beside the database file", cause)),
        }
    }

    /// Closes the connection. The next transaction makes a new one.
    pub(super) fn disconnect(&self) {
        let _still = fork::keep_waiting();
        lock(&self.connection).take();
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
/// the parent's (they belong to that process), and leaves the log alone.
///
/// What was not whole at the fork is left, and refused by `open`.
fn disinherit(open: &mut BTreeMap<Identity, Open>) {
    let process = std::process::id();
    open.retain(|_, entry| {
        let close = |store: Arc<Mutex<Option<Connection>>>| {
            let mut connection = store.try_lock().ok()?;
            if let Some(connection) = &*connection {
                connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).ok()?;
            }
            connection.take();
            Some(())
        };
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

/// Refuses a file that two paths lead to: each would have locks of its own, and so a holder of its own.
fn one_path(path: &Path, links: u64) -> Result<(), Failure> {
    let shown = path.display();
    if links > 1 {
        return Err(Error::invalid(format!("{shown} has {links} hard links: leases need one path to the file")).into());
    }
    let mount = |path: &Path| {
        let found = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).ok()?;
        StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::MNT_ID).then_some(found.stx_mnt_id)
    };
    // A kernel that does not say which mount it is (before 5.8) is believed.
    if let (Some(file), Some(directory)) = (mount(path), path.parent().and_then(mount))
        && file != directory
    {
        return Err(Error::invalid(format!("{shown} is a mount of its own: mount its directory, not the file")).into());
    }
    Ok(())
}

/// The path with the suffix appended to its file name.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut beside = path.as_os_str().to_owned();
    beside.push(suffix);
    beside.into()
}

/// Whether this process may write there, without opening it.
pub(super) fn writable(path: &Path) -> Result<(), Failure> {
    accessat(CWD, path.as_os_str().as_bytes(), Access::READ_OK | Access::WRITE_OK, AtFlags::EACCESS)
        .map_err(|cause| Failure::system(format!("cannot write to {}", path.display()), cause))
}

fn create(path: &Path, mode: u32) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(mode).open(path)
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
