//! Random operations on a file system whose device fails, against a model in memory.
//!
//! Each thread has a directory of its own and knows what has to be in its files. An operation that
//! fails has changed nothing, but for a write inside a file, which may have changed a part of its
//! range; what a sync has called durable is there after the next mount; after a failed flush a sync
//! may say data loss, and then a file is a beginning of what it was, as long as was durable at least.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use pumice_bdev::error_inject::{ErrorDevice, Failure};
use pumice_bdev::{BlockDevice, DmaBuf, OpKind};
use pumice_blobfs::fs::{
    Access, File, FileSystem, FormatOptions, FsError, MountOptions, OpenOptions, ReadRequest,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::faults::{Less, fail, fault, hang, mount_with};
use super::memory;

/// Bytes to write: two places of it differ, unless they are a multiple of 251 apart.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| (0..251u8).cycle().take(3_000_000).collect());

/// What goes wrong in a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// Writes of data, write-zeroes and reads of data fail, and some pass.
    pub io: bool,
    /// Flushes fail.
    pub flushes: bool,
    /// Operations on data take their time, in any order.
    pub slow: bool,
    /// Memory for buffers runs out: the caller sees to that.
    pub memory: bool,
}

/// A file as it has to be.
#[derive(Default)]
struct Model {
    data: Vec<u8>,
    /// Bytes of which nobody knows whether a failed write has changed them.
    unsure: Vec<Range<usize>>,
    /// At least so many bytes are durable.
    durable: usize,
    /// A sync has said data loss, or may.
    doubtful: bool,
    handle: Option<File>,
}

struct Worker {
    fs: FileSystem,
    dev: Arc<ErrorDevice>,
    faults: Faults,
    first_data_block: u64,
    dir: String,
    rng: SmallRng,
    files: BTreeMap<String, Model>,
    log: Vec<String>,
}

/// One run: some rounds of operations by `threads` threads, with a remount and a full comparison
/// after each.
pub fn run(seed: u64, faults: Faults, threads: usize, steps: usize) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let block_size = [512, 4096][rng.random_range(0..2)];
    let len: u64 = [8, 24, 48][rng.random_range(0..3)] << 20;
    let mut base: Arc<dyn BlockDevice> = memory(len, block_size);
    let cached = faults.flushes || rng.random();
    let mut without = Vec::new();
    for kind in [OpKind::Fua, OpKind::WriteZeroes, OpKind::Unmap] {
        // A device whose flushes fail has FUA: metadata that cannot be written is another test's.
        if rng.random_range(0..3) == 0 && !(faults.flushes && kind == OpKind::Fua) {
            without.push(kind);
        }
    }
    base = Less::with_cache(base, &without, cached);
    let mut format = FormatOptions::default();
    format.cluster_size = [4096, 16 << 10, 64 << 10, 1 << 20][rng.random_range(0..4)];
    format.md_pages = Some(600);
    FileSystem::format(Arc::clone(&base), &format).unwrap();
    let mut opts = MountOptions::default();
    opts.cache_bytes = [0, 64 << 10, 3 << 20, 64 << 20][rng.random_range(0..4)];
    opts.write_behind_bytes = [1, 2 << 20, 32 << 20][rng.random_range(0..3)];
    opts.shared_channels = rng.random_range(1..4);
    opts.read_ahead_bytes = [0, 1 << 20][rng.random_range(0..2)];
    opts.discard = rng.random_range(0..4) == 0 && !faults.flushes;
    let dev = Arc::new(ErrorDevice::new(None, base));
    let mut fs = mount_with(&dev, &opts);
    let sb = fs.blobstore().super_block();
    let md_end = (u64::from(sb.md_start.get()) + u64::from(sb.md_len.get())) * 4096;
    let cluster = u64::from(format.cluster_size);
    let first_data_block = md_end.next_multiple_of(cluster) / u64::from(block_size);
    let mut workers: Vec<Worker> = (0..threads)
        .map(|n| Worker {
            fs: fs.clone(),
            dev: Arc::clone(&dev),
            faults,
            first_data_block,
            dir: format!("/t{n}"),
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
        all_steps(&dev, &mut workers, faults, first_data_block, steps);
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
        (statfs.total, 0),
        "seed {seed}: space leaked"
    );
}

