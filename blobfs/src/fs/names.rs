//! Names in memory: a map from path to file or directory.
//!
//! [`Names::ops`] serialises changes and is held while they are made durable. The map's own lock is
//! held only to look at or change an entry, never during I/O.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use crossbeam::atomic::AtomicCell;
use parking_lot::{Mutex, RwLock};

use super::error::{FsError, Result};
use super::inode::{Inode, Life, now_ns};
use super::path;
use crate::blobstore::BlobId;

/// A directory.
pub(crate) struct Dir {
    /// The blob of the directory, or `None` if only the names of files imply the directory.
    pub marker: Mutex<Option<BlobId>>,
    /// Time of the last change of its entries in memory, or the one that was set.
    pub mtime_ns: AtomicU64,
    pub mode: AtomicCell<Option<u32>>,
}

impl Dir {
    pub fn new(marker: Option<BlobId>, mtime_ns: u64, mode: Option<u32>) -> Dir {
        Dir {
            marker: Mutex::new(marker),
            mtime_ns: AtomicU64::new(mtime_ns),
            mode: AtomicCell::new(mode),
        }
    }
}

/// The file or directory of a path.
#[derive(Clone)]
pub(crate) enum Entry {
    File(Arc<Inode>),
    Dir(Arc<Dir>),
}

/// State that the holder of `ops` may change.
pub(crate) struct Ops {
    /// The next value of the xattr `pumice.seq`.
    pub seq: u64,
    /// Directories whose rename has failed and whose intent could not be removed.
    pub intents: Vec<BlobId>,
}

/// The entries by path, and the number of files that they name.
pub(crate) struct NameMap {
    entries: BTreeMap<String, Entry>,
    files: u64,
}

impl NameMap {
    pub fn new(entries: BTreeMap<String, Entry>) -> NameMap {
        let mut map = NameMap { entries, files: 0 };
        for entry in map.entries.values() {
            map.files += u64::from(entry.gain_name());
        }
        map
    }

    /// Adds an entry. The one that the path had is no longer named by it.
    pub fn insert(&mut self, path: String, entry: Entry) {
        self.files += u64::from(entry.gain_name());
        if let Some(old) = self.entries.insert(path, entry) {
            self.files -= u64::from(old.lose_name());
        }
    }

    pub fn remove(&mut self, path: &str) {
        if let Some(old) = self.entries.remove(path) {
            self.files -= u64::from(old.lose_name());
        }
    }

    /// Number of files, each counted once however many names it has.
    pub fn files(&self) -> u64 {
        self.files
    }
}

impl std::ops::Deref for NameMap {
    type Target = BTreeMap<String, Entry>;

    fn deref(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }
}

impl Entry {
    /// Counts one more name. Returns whether it is a file's first one.
    fn gain_name(&self) -> bool {
        matches!(self, Entry::File(ino) if ino.entries.fetch_add(1, Ordering::Relaxed) == 0)
    }

    /// Counts one name less. Returns whether it was a file's last one.
    fn lose_name(&self) -> bool {
        matches!(self, Entry::File(ino) if ino.entries.fetch_sub(1, Ordering::Relaxed) == 1)
    }
}

/// The names of the file system; see the module.
pub(crate) struct Names {
    pub map: RwLock<NameMap>,
    /// The root, which has no entry in the map and no blob.
    pub root: Arc<Dir>,
    pub ops: Mutex<Ops>,
    /// Blobs of files that have a lock (`LOCK`).
    pub locked: Mutex<HashSet<u64>>,
    /// Open files without a name.
    pub orphans: Mutex<HashMap<u64, Weak<Inode>>>,
}

impl Names {
    pub fn new(map: BTreeMap<String, Entry>, seq: u64) -> Names {
        Names {
            map: RwLock::new(NameMap::new(map)),
            root: Arc::new(Dir::new(None, 0, None)),
            ops: Mutex::new(Ops {
                seq,
                intents: Vec::new(),
            }),
            locked: Mutex::default(),
            orphans: Mutex::default(),
        }
    }

    /// Returns the entry of `path`. The root has no entry.
    pub fn get(&self, path: &str) -> Option<Entry> {
        self.map.read().get(path).cloned()
    }

    /// Records that the entries of `dir` have changed.
    pub fn touch(&self, dir: &str) {
        let now = now_ns();
        match self.map.read().get(dir) {
            Some(Entry::Dir(dir)) => dir.mtime_ns.store(now, Ordering::Relaxed),
            Some(Entry::File(_)) => {}
            None => self.root.mtime_ns.store(now, Ordering::Relaxed),
        }
    }

    /// Returns the file at `path` with one more handle counted, unless it is about to be deleted.
    pub fn open_file(&self, path: &str) -> Result<Option<Opened>> {
        if path == "/" {
            return Err(FsError::IsDir {
                path: path.to_owned(),
            });
        }
        let map = self.map.read();
        match map.get(path) {
            None => Ok(None),
            Some(Entry::Dir(_)) => Err(FsError::IsDir {
                path: path.to_owned(),
            }),
            Some(Entry::File(ino)) if ino.life.load() == Life::Dying => Ok(Some(Opened::Dying)),
            Some(Entry::File(ino)) => {
                ino.opens.fetch_add(1, Ordering::SeqCst);
                Ok(Some(Opened::File(Arc::clone(ino))))
            }
        }
    }

    /// Returns every file once. Takes time linear in their number.
    pub fn inodes(&self) -> Vec<Arc<Inode>> {
        let map = self.map.read();
        let mut seen = HashSet::with_capacity(map.len());
        map.values()
            .filter_map(|e| match e {
                Entry::File(ino) if seen.insert(ino.id.0) => Some(Arc::clone(ino)),
                _ => None,
            })
            .collect()
    }

