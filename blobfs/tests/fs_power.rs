//! Power cuts in the middle of random operations: overwriting, gaps, truncation of what was not
//! synced, replaced names, remounts. The devices have or lack a write cache, FUA, write-zeroes and
//! unmap, and have blocks of 512 or of 4096 bytes. The power is cut once more while a mount
//! recovers. `PUMICE_SEED=n` runs one seed alone, and `PUMICE_ROUNDS=n` runs more of them.
//!
//! Without a journal, no write of 4096 bytes is torn, since nothing could repair the metadata. With
//! one, blocks are what a power cut leaves whole.

mod common;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use common::faults::Less;
use common::random::from_env;
use common::watchdog::watchdog;
use pumice_bdev::{BlockDevice, OpKind};
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions, checked};
use pumice_blobfs::fs::{File, FileSystem, FormatOptions, Journal, MountOptions, OpenOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// The expected state of a file: its first `synced` bytes are there. A byte is that of `data` or,
/// if it was overwritten since the last sync, one that it was before.
#[derive(Clone, Default)]
struct Promise {
    data: Arc<Vec<u8>>,
    synced: usize,
    before: Arc<Vec<(usize, Vec<u8>)>>,
}

type State = BTreeMap<String, Promise>;

/// The kind of device.
#[derive(Clone, Debug)]
struct Kind {
    options: CrashOptions,
    without: Vec<OpKind>,
    journal: Journal,
}

impl Kind {
    fn random(rng: &mut SmallRng, seed: u64) -> Kind {
        let options = CrashOptions::default()
            .block_size([512, 4096][rng.random_range(0..2)])
            .write_cache(rng.random_range(0..3) > 0)
            .seed(seed)
            .tear_bytes(4096)
            .unmap_zeroes(rng.random())
            .reorder(true);
        let kinds = [OpKind::Fua, OpKind::WriteZeroes, OpKind::Unmap];
        let without = kinds.into_iter().filter(|_| rng.random_range(0..3) == 0);
        Kind {
            without: without.collect(),
            options,
            journal: Journal::None,
        }
    }

    fn with_journal(mut self) -> Kind {
        self.options.tear_bytes = self.options.block_size;
        self.journal = Journal::Bytes(128 << 10);
        self
    }

    fn device(&self, image: CrashImage) -> (CrashDevice, Arc<dyn BlockDevice>) {
        let dev = CrashDevice::with_options(&self.options, image);
        (dev.clone(), Less::over(Arc::new(dev), &self.without))
    }
}

struct Work {
    dev: CrashDevice,
    base: Arc<dyn BlockDevice>,
    opts: MountOptions,
    fs: Option<FileSystem>,
    now: State,
    /// The state after each acknowledged operation.
    history: Vec<State>,
    log: Vec<String>,
    handles: BTreeMap<String, File>,
    rng: SmallRng,
}

impl Work {
    fn new(kind: &Kind, mut rng: SmallRng) -> Work {
        let (dev, base) = kind.device(CrashImage::zeroed(24 << 20));
        let mut format = FormatOptions::default();
        format.cluster_size = [16 << 10, 64 << 10][rng.random_range(0..2)];
        format.md_pages = Some(160);
        format.journal = kind.journal;
        FileSystem::format(base, &format).unwrap();
        // Only later events count.
        let (dev, base) = kind.device(dev.image());
        let mut opts = MountOptions::default();
        opts.write_behind_bytes = [1, 32 << 20][rng.random_range(0..2)];
        opts.cache_bytes = [0, 8 << 20][rng.random_range(0..2)];
        opts.discard = rng.random();
        let fs = FileSystem::mount(Arc::clone(&base), &opts).unwrap();
        Work {
            dev,
            base,
            opts,
            fs: Some(fs),
            now: State::new(),
            history: vec![State::new()],
            log: Vec::new(),
            handles: BTreeMap::new(),
            rng,
        }
    }

    fn fs(&self) -> &FileSystem {
        self.fs.as_ref().unwrap()
    }

    fn done(&mut self, what: String) {
        self.log.push(what);
        self.history.push(self.now.clone());
        self.dev.mark(self.history.len() as u64 - 1);
    }

    fn path(&mut self) -> String {
        format!("/{}", ["a", "b", "c", "d"][self.rng.random_range(0..4)])
    }

    /// Returns the file at a random path. Making it is an operation of its own.
    fn file(&mut self) -> (String, File) {
        let path = self.path();
        if let Some(f) = self.handles.get(&path) {
            return (path, f.clone());
        }
        let is_new = !self.now.contains_key(&path);
        let f = self.fs().open(&path, OpenOptions::CREATE).unwrap();
        if is_new {
            self.now.insert(path.clone(), Promise::default());
            self.done(format!("create {path}"));
        }
        if self.rng.random() {
            self.handles.insert(path.clone(), f.clone());
        }
        (path, f)
    }

    fn bytes(&mut self) -> Vec<u8> {
        let max = [100, 5000, 70_000, 1_200_000][self.rng.random_range(0..4)];
        let len = self.rng.random_range(1..max);
        let first: u8 = self.rng.random();
        let pattern = (0..241u8).cycle().map(|b| b.wrapping_add(first));
        pattern.take(len).collect()
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..22 => {
                let (path, f) = self.file();
                let bytes = self.bytes();
                f.append(&bytes).unwrap();
                let p = self.now.get_mut(&path).unwrap();
                Arc::make_mut(&mut p.data).extend(&bytes);
                self.done(format!("append {} to {path}", bytes.len()));
            }
            22..42 => self.write_at(),
            42..54 => self.truncate(),
            54..72 => {
                let (path, f) = self.file();
                f.sync().unwrap();
                self.now.get_mut(&path).unwrap().is_synced();
                self.done(format!("sync {path}"));
            }
            72..78 => {
                let (path, f) = self.file();
                let len = self.now[&path].data.len() as u64;
                f.range_sync(0, len).unwrap();
                self.done(format!("range_sync {path}"));
            }
            78..82 => {
                let (path, f) = self.file();
                let len = self.now[&path].data.len() as u64 + 300_000;
                let _ = f.allocate(0, len);
                self.done(format!("allocate for {path}"));
            }
            82..92 => self.names(),
            92..98 => {
                let path = self.path();
                self.handles.remove(&path);
                self.done(format!("close {path}"));
            }
            _ => {
                self.handles.clear();
                let fs = self.fs.take().unwrap();
                fs.unmount().unwrap();
                drop(fs);
                self.now.values_mut().for_each(Promise::is_synced);
                self.done("unmount".to_owned());
                let fs = FileSystem::mount(Arc::clone(&self.base), &self.opts).unwrap();
                self.fs = Some(fs);
                self.done("mount".to_owned());
            }
        }
    }

    fn write_at(&mut self) {
        let (path, f) = self.file();
        let bytes = self.bytes();
        let len = self.now[&path].data.len();
        let beyond = [9000, 5_000_000][self.rng.random_range(0..2)];
        let off = if self.rng.random_range(0..4) == 0 {
            len + self.rng.random_range(0..beyond)
        } else {
            self.rng.random_range(0..=len)
        };
        if off + bytes.len() > 8 << 20 {
            return;
        }
        f.write_at(off as u64, &bytes).unwrap();
        let p = self.now.get_mut(&path).unwrap();
        let data = Arc::make_mut(&mut p.data);
        let end = off + bytes.len();
        if off < len {
            let old = data[off..end.min(len)].to_vec();
            Arc::make_mut(&mut p.before).push((off, old));
        }
        data.resize(len.max(end), 0);
        data[off..end].copy_from_slice(&bytes);
        self.done(format!("write {} at {off} of {path}", bytes.len()));
    }

    fn truncate(&mut self) {
        let (path, f) = self.file();
        let len = self.now[&path].data.len();
        let to = match self.rng.random_range(0..6) {
            0 => 0,
            1 => len + self.rng.random_range(0..300_000),
            _ => self.rng.random_range(0..=len),
        };
        f.truncate(to as u64).unwrap();
        let p = self.now.get_mut(&path).unwrap();
        Arc::make_mut(&mut p.data).resize(to, 0);
        p.synced = p.synced.min(to);
        self.done(format!("truncate {path} to {to}"));
    }

    fn names(&mut self) {
        let (from, to) = (self.path(), self.path());
        if !self.now.contains_key(&from) {
            return;
        }
        match self.rng.random_range(0..3) {
            0 => {
                self.fs().unlink(&from).unwrap();
                self.now.remove(&from);
                self.handles.remove(&from);
                self.done(format!("unlink {from}"));
            }
            1 if from != to => {
                self.fs().rename(&from, &to).unwrap();
                let p = self.now.remove(&from).unwrap();
                self.now.insert(to.clone(), p);
                self.handles.remove(&to);
                if let Some(f) = self.handles.remove(&from) {
                    self.handles.insert(to.clone(), f);
                }
                self.done(format!("rename {from} {to}"));
            }
            _ => {
                drop(self.fs().open(&from, OpenOptions::FRESH).unwrap());
                self.now.insert(from.clone(), Promise::default());
                self.handles.remove(&from);
                self.done(format!("fresh {from}"));
            }
        }
    }
}

