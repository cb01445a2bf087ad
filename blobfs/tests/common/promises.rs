//! What a file system on failing devices has promised: names, and the bytes of files, live and after a cut.

use std::collections::BTreeMap;
use std::ops::Range;

use pumice_blobfs::fs::{FileSystem, OpenOptions};

/// The expected content of a file.
#[derive(Clone, Default, Debug)]
pub struct Promise {
    pub data: Vec<u8>,
    /// At least this many bytes are there after a power cut.
    pub synced: usize,
    /// Bytes that were overwritten since the last sync.
    pub before: Vec<(usize, Vec<u8>)>,
    /// Ranges that a failed write may have changed. `wild` has those since the last sync too that were written again.
    pub unsure: Vec<Range<usize>>,
    pub wild: Vec<Range<usize>>,
    /// Whether a shorter length may be durable although the truncation has failed: its outcome was open.
    pub least: Option<usize>,
}

impl Promise {
    pub fn is_synced(&mut self) {
        self.synced = self.data.len();
        self.before.clear();
        self.wild = self.unsure.clone();
        self.least = None;
    }

    pub fn cut(&mut self, to: usize) {
        self.data.resize(to, 0);
        self.synced = self.synced.min(to);
        self.before.retain_mut(|(at, old)| {
            old.truncate(to.saturating_sub(*at));
            !old.is_empty()
        });
        for list in [&mut self.unsure, &mut self.wild] {
            list.retain_mut(|r| {
                r.end = r.end.min(to);
                r.start < r.end
            });
        }
    }

    /// Records bytes that were written at `at`.
    pub fn written(&mut self, at: usize, bytes: &[u8]) {
        let (len, end) = (self.data.len(), at + bytes.len());
        if at < len {
            self.before.push((at, self.data[at..end.min(len)].to_vec()));
        }
        self.data.resize(len.max(end), 0);
        self.data[at..end].copy_from_slice(bytes);
        let parts = std::mem::take(&mut self.unsure);
        for r in parts {
            for part in [r.start..r.end.min(at), r.start.max(end)..r.end] {
                if part.start < part.end {
                    self.unsure.push(part);
                }
            }
        }
    }

    /// Records that a write has failed.
    pub fn failed(&mut self, range: Range<usize>) {
        let range = range.start..range.end.min(self.data.len());
        if range.start < range.end {
            self.unsure.push(range.clone());
            self.wild.push(range);
        }
    }

    fn live_differs(&self, found: &[u8]) -> Option<String> {
        if found.len() != self.data.len() {
            return Some(format!("{} bytes, not {}", found.len(), self.data.len()));
        }
        let i = (0..found.len())
            .find(|i| found[*i] != self.data[*i] && !self.unsure.iter().any(|r| r.contains(i)))?;
        Some(format!(
            "byte {i} of {} is {}, not {}",
            found.len(),
            found[i],
            self.data[i]
        ))
    }

    fn cut_differs(&self, found: &[u8]) -> Option<String> {
        let least = self.least.unwrap_or(self.synced).min(self.synced);
        if found.len() < least || found.len() > self.data.len() {
            let (synced, all) = (self.synced, self.data.len());
            return Some(format!(
                "{} bytes; {synced} synced, {all} written",
                found.len()
            ));
        }
        let fine = |i: usize| {
            let covers = |r: &Range<usize>| r.contains(&i);
            let old = |(at, old): &(usize, Vec<u8>)| {
                i.checked_sub(*at).and_then(|k| old.get(k)) == Some(&found[i])
            };
            found[i] == self.data[i]
                || self.unsure.iter().any(covers)
                || self.wild.iter().any(covers)
                || self.before.iter().any(old)
        };
        let i = (0..found.len()).find(|i| !fine(*i))?;
        let (len, synced) = (found.len(), self.synced);
        Some(format!(
            "byte {i} of {len} ({synced} synced) is {}, not {}",
            found[i], self.data[i]
        ))
    }
}

/// Files by number, and their names.
#[derive(Clone, Default, Debug)]
pub struct Promises {
    pub files: Vec<Promise>,
    pub names: BTreeMap<String, usize>,
    /// Other names that may be found after a remount, since the outcome of a change is open.
    pub open: Vec<BTreeMap<String, usize>>,
}

/// The strictness of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// Nothing: everything is as it was written.
    Nothing,
    /// An end of the mount that may have lost what was not synced.
    Cut,
    /// A kill: what was written is there; a change of open outcome may have been done.
    Kill,
}

impl Promises {
    /// Returns the differences of a mounted file system.
    pub fn differ(&self, fs: &FileSystem, after: After) -> Option<String> {
        let there = fs.list("/").unwrap();
        let found: Vec<String> = there.iter().map(|e| format!("/{}", e.name)).collect();
        let mut candidates = vec![&self.names];
        if after != After::Nothing {
            candidates.extend(&self.open);
        }
        let mut why = Vec::new();
        for names in candidates {
            if !names.keys().eq(&found) {
                why.push(format!("names {found:?}, not {:?}", names.keys()));
                continue;
            }
            match self.files_differ(fs, names, after) {
                None => return None,
                Some(text) => why.push(text),
            }
        }
        Some(why.join("; or "))
    }

    fn files_differ(
        &self,
        fs: &FileSystem,
        names: &BTreeMap<String, usize>,
        after: After,
    ) -> Option<String> {
        names.iter().find_map(|(path, number)| {
            let f = fs.open(path, OpenOptions::READ).unwrap();
            let mut out = vec![0; usize::try_from(f.len()).unwrap()];
            match f.read_at(0, &mut out) {
                Ok(n) if n == out.len() => {}
                other => return Some(format!("{path} cannot be read: {other:?}")),
            }
            let promise = &self.files[*number];
            let differs = match after {
                After::Nothing | After::Kill if promise.least.is_none() => {
                    promise.live_differs(&out)
                }
                _ => promise.cut_differs(&out),
            };
            differs.map(|text| format!("{path}: {text}"))
        })
    }

    /// Takes what a mounted file system has for what it must have.
    pub fn adopt(&mut self, fs: &FileSystem) {
        *self = Promises::default();
        for entry in fs.list("/").unwrap() {
            let path = format!("/{}", entry.name);
            let f = fs.open(&path, OpenOptions::READ).unwrap();
            let mut data = vec![0; usize::try_from(f.len()).unwrap()];
            assert_eq!(f.read_at(0, &mut data).unwrap(), data.len());
            let synced = data.len();
            self.names.insert(path, self.files.len());
            self.files.push(Promise {
                data,
                synced,
                ..Promise::default()
            });
        }
    }
}
