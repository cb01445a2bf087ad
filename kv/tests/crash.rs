//! Power cuts at every event of a small workload: whatever of the unflushed writes became durable,
//! the database opens and has the acknowledged keys.

mod common;

use std::sync::Arc;

use common::{key, value, watchdog};
use pumice::fs::Journal;
use pumice::rocksdb::{DBCompressionType, LogLevel, WriteOptions};
use pumice::{DbOptions, FormatOptions, MountOptions, mount_device};
use pumice_bdev::BlockDevice;
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, checked};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const LEN_BYTES: u64 = 48 << 20;
const PUTS: u64 = 60;

/// Marks of the workload other than acknowledged keys. This one: keys up to here are in a table.
const FLUSHED: u64 = 1 << 32;
/// The database was closed and the file system unmounted.
const CLOSED: u64 = 2 << 32;

fn options() -> DbOptions {
    DbOptions::new().configure(|options| {
        options.set_compression_type(DBCompressionType::None);
        options.set_write_buffer_size(64 << 10);
        options.set_manifest_preallocation_size(64 << 10);
        options.set_log_level(LogLevel::Fatal);
        options.set_keep_log_file_num(1);
    })
}

/// A device and the file system on it.
#[derive(Clone, Copy)]
struct Kind {
    block_size: u32,
    write_cache: bool,
    journal: Journal,
}

impl Kind {
    /// A device whose blocks are torn one from another, which only a journal makes good if a page of metadata has several.
    fn device(self, image: CrashImage, seed: u64) -> Arc<CrashDevice> {
        let device = CrashDevice::from_image(self.block_size, image, self.write_cache, seed);
        Arc::new(device)
    }

    fn mount_options(self) -> MountOptions {
        let mut format = FormatOptions::default();
        format.journal = self.journal;
        let options = MountOptions::new().format_empty(Some(format));
        options.cache_bytes(16 << 20)
    }
}

/// Makes puts with or without sync, and writes tables in between.
fn workload(kind: Kind, device: &Arc<CrashDevice>, synced: bool) {
    let dynamic: Arc<dyn BlockDevice> = Arc::clone(device) as Arc<dyn BlockDevice>;
    let fs = mount_device(&dynamic, &kind.mount_options()).unwrap();
    let db = options().open_in(&fs).unwrap();
    device.mark(0);
    let mut sync = WriteOptions::default();
    sync.set_sync(synced);
    for n in 1..=PUTS {
        db.put_opt(key(n), value(n), &sync).unwrap();
        device.mark(n);
        if n % 25 == 0 {
            db.flush().unwrap();
            device.mark(FLUSHED + n);
        }
    }
    db.close().unwrap();
    fs.unmount().unwrap();
    device.mark(CLOSED);
}

/// Opens the database after a cut and looks for keys 1 to `acknowledged`.
fn check(kind: Kind, image: &CrashImage, acknowledged: u64, what: &str) {
    let device: Arc<dyn BlockDevice> = kind.device(image.clone(), 7);
    let fs = mount_device(&device, &kind.mount_options())
        .unwrap_or_else(|e| panic!("{what}: mounting: {e}"));
    let db = options()
        .open_in(&fs)
        .unwrap_or_else(|e| panic!("{what}: opening: {e}"));
    for n in 1..=acknowledged {
        let got = db
            .get(key(n))
            .unwrap_or_else(|e| panic!("{what}: key {n}: {e}"));
        assert_eq!(
            got.as_deref(),
            Some(&value(n)[..]),
            "{what}: key {n} was acknowledged"
        );
    }
    drop(db);
    fs.unmount()
        .unwrap_or_else(|e| panic!("{what}: unmounting: {e}"));
    checked("rocksdb", image);
}

fn every_cut(kind: Kind, synced: bool) {
    let seed: u64 = std::env::var("PUMICE_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(20_261_123);
    println!("PUMICE_SEED={seed}");
    let device = kind.device(CrashImage::zeroed(LEN_BYTES), seed);
    workload(kind, &device, synced);
    let mut rng = StdRng::seed_from_u64(seed);
    let mut points = device.crash_points();
    let (mut cuts, mut mounted) = (0, false);
    while points.advance().is_some() {
        let mut acknowledged = None;
        for mark in points.marks() {
            mounted = true;
            let durable = match mark {
                CLOSED => Some(PUTS),
                FLUSHED.. => Some(mark - FLUSHED),
                put => synced.then_some(put),
            };
            acknowledged = acknowledged.max(durable);
        }
        // Before the database existed, formatting and creation may start again.
        if !mounted {
            continue;
        }
        let acknowledged = acknowledged.unwrap_or(0);
        let likely = [0.0, 0.5, 1.0][cuts % 3];
        let image = points.image(&mut |_piece| rng.random_bool(likely));
        let what = format!(
            "seed {seed}, cut after event {} of {}, pieces kept with {likely}",
            points.position(),
            points.len_events()
        );
        check(kind, &image, acknowledged, &what);
        cuts += 1;
    }
    assert!(cuts > 100, "only {cuts} cuts");
    println!("{cuts} cuts, write cache {}", kind.write_cache);
}

const TORN: Kind = Kind {
    block_size: 512,
    write_cache: true,
    journal: Journal::Auto,
};

/// Metadata is changed in place, and its pages are written whole.
const IN_PLACE: Kind = Kind {
    block_size: 4096,
    write_cache: true,
    journal: Journal::None,
};

#[test]
fn power_cut_with_a_volatile_write_cache() {
    let _limit = watchdog();
    every_cut(TORN, true);
}

#[test]
fn power_cut_without_a_write_cache() {
    let _limit = watchdog();
    let kind = Kind {
        write_cache: false,
        ..TORN
    };
    every_cut(kind, true);
}

/// Puts without sync survive as far as a flush made tables of them, and completely after a close.
#[test]
fn power_cut_after_flushes_and_after_the_close() {
    let _limit = watchdog();
    every_cut(TORN, false);
}

#[test]
fn power_cut_without_a_journal() {
    let _limit = watchdog();
    every_cut(IN_PLACE, true);
    let kind = Kind {
        write_cache: false,
        ..IN_PLACE
    };
    every_cut(kind, true);
}
