//! How managers wake one another: a datagram socket each, by path, beside the database file, rung after COMMIT.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{AtFlags, Mode, OFlags, chmodat, open, unlinkat};
use tokio::sync::Notify;

use super::failure::Failure;
use super::line::Peer;
use crate::runtime::lock;
use crate::store::{ClaimId, Name};

/// So many unread bells may be as many as the kernel keeps (`net.unix.max_dgram_qlen`, at least 10): some may be lost.
const BURST: usize = 8;
const LONGEST: usize = 1 + Name::MAX_BYTES;

/// What a bell says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ring {
    /// What was ahead of that claim is gone.
    Turn(ClaimId),
    /// The name has another head.
    Changed(Name),
}

/// A manager's bell, and those of its waiters who listen to it.
pub(super) struct Bell {
    /// The file name of the socket: random, and never bound again.
    pub(super) name: String,
    /// `None` once it is closed.
    socket: Mutex<Option<Arc<Socket>>>,
    /// One for each claim of this store that may have to wait. Rung before it is waited for, it stays rung.
    turns: Mutex<HashMap<ClaimId, Turn>>,
    watches: Mutex<HashMap<Name, Arc<Notify>>>,
}

#[derive(Default)]
struct Turn {
    notify: Arc<Notify>,
    /// The managers that it waits for.
    ahead: Vec<Peer>,
}

pub(super) struct Socket {
    name: String,
    pub(super) datagrams: UnixDatagram,
    directory: OwnedFd,
    /// Wakes the thread that listens, for other work.
    pub(super) wake: OwnedFd,
}

/// Somebody of this store who waits for another head of a name.
pub(super) struct Watch<'a> {
    bell: &'a Bell,
    name: Name,
    pub(super) notify: Arc<Notify>,
}

