//! Checkpoints that do not end, or that fail for good, and what goes on beside them. Each test names the rules of the
//! protocol that it is about.

mod common;
#[path = "common/held.rs"]
mod held;
#[path = "common/task.rs"]
mod task;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::faults::{again, content_of, fail, hang};
use common::journal::{DEVICES, describe, make, set};
use held::*;
use pumice_bdev::OpKind;
use pumice_bdev::error_inject::ErrorDevice;
use pumice_blobfs::blobstore::{Blobstore, LoadOptions};
use pumice_blobfs::fs::{File, FileSystem, FsError, MountOptions, OpenOptions, Result};
use task::{Task, spawn, wait_for};

const MIB: u64 = 1 << 20;

/// Units of the ring of a journal of this many bytes. A carried sync of a short append takes two: its page, and the
/// bytes.
fn units(journal: u64) -> usize {
    usize::try_from((journal - 8192) / 4096).unwrap()
}

/// Appends and syncs in a thread of its own, until something fails or `most` are done. Each file gets its turn.
struct Syncs {
    done: Arc<AtomicUsize>,
    thread: Task<Result<()>>,
}

impl Syncs {
    fn begin(files: &[File], len: usize, most: usize) -> Syncs {
        let done = Arc::new(AtomicUsize::new(0));
        let (count, files) = (Arc::clone(&done), files.to_vec());
        let thread = spawn(move || {
            for f in files.iter().cycle().take(most) {
                f.append(&vec![9; len])?;
                f.sync()?;
                count.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
        Syncs { done, thread }
    }

    fn done(&self) -> usize {
        self.done.load(Ordering::SeqCst)
    }
}

/// A file system whose next checkpoint hangs at its first write, which is to one of these files.
fn hanging(journal: u64, files: usize) -> (Arc<ErrorDevice>, FileSystem, Vec<File>) {
    let (dev, fs) = with_journal(journal, &MountOptions::default());
    let files: Vec<File> = (0..files).map(|n| carried(&fs, &format!("/{n}"))).collect();
    for f in &files {
        f.allocate(0, MIB).unwrap();
    }
    for f in &files {
        dev.inject(hang(OpKind::Write, 1, first_cluster(&fs, f)));
    }
    (dev, fs, files)
}

/// A checkpoint begins at a quarter of the ring, in the background, and syncs are carried on while it runs.
#[test]
fn rule_23_carried_syncs_go_on_beside_a_checkpoint() {
    let (dev, fs, files) = hanging(MIB, 1);
    let quarter = units(MIB) / 4 / 2;
    let syncs = Syncs::begin(&files, 100, quarter);
    syncs.thread.join("a quarter of the ring").unwrap();
    arrived(&dev, "a checkpoint at a quarter of the ring");
    let before = fs.io_stats();
    let more = Syncs::begin(&files, 100, quarter / 2);
    more.thread.join("syncs beside the checkpoint").unwrap();
    let sent = fs.io_stats().since(&before);
    assert_eq!(sent.writes, quarter as u64 / 2, "{sent:?}");
    dev.resume();
    drop(files);
    fs.unmount().unwrap();
}

/// A store that is dropped waits for its checkpoint, and has the device until then: the checkpoint would write older pages over
/// those of the next store.
#[test]
fn rule_23_a_store_that_is_dropped_waits_for_its_checkpoint() {
    let device = DEVICES[0];
    let crash = device.with(device.store(), 7);
    let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash)));
    let load = || Blobstore::load(as_device(&dev), &LoadOptions::default());
    let store = load().unwrap();
    let sb = store.super_block();
    let pages = (sb.md_start.get().into(), sb.md_len.get().into());
    dev.inject(hang(OpKind::Write, 1, Some(pages)));
    make(&store);
    // Each takes two of thirty blocks, so a checkpoint begins with the last.
    for byte in 0..3 {
        set(&store, byte).unwrap();
    }
    arrived(&dev, "a checkpoint");
    let state = describe(&store);
    let dropped = spawn(move || drop(store));
    let waits = dropped.still_waits();
    let beside = load();
    dev.resume();
    dropped.join("the drop of the store");
    assert!(waits, "it did not wait for its checkpoint");
    let error = beside.unwrap_err().to_string();
    assert!(error.contains("in use"), "{error}");
    let store = load().unwrap();
    assert_eq!(describe(&store), state);
    store.unload().unwrap();
}

