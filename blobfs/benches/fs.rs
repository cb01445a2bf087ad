//! Measures the file system's own cost: an append, a read from memory beside the kernel's, and a
//! read from the device beside the bare device.
//!
//! Run with `cargo bench -p pumice-blobfs --bench fs`. Images go to `$PUMICE_BENCH_DIR`, or to the
//! temporary directory.

use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf};
use pumice_blobfs::fs::{Access, File, FileSystem, FormatOptions, MountOptions, OpenOptions};

const MIB: u64 = 1 << 20;

fn mounted(dev: &Arc<dyn BlockDevice>, cache_bytes: u64) -> FileSystem {
    let mut format = FormatOptions::default();
    format.force = true;
    FileSystem::format(Arc::clone(dev), &format).unwrap();
    let mut opts = MountOptions::default();
    opts.cache_bytes = cache_bytes;
    FileSystem::mount(Arc::clone(dev), &opts).unwrap()
}

fn filled(fs: &FileSystem, path: &str, len: u64) -> File {
    let f = fs.open(path, OpenOptions::FRESH).unwrap();
    let chunk = vec![0x5a; 1 << 20];
    for _ in 0..len / MIB {
        f.append(&chunk).unwrap();
    }
    f.sync().unwrap();
    f.advise(Access::Random);
    f
}

/// Returns the processor time of this thread, if the kernel reports it: other load does not count.
fn cpu_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(Duration::from_nanos(text.split(' ').next()?.parse().ok()?))
}

/// Returns how long `f` takes: its processor time, or otherwise wall-clock time.
fn timed(f: impl FnOnce()) -> Duration {
    let (cpu, wall) = (cpu_time(), Instant::now());
    f();
    match (cpu, cpu_time()) {
        (Some(from), Some(to)) => to - from,
        _ => wall.elapsed(),
    }
}

/// Offsets that look random and are cheap to make.
struct Offsets(u64);

impl Offsets {
    fn next(&mut self, len: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % (len / 4096) * 4096
    }
}

fn append(c: &mut Criterion) {
    let dev = pumice_bdev::open("malloc://1G").unwrap();
    let fs = mounted(&dev, 64 * MIB);
    let mut group = c.benchmark_group("append");
    group.throughput(Throughput::Bytes(138));
    let record = [7u8; 138];
    // The whole cost: copies into full buffers, their writes (a memcpy on this device), clusters.
    group.bench_function("138 B, with write-behind", |b| {
        b.iter_custom(|n| {
            let mut spent = Duration::ZERO;
            let mut left = n;
            while left > 0 {
                let f = fs.open("/log", OpenOptions::FRESH).unwrap();
                f.allocate(0, 512 * MIB).unwrap();
                let now = left.min(512 * MIB / 138 - 1);
                spent += timed(|| {
                    for _ in 0..now {
                        f.append(black_box(&record)).unwrap();
                    }
                });
                left -= now;
            }
            spent
        });
    });
    // Only the copy: every run fits the buffer.
    group.bench_function("138 B, into the buffer", |b| {
        b.iter_custom(|n| {
            let mut spent = Duration::ZERO;
            let mut left = n;
            let f = fs.open("/log", OpenOptions::FRESH).unwrap();
            f.allocate(0, MIB).unwrap();
            while left > 0 {
                f.truncate(0).unwrap();
                f.allocate(0, MIB).unwrap();
                f.append(&[0; 70_000]).unwrap();
                f.append(&record).unwrap();
                let now = left.min(7000);
                // The run is too short for the kernel's measurement of processor time.
                let start = Instant::now();
                for _ in 0..now {
                    f.append(black_box(&record)).unwrap();
                }
                spent += start.elapsed();
                left -= now;
            }
            spent
        });
    });
    group.finish();
}

