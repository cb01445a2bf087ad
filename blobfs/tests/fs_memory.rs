//! Tests of running out of memory for buffers, where "try again" changes nothing. This is a binary
//! of its own, since the arena's limit applies to the process.

mod common;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::faults::*;
use common::memory;
use common::random::{Faults, from_env, rounds};
use common::watchdog::watchdog;
use pumice_bdev::{DmaBuf, OpKind};
use pumice_blobfs::fs::{FormatOptions, FsError, Journal, MountOptions, OpenOptions, ReadRequest};
use pumice_nvme::dma;

const MIB: usize = 1 << 20;

/// Lets one test run at a time, since they share the arena.
static ONE: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

fn limited() -> parking_lot::MutexGuard<'static, ()> {
    let one = ONE.lock();
    let mut options = dma::ArenaOptions::default();
    options.max_bytes = 64 << 20;
    // An earlier test may have taken buffers already: then the limit is set.
    let _ = dma::configure(options);
    one
}

/// Takes all memory for buffers but `spare` buffers of 1 MiB.
fn take_all_but(spare: usize) -> Vec<DmaBuf> {
    let mut taken = Vec::new();
    // The thread of the test before this one gives buffers back when it ends, and that may be now.
    let mut looks = 0;
    while looks < 10 {
        let before = taken.len();
        taken.extend(std::iter::from_fn(|| DmaBuf::new(MIB).ok()));
        looks = if taken.len() == before { looks + 1 } else { 0 };
        thread::sleep(Duration::from_millis(5));
    }
    assert!(
        taken.len() > spare && taken.len() <= 64,
        "{} MiB",
        taken.len()
    );
    taken.truncate(taken.len() - spare);
    taken
}

fn setup() -> (
    Arc<pumice_bdev::error_inject::ErrorDevice>,
    pumice_blobfs::fs::FileSystem,
) {
    let mut format = FormatOptions::default();
    format.cluster_size = 64 << 10;
    let mut opts = MountOptions::default();
    opts.cache_bytes = 1 << 20;
    setup_with(memory(16 << 20, 4096), &format, &opts)
}

#[test]
fn an_append_that_finds_no_memory_changes_nothing() {
    let _one = limited();
    let _limit = watchdog("an append without memory", 120);
    let (dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.allocate(0, 4 << 20).unwrap();
    f.append(&[1; 40_000]).unwrap();
    let mut spare = 1;
    let (taken, error) = loop {
        let taken = take_all_but(spare);
        match f.append(&vec![2; 1_500_000]) {
            Err(error) => break (taken, error),
            // The device was so fast that the memory of the first MiB was free again.
            Ok(()) => drop(taken),
        }
        spare = 0;
        f.truncate(40_000).unwrap();
    };
    assert!(matches!(error, FsError::NoMemory(_)), "{error}");
    assert!(error.is_retryable());
    assert_eq!(f.len(), 40_000);
    drop(taken);
    f.append(&vec![3; 200_000]).unwrap();
    f.sync().unwrap();
    drop(f);
    let fs = again(&dev, fs);
    let want = [vec![1; 40_000], vec![3; 200_000]].concat();
    assert!(content_of(&fs, "/f") == want);
}

#[test]
fn a_write_beyond_the_length_never_reaches_another_file() {
    let _one = limited();
    let _limit = watchdog("a late write", 120);
    let (dev, fs) = setup();
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&[1; 40_000]).unwrap();
    f.sync().unwrap();
    let taken = take_all_but(1);
    // The first MiB of the append is delayed, and not the batch with its clusters.
    let extents = fs.blobstore().extents(f.blob_id()).unwrap();
    let blocks = fs.blobstore().cluster_size() / 4096;
    let data = Some((extents.lba(0).unwrap(), blocks));
    dev.inject(hang(OpKind::Write, 1, data));
    thread::scope(|s| {
        let writer = s.spawn(|| {
            let error = f.append(&vec![2; 1_500_000]).unwrap_err();
            assert!(matches!(error, FsError::NoMemory(_)), "{error}");
            drop(f);
            drop(taken);
            let g = fs.open("/g", OpenOptions::CREATE).unwrap();
            g.append(&vec![5; 900_000]).unwrap();
            g.sync().unwrap();
        });
        // Either the append waits for its write, or nothing does: then all of this comes first.
        let begun = Instant::now();
        while !writer.is_finished() && begun.elapsed() < Duration::from_millis(500) {
            thread::sleep(Duration::from_millis(5));
        }
        while !writer.is_finished() {
            dev.resume();
            thread::yield_now();
        }
        dev.resume();
    });
    let fs = again(&dev, fs);
    assert!(content_of(&fs, "/g") == vec![5; 900_000]);
    assert!(content_of(&fs, "/f") == vec![1; 40_000]);
}

