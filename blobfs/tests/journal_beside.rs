//! What happens beside a sync that the journal carries. Each test names the rules of the protocol that it is about.

#[path = "common/carry.rs"]
#[allow(dead_code, reason = "this binary needs a part of it")]
mod carry;
mod common;
#[path = "common/flaky.rs"]
mod flaky;
#[path = "common/held.rs"]
mod held;
#[path = "common/task.rs"]
mod task;

use std::sync::Arc;

use carry::*;
use common::faults::{again, all, content_of, fail, hang};
use common::journal::DEVICES;
use common::memory;
use flaky::{Flaky, Plan};
use held::*;
use pumice_bdev::error_inject::ErrorDevice;
use pumice_bdev::{BlockDevice, IoErrorKind, OpKind};
use pumice_blobfs::fs::{File, FileSystem, FormatOptions, MountOptions, OpenOptions};
use task::spawn;

/// A failed append may have damaged the block of the file's end, also after a carried sync has begun.
#[test]
fn rule_20_a_block_that_a_failed_append_may_have_damaged_is_written_again() {
    let mut opts = MountOptions::default();
    opts.write_behind_bytes = 1 << 20;
    let (dev, fs) = with_journal(4 << 20, &opts);
    let f = carried(&fs, "/log");
    f.allocate(0, 4 << 20).unwrap();
    f.append(&[3; 60]).unwrap();
    let behind = block_of(&fs, &f, 1);
    let sync = begin_sync(&dev, &f);
    let g = f.clone();
    // It waits for the sync with its first full buffer.
    let append = spawn(move || g.append(&vec![4; 3_500_000]));
    let waits = append.still_waits();
    dev.inject(fail(OpKind::Write, 1000, Some((behind, 1000))));
    dev.resume();
    sync.join("the sync").unwrap();
    append.join("the append").unwrap_err();
    assert!(waits);
    dev.clear();
    assert_eq!(f.len(), 210);
    let before = fs.io_stats();
    f.sync().unwrap();
    let sent = fs.io_stats().since(&before);
    assert_eq!(sent.writes, 1, "{sent:?}");
    assert!(all(&f) == [vec![1; 100], vec![2; 50], vec![3; 60]].concat());
    drop(f);
    fs.unmount().unwrap();
}

/// The bytes that a sync carries are replaced while it is on its way. The next sync writes the newer ones.
#[test]
fn rule_21_bytes_replaced_during_a_carried_sync_are_written() {
    for device in DEVICES {
        let what = format!("{device:?}");
        let crash = device.with(formatted_with(device, 1 << 20), 3);
        let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash.clone())));
        let fs = mount(as_device(&dev));
        let f = carried(&fs, "/a");
        f.append(&[3; 60]).unwrap();
        let sync = begin_sync(&dev, &f);
        f.write_at(160, &[4; 20]).unwrap();
        dev.resume();
        sync.join("the sync").unwrap();
        f.sync().unwrap();
        let expected = [
            vec![1; 100],
            vec![2; 50],
            vec![3; 10],
            vec![4; 20],
            vec![3; 30],
        ]
        .concat();
        assert!(all(&f) == expected, "{what}");
        assert_survives(device, &crash, "/a", &expected, &what);
        drop(f);
        fs.unmount().unwrap();
    }
}

/// Makes a file that is owed nothing, whose next sync is carried.
fn synced(fs: &FileSystem, path: &str) -> File {
    let f = create(fs, path);
    f.append(&[1; 100]).unwrap();
    f.sync().unwrap();
    f
}

/// The thread that has the append lock may wait for a carried sync, which takes that lock at its end.
#[test]
fn rule_21_writeback_waits_for_a_carried_sync_without_a_deadlock() {
    type Write = fn(&File);
    let writes: [(&str, Write); 3] = [
        ("write-behind", |f| {
            f.append(&vec![4; 300 << 10]).unwrap();
            f.flush().unwrap();
        }),
        ("a full buffer", |f| f.append(&vec![4; 1 << 20]).unwrap()),
        ("an overwrite", |f| {
            f.write_at(0, &[4; 10]).unwrap();
            f.range_sync(0, u64::MAX).unwrap();
        }),
    ];
    // The ring owes bytes already, or nothing yet.
    for (owed, (what, write)) in [true, false]
        .into_iter()
        .flat_map(|owed| writes.map(|write| (owed, write)))
    {
        let what = &format!("{what}, owed before: {owed}");
        let (dev, fs) = with_journal(4 << 20, &MountOptions::default());
        let f = match owed {
            true => carried(&fs, "/a"),
            false => synced(&fs, "/a"),
        };
        f.append(&vec![3; 4096]).unwrap();
        let sync = begin_sync(&dev, &f);
        let g = f.clone();
        let writer = spawn(move || write(&g));
        let waits = writer.still_waits();
        dev.resume();
        sync.join(what).unwrap();
        writer.join(what);
        assert!(waits, "{what}: it wrote over bytes that were being carried");
        let expected = all(&f);
        drop(f);
        let fs = again(&dev, fs);
        assert!(content_of(&fs, "/a") == expected, "{what}");
        fs.unmount().unwrap();
    }
}

