//! A journal for a file system that was made without one.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::faults::files_of;
use common::*;
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{BlockDevice, OpKind};
use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_blobfs::blobstore::check::check;
use pumice_blobfs::blobstore::{Blobstore, LoadOptions};
use pumice_blobfs::fs::{
    FileSystem, FormatOptions, Journal, MountOptions, OpenOptions, add_journal,
};

/// Writes the image to a file, and returns its URI.
fn file_of(dir: &Path, bytes: &[u8]) -> String {
    let path = dir.join("kv.img");
    std::fs::write(&path, bytes).unwrap();
    format!("file://{}?block_size=4096", path.display())
}

fn mount(dev: &Arc<dyn BlockDevice>) -> FileSystem {
    FileSystem::mount(Arc::clone(dev), &MountOptions::default()).unwrap()
}

/// A file system of `len` bytes without a journal, with a few files.
fn without(dev: &Arc<dyn BlockDevice>) {
    let mut format = FormatOptions::default();
    format.journal = Journal::None;
    FileSystem::format(Arc::clone(dev), &format).unwrap();
    let fs = mount(dev);
    for n in 0..5_u8 {
        let file = fs.open(&format!("/{n}"), OpenOptions::CREATE).unwrap();
        file.append(&vec![n; 1000 * usize::from(n)]).unwrap();
        file.sync().unwrap();
    }
    fs.unmount().unwrap();
}

#[test]
fn an_image_of_spdk_and_one_of_an_earlier_version_gain_one() {
    for name in [
        "small-blobfs-4096.img",
        "small-rdb-clean.img",
        "own-clean.img",
        "own-killed.img",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let uri = file_of(dir.path(), &image(name));
        let before = {
            let dev = pumice_bdev::open(&uri).unwrap();
            let fs = mount(&dev);
            let before = files_of(&fs);
            fs.unmount().unwrap();
            before
        };
        let space = add_journal(&uri, Journal::Auto).unwrap();
        assert!(space.journal >= 128 << 10, "{name}: {space:?}");
        let dev = pumice_bdev::open(&uri).unwrap();
        let fs = mount(&dev);
        assert!(files_of(&fs) == before, "{name}");
        let file = fs.open("/new", OpenOptions::CREATE).unwrap();
        file.append(&[1; 100]).unwrap();
        file.sync().unwrap();
        let start = fs.io_stats();
        for _ in 0..10 {
            file.append(&[1; 100]).unwrap();
            file.sync().unwrap();
        }
        let writes = fs.io_stats().since(&start).writes;
        // With a small ring there is a checkpoint among them; without a journal they are twenty.
        assert!(writes <= 15, "{name}: {writes} writes for ten syncs");
        drop(file);
        fs.unmount().unwrap();
        drop(fs);
        assert_eq!(check(&dev).unwrap().worst(), None, "{name}");
        drop(dev);
        let error = add_journal(&uri, Journal::Auto).unwrap_err().to_string();
        assert!(error.contains("has a journal"), "{error}");
    }
}

#[test]
fn what_is_refused_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dev = memory(16 << 20, 4096);
    without(&dev);
    let fs = mount(&dev);
    let fill = fs.open("/fill", OpenOptions::CREATE).unwrap();
    fill.append(&vec![7; usize::try_from(fs.free_bytes()).unwrap()])
        .unwrap();
    drop(fill);
    fs.unmount().unwrap();
    drop(fs);
    let full = content(&dev);
    let empty = {
        let dev = memory(16 << 20, 4096);
        without(&dev);
        content(&dev)
    };
    for (bytes, journal, said) in [
        (&full, Journal::Auto, "follow one another"),
        (&empty, Journal::Bytes(1000), "too small"),
        (&empty, Journal::Bytes(1 << 40), "too large"),
        (&empty, Journal::Bytes(12 << 20), "more than half"),
        (&empty, Journal::None, "no size was given"),
    ] {
        let uri = file_of(dir.path(), bytes);
        let error = add_journal(&uri, journal).unwrap_err().to_string();
        assert!(error.contains(said), "{journal:?}: {error}");
        let dev = memory_with(&std::fs::read(dir.path().join("kv.img")).unwrap(), 4096);
        let fs = mount(&dev);
        let before = mount(&memory_with(bytes, 4096));
        assert!(files_of(&fs) == files_of(&before), "{journal:?}");
        assert_eq!(fs.statfs(), before.statfs(), "{journal:?}");
    }
    let blank = dir.path().join("blank.img");
    std::fs::write(&blank, vec![0; 16 << 20]).unwrap();
    add_journal(&format!("file://{}", blank.display()), Journal::Auto).unwrap_err();
    assert!(std::fs::read(&blank).unwrap().iter().all(|byte| *byte == 0));
}