impl Promise {
    fn is_synced(&mut self) {
        self.synced = self.data.len();
        self.before = Arc::default();
    }

    fn allows(&self, i: usize, byte: u8) -> bool {
        self.data[i] == byte
            || self.before.iter().any(|(off, old)| {
                i.checked_sub(*off)
                    .and_then(|at| old.get(at))
                    .is_some_and(|b| *b == byte)
            })
    }
}

/// Returns the differences between a mounted file system and state `s`.
fn differs(fs: &FileSystem, s: &State) -> Option<String> {
    let there = fs.list("/").unwrap();
    let names: Vec<String> = there.iter().map(|e| format!("/{}", e.name)).collect();
    if !names.iter().eq(s.keys()) {
        return Some(format!("names {names:?}, not {:?}", s.keys()));
    }
    for (path, p) in s {
        let f = fs.open(path, OpenOptions::READ).unwrap();
        let len = usize::try_from(f.len()).unwrap();
        if len < p.synced || len > p.data.len() {
            let (synced, all) = (p.synced, p.data.len());
            return Some(format!(
                "{path} has {len} bytes; {synced} synced, {all} written"
            ));
        }
        let mut out = vec![0; len];
        if f.read_at(0, &mut out).unwrap() != len {
            return Some(format!("{path} cannot be read"));
        }
        if out[..] != p.data[..len]
            && let Some(i) = (0..len).find(|i| !p.allows(*i, out[*i]))
        {
            return Some(format!(
                "{path}: byte {i} of {len} is {}, not {}",
                out[i], p.data[i]
            ));
        }
    }
    None
}

