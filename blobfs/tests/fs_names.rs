//! Changes of names: on a device that fails for a while, beside the last close of a file, and after another mount.

mod common;
#[path = "common/flaky.rs"]
mod flaky;
#[path = "common/held.rs"]
mod held;
#[path = "common/task.rs"]
#[allow(dead_code, reason = "this binary needs a part of it")]
mod task;

use std::sync::Arc;

use common::faults::*;
use common::memory;
use common::watchdog::watchdog;
use flaky::{Flaky, Plan};
use held::arrived;
use pumice_bdev::{BlockDevice, IoErrorKind, OpKind};
use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_blobfs::fs::{FileSystem, Journal, MountOptions, OpenOptions};
use task::spawn;

const MIB: usize = 1 << 20;

fn mount(dev: Arc<dyn BlockDevice>) -> FileSystem {
    FileSystem::mount(dev, &MountOptions::default()).unwrap()
}

/// The rename of a directory fails at each of its writes, and so does everything that would undo it.
/// A change that is accepted afterwards finds the directory under its old name, and stays there.
#[test]
fn what_follows_a_failed_rename_of_a_directory_stays_in_it() {
    let _limit = watchdog("after a failed rename", 240);
    for journal in KINDS {
        let mut accepted = 0;
        for from in 0..8 {
            let base = memory(64 << 20, 4096);
            FileSystem::format(Arc::clone(&base), &format_1m(journal)).unwrap();
            let dev = Flaky::new(base);
            let fs = mount(dev.clone());
            fs.mkdir("/d").unwrap();
            drop(fs.open("/d/f", OpenOptions::CREATE).unwrap());
            dev.arm(Some(Plan {
                from,
                count: u64::MAX,
                kind: IoErrorKind::Media,
                done: false,
            }));
            let renamed = fs.rename("/d", "/e");
            dev.arm(None);
            if renamed.is_err() && fs.open("/d/new", OpenOptions::CREATE).is_ok() {
                accepted += 1;
                fs.mkdir("/e").unwrap();
            }
            let before = files_of(&fs);
            let unmounted = fs.unmount();
            drop(fs);
            if unmounted.is_ok() {
                let after = files_of(&mount(dev.clone()));
                assert_eq!(after, before, "{journal:?}, {from}: {renamed:?}");
            }
        }
        assert!(accepted > 0, "{journal:?}: nothing was tried");
    }
}

/// The last handle is closed while the removal of the last name is on its way: the file goes all the same.
#[test]
fn a_file_that_is_closed_while_it_loses_its_name_is_deleted() {
    let _limit = watchdog("a close beside a removal", 120);
    for journal in KINDS {
        let base = memory(64 << 20, 4096);
        let (dev, fs) = setup_with(base, &format_1m(journal), &MountOptions::default());
        let before = fs.statfs().unused;
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.append(&vec![1; MIB]).unwrap();
        f.sync().unwrap();
        dev.inject(hang(OpKind::Write, 1, None));
        let other = fs.clone();
        let removal = spawn(move || other.unlink("/f"));
        arrived(&dev, "a write of the removal");
        drop(f);
        dev.resume();
        removal.join("the removal").unwrap();
        assert_eq!(fs.statfs().unused, before, "{journal:?}");
        fs.unmount().unwrap();
    }
}

/// A replacement is younger than a file of an earlier mount, also if that one was replaced often: a power cut anywhere in it
/// leaves one file of the name.
#[test]
fn a_replacement_is_younger_than_files_of_earlier_mounts() {
    let first = Arc::new(CrashDevice::new(4096, 16 << 10, false, 5));
    FileSystem::format(first.clone(), &format_1m(Journal::None)).unwrap();
    let fs = mount(first.clone());
    for _ in 0..3 {
        fs.open("/f", OpenOptions::FRESH).unwrap();
    }
    // It takes the number of the blob that `/f` says it has replaced.
    fs.open("/g", OpenOptions::CREATE).unwrap();
    fs.unmount().unwrap();
    let second = Arc::new(CrashDevice::from_image(4096, first.image(), false, 6));
    let fs = mount(second.clone());
    fs.open("/f", OpenOptions::FRESH).unwrap();
    let mut points = second.crash_points();
    while points.advance().is_some() {
        let image = points.image(&mut |_| true);
        let cut = mount(Arc::new(CrashDevice::from_image(4096, image, false, 7)));
        assert_eq!(cut.problems(), [] as [String; 0]);
        assert_eq!(files_of(&cut).len(), 2);
    }
}
