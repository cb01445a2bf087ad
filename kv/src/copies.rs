//! Checkpoints and backups.

use pumice_blobfs::fs::{FileSystem, FsError};
use rocksdb::backup::{BackupEngine, BackupEngineInfo, BackupEngineOptions, RestoreOptions};
use rocksdb::checkpoint::Checkpoint;

use crate::plugin::{from_root, normal};
use crate::{Db, Error};

impl Db {
    /// Makes a copy of the database in its current state at `path` of the same file system, which
    /// can be opened on its own. Tables are linked and not copied, as long as a file can have
    /// another link. `path` must not exist.
    ///
    /// # Errors
    /// [`Error::FileSystem`], [`Error::RocksDb`].
    pub fn checkpoint(&self, path: &str) -> Result<(), Error> {
        let checkpoint = Checkpoint::new(self.rocksdb())?;
        let made = Made::parents_of(&self.fs, path)?;
        checkpoint.create_checkpoint(self.inside(path)?)?;
        made.keep();
        Ok(())
    }

    /// Adds a backup of the database, including its memtables, to those at `path` of the same file
    /// system. Files of an earlier backup there are not copied again.
    ///
    /// # Errors
    /// [`Error::FileSystem`], [`Error::RocksDb`].
    pub fn backup(&self, path: &str) -> Result<(), Error> {
        let made = Made::parents_of(&self.fs, path)?;
        self.engine(path)?
            .create_new_backup_flush(self.rocksdb(), true)?;
        made.keep();
        Ok(())
    }

    /// Returns the backups at `path`, oldest first, or none if there are none.
    ///
    /// # Errors
    /// [`Error::FileSystem`], [`Error::RocksDb`].
    pub fn backups(&self, path: &str) -> Result<Vec<BackupEngineInfo>, Error> {
        if !self.holds_backups(path)? {
            return Ok(Vec::new());
        }
        Ok(self.engine(path)?.get_backup_info())
    }

    /// Restores the latest backup at `path` into the directory `to`, which must be missing or
    /// empty, and from which [`DbOptions::path`](crate::DbOptions::path) opens it. If it fails,
    /// nothing of it is left.
    ///
    /// # Errors
    /// [`Error::Directory`] if there is no backup at `path`, or something at `to`; [`Error::FileSystem`],
    /// [`Error::RocksDb`].
    pub fn restore_backup(&self, path: &str, to: &str) -> Result<(), Error> {
        if self.backups(path)?.is_empty() {
            return Err(Error::Directory {
                path: normal(path)?,
                reason: "there is no backup in it; `Db::backup` makes one".to_owned(),
            });
        }
        let mut engine = self.engine(path)?;
        self.check_restorable(to)?;
        let made = Made::with_parents(&self.fs, to)?;
        let to = self.inside(to)?;
        engine.restore_from_latest_backup(&to, &to, &RestoreOptions::default())?;
        made.keep();
        Ok(())
    }

    /// Checks that the directory is missing or empty: its content could be this database, or
    /// another one.
    fn check_restorable(&self, to: &str) -> Result<(), Error> {
        let path = normal(to)?;
        let refuse = |reason: &str| {
            Err(Error::Directory {
                path: path.clone(),
                reason: format!("{reason}; a backup is restored into a missing or empty directory"),
            })
        };
        if path == self.root {
            return refuse("it is the directory of this database, which is open");
        }
        match self.fs.list(&path) {
            Ok(entries) if entries.is_empty() => Ok(()),
            Ok(entries) if entries.iter().any(|entry| entry.name == "LOCK") => {
                refuse("it holds a database")
            }
            Ok(_) => refuse("it is not empty"),
            Err(FsError::NotFound { .. }) => Ok(()),
            Err(FsError::NotDir { .. }) => refuse("it is a file"),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether the directory has the files that RocksDB's backup engine makes. The engine makes
    /// missing ones, so it is not asked about any other place.
    fn holds_backups(&self, path: &str) -> Result<bool, Error> {
        match self.fs.stat(&format!("{}/meta", normal(path)?)) {
            Ok(stat) => Ok(stat.is_dir),
            Err(FsError::NotFound { .. } | FsError::NotDir { .. }) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn engine(&self, path: &str) -> Result<BackupEngine, Error> {
        let options = BackupEngineOptions::new(self.inside(path)?)?;
        Ok(BackupEngine::open(&options, self.env())?)
    }

    /// Returns `path` of the file system as the database's environment names it.
    fn inside(&self, path: &str) -> Result<String, Error> {
        Ok(from_root(&self.root, &normal(path)?))
    }
}

/// Directories that were made for an operation, and are removed if it fails.
struct Made<'a> {
    fs: &'a FileSystem,
    /// The directories, outermost first.
    dirs: Vec<String>,
    /// The innermost directory if it was empty or missing: then its content is removed too.
    filled: Option<String>,
}

impl<'a> Made<'a> {
    /// RocksDB makes the directory itself, but expects its parents.
    fn parents_of(fs: &'a FileSystem, path: &str) -> Result<Made<'a>, Error> {
        let path = normal(path)?;
        let mut made = Made {
            fs,
            dirs: Vec::new(),
            filled: None,
        };
        for (at, _) in path.match_indices('/').skip(1) {
            made.dir(&path[..at])?;
        }
        Ok(made)
    }

    fn with_parents(fs: &'a FileSystem, path: &str) -> Result<Made<'a>, Error> {
        let mut made = Made::parents_of(fs, path)?;
        let path = normal(path)?;
        made.dir(&path)?;
        made.filled = Some(path);
        Ok(made)
    }

    fn dir(&mut self, path: &str) -> Result<(), Error> {
        match self.fs.mkdir(path) {
            Ok(()) => self.dirs.push(path.to_owned()),
            Err(FsError::Exists { .. }) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    /// Keeps the directories, because the operation succeeded.
    fn keep(mut self) {
        self.dirs.clear();
        self.filled = None;
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        if let Some(dir) = self.filled.take() {
            for entry in self.fs.list(&dir).unwrap_or_default() {
                let path = format!("{dir}/{}", entry.name);
                if let Err(error) = self.fs.unlink(&path) {
                    tracing::warn!(path, %error, "a part of a failed restore stays");
                }
            }
        }
        for dir in self.dirs.drain(..).rev() {
            // One that is used by now stays.
            let _ = self.fs.rmdir(&dir);
        }
    }
}