/// Mounts the image, checks it, and checks the states that follow, also after a cut in the
/// recovery.
fn check(kind: &Kind, image: &CrashImage, states: [&State; 2], rng: &mut SmallRng, what: &str) {
    if rng.random_range(0..4) == 0 {
        let (dev, base) = kind.device(image.clone());
        let mut opts = MountOptions::default();
        opts.read_only = true;
        let fs = FileSystem::mount(base, &opts).unwrap();
        is_one_of(&fs, states, &format!("{what}, read-only"));
        fs.unmount().unwrap();
        drop(fs);
        assert_eq!(dev.len_events(), 0, "{what}: a read-only mount has written");
    }
    let (dev, base) = kind.device(image.clone());
    let fs = match FileSystem::mount(base, &MountOptions::default()) {
        Ok(fs) => fs,
        Err(e) => panic!("{what}: cannot be mounted: {e}"),
    };
    is_one_of(&fs, states, what);
    let recovery = dev.len_events();
    if recovery > 0 {
        let mut points = dev.crash_points();
        for _ in 0..rng.random_range(0..=recovery) {
            points.advance();
        }
        let image = points.image(&mut |_| rng.random());
        let (_dev, base) = kind.device(image.clone());
        let what = format!(
            "{what}, second cut after {} of {recovery}",
            points.position()
        );
        match FileSystem::mount(base, &MountOptions::default()) {
            Ok(fs) => {
                end(kind, &fs, states, &what);
                checked("files-second-cut", &image);
            }
            Err(e) => panic!("{what}: cannot be mounted: {e}"),
        }
    }
    end(kind, &fs, states, what);
    checked("files", image);
}

