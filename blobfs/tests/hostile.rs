//! Runs the fuzz targets' bodies on seeded random input. Nothing may panic, and no I/O may go
//! outside of the device.

#[path = "common/hostile.rs"]
mod hostile;

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::content;
use common::journal::{DEVICES, RING, load as load_store, make, set};
use hostile::forge::{carry, erase, forge, page};
use pumice_bdev::BlockDevice;
use pumice_bdev_testkit::crashsim::CrashImage;
use pumice_blobfs::blobstore::{Blobstore, Error, LoadOptions};
use pumice_blobfs::fs::{FileSystem, FormatOptions, FsError, Journal, MountOptions, OpenOptions};
use rand::prelude::*;

/// Runs `target` on random bytes, at least `least` inputs, for at most about a second more.
fn run(target: fn(&[u8]), max_len: usize, least: u64) {
    let start = Instant::now();
    let mut seed = 0;
    while seed < least || (start.elapsed() < Duration::from_secs(1) && seed < 20 * least) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut data = vec![0; rng.random_range(0..=max_len)];
        rng.fill_bytes(&mut data);
        // Many bytes are zero, so that values are nearly right.
        let keep: f64 = rng.random();
        for byte in &mut data {
            if rng.random_bool(keep) {
                *byte = 0;
            }
        }
        println!("seed {seed}");
        target(&data);
        seed += 1;
    }
}

#[test]
fn super_blocks() {
    run(hostile::super_block, 100, 60);
}

#[test]
fn masks() {
    run(hostile::masks, 60, 60);
}

#[test]
fn raw_pages() {
    run(hostile::pages, 8192, 60);
}

#[test]
fn structured_pages() {
    run(hostile::structured, 400, 200);
}

#[test]
fn journals() {
    run(hostile::journal, 400, 150);
}

/// The length of a ring bounds the memory and the reads of a recovery, also when each record has one byte and its block
/// has to be read for it.
#[test]
fn a_journal_of_single_bytes_takes_no_more_memory_than_its_ring() {
    for (blocks, fits) in [(60, true), (650, false)] {
        let device = DEVICES[0];
        let dev = device.with(CrashImage::zeroed(32 << 20), 1);
        let mut format = FormatOptions::default();
        format.journal = Journal::Bytes(RING);
        FileSystem::format(Arc::new(dev.clone()), &format).unwrap();
        let fs = FileSystem::mount(Arc::new(dev.clone()), &MountOptions::default()).unwrap();
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        f.append(&vec![1; 8 << 20]).unwrap();
        f.sync().unwrap();
        let blob = f.blob_id().0;
        drop(f);
        fs.unmount().unwrap();
        drop(fs);
        let fs = FileSystem::mount(Arc::new(dev.clone()), &MountOptions::default()).unwrap();
        fs.mkdir("/begins").unwrap();
        let dev: Arc<dyn BlockDevice> = Arc::new(device.with(dev.image(), 1));
        std::mem::forget(fs);
        let byte = |n: u64| carry(blob, n * 4096 + 7, &[9]);
        forge(&dev, &(0..blocks).map(byte).collect::<Vec<_>>());
        let mut opts = MountOptions::default();
        let whole = FileSystem::mount(Arc::clone(&dev), &opts);
        if fits {
            let fs = whole.unwrap();
            let mut bytes = [0; 2];
            let f = fs.open("/f", OpenOptions::READ).unwrap();
            f.read_at(59 * 4096 + 6, &mut bytes).unwrap();
            assert_eq!(bytes, [1, 9]);
            continue;
        }
        let error = whole.unwrap_err();
        assert!(matches!(error, FsError::Store { .. }), "{error}");
        assert!(error.to_string().contains("blocks"), "{error}");
        opts.read_only = true;
        let fs = FileSystem::mount(dev, &opts).unwrap();
        assert!(fs.problems()[0].contains("blocks"), "{:?}", fs.problems());
        let reads = fs.io_stats().reads;
        assert!(reads < 100, "{reads} reads");
    }
}

/// A page behind the metadata region would go over a file.
#[test]
fn a_journal_with_a_page_that_the_store_does_not_have_writes_it_nowhere() {
    let device = DEVICES[0];
    for (index, is_erased) in [(160, false), (200, true), (u32::MAX, false)] {
        let dev = device.with(device.store(), 1);
        let store = load_store(&dev);
        make(&store);
        assert!(store.super_block().md_len.get() <= 160);
        set(&store, 1).unwrap();
        drop(store);
        let dev: Arc<dyn BlockDevice> = Arc::new(device.with(dev.image(), 1));
        let record = match is_erased {
            true => erase(index),
            false => page(index, &[0xa5; 4096]),
        };
        forge(&dev, &[record]);
        let before = content(&dev);
        let load = |opts: &LoadOptions| Blobstore::load(Arc::clone(&dev), opts);
        let error = load(&LoadOptions::default()).unwrap_err();
        assert!(matches!(error, Error::Journal { .. }), "{error}");
        assert!(content(&dev) == before, "page {index}");
        let store = load(&LoadOptions::default().accept_journal_damage(true)).unwrap();
        assert!(store.journal_damage().is_some());
        let data = store.super_block();
        let data = (data.md_start.get() + data.md_len.get()).next_multiple_of(2) as usize * 4096;
        drop(store);
        let cluster = u32::from_le_bytes(before[128..132].try_into().unwrap());
        let ring = cluster as usize * 8192;
        let after = content(&dev);
        let behind = ring + usize::try_from(RING).unwrap();
        assert!(after[data..ring] == before[data..ring], "page {index}");
        assert!(after[behind..] == before[behind..], "page {index}");
    }
}
