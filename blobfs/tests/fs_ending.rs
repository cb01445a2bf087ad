//! What happens beside an unmount, what the next one has to do after a crash, and what an error leaves of the other files.

mod common;
#[path = "common/held.rs"]
mod held;
#[path = "common/task.rs"]
#[allow(dead_code, reason = "this binary needs a part of it")]
mod task;

use std::sync::Arc;

use common::faults::*;
use common::memory;
use common::watchdog::watchdog;
use held::{arrived, first_cluster};
use pumice_bdev::OpKind;
use pumice_bdev::error_inject::ErrorDevice;
use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_blobfs::fs::{File, FileSystem, Journal, MountOptions, OpenOptions, Result};
use task::{Task, spawn};

const MIB: usize = 1 << 20;

/// Returns a mount with two files of a hundred durable bytes each.
fn two_files() -> (Arc<ErrorDevice>, FileSystem, [File; 2]) {
    let base = memory(64 << 20, 4096);
    let (dev, fs) = setup_with(base, &format_1m(Journal::None), &MountOptions::default());
    let files = ["/a", "/b"].map(|path| fs.open(path, OpenOptions::CREATE).unwrap());
    for f in &files {
        f.append(&[1; 100]).unwrap();
        f.sync().unwrap();
    }
    (dev, fs, files)
}

/// Begins an unmount, and returns when it waits for the sync of another hundred bytes of `b`. The first sync of `/a` before it had
/// nothing to do.
fn unmounting(dev: &ErrorDevice, fs: &FileSystem, b: &File) -> Task<Result<()>> {
    b.append(&[2; 100]).unwrap();
    dev.inject(hang(OpKind::Write, 1, data_blocks(Journal::None)));
    let fs = fs.clone();
    let unmount = spawn(move || fs.unmount());
    arrived(dev, "the first sync");
    unmount
}

/// An unmount syncs each file a last time, and takes no bytes of it from then on: those would be lost.
#[test]
fn an_append_beside_an_unmount_is_refused_or_durable() {
    let _limit = watchdog("an append beside an unmount", 120);
    let (dev, fs, [a, b]) = two_files();
    // Each file is synced twice. The second sync of `/b` comes when `/a` has had its last one.
    let data = data_blocks(Journal::None);
    let unmount = unmounting(&dev, &fs, &b);
    b.append(&[3; 100]).unwrap();
    dev.inject(hang(OpKind::Write, 1, data));
    dev.resume();
    arrived(&dev, "the last sync");
    let appended = a.append(&[4; 100]);
    dev.resume();
    unmount.join("the unmount").unwrap();
    drop((a, b, fs));
    let fs = mount_with(&dev, &MountOptions::default());
    let mut want = vec![1; 100];
    want.extend_from_slice(if appended.is_ok() { &[4; 100] } else { &[] });
    assert_eq!(content_of(&fs, "/a"), want);
    let want = [[1; 100], [2; 100], [3; 100]].concat();
    assert_eq!(content_of(&fs, "/b"), want);
}

/// A read keeps the blob of its file open until it has ended.
#[test]
fn an_unmount_waits_for_a_read_that_has_begun() {
    let _limit = watchdog("an unmount beside a read", 120);
    let base = memory(64 << 20, 4096);
    let (dev, fs) = setup_with(base, &format_1m(Journal::None), &MountOptions::default());
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&[7; 100]).unwrap();
    f.sync().unwrap();
    drop(f);
    let f = fs.open("/f", OpenOptions::READ).unwrap();
    f.invalidate(0, u64::MAX);
    dev.inject(hang(OpKind::Read, 1, None));
    let read = spawn(move || {
        let mut out = [0; 100];
        f.read_at(0, &mut out).map(|n| (n, out))
    });
    arrived(&dev, "the read");
    let other = fs.clone();
    let unmount = spawn(move || other.unmount());
    assert!(unmount.still_waits(), "{:?}", unmount.join("the unmount"));
    dev.resume();
    assert_eq!(read.join("the read").unwrap(), (100, [7; 100]));
    unmount.join("the unmount").unwrap();
    assert_eq!(
        content_of(&mount_with(&dev, &MountOptions::default()), "/f"),
        [7; 100]
    );
}

/// An unmount frees what was allocated ahead before the last crash.
#[test]
fn what_was_allocated_ahead_before_a_crash_is_freed() {
    for journal in KINDS {
        let first = Arc::new(CrashDevice::new(4096, 32 << 10, false, 5));
        FileSystem::format(first.clone(), &format_1m(journal)).unwrap();
        let fs = FileSystem::mount(first.clone(), &MountOptions::default()).unwrap();
        let unused = fs.statfs().unused;
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        for _ in 0..5 {
            f.append(&vec![1; MIB]).unwrap();
            f.sync().unwrap();
        }
        assert!(f.allocated() > f.len(), "nothing was allocated ahead");
        let second = Arc::new(CrashDevice::from_image(4096, first.image(), false, 6));
        let mount = || FileSystem::mount(second.clone(), &MountOptions::default()).unwrap();
        mount().unmount().unwrap();
        let fs = mount();
        assert_eq!(unused - fs.statfs().unused, 5 << 20, "{journal:?}");
    }
}

/// A sync of all files makes those durable that can be, also behind one that cannot.
#[test]
fn a_file_that_cannot_be_synced_keeps_no_other_from_it() {
    for journal in KINDS {
        let base = Arc::new(CrashDevice::new(4096, 16 << 10, false, 5));
        let (dev, fs) = setup_with(base.clone(), &format_1m(journal), &MountOptions::default());
        let [a, b] = ["/a", "/b"].map(|path| fs.open(path, OpenOptions::CREATE).unwrap());
        for f in [&a, &b] {
            f.append(&[1; 100]).unwrap();
        }
        dev.inject(fail(OpKind::Write, u64::MAX, first_cluster(&fs, &a)));
        fs.sync().unwrap_err();
        let after = Arc::new(CrashDevice::from_image(4096, base.image(), false, 6));
        let fs = FileSystem::mount(after, &MountOptions::default()).unwrap();
        assert_eq!(content_of(&fs, "/b"), [1; 100], "{journal:?}");
        dev.clear();
    }
}

/// The last sync of an unmount fails, after the first has succeeded: the mount goes on, and its next unmount loses nothing.
#[test]
fn a_mount_goes_on_after_the_last_sync_of_its_unmount_has_failed() {
    let _limit = watchdog("an unmount that fails late", 120);
    let (dev, fs, [a, b]) = two_files();
    let block_of_a = first_cluster(&fs, &a);
    let unmount = unmounting(&dev, &fs, &b);
    a.append(&[3; 100]).unwrap();
    dev.inject(fail(OpKind::Write, u64::MAX, block_of_a));
    dev.resume();
    unmount.join("the unmount").unwrap_err();
    dev.clear();
    a.append(&[4; 100]).unwrap();
    b.append(&[4; 100]).unwrap();
    fs.unmount().unwrap();
    drop((a, b, fs));
    let fs = mount_with(&dev, &MountOptions::default());
    for (path, middle) in [("/a", [3; 100]), ("/b", [2; 100])] {
        assert_eq!(content_of(&fs, path), [[1; 100], middle, [4; 100]].concat());
    }
}
