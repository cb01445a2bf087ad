//! The files of a snapshot, as they are read for another node and written by one that receives them.

use std::sync::Arc;

use pumice::fs::OpenOptions;
use serde::{Deserialize, Serialize};

use super::directories::Directory;
use super::{StoreError, blocking};

/// The longest name of a file. RocksDB's have about 20 bytes.
const MAX_NAME_BYTES: usize = 64;

/// The name and the length of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLen {
    /// The name in the directory.
    pub name: String,
    /// The length in bytes.
    pub len_bytes: u64,
}

/// The files of a snapshot. They stay as long as this does, also when another snapshot takes its place.
#[derive(Debug, Clone)]
pub struct Files {
    directory: Arc<Directory>,
}

impl Files {
    pub(super) fn new(directory: Arc<Directory>) -> Files {
        Files { directory }
    }

    pub(super) fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Returns the names and lengths of the files.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn list(&self) -> Result<Vec<FileLen>, StoreError> {
        let directory = Arc::clone(&self.directory);
        blocking(move || list(&directory)).await
    }

    /// Reads a part of a file, at most `len` bytes.
    ///
    /// # Errors
    /// [`StoreError`], also if the file is not there.
    pub async fn read(&self, name: &str, at: u64, len: usize) -> Result<Vec<u8>, StoreError> {
        let (directory, path) = (Arc::clone(&self.directory), self.path(name)?);
        blocking(move || {
            let file = directory.fs().open(&path, OpenOptions::READ)?;
            let mut bytes = vec![0; len];
            let read = file.read_at(at, &mut bytes)?;
            bytes.truncate(read);
            Ok(bytes)
        })
        .await
    }

    /// Adds bytes to the end of a file, which must be at `at`. The file is created by its first bytes.
    ///
    /// # Errors
    /// [`StoreError`], also if the end is elsewhere.
    pub async fn append(&self, name: &str, at: u64, bytes: Vec<u8>) -> Result<(), StoreError> {
        let (directory, path) = (Arc::clone(&self.directory), self.path(name)?);
        blocking(move || {
            let file = directory.fs().open(&path, OpenOptions::CREATE)?;
            if file.len() != at {
                let reason = format!(
                    "it ends at {}, and the next bytes are those at {at}",
                    file.len()
                );
                return Err(StoreError::inconsistent(&path, reason));
            }
            Ok(file.append(&bytes)?)
        })
        .await
    }

    /// Makes received files durable, and checks that they are those which were announced.
    ///
    /// # Errors
    /// [`StoreError`], also if a file is missing, has another length or was not announced.
    pub async fn complete(&self, announced: Vec<FileLen>) -> Result<(), StoreError> {
        let directory = Arc::clone(&self.directory);
        blocking(move || {
            let mut announced = announced;
            announced.sort_by(|a, b| a.name.cmp(&b.name));
            let found = list(&directory)?;
            if found != announced {
                let reason = format!("it has {found:?}, and {announced:?} was announced");
                return Err(StoreError::inconsistent(directory.path(), reason));
            }
            for file in &found {
                let path = format!("{}/{}", directory.path(), file.name);
                directory.fs().open(&path, OpenOptions::READ)?.sync()?;
            }
            Ok(())
        })
        .await
    }

    /// Returns the path of a file of that name, which may come from another node.
    fn path(&self, name: &str) -> Result<String, StoreError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let dots = name.chars().all(|c| c == '.');
        if name.len() > MAX_NAME_BYTES || dots || !name.chars().all(plain) {
            let reason = format!("a snapshot has no file of the name {name:?}");
            return Err(StoreError::inconsistent(self.directory.path(), reason));
        }
        Ok(format!("{}/{name}", self.directory.path()))
    }
}

/// Returns the files of a directory, in order of their names.
fn list(directory: &Directory) -> Result<Vec<FileLen>, StoreError> {
    let entries = directory.fs().list(directory.path())?;
    let files = entries.into_iter().filter(|entry| !entry.is_dir);
    Ok(files
        .map(|entry| FileLen {
            name: entry.name,
            len_bytes: entry.len,
        })
        .collect())
}
