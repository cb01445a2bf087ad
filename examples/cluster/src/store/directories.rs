//! The directories of states and snapshots, and the file that says which of them count.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pumice::fs::OpenOptions;
use pumice::{FileSystem, FsError};
use serde::{Deserialize, Serialize};

use super::{StoreError, decode, encode};
use crate::SnapshotMeta;

/// The file that names the directories that count.
const CURRENT: &str = "/current";
/// The file with the next content of it.
const CURRENT_NEW: &str = "/current.new";
/// The longest content of it that is read.
const MAX_CURRENT_BYTES: u64 = 1 << 20;
/// The first letters of the directories that are removed unless [`CURRENT`] names them.
const PREFIXES: [&str; 2] = ["state-", "snapshot-"];

/// A directory that is removed with all that is in it when its last user is gone, unless it is kept.
#[derive(Debug)]
pub struct Directory {
    fs: FileSystem,
    path: String,
    kept: AtomicBool,
    /// The store whose directory it is.
    home: Arc<()>,
}

impl Directory {
    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn fs(&self) -> &FileSystem {
        &self.fs
    }

    pub fn keep(&self) {
        self.kept.store(true, Ordering::Release);
    }

    /// Lets the last user remove it.
    pub fn retire(&self) {
        self.kept.store(false, Ordering::Release);
    }

    pub fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Acquire)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if self.is_kept() {
            return;
        }
        // The next opening of the store removes what stays.
        if let Err(error) = remove_tree(&self.fs, &self.path) {
            tracing::warn!("{} could not be removed: {error}", self.path);
        }
    }
}

/// Removes a directory with all that is in it. It may be missing.
pub fn remove_tree(fs: &FileSystem, path: &str) -> Result<(), FsError> {
    let entries = match fs.list(path) {
        Ok(entries) => entries,
        Err(FsError::NotFound { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let below = format!("{path}/{}", entry.name);
        if entry.is_dir {
            remove_tree(fs, &below)?;
        } else {
            fs.unlink(&below)?;
        }
    }
    fs.rmdir(path)
}

/// The directories that count.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Current {
    /// The path of the state's database.
    pub state: String,
    /// The snapshot that is sent to other nodes.
    pub snapshot: Option<CurrentSnapshot>,
}

/// The directory of a snapshot, with what is in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CurrentSnapshot {
    pub path: String,
    pub meta: SnapshotMeta,
}

/// The directories of a store.
pub struct Directories {
    fs: FileSystem,
    home: Arc<()>,
    next: u64,
}

impl Directories {
    /// Reads which directories count and removes the others.
    pub fn open(fs: &FileSystem) -> Result<(Directories, Option<Current>), StoreError> {
        let current = read_current(fs)?;
        let is_current = |path: &str| {
            let named = |current: &Current| {
                let snapshot = current.snapshot.as_ref();
                current.state == path || snapshot.is_some_and(|snapshot| snapshot.path == path)
            };
            current.as_ref().is_some_and(named)
        };
        let mut next = 0;
        for entry in fs.list("/")? {
            let Some(rest) = PREFIXES.iter().find_map(|p| entry.name.strip_prefix(p)) else {
                continue;
            };
            let digits = rest.split(|c: char| !c.is_ascii_digit()).next();
            let number = digits.and_then(|digits| digits.parse::<u64>().ok());
            next = next.max(number.map_or(0, |number| number.saturating_add(1)));
            let path = format!("/{}", entry.name);
            if entry.is_dir && !is_current(&path) {
                remove_tree(fs, &path)?;
            }
        }
        let directories = Directories {
            fs: fs.clone(),
            home: Arc::new(()),
            next,
        };
        Ok((directories, current))
    }

    /// Returns a directory that counts.
    pub fn existing(&self, path: &str) -> Arc<Directory> {
        self.directory(path.to_owned(), true)
    }

    /// Returns a name for a new state, which is not there yet.
    pub fn new_state(&mut self) -> Arc<Directory> {
        self.unused(PREFIXES[0])
    }

    /// Returns a name for a new snapshot, which is not there yet.
    pub fn new_snapshot(&mut self) -> Arc<Directory> {
        self.unused(PREFIXES[1])
    }

    fn unused(&mut self, prefix: &str) -> Arc<Directory> {
        let path = format!("/{prefix}{}", self.next);
        self.next += 1;
        self.directory(path, false)
    }

    fn directory(&self, path: String, kept: bool) -> Arc<Directory> {
        Arc::new(Directory {
            fs: self.fs.clone(),
            path,
            kept: AtomicBool::new(kept),
            home: Arc::clone(&self.home),
        })
    }

    /// Whether it is a directory of this store that does not count yet.
    pub fn is_new(&self, directory: &Directory) -> bool {
        Arc::ptr_eq(&self.home, &directory.home) && !directory.is_kept()
    }

    /// Makes other directories count, in one step. It is durable on return. After an error either may count.
    pub fn switch(&self, current: &Current) -> Result<(), StoreError> {
        let bytes = encode(CURRENT, current)?;
        let how = OpenOptions::FRESH.essential(true);
        let file = self.fs.open(CURRENT_NEW, how)?;
        file.append(&bytes)?;
        file.sync()?;
        drop(file);
        self.fs.rename(CURRENT_NEW, CURRENT)?;
        Ok(())
    }
}

fn read_current(fs: &FileSystem) -> Result<Option<Current>, StoreError> {
    let file = match fs.open(CURRENT, OpenOptions::READ) {
        Ok(file) => file,
        Err(FsError::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let len = Some(file.len()).filter(|len| *len <= MAX_CURRENT_BYTES);
    let Some(len) = len.and_then(|len| usize::try_from(len).ok()) else {
        return Err(StoreError::inconsistent(CURRENT, "it is too long"));
    };
    let mut bytes = vec![0; len];
    let read = file.read_at(0, &mut bytes)?;
    decode(CURRENT, &bytes[..read]).map(Some)
}
