//! Small syncs whose bytes the journal carries. Each test names the rules of the protocol that it is
//! about.

#[path = "common/carry.rs"]
mod carry;
mod common;
#[path = "common/flaky.rs"]
mod flaky;
#[path = "common/task.rs"]
#[allow(dead_code, reason = "this binary needs a part of it")]
mod task;

use std::sync::Arc;

use carry::*;
use common::faults::{Less, all, content_of};
use common::journal::DEVICES;
use common::watchdog::watchdog;
use flaky::{Flaky, Plan};
use pumice_bdev::delay::{Delay, Latencies};
use pumice_bdev::{BlockDevice, IoErrorKind, OpKind};
use pumice_blobfs::fs::{
    File, FileSystem, FormatOptions, IoStats, Journal, MountOptions, OpenOptions,
};
use rand::prelude::*;
use task::wait_for;

/// A device in memory, whose writes take a while, with a file system and a journal of this many bytes.
fn in_memory(journal: u64, write_cache: bool, write_us: u64) -> FileSystem {
    let base = pumice_bdev::open("malloc://128M?block_size=4096").unwrap();
    let latencies = Latencies::default()
        .avg_write_us(write_us)
        .p99_write_us(write_us);
    let base: Arc<dyn BlockDevice> = Arc::new(Delay::new("slow", base, latencies));
    let without: &[OpKind] = if write_cache { &[OpKind::Fua] } else { &[] };
    let dev = Less::with_cache(base, without, write_cache);
    let mut format = options(journal);
    format.cluster_size = 1 << 20;
    FileSystem::format(Arc::clone(&dev), &format).unwrap();
    mount(dev)
}

/// Returns what `f` sends to the device.
fn sent(fs: &FileSystem, f: impl FnOnce()) -> IoStats {
    let before = fs.io_stats();
    f();
    fs.io_stats().since(&before)
}

#[test]
fn rule_20_a_small_sync_is_one_write() {
    for write_cache in [false, true] {
        let fs = in_memory(32 << 20, write_cache, 0);
        let f = create(&fs, "/log");
        f.append(&bytes(0, 138)).unwrap();
        f.sync().unwrap();
        let hundred = sent(&fs, || {
            for n in 0..100 {
                f.append(&bytes(n, 138)).unwrap();
                f.sync().unwrap();
            }
        });
        assert_eq!(hundred.writes, 100, "{hundred:?}");
        assert_eq!(hundred.flushes, if write_cache { 100 } else { 0 });
        // A quarter of the ring is in use on the way: the bytes, the page and a header are written in the background.
        let before = fs.io_stats();
        for n in 0..1000 {
            f.append(&bytes(n, 138)).unwrap();
            f.sync().unwrap();
        }
        let since = || fs.io_stats().since(&before);
        wait_for("the checkpoint", || since().writes >= 1003);
        let thousand = since();
        assert_eq!(thousand.writes, 1003, "{thousand:?}");
        println!("write cache: {write_cache}; 100 syncs: {hundred:?}; 1000 syncs: {thousand:?}");
        // A sync without anything new writes nothing.
        let none = sent(&fs, || f.sync().unwrap());
        assert_eq!((none.writes, none.flushes), (0, 0));
        drop(f);
        fs.unmount().unwrap();
    }
}

/// Without a journal nothing changes: data, then the length.
#[test]
fn a_store_without_a_journal_writes_data_first() {
    let base = pumice_bdev::open("malloc://64M?block_size=4096").unwrap();
    let mut format = FormatOptions::default();
    format.cluster_size = 1 << 20;
    format.journal = Journal::None;
    FileSystem::format(Arc::clone(&base), &format).unwrap();
    let fs = mount(base);
    let f = create(&fs, "/log");
    f.append(&bytes(0, 138)).unwrap();
    f.sync().unwrap();
    for syncs in [100, 1000] {
        let all = sent(&fs, || {
            for n in 0..syncs {
                f.append(&bytes(n, 138)).unwrap();
                f.sync().unwrap();
            }
        });
        assert_eq!(all.writes, 2 * syncs as u64);
    }
}

