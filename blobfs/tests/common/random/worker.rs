//! One thread's operations, and the expected content of its files.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use pumice_bdev::OpKind;
use pumice_bdev::error_inject::{ErrorDevice, Failure};
use pumice_blobfs::fs::{Access, File, FileSystem, FsError, OpenOptions, ReadRequest};
use rand::Rng;
use rand::rngs::SmallRng;

use super::super::faults::{fail, fault};
use super::model::Model;
use super::{Faults, places};

/// Bytes to write. Two places of it differ, unless their distance is a multiple of 251.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| (0..251u8).cycle().take(3_000_000).collect());

/// See the module.
pub struct Worker {
    pub fs: FileSystem,
    pub dev: Arc<ErrorDevice>,
    pub faults: Faults,
    pub dir: String,
    /// Most files that there are.
    pub names: usize,
    pub rng: SmallRng,
    pub files: BTreeMap<String, Model>,
    pub log: Vec<String>,
}

impl Worker {
    /// Runs `what`. If it panics, prints what was done before.
    pub fn guarded(&mut self, seed: u64, what: impl FnOnce(&mut Worker)) {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| what(self)));
        if let Err(panic) = result {
            // All of it, for the seed that runs alone.
            let shown = if std::env::var_os("PUMICE_SEED").is_some() {
                usize::MAX
            } else {
                40
            };
            let tail = self.log.len().saturating_sub(shown).max(1);
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

    /// Checks that an operation has failed with one of the errors that the run provokes.
    fn expected(&self, what: &str, e: &FsError) {
        let fine = match e {
            FsError::NoSpace { .. } => true,
            FsError::NoMemory(_) => self.faults.memory,
            FsError::Io { data_loss, .. } => {
                self.faults.io
                    || (self.faults.metadata && !data_loss)
                    || (self.faults.flushes && *data_loss)
            }
            FsError::Store { .. } => self.faults.io || self.faults.metadata || self.faults.memory,
            // The device has the old state when it can be written again.
            FsError::Undecided { .. } => self.faults.metadata,
            _ => false,
        };
        assert!(fine, "{what}: {e}");
    }

    fn path(&mut self) -> String {
        let name = ["a", "b", "c", "d"][self.rng.random_range(0..self.names)];
        format!("{}/{name}", self.dir)
    }

    /// Returns the file at a random path, which is made if it does not exist.
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

    pub fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..24 => self.append(),
            24..38 => self.write_at(),
            38..46 => self.truncate(),
            46..56 => self.sync(),
            56..74 => self.read(),
            74..80 => self.hint(),
            80..84 => self.close(),
            84..90 => self.names(),
            90..96 => self.inject(),
            96..98 => self.bad_spell(),
            _ => {
                self.note("faults end".to_owned());
                self.dev.clear();
            }
        }
    }

    /// Lets all writes of data fail while something is done to one file. Then everything works, and
    /// what is in memory only because it could not be written is still there.
    fn bad_spell(&mut self) {
        if !self.faults.io {
            return;
        }
        let names = std::mem::replace(&mut self.names, 1);
        self.note("all writes of data fail".to_owned());
        for blocks in places(&self.fs, &self.dev).0 {
            self.dev.inject(fail(OpKind::Write, u64::MAX, Some(blocks)));
        }
        for _ in 0..self.rng.random_range(2..9) {
            match self.rng.random_range(0..10) {
                0..3 => self.append(),
                3..6 => self.sync(),
                6 => self.write_at(),
                7 => self.truncate(),
                8 => self.read(),
                _ => self.close(),
            }
        }
        if self.rng.random() {
            self.close();
        }
        self.dev.clear();
        self.note("writes of data work".to_owned());
        if let Some((path, f)) = self.file() {
            if self.rng.random() {
                f.invalidate(0, u64::MAX);
            }
            self.read_whole(&path, &f);
        }
        self.names = names;
    }

    fn inject(&mut self) {
        let (data, metadata) = places(&self.fs, &self.dev);
        let data = Some(data[self.rng.random_range(0..data.len())]);
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
        if self.faults.metadata && self.rng.random() {
            let blocks = [metadata, (0, 8)][usize::from(self.rng.random_range(0..5) == 0)];
            let injection = fail(OpKind::Write, self.rng.random_range(1..4), Some(blocks));
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
                model.unsynced.push(off..end);
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
                        model.is_durable();
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

    fn read_whole(&mut self, path: &str, f: &File) {
        let mut out = vec![0; self.files[path].data.len()];
        let read = f.read_at(0, &mut out);
        self.note(format!("read all of {path}: {read:?}"));
        match read {
            Ok(n) => {
                assert_eq!(n, out.len(), "read of {path}");
                self.files[path].compare(path, 0, &out);
            }
            Err(e) => self.expected("read", &e),
        }
    }

    /// Makes everything durable when the faults are over, except for what a failed flush has lost.
    pub fn settle(&mut self) {
        let paths: Vec<String> = self.files.keys().cloned().collect();
        for path in paths {
            let f = match self.files.get_mut(&path).unwrap().handle.take() {
                Some(f) => f,
                None => self.fs.open(&path, OpenOptions::READ).unwrap(),
            };
            // A failure of a write that was in flight may be reported only now. The write is then
            // sent again.
            let told = |e: &FsError| matches!(e, FsError::Io { data_loss, .. } if !data_loss);
            let result = f
                .sync()
                .or_else(|e| if told(&e) { f.sync() } else { Err(e) });
            self.note(format!("last sync of {path}: {result:?}"));
            let model = self.files.get_mut(&path).unwrap();
            match result {
                Ok(()) => {
                    model.is_durable();
                }
                Err(e) => {
                    assert!(self.faults.flushes && e.is_data_loss(), "{path}: {e}");
                    model.doubtful = true;
                }
            }
        }
    }

    /// Checks after a mount that each file is as expected.
    pub fn compare(&mut self) {
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
                let unsynced = std::mem::take(&mut model.unsynced);
                model.unsure.extend(unsynced);
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

    pub fn remove_all(&mut self) {
        for path in std::mem::take(&mut self.files).into_keys() {
            self.fs.unlink(&path).unwrap();
        }
        self.fs.rmdir(&self.dir).unwrap();
    }
}
