//! Blocks that cannot be written or read for good: of the ring, of its headers, and of a file that is owed bytes. Each test
//! names the rules of the protocol that it is about.

mod common;
#[path = "common/flaky.rs"]
mod flaky;

use std::sync::Arc;

use common::faults::{content_of, fail};
use common::*;
use flaky::{Flaky, Plan};
use pumice_bdev::error_inject::ErrorDevice;
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf, IoErrorKind, OpKind};
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
        Store::with_ring(RING)
    }

    fn with_ring(bytes: u64) -> Store {
        let base = memory(8 << 20, 4096);
        let mut format = FormatOptions::default();
        format.cluster_size = CLUSTER;
        format.journal = Journal::Bytes(bytes);
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

/// Makes the first block of a file unwritable, then has the journal carry an append to each of these files.
fn owe_what_cannot_be_written(store: &Store, fs: &FileSystem, files: &[&File]) {
    let place = fs.blobstore().extents(files[0].blob_id()).unwrap();
    let range = Some((place.lba(0).unwrap(), 1));
    store.dev.inject(fail(OpKind::Write, FOREVER, range));
    for file in files {
        file.append(b"owed").unwrap();
        file.sync().unwrap();
    }
}

/// The owed bytes are in the append buffer only. When that is full, and its end cannot be put in place, it is kept.
#[test]
fn rule_20_a_full_buffer_whose_bytes_cannot_be_put_in_place_is_kept() {
    const MIB: usize = 1 << 20;
    let store = Store::with_ring(MIB as u64);
    let fs = store.mount();
    let file = log(&fs, "/log");
    file.append(&vec![7; MIB - 9]).unwrap();
    file.sync().unwrap();
    let place = fs.blobstore().extents(file.blob_id()).unwrap();
    let last = place.lba(63).unwrap() + 3;
    let broken = fail(OpKind::Write, FOREVER, Some((last, 1)));
    store.dev.inject(broken);
    // Carried, so that nothing is left to be written behind.
    file.append(b"owed").unwrap();
    file.sync().unwrap();
    file.append(b"more").unwrap_err();
    file.invalidate(0, u64::MAX);
    let mut found = [0; 4];
    file.read_at(MIB as u64 - 4, &mut found).unwrap();
    assert_eq!(found, *b"owed");
    store.dev.clear();
    file.append(b"more").unwrap();
    file.sync().unwrap();
    drop(file);
    fs.unmount().unwrap();
    drop(fs);
    assert_eq!(content_of(&store.mount(), "/log")[MIB - 4..], *b"owedmore");
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

/// Headers that could not be written may be damaged by the attempt. What is acknowledged next has a header again, also when
/// that could not be written at the first attempt either.
#[test]
fn rule_7_a_header_is_whole_before_a_batch_relies_on_it() {
    for fails_again in [false, true] {
        // So large that it is not emptied in the background.
        let store = Store::with_ring(1 << 20);
        let fs = store.mount();
        let file = log(&fs, "/log");
        file.append(b"owed").unwrap();
        file.sync().unwrap();
        let headers = Some((store.journal_lba, 2));
        store.dev.inject(fail(OpKind::Write, FOREVER, headers));
        file.truncate(7).unwrap_err();
        file.append(b"more").unwrap();
        if fails_again {
            file.sync().unwrap_err();
        }
        let ch = AsyncChannel::new(store.base.open_channel().unwrap());
        let mut garbage = DmaBuf::new(8192).unwrap();
        garbage.fill(0xa5);
        let damage = ch.write(store.journal_lba, garbage.freeze(), false);
        ch.block_on(damage).unwrap();
        store.dev.clear();
        file.sync().unwrap();
        let left = memory_with(&content(&store.base), 4096);
        let next = FileSystem::mount(left, &MountOptions::default()).unwrap();
        assert_eq!(content_of(&next, "/log"), b"firstowedmore");
        next.unmount().unwrap();
        drop(file);
        fs.unmount().unwrap();
    }
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
    let problems = fs.problems().join("; ");
    assert!(problems.contains("headers cannot be written"), "{problems}");
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
    owe_what_cannot_be_written(&store, &fs, &[&bad, &good]);
    // It keeps a part of them.
    let error = bad.truncate(7).unwrap_err().to_string();
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

/// A deletion or replacement that fails gives nothing up.
#[test]
fn rule_21_a_deletion_that_fails_leaves_what_the_journal_owes() {
    for replaces in [false, true] {
        let store = Store::new();
        let fs = store.mount();
        let bad = log(&fs, "/bad");
        owe_what_cannot_be_written(&store, &fs, &[&bad]);
        drop(bad);
        let ring = Some((store.journal_lba + 2, RING / 4096 - 2));
        store.dev.inject(fail(OpKind::Write, FOREVER, ring));
        if replaces {
            fs.open("/bad", OpenOptions::FRESH).unwrap_err();
        } else {
            fs.unlink("/bad").unwrap_err();
        }
        let killed = memory_with(&content(&store.base), 4096);
        let next = FileSystem::mount(killed, &MountOptions::default()).unwrap();
        assert_eq!(content_of(&next, "/bad"), b"firstowed");
        next.unmount().unwrap();
        store.dev.clear();
        fs.unmount().unwrap();
        drop(fs);
        assert_eq!(content_of(&store.mount(), "/bad"), b"firstowed");
    }
}

/// While the ring has bytes of a deleted file, nobody else gets its clusters. The device fails from each operation of the
/// deletion on; behind the batch, the tail of the ring cannot move.
#[test]
fn rules_21_and_22_a_deletion_before_the_ring_can_be_emptied() {
    let mut deleted = 0;
    for from in 0.. {
        let store = Store::with_ring(1 << 20);
        let flaky = Flaky::new(store.dev.clone());
        let fs = FileSystem::mount(flaky.clone(), &MountOptions::default()).unwrap();
        let bad = log(&fs, "/bad");
        owe_what_cannot_be_written(&store, &fs, &[&bad]);
        let place = fs.blobstore().extents(bad.blob_id()).unwrap();
        drop(bad);
        flaky.arm(Some(Plan {
            from,
            count: 1000,
            kind: IoErrorKind::Media,
            done: false,
        }));
        let unlinked = fs.unlink("/bad");
        let has_failed = flaky.seen() > from;
        flaky.arm(None);
        store.dev.clear();
        if unlinked.is_err() {
            fs.unmount().unwrap();
            continue;
        }
        if !has_failed {
            fs.unmount().unwrap();
            break;
        }
        deleted += 1;
        is_not_used_again(&store, fs, place.lba(0));
    }
    assert!(deleted > 0);
}

/// Checks that a deleted file is gone, and that its first cluster does not go to another one.
fn is_not_used_again(store: &Store, fs: FileSystem, place: Option<u64>) {
    let left = memory_with(&content(&store.base), 4096);
    let next = FileSystem::mount(Arc::clone(&left), &MountOptions::default()).unwrap();
    assert!(!next.exists("/bad").unwrap());
    next.unmount().unwrap();
    drop(next);
    assert_eq!(check(&left).unwrap().worst(), None);
    let new = fs.open("/new", OpenOptions::CREATE).unwrap();
    while new.append(&vec![7; CLUSTER as usize]).is_ok() {}
    new.sync().unwrap();
    let taken = fs.blobstore().extents(new.blob_id()).unwrap();
    let clusters = new.len() / u64::from(CLUSTER);
    assert!((0..clusters).all(|n| taken.lba(n) != place));
    drop(new);
    fs.unmount().unwrap();
    drop(fs);
    assert_eq!(check(&store.base).unwrap().worst(), None);
    let fs = store.mount();
    assert!(content_of(&fs, "/new").iter().all(|byte| *byte == 7));
    fs.unmount().unwrap();
}

/// The device has a batch that it reports as failed, and no epoch can be begun behind it. Until one is, the file is not
/// cut short, since a load would find the longer one.
#[test]
fn rule_5_a_truncation_behind_a_batch_that_may_be_there() {
    let store = Store::new();
    let below: Arc<dyn BlockDevice> = store.dev.clone();
    let flaky = Flaky::new(below);
    let fs = FileSystem::mount(flaky.clone(), &MountOptions::default()).unwrap();
    let file = log(&fs, "/log");
    file.append(b"gone").unwrap();
    let headers = Some((store.journal_lba, 2));
    store.dev.inject(fail(OpKind::Write, FOREVER, headers));
    flaky.arm(Some(Plan {
        from: 0,
        count: 3,
        kind: IoErrorKind::Media,
        done: true,
    }));
    file.sync().unwrap_err();
    flaky.arm(None);
    file.truncate(5).unwrap_err();
    store.dev.clear();
    file.truncate(5).unwrap();
    let killed = memory_with(&content(&store.base), 4096);
    let next = FileSystem::mount(killed, &MountOptions::default()).unwrap();
    assert_eq!(content_of(&next, "/log"), b"first");
    next.unmount().unwrap();
    drop(file);
    fs.unmount().unwrap();
}

/// Owed bytes that are cut off need no place, and are given up only when the shorter length is durable.
#[test]
fn rule_21_a_file_whose_bytes_cannot_be_put_in_place_is_cut_short() {
    for (cut_to, fails) in [(5, false), (2, false), (0, false), (5, true), (0, true)] {
        let store = Store::new();
        let fs = store.mount();
        let bad = log(&fs, "/bad");
        let good = log(&fs, "/good");
        owe_what_cannot_be_written(&store, &fs, &[&bad, &good]);
        if fails {
            // No change can be made: the ring cannot be written.
            let ring = Some((store.journal_lba + 2, RING / 4096 - 2));
            store.dev.inject(fail(OpKind::Write, FOREVER, ring));
            bad.truncate(cut_to).unwrap_err();
            let killed = memory_with(&content(&store.base), 4096);
            let next = FileSystem::mount(killed, &MountOptions::default()).unwrap();
            assert_eq!(content_of(&next, "/bad"), b"firstowed", "{cut_to}");
            next.unmount().unwrap();
            continue;
        }
        bad.truncate(cut_to).unwrap();
        let want = &b"firstowed"[..usize::try_from(cut_to).unwrap()];
        assert_eq!(content_of(&fs, "/bad"), want);
        fs.mkdir("/new").unwrap();
        let killed = memory_with(&content(&store.base), 4096);
        let next = FileSystem::mount(killed, &MountOptions::default()).unwrap();
        assert_eq!(content_of(&next, "/bad"), want);
        assert_eq!(content_of(&next, "/good"), b"firstowed");
        drop((bad, good));
        fs.unmount().unwrap();
        drop(fs);
        store.dev.clear();
        assert_eq!(check(&store.base).unwrap().worst(), None);
        let fs = store.mount();
        assert_eq!(content_of(&fs, "/bad"), want);
        assert_eq!(content_of(&fs, "/good"), b"firstowed");
    }
}

/// A truncation that cannot read what the file keeps has changed nothing, although it would give up owed bytes.
#[test]
fn rule_21_a_truncation_that_cannot_read_what_is_kept_changes_nothing() {
    let store = Store::new();
    let mut options = MountOptions::default();
    options.cache_bytes = 0;
    let fs = store.mount_with(&options).unwrap();
    let file = fs.open("/long", OpenOptions::CREATE).unwrap();
    let mut all = vec![3; (1 << 20) + 10_000];
    file.append(&all).unwrap();
    file.sync().unwrap();
    let place = fs.blobstore().extents(file.blob_id()).unwrap();
    let end = (1 << 20) / u64::from(CLUSTER);
    let range = Some((place.lba(end).unwrap(), 4));
    store.dev.inject(fail(OpKind::Write, FOREVER, range));
    file.append(b"owed").unwrap();
    file.sync().unwrap();
    all.extend(b"owed");
    let first = Some((place.lba(0).unwrap(), 1));
    store.dev.inject(fail(OpKind::Read, FOREVER, first));
    file.truncate(500).unwrap_err();
    assert_eq!(file.len(), all.len() as u64);
    let killed = memory_with(&content(&store.base), 4096);
    let next = FileSystem::mount(killed, &MountOptions::default()).unwrap();
    assert!(content_of(&next, "/long") == all);
    next.unmount().unwrap();
    store.dev.clear();
    file.truncate(500).unwrap();
    assert!(content_of(&fs, "/long") == all[..500]);
    drop(file);
    fs.unmount().unwrap();
}

/// A mount that has to end leaves in the journal what cannot be put in place. It is there when the block works again.
#[test]
fn rules_14_and_21_an_unmount_that_has_to_end_leaves_the_journal_as_it_is() {
    let store = Store::new();
    let fs = store.mount();
    let bad = log(&fs, "/bad");
    owe_what_cannot_be_written(&store, &fs, &[&bad]);
    drop(bad);
    let error = fs.unmount().unwrap_err().to_string();
    assert!(error.contains("what the journal has"), "{error}");
    // Nobody else has the device until the mount has ended.
    store.mount_with(&MountOptions::default()).unwrap_err();
    let error = fs.unmount_anyway().unwrap_err().to_string();
    assert!(error.contains("what the journal has"), "{error}");
    let mut reading = MountOptions::default();
    reading.read_only = true;
    let next = store.mount_with(&reading).unwrap();
    assert_eq!(content_of(&next, "/bad"), b"firstowed");
    drop(next);
    store.dev.clear();
    let next = store.mount();
    assert_eq!(content_of(&next, "/bad"), b"firstowed");
    next.unmount().unwrap();
    drop((next, fs));
    assert_eq!(check(&store.base).unwrap().worst(), None);
}