    /// Counts one more handle of a file, so that it is not deleted meanwhile. Returns false if it has no name or is about to lose
    /// its last one.
    pub fn hold(&self, ino: &Inode) -> bool {
        let _map = self.map.read();
        let named = ino.life.load() == Life::Named;
        if named {
            ino.opens.fetch_add(1, Ordering::SeqCst);
        }
        named
    }

    /// Returns every file once, with one more handle counted so that none is deleted meanwhile.
    /// Leaves out those that are about to be deleted.
    pub fn hold_files(&self) -> Vec<Arc<Inode>> {
        let map = self.map.read();
        let mut seen = HashSet::with_capacity(map.len());
        let mut held = Vec::new();
        for entry in map.values() {
            if let Entry::File(ino) = entry
                && ino.life.load() != Life::Dying
                && seen.insert(ino.id.0)
            {
                ino.opens.fetch_add(1, Ordering::SeqCst);
                held.push(Arc::clone(ino));
            }
        }
        held
    }

    /// Checks that `dir` can have entries.
    ///
    /// # Errors
    /// Fails when it does not exist, or is a file.
    pub fn check_dir(&self, dir: &str) -> Result<()> {
        if dir == "/" {
            return Ok(());
        }
        match self.map.read().get(dir) {
            Some(Entry::Dir(_)) => Ok(()),
            Some(Entry::File(_)) => Err(FsError::NotDir {
                path: dir.to_owned(),
            }),
            None => Err(FsError::not_found(dir)),
        }
    }

    /// Returns the entries directly in `dir`.
    pub fn children(&self, dir: &str) -> Vec<(String, Entry)> {
        let prefix = path::dir_prefix(dir);
        let map = self.map.read();
        let mut found = Vec::new();
        let mut from = Bound::Excluded(prefix.clone());
        loop {
            let mut next = None;
            for (p, entry) in map.range((from, Bound::Unbounded)) {
                if !p.starts_with(&prefix) {
                    break;
                }
                match p[prefix.len()..].find('/') {
                    None => found.push((p.clone(), entry.clone())),
                    // What is in a directory ends before its name with the character that follows the slash.
                    Some(end) => {
                        next = Some(format!("{}0", &p[..prefix.len() + end]));
                        break;
                    }
                }
            }
            match next {
                Some(next) => from = Bound::Included(next),
                None => return found,
            }
        }
    }

    /// Returns all entries whose path begins with `prefix`.
    pub fn below(&self, prefix: &str) -> Vec<(String, Entry)> {
        let map = self.map.read();
        let from = std::ops::Bound::Excluded(prefix.to_owned());
        map.range((from, std::ops::Bound::Unbounded))
            .take_while(|(p, _)| p.starts_with(prefix))
            .map(|(p, e)| (p.clone(), e.clone()))
            .collect()
    }

    /// Whether `dir` has no entries.
    pub fn is_empty_dir(&self, dir: &str) -> bool {
        let prefix = path::dir_prefix(dir);
        let map = self.map.read();
        let from = std::ops::Bound::Excluded(prefix.clone());
        !map.range((from, std::ops::Bound::Unbounded))
            .next()
            .is_some_and(|(p, _)| p.starts_with(&prefix))
    }
}

/// The result of [`Names::open_file`].
pub(crate) enum Opened {
    File(Arc<Inode>),
    /// The file is about to be deleted. Take the lock `ops` to wait for that, and look again.
    Dying,
}

/// Encodes a name as BlobFS stores it, with a NUL.
pub(crate) fn encode_name(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

/// Encodes several names as the xattrs store them.
pub(crate) fn encode_names<'a>(names: impl IntoIterator<Item = &'a String>) -> Vec<u8> {
    names.into_iter().flat_map(|n| encode_name(n)).collect()
}

/// Decodes names that [`encode_names`] encoded.
pub(crate) fn decode_names(bytes: &[u8]) -> Option<Vec<String>> {
    let bytes = bytes.strip_suffix(&[0])?;
    bytes
        .split(|b| *b == 0)
        .map(|n| String::from_utf8(n.to_vec()).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> Entry {
        Entry::Dir(Arc::new(Dir::new(None, 0, None)))
    }

    #[test]
    fn children_are_direct_and_complete() {
        let paths = ["/a", "/a-b", "/a.b", "/a/x", "/a/x/y", "/a/z", "/a0", "/b"];
        let map = paths.iter().map(|p| ((*p).to_owned(), dir())).collect();
        let names = Names::new(map, 1);
        let list =
            |d: &str| -> Vec<String> { names.children(d).into_iter().map(|(p, _)| p).collect() };
        assert_eq!(list("/a"), ["/a/x", "/a/z"]);
        assert_eq!(list("/"), ["/a", "/a-b", "/a.b", "/a0", "/b"]);
        assert!(names.is_empty_dir("/b"));
        assert!(!names.is_empty_dir("/a/x"));
        assert_eq!(names.below("/a/").len(), 3);
        assert!(names.check_dir("/").is_ok());
        assert!(matches!(
            names.check_dir("/c"),
            Err(FsError::NotFound { .. })
        ));
    }

    #[test]
    fn names_survive() {
        let names = vec!["/a".to_owned(), "/b/c".to_owned()];
        assert_eq!(decode_names(&encode_names(&names)), Some(names));
        assert_eq!(decode_names(b"/a"), None);
        assert_eq!(decode_names(b"\xff\0"), None);
    }
}