fn is_one_of(fs: &FileSystem, [before, after]: [&State; 2], what: &str) {
    assert_eq!(fs.problems(), [] as [String; 0], "{what}");
    if let (Some(old), Some(new)) = (differs(fs, before), differs(fs, after)) {
        panic!("{what}: neither the old state ({old}) nor the new ({new})");
    }
}

/// Checks that it is as expected, that no cluster has two owners, and that everything can be freed.
fn end(kind: &Kind, fs: &FileSystem, states: [&State; 2], what: &str) {
    is_one_of(fs, states, what);
    let store = fs.blobstore();
    let mut owned = HashSet::new();
    for id in store.blobs() {
        for (_, cluster) in store.extents(id).iter().flat_map(|e| e.allocated()) {
            assert!(
                owned.insert(cluster),
                "{what}: cluster {cluster} has two owners"
            );
        }
    }
    for e in fs.list("/").unwrap() {
        fs.unlink(&format!("/{}", e.name)).unwrap();
    }
    let statfs = fs.statfs();
    let (free, used) = (statfs.free, statfs.md_pages_used);
    // The journal is a blob too, with a root and a page of extents.
    let expected = match kind.journal {
        Journal::None => (statfs.total, 0),
        _ => (statfs.total, 2),
    };
    assert_eq!((free, used), expected, "{what}: space leaked");
    fs.unmount().unwrap();
}

fn run(seed: u64, journal: bool) {
    let _limit = watchdog(&format!("fs_power, seed {seed}"), 300);
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut kind = Kind::random(&mut rng, seed);
    if journal {
        kind = kind.with_journal();
    }
    let mut work = Work::new(&kind, rng.clone());
    for _ in 0..30 {
        work.step();
    }
    let events = work.dev.len_events();
    let mut wanted: Vec<usize> = (0..10).map(|_| rng.random_range(0..=events)).collect();
    wanted.push(events);
    wanted.sort_unstable();
    wanted.dedup();
    let mut points = work.dev.crash_points();
    for at in wanted {
        while points.position() < at && points.advance().is_some() {}
        let k = usize::try_from(points.marks().last().unwrap_or(0)).unwrap();
        let before = &work.history[k];
        let after = work.history.get(k + 1).unwrap_or(before);
        let op = work.log.get(k).map_or("the end", String::as_str);
        let what = |how: &str| format!("seed {seed}, {kind:?}, event {at}, in {op:?}, {how}");
        let states = [before, after];
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let none = points.image(&mut |_| false);
            check(&kind, &none, states, &mut rng, &what("nothing unsettled"));
            if !points.unsettled().is_empty() {
                let all = points.image(&mut |_| true);
                check(&kind, &all, states, &mut rng, &what("all"));
                let some = points.image(&mut |_| rng.random());
                check(&kind, &some, states, &mut rng, &what("a subset"));
            }
        }));
        if let Err(panic) = result {
            eprintln!("fs_power: PUMICE_SEED={seed} runs this alone; operations up to the cut:");
            eprintln!("{:#?}", &work.log[..k.min(work.log.len())]);
            std::panic::resume_unwind(panic);
        }
    }
}

fn seeds() -> std::ops::Range<u64> {
    match from_env("PUMICE_SEED") {
        Some(seed) => seed..seed + from_env("PUMICE_ROUNDS").unwrap_or(1),
        None => 0..from_env("PUMICE_ROUNDS").unwrap_or(8),
    }
}

#[test]
fn a_power_cut_leaves_what_was_promised() {
    for seed in seeds() {
        run(seed, false);
    }
}

#[test]
fn a_power_cut_on_a_store_with_a_journal_leaves_what_was_promised() {
    for seed in seeds() {
        run(seed, true);
    }
}
