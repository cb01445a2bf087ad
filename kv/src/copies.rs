//! Checkpoints and backups.

use pumice_blobfs::fs::{FileSystem, FsError};
use rocksdb::backup::{BackupEngine, BackupEngineInfo, BackupEngineOptions, RestoreOptions};
use rocksdb::checkpoint::Checkpoint;

use crate::plugin::{from_root, normal};
use crate::{Db, Error};

impl Db {
    /// A copy of the database as it is now, openable on its own, at `path` of the same file system:
    /// tables are linked, not copied, as long as a file can have another link. `path` must not exist.
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

    /// Adds a backup of the database, memtables and all, to the ones at `path` of the same file
    /// system; what an earlier backup there holds is not copied again.
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

    /// The backups at `path`, oldest first; none where nothing or something else is.
    ///
    /// # Errors
    /// [`Error::FileSystem`], [`Error::RocksDb`].
    pub fn backups(&self, path: &str) -> Result<Vec<BackupEngineInfo>, Error> {
        if !self.holds_backups(path)? {
            return Ok(Vec::new());
        }
        Ok(self.engine(path)?.get_backup_info())
    }

    /// Restores the latest backup at `path` into the directory `to`, which must be missing or empty,
    /// from where [`DbOptions::path`](crate::DbOptions::path) opens it. If it fails, nothing is left of it.
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

    /// A directory with anything in it may be somebody's database: this one's, or another's.
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

    /// Whether there is what RocksDB's engine makes for its backups. It makes it where it is missing,
    /// so it is not asked about any other place.
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

    /// `path` of the file system as the database's environment calls it.
    fn inside(&self, path: &str) -> Result<String, Error> {
        Ok(from_root(&self.root, &normal(path)?))
    }
}

/// Directories that were made for something, which go again if that fails.
struct Made<'a> {
    fs: &'a FileSystem,
    /// Outermost first.
    dirs: Vec<String>,
    /// What fills the innermost goes with it, because that was empty or missing.
    filled: Option<String>,
}

impl<'a> Made<'a> {
    /// RocksDB makes the directory itself, and takes those above for granted.
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

    /// It succeeded: they stay.
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
            // One that somebody uses by now stays.
            let _ = self.fs.rmdir(&dir);
        }
    }
}
