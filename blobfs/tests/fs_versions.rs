//! One thread changes a file while others read it in every way, with caches of several sizes. No read that began after a change
//! had returned has older bytes, and none has bytes of another file. A failure prints its seed: `PUMICE_SEED=n` runs that one
//! alone, and `PUMICE_ROUNDS=n` runs more of them.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::memory;
use common::random::from_env;
use common::watchdog::watchdog;
use pumice_bdev::delay::{Delay, Latencies};
use pumice_blobfs::fs::{
    Access, File, FileSystem, FormatOptions, MountOptions, OpenOptions, ReadRequest,
};
use rand::prelude::*;
use rand::rngs::SmallRng;

/// Bytes with one version.
const UNIT: usize = 512;
/// Most units of the file: several regions of 1 MiB, and a part of one.
const UNITS: usize = 9000;
/// The version of other files.
const FOREIGN: u64 = u64::MAX;

/// The versions of each unit: of the last change that has returned, and of the last one that has begun.
struct Versions {
    done: Vec<AtomicU64>,
    begun: Vec<AtomicU64>,
    next: AtomicU64,
    ended: AtomicBool,
}

impl Versions {
    fn new() -> Versions {
        let zeroes = || (0..UNITS).map(|_| AtomicU64::new(0)).collect();
        Versions {
            done: zeroes(),
            begun: zeroes(),
            next: AtomicU64::new(1),
            ended: AtomicBool::new(false),
        }
    }

    /// Makes a change of these units.
    fn change(&self, units: std::ops::Range<usize>, make: impl FnOnce(u64)) {
        let version = self.next.fetch_add(1, Ordering::SeqCst);
        let set = |all: &[AtomicU64]| {
            for unit in &all[units.clone()] {
                unit.store(version, Ordering::SeqCst);
            }
        };
        set(&self.begun);
        make(version);
        set(&self.done);
    }
}

fn stamped(version: u64, units: usize) -> Vec<u8> {
    version.to_le_bytes().repeat(units * UNIT / 8)
}

fn change(file: &File, rng: &mut SmallRng, versions: &Versions) {
    let len = usize::try_from(file.len()).unwrap() / UNIT;
    let many = [8, 64, 3000][rng.random_range(0..3)];
    let n = rng.random_range(1..=many);
    match rng.random_range(0..10) {
        0..=3 if len > 0 => {
            let first = rng.random_range(0..len);
            let end = (first + n).min(UNITS);
            let write = |v| {
                let off = (first * UNIT) as u64;
                file.write_at(off, &stamped(v, end - first)).unwrap();
            };
            versions.change(first..end, write);
        }
        4 => {
            let cut = rng.random_range(len.saturating_sub(many)..=len);
            let cut_off = |_| file.truncate((cut * UNIT) as u64).unwrap();
            versions.change(cut..UNITS, cut_off);
        }
        5 => file.sync().unwrap(),
        _ => {
            let end = (len + n).min(UNITS);
            let append = |v| file.append(&stamped(v, end - len)).unwrap();
            versions.change(len..end, append);
        }
    }
}

/// Reads in one of the ways. Returns the number of bytes.
fn read(file: &File, rng: &mut SmallRng, off: u64, out: &mut [u8]) -> usize {
    match rng.random_range(0..8) {
        0 => {
            let half = out.len() / 2;
            let (first, second) = out.split_at_mut(half);
            let mut requests = [
                ReadRequest::new(off, first),
                ReadRequest::new(off + half as u64, second),
            ];
            file.read_many(&mut requests);
            let [first, second] = requests.map(|r| r.result.unwrap());
            if first < half { first } else { half + second }
        }
        1 => {
            let ahead = file.read_async(off, out.len()).unwrap();
            thread::yield_now();
            ahead.read_into(out).unwrap()
        }
        2 => match file.read_pinned(off, out.len()) {
            Some(pinned) => {
                out.copy_from_slice(&pinned);
                out.len()
            }
            None => 0,
        },
        3 => {
            file.prefetch(off, 1 << 20).unwrap();
            file.read_at(off, out).unwrap()
        }
        4 => {
            file.invalidate(off, 1 << 20);
            file.read_at(off, out).unwrap()
        }
        _ => file.read_at(off, out).unwrap(),
    }
}

