//! Blocks that cannot be written or read for good: of the ring, of its headers, and of a file that is owed bytes. Each test
//! names the rules of the protocol that it is about.

mod common;

use std::sync::Arc;

use common::faults::{content_of, fail};
use common::*;
use pumice_bdev::error_inject::ErrorDevice;
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, OpKind};
use pumice_blobfs::blobstore::check::check;
use pumice_blobfs::fs::{File, FileSystem, FormatOptions, Journal, MountOptions, OpenOptions};

const FOREVER: u64 = u64::MAX;
const RING: u64 = 128 << 10;
const CLUSTER: u32 = 16 << 10;

struct Store {
    base: Arc<dyn BlockDevice>,
    dev: Arc<ErrorDevice>,
    /// First block of the journal's file: two headers, then the ring.
    journal_lba: u64,
}

impl Store {
    fn new() -> Store {
        let base = memory(8 << 20, 4096);
        let mut format = FormatOptions::default();
        format.cluster_size = CLUSTER;
        format.journal = Journal::Bytes(RING);
        FileSystem::format(Arc::clone(&base), &format).unwrap();
        // The place of the journal in the super block, docs/format.md.
        let super_block = content(&base)[..4096].to_vec();
        assert_eq!(&super_block[96..104], b"PUMJRNL1");
        let cluster = u32::from_le_bytes(super_block[128..132].try_into().unwrap());
        let journal_lba = u64::from(cluster) * u64::from(CLUSTER / 4096);
        let dev = Arc::new(ErrorDevice::new(None, Arc::clone(&base)));
        Store {
            base,
            dev,
            journal_lba,
        }
    }

    fn mount(&self) -> FileSystem {
        self.mount_with(&MountOptions::default()).unwrap()
    }

    fn mount_with(&self, opts: &MountOptions) -> Result<FileSystem, pumice_blobfs::fs::FsError> {
        FileSystem::mount(self.dev.clone(), opts)
    }

    /// Makes writes to a block of the journal's file fail for good.
    fn break_block(&self, index: u64) {
        let range = Some((self.journal_lba + index, 1));
        self.dev.inject(fail(OpKind::Write, FOREVER, range));
    }
}

/// A file whose next short syncs are carried.
fn log(fs: &FileSystem, path: &str) -> File {
    let file = fs.open(path, OpenOptions::CREATE).unwrap();
    file.append(b"first").unwrap();
    file.sync().unwrap();
    file
}

/// Appends and syncs many times, and returns what the file has then.
fn many(file: &File, syncs: u32) -> Vec<u8> {
    let mut all = b"first".to_vec();
    for n in 0..syncs {
        let bytes = n.to_le_bytes();
        file.append(&bytes).unwrap();
        file.sync().unwrap_or_else(|e| panic!("sync {n}: {e}"));
        all.extend(bytes);
    }
    all
}

/// Several laps of the ring, each of which meets the block.
#[test]
fn rule_5_a_block_of_the_ring_that_cannot_be_written_fails_no_sync() {
    for index in [2, 3, 9, 17, 31] {
        let store = Store::new();
        store.break_block(index);
        let fs = store.mount();
        let file = log(&fs, "/log");
        let all = many(&file, 200);
        drop(file);
        fs.rename("/log", "/moved").unwrap();
        // As a killed process leaves it.
        let left = memory_with(&content(&store.base), 4096);
        let next = FileSystem::mount(Arc::clone(&left), &MountOptions::default()).unwrap();
        assert!(content_of(&next, "/moved") == all, "block {index}");
        next.unmount().unwrap();
        fs.unmount().unwrap();
        drop(fs);
        store.dev.clear();
        assert_eq!(check(&store.base).unwrap().worst(), None, "block {index}");
        assert!(content_of(&store.mount(), "/moved") == all, "block {index}");
    }
}

#[test]
fn rules_7_and_13_a_header_that_cannot_be_written_stops_nothing() {
    for index in [0, 1] {
        for breaks_first in [false, true] {
            let store = Store::new();
            if breaks_first {
                store.break_block(index);
            }
            let fs = store.mount();
            let file = log(&fs, "/log");
            if !breaks_first {
                store.break_block(index);
            }
            let what = format!("header {index}, before the mount: {breaks_first}");
            let all = many(&file, 200);
            drop(file);
            let left = memory_with(&content(&store.base), 4096);
            let next = FileSystem::mount(left, &MountOptions::default()).unwrap();
            assert!(content_of(&next, "/log") == all, "{what}");
            next.unmount().unwrap();
            fs.unmount().unwrap();
            drop(fs);
            // The next use meets it too.
            let fs = store.mount();
            fs.mkdir("/new").unwrap();
            assert!(content_of(&fs, "/log") == all, "{what}");
            fs.unmount().unwrap();
            drop(fs);
            store.dev.clear();
            assert_eq!(check(&store.base).unwrap().worst(), None, "{what}");
        }
    }
}

