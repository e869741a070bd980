//! Which file it is: what is refused before it is used, and how it is known again.
//!
//! Two files, or two paths with a log each, would have two holders. So the side files, which stay when everybody has closed,
//! tell of the database file beside them: `-gate` which file it was made for and the next token, `-live` the log
//! that those who have it open use. A copy lacks them, or does not fit them, and so does what somebody deleted or restored.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use rustix::fs::{Access, AtFlags, CWD, StatxFlags, accessat, statfs, statx};
use rustix::io::Errno;

use super::failure::Failure;
use crate::error::{Error, ErrorKind};

/// Device and inode: which file it is, whatever its path.
pub(super) type Identity = (u64, u64);

/// Those of which it is known that all processes of the machine share their locks, their memory and their inode numbers.
const FILE_SYSTEMS: [(u32, &str); 10] = [
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0xf2f5_2010, "f2fs"),
    (0x2fc1_2fc1, "zfs"),
    (0xca45_1a4e, "bcachefs"),
    (0x3153_464a, "jfs"),
    (0x0102_1994, "tmpfs"),
    (0x8584_58f6, "ramfs"),
    (0x794c_7630, "overlay"),
];

/// Those that people try, so that the error can name them.
const REFUSED: [(u32, &str); 10] = [
    (0x6969, "NFS"),
    (0x517b, "SMB"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB"),
    (0x6573_5546, "FUSE"),
    (0x0102_1997, "9p"),
    (0x00c3_6400, "Ceph"),
    (0x786f_4256, "a shared folder of VirtualBox"),
    (0x4d44, "FAT"),
    (0x2011_bab0, "exFAT"),
];

/// What `-gate` tells: which file it stands beside, and how far the tokens were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    inode: u64,
    /// Nanoseconds since 1970; 0 where the file system keeps none.
    born: u64,
    pub(super) incarnation: [u8; 16],
    /// 0 until the tables are made.
    pub(super) next_token: i64,
}

const NEXT_TOKEN_AT: u64 = 32;

impl Record {
    pub(super) fn of(path: &Path, incarnation: [u8; 16]) -> Result<Self, Failure> {
        let meta = fs::metadata(path).map_err(|error| Failure::io("cannot find the database file", &error))?;
        let born = meta.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
        let born = born.and_then(|born| u64::try_from(born.as_nanos()).ok()).unwrap_or(0);
        Ok(Self { inode: meta.ino(), born, incarnation, next_token: 0 })
    }

    /// `None` before the first.
    pub(super) fn read(gate: &File) -> Result<Option<Self>, Failure> {
        let Some(bytes) = read::<40>(gate)? else { return Ok(None) };
        let [inode, born, next] = [0, 8, 32].map(|at| u64::from_le_bytes(part(&bytes, at)));
        Ok(Some(Self { inode, born, incarnation: part(&bytes, 16), next_token: next.cast_signed() }))
    }

    /// Synced: after a power failure it has to be there if the tables are.
    pub(super) fn write(&self, gate: &File) -> Result<(), Failure> {
        let next = self.next_token.to_le_bytes();
        let bytes = [&self.inode.to_le_bytes()[..], &self.born.to_le_bytes(), &self.incarnation, &next].concat();
        write(gate, &bytes, 0)?;
        gate.sync_all().map_err(|error| Failure::io("cannot write the gate of the database file", &error))
    }

    pub(super) fn write_next_token(gate: &File, next: i64) -> Result<(), Failure> {
        write(gate, &next.to_le_bytes(), NEXT_TOKEN_AT)
    }

    /// Fails if the file that is there now is another than the one it tells of.
    pub(super) fn check_file(&self, now: &Self) -> Result<(), Failure> {
        let same_birth = self.born == now.born || self.born == 0 || now.born == 0;
        if self.inode == now.inode && same_birth { Ok(()) } else { Err(copied()) }
    }
}

/// The log and its index, as used by those who have the database open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Log {
    wal: Identity,
    shm: Identity,
}

impl Log {
    /// `None` when one of the two is missing.
    pub(super) fn find(path: &Path) -> Result<Option<Self>, Failure> {
        let find = |suffix| identity(&beside(path, suffix));
        Ok(find("-wal")?.zip(find("-shm")?).map(|(wal, shm)| Self { wal, shm }))
    }

    pub(super) fn read(live: &File) -> Result<Option<Self>, Failure> {
        let Some(bytes) = read::<32>(live)? else { return Ok(None) };
        let [wal_dev, wal, shm_dev, shm] = [0, 8, 16, 24].map(|at| u64::from_le_bytes(part(&bytes, at)));
        Ok(Some(Self { wal: (wal_dev, wal), shm: (shm_dev, shm) }))
    }

