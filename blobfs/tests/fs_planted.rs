//! One test for each bug that was planted in the file system and that no test had noticed, and
//! tests for bugs of the same kinds. The device holds operations back, so the result does not
//! depend on chance.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::faults::*;
use common::memory;
use common::watchdog::watchdog;
use pumice_bdev::error_inject::{ErrorDevice, Failure};
use pumice_bdev::{BlockDevice, OpKind};
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions};
use pumice_blobfs::fs::{
    File, FileSystem, Journal, MountOptions, OpenOptions, ReadRequest, Result,
};

const MIB: usize = 1 << 20;

fn setup_on(base: Arc<dyn BlockDevice>) -> (Arc<ErrorDevice>, FileSystem) {
    setup_with(base, &format_1m(Journal::Auto), &MountOptions::default())
}

fn setup() -> (Arc<ErrorDevice>, FileSystem) {
    setup_on(memory(64 << 20, 4096))
}

/// Returns the content of a device after a power cut that takes everything that was not durable.
fn after_power_cut(dev: &CrashDevice) -> CrashImage {
    let mut points = dev.crash_points();
    while points.advance().is_some() {}
    points.image(&mut |_| false)
}

/// M18: a flush covers what had completed before it was sent, not what completes meanwhile.
/// Begins a sync of `f`, and waits until the device has its write of data, which hangs.
fn begin_sync(dev: &ErrorDevice, f: &File) -> thread::JoinHandle<Result<()>> {
    dev.inject(hang(OpKind::Write, 1, data_blocks(Journal::Auto)));
    let syncing = {
        let f = f.clone();
        thread::spawn(move || f.sync())
    };
    while !dev.injections().is_empty() {
        thread::yield_now();
    }
    syncing
}

#[test]
fn a_flush_does_not_cover_what_completes_while_it_is_under_way() {
    let _limit = watchdog("M18", 120);
    let (dev, fs) = setup_on(Arc::new(CrashDevice::new(4096, 16 << 10, true, 5)));
    let (a, b) = (
        fs.open("/a", OpenOptions::CREATE).unwrap(),
        fs.open("/b", OpenOptions::CREATE).unwrap(),
    );
    for f in [&a, &b] {
        f.allocate(0, 4 << 20).unwrap();
        f.append(&vec![1; MIB]).unwrap();
        f.sync().unwrap();
        f.append(&vec![2; MIB]).unwrap();
    }
    a.range_sync(0, 2 << 20).unwrap();
    dev.inject(hang(OpKind::Flush, 1, None));
    let syncing = {
        let a = a.clone();
        thread::spawn(move || a.sync())
    };
    while !dev.injections().is_empty() {
        thread::yield_now();
    }
    // The flush is in flight. Now the write of the other file completes.
    b.write_at(0, &[3; 4096]).unwrap();
    let before = fs.io_stats();
    dev.resume();
    syncing.join().unwrap().unwrap();
    b.sync().unwrap();
    let sent = fs.io_stats().since(&before);
    assert!(sent.flushes >= 1, "the second sync sent no flush: {sent:?}");
}

/// M20: bytes overwritten inside the file are durable after a sync.
#[test]
fn overwritten_bytes_are_durable_after_a_sync() {
    let _limit = watchdog("M20", 120);
    let dev = CrashDevice::new(4096, 16 << 10, true, 5);
    FileSystem::format(Arc::new(dev.clone()), &format_1m(Journal::Auto)).unwrap();
    let fs = FileSystem::mount(Arc::new(dev.clone()), &MountOptions::default()).unwrap();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&vec![1; 2 * MIB + 100]).unwrap();
    f.sync().unwrap();
    f.write_at(5000, &[2; 3000]).unwrap();
    f.sync().unwrap();
    f.write_at(MIB as u64 - 50, &[3; 100]).unwrap();
    f.sync().unwrap();
    let dev = Arc::new(CrashDevice::from_image(
        4096,
        after_power_cut(&dev),
        true,
        6,
    ));
    let fs = FileSystem::mount(dev, &MountOptions::default()).unwrap();
    let mut want = vec![1; 2 * MIB + 100];
    want[5000..8000].fill(2);
    want[MIB - 50..MIB + 50].fill(3);
    assert!(content_of(&fs, "/f") == want);
}