/// Headers that could not be written may be damaged by the attempt. What is acknowledged next has a header again.
#[test]
fn rule_7_a_header_is_whole_before_a_batch_relies_on_it() {
    let store = Store::new();
    let fs = store.mount();
    let file = log(&fs, "/log");
    file.append(b"owed").unwrap();
    file.sync().unwrap();
    let headers = Some((store.journal_lba, 2));
    store.dev.inject(fail(OpKind::Write, FOREVER, headers));
    file.truncate(7).unwrap_err();
    let ch = AsyncChannel::new(store.base.open_channel().unwrap());
    let mut garbage = DmaBuf::new(8192).unwrap();
    garbage.fill(0xa5);
    let damage = ch.write(store.journal_lba, garbage.freeze(), false);
    ch.block_on(damage).unwrap();
    store.dev.clear();
    file.append(b"more").unwrap();
    file.sync().unwrap();
    let left = memory_with(&content(&store.base), 4096);
    let next = FileSystem::mount(left, &MountOptions::default()).unwrap();
    assert_eq!(content_of(&next, "/log"), b"firstowedmore");
    next.unmount().unwrap();
    drop(file);
    fs.unmount().unwrap();
}

/// Without a header that can be written a store goes on without the journal, if that is accepted; nothing is lost.
#[test]
fn rule_12_a_journal_without_headers_is_given_up_when_damage_is_accepted() {
    let store = Store::new();
    let fs = store.mount();
    let file = log(&fs, "/log");
    let all = many(&file, 5);
    std::mem::forget((fs, file));
    let left = memory_with(&content(&store.base), 4096);
    let dev = Arc::new(ErrorDevice::new(None, Arc::clone(&left)));
    dev.inject(fail(OpKind::Write, FOREVER, Some((store.journal_lba, 2))));
    FileSystem::mount(dev.clone(), &MountOptions::default()).unwrap_err();
    let mut opts = MountOptions::default();
    opts.accept_damage = true;
    let fs = FileSystem::mount(dev.clone(), &opts).unwrap();
    assert!(content_of(&fs, "/log") == all);
    fs.unlink("/log").unwrap();
    fs.mkdir("/new").unwrap();
    assert_eq!(fs.statfs().journal, 0);
    fs.unmount().unwrap();
    drop(fs);
    dev.clear();
    assert_eq!(check(&left).unwrap().worst(), None);
}

/// A file with a bad block can be deleted, as without a journal. Others keep what they are owed.
#[test]
fn rule_21_a_file_whose_bytes_cannot_be_put_in_place_is_deleted() {
    let store = Store::new();
    let fs = store.mount();
    let bad = log(&fs, "/bad");
    let good = log(&fs, "/good");
    let place = fs.blobstore().extents(bad.blob_id()).unwrap();
    let range = Some((place.lba(0).unwrap(), 1));
    store.dev.inject(fail(OpKind::Write, FOREVER, range));
    for file in [&bad, &good] {
        file.append(b"owed").unwrap();
        file.sync().unwrap();
    }
    let error = bad.truncate(2).unwrap_err().to_string();
    assert!(error.contains("what the journal has"), "{error}");
    drop((bad, good));
    fs.unlink("/bad").unwrap();
    fs.mkdir("/new").unwrap();
    assert_eq!(content_of(&fs, "/good"), b"firstowed");
    // As a power cut leaves it, and after an unmount.
    let left = memory_with(&content(&store.base), 4096);
    let next = FileSystem::mount(left, &MountOptions::default()).unwrap();
    assert_eq!(content_of(&next, "/good"), b"firstowed");
    assert!(!next.exists("/bad").unwrap());
    fs.unmount().unwrap();
    drop(fs);
    store.dev.clear();
    assert_eq!(check(&store.base).unwrap().worst(), None);
    assert_eq!(content_of(&store.mount(), "/good"), b"firstowed");
}