/// After a power cut anywhere the file system has all it had, with or without a journal, and another call adds it.
#[test]
fn a_power_cut_anywhere_leaves_the_files() {
    let base = CrashDevice::new(4096, 16 << 8, true, 1);
    let dev: Arc<dyn BlockDevice> = Arc::new(base.clone());
    without(&dev);
    let before = files_of(&mount(&dev));
    let device = CrashDevice::from_image(4096, base.image(), true, 1);
    let add = |dev: Arc<dyn BlockDevice>| {
        let store = Blobstore::load(dev, &LoadOptions::default()).unwrap();
        let added = store.add_journal(256 << 10);
        store.unload().unwrap();
        added
    };
    add(Arc::new(device.clone())).unwrap();
    let end = device.len_events();
    assert!(end > 10);
    for cut in 0..=end {
        for odd in [false, true] {
            let mut kept = odd;
            let after = device.reopen_after(cut, &mut |_| {
                kept = !kept;
                kept
            });
            let dev: Arc<dyn BlockDevice> = Arc::new(after);
            let what = format!("cut {cut} of {end}");
            let fs = mount(&dev);
            let mut found = files_of(&fs);
            found.remove("/pumice.journal");
            assert!(found == before, "{what}");
            let has = fs.statfs().journal > 0;
            assert!(has || cut < end, "{what}");
            fs.unmount().unwrap();
            drop(fs);
            if !has {
                add(Arc::clone(&dev)).unwrap_or_else(|e| panic!("{what}: {e}"));
            }
            let fs = mount(&dev);
            assert!(files_of(&fs) == before, "{what}: added again");
            assert_eq!(fs.statfs().journal, 256 << 10, "{what}");
            fs.unmount().unwrap();
            drop(fs);
            assert_eq!(check(&dev).unwrap().worst(), None, "{what}");
        }
    }
}

/// The host gives a sparse image its blocks when they are written. All of the ring is, before a change relies on it.
#[test]
fn all_of_the_ring_is_written_before_it_is_used() {
    const RING: u64 = 256 << 10;
    // A block that cannot be written, and what the call has said then. Returns the first block of the ring's file.
    let add_with = |bad: Option<u64>| {
        let base = memory(16 << 20, 4096);
        without(&base);
        let before = files_of(&mount(&base));
        let dev = Arc::new(ErrorDevice::new(None, Arc::clone(&base)));
        let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
        let cluster_blocks = store.cluster_size() / 4096;
        if let Some(block) = bad {
            let full = Injection::new(Failure::Fail).op(Some(OpKind::Write));
            dev.inject(full.count(u64::MAX).range(Some((block, 1))));
        }
        let added = store.add_journal(RING);
        dev.clear();
        store.unload().unwrap();
        drop((store, dev));
        let fs = mount(&base);
        assert!(files_of(&fs) == before, "{bad:?}");
        let has = fs.statfs().journal > 0;
        assert_eq!(
            (added.is_ok(), has),
            (bad.is_none(), bad.is_none()),
            "{bad:?}: {added:?}"
        );
        // Its place in the super block, docs/format.md.
        let cluster = u32::from_le_bytes(content(&base)[128..132].try_into().unwrap());
        u64::from(cluster) * cluster_blocks
    };
    let first = add_with(None);
    for block in [2, 30, RING / 4096 - 1] {
        add_with(Some(first + block));
    }
}

/// On a device that fails in the middle all files stay, and another call adds the journal.
#[test]
fn a_device_that_fails_anywhere_keeps_the_files() {
    for skipped in 0.. {
        let base = memory(16 << 20, 4096);
        without(&base);
        let before = files_of(&mount(&base));
        let dev = Arc::new(ErrorDevice::new(None, Arc::clone(&base)));
        let store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
        let nothing = Failure::Corrupt {
            offset: 0,
            value: 0,
        };
        for (failure, count) in [(nothing, skipped), (Failure::Fail, u64::MAX)] {
            if count > 0 {
                dev.inject(Injection::new(failure).op(Some(OpKind::Write)).count(count));
            }
        }
        let added = store.add_journal(256 << 10);
        dev.clear();
        let unloaded = store.unload();
        drop((store, dev));
        let fs = mount(&base);
        let what = format!("after {skipped} writes: {added:?}, {unloaded:?}");
        let mut found = files_of(&fs);
        found.remove("/pumice.journal");
        assert!(found == before, "{what}");
        let has = fs.statfs().journal > 0;
        fs.unmount().unwrap();
        drop(fs);
        if added.is_ok() {
            assert!(has && skipped > 3, "{what}");
            return;
        }
        if !has {
            let store = Blobstore::load(Arc::clone(&base), &LoadOptions::default()).unwrap();
            store
                .add_journal(256 << 10)
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            store.unload().unwrap();
        }
        let fs = mount(&base);
        assert!(files_of(&fs) == before, "{what}");
        assert_eq!(fs.statfs().journal, 256 << 10, "{what}");
        fs.unmount().unwrap();
        drop(fs);
        assert_eq!(check(&base).unwrap().worst(), None, "{what}");
    }
}