/// M23: a truncation of what was not synced makes nothing durable that was not written.
#[test]
fn a_truncation_makes_no_length_durable_that_was_not_synced() {
    let _limit = watchdog("M23", 120);
    let dev = CrashDevice::new(4096, 16 << 10, true, 5);
    FileSystem::format(Arc::new(dev.clone()), &format_1m(Journal::Auto)).unwrap();
    let fs = FileSystem::mount(Arc::new(dev.clone()), &MountOptions::default()).unwrap();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&[1; 5000]).unwrap();
    f.sync().unwrap();
    f.append(&vec![2; 3 * MIB]).unwrap();
    f.truncate(2 << 20).unwrap();
    let dev = Arc::new(CrashDevice::from_image(
        4096,
        after_power_cut(&dev),
        true,
        6,
    ));
    let fs = FileSystem::mount(dev, &MountOptions::default()).unwrap();
    assert_eq!(content_of(&fs, "/f"), [1; 5000]);
}

/// M32: a read-only mount of an image that a crash has left writes nothing.
#[test]
fn a_read_only_mount_of_a_crashed_image_writes_nothing() {
    let _limit = watchdog("M32", 120);
    let dev = CrashDevice::new(4096, 16 << 10, true, 5);
    FileSystem::format(Arc::new(dev.clone()), &format_1m(Journal::Auto)).unwrap();
    let fs = FileSystem::mount(Arc::new(dev.clone()), &MountOptions::default()).unwrap();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&[1; 5000]).unwrap();
    f.sync().unwrap();
    fs.unlink("/f").unwrap();
    drop(fs.open("/g", OpenOptions::CREATE).unwrap());
    let crashed = CrashDevice::from_image(4096, after_power_cut(&dev), true, 6);
    let mut opts = MountOptions::default();
    opts.read_only = true;
    let fs = FileSystem::mount(Arc::new(crashed.clone()), &opts).unwrap();
    assert!(fs.exists("/g").unwrap());
    fs.open("/h", OpenOptions::CREATE).unwrap_err();
    fs.sync().unwrap();
    fs.unmount().unwrap();
    drop(fs);
    assert_eq!(crashed.len_events(), 0);
}

/// M47: a reader does not get the bytes of a place that was cut off meanwhile, because the place
/// may belong to another file by then.
#[test]
fn a_reader_does_not_get_what_was_cut_off_meanwhile() {
    let _limit = watchdog("M47", 120);
    let (dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&vec![1; 3 * MIB]).unwrap();
    f.sync().unwrap();
    f.set_direct(true);
    f.invalidate(0, u64::MAX);
    dev.inject(hang(OpKind::Read, 1, data_blocks(Journal::Auto)));
    let reader = {
        let f = f.clone();
        thread::spawn(move || {
            let mut out = vec![0; MIB];
            let n = f.read_at(1 << 20, &mut out).unwrap();
            (n, out[..n].to_vec())
        })
    };
    while !dev.injections().is_empty() {
        thread::yield_now();
    }
    let cutter = {
        let f = f.clone();
        thread::spawn(move || f.truncate(1 << 20))
    };
    while f.len() != 1 << 20 {
        thread::yield_now();
    }
    thread::sleep(Duration::from_millis(20));
    assert!(
        !cutter.is_finished(),
        "clusters were given back with a read in flight on them"
    );
    dev.resume();
    cutter.join().unwrap().unwrap();
    let (n, bytes) = reader.join().unwrap();
    assert_eq!((n, bytes), (0, Vec::new()));
}

