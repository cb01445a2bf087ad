//! File systems with a journal whose files are appended to and synced, and what a power cut must leave
//! of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use pumice_bdev::BlockDevice;
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage};
use pumice_blobfs::blobstore::check::{Severity, check};
use pumice_blobfs::fs::{File, FileSystem, FormatOptions, Journal, MountOptions, OpenOptions};
use rand::prelude::*;

use crate::common::faults::content_of;
use crate::common::journal::Device;

/// The smallest ring: a few syncs fill half of it.
pub const RING: u64 = 128 << 10;
pub const SIZE: u64 = 8 << 20;
pub const CLUSTER: u32 = 16 << 10;

pub fn options(journal: u64) -> FormatOptions {
    let mut format = FormatOptions::default();
    format.cluster_size = CLUSTER;
    format.md_pages = Some(100);
    format.journal = Journal::Bytes(journal);
    format
}

/// An empty file system with a journal of this many bytes.
pub fn formatted_with(device: Device, journal: u64) -> CrashImage {
    let dev = device.with(CrashImage::zeroed(SIZE), 0);
    FileSystem::format(Arc::new(dev.clone()), &options(journal)).unwrap();
    dev.image()
}

/// An empty file system with the smallest journal.
pub fn formatted(device: Device) -> CrashImage {
    formatted_with(device, RING)
}

pub fn mount(dev: Arc<dyn BlockDevice>) -> FileSystem {
    FileSystem::mount(dev, &MountOptions::default()).unwrap()
}

pub fn mount_read_only(dev: Arc<dyn BlockDevice>) -> FileSystem {
    let mut opts = MountOptions::default();
    opts.read_only = true;
    FileSystem::mount(dev, &opts).unwrap()
}

pub fn create(fs: &FileSystem, path: &str) -> File {
    fs.open(path, OpenOptions::CREATE).unwrap()
}

/// Bytes that tell where they belong.
pub fn bytes(seed: usize, len: usize) -> Vec<u8> {
    let byte = |i: usize| u8::try_from((seed * 31 + i * 7 + i / 251) % 251).unwrap() + 1;
    (0..len).map(byte).collect()
}

/// The device after a power cut that has lost whatever it may lose, or nothing.
pub fn cut(device: Device, dev: &CrashDevice, keep: bool) -> CrashDevice {
    device.with(dev.image_after(dev.len_events(), &mut |_| keep), 1)
}

/// Mounts what a power cut has left, whatever it has lost, and compares a file.
pub fn assert_survives(device: Device, dev: &CrashDevice, path: &str, expected: &[u8], what: &str) {
    for keep in [false, true] {
        let fs = mount(Arc::new(cut(device, dev, keep)));
        let found = content_of(&fs, path);
        assert!(found == expected, "{what}, {keep}: {path} has other bytes");
    }
}

/// The content of a file, and the number of its bytes that are synced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Promise {
    pub data: Vec<u8>,
    pub synced: usize,
}

pub type State = BTreeMap<String, Promise>;

/// Returns the difference between a file system and a state.
pub fn differs(fs: &FileSystem, state: &State) -> Option<String> {
    let there = fs.list("/").unwrap();
    let names: Vec<String> = there.iter().map(|e| format!("/{}", e.name)).collect();
    if !names.iter().eq(state.keys()) {
        return Some(format!("names {names:?}, not {:?}", state.keys()));
    }
    for (path, promise) in state {
        let found = content_of(fs, path);
        let (len, synced) = (found.len(), promise.synced);
        if len < synced || len > promise.data.len() {
            return Some(format!("{path} has {len} bytes, {synced} are synced"));
        }
        if let Some(i) = (0..len).find(|i| found[*i] != promise.data[*i]) {
            let (is, not) = (found[i], promise.data[i]);
            return Some(format!("{path}: byte {i} of {len} is {is}, not {not}"));
        }
    }
    None
}

pub fn assert_one_of(fs: &FileSystem, states: [&State; 2], what: &str) {
    assert_eq!(fs.problems(), [] as [String; 0], "{what}");
    if let (Some(old), Some(new)) = (differs(fs, states[0]), differs(fs, states[1])) {
        panic!("{what}: neither the old state ({old}) nor the new ({new})");
    }
}

