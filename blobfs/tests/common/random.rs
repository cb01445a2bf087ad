//! Random operations on a file system whose device fails, against a model in memory.
//!
//! Each thread has a directory of its own and knows what its files must contain. An operation that
//! fails has changed nothing, except for a write inside a file, which may have changed a part of
//! its range. What a sync reported as durable is there after the next mount. After a failed flush a
//! sync may report data loss; the file is then a beginning of what it was, and at least as long as
//! what was durable. What has been written inside it since the last sync may be missing.

mod model;
mod worker;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pumice_bdev::error_inject::ErrorDevice;
use pumice_bdev::{BlockDevice, DmaBuf, OpKind};
use pumice_blobfs::fs::{FileSystem, FormatOptions, Journal, MountOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use self::worker::Worker;
use super::faults::{Less, hang, mount_with};
use super::memory;

/// The faults of a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Whether writes of data, write-zeroes and reads of data fail. Some of the faults pass.
    pub io: bool,
    /// Whether writes of metadata fail.
    pub metadata: bool,
    /// Whether flushes fail.
    pub flushes: bool,
    /// Whether operations on data take time and complete in any order.
    pub slow: bool,
    /// Whether memory for buffers runs out. The caller causes that.
    pub memory: bool,
}

/// Performs one run: some rounds of operations by `threads` threads, with a remount and a full
/// comparison after each.
pub fn run(seed: u64, faults: Faults, threads: usize, steps: usize) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let block_size = [512, 4096][rng.random_range(0..2)];
    let len: u64 = [8, 24, 48][rng.random_range(0..3)] << 20;
    let mut base: Arc<dyn BlockDevice> = memory(len, block_size);
    let cached = faults.flushes || rng.random();
    let mut without = Vec::new();
    for kind in [OpKind::Fua, OpKind::WriteZeroes, OpKind::Unmap] {
        // A device whose flushes fail has FUA, since this test does not cover metadata that cannot
        // be written.
        if rng.random_range(0..3) == 0 && !(faults.flushes && kind == OpKind::Fua) {
            without.push(kind);
        }
    }
    base = Less::with_cache(base, &without, cached);
    let mut format = FormatOptions::default();
    format.cluster_size = [4096, 16 << 10, 64 << 10, 1 << 20][rng.random_range(0..4)];
    // A write of a journal that fails is one of metadata, and the journal's ring is among the data.
    format.journal = [Journal::Auto, Journal::None][rng.random_range(0..2)];
    if faults.io && !faults.metadata {
        format.journal = Journal::None;
    }
    // With few of them, the region moves, or there is no room for that and they run out.
    format.md_pages = Some([24, 100, 600][rng.random_range(0..3)]);
    FileSystem::format(Arc::clone(&base), &format).unwrap();
    let mut opts = MountOptions::default();
    opts.cache_bytes = [0, 64 << 10, 3 << 20, 64 << 20][rng.random_range(0..4)];
    opts.write_behind_bytes = [1, 2 << 20, 32 << 20][rng.random_range(0..3)];
    opts.shared_channels = rng.random_range(1..4);
    opts.read_ahead_bytes = [0, 1 << 20][rng.random_range(0..2)];
    opts.discard = rng.random_range(0..4) == 0 && !faults.flushes;
    let dev = Arc::new(ErrorDevice::new(None, base));
    let mut fs = mount_with(&dev, &opts);
    let cluster = u64::from(format.cluster_size);
    let mut workers: Vec<Worker> = (0..threads)
        .map(|n| Worker {
            fs: fs.clone(),
            dev: Arc::clone(&dev),
            faults,
            dir: format!("/t{n}"),
            names: [1, 2, 4][rng.random_range(0..3)],
            rng: SmallRng::seed_from_u64(seed * 31 + n as u64),
            files: BTreeMap::new(),
            log: vec![format!(
                "seed {seed}: {len} bytes, blocks of {block_size}, clusters of {cluster}, cache {cached}, without {without:?}, {opts:?}"
            )],
        })
        .collect();
    for w in &workers {
        w.fs.mkdir(&w.dir).unwrap();
    }
    for round in 0..3 {
        all_steps(&fs, &dev, &mut workers, faults, steps);
        for w in &mut workers {
            w.guarded(seed, Worker::settle);
        }
        if let Err(e) = fs.unmount() {
            assert!(
                faults.flushes && e.is_data_loss(),
                "seed {seed}, round {round}: unmount: {e}"
            );
            fs.unmount_anyway().unwrap();
        }
        drop(fs);
        fs = mount_with(&dev, &opts);
        assert_eq!(fs.problems(), [] as [String; 0], "seed {seed}");
        for w in &mut workers {
            w.fs = fs.clone();
            w.guarded(seed, Worker::compare);
        }
    }
    for w in &mut workers {
        w.guarded(seed, Worker::remove_all);
    }
    let statfs = fs.statfs();
    assert_eq!(
        (statfs.free, statfs.md_pages_used),
        // A journal has two pages.
        (statfs.total, if statfs.journal > 0 { 2 } else { 0 }),
        "seed {seed}: space leaked"
    );
}

