//! Changes of names on a device that fails for a while: what is done after one that has failed stays done.

mod common;
#[path = "common/flaky.rs"]
mod flaky;

use std::sync::Arc;

use common::faults::*;
use common::memory;
use common::watchdog::watchdog;
use flaky::{Flaky, Plan};
use pumice_bdev::{BlockDevice, IoErrorKind};
use pumice_blobfs::fs::{FileSystem, MountOptions, OpenOptions};

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