fn reads(file: &File, rng: &mut SmallRng, versions: &Versions, seed: u64) {
    let mut out = vec![0; 3000 * UNIT];
    while !versions.ended.load(Ordering::SeqCst) {
        let first = rng.random_range(0..UNITS);
        let many = [2, 40, 3000][rng.random_range(0..3)];
        let n = rng.random_range(1..=many);
        let units = first..(first + n).min(UNITS);
        let before: Vec<u64> = versions.done[units.clone()]
            .iter()
            .map(|v| v.load(Ordering::SeqCst))
            .collect();
        let out = &mut out[..units.len() * UNIT];
        let got = read(file, rng, (first * UNIT) as u64, out);
        for (unit, (bytes, least)) in units.zip(out[..got].chunks_exact(UNIT).zip(before)) {
            let most = versions.begun[unit].load(Ordering::SeqCst);
            for at in [0, UNIT - 8] {
                let version = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
                assert!(
                    (least..=most).contains(&version),
                    "seed {seed}: unit {unit} has version {version}, and not {least} to {most}"
                );
            }
        }
    }
}

fn round(seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let base = memory(48 << 20, 4096);
    let mut format = FormatOptions::default();
    format.cluster_size = [4096, 64 << 10][rng.random_range(0..2)];
    FileSystem::format(Arc::clone(&base), &format).unwrap();
    let latencies = Latencies::default()
        .avg_read_us(50)
        .p99_read_us(2000)
        .avg_write_us(50)
        .p99_write_us(2000);
    let mut opts = MountOptions::default();
    opts.cache_bytes = [0, 256 << 10, 2 << 20, 64 << 20][rng.random_range(0..4)];
    opts.cache_most_bytes = None;
    let dev = Arc::new(Delay::new("slow", base, latencies));
    let fs = FileSystem::mount(dev, &opts).unwrap();
    let versions = Versions::new();
    let file = fs.open("/f", OpenOptions::CREATE).unwrap();
    thread::scope(|scope| {
        for n in 1..=3 {
            let (versions, file) = (&versions, fs.open("/f", OpenOptions::READ).unwrap());
            if n == 1 && seed.is_multiple_of(2) {
                file.set_direct(true);
            } else if n == 2 {
                file.advise(Access::Random);
            }
            let mut rng = SmallRng::seed_from_u64(seed * 31 + n);
            scope.spawn(move || reads(&file, &mut rng, versions, seed));
        }
        // It takes the clusters that the file gives up.
        scope.spawn(|| {
            while !versions.ended.load(Ordering::SeqCst) {
                let other = fs.open("/other", OpenOptions::CREATE).unwrap();
                other.append(&stamped(FOREIGN, 1000)).unwrap();
                other.sync().unwrap();
                drop(other);
                fs.unlink("/other").unwrap();
            }
        });
        let end = End(&versions);
        let mut file = file;
        for _ in 0..300 {
            change(&file, &mut rng, &versions);
            if rng.random_range(0..20) == 0 {
                file = fs.open("/f", OpenOptions::CREATE).unwrap();
            }
        }
        drop(end);
    });
    fs.unmount().unwrap();
}

/// Ends the readers when it is dropped, also by a panic.
struct End<'a>(&'a Versions);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::SeqCst);
    }
}

#[test]
fn no_read_has_bytes_from_before_a_change_that_had_returned() {
    let _limit = watchdog("reads beside changes", 300);
    let rounds = from_env("PUMICE_ROUNDS").unwrap_or(4);
    match from_env("PUMICE_SEED") {
        Some(seed) => round(seed),
        None => (0..rounds).for_each(round),
    }
}
