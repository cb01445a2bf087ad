//! Modes and times that are set on files and directories.

mod common;
#[path = "common/held.rs"]
mod held;
#[path = "common/task.rs"]
#[allow(dead_code, reason = "this binary needs a part of it")]
mod task;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::faults::again;
use held::{begin_sync, carried, with_journal};
use pumice_bdev::BlockDevice;
use pumice_blobfs::fs::{
    Attributes, FileSystem, FormatOptions, FsError, MountOptions, OpenOptions, Stat,
};

fn device() -> Arc<dyn BlockDevice> {
    let dev = pumice_bdev::open("malloc://64M?block_size=4096").unwrap();
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    dev
}

fn mount(dev: &Arc<dyn BlockDevice>) -> FileSystem {
    FileSystem::mount(Arc::clone(dev), &MountOptions::default()).unwrap()
}

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::new(seconds, 123_456_789)
}

fn set(mode: u32, seconds: u64) -> Attributes {
    Attributes::default()
        .mode(Some(mode))
        .modified(Some(at(seconds)))
}

fn has(stat: &Stat, mode: u32, seconds: u64) -> bool {
    stat.mode == Some(mode) && stat.mtime == at(seconds)
}

#[test]
fn they_are_kept_with_and_without_a_length_to_write() {
    let dev = device();
    let fs = mount(&dev);
    fs.mkdir("/d").unwrap();
    let f = fs.open("/d/new", OpenOptions::CREATE).unwrap();
    f.append(b"bytes").unwrap();
    f.set_attributes(&set(0o100_640, 1000)).unwrap();
    assert!(has(&f.stat(), 0o640, 1000));
    f.sync().unwrap();
    assert!(has(&f.stat(), 0o640, 1000), "a sync keeps the time");
    let old = fs.open("/old", OpenOptions::CREATE).unwrap();
    old.append(b"bytes").unwrap();
    old.sync().unwrap();
    let writes = fs.io_stats().writes;
    old.set_attributes(&set(0o7777, 2000)).unwrap();
    old.sync_data().unwrap();
    assert_eq!(fs.io_stats().writes, writes, "the length is the same");
    old.sync().unwrap();
    assert!(fs.io_stats().writes > writes);
    let writes = fs.io_stats().writes;
    old.sync().unwrap();
    assert_eq!(fs.io_stats().writes, writes, "nothing has changed");
    // Not synced before the unmount.
    fs.set_attributes("/old", &set(0o600, 3000)).unwrap();
    fs.set_attributes("/d", &set(0o1777, 4000)).unwrap();
    fs.set_attributes("/", &set(0o700, 5000)).unwrap();
    assert!(has(&fs.stat("/").unwrap(), 0o700, 5000));
    drop((f, old));
    fs.unmount().unwrap();
    let fs = mount(&dev);
    assert!(has(&fs.stat("/d/new").unwrap(), 0o640, 1000));
    assert!(has(&fs.stat("/old").unwrap(), 0o600, 3000));
    assert!(has(&fs.stat("/d").unwrap(), 0o1777, 4000));
    assert_eq!(fs.stat("/").unwrap().mode, None, "the root has no blob");
    fs.unmount().unwrap();
}

#[test]
fn a_time_that_was_set_lasts_until_the_next_change() {
    let dev = device();
    let fs = mount(&dev);
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(b"bytes").unwrap();
    f.set_attributes(&set(0o600, 1000)).unwrap();
    f.append(b"more").unwrap();
    f.sync().unwrap();
    assert!(f.stat().mtime > at(1000));
    f.set_attributes(&set(0o600, 1000)).unwrap();
    f.write_at(2, b"inside").unwrap();
    assert!(f.stat().mtime > at(1000));
    f.set_attributes(&set(0o600, 1000)).unwrap();
    f.truncate(3).unwrap();
    f.append(&[1; 6]).unwrap();
    f.sync().unwrap();
    assert!(f.stat().mtime > at(1000));
    assert_eq!(f.stat().mode, Some(0o600));
    // Earlier than 1970 is 1970.
    let early = Attributes::default().modified(Some(UNIX_EPOCH - Duration::from_secs(9)));
    f.set_attributes(&early).unwrap();
    assert_eq!(f.stat().mtime, UNIX_EPOCH);
    // Without a name there is nothing to write.
    fs.unlink("/f").unwrap();
    f.set_attributes(&set(0o644, 9)).unwrap();
    f.sync().unwrap();
    assert_eq!((f.stat().links, f.stat().len), (0, 9));
    drop(f);
    fs.unmount().unwrap();
}