    pub(super) fn write(&self, live: &File) -> Result<(), Failure> {
        let numbers = [self.wal.0, self.wal.1, self.shm.0, self.shm.1];
        write(live, &numbers.map(u64::to_le_bytes).concat(), 0)
    }
}

fn read<const LENGTH: usize>(file: &File) -> Result<Option<[u8; LENGTH]>, Failure> {
    let mut bytes = [0; LENGTH];
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(Failure::io("cannot read a lock file beside the database file", &error)),
    }
}

fn write(file: &File, bytes: &[u8], at: u64) -> Result<(), Failure> {
    let failed = |error| Failure::io("cannot write a lock file beside the database file", &error);
    file.write_all_at(bytes, at).map_err(failed)
}

fn part<const LENGTH: usize>(bytes: &[u8], at: usize) -> [u8; LENGTH] {
    bytes[at..at + LENGTH].try_into().expect("it is within")
}

/// Where no other advice helps: its tokens may have been given twice.
pub(super) fn copied() -> Failure {
    Failure::incompatible(
        "it is not the database file that the -gate file beside it was made for: it was copied, moved without the files \
         beside it, restored or replaced, or one of them was deleted. Put the original back, or delete it and all files \
         beside it to begin anew, with tokens from 1",
    )
}

/// The file was taken away from those who have it open.
pub(super) fn taken_away(what: &str) -> Failure {
    Failure::incompatible(format!(
        "{what} was deleted or replaced while in use: close all managers that have it open, and open it anew"
    ))
}

/// `None` if there is no such file.
pub(super) fn identity(path: &Path) -> Result<Option<Identity>, Failure> {
    match rustix::fs::stat(path) {
        Ok(stat) => Ok(Some((stat.st_dev, stat.st_ino))),
        Err(Errno::NOENT) => Ok(None),
        Err(cause) => Err(Failure::system(format!("cannot find {}", path.display()), cause)),
    }
}

/// Refuses a file system on which others may not see our locks, or we not theirs.
pub(super) fn check_file_system(of: &Path, path: &Path) -> Result<(), Failure> {
    let found = statfs(of).map_err(|cause| Failure::system(format!("cannot use {}", path.display()), cause))?;
    // The magic numbers have 32 bits, whatever the field has.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::unnecessary_cast)]
    refusal(found.f_type as u32)
        .map_or(Ok(()), |why| Err(Error::new(ErrorKind::Unsupported, format!("{} is on {why}", path.display())).into()))
}

fn refusal(magic: u32) -> Option<String> {
    if FILE_SYSTEMS.iter().any(|(known, _)| *known == magic) {
        return None;
    }
    let name = REFUSED.iter().find(|(known, _)| *known == magic).map_or("an unknown file system", |(_, name)| name);
    let good = FILE_SYSTEMS.map(|(_, name)| name).join(", ");
    Some(format!(
        "{name} (type {magic:#x}), where locks may not be seen by all: put the file on a local file system ({good}), or use etcd \
         between machines"
    ))
}

/// Refuses a file that two paths lead to: each would have locks of its own, and so a holder of its own.
pub(super) fn check_one_path(path: &Path, links: u64) -> Result<(), Failure> {
    let shown = path.display();
    if links > 1 {
        let message = format!("{shown} has {links} hard links: leases need one path to the file, so delete the others");
        return Err(Error::invalid(message).into());
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

/// Whether this process may write there, without opening it.
pub(super) fn writable(path: &Path) -> Result<(), Failure> {
    accessat(CWD, path.as_os_str().as_bytes(), Access::READ_OK | Access::WRITE_OK, AtFlags::EACCESS)
        .map_err(|cause| Failure::system(format!("cannot write to {}", path.display()), cause))
}

/// The path with the suffix appended to its file name.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut beside = path.as_os_str().to_owned();
    beside.push(suffix);
    beside.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An unknown one is refused too: a list of those that are bad would never be complete.
    #[test]
    fn file_systems_are_allowed_by_name() {
        for (magic, _) in FILE_SYSTEMS {
            assert_eq!(refusal(magic), None, "{magic:#x}");
        }
        for (magic, name) in REFUSED.into_iter().chain([(0x9fa0, "unknown"), (0, "unknown")]) {
            let why = refusal(magic).expect("it is refused");
            assert!(why.contains(name) && why.contains("ext4") && why.contains(&format!("{magic:#x}")), "{why}");
        }
    }
}