/// A checkpoint for another file does not wait for the batch on its way, and keeps the ring's part that this is in.
#[test]
fn rules_2_and_7_a_checkpoint_does_not_wait_for_the_batch_on_its_way() {
    for device in DEVICES {
        let what = format!("{device:?}");
        let crash = device.with(formatted_with(device, 1 << 20), 3);
        let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash.clone())));
        let fs = mount(as_device(&dev));
        let (f, other) = (carried(&fs, "/a"), carried(&fs, "/b"));
        f.append(&[3; 60]).unwrap();
        let sync = begin_sync(&dev, &f);
        let closed = spawn(move || drop(other));
        closed.join("a close of the other file");
        dev.resume();
        sync.join("the sync").unwrap();
        let expected = [vec![1; 100], vec![2; 50], vec![3; 60]].concat();
        assert_survives(device, &crash, "/a", &expected, &what);
        assert_survives(device, &crash, "/b", &expected[..150], &what);
        drop(f);
        let f = fs.open("/a", OpenOptions::READ).unwrap();
        f.invalidate(0, u64::MAX);
        assert!(all(&f) == expected, "{what}");
        drop(f);
        fs.unmount().unwrap();
    }
}

/// A batch that becomes durable during a checkpoint is not forgotten with those that it puts in place.
#[test]
fn rules_7_and_20_a_checkpoint_keeps_what_came_after_it_had_begun() {
    for device in DEVICES {
        let what = format!("{device:?}");
        let crash = device.with(formatted_with(device, 1 << 20), 3);
        let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash.clone())));
        let fs = mount(as_device(&dev));
        let (f, other) = (carried(&fs, "/a"), carried(&fs, "/b"));
        let blocks = block_of(&fs, &other, 0);
        dev.inject(hang(OpKind::Write, 1, Some((blocks, 1))));
        let closed = spawn(move || drop(other));
        arrived(&dev, "the checkpoint");
        f.append(&[3; 60]).unwrap();
        let synced = {
            let f = f.clone();
            spawn(move || f.sync())
        };
        synced.join("a sync beside the checkpoint").unwrap();
        fs.mkdir("/d").unwrap();
        dev.resume();
        closed.join("the checkpoint");
        let expected = [vec![1; 100], vec![2; 50], vec![3; 60]].concat();
        assert_survives(device, &crash, "/a", &expected, &what);
        drop(f);
        let f = fs.open("/a", OpenOptions::READ).unwrap();
        f.invalidate(0, u64::MAX);
        assert!(all(&f) == expected, "{what}");
        drop(f);
        fs.unmount().unwrap();
        drop(fs);
        let fs = mount(as_device(&dev));
        assert!(content_of(&fs, "/a") == expected, "{what}");
        assert!(fs.stat("/d").unwrap().is_dir, "{what}");
    }
}

/// A flush of somebody else that fails while a checkpoint writes may have lost what that has written. So the checkpoint fails
/// too, although its own flush succeeds, and the ring keeps the bytes.
#[test]
fn rules_4_and_7_a_checkpoint_fails_if_any_flush_fails_meanwhile() {
    for device in DEVICES.into_iter().filter(|device| device.write_cache) {
        let what = format!("{device:?}");
        let crash = device.with(formatted_with(device, 1 << 20), 3);
        let dev = Arc::new(ErrorDevice::new(None, Arc::new(crash.clone())));
        let fs = mount(as_device(&dev));
        let (f, other) = (carried(&fs, "/a"), create(&fs, "/b"));
        // Its sync needs a flush, also where the device has FUA.
        other.append(&[4; 8192]).unwrap();
        other.range_sync(0, u64::MAX).unwrap();
        dev.inject(hang(OpKind::Write, 1, Some((block_of(&fs, &f, 0), 1))));
        let g = f.clone();
        // It keeps a part of what is owed to the file, so that this has to be in its place.
        let truncation = spawn(move || g.truncate(120));
        arrived(&dev, "the checkpoint");
        dev.inject(fail(OpKind::Flush, 1, None));
        let lost = other.sync().unwrap_err();
        assert!(lost.is_data_loss(), "{what}: {lost}");
        dev.resume();
        let error = truncation.join("the truncation").unwrap_err().to_string();
        assert!(error.contains("what the journal has"), "{what}: {error}");
        let expected = [vec![1; 100], vec![2; 50]].concat();
        assert!(all(&f) == expected, "{what}");
        assert_survives(device, &crash, "/a", &expected, &what);
        // The next one is complete.
        f.truncate(120).unwrap();
        assert_survives(device, &crash, "/a", &expected[..120], &what);
        other.sync().unwrap();
        drop((f, other));
        fs.unmount().unwrap();
    }
}

