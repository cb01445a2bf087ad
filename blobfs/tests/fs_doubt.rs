//! Writes that are on their way to the device while a flush of somebody else fails. They may have been in the device's cache
//! already, and have been lost with it, so that the next sync of the file has to fail.

mod common;
#[path = "common/held.rs"]
mod held;
#[path = "common/task.rs"]
#[allow(dead_code, reason = "this binary needs a part of it")]
mod task;

use std::sync::Arc;

use common::faults::{Less, fail, hang, setup_with};
use common::watchdog::watchdog;
use held::{arrived, first_cluster};
use pumice_bdev::OpKind;
use pumice_bdev::error_inject::{ErrorDevice, Injection};
use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_blobfs::fs::{
    File, FileSystem, FormatOptions, Journal, MountOptions, OpenOptions, Result,
};
use task::spawn;

const MIB: usize = 1 << 20;

/// Every test runs on a store of each kind.
const KINDS: [Journal; 2] = [Journal::None, Journal::Auto];

/// A mount on a device with a volatile write cache and without FUA: each change of metadata needs a flush.
fn setup(journal: Journal) -> (Arc<ErrorDevice>, FileSystem) {
    let base = Arc::new(CrashDevice::new(4096, 16 << 10, true, 5));
    let base = Less::over(base, &[OpKind::Fua]);
    let mut format = FormatOptions::default();
    format.cluster_size = 1 << 20;
    format.md_pages = Some(200);
    format.journal = journal;
    setup_with(base, &format, &MountOptions::default())
}

/// Makes a flush of metadata fail while the device holds back an operation of `write`, and then lets that succeed.
fn flush_fails_beside(
    dev: &ErrorDevice,
    fs: &FileSystem,
    held_back: Injection,
    write: impl FnOnce() -> Result<()> + Send + 'static,
) {
    dev.inject(held_back);
    let writing = spawn(write);
    arrived(dev, "the operation that is held back");
    dev.inject(fail(OpKind::Flush, u64::MAX, None));
    let _ = fs.mkdir("/d");
    let left = dev.injections()[0].count;
    dev.clear();
    dev.resume();
    writing.join("the write").unwrap();
    assert!(left < u64::MAX, "no flush has failed");
}

/// A sync of the file fails, also when it is tried again and every flush succeeds.
fn assert_in_doubt(f: &File, journal: Journal) {
    for _ in 0..2 {
        let lost = f.sync().unwrap_err();
        assert!(lost.is_data_loss(), "{journal:?}: {lost}");
    }
}

#[test]
fn an_append_on_its_way_is_in_doubt_after_a_failed_flush() {
    let _limit = watchdog("doubt about an append on its way", 120);
    for journal in KINDS {
        let (dev, fs) = setup(journal);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.allocate(0, 2 << 20).unwrap();
        let held_back = hang(OpKind::Write, 1, first_cluster(&fs, &f));
        let g = f.clone();
        // One write, of the first MiB, begins at once. What is behind it waits for the sync.
        flush_fails_beside(&dev, &fs, held_back, move || g.append(&vec![1; MIB + 100]));
        assert_in_doubt(&f, journal);
    }
}

#[test]
fn an_overwrite_on_its_way_is_in_doubt_after_a_failed_flush() {
    let _limit = watchdog("doubt about an overwrite on its way", 120);
    for journal in KINDS {
        let (dev, fs) = setup(journal);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        // The second MiB is the append buffer, so that the first is overwritten on the device.
        f.append(&vec![1; 2 * MIB]).unwrap();
        f.sync().unwrap();
        let held_back = hang(OpKind::Write, 1, first_cluster(&fs, &f));
        let g = f.clone();
        flush_fails_beside(&dev, &fs, held_back, move || g.write_at(0, &vec![4; MIB]));
        assert_in_doubt(&f, journal);
    }
}

#[test]
fn zeroes_on_their_way_are_in_doubt_after_a_failed_flush() {
    let _limit = watchdog("doubt about zeroes on their way", 120);
    for journal in KINDS {
        let (dev, fs) = setup(journal);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.append(&vec![1; MIB]).unwrap();
        f.sync().unwrap();
        f.allocate(0, 8 << 20).unwrap();
        // The device zeroes a gap of more than 4 MiB.
        let held_back = hang(OpKind::WriteZeroes, 1, None);
        let g = f.clone();
        flush_fails_beside(&dev, &fs, held_back, move || g.truncate(8 << 20));
        assert_in_doubt(&f, journal);
    }
}
