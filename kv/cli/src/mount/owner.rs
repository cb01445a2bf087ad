//! The attributes of files as the kernel sees them.

use std::time::{SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use pumice_blobfs::fs::Stat;

/// Bytes of a block in the answers of `statfs` and `stat`.
pub const BLOCK: u32 = 4096;
/// The modes of files and directories whose mode was never set.
pub const FILE_MODE: u32 = 0o644;
pub const DIR_MODE: u32 = 0o755;

/// The user and group to whom everything belongs.
pub struct Ownership {
    pub uid: u32,
    pub gid: u32,
    /// The time of the mount, which stands for unknown times.
    pub since: SystemTime,
}

impl Ownership {
    /// Returns the attributes of the inode `number`.
    pub fn attributes(&self, number: u64, stat: &Stat) -> FileAttr {
        let modified = if stat.mtime == UNIX_EPOCH && stat.is_dir {
            self.since
        } else {
            stat.mtime
        };
        let default = if stat.is_dir { DIR_MODE } else { FILE_MODE };
        let mode = stat.mode.unwrap_or(default);
        FileAttr {
            ino: INodeNo(number),
            size: if stat.is_dir {
                u64::from(BLOCK)
            } else {
                stat.len
            },
            blocks: stat.allocated.div_ceil(512),
            atime: modified,
            mtime: modified,
            ctime: modified,
            crtime: modified,
            kind: kind(stat.is_dir),
            perm: u16::try_from(mode).unwrap_or(0),
            nlink: u32::try_from(stat.links).unwrap_or(u32::MAX),
            uid: self.uid,
            gid: self.gid,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        }
    }
}

/// Returns the type of a file or directory.
pub fn kind(is_dir: bool) -> FileType {
    if is_dir {
        FileType::Directory
    } else {
        FileType::RegularFile
    }
}