impl Bell {
    /// A bell beside the database file, with the permissions of that file.
    pub(super) fn bind(database: &Path, mode: u32, random: u64) -> Result<Self, Failure> {
        let failed = |cause| Failure::system("cannot make a socket beside the database file", cause);
        let parent = database.parent().expect("an absolute path of a file");
        let directory =
            open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
        let name = format!("{}{random:016x}", prefix(database));
        let io = |error| Failure::io("cannot make a socket beside the database file", &error);
        let datagrams = UnixDatagram::bind(through(&directory, &name)).map_err(io)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)?;
        let socket = Socket { name: name.clone(), datagrams, directory, wake };
        socket.datagrams.set_nonblocking(true).map_err(io)?;
        chmodat(&socket.directory, &*name, Mode::from_raw_mode(mode), AtFlags::empty()).map_err(failed)?;
        let socket = Mutex::new(Some(Arc::new(socket)));
        Ok(Self { name, socket, turns: Mutex::default(), watches: Mutex::default() })
    }

    pub(super) fn socket(&self) -> Option<Arc<Socket>> {
        lock(&self.socket).clone()
    }

    /// Removes the socket: what is rung from now on is for nobody.
    pub(super) fn close(&self) {
        lock(&self.socket).take();
    }

    /// Removes the sockets of managers that are gone.
    pub(super) fn remove_stale(&self, database: &Path) {
        let Some(socket) = self.socket() else { return };
        let Ok(entries) = fs::read_dir(through(&socket.directory, "")) else { return };
        let prefix = prefix(database);
        let sockets = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()));
        for name in sockets.map(|entry| entry.file_name()) {
            if name.as_bytes().starts_with(prefix.as_bytes()) && name.len() == prefix.len() + 16 {
                self.send_to(&name, None);
            }
        }
    }

    /// Rings another's bell, or one's own without the socket.
    pub(super) fn ring(&self, bell: &str, ring: &Ring) {
        if bell == self.name { self.hear(ring) } else { self.send_to(OsStr::new(bell), Some(ring)) }
    }

    /// Sends, or with nothing to send only tries the connection.
    fn send_to(&self, bell: &OsStr, ring: Option<&Ring>) {
        let Some(own) = self.socket() else { return };
        // It is what another manager wrote: never a way out of the directory.
        if bell.as_bytes().contains(&b'/') {
            return;
        }
        let path = through(&own.directory, bell);
        // A socket for each: the unread bells of a frozen manager count against their sender's buffer.
        let outcome = UnixDatagram::unbound().and_then(|socket| {
            socket.set_nonblocking(true)?;
            socket.connect(&path)?;
            ring.map_or(Ok(0), |ring| socket.send(&encode(ring)))
        });
        // Full: its reader wakes everybody after a burst. Any other failure: they look when they said they would. Refused:
        // nobody has it open any more, and its name is never bound again.
        if outcome.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
            let _ = unlinkat(&own.directory, bell, AtFlags::empty());
        }
    }

    /// Hears what was rung and not heard yet.
    pub(super) fn hear_all(&self, socket: &Socket) {
        let (mut buffer, mut heard) = ([0; LONGEST], 0);
        while let Ok(length) = socket.datagrams.recv(&mut buffer) {
            heard += 1;
            if let Some(ring) = decode(&buffer[..length]) {
                self.hear(&ring);
            }
        }
        if heard >= BURST {
            self.wake_all();
        }
    }

    fn hear(&self, ring: &Ring) {
        match ring {
            Ring::Turn(claim) => {
                // Nobody is woken under the lock: what is woken may be dropped at once, and leave.
                let turn = lock(&self.turns).get(claim).map(|turn| turn.notify.clone());
                turn.inspect(|turn| turn.notify_one());
            }
            Ring::Changed(name) => {
                if let Some(watch) = lock(&self.watches).get(name) {
                    watch.notify_waiters();
                }
            }
        }
    }

    pub(super) fn wake_all(&self) {
        let turns: Vec<_> = lock(&self.turns).values().map(|turn| turn.notify.clone()).collect();
        for turn in turns {
            turn.notify_one();
        }
        lock(&self.watches).values().for_each(|watch| watch.notify_waiters());
    }

    /// The latch of a claim, made when first asked for: before the claim can be in any line.
    pub(super) fn turn(&self, claim: ClaimId) -> Arc<Notify> {
        lock(&self.turns).entry(claim).or_default().notify.clone()
    }

    /// Notes what managers the claim waits for.
    pub(super) fn waits(&self, claim: ClaimId, ahead: Vec<Peer>) {
        if let Some(turn) = lock(&self.turns).get_mut(&claim) {
            turn.ahead = ahead;
        }
    }

    pub(super) fn ahead(&self, claim: ClaimId) -> Vec<Peer> {
        lock(&self.turns).get(&claim).map(|turn| turn.ahead.clone()).unwrap_or_default()
    }

    /// The claim waits no more.
    pub(super) fn forget(&self, claim: ClaimId) {
        lock(&self.turns).remove(&claim);
    }

    pub(super) fn watch(&self, name: &Name) -> Watch<'_> {
        let notify = lock(&self.watches).entry(name.clone()).or_default().clone();
        Watch { bell: self, name: name.clone(), notify }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // A file that is left is removed by the next manager.
        let _ = unlinkat(&self.directory, &*self.name, AtFlags::empty());
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        let mut watches = lock(&self.bell.watches);
        // Let go with the table locked: of two that drop theirs, one sees that only the table's is left.
        drop(std::mem::take(&mut self.notify));
        if watches.get(&self.name).is_some_and(|notify| Arc::strong_count(notify) == 1) {
            watches.remove(&self.name);
        }
    }
}

/// What all bells of that database file begin with.
fn prefix(database: &Path) -> String {
    let name = database.file_name().expect("a path of a file").as_bytes().iter().take(40);
    let plain = |&byte: &u8| if byte.is_ascii_graphic() { char::from(byte) } else { '_' };
    format!("{}-bell-", name.map(plain).collect::<String>())
}

/// A path that fits the 108 bytes of a socket's address however deep the directory is.
fn through(directory: &OwnedFd, name: impl AsRef<Path>) -> PathBuf {
    Path::new(&format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name)
}

fn encode(ring: &Ring) -> Vec<u8> {
    match ring {
        Ring::Turn(claim) => [b"t".as_slice(), &claim.0.to_be_bytes()].concat(),
        Ring::Changed(name) => [b"c", name.as_bytes()].concat(),
    }
}

/// `None` for what no manager sends: anyone who may write in the directory may ring.
fn decode(bytes: &[u8]) -> Option<Ring> {
    match bytes.split_first()? {
        (b't', claim) => Some(Ring::Turn(ClaimId(u128::from_be_bytes(claim.try_into().ok()?)))),
        (b'c', name) => Some(Ring::Changed(Name::new(str::from_utf8(name).ok()?).ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_rung_is_heard() {
        let name = Name::new(&"é".repeat(256)).unwrap();
        for ring in [Ring::Turn(ClaimId(u128::MAX - 7)), Ring::Changed(name)] {
            let bytes = encode(&ring);
            assert!(bytes.len() <= LONGEST);
            assert_eq!(decode(&bytes), Some(ring));
        }
        for noise in [&b""[..], b"t", b"t0123456789abcdef0", b"c", b"x", b"c\xff"] {
            assert_eq!(decode(noise), None);
        }
    }
}
