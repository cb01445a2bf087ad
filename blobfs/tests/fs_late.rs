//! Writes of files that have timed out and reach the device when their clusters might belong to another file.

mod common;
#[path = "common/late.rs"]
mod late;

use std::sync::Arc;

use common::faults::{KINDS, content_of, data_blocks, format_1m};
use common::memory;
use late::Late;
use pumice_bdev::BlockDevice;
use pumice_blobfs::fs::{File, FileSystem, Journal, MountOptions, OpenOptions};

/// A way to have a write of a file time out, and to give its clusters away.
type Step = fn(&FileSystem, &File);

const MIB: usize = 1 << 20;

fn unlink(fs: &FileSystem, _: &File) {
    fs.unlink("/a").unwrap();
}

fn truncate(_: &FileSystem, f: &File) {
    f.truncate(0).unwrap();
}

fn fresh(fs: &FileSystem, _: &File) {
    drop(fs.open("/a", OpenOptions::FRESH).unwrap());
}

fn replace(fs: &FileSystem, _: &File) {
    drop(fs.open("/new", OpenOptions::CREATE).unwrap());
    fs.rename("/new", "/a").unwrap();
}

/// A file loses the clusters that a write may still reach. Another file takes all the space that there is, and the write lands.
fn lands(journal: Journal, write: Step, lose: Step, keeps_handle: bool) {
    let dev = Late::new(memory(48 << 20, 4096));
    let as_dyn: Arc<dyn BlockDevice> = Arc::clone(&dev) as Arc<dyn BlockDevice>;
    let mut opts = MountOptions::default();
    opts.write_behind_bytes = 1;
    FileSystem::format(Arc::clone(&as_dyn), &format_1m(journal)).unwrap();
    let fs = FileSystem::mount(Arc::clone(&as_dyn), &opts).unwrap();
    let a = fs.open("/a", OpenOptions::CREATE).unwrap();
    a.append(&vec![1; 2 * MIB]).unwrap();
    a.sync().unwrap();
    dev.arm(1, data_blocks(journal).unwrap().0);
    write(&fs, &a);
    assert_eq!(dev.held(), 1, "a write has timed out");
    let free = fs.statfs().free;
    lose(&fs, &a);
    let kept = keeps_handle.then(|| a.clone());
    drop(a);
    let b = fs.open("/b", OpenOptions::CREATE).unwrap();
    let mut len = 0;
    while b.append(&vec![7; MIB]).is_ok() && b.sync().is_ok() {
        len += MIB;
    }
    assert!(len > 8 * MIB, "{free} were free, {len} were written");
    dev.land();
    drop((b, kept));
    fs.unmount_anyway().unwrap();
    drop(fs);
    let fs = FileSystem::mount(as_dyn, &MountOptions::default()).unwrap();
    let found = content_of(&fs, "/b");
    assert!(found.len() >= len);
    let wrong = found.iter().filter(|byte| **byte != 7).count();
    assert_eq!(wrong, 0, "{wrong} bytes of {len} are another file's");
    // What the write could reach is free again.
    for entry in fs.list("/").unwrap() {
        fs.unlink(&format!("/{}", entry.name)).unwrap();
    }
    let statfs = fs.statfs();
    assert_eq!(statfs.free, statfs.total);
    fs.unmount().unwrap();
}

// A sync may send again what has timed out, and succeed.

/// The write of an append.
fn appended(_: &FileSystem, f: &File) {
    f.append(&vec![2; 2 * MIB]).unwrap();
    let _ = f.sync();
}

/// An overwrite in the middle.
fn overwritten(_: &FileSystem, f: &File) {
    let _ = f.write_at(0, &vec![3; MIB]).and_then(|()| f.sync());
}

/// The zeroes of a gap.
fn extended(_: &FileSystem, f: &File) {
    let _ = f.truncate(f.len() + 3 * MIB as u64).and_then(|()| f.sync());
}

#[test]
fn a_write_that_lands_late_reaches_no_other_file() {
    for journal in KINDS {
        for write in [appended as Step, overwritten, extended] {
            for lose in [unlink as Step, truncate, fresh, replace] {
                for keeps_handle in [false, true] {
                    lands(journal, write, lose, keeps_handle);
                }
            }
        }
    }
}