fn all_steps(
    dev: &Arc<ErrorDevice>,
    workers: &mut [Worker],
    faults: Faults,
    first_data_block: u64,
    steps: usize,
) {
    let over = AtomicBool::new(false);
    let data = Some((first_data_block, u64::MAX / 2));
    std::thread::scope(|s| {
        if faults.slow {
            s.spawn(|| {
                let mut n = 0u32;
                while !over.load(Ordering::Acquire) {
                    n = n.wrapping_add(1);
                    let kind = [OpKind::Write, OpKind::Read, OpKind::Write][n as usize % 3];
                    dev.inject(hang(kind, 1, data));
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

impl Worker {
    /// Runs `what`; if it panics, says what was done before.
    fn guarded(&mut self, seed: u64, what: impl FnOnce(&mut Worker)) {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| what(self)));
        if let Err(panic) = result {
            let tail = self.log.len().saturating_sub(40).max(1);
            eprintln!("{}\n{:#?}", self.log[0], &self.log[tail..]);
            eprintln!("{} {seed}: PUMICE_SEED runs it alone", self.dir);
            self.dev.clear();
            self.dev.resume();
            std::panic::resume_unwind(panic);
        }
    }

    fn note(&mut self, what: String) {
        self.log.push(what);
    }

    /// An operation has failed: with one of the errors that the run provokes?
    fn expected(&self, what: &str, e: &FsError) {
        let fine = match e {
            FsError::NoSpace { .. } => true,
            FsError::NoMemory(_) => self.faults.memory,
            FsError::Io { data_loss, .. } => self.faults.io || (self.faults.flushes && *data_loss),
            FsError::Store { .. } => self.faults.io || self.faults.memory,
            _ => false,
        };
        assert!(fine, "{what}: {e}");
    }

    fn path(&mut self) -> String {
        let name = ["a", "b", "c", "d"][self.rng.random_range(0..4)];
        format!("{}/{name}", self.dir)
    }

    /// The file at a random path, made if need be.
    fn file(&mut self) -> Option<(String, File)> {
        let path = self.path();
        if let Some(f) = self.files.get(&path).and_then(|m| m.handle.clone()) {
            return Some((path, f));
        }
        match self.fs.open(&path, OpenOptions::CREATE) {
            Ok(f) => {
                let keep = self.rng.random_range(0..3) > 0;
                let model = self.files.entry(path.clone()).or_default();
                assert_eq!(f.len(), model.data.len() as u64, "{path}");
                model.handle = keep.then(|| f.clone());
                Some((path, f))
            }
            Err(e) => {
                self.expected("open", &e);
                None
            }
        }
    }

    fn bytes(&mut self) -> Vec<u8> {
        let max = [200, 5000, 70_000, 400_000, 2_600_000][self.rng.random_range(0..5)];
        let len = self.rng.random_range(1..max);
        let first = self.rng.random_range(0..251);
        PATTERN[first..first + len].to_vec()
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..24 => self.append(),
            24..38 => self.write_at(),
            38..46 => self.truncate(),
            46..56 => self.sync(),
            56..74 => self.read(),
            74..80 => self.hint(),
            80..84 => self.close(),
            84..90 => self.names(),
            90..98 => self.inject(),
            _ => {
                self.note("faults end".to_owned());
                self.dev.clear();
            }
        }
    }

    fn inject(&mut self) {
        let data = Some((self.first_data_block, u64::MAX / 2));
        let most = [3, 30][self.rng.random_range(0..2)];
        let n = self.rng.random_range(1..most);
        let injection = match self.rng.random_range(0..8) {
            0..4 => fail(OpKind::Write, n, data),
            4 => fail(OpKind::WriteZeroes, 1, data),
            5 => fail(OpKind::Read, 1, data),
            6 => fault(OpKind::Write, Failure::NoMemory, n.min(2), data),
            _ if self.faults.flushes => fail(OpKind::Flush, 1, None),
            _ => return,
        };
        if self.faults.io || (self.faults.flushes && injection.op == Some(OpKind::Flush)) {
            self.note(format!("{injection:?}"));
            self.dev.inject(injection);
        }
    }

    fn append(&mut self) {
        let Some((path, f)) = self.file() else { return };
        let data = self.bytes();
        let result = f.append(&data);
        self.note(format!("append {} to {path}: {:?}", data.len(), result));
        let model = self.files.get_mut(&path).unwrap();
        match result {
            Ok(()) => model.data.extend(data),
            Err(e) => self.expected("append", &e),
        }
        self.check_len(&path, &f);
    }

    fn write_at(&mut self) {
        let Some((path, f)) = self.file() else { return };
        let data = self.bytes();
        let len = self.files[&path].data.len();
        let beyond = [1, 5000, 100_000, 6_000_000][self.rng.random_range(0..4)];
        let off = if self.rng.random_range(0..4) == 0 {
            len + self.rng.random_range(0..beyond)
        } else {
            self.rng.random_range(0..=len)
        };
        let result = f.write_at(off as u64, &data);
        self.note(format!(
            "write {} at {off} to {path}: {:?}",
            data.len(),
            result
        ));
        let model = self.files.get_mut(&path).unwrap();
        let end = off + data.len();
        match result {
            Ok(()) => {
                model.data.resize(len.max(end), 0);
                model.data[off..end].copy_from_slice(&data);
                model.sure(off..end);
            }
            Err(e) => {
                if off < len {
                    model.unsure.push(off..end.min(len));
                }
                self.expected("write_at", &e);
            }
        }
        self.check_len(&path, &f);
    }

    fn truncate(&mut self) {
        let Some((path, f)) = self.file() else { return };
        let len = self.files[&path].data.len();
        let to = match self.rng.random_range(0..4) {
            0 => 0,
            1 => len + self.rng.random_range(0..7_000_000),
            _ => self.rng.random_range(0..=len),
        };
        let result = f.truncate(to as u64);
        self.note(format!("truncate {path} to {to}: {result:?}"));
        let model = self.files.get_mut(&path).unwrap();
        match result {
            Ok(()) => {
                model.data.resize(to, 0);
                model.durable = model.durable.min(to);
                model.sure(to..usize::MAX);
            }
            Err(e) => self.expected("truncate", &e),
        }
        self.check_len(&path, &f);
    }

    fn sync(&mut self) {
        let Some((path, f)) = self.file() else { return };
        let len = self.files[&path].data.len() as u64;
        match self.rng.random_range(0..5) {
            0 => {
                let upto = self.rng.random_range(0..=len);
                let result = f.range_sync(0, upto);
                self.note(format!("range_sync {path}: {result:?}"));
                result.unwrap_or_else(|e| self.expected("range_sync", &e));
            }
            1 => {
                let result = f.flush();
                self.note(format!("flush {path}: {result:?}"));
                result.unwrap_or_else(|e| self.expected("flush", &e));
            }
            _ => {
                let result = f.sync();
                self.note(format!("sync {path}: {result:?}"));
                let model = self.files.get_mut(&path).unwrap();
                match result {
                    Ok(()) => {
                        model.durable = model.data.len();
                        model.doubtful = false;
                    }
                    Err(e) => {
                        model.doubtful |= e.is_data_loss();
                        self.expected("sync", &e);
                    }
                }
            }
        }
    }

    fn hint(&mut self) {
        let Some((path, f)) = self.file() else { return };
        match self.rng.random_range(0..6) {
            0 | 1 => f.invalidate(0, u64::MAX),
            2 => f.set_direct(self.rng.random()),
            3 => f.advise(
                [Access::NoReuse, Access::Random, Access::Sequential][self.rng.random_range(0..3)],
            ),
            4 => {
                let end = self.files[&path].data.len() as u64 + self.rng.random_range(0..3_000_000);
                match f.allocate(0, end) {
                    Ok(()) => assert!(f.allocated() >= end),
                    Err(e) => self.expected("allocate", &e),
                }
            }
            _ => {
                if let Err(e) = f.prefetch(0, 2 << 20) {
                    self.expected("prefetch", &e);
                }
            }
        }
    }

    fn close(&mut self) {
        let path = self.path();
        if let Some(model) = self.files.get_mut(&path) {
            model.handle = None;
            self.note(format!("close {path}"));
        }
    }

    fn names(&mut self) {
        let (from, to) = (self.path(), self.path());
        match self.rng.random_range(0..3) {
            0 => {
                let result = self.fs.unlink(&from);
                self.note(format!("unlink {from}: {result:?}"));
                match result {
                    Ok(()) => drop(self.files.remove(&from).expect("it was there")),
                    Err(FsError::NotFound { .. }) => assert!(!self.files.contains_key(&from)),
                    Err(e) => self.expected("unlink", &e),
                }
            }
            1 => {
                let result = self.fs.rename(&from, &to);
                self.note(format!("rename {from} {to}: {result:?}"));
                match result {
                    Ok(()) if from == to => {}
                    Ok(()) => {
                        let model = self.files.remove(&from).expect("it was there");
                        self.files.insert(to, model);
                    }
                    Err(FsError::NotFound { .. }) => assert!(!self.files.contains_key(&from)),
                    Err(e) => self.expected("rename", &e),
                }
            }
            _ => {
                let result = self.fs.open(&from, OpenOptions::FRESH);
                self.note(format!("fresh {from}: {result:?}"));
                match result {
                    Ok(f) => {
                        assert_eq!(f.len(), 0);
                        self.files.insert(from, Model::default());
                    }
                    Err(e) => self.expected("fresh", &e),
                }
            }
        }
    }

    fn check_len(&self, path: &str, f: &File) {
        assert_eq!(
            f.len(),
            self.files[path].data.len() as u64,
            "length of {path}"
        );
    }

    fn read(&mut self) {
        let Some((path, f)) = self.file() else { return };
        self.check_len(&path, &f);
        let len = self.files[&path].data.len();
        let off = self.rng.random_range(0..=len);
        let max = [10, 4096, 100_000, 3_000_000][self.rng.random_range(0..4)];
        let want = self.rng.random_range(0..max);
        let mut out = vec![0; want];
        let how = self.rng.random_range(0..5);
        let read = match how {
            0 => f
                .read_async(off as u64, want)
                .and_then(|h| h.read_into(&mut out)),
            1 => {
                let (a, b) = out.split_at_mut(want / 2);
                let mut requests = [
                    ReadRequest::new(off as u64, a),
                    ReadRequest::new((off + want / 2) as u64, b),
                ];
                f.read_many(&mut requests);
                let [a, b] = requests.map(|r| r.result);
                a.and_then(|a| b.map(|b| a + b))
            }
            2 => {
                let Some(pinned) = f.read_pinned(off as u64, want) else {
                    return;
                };
                out.copy_from_slice(&pinned);
                Ok(want)
            }
            _ => f.read_at(off as u64, &mut out),
        };
        self.note(format!("read {how} {want} at {off} of {path}: {read:?}"));
        match read {
            Ok(n) => {
                assert_eq!(n, want.min(len - off), "read of {path} at {off}");
                self.files[&path].compare(&path, off, &out[..n]);
            }
            Err(e) => self.expected("read", &e),
        }
    }

    /// The faults are over: everything becomes durable, but for what a failed flush has lost.
    fn settle(&mut self) {
        let paths: Vec<String> = self.files.keys().cloned().collect();
        for path in paths {
            let f = match self.files.get_mut(&path).unwrap().handle.take() {
                Some(f) => f,
                None => self.fs.open(&path, OpenOptions::READ).unwrap(),
            };
            let result = f.sync();
            self.note(format!("last sync of {path}: {result:?}"));
            let model = self.files.get_mut(&path).unwrap();
            match result {
                Ok(()) => {
                    model.durable = model.data.len();
                    model.doubtful = false;
                }
                Err(e) => {
                    assert!(self.faults.flushes && e.is_data_loss(), "{path}: {e}");
                    model.doubtful = true;
                }
            }
        }
    }

    /// After a mount: each file is as it has to be.
    fn compare(&mut self) {
        self.note("mounted again".to_owned());
        let mut there: Vec<String> = Vec::new();
        for e in self.fs.list(&self.dir).unwrap() {
            there.push(format!("{}/{}", self.dir, e.name));
        }
        assert!(there.iter().eq(self.files.keys()), "{there:?}");
        for path in there {
            let f = self.fs.open(&path, OpenOptions::READ).unwrap();
            let model = self.files.get_mut(&path).unwrap();
            let len = usize::try_from(f.len()).unwrap();
            if model.doubtful {
                assert!(
                    (model.durable..=model.data.len()).contains(&len),
                    "{path}: {len} bytes; {} durable of {}",
                    model.durable,
                    model.data.len()
                );
                model.data.truncate(len);
            }
            assert_eq!(len, model.data.len(), "length of {path}");
            let mut out = vec![0; len];
            assert_eq!(f.read_at(0, &mut out).unwrap(), len);
            model.compare(&path, 0, &out);
            *model = Model {
                data: out,
                durable: len,
                ..Model::default()
            };
        }
    }

    fn remove_all(&mut self) {
        for path in std::mem::take(&mut self.files).into_keys() {
            self.fs.unlink(&path).unwrap();
        }
        self.fs.rmdir(&self.dir).unwrap();
    }
}

impl Model {
    /// These bytes are known.
    fn sure(&mut self, range: Range<usize>) {
        let parts = std::mem::take(&mut self.unsure);
        for r in parts {
            for part in [
                r.start..r.end.min(range.start),
                r.start.max(range.end)..r.end,
            ] {
                if part.start < part.end {
                    self.unsure.push(part);
                }
            }
        }
    }

    fn compare(&self, path: &str, off: usize, got: &[u8]) {
        let end = off + got.len();
        let mut want = self.data[off..end].to_vec();
        for r in &self.unsure {
            let part = r.start.max(off)..r.end.min(end);
            if part.start < part.end {
                let part = part.start - off..part.end - off;
                want[part.clone()].copy_from_slice(&got[part]);
            }
        }
        if got == want {
            return;
        }
        let first = got.iter().zip(&want).position(|(a, b)| a != b);
        if let Some(first) = first {
            let wrong = got.iter().zip(&want).filter(|(a, b)| a != b).count();
            panic!(
                "{path}: byte {} is {}, should be {}; {wrong} of {} are wrong, {} in the file",
                off + first,
                got[first],
                want[first],
                got.len(),
                self.data.len()
            );
        }
    }
}

/// The number in an environment variable.
pub fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs the seed in `PUMICE_SEED`, or `PUMICE_ROUNDS` of them, or `rounds`. What hangs, fails.
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