/// The batch of a carried sync times out, and has reached the device or not: it may still land. Nothing is
/// acknowledged or written any longer, and the next mount has the old or the new bytes.
#[test]
fn rules_5_and_20_a_carried_batch_that_times_out_stops_the_store() {
    for device in DEVICES {
        for done in [false, true] {
            let what = format!("{device:?}, done {done}");
            let crash = device.with(formatted_with(device, 1 << 20), 3);
            let dev = Flaky::new(Arc::new(crash.clone()));
            let fs = mount(dev.clone());
            let f = carried(&fs, "/a");
            f.append(&[3; 60]).unwrap();
            dev.arm(Some(Plan {
                from: 0,
                count: 1,
                kind: IoErrorKind::TimedOut,
                done,
            }));
            let error = f.sync().unwrap_err();
            assert!(!error.is_retryable(), "{what}: {error}");
            dev.arm(None);
            let writes = fs.io_stats().writes;
            for result in [f.sync(), fs.mkdir("/d"), f.truncate(10), f.sync()] {
                assert!(result.is_err(), "{what}");
            }
            assert_eq!(fs.io_stats().writes, writes, "{what}: it has written");
            let expected = [vec![1; 100], vec![2; 50], vec![3; 60]].concat();
            assert!(all(&f) == expected, "{what}");
            for keep in [false, true] {
                let fs = mount(Arc::new(cut(device, &crash, keep)));
                let found = content_of(&fs, "/a");
                let ends = [150, 210];
                assert!(
                    ends.contains(&found.len()) && found == expected[..found.len()],
                    "{what}, {keep}: {} bytes",
                    found.len()
                );
            }
            std::mem::forget((f, fs));
        }
    }
}

/// The number of writes that a sync of `f` sends.
fn writes_of_sync(fs: &FileSystem, f: &File) -> u64 {
    let before = fs.io_stats();
    f.sync().unwrap();
    fs.io_stats().since(&before).writes
}

/// The conditions of a carried sync, one by one. Another sync writes the data, then the length.
#[test]
fn rule_20_what_a_sync_has_to_fulfil_to_be_carried() {
    let (dev, fs) = with_journal(8 << 20, &MountOptions::default());
    let f = fs.open("/a", OpenOptions::CREATE).unwrap();
    f.allocate(0, 1 << 20).unwrap();
    f.append(&[1; 100]).unwrap();
    assert_eq!(writes_of_sync(&fs, &f), 2, "the first sync since the mount");
    for len in [0, 1, 100, 64 << 10] {
        f.append(&vec![2; len]).unwrap();
        assert_eq!(writes_of_sync(&fs, &f), u64::from(len > 0), "{len} bytes");
    }
    // The owed bytes, the page, and a header go in place before the data.
    f.append(&vec![2; (64 << 10) + 1]).unwrap();
    assert_eq!(writes_of_sync(&fs, &f), 5, "too long");
    f.append(&[3; 100]).unwrap();
    assert_eq!(writes_of_sync(&fs, &f), 1, "nothing is in the way");
    // A write of the file has failed: it is sent again, then the data and the length.
    drop(carried(&fs, "/b"));
    let b = fs.open("/b", OpenOptions::CREATE).unwrap();
    b.append(&[4; 8192]).unwrap();
    dev.inject(fail(OpKind::Write, 1, first_cluster(&fs, &b)));
    b.range_sync(0, u64::MAX).unwrap();
    arrived(&dev, "a write that fails");
    b.append(&[5; 100]).unwrap();
    assert_eq!(writes_of_sync(&fs, &b), 3, "a write has failed");
    // A file without a name has no length to write.
    let g = fs.open("/gone", OpenOptions::CREATE).unwrap();
    g.append(&[6; 100]).unwrap();
    g.sync().unwrap();
    fs.unlink("/gone").unwrap();
    g.append(&[6; 100]).unwrap();
    let before = fs.io_stats();
    g.sync().unwrap();
    let sent = fs.io_stats().since(&before);
    // A batch would be two blocks.
    assert_eq!((sent.writes, sent.written_bytes), (1, 4096), "no name");
    drop((f, b, g));
    fs.unmount().unwrap();
}

