//! Many threads use one file system, and each checks what it must find.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::*;
use pumice_blobfs::fs::{FileSystem, FormatOptions, MountOptions, OpenOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Returns the byte at `off` of file number `n`.
fn byte(n: u64, off: u64) -> u8 {
    u8::try_from((off.wrapping_mul(31) ^ (off >> 9) ^ n.wrapping_mul(97)) & 0xff).unwrap()
}

fn bytes(n: u64, off: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| byte(n, off + i)).collect()
}

fn setup(cache: u64) -> (Arc<dyn pumice_bdev::BlockDevice>, FileSystem) {
    let dev = memory(192 << 20, 4096);
    let mut format = FormatOptions::default();
    format.cluster_size = 256 << 10;
    FileSystem::format(Arc::clone(&dev), &format).unwrap();
    let mut opts = MountOptions::default();
    opts.cache_bytes = cache;
    opts.write_behind_bytes = 2 << 20;
    opts.shared_channels = 2;
    let fs = FileSystem::mount(Arc::clone(&dev), &opts).unwrap();
    (dev, fs)
}

#[test]
fn readers_and_one_writer_of_a_file() {
    let (dev, fs) = setup(2 << 20);
    let f = fs.open("/f", OpenOptions::CREATE).unwrap();
    let stop = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    std::thread::scope(|s| {
        for t in 0..3u64 {
            let (f, stop, reads) = (f.clone(), &stop, &reads);
            s.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(t);
                while !stop.load(Ordering::Relaxed) {
                    let len = f.len();
                    let off = rng.random_range(0..=len);
                    let want = [100, 4096, 150_000][rng.random_range(0..3)];
                    let mut out = vec![0; want];
                    let n = match t {
                        0 => f
                            .read_async(off, want)
                            .unwrap()
                            .read_into(&mut out)
                            .unwrap(),
                        _ => f.read_at(off, &mut out).unwrap(),
                    };
                    assert!(
                        n as u64 >= (len - off).min(want as u64),
                        "bytes below the length are there"
                    );
                    assert!(out[..n] == bytes(7, off, n)[..], "read of {n} at {off}");
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let (f, stop) = (f.clone(), &stop);
        s.spawn(move || {
            let mut rng = SmallRng::seed_from_u64(99);
            let until = Instant::now() + Duration::from_millis(1200);
            while Instant::now() < until && f.len() < 60 << 20 {
                let n = [138, 138, 138, 4000, 200_000][rng.random_range(0..5)];
                f.append(&bytes(7, f.len(), n)).unwrap();
                if rng.random_range(0..50) == 0 {
                    f.sync().unwrap();
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
    assert!(reads.into_inner() > 100);
    let len = f.len();
    drop(f);
    fs.unmount().unwrap();
    drop(fs);
    let fs = FileSystem::mount(dev, &MountOptions::default()).unwrap();
    let f = fs.open("/f", OpenOptions::READ).unwrap();
    assert_eq!(f.len(), len);
    let mut out = vec![0; usize::try_from(len).unwrap()];
    f.read_at(0, &mut out).unwrap();
    assert!(out == bytes(7, 0, out.len()));
}

#[test]
fn files_come_and_go_in_all_threads() {
    let (_dev, fs) = setup(8 << 20);
    let empty = fs.statfs();
    fs.mkdir("/d").unwrap();
    std::thread::scope(|s| {
        for t in 0..4u64 {
            let fs = fs.clone();
            s.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(t);
                for i in 0..60u64 {
                    let n = t * 1000 + i;
                    let tmp = format!("/d/{t}.tmp");
                    let f = fs.open(&tmp, OpenOptions::FRESH).unwrap();
                    let len = rng.random_range(1..400_000);
                    f.append(&n.to_le_bytes()).unwrap();
                    f.append(&bytes(n, 8, len)).unwrap();
                    f.sync().unwrap();
                    // All threads replace the same few names.
                    let name = format!("/d/{}", rng.random_range(0..3));
                    fs.rename(&tmp, &name).unwrap();
                    if let Ok(g) = fs.open(&name, OpenOptions::READ) {
                        let mut out = vec![0; usize::try_from(g.len()).unwrap()];
                        assert_eq!(g.read_at(0, &mut out).unwrap(), out.len());
                        let m = u64::from_le_bytes(out[..8].try_into().unwrap());
                        assert!(
                            out[8..] == bytes(m, 8, out.len() - 8)[..],
                            "{name} is one whole file"
                        );
                    }
                    assert!(fs.exists("/d/0").unwrap() || i < 60);
                    if rng.random_range(0..8) == 0 {
                        let _ = fs.unlink(&name);
                    }
                }
            });
        }
    });
    for e in fs.list("/d").unwrap() {
        fs.unlink(&format!("/d/{}", e.name)).unwrap();
    }
    fs.rmdir("/d").unwrap();
    let statfs = fs.statfs();
    assert_eq!(
        (statfs.free, statfs.md_pages_used),
        (empty.free, empty.md_pages_used)
    );
}

/// Syncing all files meets files that are being deleted and whose blob is used for another file.
#[test]
fn all_files_are_synced_while_some_go() {
    let (dev, fs) = setup(8 << 20);
    let running = std::sync::atomic::AtomicUsize::new(3);
    std::thread::scope(|s| {
        for t in 0..3u64 {
            let (fs, running) = (fs.clone(), &running);
            s.spawn(move || {
                let kept = fs.open(&format!("/kept{t}"), OpenOptions::CREATE).unwrap();
                for i in 0..50u64 {
                    let path = format!("/passing{t}");
                    let f = fs.open(&path, OpenOptions::FRESH).unwrap();
                    f.append(&bytes(i, 0, 300_000)).unwrap();
                    drop(f);
                    kept.append(&bytes(t, kept.len(), 1000)).unwrap();
                    fs.unlink(&path).unwrap();
                }
                kept.sync().unwrap();
                running.fetch_sub(1, std::sync::atomic::Ordering::Release);
            });
        }
        while running.load(std::sync::atomic::Ordering::Acquire) > 0 {
            fs.sync().unwrap();
        }
    });
    // Only synced data counts: there is no unmount. The device has another store on it as long as
    // that is mounted.
    let block_size = dev.info().block_size;
    let dev = memory_with(&content(&dev), block_size);
    let fs = FileSystem::mount(dev, &MountOptions::default()).unwrap();
    assert_eq!(fs.problems(), [""; 0]);
    for t in 0..3u64 {
        let f = fs.open(&format!("/kept{t}"), OpenOptions::READ).unwrap();
        let mut out = vec![0; 50_000];
        assert_eq!((f.len(), f.read_at(0, &mut out).unwrap()), (50_000, 50_000));
        assert!(out == bytes(t, 0, out.len()));
    }
    assert_eq!(fs.list("/").unwrap().len(), 3);
}

#[test]
fn concurrent_syncs_of_many_files() {
    let (dev, fs) = setup(8 << 20);
    std::thread::scope(|s| {
        for t in 0..4u64 {
            let fs = fs.clone();
            s.spawn(move || {
                let f = fs.open(&format!("/log{t}"), OpenOptions::CREATE).unwrap();
                for _ in 0..200 {
                    f.append(&bytes(t, f.len(), 138)).unwrap();
                    f.sync().unwrap();
                }
            });
        }
    });
    // Only synced data counts: there is no unmount. The device has another store on it as long as
    // that is mounted.
    let block_size = dev.info().block_size;
    let dev = memory_with(&content(&dev), block_size);
    let fs = FileSystem::mount(dev, &MountOptions::default()).unwrap();
    for t in 0..4u64 {
        let f = fs.open(&format!("/log{t}"), OpenOptions::READ).unwrap();
        let mut out = vec![0; 200 * 138];
        assert_eq!(f.read_at(0, &mut out).unwrap(), out.len());
        assert!(out == bytes(t, 0, out.len()));
    }
}