/// Threads that sync files of their own share batches.
#[test]
fn rules_2_and_20_syncs_of_threads_share_a_write() {
    let _limit = watchdog("shared batches", 300);
    for (threads, most) in [(1, 1.05), (8, 0.8)] {
        let fs = in_memory(32 << 20, false, 200);
        let files: Vec<File> = (0..threads)
            .map(|n| create(&fs, &format!("/log{n}")))
            .collect();
        for f in &files {
            f.append(b"first").unwrap();
            f.sync().unwrap();
        }
        let syncs = 300;
        let all = sent(&fs, || {
            std::thread::scope(|scope| {
                for f in &files {
                    scope.spawn(move || {
                        for n in 0..syncs {
                            f.append(&bytes(n, 138)).unwrap();
                            f.sync().unwrap();
                        }
                    });
                }
            });
        });
        #[expect(clippy::cast_precision_loss, reason = "for a person")]
        let each = all.writes as f64 / (threads * syncs) as f64;
        println!("{threads} threads: {each:.3} writes per sync, {all:?}");
        assert!(each < most, "{threads} threads: {each} writes per sync");
    }
}

#[test]
fn rules_9_and_20_to_22_a_power_cut_anywhere_leaves_what_was_synced() {
    for (device, seed) in DEVICES.into_iter().zip(1..) {
        let _limit = watchdog(&format!("{device:?}"), 900);
        let mut work = Work::new(device, seed);
        for _ in 0..90 {
            work.step();
        }
        let mut points = work.dev.crash_points();
        let mut states = 0;
        while points.advance().is_some() {
            let at = points.position();
            let done = work
                .history
                .iter()
                .rposition(|(event, _, _)| *event <= at)
                .unwrap();
            let before = &work.history[done].2;
            let (_, op, after) = &work.history[(done + 1).min(work.history.len() - 1)];
            let open = points.unsettled().len();
            for round in 0..if open == 0 { 1 } else { 3 } {
                let image = points.image(&mut |_| match round {
                    0 => false,
                    1 => true,
                    _ => work.rng.random_bool(0.5),
                });
                let what = format!("{device:?}, seed {seed}, event {at}, in {op:?}, {round}");
                check_state(
                    device,
                    &image,
                    [before, after],
                    &what,
                    at.is_multiple_of(16),
                );
                states += 1;
            }
        }
        println!("{device:?}: {states} states");
        assert!(states > 100);
    }
}

#[test]
fn rule_12_a_cut_anywhere_in_the_recovery_changes_nothing() {
    for device in DEVICES {
        let dev = device.with(formatted(device), 3);
        let fs = mount(Arc::new(dev.clone()));
        let mut state = State::new();
        for path in ["/a", "/b"] {
            let f = create(&fs, path);
            let promise = state.entry(path.to_owned()).or_default();
            for n in 0..3 {
                let more = bytes(n, 3000 + n);
                f.append(&more).unwrap();
                f.sync().unwrap();
                promise.data.extend(&more);
                promise.synced = promise.data.len();
            }
            // It is closed only after the power cut.
            std::mem::forget(f);
        }
        for keep in [false, true] {
            let image = dev.image_after(dev.len_events(), &mut |_| keep);
            let what = format!("{device:?}, {keep}");
            check_state(device, &image, [&state, &state], &what, true);
        }
        std::mem::forget(fs);
    }
}