/// Checks a state after a power cut; if `deep`, also after a second cut anywhere in the recovery.
pub fn check_state(
    device: Device,
    image: &CrashImage,
    states: [&State; 2],
    what: &str,
    deep: bool,
) {
    let dev = device.with(image.clone(), 5);
    let as_dyn: Arc<dyn BlockDevice> = Arc::new(dev.clone());
    let report = check(&as_dyn).unwrap_or_else(|error| panic!("{what}: {error}"));
    let worst = report.findings.iter().map(|finding| finding.severity).max();
    assert!(
        worst.is_none_or(|worst| worst == Severity::Note),
        "{what}: {:?}",
        report.findings
    );
    // Rule 24: a mount that may not write sees the same, and writes nothing.
    let fs = mount_read_only(Arc::clone(&as_dyn));
    assert_one_of(&fs, states, &format!("{what}, read-only"));
    fs.unmount().unwrap();
    drop(fs);
    assert_eq!(dev.len_events(), 0, "{what}: a read-only mount has written");
    let fs = mount(as_dyn);
    assert_one_of(&fs, states, what);
    if deep {
        let mut points = dev.crash_points();
        while points.advance().is_some() {
            for keep in [false, true] {
                let again = points.image(&mut |_| keep);
                let second = mount(Arc::new(device.with(again, 6)));
                let what = format!("{what}, second cut after event {}", points.position());
                assert_one_of(&second, states, &what);
            }
        }
    }
    fs.unmount().unwrap();
}

/// Files that are appended to and synced, and now and then truncated, deleted, renamed, closed.
pub struct Work {
    pub dev: CrashDevice,
    pub fs: FileSystem,
    handles: BTreeMap<String, File>,
    now: State,
    /// The state after each operation, and the event at which it was acknowledged.
    pub history: Vec<(usize, String, State)>,
    pub rng: SmallRng,
    appends: usize,
}

impl Work {
    pub fn new(device: Device, seed: u64) -> Work {
        let dev = device.with(formatted(device), seed);
        Work {
            fs: mount(Arc::new(dev.clone())),
            dev,
            handles: BTreeMap::new(),
            now: State::new(),
            history: vec![(0, "nothing".to_owned(), State::new())],
            rng: SmallRng::seed_from_u64(seed),
            appends: 0,
        }
    }

    pub fn done(&mut self, what: String) {
        self.history
            .push((self.dev.len_events(), what, self.now.clone()));
    }

    pub fn file(&mut self) -> (String, File) {
        let path = ["/a", "/b", "/c"][self.rng.random_range(0..3)].to_owned();
        if !self.handles.contains_key(&path) {
            let f = create(&self.fs, &path);
            self.handles.insert(path.clone(), f);
            if !self.now.contains_key(&path) {
                self.now.insert(path.clone(), Promise::default());
                self.done(format!("create {path}"));
            }
        }
        let f = self.handles[&path].clone();
        (path, f)
    }

    pub fn step(&mut self) {
        let (path, f) = self.file();
        let promise = self.now.get_mut(&path).unwrap();
        let what = match self.rng.random_range(0..100u32) {
            0..8 => {
                let to = self.rng.random_range(0..=promise.data.len());
                f.truncate(to as u64).unwrap();
                promise.data.truncate(to);
                promise.synced = promise.synced.min(to);
                format!("truncate {path} to {to}")
            }
            8..12 => {
                drop(f);
                self.handles.remove(&path);
                self.fs.unlink(&path).unwrap();
                self.now.remove(&path);
                format!("unlink {path}")
            }
            12..16 => {
                let promise = promise.clone();
                self.fs.rename(&path, "/d").unwrap();
                self.now.remove(&path);
                self.handles.remove(&path);
                drop(f);
                self.now.insert("/d".to_owned(), promise);
                format!("rename {path} /d")
            }
            16..19 => {
                f.range_sync(0, u64::MAX).unwrap();
                format!("range_sync {path}")
            }
            19..22 => {
                drop(f);
                self.handles.remove(&path);
                format!("close {path}")
            }
            n => {
                let most = match n {
                    22..25 => 90_000,
                    25..40 => 9000,
                    _ => 300,
                };
                let more = bytes(self.appends, self.rng.random_range(1..most));
                self.appends += 1;
                f.append(&more).unwrap();
                promise.data.extend(&more);
                let what = format!("append {} to {path}", more.len());
                self.done(what);
                if n.is_multiple_of(4) {
                    return;
                }
                f.sync().unwrap();
                let promise = self.now.get_mut(&path).unwrap();
                promise.synced = promise.data.len();
                format!("sync {path}")
            }
        };
        self.done(what);
    }
}