/// Returns the time of `n` operations shared by `threads` threads, summed over them. It stays the
/// same if an operation does not cost more with several threads.
fn on_threads(threads: u64, n: u64, op: impl Fn(&mut Offsets) + Sync) -> Duration {
    let share = n.div_ceil(threads);
    std::thread::scope(|s| {
        let work = |t| {
            let op = &op;
            s.spawn(move || {
                let mut offsets = Offsets(t);
                timed(|| (0..share).for_each(|_| op(&mut offsets)))
            })
        };
        let all: Vec<_> = (0..threads).map(work).collect();
        all.into_iter().map(|t| t.join().unwrap()).sum::<Duration>()
    })
}

fn cached(c: &mut Criterion) {
    let len = 64 * MIB;
    let dev = pumice_bdev::open("malloc://256M").unwrap();
    let fs = mounted(&dev, 128 * MIB);
    let whole = filled(&fs, "/written", len);
    let paged = filled(&fs, "/read", len);
    paged.invalidate(0, u64::MAX);
    let mut buf = vec![0; 8192];
    for at in (0..len).step_by(8192) {
        paged.read_at(at, &mut buf).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    std::fs::write(&path, vec![0x5a; usize::try_from(len).unwrap()]).unwrap();
    let kernel = std::fs::File::open(&path).unwrap();
    for threads in [1, 2] {
        let mut group = c.benchmark_group(format!("read 4 KiB in memory, {threads} threads"));
        group.throughput(Throughput::Bytes(4096));
        let read = |f: &File, o: &mut Offsets| {
            let mut buf = [0; 4096];
            let n = f.read_at(o.next(len - 4096) + 100, &mut buf).unwrap();
            black_box((n, &buf));
        };
        group.bench_function("just written", |b| {
            b.iter_custom(|n| on_threads(threads, n, |o| read(&whole, o)));
        });
        group.bench_function("read before", |b| {
            b.iter_custom(|n| on_threads(threads, n, |o| read(&paged, o)));
        });
        group.bench_function("just written, pinned", |b| {
            b.iter_custom(|n| {
                on_threads(threads, n, |o| {
                    black_box(whole.read_pinned(o.next(len - 4096), 4096).unwrap());
                })
            });
        });
        group.bench_function("kernel, pread", |b| {
            b.iter_custom(|n| {
                on_threads(threads, n, |o| {
                    let mut buf = [0; 4096];
                    let n = kernel.read_at(&mut buf, o.next(len - 4096) + 100).unwrap();
                    black_box((n, &buf));
                })
            });
        });
        group.finish();
    }
    let misses = fs.cache_stats().misses;
    assert!(misses < 10_000, "{misses} reads were not from memory");
}

fn cold(c: &mut Criterion) {
    let dir = std::env::var_os("PUMICE_BENCH_DIR").map_or_else(std::env::temp_dir, Into::into);
    let dir = tempfile::tempdir_in(dir).unwrap();
    let uri = format!(
        "file://{}?size=512M&create=1",
        dir.path().join("image").display()
    );
    let dev = pumice_bdev::open(&uri).unwrap();
    let fs = mounted(&dev, 8 * MIB);
    let len = 256 * MIB;
    let f = filled(&fs, "/f", len);
    f.set_direct(true);
    f.invalidate(0, u64::MAX);
    let mut group = c.benchmark_group("read 4 KiB from an image file");
    group.throughput(Throughput::Bytes(4096));
    group.bench_function("file system", |b| {
        let mut o = Offsets(1);
        let mut buf = [0; 4096];
        b.iter(|| f.read_at(o.next(len), &mut buf).unwrap());
    });
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let block = u64::from(dev.info().block_size);
    group.bench_function("bare device", |b| {
        let mut o = Offsets(1);
        b.iter(|| {
            let lba = (64 * MIB + o.next(len)) / block;
            black_box(
                ch.block_on(ch.read(lba, DmaBuf::new(4096).unwrap()))
                    .unwrap(),
            );
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .sample_size(20);
    targets = append, cached, cold
}
criterion_main!(benches);