/// Owed bytes are read from memory, and from the device after the last handle is gone.
#[test]
fn rule_20_readers_see_what_is_owed() {
    let base = pumice_bdev::open("malloc://64M?block_size=512").unwrap();
    FileSystem::format(Arc::clone(&base), &options(1 << 20)).unwrap();
    let mut opts = MountOptions::default();
    opts.cache_bytes = 0;
    let fs = FileSystem::mount(base, &opts).unwrap();
    let mut expected = Vec::new();
    for round in 0..40 {
        let f = create(&fs, "/log");
        for n in 0..round % 4 + 1 {
            let more = bytes(round + n, 1 + round * 97 % 5000);
            f.append(&more).unwrap();
            f.sync().unwrap();
            expected.extend(more);
            f.invalidate(0, u64::MAX);
            assert!(all(&f) == expected, "round {round}");
        }
        drop(f);
        let f = fs.open("/log", OpenOptions::READ).unwrap();
        f.invalidate(0, u64::MAX);
        assert!(all(&f) == expected, "round {round}, opened again");
    }
    fs.unmount().unwrap();
}

/// Bytes that were written to the file before, and wait for a flush, are durable too when a sync returns.
#[test]
fn rule_2_a_sync_is_not_carried_over_bytes_that_are_not_durable() {
    for device in DEVICES {
        let dev = device.with(formatted(device), 3);
        let fs = mount(Arc::new(dev.clone()));
        let f = create(&fs, "/a");
        let mut expected = Vec::new();
        for round in 0..6 {
            for (n, len) in [(0, 300), (1, 9000), (2, 100)] {
                let more = bytes(round + n, len);
                f.append(&more).unwrap();
                expected.extend(more);
                match n {
                    1 => f.range_sync(0, u64::MAX).unwrap(),
                    _ => f.sync().unwrap(),
                }
            }
            let what = format!("{device:?}, round {round}");
            assert_survives(device, &dev, "/a", &expected, &what);
        }
        drop(f);
        fs.unmount().unwrap();
    }
}

/// Bytes go in place over those that were carried: an overwrite of the buffer, one behind it, and an
/// append after a truncation. A power cut leaves the newer ones.
#[test]
fn rule_21_older_bytes_never_go_over_newer_ones() {
    for device in DEVICES {
        let dev = device.with(formatted(device), 3);
        let fs = mount(Arc::new(dev.clone()));
        let f = create(&fs, "/a");
        let mut expected = bytes(1, 700);
        f.append(&expected).unwrap();
        f.sync().unwrap();
        for round in 0..12 {
            let what = format!("{device:?}, round {round}");
            // Carried.
            let more = bytes(round + 50, 900);
            f.append(&more).unwrap();
            f.sync().unwrap();
            expected.extend(&more);
            let newer = bytes(round + 200, 300);
            match round % 3 {
                0 => {
                    let at = expected.len() - 600;
                    f.write_at(at as u64, &newer).unwrap();
                    expected[at..at + 300].copy_from_slice(&newer);
                }
                1 => {
                    let to = expected.len() - 500;
                    f.truncate(to as u64).unwrap();
                    expected.truncate(to);
                    f.append(&newer).unwrap();
                    expected.extend(&newer);
                }
                _ => {
                    // Longer than what is carried.
                    let long = bytes(round + 300, 50_000);
                    let at = expected.len() - 100;
                    f.write_at(at as u64, &long).unwrap();
                    expected.truncate(at);
                    expected.extend(&long);
                }
            }
            f.sync().unwrap();
            assert!(all(&f) == expected, "{what}");
            assert_survives(device, &dev, "/a", &expected, &what);
        }
        drop(f);
        fs.unmount().unwrap();
    }
}