/// Blocks as an injection takes them: the first, and their number.
type Blocks = (u64, u64);

/// Returns the blocks where the file system has data now, in one or two pieces, and those where it
/// has metadata. The metadata region moves when it grows.
fn places(fs: &FileSystem, dev: &ErrorDevice) -> (Vec<Blocks>, Blocks) {
    let per_page = 4096 / u64::from(dev.info().block_size);
    let (store, sb) = (fs.blobstore(), fs.blobstore().super_block());
    let cluster = store.cluster_size() / 4096;
    let masks = [
        sb.used_page_mask_start.get(),
        sb.used_cluster_mask_start.get(),
        sb.used_blobid_mask_start.get(),
    ];
    let start = masks.into_iter().min().map_or(0, u64::from);
    let md_end = u64::from(sb.md_start.get()) + u64::from(sb.md_len.get());
    let end = md_end.next_multiple_of(cluster);
    let mut data = vec![(end * per_page, u64::MAX / 2)];
    if start > cluster {
        data.push((cluster * per_page, (start - cluster) * per_page));
    }
    (data, (start * per_page, (md_end - start) * per_page))
}

fn all_steps(
    fs: &FileSystem,
    dev: &Arc<ErrorDevice>,
    workers: &mut [Worker],
    faults: Faults,
    steps: usize,
) {
    let over = AtomicBool::new(false);
    std::thread::scope(|s| {
        if faults.slow {
            s.spawn(|| {
                let mut n = 0u32;
                while !over.load(Ordering::Acquire) {
                    n = n.wrapping_add(1);
                    let kind = [OpKind::Write, OpKind::Read, OpKind::Write][n as usize % 3];
                    let (data, _) = places(fs, dev);
                    dev.inject(hang(kind, 1, Some(data[n as usize % data.len()])));
                    std::thread::sleep(Duration::from_micros(u64::from(n % 7) * 100));
                    dev.resume();
                }
            });
        }
        if faults.memory {
            s.spawn(|| {
                let mut held = Vec::new();
                let mut n = 0u64;
                while !over.load(Ordering::Acquire) {
                    n += 1;
                    let len = [1 << 20, 64 << 10, 4096][(n / 5 % 3) as usize];
                    held.extend(std::iter::from_fn(|| DmaBuf::new(len).ok()));
                    std::thread::sleep(Duration::from_micros(n % 13 * 50));
                    held.truncate(held.len() / 2);
                    if n.is_multiple_of(3) {
                        held.clear();
                        std::thread::sleep(Duration::from_micros(500));
                    }
                }
            });
        }
        let threads: Vec<_> = workers
            .iter_mut()
            .map(|w| s.spawn(move || w.guarded(0, |w| (0..steps).for_each(|_| w.step()))))
            .collect();
        let results: Vec<_> = threads
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .collect();
        over.store(true, Ordering::Release);
        for r in results {
            r.unwrap();
        }
    });
    dev.clear();
    dev.resume();
}

/// Returns the number in an environment variable.
pub fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs the seed in `PUMICE_SEED`, or `PUMICE_ROUNDS` seeds, or `rounds`. A run that hangs fails.
pub fn rounds(name: &str, rounds: u64, faults: Faults, threads: usize, steps: usize) {
    let seeds = match from_env("PUMICE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..from_env("PUMICE_ROUNDS").unwrap_or(rounds),
    };
    for seed in seeds {
        let _limit = super::watchdog::watchdog(&format!("{name}, seed {seed}"), 300);
        let result = std::panic::catch_unwind(|| run(seed, faults, threads, steps));
        if let Err(panic) = result {
            eprintln!("{name}: PUMICE_SEED={seed} runs this alone");
            std::panic::resume_unwind(panic);
        }
    }
}
