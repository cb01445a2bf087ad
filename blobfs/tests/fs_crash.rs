//! Tests of power cuts: after every event of a small workload, with subsets of what was not
//! durable.
//!
//! The device tears writes between blocks only. Blocks have 4096 bytes where there is no journal
//! that could repair a torn page of metadata, and 512 where there is one.

mod common;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use pumice_bdev::BlockDevice;
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions};
use pumice_blobfs::fs::{FileSystem, FormatOptions, Journal, MountOptions, OpenOptions};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// The expected state of a file: all of the first `synced` bytes, and perhaps more of `data`.
#[derive(Clone, Debug, PartialEq)]
struct Promise {
    data: Arc<Vec<u8>>,
    synced: usize,
    is_dir: bool,
}

type State = BTreeMap<String, Promise>;

struct Work {
    dev: CrashDevice,
    fs: FileSystem,
    empty: (u64, u64),
    now: State,
    /// The state after each acknowledged operation.
    history: Vec<State>,
    rng: SmallRng,
}

/// The device and the file system of a run.
#[derive(Debug, Clone, Copy)]
struct Setting {
    write_cache: bool,
    /// The smallest one, so that it is filled again and again.
    journal: bool,
}

impl Setting {
    fn options(self, seed: u64) -> CrashOptions {
        let block_size = if self.journal { 512 } else { 4096 };
        CrashOptions::default()
            .block_size(block_size)
            .write_cache(self.write_cache)
            .seed(seed)
            .tear_bytes(block_size)
            .reorder(true)
    }
}

/// The free bytes and the used metadata pages of an empty file system.
fn space(fs: &FileSystem) -> (u64, u64) {
    let statfs = fs.statfs();
    (statfs.free, statfs.md_pages_used)
}

impl Work {
    fn new(setting: Setting, seed: u64) -> Work {
        let options = setting.options(seed);
        let dev = CrashDevice::with_options(&options, CrashImage::zeroed(24 << 20));
        let mut format = FormatOptions::default();
        format.cluster_size = 64 << 10;
        format.md_pages = Some(128);
        format.journal = if setting.journal {
            Journal::Bytes(128 << 10)
        } else {
            Journal::None
        };
        FileSystem::format(Arc::new(dev.clone()), &format).unwrap();
        // Only later events count.
        let dev = CrashDevice::with_options(&options, dev.image());
        let fs = FileSystem::mount(Arc::new(dev.clone()), &MountOptions::default()).unwrap();
        Work {
            dev,
            empty: space(&fs),
            fs,
            now: State::new(),
            history: vec![State::new()],
            rng: SmallRng::seed_from_u64(seed),
        }
    }

    fn done(&mut self) {
        self.history.push(self.now.clone());
        self.dev.mark(self.history.len() as u64 - 1);
    }

    fn dir(&mut self, path: &str) {
        self.fs.mkdir(path).unwrap();
        self.now.insert(
            path.to_owned(),
            Promise {
                data: Arc::default(),
                synced: 0,
                is_dir: true,
            },
        );
        self.done();
    }

    fn fresh(&mut self, path: &str) {
        drop(self.fs.open(path, OpenOptions::FRESH).unwrap());
        self.now.insert(
            path.to_owned(),
            Promise {
                data: Arc::default(),
                synced: 0,
                is_dir: false,
            },
        );
        self.done();
    }

    fn append(&mut self, path: &str, len: usize) {
        let f = self.fs.open(path, OpenOptions::READ).unwrap();
        let first: u8 = self.rng.random();
        let bytes: Vec<u8> = (0..len)
            .map(|i| first.wrapping_add(u8::try_from(i % 241).unwrap()))
            .collect();
        // The file is open only some of the time, so that tails are closed and opened again.
        f.append(&bytes).unwrap();
        Arc::make_mut(&mut self.now.get_mut(path).unwrap().data).extend(bytes);
        self.done();
    }

    fn sync(&mut self, path: &str) {
        self.fs
            .open(path, OpenOptions::READ)
            .unwrap()
            .sync()
            .unwrap();
        let p = self.now.get_mut(path).unwrap();
        p.synced = p.data.len();
        self.done();
    }