/// Another checkpoint begins when half of what may be owed is.
#[test]
fn rule_23_a_checkpoint_begins_at_two_mib_that_are_owed() {
    let (dev, fs, files) = hanging(32 * MIB, 4);
    // With the bytes that the files have been owed before, one more is behind two MiB.
    let syncs = Syncs::begin(&files, 32 << 10, 2 * 32 - 1);
    syncs.thread.join("two MiB").unwrap();
    assert_eq!(dev.injections().len(), 4, "it began too early");
    let one = Syncs::begin(&files, 32 << 10, 1);
    one.thread.join("one more").unwrap();
    wait_for("a checkpoint", || dev.injections().len() == 3);
    dev.clear();
    dev.resume();
    drop(files);
    fs.unmount().unwrap();
}

/// While a checkpoint hangs, carried syncs stop at half of the ring, and other changes go on in the other half.
#[test]
fn rule_23_carried_syncs_stop_at_half_of_the_ring() {
    let (dev, fs, files) = hanging(MIB, 1);
    let syncs = Syncs::begin(&files, 100, 1000);
    arrived(&dev, "a checkpoint");
    // Those before the files were there have taken a few units.
    let most = units(MIB) / 2 / 2 + 1;
    wait_for("half of the ring", || syncs.done() + 10 >= most);
    let other = {
        let fs = fs.clone();
        spawn(move || fs_changes(&fs, 20))
    };
    assert_eq!(other.join("changes beside the checkpoint"), 20);
    assert!(syncs.thread.still_waits());
    let stopped = syncs.done();
    assert!(
        stopped <= most,
        "{stopped} syncs, {most} fit half of the ring"
    );
    dev.resume();
    syncs.thread.join("the syncs").unwrap();
    drop(files);
    fs.unmount().unwrap();
}

/// Makes so many changes of one page, and returns their number.
fn fs_changes(fs: &FileSystem, count: usize) -> usize {
    for n in 0..count {
        fs.mkdir(&format!("/d{n}")).unwrap();
    }
    count
}

/// While a checkpoint hangs, carried syncs stop when 4 MiB are owed.
#[test]
fn rule_23_carried_syncs_stop_at_four_mib_that_are_owed() {
    let (dev, fs, files) = hanging(32 * MIB, 8);
    let owed = 8 * 50;
    let syncs = Syncs::begin(&files, 32 << 10, 8 * 20);
    // The last one begins with exactly 4 MiB or a little less.
    let most = ((4_usize << 20) - owed) / (32 << 10) + 1;
    wait_for("four MiB", || syncs.done() >= most);
    assert!(syncs.thread.still_waits());
    let stopped = syncs.done();
    let other = {
        let fs = fs.clone();
        spawn(move || fs_changes(&fs, 20))
    };
    assert_eq!(other.join("changes beside the checkpoint"), 20);
    dev.clear();
    dev.resume();
    syncs.thread.join("the syncs").unwrap();
    assert_eq!(stopped, most);
    drop(files);
    fs.unmount().unwrap();
}

/// A sync that has nothing to carry does not wait for a checkpoint, however full the ring is.
#[test]
fn rule_23_a_sync_of_an_unchanged_file_waits_for_no_checkpoint() {
    let (dev, fs, files) = hanging(MIB, 1);
    let unchanged = carried(&fs, "/unchanged");
    let syncs = Syncs::begin(&files, 100, 1000);
    arrived(&dev, "a checkpoint");
    wait_for("half of the ring", || syncs.done() > 50);
    assert!(syncs.thread.still_waits());
    let before = fs.io_stats();
    // The last handle stays, whose end would wait for the checkpoint.
    let other = unchanged.clone();
    let sync = spawn(move || other.sync());
    sync.join("a sync of an unchanged file").unwrap();
    let sent = fs.io_stats().since(&before);
    assert_eq!((sent.writes, sent.reads), (0, 0), "{sent:?}");
    dev.resume();
    syncs.thread.join("the syncs").unwrap();
    drop((files, unchanged));
    fs.unmount().unwrap();
}