#[test]
fn directories_change_with_their_entries_and_names_are_told() {
    let dev = device();
    let fs = mount(&dev);
    fs.mkdir("/d").unwrap();
    let mut last = fs.stat("/d").unwrap().mtime;
    let mut changed = |what: &str| {
        let now = fs.stat("/d").unwrap().mtime;
        assert!(now > last, "{what}");
        last = now;
    };
    drop(fs.open("/d/f", OpenOptions::CREATE).unwrap());
    changed("create");
    fs.link("/d/f", "/d/g").unwrap();
    changed("link");
    fs.mkdir("/d/e").unwrap();
    changed("mkdir");
    fs.rename("/d/e", "/e").unwrap();
    changed("rename");
    fs.unlink("/d/f").unwrap();
    changed("unlink");
    fs.rename("/e", "/d/e").unwrap();
    changed("rename into it");
    fs.rmdir("/d/e").unwrap();
    changed("rmdir");
    fs.link("/d/g", "/h").unwrap();
    assert_eq!(fs.names("/h").unwrap(), ["/d/g", "/h"]);
    assert_eq!(fs.names("/d").unwrap(), ["/d"]);
    assert_eq!(fs.names("/").unwrap(), ["/"]);
    assert!(matches!(fs.names("/none"), Err(FsError::NotFound { .. })));
    fs.unmount().unwrap();
    let opts = {
        let mut opts = MountOptions::default();
        opts.read_only = true;
        opts
    };
    let fs = FileSystem::mount(Arc::clone(&dev), &opts).unwrap();
    for path in ["/h", "/d", "/"] {
        let refused = fs.set_attributes(path, &set(0o600, 1));
        assert!(matches!(refused, Err(FsError::ReadOnly { .. })), "{path}");
    }
    fs.unmount().unwrap();
}

/// A time that is set while a sync is on its way, carried by the journal or not, and with more bytes behind those of
/// the sync or not.
#[test]
fn a_time_that_is_set_beside_a_sync_lasts() {
    for is_carried in [false, true] {
        for grows in [false, true] {
            let what = format!("carried {is_carried}, grows {grows}");
            let (dev, fs) = with_journal(4 << 20, &MountOptions::default());
            let f = if is_carried {
                carried(&fs, "/f")
            } else {
                fs.open("/f", OpenOptions::CREATE).unwrap()
            };
            f.append(&[3; 60]).unwrap();
            let sync = begin_sync(&dev, &f);
            if grows {
                f.append(b"more").unwrap();
            }
            f.set_attributes(&set(0o640, 1000)).unwrap();
            dev.resume();
            sync.join("the sync").unwrap();
            assert!(has(&f.stat(), 0o640, 1000), "{what}: {:?}", f.stat());
            f.sync().unwrap();
            assert!(has(&f.stat(), 0o640, 1000), "{what}, synced");
            drop(f);
            let fs = again(&dev, fs);
            let stat = fs.stat("/f").unwrap();
            assert!(has(&stat, 0o640, 1000), "{what}, again: {stat:?}");
            fs.unmount().unwrap();
        }
    }
}

/// A sync of an append that the journal could carry writes the mode and the time that were set.
#[test]
fn a_short_append_carries_what_was_set() {
    let (dev, fs) = with_journal(4 << 20, &MountOptions::default());
    let f = carried(&fs, "/f");
    f.append(b"short").unwrap();
    f.set_attributes(&set(0o640, 1000)).unwrap();
    let writes = fs.io_stats().writes;
    f.sync().unwrap();
    assert_eq!(fs.io_stats().writes - writes, 1, "all of it in one write");
    f.sync().unwrap();
    assert_eq!(fs.io_stats().writes - writes, 1, "nothing is left to write");
    assert!(has(&f.stat(), 0o640, 1000));
    drop(f);
    let fs = again(&dev, fs);
    assert!(has(&fs.stat("/f").unwrap(), 0o640, 1000));
    fs.unmount().unwrap();
}