    fn truncate(&mut self, path: &str, len: usize) {
        self.fs
            .open(path, OpenOptions::READ)
            .unwrap()
            .truncate(len as u64)
            .unwrap();
        let p = self.now.get_mut(path).unwrap();
        Arc::make_mut(&mut p.data).truncate(len);
        p.synced = p.synced.min(len);
        self.done();
    }

    fn rename(&mut self, from: &str, to: &str) {
        self.fs.rename(from, to).unwrap();
        let prefix = format!("{from}/");
        let moved: Vec<String> = self
            .now
            .keys()
            .filter(|p| *p == from || p.starts_with(&prefix))
            .cloned()
            .collect();
        for p in moved {
            let promise = self.now.remove(&p).unwrap();
            self.now
                .insert(format!("{to}{}", &p[from.len()..]), promise);
        }
        self.done();
    }

    fn link(&mut self, from: &str, to: &str) {
        self.fs.link(from, to).unwrap();
        let promise = self.now[from].clone();
        self.now.insert(to.to_owned(), promise);
        self.done();
    }

    /// Removes or replaces a file that is open, continues to write it, and closes it.
    fn orphan(&mut self, path: &str, replace: bool) {
        let f = self.fs.open(path, OpenOptions::READ).unwrap();
        if replace {
            self.fresh(path);
        } else {
            self.unlink(path);
        }
        f.append(&[7; 200_000]).unwrap();
        f.sync().unwrap();
        self.done();
        drop(f);
        self.done();
    }

    fn unlink(&mut self, path: &str) {
        self.fs.unlink(path).unwrap();
        self.now.remove(path);
        self.done();
    }
}

fn workload(w: &mut Work) {
    w.dir("/db");
    w.fresh("/db/log");
    w.append("/db/log", 138);
    w.sync("/db/log");
    w.append("/db/log", 5000);
    w.append("/db/log", 138);
    w.sync("/db/log");
    w.fresh("/db/1.sst");
    w.append("/db/1.sst", 300_000);
    w.sync("/db/1.sst");
    w.fresh("/db/CURRENT");
    w.append("/db/CURRENT", 16);
    w.sync("/db/CURRENT");
    w.fresh("/db/2.dbtmp");
    w.append("/db/2.dbtmp", 17);
    w.sync("/db/2.dbtmp");
    w.rename("/db/2.dbtmp", "/db/CURRENT");
    w.append("/db/log", 1_300_000);
    w.append("/db/log", 100);
    w.sync("/db/log");
    w.link("/db/1.sst", "/db/same.sst");
    w.fresh("/db/3.sst");
    w.append("/db/3.sst", 70_000);
    w.sync("/db/3.sst");
    w.rename("/db/3.sst", "/db/1.sst");
    w.unlink("/db/same.sst");
    w.fresh("/db/4.sst");
    w.append("/db/4.sst", 400_000);
    w.sync("/db/4.sst");
    w.truncate("/db/log", 4000);
    w.append("/db/log", 138);
    w.sync("/db/log");
    w.fresh("/db/log");
    w.append("/db/log", 99);
    w.dir("/cp.tmp");
    w.fresh("/cp.tmp/a");
    w.append("/cp.tmp/a", 4096);
    w.sync("/cp.tmp/a");
    w.dir("/cp.tmp/sub");
    w.fresh("/cp.tmp/sub/b");
    w.dir("/cp");
    w.rename("/cp.tmp", "/cp");
    w.sync("/db/log");
    w.orphan("/db/1.sst", true);
    w.orphan("/db/4.sst", false);
    w.unlink("/cp/a");
}

/// Returns the differences between a mounted file system and state `s`.
fn differs(fs: &FileSystem, s: &State) -> Option<String> {
    let mut dirs = vec![String::new()];
    let mut seen = 0;
    while let Some(dir) = dirs.pop() {
        for e in fs.list(if dir.is_empty() { "/" } else { &dir }).unwrap() {
            let path = format!("{dir}/{}", e.name);
            seen += 1;
            let Some(p) = s.get(&path) else {
                return Some(format!("{path} should not be there"));
            };
            if p.is_dir != e.is_dir {
                return Some(format!("{path} is of the wrong kind"));
            }
            if e.is_dir {
                dirs.push(path);
                continue;
            }
            let f = fs.open(&path, OpenOptions::READ).unwrap();
            let len = usize::try_from(f.len()).unwrap();
            if len < p.synced || len > p.data.len() {
                return Some(format!(
                    "{path} has {len} bytes; {} synced, {} written",
                    p.synced,
                    p.data.len()
                ));
            }
            let mut out = vec![0; len];
            if f.read_at(0, &mut out).unwrap() != len || out[..] != p.data[..len] {
                return Some(format!("{path} has other bytes"));
            }
        }
    }
    (seen != s.len()).then(|| format!("{} names expected, {seen} there", s.len()))
}