/// The clusters of a file whose bytes were carried go to another file.
#[test]
fn rule_22_a_file_gets_no_bytes_of_one_that_had_its_clusters() {
    for device in DEVICES {
        for deleted in [false, true] {
            let what = format!("{device:?}, {deleted}");
            // A ring that needs no checkpoint for want of room.
            let dev = device.with(formatted_with(device, 1 << 20), 3);
            let fs = mount(Arc::new(dev.clone()));
            let other = create(&fs, "/other");
            let f = create(&fs, "/a");
            // The last cluster has carried bytes only.
            f.append(&bytes(1, CLUSTER as usize)).unwrap();
            f.sync().unwrap();
            f.append(&bytes(2, 900)).unwrap();
            f.sync().unwrap();
            if deleted {
                fs.unlink("/a").unwrap();
            } else {
                f.truncate(0).unwrap();
            }
            drop(f);
            // No batch has bytes for what is gone.
            for keep in [false, true] {
                drop(mount(Arc::new(cut(device, &dev, keep))));
            }
            // They take what is free from the beginning, its metadata page too.
            let full = bytes(3, 2 * CLUSTER as usize);
            other.append(&full).unwrap();
            other.sync().unwrap();
            drop(other);
            let mut written = Vec::new();
            for n in 0..6 {
                let path = format!("/b{n}");
                let f = create(&fs, &path);
                f.append(&full).unwrap();
                f.sync().unwrap();
                written.push(path);
            }
            written.push("/other".to_owned());
            for path in &written {
                assert_survives(device, &dev, path, &full, &what);
            }
            fs.unmount().unwrap();
            drop(fs);
            let fs = mount(Arc::new(dev.clone()));
            for path in &written {
                assert!(content_of(&fs, path) == full, "{what}, {path}");
            }
            fs.unmount().unwrap();
        }
    }
}

/// Each write and flush of a carried sync fails, and is carried out or not. The sync fails or
/// succeeds, what was synced before is there, and a later sync writes everything.
#[test]
fn rules_4_and_5_a_batch_that_fails_acknowledges_nothing() {
    let mut failures = 0;
    for device in DEVICES {
        for (done, count) in [(false, 1), (true, 1), (false, 3), (true, 3), (false, 20)] {
            for from in 0..6 {
                let what = format!("{device:?}, from {from}, {count}, done {done}");
                let dev = device.with(formatted(device), 3);
                let flaky = Flaky::new(Arc::new(dev.clone()));
                let fs = mount(flaky.clone());
                let f = create(&fs, "/a");
                let mut expected = Vec::new();
                for n in 0..3 {
                    expected.extend(bytes(n, 200));
                    f.append(&bytes(n, 200)).unwrap();
                    f.sync().unwrap();
                }
                flaky.arm(Some(Plan {
                    from,
                    count,
                    kind: IoErrorKind::Media,
                    done,
                }));
                let before = expected.clone();
                expected.extend(bytes(7, 333));
                f.append(&bytes(7, 333)).unwrap();
                let synced = f.sync();
                flaky.arm(None);
                assert!(all(&f) == expected, "{what}");
                if synced.is_ok() {
                    assert_survives(device, &dev, "/a", &expected, &what);
                } else {
                    failures += 1;
                    for keep in [false, true] {
                        let fs = mount(Arc::new(cut(device, &dev, keep)));
                        let found = content_of(&fs, "/a");
                        assert!(
                            found == before || found == expected,
                            "{what}, {keep}: {} bytes",
                            found.len()
                        );
                    }
                }
                expected.extend(bytes(8, 100));
                f.append(&bytes(8, 100)).unwrap();
                // One sync may find the failure of an earlier flush.
                if let Err(error) = f.sync() {
                    println!("{what}: {error}");
                    f.sync().unwrap_or_else(|error| panic!("{what}: {error}"));
                }
                assert!(all(&f) == expected, "{what}");
                assert_survives(device, &dev, "/a", &expected, &what);
            }
        }
    }
    println!("{failures} syncs have failed");
    assert!(failures > 0);
}