/// The changes of a batch of the journal share its error, and each can be tried again.
#[test]
fn a_batch_that_finds_no_memory_can_be_tried_again() {
    let _one = limited();
    let _limit = watchdog("a batch without memory", 120);
    let mut format = FormatOptions::default();
    format.journal = Journal::Bytes(1 << 20);
    let (dev, fs) = setup_with(memory(16 << 20, 4096), &format, &MountOptions::default());
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    f.append(&[1; 40]).unwrap();
    f.sync().unwrap();
    f.append(&[2; 40]).unwrap();
    let mut taken = take_all_but(0);
    for shift in (9..20).rev() {
        taken.extend(std::iter::from_fn(|| DmaBuf::new(1 << shift).ok()));
    }
    let errors = [f.sync().unwrap_err(), fs.mkdir("/d").unwrap_err()];
    drop(taken);
    for error in errors {
        assert!(matches!(error, FsError::NoMemory(_)), "{error}");
        assert!(error.is_retryable(), "{error}");
        assert_eq!(error.errno(), libc::ENOMEM, "{error}");
    }
    f.sync().unwrap();
    fs.mkdir("/d").unwrap();
    drop(f);
    let fs = again(&dev, fs);
    assert!(content_of(&fs, "/f") == [[1; 40], [2; 40]].concat());
}

#[test]
fn random_operations_without_memory() {
    let _one = limited();
    let faults = Faults {
        memory: true,
        ..Faults::default()
    };
    rounds("without memory", 4, faults, 1, 120);
    if from_env("PUMICE_ROUNDS").is_some() {
        let faults = Faults {
            io: true,
            slow: true,
            ..faults
        };
        rounds("without memory, failing and slow", 4, faults, 3, 100);
    }
}

/// A read needs memory beside the caller's, of which a long one takes no more than a part of its length.
#[test]
fn a_long_read_does_with_less_memory_than_it_reads() {
    let _one = limited();
    let _limit = watchdog("a long read", 120);
    let mut opts = MountOptions::default();
    opts.cache_bytes = 1 << 20;
    opts.write_behind_bytes = 4 << 20;
    let (_dev, fs) = setup_with(memory(96 << 20, 4096), &FormatOptions::default(), &opts);
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    let bytes: Vec<u8> = (0..=250).cycle().take(40 * MIB + 77).collect();
    for piece in bytes.chunks(MIB) {
        f.append(piece).unwrap();
    }
    f.sync().unwrap();
    drop(f);
    let f = fs.open("/f", OpenOptions::READ).unwrap();
    f.invalidate(0, u64::MAX);
    let taken = take_all_but(24);
    let mut out = vec![0; bytes.len()];
    assert_eq!(f.read_at(3, &mut out).unwrap(), bytes.len() - 3);
    assert!(out[..bytes.len() - 3] == bytes[3..]);
    out.fill(0);
    let mut requests = [ReadRequest::new(3, &mut out)];
    f.read_many(&mut requests);
    assert_eq!(requests[0].result.as_ref().unwrap(), &(bytes.len() - 3));
    assert!(out[..bytes.len() - 3] == bytes[3..]);
    drop(taken);
}
