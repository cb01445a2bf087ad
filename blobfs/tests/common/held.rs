//! Syncs that the journal carries and whose batch the device does not end until it is told to, so that a test knows
//! what happens beside them.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::cell::RefCell;
use std::sync::{Arc, Once, Weak};

use pumice_bdev::error_inject::ErrorDevice;
use pumice_bdev::{BlockDevice, OpKind};
use pumice_blobfs::fs::{
    File, FileSystem, FormatOptions, Journal, MountOptions, OpenOptions, Result,
};

use crate::common::faults::{hang, setup_with};
use crate::common::watchdog::watchdog;
use crate::task::{Task, spawn, wait_for};

thread_local! {
    /// The devices of the test that runs on this thread.
    static MINE: RefCell<Vec<Weak<ErrorDevice>>> = const { RefCell::new(Vec::new()) };
}

/// Has the device end what hangs when the test of this thread fails: the drop of its file system would wait for that. The
/// whole binary is limited, too.
fn limit(dev: &Arc<ErrorDevice>) {
    static ONE: Once = Once::new();
    ONE.call_once(|| {
        std::mem::forget(watchdog("tests on a device that hangs", 300));
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            before(panic);
            let mine = MINE.try_with(RefCell::take).unwrap_or_default();
            for dev in mine.iter().filter_map(Weak::upgrade) {
                dev.clear();
                dev.resume();
            }
        }));
    });
    MINE.with_borrow_mut(|mine| mine.push(Arc::downgrade(dev)));
}

/// A file system with a journal of this many bytes, in memory, on a device that fails on demand.
pub fn with_journal(journal: u64, opts: &MountOptions) -> (Arc<ErrorDevice>, FileSystem) {
    let base = pumice_bdev::open("malloc://128M?block_size=4096").unwrap();
    let mut format = FormatOptions::default();
    format.journal = Journal::Bytes(journal);
    let (dev, fs) = setup_with(base, &format, opts);
    limit(&dev);
    (dev, fs)
}

/// Waits until every operation has arrived that was to hang.
pub fn arrived(dev: &ErrorDevice, what: &str) {
    wait_for(what, || dev.injections().is_empty());
}

/// Begins a sync of `f`, and waits until the device has its first write: the batch, if it is carried.
pub fn begin_sync(dev: &ErrorDevice, f: &File) -> Task<Result<()>> {
    dev.inject(hang(OpKind::Write, 1, None));
    let f = f.clone();
    let sync = spawn(move || f.sync());
    arrived(dev, "a write of the sync");
    sync
}

/// Makes a file with appends that are synced, of which the second is carried.
pub fn carried(fs: &FileSystem, path: &str) -> File {
    let f = fs.open(path, OpenOptions::CREATE).unwrap();
    for (byte, len) in [(1, 100), (2, 50)] {
        f.append(&vec![byte; len]).unwrap();
        f.sync().unwrap();
    }
    f
}

/// First block of a cluster of a file.
pub fn block_of(fs: &FileSystem, f: &File, cluster: u64) -> u64 {
    let extents = fs.blobstore().extents(f.blob_id()).unwrap();
    extents.lba(cluster).unwrap()
}

/// The blocks of the first cluster of a file.
pub fn first_cluster(fs: &FileSystem, f: &File) -> Option<(u64, u64)> {
    let blocks = fs.blobstore().cluster_size() / 4096;
    Some((block_of(fs, f, 0), blocks))
}

/// The blocks of the metadata region.
pub fn metadata(fs: &FileSystem) -> Option<(u64, u64)> {
    let sb = fs.blobstore().super_block();
    Some((sb.md_start.get().into(), sb.md_len.get().into()))
}

/// The device itself, for one that was made by another function.
pub fn as_device(dev: &Arc<ErrorDevice>) -> Arc<dyn BlockDevice> {
    limit(dev);
    Arc::clone(dev) as Arc<dyn BlockDevice>
}