/// An unmount with many files does not try for each of them what fails for good.
#[test]
fn rule_23_an_unmount_tries_a_checkpoint_that_fails_once() {
    let (dev, fs) = with_journal(128 << 10, &MountOptions::default());
    for n in 0..50 {
        let f = fs.open(&format!("/{n}"), OpenOptions::CREATE).unwrap();
        f.append(&[1; 10]).unwrap();
        f.sync().unwrap();
    }
    let fs = common::faults::again(&dev, fs);
    let files: Vec<File> = (0..50)
        .map(|n| fs.open(&format!("/{n}"), OpenOptions::READ).unwrap())
        .collect();
    dev.inject(fail(OpKind::Write, 1_000_000, metadata(&fs)));
    // Each takes two units, and the last is behind half of the ring.
    let changes = fs_changes(&fs, units(128 << 10) / 2 / 2 + 2) as u64;
    let before = fs.io_stats();
    fs.unmount().unwrap_err();
    let sent = fs.io_stats().since(&before);
    // Each page once with the others and three times by itself, again when no batch is on its way; one such checkpoint may run
    // in the background.
    assert!(
        sent.writes < 3 * 2 * 4 * changes,
        "{sent:?} for {changes} pages"
    );
    dev.clear();
    fs.unmount().unwrap();
    drop(files);
}

/// Blocks of files that cannot be written: what fails at once, and what goes on.
#[test]
fn rule_21_blocks_that_cannot_be_written_and_what_fails_for_them() {
    let (dev, fs) = with_journal(4 * MIB, &MountOptions::default());
    let [f, g, h] = ["/f", "/g", "/h"].map(|path| carried(&fs, path));
    let other = fs.open("/other", OpenOptions::CREATE).unwrap();
    other.append(&[1; 100]).unwrap();
    other.sync().unwrap();
    for file in [&f, &g, &h] {
        dev.inject(fail(OpKind::Write, 1_000_000, first_cluster(&fs, file)));
    }
    let told = |result: Result<()>, what: &str| {
        let error = result.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, FsError::Io { .. }), "{what}: {text}");
        assert!(
            text.contains("putting in place what the journal has"),
            "{what}: {text}"
        );
        assert!(!text.contains("writing at offset"), "{what}: {text}");
    };
    // These go on.
    f.append(&[3; 100]).unwrap();
    f.sync().unwrap();
    fs.mkdir("/d").unwrap();
    fs.rename("/d", "/e").unwrap();
    other.append(&vec![2; 80_000]).unwrap();
    other.sync().unwrap();
    other.write_at(0, &[3; 10]).unwrap();
    other.sync().unwrap();
    other.truncate(50).unwrap();
    fs.unlink("/other").unwrap();
    drop(other);
    // The close keeps what it cannot put in place.
    drop(g);
    assert_eq!(fs.open("/g", OpenOptions::READ).unwrap().len(), 150);
    // Nothing stays of what these are owed.
    h.truncate(10).unwrap();
    fs.unlink("/g").unwrap();
    // These do not, since the files are owed bytes.
    told(f.truncate(120), "a truncation");
    f.append(&vec![4; 80_000]).unwrap();
    told(f.sync(), "a sync of what is too long to be carried");
    f.write_at(0, &[5; 10]).unwrap();
    told(f.sync(), "a sync of an overwrite");
    assert_eq!(f.len(), 80_250);
    dev.clear();
    f.sync().unwrap();
    drop((f, h));
    let fs = again(&dev, fs);
    assert_eq!(content_of(&fs, "/h"), [1; 10]);
    assert!(fs.open("/g", OpenOptions::READ).is_err());
    fs.unmount().unwrap();
}