/// A checkpoint fails at each of its writes. Nothing that was synced is lost, and the file can be
/// used when the device works again.
#[test]
fn rules_7_and_20_a_checkpoint_that_fails_loses_nothing() {
    let mut failures = 0;
    for device in DEVICES {
        for done in [false, true] {
            for from in 0..6 {
                let what = format!("{device:?}, from {from}, done {done}");
                let dev = device.with(formatted(device), 3);
                let flaky = Flaky::new(Arc::new(dev.clone()));
                let fs = mount(flaky.clone());
                let f = create(&fs, "/a");
                let mut expected = Vec::new();
                for more in [bytes(1, 2000), bytes(2, 3000)] {
                    f.append(&more).unwrap();
                    f.sync().unwrap();
                    expected.extend(more);
                }
                flaky.arm(Some(Plan {
                    from,
                    count: 20,
                    kind: IoErrorKind::Media,
                    done,
                }));
                // It has the bytes put in place.
                let truncated = f.truncate(4000);
                flaky.arm(None);
                match &truncated {
                    Ok(()) => expected.truncate(4000),
                    Err(_) => failures += 1,
                }
                assert!(all(&f) == expected, "{what}");
                if truncated.is_ok() {
                    assert_survives(device, &dev, "/a", &expected, &what);
                }
                f.append(&bytes(8, 100)).unwrap();
                expected.extend(bytes(8, 100));
                if let Err(error) = f.sync() {
                    println!("{what}: {error}");
                    f.sync().unwrap_or_else(|error| panic!("{what}: {error}"));
                }
                assert_survives(device, &dev, "/a", &expected, &what);
                drop(f);
                assert!(content_of(&fs, "/a") == expected, "{what}");
            }
        }
    }
    println!("{failures} truncations have failed");
    assert!(failures > 0);
}

/// Many threads sync, truncate, overwrite and close files on the smallest ring. Every wait ends, and
/// what each has synced last is there after a power cut.
#[test]
fn rules_20_to_22_threads_beside_one_another_on_the_smallest_ring() {
    let _limit = watchdog("threads", 300);
    for device in DEVICES {
        let dev = device.with(formatted(device), 3);
        let fs = mount(Arc::new(dev.clone()));
        let shared = create(&fs, "/shared");
        let ends: Vec<(String, Vec<u8>)> = std::thread::scope(|scope| {
            let (fs, shared) = (&fs, &shared);
            let threads: Vec<_> = (0..6)
                .map(|number| {
                    scope.spawn(move || {
                        let mut rng = SmallRng::seed_from_u64(number);
                        let path = format!("/own{number}");
                        let mut f = create(fs, &path);
                        let mut data: Vec<u8> = Vec::new();
                        for n in 0..60 {
                            let more = bytes(n, rng.random_range(1..1500));
                            f.append(&more).unwrap();
                            data.extend(&more);
                            match n % 20 {
                                7 => {
                                    let to = data.len() / 2;
                                    f.truncate(to as u64).unwrap();
                                    data.truncate(to);
                                }
                                11 => {
                                    drop(f);
                                    f = create(fs, &path);
                                }
                                13 => {
                                    let at = data.len() / 3;
                                    f.write_at(at as u64, b"over").unwrap();
                                    let end = data.len().max(at + 4);
                                    data.resize(end, 0);
                                    data[at..at + 4].copy_from_slice(b"over");
                                }
                                17 => {
                                    let other = format!("/other{number}");
                                    create(fs, &other).append(&more).unwrap();
                                    fs.unlink(&other).unwrap();
                                }
                                _ => {}
                            }
                            f.sync().unwrap();
                            assert!(all(&f) == data, "{path}, {n}");
                            shared.append(&[u8::try_from(number).unwrap(); 9]).unwrap();
                            shared.sync().unwrap();
                        }
                        (path, data)
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let what = format!("{device:?}");
        for (path, data) in &ends {
            assert_survives(device, &dev, path, data, &what);
        }
        let appended = all(&shared);
        assert_eq!(appended.len(), 6 * 60 * 9);
        assert_survives(device, &dev, "/shared", &appended, &what);
        drop(shared);
        fs.unmount().unwrap();
        drop(fs);
        let fs = mount(Arc::new(dev));
        for (path, data) in &ends {
            assert!(content_of(&fs, path) == *data, "{what}: {path}");
        }
    }
}
