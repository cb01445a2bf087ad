//! Devices that fail on demand, and file systems on them.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{
    BdevError, BlockDevice, Completion, DeviceInfo, IoChannel, IoErrorKind, Op, OpKind, SubmitError,
};
use pumice_blobfs::fs::{File, FileSystem, FormatOptions, Journal, MountOptions, OpenOptions};

/// The next `count` operations of a kind fail in this way; with a range only those that touch it
/// (first block, number of blocks).
pub fn fault(op: OpKind, failure: Failure, count: u64, range: Option<(u64, u64)>) -> Injection {
    Injection::new(failure)
        .op(Some(op))
        .count(count)
        .range(range)
}

/// As [`fault`], with an error of the medium.
pub fn fail(op: OpKind, count: u64, range: Option<(u64, u64)>) -> Injection {
    fault(op, Failure::Fail, count, range)
}

/// As [`fault`]: the operation does not end until the device is told to go on.
pub fn hang(op: OpKind, count: u64, range: Option<(u64, u64)>) -> Injection {
    fault(op, Failure::Hang, count, range)
}

/// Stores without and with a journal.
pub const KINDS: [Journal; 2] = [Journal::None, Journal::Auto];

/// Clusters of 1 MiB, so that the place of data is known.
pub fn format_1m(journal: Journal) -> FormatOptions {
    let mut format = FormatOptions::default();
    format.cluster_size = 1 << 20;
    format.md_pages = Some(200);
    format.journal = journal;
    format
}

/// Returns the blocks of a store of [`format_1m`] that hold data of files, not metadata. The journal is before them.
pub fn data_blocks(journal: Journal) -> Option<(u64, u64)> {
    let ring = if journal == Journal::None { 0 } else { 256 };
    Some((256 + ring, 1 << 20))
}

/// Formats `base` and mounts it with a device that fails on demand in between.
pub fn setup_with(
    base: Arc<dyn BlockDevice>,
    format: &FormatOptions,
    opts: &MountOptions,
) -> (Arc<ErrorDevice>, FileSystem) {
    FileSystem::format(Arc::clone(&base), format).unwrap();
    let dev = Arc::new(ErrorDevice::new(None, base));
    let fs = mount_with(&dev, opts);
    (dev, fs)
}

/// Mounts what is on the device.
pub fn mount_with(dev: &Arc<ErrorDevice>, opts: &MountOptions) -> FileSystem {
    let dev: Arc<dyn BlockDevice> = Arc::clone(dev) as Arc<dyn BlockDevice>;
    FileSystem::mount(dev, opts).unwrap()
}

/// Unmounts, and mounts what is on the device.
pub fn again(dev: &Arc<ErrorDevice>, fs: FileSystem) -> FileSystem {
    fs.unmount().unwrap();
    drop(fs);
    mount_with(dev, &MountOptions::default())
}

/// All bytes of a file.
pub fn all(f: &File) -> Vec<u8> {
    let mut out = vec![0; usize::try_from(f.len()).unwrap()];
    assert_eq!(f.read_at(0, &mut out).unwrap(), out.len());
    out
}

/// All bytes of the file at `path`.
pub fn content_of(fs: &FileSystem, path: &str) -> Vec<u8> {
    all(&fs.open(path, OpenOptions::READ).unwrap())
}

/// All files of a file system by their paths, each with its bytes; a directory has none.
pub fn files_of(fs: &FileSystem) -> BTreeMap<String, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![String::new()];
    while let Some(dir) = dirs.pop() {
        for entry in fs.list(if dir.is_empty() { "/" } else { &dir }).unwrap() {
            let path = format!("{dir}/{}", entry.name);
            let bytes = (!entry.is_dir).then(|| content_of(fs, &path));
            if entry.is_dir {
                dirs.push(path.clone());
            }
            found.insert(path, bytes);
        }
    }
    found
}

/// A device that says it can do less than the one below.
#[derive(Debug)]
pub struct Less {
    info: DeviceInfo,
    base: Arc<dyn BlockDevice>,
    full: Arc<AtomicBool>,
}

impl Less {
    /// `base` without some of its operations.
    pub fn over(base: Arc<dyn BlockDevice>, without: &[OpKind]) -> Arc<dyn BlockDevice> {
        let mut info = base.info().clone();
        info.ops = without
            .iter()
            .fold(info.ops, |ops, kind| ops.without(*kind));
        Arc::new(Less {
            info,
            base,
            full: Arc::default(),
        })
    }

    /// As [`Less::over`]; with a volatile write cache, as it says, or without.
    pub fn with_cache(
        base: Arc<dyn BlockDevice>,
        without: &[OpKind],
        write_cache: bool,
    ) -> Arc<dyn BlockDevice> {
        let mut info = base.info().clone();
        info.ops = without
            .iter()
            .fold(info.ops, |ops, kind| ops.without(*kind));
        info.write_cache = write_cache;
        Arc::new(Less {
            info,
            base,
            full: Arc::default(),
        })
    }
}

impl Less {
    /// `base`, whose host has no space for data (from block 256 on) as long as the flag is set.
    pub fn with_host(base: Arc<dyn BlockDevice>, full: &Arc<AtomicBool>) -> Arc<dyn BlockDevice> {
        Arc::new(Less {
            info: base.info().clone(),
            base,
            full: Arc::clone(full),
        })
    }
}

impl BlockDevice for Less {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(LessChannel {
            info: self.info.clone(),
            base: self.base.open_channel()?,
            full: Arc::clone(&self.full),
        }))
    }
}

struct LessChannel {
    info: DeviceInfo,
    base: Box<dyn IoChannel>,
    full: Arc<AtomicBool>,
}

impl IoChannel for LessChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        let ops = self.info.ops;
        assert!(ops.has(op.kind()), "{op:?} is not among the operations");
        assert!(!op.fua() || ops.has(OpKind::Fua), "{op:?} with FUA");
        if op.kind() == OpKind::Write && op.lba() >= 256 && self.full.load(Ordering::Acquire) {
            let e = self
                .info
                .error(&op, IoErrorKind::NoSpace, "the host is full");
            return Err(SubmitError::Refused(op, e));
        }
        self.base.submit(tag, op)
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        self.base.poll(out)
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        self.base.wait(timeout)
    }

    fn in_flight(&self) -> usize {
        self.base.in_flight()
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.base.event_fd()
    }
}
