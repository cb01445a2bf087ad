//! The kernel's information about a path: its kind, its users, its abilities.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use pumice_io::sys::file as sys;

/// The way to carry out an unmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Discard {
    /// `fallocate(PUNCH_HOLE)`: reads as zeroes afterwards.
    PunchHole,
    /// `BLKDISCARD`: contents unspecified afterwards.
    Ioctl,
    /// The device does not support it.
    None,
}

/// Properties of a backing file or device.
#[derive(Debug, Clone)]
pub(super) struct Backing {
    pub(super) is_block_device: bool,
    pub(super) len: u64,
    /// Smallest unit of direct I/O in bytes; 512 for a file if the kernel does not say.
    pub(super) sector: u32,
    pub(super) write_cache: bool,
    pub(super) discard: Discard,
    pub(super) product: String,
}

pub(super) fn is_block_device(meta: &Metadata) -> bool {
    meta.file_type().is_block_device()
}

/// Splits a device number into major and minor number, as in sys/sysmacros.h.
pub(super) fn split_dev(dev: u64) -> (u32, u32) {
    (libc::major(dev), libc::minor(dev))
}

pub(super) fn backing(file: &File, meta: &Metadata) -> io::Result<Backing> {
    if !is_block_device(meta) {
        return Ok(Backing {
            is_block_device: false,
            len: meta.len(),
            sector: 512,
            write_cache: true,
            discard: Discard::PunchHole,
            product: "Image file".to_owned(),
        });
    }
    let (major, minor) = split_dev(meta.rdev());
    let sys = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    // A partition does not have a queue of its own: use its parent's.
    let queue = if sys.join("queue").exists() {
        sys.join("queue")
    } else {
        sys.join("../queue")
    };
    let text = |name: &str| fs::read_to_string(queue.join(name)).unwrap_or_default();
    let number = |name: &str| text(name).trim().parse::<u64>().unwrap_or(0);
    let discard = if number("write_zeroes_max_bytes") > 0 && number("discard_max_bytes") > 0 {
        Discard::PunchHole
    } else if number("discard_max_bytes") > 0 {
        Discard::Ioctl
    } else {
        Discard::None
    };
    let model = fs::read_to_string(sys.join("device/model")).unwrap_or_default();
    let product = match model.trim() {
        "" if sys.join("loop").exists() => "Loop device".to_owned(),
        "" => "Block device".to_owned(),
        model => model.to_owned(),
    };
    Ok(Backing {
        is_block_device: true,
        len: sys::block_device_len(file)?,
        sector: sys::sector_size(file)?,
        write_cache: has_cache(&text("write_cache")),
        discard,
        product,
    })
}

/// Whether a disk has a volatile cache, by what sysfs says of it. A cache is assumed where it does
/// not say, so that flushes are sent.
fn has_cache(write_cache: &str) -> bool {
    write_cache.trim() != "write through"
}

/// Returns the process that holds a `flock` lock on the inode, by /proc/locks. `Some(0)` is a
/// process that this one cannot see, or that has ended.
pub(super) fn lock_owner(meta: &Metadata) -> Option<u32> {
    let (major, minor) = split_dev(meta.dev());
    let inode = format!("{major:02x}:{minor:02x}:{}", meta.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        // An example: "3: FLOCK  ADVISORY  WRITE 1234 fe:00:131 0 EOF".
        let mut words = line.split_whitespace().skip(1);
        if words.next()? != "FLOCK" {
            return None;
        }
        let pid = words.nth(2)?;
        (words.next()? == inode).then(|| pid.parse().unwrap_or(0))
    })
}

/// Whether the process has ended or is ending: its last writes may still be in flight.
pub(super) fn is_gone(pid: u32) -> bool {
    if pid == 0 {
        return true;
    }
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        // The state follows the command, which is in parentheses and may contain anything.
        Ok(stat) => stat
            .rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])),
        Err(e) => e.kind() == io::ErrorKind::NotFound,
    }
}

/// Returns the reason why a block device must not be used: it is mounted, swap space or part of
/// another device.
pub(super) fn block_device_user(meta: &Metadata) -> Option<String> {
    let (major, minor) = split_dev(meta.rdev());
    let sys = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok();
    // Look at the device itself and its partitions.
    let mut numbers = vec![format!("{major}:{minor}")];
    let mut holders = Vec::new();
    if let Some(sys) = &sys {
        let mut folders = vec![sys.clone()];
        folders.extend(subfolders(sys).filter(|p| p.join("partition").exists()));
        for folder in folders {
            if let Ok(dev) = fs::read_to_string(folder.join("dev")) {
                numbers.push(dev.trim().to_owned());
            }
            holders.extend(
                subfolders(&folder.join("holders"))
                    .filter_map(|p| p.file_name().map(|n| n.to_string_lossy().into_owned())),
            );
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in mounts.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        if let [_, _, number, _, at, ..] = words[..]
            && numbers.iter().any(|n| n == number)
        {
            return Some(format!("mounted at {at}; unmount it first (umount {at})"));
        }
    }
    if let Some(holder) = holders.first() {
        return Some(format!("part of /dev/{holder}; take that apart first"));
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    for path in swaps
        .lines()
        .skip(1)
        .filter_map(|l| l.split_whitespace().next())
    {
        if fs::metadata(path).is_ok_and(|m| m.rdev() == meta.rdev() && is_block_device(&m)) {
            return Some(format!("used as swap; run swapoff {path} first"));
        }
    }
    None
}

fn subfolders(path: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
}

/// Returns the loop devices of which this is the backing file.
pub(super) fn loop_devices_on(meta: &Metadata) -> Vec<PathBuf> {
    subfolders(Path::new("/sys/block"))
        .filter(|block| {
            backing_of_loop(block).is_some_and(|path| {
                fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (meta.dev(), meta.ino()))
            })
        })
        .filter_map(|block| Some(Path::new("/dev").join(block.file_name()?)))
        .collect()
}

/// Returns the backing file of a loop device, where `sys` is its folder in sysfs.
fn backing_of_loop(sys: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(sys.join("loop/backing_file")).ok()?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

/// Returns the process that has locked the backing file of a loop device.
pub(super) fn loop_backing_owner(meta: &Metadata) -> Option<(PathBuf, u32)> {
    let (major, minor) = split_dev(meta.rdev());
    let path = backing_of_loop(Path::new(&format!("/sys/dev/block/{major}:{minor}")))?;
    let owner = lock_owner(&fs::metadata(&path).ok()?)?;
    Some((path, owner))
}

#[cfg(test)]
mod tests {
    use super::has_cache;

    #[test]
    fn a_disk_has_a_cache_unless_sysfs_denies_it() {
        for text in ["write back\n", "", "\n", "unknown\n"] {
            assert!(has_cache(text), "{text:?}");
        }
        assert!(!has_cache("write through\n"));
    }
}