fn check(
    image: CrashImage,
    work: &Work,
    setting: Setting,
    (before, after): (&State, &State),
    what: &str,
) {
    let dev: Arc<dyn BlockDevice> = Arc::new(CrashDevice::with_options(&setting.options(1), image));
    let fs = match FileSystem::mount(Arc::clone(&dev), &MountOptions::default()) {
        Ok(fs) => fs,
        Err(e) => panic!("{what}: cannot be mounted: {e}"),
    };
    assert_eq!(fs.problems(), [] as [String; 0], "{what}");
    if let (Some(old), Some(new)) = (differs(&fs, before), differs(&fs, after)) {
        panic!("{what}: neither the old state ({old}) nor the new ({new})");
    }
    // No cluster belongs to two blobs.
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
    // It can be used: what is deleted becomes free.
    let is_dir = |p: &String| fs.stat(p).unwrap().is_dir;
    let mut all: Vec<String> = Vec::new();
    let mut dirs = vec![String::new()];
    while let Some(dir) = dirs.pop() {
        for e in fs.list(if dir.is_empty() { "/" } else { &dir }).unwrap() {
            let path = format!("{dir}/{}", e.name);
            if e.is_dir {
                dirs.push(path.clone());
            }
            all.push(path);
        }
    }
    all.sort();
    for path in all.iter().rev() {
        if is_dir(path) {
            fs.rmdir(path).unwrap();
        } else {
            fs.unlink(path).unwrap();
        }
    }
    assert_eq!(space(&fs), work.empty, "{what}: space leaked");
    fs.unmount().unwrap();
}

fn run(setting: Setting, seed: u64) {
    let mut work = Work::new(setting, seed);
    workload(&mut work);
    let mut points = work.dev.crash_points();
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut states = 0;
    loop {
        let at = points.position();
        let k = usize::try_from(points.marks().last().unwrap_or(0)).unwrap();
        let before = &work.history[k];
        let after = work.history.get(k + 1).unwrap_or(before);
        let open = points.unsettled().len();
        let what = |how: &str| {
            format!(
                "seed {seed}, {setting:?}, event {at}, operation {}, {how}",
                k + 1
            )
        };
        check(
            points.image(&mut |_| false),
            &work,
            setting,
            (before, after),
            &what("nothing unsettled"),
        );
        states += 1;
        if open > 0 {
            check(
                points.image(&mut |_| true),
                &work,
                setting,
                (before, after),
                &what("all"),
            );
            states += 1;
        }
        for n in 0..open.min(3) {
            let mut chosen = Vec::new();
            let image = points.image(&mut |u| {
                let take = rng.random();
                chosen.push((u.id, u.lba, take));
                take
            });
            check(
                image,
                &work,
                setting,
                (before, after),
                &what(&format!("subset {n} {chosen:?}")),
            );
            states += 1;
        }
        if points.advance().is_none() {
            break;
        }
    }
    assert!(states > 200, "{states} states");
}

#[test]
fn a_power_cut_leaves_every_synced_byte_and_each_name_old_or_new() {
    let setting = Setting {
        write_cache: true,
        journal: false,
    };
    run(setting, 1);
}

#[test]
fn so_it_does_without_a_volatile_cache() {
    let setting = Setting {
        write_cache: false,
        journal: false,
    };
    run(setting, 2);
}

#[test]
fn so_it_does_with_a_journal_where_pages_are_torn() {
    for (write_cache, seed) in [(true, 3), (false, 4)] {
        let setting = Setting {
            write_cache,
            journal: true,
        };
        run(setting, seed);
    }
}
