//! Is the process of another manager gone for certain?
//!
//! The kernel is asked for a descriptor of the process with that number. There is none, it says that the process has ended
//! (all of its threads, though nobody may have waited for it yet), or it is of a process that got the number later: each of
//! these is proof, in the pid namespace that the number is from. Anything else is none, and the deadline decides.
//!
//! The number of a namespace is used again only after all of its processes are gone, so mistaking a namespace for an earlier
//! one makes no proof false. Before Linux 6.9 all descriptors have one inode, and a number that is used again is not noticed.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{fstat, stat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, getpid, pidfd_open};

/// What tells a process of this boot from all others, as far as the kernel says.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// Of its descriptor.
    pub(super) inode: i64,
}

pub(super) enum Watch {
    /// For certain, and for ever.
    Gone,
    /// As long as this is not readable.
    Alive(OwnedFd),
    Unknown,
}

impl Process {
    /// This one, and its pid namespace if the kernel tells.
    pub(super) fn own() -> (Self, Option<i64>) {
        let pid = getpid();
        let inode = pidfd_open(pid, PidfdFlags::empty()).and_then(fstat).map(|stat| stat.st_ino.cast_signed());
        let namespace = stat("/proc/self/ns/pid").map(|stat| stat.st_ino.cast_signed());
        let process = Self { pid: pid.as_raw_nonzero().get(), inode: inode.unwrap_or(0) };
        (process, inode.and(namespace).ok())
    }

    pub(super) fn is_own(&self) -> bool {
        getpid().as_raw_nonzero().get() == self.pid
    }

    /// To be asked in its pid namespace only, and after it was known to live.
    pub(super) fn watch(&self) -> Watch {
        let Some(pid) = Pid::from_raw(self.pid) else { return Watch::Unknown };
        let opened = pidfd_open(pid, PidfdFlags::empty()).and_then(|pidfd| Ok((fstat(&pidfd)?.st_ino, pidfd)));
        match opened {
            Err(Errno::SRCH) => Watch::Gone,
            Ok((inode, _)) if inode.cast_signed() != self.inode => Watch::Gone,
            Ok((_, pidfd)) => Watch::Alive(pidfd),
            Err(_) => Watch::Unknown,
        }
    }

    pub(super) fn is_gone(&self) -> bool {
        match self.watch() {
            Watch::Gone => true,
            Watch::Alive(pidfd) => {
                let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
                poll(&mut ended, Some(&Timespec::default())) == Ok(1) && ended[0].revents().contains(PollFlags::IN)
            }
            Watch::Unknown => false,
        }
    }
}
