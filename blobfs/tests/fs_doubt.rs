//! Data in doubt: a flush has failed that may have lost them, before they were flushed or while they were on their way to the
//! device's cache. Syncs fail until they are written once more.

mod common;
#[path = "common/held.rs"]
mod held;
#[path = "common/task.rs"]
#[allow(dead_code, reason = "this binary needs a part of it")]
mod task;

use std::sync::Arc;

use common::faults::*;
use common::watchdog::watchdog;
use held::{arrived, first_cluster};
use pumice_bdev::OpKind;
use pumice_bdev::error_inject::{ErrorDevice, Injection};
use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_blobfs::fs::{File, FileSystem, Journal, MountOptions, OpenOptions, Result};
use task::spawn;

const MIB: usize = 1 << 20;
const FOREVER: u64 = u64::MAX;

/// A mount on a device with a volatile write cache and without FUA: each change of metadata needs a flush.
fn setup(journal: Journal) -> (Arc<ErrorDevice>, FileSystem) {
    let base = Arc::new(CrashDevice::new(4096, 16 << 10, true, 5));
    let base = Less::over(base, &[OpKind::Fua]);
    setup_with(base, &format_1m(journal), &MountOptions::default())
}

/// Makes a mount on a device with a volatile write cache.
fn setup_cached(journal: Journal) -> (Arc<ErrorDevice>, FileSystem) {
    let base = Arc::new(CrashDevice::new(4096, 16 << 10, true, 5));
    setup_with(base, &format_1m(journal), &MountOptions::default())
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
    dev.inject(fail(OpKind::Flush, FOREVER, None));
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

/// Returns a file of which an append was on its way when a flush failed.
fn append_in_doubt(journal: Journal) -> (Arc<ErrorDevice>, FileSystem, File) {
    let (dev, fs) = setup(journal);
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.allocate(0, 2 << 20).unwrap();
    let held_back = hang(OpKind::Write, 1, first_cluster(&fs, &f));
    let g = f.clone();
    // One write, of the first MiB, begins at once. What is behind it waits for the sync.
    flush_fails_beside(&dev, &fs, held_back, move || g.append(&vec![1; MIB + 100]));
    assert_in_doubt(&f, journal);
    (dev, fs, f)
}

#[test]
fn an_append_on_its_way_is_in_doubt_after_a_failed_flush() {
    let _limit = watchdog("doubt about an append on its way", 120);
    for journal in KINDS {
        append_in_doubt(journal);
    }
}

/// A sync that fails for bytes in doubt has made no length durable that covers them.
#[test]
fn a_length_covers_no_bytes_in_doubt() {
    let _limit = watchdog("a length and bytes in doubt", 120);
    for journal in KINDS {
        let (dev, fs, f) = append_in_doubt(journal);
        drop(f);
        let lost = fs.unmount_anyway().unwrap();
        assert_eq!(lost.len(), 1, "{journal:?}: {lost:?}");
        drop(fs);
        let fs = mount_with(&dev, &MountOptions::default());
        let f = fs.open("/f", OpenOptions::READ).unwrap();
        assert_eq!(f.len(), 0, "{journal:?}");
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

#[test]
fn what_is_written_once_more_is_out_of_doubt() {
    let _limit = watchdog("doubt", 120);
    for journal in KINDS {
        let (dev, fs) = setup_cached(journal);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.allocate(0, 8 << 20).unwrap();
        f.append(&vec![1; 3 * MIB]).unwrap();
        f.range_sync(0, 3 << 20).unwrap();
        dev.inject(fail(OpKind::Flush, 1, None));
        assert!(f.sync().unwrap_err().is_data_loss());
        for _ in 0..2 {
            let lost = f.sync().unwrap_err();
            assert!(
                lost.is_data_loss() && lost.to_string().contains("/f"),
                "{lost}"
            );
            assert!(fs.unmount().unwrap_err().is_data_loss());
        }
        // Half of it is not enough.
        f.write_at(0, &vec![4; MIB]).unwrap();
        assert!(f.sync().unwrap_err().is_data_loss());
        f.write_at(MIB as u64, &vec![5; 2 * MIB]).unwrap();
        f.sync().unwrap();
        // The same holds for what is cut off.
        f.append(&vec![6; 3 * MIB]).unwrap();
        f.range_sync(0, 6 << 20).unwrap();
        dev.inject(fail(OpKind::Flush, 1, None));
        assert!(f.sync().unwrap_err().is_data_loss());
        f.truncate(3 << 20).unwrap();
        f.sync().unwrap();
        f.append(&vec![7; MIB]).unwrap();
        f.sync().unwrap();
        drop(f);
        let fs = again(&dev, fs);
        let want = [vec![4; MIB], vec![5; 2 * MIB], vec![7; MIB]].concat();
        assert!(content_of(&fs, "/f") == want);
    }
}

/// Bytes that were written after the flush had failed are in no doubt, although they follow those that are.
#[test]
fn what_is_written_behind_bytes_in_doubt_is_not() {
    let _limit = watchdog("what follows bytes in doubt", 120);
    for journal in KINDS {
        let (dev, fs) = setup_cached(journal);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.allocate(0, 8 << 20).unwrap();
        f.append(&vec![1; 2 * MIB]).unwrap();
        f.range_sync(0, 2 << 20).unwrap();
        dev.inject(fail(OpKind::Flush, 1, None));
        assert!(f.sync().unwrap_err().is_data_loss());
        f.append(&vec![2; 2 * MIB]).unwrap();
        f.range_sync(0, 4 << 20).unwrap();
        assert!(f.sync().unwrap_err().is_data_loss());
        f.write_at(0, &vec![3; 2 * MIB]).unwrap();
        f.sync().unwrap();
        drop(f);
        let fs = again(&dev, fs);
        let want = [vec![3; 2 * MIB], vec![2; 2 * MIB]].concat();
        assert!(content_of(&fs, "/f") == want);
    }
}

#[test]
fn bytes_that_were_read_back_after_a_failed_flush_stay_in_doubt() {
    let _limit = watchdog("doubt about bytes read back", 120);
    for journal in KINDS {
        let (dev, fs) = setup_cached(journal);
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.allocate(0, 8 << 20).unwrap();
        f.append(&[1; 6000]).unwrap();
        f.range_sync(0, 4096).unwrap();
        dev.inject(fail(OpKind::Flush, 1, None));
        assert!(f.sync().unwrap_err().is_data_loss());
        // The buffer is dropped, and the next one begins with what the device returns.
        drop(f);
        let f = fs.open("/f", OpenOptions::READ).unwrap();
        f.invalidate(0, u64::MAX);
        f.append(&[2; 100]).unwrap();
        assert!(f.sync().unwrap_err().is_data_loss());
        f.write_at(50, &[3; 10]).unwrap();
        assert!(f.sync().unwrap_err().is_data_loss());
        // What cannot be made durable can be given up, and the error names it.
        drop(f);
        let lost = fs.unmount_anyway().unwrap();
        assert_eq!(lost.len(), 1);
        assert!(
            lost[0].is_data_loss() && lost[0].to_string().contains("/f"),
            "{}",
            lost[0]
        );
        let fs = mount_with(&dev, &MountOptions::default());
        assert_eq!(
            content_of(&fs, "/f").len(),
            0,
            "only what is durable counts"
        );
    }
}

#[test]
fn a_failed_flush_of_metadata_puts_data_in_doubt() {
    let _limit = watchdog("doubt by a flush of metadata", 120);
    for journal in KINDS {
        let base = Arc::new(CrashDevice::new(4096, 16 << 10, true, 5));
        let base = Less::over(base, &[OpKind::Fua]);
        let (dev, fs) = setup_with(base, &format_1m(journal), &MountOptions::default());
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.allocate(0, 8 << 20).unwrap();
        f.append(&vec![1; 3 * MIB]).unwrap();
        f.range_sync(0, 3 << 20).unwrap();
        dev.inject(fail(OpKind::Flush, FOREVER, None));
        let _ = fs.mkdir("/d");
        dev.clear();
        let lost = f.sync().unwrap_err();
        assert!(lost.is_data_loss(), "{lost}");
    }
}

#[test]
fn a_device_without_fua_gets_its_flush() {
    for journal in KINDS {
        let base = CrashDevice::new(4096, 16 << 10, true, 5);
        let less = Less::over(Arc::new(base.clone()), &[OpKind::Fua, OpKind::WriteZeroes]);
        FileSystem::format(Arc::clone(&less), &format_1m(journal)).unwrap();
        let fs = FileSystem::mount(less, &MountOptions::default()).unwrap();
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.append(&[1; 5000]).unwrap();
        f.sync().unwrap();
        // The power is cut, and everything in the device's cache is lost.
        let mut points = base.crash_points();
        while points.advance().is_some() {}
        let image = points.image(&mut |_| false);
        let dev = Arc::new(CrashDevice::from_image(4096, image, true, 6));
        let fs = FileSystem::mount(dev, &MountOptions::default()).unwrap();
        assert_eq!(content_of(&fs, "/f"), [1; 5000]);
    }
}