/// A sync is not carried beside a write of the file that is in flight: it waits for that.
#[test]
fn rule_2_a_sync_waits_for_a_write_in_flight() {
    let (dev, fs) = with_journal(8 << 20, &MountOptions::default());
    let f = carried(&fs, "/a");
    f.range_sync(0, u64::MAX).unwrap();
    f.append(&[3; 8192]).unwrap();
    // The checkpoint writes there first.
    dev.inject(hang(OpKind::Write, 1, first_cluster(&fs, &f)));
    let g = f.clone();
    let started = spawn(move || g.range_sync(0, u64::MAX));
    arrived(&dev, "the checkpoint");
    dev.resume();
    started.join("the write-behind").unwrap();
    f.append(&[4; 8192]).unwrap();
    dev.inject(hang(OpKind::Write, 1, first_cluster(&fs, &f)));
    f.range_sync(0, u64::MAX).unwrap();
    arrived(&dev, "the write");
    f.append(&[5; 100]).unwrap();
    let g = f.clone();
    let sync = spawn(move || g.sync());
    let waits = sync.still_waits();
    dev.resume();
    sync.join("the sync").unwrap();
    assert!(waits, "it returned before the earlier bytes were there");
    drop(f);
    fs.unmount().unwrap();
}

/// A write of a checkpoint times out while a batch is on its way that then fails otherwise: nothing is written before the
/// next load, since that write may still land.
#[test]
fn rule_17_a_batch_that_fails_does_not_hide_a_write_that_may_land() {
    // Its ring is so large that it is not emptied in the background.
    let base = memory(64 << 20, 4096);
    FileSystem::format(Arc::clone(&base), &FormatOptions::default()).unwrap();
    let flaky = Flaky::new(base);
    let below: Arc<dyn BlockDevice> = flaky.clone();
    let dev = Arc::new(ErrorDevice::new(None, below));
    let device: Arc<dyn BlockDevice> = dev.clone();
    let fs = FileSystem::mount(device, &MountOptions::default()).unwrap();
    let (a, b) = (carried(&fs, "/a"), carried(&fs, "/b"));
    a.append(&[3; 60]).unwrap();
    let sync = begin_sync(&dev, &a);
    let plan = |count, kind| Plan {
        from: 0,
        count,
        kind,
        done: false,
    };
    flaky.arm(Some(plan(1, IoErrorKind::TimedOut)));
    // It has its bytes put in place first.
    b.truncate(120).unwrap_err();
    flaky.arm(Some(plan(3, IoErrorKind::Media)));
    dev.resume();
    sync.join("the sync").unwrap_err();
    flaky.arm(None);
    let error = fs.mkdir("/d").unwrap_err().to_string();
    assert!(error.contains("takes no changes"), "{error}");
}

/// A write of a checkpoint times out, and may still land. No close, deletion or unmount has the ring put in place, or frees
/// a part of it.
#[test]
fn rule_17_behind_a_checkpoint_that_may_land_nothing_is_written() {
    let base = memory(64 << 20, 4096);
    FileSystem::format(Arc::clone(&base), &FormatOptions::default()).unwrap();
    let flaky = Flaky::new(Arc::clone(&base));
    let fs = FileSystem::mount(flaky.clone(), &MountOptions::default()).unwrap();
    let files = ["/a", "/b"].map(|path| carried(&fs, path));
    let plan = |count| Plan {
        from: 0,
        count,
        kind: IoErrorKind::TimedOut,
        done: false,
    };
    flaky.arm(Some(plan(1)));
    files[0].truncate(120).unwrap_err();
    flaky.arm(Some(plan(0)));
    let [a, b] = files;
    drop(a);
    fs.unlink("/a").unwrap_err();
    fs.mkdir("/d").unwrap_err();
    b.truncate(120).unwrap_err();
    drop(b);
    fs.unmount_anyway().unwrap_err();
    assert_eq!(flaky.seen(), 0, "writes and flushes behind the time-out");
    drop(fs);
    let fs = FileSystem::mount(base, &MountOptions::default()).unwrap();
    let expected = [vec![1; 100], vec![2; 50]].concat();
    for path in ["/a", "/b"] {
        assert!(content_of(&fs, path) == expected, "{path}");
    }
    fs.unmount().unwrap();
}

/// A batch takes a quarter of the ring, and half of it is for pages.
#[test]
fn rule_6_a_sync_of_more_than_half_a_batch_is_not_carried() {
    const LONG: u64 = 2 * RING;
    let most = (LONG - 8192) / 4096 / 4 * 4096 / 2;
    for (more, carried) in [(0, true), (1, false)] {
        let (dev, fs) = with_journal(LONG, &MountOptions::default());
        let f = fs.open("/a", OpenOptions::CREATE).unwrap();
        f.append(&[3; 50_000]).unwrap();
        f.sync().unwrap();
        f.append(&vec![4; usize::try_from(most + more).unwrap()])
            .unwrap();
        // A carried sync does not write there. A checkpoint in the background may, and fails.
        dev.inject(fail(OpKind::Write, u64::MAX, first_cluster(&fs, &f)));
        assert_eq!(f.sync().is_ok(), carried, "{more} bytes too long");
        dev.clear();
        drop(f);
        fs.unmount().unwrap();
    }
}