/// M49: after a truncation nothing of what was cut off is in memory.
#[test]
fn what_was_cut_off_is_zeroes_when_the_file_grows_again() {
    let _limit = watchdog("M49", 120);
    let (_dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    for cut in [0, 100, MIB, MIB + 5000] {
        f.append(&vec![1; 4 * MIB]).unwrap();
        f.sync().unwrap();
        f.truncate(cut as u64).unwrap();
        // What is left may be cached in regions of a MiB.
        let cached = fs.cache_stats().used_bytes;
        assert!(
            cached <= cut.next_multiple_of(MIB) as u64,
            "{cut}: {cached}"
        );
        let mut want = all(&f);
        assert_eq!(want.len(), cut);
        f.truncate((cut + 9 * MIB) as u64).unwrap();
        want.resize(cut + 9 * MIB, 0);
        assert!(all(&f) == want, "{cut}");
        f.truncate(0).unwrap();
    }
}

/// M50: dropping a file from the cache keeps what has not been written yet.
#[test]
fn invalidation_spares_what_is_on_its_way() {
    let _limit = watchdog("M50", 120);
    let (dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.allocate(0, 8 << 20).unwrap();
    dev.inject(hang(OpKind::Write, u64::MAX, data_blocks(Journal::Auto)));
    let bytes: Vec<u8> = (0u8..251).cycle().take(3 * MIB).collect();
    f.append(&bytes).unwrap();
    f.invalidate(0, u64::MAX);
    assert!(all(&f) == bytes);
    dev.clear();
    dev.resume();
    f.sync().unwrap();
    f.invalidate(0, u64::MAX);
    assert!(all(&f) == bytes);
}

/// M51: a page that was read before it is overwritten shows the new bytes.
#[test]
fn pages_in_memory_follow_what_is_written_over_them() {
    let _limit = watchdog("M51", 120);
    let (_dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&vec![1; 3 * MIB]).unwrap();
    f.sync().unwrap();
    f.invalidate(0, u64::MAX);
    let mut want = vec![1; 3 * MIB];
    for (n, off, len) in [
        (2, 5000, 10),
        (3, 4096, 4096),
        (4, 100_000, 200_000),
        (5, MIB - 3, 9),
    ] {
        // Some of its pages are in memory, some are not.
        f.read_at(off as u64, &mut [0; 10]).unwrap();
        f.write_at(off as u64, &vec![n; len]).unwrap();
        want[off..off + len].fill(n);
        let mut out = vec![0; len + 200];
        f.read_at(off as u64 - 100, &mut out).unwrap();
        assert!(out == want[off - 100..off + len + 100], "{n}");
    }
    f.sync().unwrap();
    assert!(all(&f) == want);
    f.invalidate(0, u64::MAX);
    assert!(all(&f) == want);
}

/// M53: of several reads that are done together, the one whose blocks cannot be read fails alone.
#[test]
fn of_several_reads_the_one_that_failed_says_so() {
    let _limit = watchdog("M53", 120);
    let (dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&vec![7; 3 * MIB]).unwrap();
    f.sync().unwrap();
    f.invalidate(0, u64::MAX);
    for bad in [0u64, 1] {
        f.set_direct(true);
        let Some(first) = find_block(&dev, &f, bad << 20) else {
            panic!("no block of the device holds the byte {bad} MiB");
        };
        dev.inject(fail(OpKind::Read, u64::MAX, Some((first, 1))));
        let (mut a, mut b) = ([0; 4096], [0; 4096]);
        let mut requests = [
            ReadRequest::new(0, &mut a),
            ReadRequest::new(1 << 20, &mut b),
        ];
        f.read_many(&mut requests);
        let results: Vec<bool> = requests.iter().map(|r| r.result.is_ok()).collect();
        assert_eq!(results, [bad != 0, bad != 1]);
        dev.clear();
        let good = if bad == 0 { b } else { a };
        assert_eq!(good, [7; 4096]);
    }
}

/// Returns the block of the device that a read of the file at `off` needs.
fn find_block(dev: &ErrorDevice, f: &pumice_blobfs::fs::File, off: u64) -> Option<u64> {
    let last = dev.info().num_blocks;
    let found = (144..last).step_by(256).find(|lba| {
        dev.inject(fail(OpKind::Read, 1, Some((*lba, 256))));
        let failed = f.read_at(off, &mut [0; 4096]).is_err();
        dev.clear();
        failed
    });
    found.and_then(|lba| {
        (lba..lba + 256).find(|lba| {
            dev.inject(fail(OpKind::Read, 1, Some((*lba, 1))));
            let failed = f.read_at(off, &mut [0; 4096]).is_err();
            dev.clear();
            failed
        })
    })
}

/// M69: an operation that failed with an error that passes is sent again, whoever sent it.
#[test]
fn a_passing_error_is_nobodys_error() {
    let _limit = watchdog("M69", 120);
    let (dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.allocate(0, 8 << 20).unwrap();
    // The bytes in their place, then in the journal.
    for n in 1..=2 {
        f.append(&[n; 5000]).unwrap();
        dev.inject(fault(OpKind::Write, Failure::NoMemory, 2, None));
        f.sync().unwrap();
        assert_eq!(dev.injections(), [], "nothing was injected");
    }
    f.append(&vec![3; 2 * MIB]).unwrap();
    f.sync().unwrap();
    dev.inject(fault(
        OpKind::Write,
        Failure::NoMemory,
        2,
        data_blocks(Journal::Auto),
    ));
    f.write_at(10, &[4; 10]).unwrap();
    dev.clear();
}

/// Like M18: the length that a sync makes durable is the one whose bytes it has written, not the
/// one that the file has by then.
#[test]
fn a_sync_covers_no_byte_that_was_appended_meanwhile() {
    let _limit = watchdog("a sync beside an append", 120);
    let base = CrashDevice::with_options(
        &CrashOptions::default()
            .block_size(4096)
            .write_cache(true)
            .tear_bytes(4096),
        CrashImage::zeroed(64 << 20),
    );
    let (dev, fs) = setup_on(Arc::new(base.clone()));
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.allocate(0, 4 << 20).unwrap();
    f.append(&[1; 5000]).unwrap();
    let syncing = begin_sync(&dev, &f);
    thread::sleep(Duration::from_millis(20));
    f.append(&[2; 5000]).unwrap();
    dev.resume();
    syncing.join().unwrap().unwrap();
    let image = after_power_cut(&base);
    let dev = Arc::new(CrashDevice::from_image(4096, image, true, 6));
    let fs = FileSystem::mount(dev, &MountOptions::default()).unwrap();
    assert_eq!(content_of(&fs, "/f"), [1; 5000]);
}

/// Like M18: the first sync of a file frees what was allocated ahead, but no cluster that the file
/// has grown into meanwhile.
#[test]
fn a_first_sync_frees_no_cluster_that_the_file_has_grown_into() {
    let _limit = watchdog("a first sync beside an append", 120);
    let (dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&[1; 8192]).unwrap();
    let syncing = begin_sync(&dev, &f);
    // It takes further clusters, and has no block in common with the write that the sync waits for.
    f.append(&vec![2; 2 * MIB]).unwrap();
    dev.resume();
    syncing.join().unwrap().unwrap();
    let (allocated, len) = (f.allocated(), f.len());
    assert!(
        allocated >= len,
        "{allocated} bytes have clusters, of {len}"
    );
    // Whatever is free belongs to another file now.
    let g = fs.open("/g", OpenOptions::CREATE).unwrap();
    while g.append(&vec![9; MIB]).is_ok() {}
    f.sync().unwrap();
    f.invalidate(0, u64::MAX);
    let want = [vec![1; 8192], vec![2; 2 * MIB]].concat();
    assert!(all(&f) == want);
    drop((f, g));
    let fs = again(&dev, fs);
    assert!(content_of(&fs, "/f") == want);
}

/// A truncation waits for a write that goes beyond the new end: if it came after a newer write of the
/// last block, it would put old bytes over new ones.
#[test]
fn a_truncation_waits_for_a_write_on_its_way_beyond_the_new_end() {
    let _limit = watchdog("a truncation beside a write", 120);
    let (dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&[1; 8192]).unwrap();
    dev.inject(hang(OpKind::Write, 1, data_blocks(Journal::Auto)));
    f.range_sync(0, 8192).unwrap();
    assert_eq!(dev.injections(), [], "the write has not begun");
    let writer = {
        let f = f.clone();
        thread::spawn(move || {
            // The cluster stays, so that nobody waits for the write in order to free it.
            f.truncate(5000)?;
            f.append(&[2; 3192])?;
            f.sync()
        })
    };
    thread::sleep(Duration::from_millis(100));
    let waits = !writer.is_finished();
    dev.resume();
    writer.join().unwrap().unwrap();
    let want = [vec![1; 5000], vec![2; 3192]].concat();
    assert!(all(&f) == want);
    drop(f);
    let fs = again(&dev, fs);
    assert!(content_of(&fs, "/f") == want);
    assert!(waits, "the file was cut with the write on its way");
}

/// A write that has failed is sent again before its bytes are written over, and has ended by then: of two writes of a block
/// that are on their way together, either may come last.
#[test]
fn an_overwrite_waits_for_a_failed_write_that_is_sent_again() {
    let _limit = watchdog("an overwrite behind a failed write", 120);
    let (dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.allocate(0, 4 << 20).unwrap();
    let first = fs.blobstore().extents(f.blob_id()).unwrap().lba(0).unwrap();
    dev.inject(fail(OpKind::Write, u64::MAX, Some((first, 256))));
    f.append(&vec![1; 2 * MIB]).unwrap();
    f.sync().unwrap_err();
    dev.clear();
    dev.inject(hang(OpKind::Write, 1, Some((first, 256))));
    let writer = {
        let f = f.clone();
        thread::spawn(move || f.write_at(100, &[2; 100]))
    };
    while !dev.injections().is_empty() {
        thread::yield_now();
    }
    thread::sleep(Duration::from_millis(100));
    let waits = !writer.is_finished();
    dev.resume();
    writer.join().unwrap().unwrap();
    let mut want = vec![1; 2 * MIB];
    want[100..200].fill(2);
    f.sync().unwrap();
    assert!(all(&f) == want);
    drop(f);
    let fs = again(&dev, fs);
    assert!(content_of(&fs, "/f") == want);
    assert!(
        waits,
        "a byte was written over with an older write of it on its way"
    );
}
