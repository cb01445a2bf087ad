//! Checkpoints, backups, and copies outside the file system.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use pumice_blobfs::fs as blob;
use pumice_blobfs::fs::{FileSystem, FsError};
use pumice_io::process::PerProcess;
use pumice_rocksdb_fs::{from_root, normal};
use rocksdb::Env;
use rocksdb::backup::{BackupEngine, BackupEngineInfo, BackupEngineOptions, RestoreOptions};

use crate::handle::DbHandle;
use crate::{Db, DbOptions, Error};

/// The checkpoint of an export. A process that was killed while exporting leaves it, and the next
/// export removes it.
const EXPORTED: &str = "/.pumice-export";

/// The directory of a restore until it is complete. A process that was killed while restoring leaves it, and the next
/// restore removes it.
const RESTORED: &str = "/.pumice-restore";

/// Refuses a path of the file system below which exports and restores work, and remove what is there: neither a database nor
/// a copy of one can be there.
///
/// # Errors
/// [`Error::Directory`]; [`Error::FileSystem`] if it is not a path.
pub fn check_free(path: &str) -> Result<(), Error> {
    let path = normal(path)?;
    let within = |dir: &str| path == dir || path.starts_with(&format!("{dir}/"));
    if within(EXPORTED) || within(RESTORED) {
        let reason = "exports and restores work there; choose another directory".to_owned();
        return Err(Error::Directory { path, reason });
    }
    Ok(())
}

/// Bytes that an export copies at a time.
const PIECE: usize = 1 << 20;

impl<D: DbHandle> Db<D> {
    /// Makes a copy of the database in its current state at `path` of the same file system, which
    /// can be opened on its own. Tables are linked and not copied, as long as a file can have
    /// another link. `path` must not exist.
    ///
    /// # Errors
    /// [`Error::Directory`] if there is something at `path`, [`Error::FileSystem`], [`Error::RocksDb`].
    pub fn checkpoint(&self, path: &str) -> Result<(), Error> {
        check_free(path)?;
        self.checkpoint_at(path)
    }

    fn checkpoint_at(&self, path: &str) -> Result<(), Error> {
        if self.file_system().exists(&normal(path)?)? {
            let reason = "there is something; a checkpoint is made where nothing is".to_owned();
            let path = path.to_owned();
            return Err(Error::Directory { path, reason });
        }
        self.held.keep_recorded_options()?;
        let made = Made::parents_of(self.file_system(), path)?;
        self.rocksdb().checkpoint_to(&self.inside(path)?)?;
        made.keep();
        Ok(())
    }

    /// Adds a backup of the database, including its memtables, to those at `path` of the same file
    /// system. Files of an earlier backup there are not copied again.
    ///
    /// # Errors
    /// [`Error::FileSystem`], [`Error::RocksDb`], and [`Error::Unsupported`] for a [`TransactionDb`](crate::TransactionDb).
    pub fn backup(&self, path: &str) -> Result<(), Error> {
        check_free(path)?;
        self.held.keep_recorded_options()?;
        let mut made = Made::parents_of(self.file_system(), path)?;
        made.expect_backups(path)?;
        let mut engine = self.engine(path)?;
        let backed_up = self.rocksdb().back_up(&mut engine);
        // What is left of one that failed is removed after the engine has ended its work.
        drop(engine);
        backed_up?;
        made.keep();
        Ok(())
    }

    /// Returns the backups at `path`, oldest first, or none if there are none.
    ///
    /// # Errors
    /// [`Error::FileSystem`], [`Error::RocksDb`].
    pub fn backups(&self, path: &str) -> Result<Vec<BackupEngineInfo>, Error> {
        if !holds_backups(self.file_system(), path)? {
            return Ok(Vec::new());
        }
        Ok(self.engine(path)?.get_backup_info())
    }

    /// Restores the latest backup at `path` into the directory `to`, which must be missing or
    /// empty, and from which [`DbOptions::path`](crate::DbOptions::path) opens it. If it fails,
    /// nothing of it is left.
    ///
    /// # Errors
    /// [`Error::Directory`] if there is no backup at `path`, if the latest one is damaged, or if something is at `to`;
    /// [`Error::FileSystem`], [`Error::RocksDb`].
    pub fn restore_backup(&self, path: &str, to: &str) -> Result<(), Error> {
        if normal(to)? == self.directory() {
            return Err(not_restorable(
                self.directory().to_owned(),
                "it is the directory of this database, which is open",
            ));
        }
        restore(
            self.file_system(),
            self.env(),
            self.directory(),
            (path, to),
            None,
        )
        .map(drop)
    }

    /// Copies the database in its current state, memtables included, to the directory `to` of the
    /// kernel's file system, where RocksDB opens it without Pumice, and `pumice cp` brings it back.
    /// The directory must be missing or empty. One that was missing is made private to the user, as
    /// the files are, and everything is durable on return. If it fails, nothing of it is left. Puts go on meanwhile: a checkpoint holds the
    /// state, so that tables stay until they are copied.
    ///
    /// # Errors
    /// [`Error::Outside`] if the directory is not empty or cannot be written, [`Error::FileSystem`],
    /// [`Error::RocksDb`].
    pub fn export(&self, to: &Path) -> Result<(), Error> {
        static ONE: PerProcess<Mutex<()>> = PerProcess::new(Mutex::default);
        let _one = ONE.get().lock().unwrap_or_else(PoisonError::into_inner);
        let outside = Outside::new(to)?;
        let exported = || Made {
            fs: self.file_system(),
            dirs: vec![EXPORTED.to_owned()],
            filled: Some(EXPORTED.to_owned()),
        };
        // What a killed process has left.
        drop(exported());
        let _removed_at_last = exported();
        self.checkpoint_at(EXPORTED)?;
        let entries = self.file_system().list(EXPORTED)?;
        for name in current_last(entries.into_iter().map(|entry| entry.name).collect()) {
            let path = format!("{EXPORTED}/{name}");
            let file = self.file_system().open(&path, blob::OpenOptions::READ)?;
            outside.write(&name, &file)?;
        }
        outside.keep()
    }

    fn engine(&self, path: &str) -> Result<BackupEngine, Error> {
        engine(self.env(), &self.inside(path)?)
    }

    /// Returns `path` of the file system as the database's environment names it.
    fn inside(&self, path: &str) -> Result<String, Error> {
        Ok(from_root(self.directory(), &normal(path)?))
    }
}

impl DbOptions {
    /// Restores the latest backup at `backup` of the file system, which [`Db::backup`] has made, into the directory
    /// [`DbOptions::path`], which must be missing or empty, without a database that is open. If it fails, nothing of it is
    /// left.
    ///
    /// ```
    /// # use pumice::{DbOptions, MountOptions};
    /// let fs = pumice::mount("malloc://256M", &MountOptions::new())?;
    /// let db = DbOptions::new().path("/orders").open_in(&fs)?;
    /// db.put(b"key", b"value")?;
    /// db.backup("/backups")?;
    /// db.close()?;
    /// drop(db);
    /// DbOptions::new().path("/orders").destroy_in(&fs)?;
    ///
    /// let options = DbOptions::new().path("/again");
    /// options.restore_in(&fs, "/backups")?;
    /// let db = options.open_in(&fs)?;
    /// assert_eq!(db.get(b"key")?.as_deref(), Some(&b"value"[..]));
    /// # db.close()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Directory`] if there is no backup at `backup`, if the latest one is damaged, or if something is at the
    /// path; [`Error::FileSystem`], [`Error::RocksDb`].
    pub fn restore_in(&self, fs: &FileSystem, backup: &str) -> Result<(), Error> {
        self.restore_backup_in(fs, backup, None).map(drop)
    }

    /// Restores as [`DbOptions::restore_in`] does, the backup with this number or the latest one, and returns its number.
    ///
    /// # Errors
    /// Fails as [`DbOptions::restore_in`] does, and with [`Error::Directory`] if there is no backup of this number.
    pub fn restore_backup_in(
        &self,
        fs: &FileSystem,
        backup: &str,
        number: Option<u32>,
    ) -> Result<u32, Error> {
        let env = self.env.clone().root("/").build(fs)?;
        restore(fs, &env, "/", (backup, &self.path), number)
    }
}

/// Restores a backup at `backup`, the latest one without a number, into `to`, and returns its number. `root` is the directory
/// that `env` calls `/`.
fn restore(
    fs: &FileSystem,
    env: &Env,
    root: &str,
    (backup, to): (&str, &str),
    number: Option<u32>,
) -> Result<u32, Error> {
    static ONE: PerProcess<Mutex<()>> = PerProcess::new(Mutex::default);
    let _one = ONE.get().lock().unwrap_or_else(PoisonError::into_inner);
    check_restorable(fs, to)?;
    let recorded = recorded_backups(fs, backup)?;
    let refuse = |reason: String| Error::Directory {
        path: backup.to_owned(),
        reason,
    };
    if recorded.is_empty() {
        return Err(refuse(
            "there is no backup in it; `Db::backup` makes one".to_owned(),
        ));
    }
    let inside = |path: &str| Ok::<_, Error>(from_root(root, &normal(path)?));
    let mut engine = engine(env, &inside(backup)?)?;
    let infos = engine.get_backup_info();
    let sound: Vec<u32> = infos.iter().map(|info| info.backup_id).collect();
    let number = chosen(&recorded, &sound, number).map_err(refuse)?;
    let unfinished = || Made {
        fs,
        dirs: vec![RESTORED.to_owned()],
        filled: Some(RESTORED.to_owned()),
    };
    // What a killed process has left.
    drop(unfinished());
    let made = unfinished();
    let parents = Made::parents_of(fs, to)?;
    let into = inside(RESTORED)?;
    let restored = engine.restore_from_backup(&into, &into, &RestoreOptions::default(), number);
    // After an error its threads may still copy, and it waits for them when it is dropped. What they have made is removed
    // after that.
    drop(engine);
    restored?;
    fs.rename(RESTORED, &normal(to)?)?;
    parents.keep();
    made.keep();
    Ok(number)
}

/// Returns the number of the backup to restore, or the reason why there is none. RocksDB opens a directory of backups without
/// those that are damaged, so the numbers of its files are compared.
fn chosen(recorded: &[u32], sound: &[u32], number: Option<u32>) -> Result<u32, String> {
    let list = |numbers: &[u32]| {
        let texts: Vec<String> = numbers.iter().map(u32::to_string).collect();
        texts.join(", ")
    };
    let wanted = number.or_else(|| recorded.iter().max().copied());
    if let Some(wanted) = wanted.filter(|wanted| sound.contains(wanted)) {
        return Ok(wanted);
    }
    let wanted = wanted.unwrap_or_default();
    let others = match sound.last() {
        Some(last) => format!(
            "these can be restored: {}; `pumice db restore --backup {last}` restores one of them",
            list(sound)
        ),
        None => "none of them can be restored".to_owned(),
    };
    if !recorded.contains(&wanted) {
        return Err(format!("there is no backup {wanted}; {others}"));
    }
    let damaged: Vec<u32> = recorded
        .iter()
        .copied()
        .filter(|number| !sound.contains(number))
        .collect();
    let what = if damaged.len() == 1 {
        "backup"
    } else {
        "backups"
    };
    let verb = if damaged.len() == 1 { "is" } else { "are" };
    Err(format!(
        "{what} {} {verb} damaged; {others}",
        list(&damaged)
    ))
}

/// Returns the numbers of the backups in a directory, damaged or not, in order.
fn recorded_backups(fs: &FileSystem, path: &str) -> Result<Vec<u32>, Error> {
    if !holds_backups(fs, path)? {
        return Ok(Vec::new());
    }
    let files = fs.list(&format!("{}/meta", normal(path)?))?;
    let mut numbers: Vec<u32> = files
        .iter()
        .filter_map(|file| file.name.parse().ok())
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

fn engine(env: &Env, path: &str) -> Result<BackupEngine, Error> {
    Ok(BackupEngine::open(&BackupEngineOptions::new(path)?, env)?)
}

fn not_restorable(path: String, reason: &str) -> Error {
    let reason = format!("{reason}; a backup is restored into a missing or empty directory");
    Error::Directory { path, reason }
}

/// Checks that the directory is missing or empty: its content could be a database.
fn check_restorable(fs: &FileSystem, to: &str) -> Result<(), Error> {
    let path = normal(to)?;
    check_free(&path)?;
    let refuse = |reason: &str| Err(not_restorable(path.clone(), reason));
    match fs.list(&path) {
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

/// Whether the directory has the files that RocksDB's backup engine makes. The engine makes missing ones, so it is not asked
/// about any other place.
fn holds_backups(fs: &FileSystem, path: &str) -> Result<bool, Error> {
    match fs.stat(&format!("{}/meta", normal(path)?)) {
        Ok(stat) => Ok(stat.is_dir),
        Err(FsError::NotFound { .. } | FsError::NotDir { .. }) => Ok(false),
        Err(e) => Err(e.into()),
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

    /// Adds the directories that RocksDB's backup engine makes in `path`, as far as they are missing.
    fn expect_backups(&mut self, path: &str) -> Result<(), Error> {
        let path = normal(path)?;
        for dir in ["", "/meta", "/private", "/shared", "/shared_checksum"] {
            let dir = format!("{path}{dir}");
            if !self.fs.exists(&dir)? {
                self.dirs.push(dir);
            }
        }
        Ok(())
    }

    fn dir(&mut self, path: &str) -> Result<(), Error> {
        match self.fs.mkdir(path) {
            Ok(()) => self.dirs.push(path.to_owned()),
            Err(FsError::Exists { .. }) if self.fs.stat(path)?.is_dir => {}
            Err(FsError::Exists { .. }) => {
                let reason = "is a file, and a directory is needed".to_owned();
                let path = path.to_owned();
                return Err(Error::Directory { path, reason });
            }
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
                    tracing::warn!(path, %error, "a file that nobody needs stays");
                }
            }
        }
        for dir in self.dirs.drain(..).rev() {
            // One that is used by now stays.
            let _ = self.fs.rmdir(&dir);
        }
    }
}

/// Puts the file that makes a directory a database last, so that RocksDB does not open a part.
fn current_last(mut names: Vec<String>) -> Vec<String> {
    names.sort_by_key(|name| name == "CURRENT");
    names
}

/// A directory of the kernel's file system that is being filled, and is removed if that fails.
struct Outside {
    dir: PathBuf,
    /// Whether it was missing.
    made: bool,
    kept: bool,
}

impl Outside {
    fn new(dir: &Path) -> Result<Outside, Error> {
        let made = match DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(outside(dir, e)),
        };
        let mut entries = dir.read_dir().map_err(|e| outside(dir, e))?;
        if entries.next().is_some() {
            let error = io::Error::from_raw_os_error(libc::ENOTEMPTY);
            return Err(outside(dir, error));
        }
        Ok(Outside {
            dir: dir.to_owned(),
            made,
            kept: false,
        })
    }

    /// Copies a file into it.
    fn write(&self, name: &str, file: &blob::File) -> Result<(), Error> {
        let path = self.dir.join(name);
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let mut copy = options.open(&path).map_err(|e| outside(&path, e))?;
        let mut piece = vec![0; PIECE];
        let mut at = 0;
        loop {
            let got = file.read_at(at, &mut piece)?;
            if got == 0 {
                return copy.sync_all().map_err(|e| outside(&path, e));
            }
            let written = copy.write_all(&piece[..got]);
            written.map_err(|e| outside(&path, e))?;
            at += got as u64;
        }
    }

    /// Makes the names durable, and the directory permanent.
    fn keep(mut self) -> Result<(), Error> {
        let parent = match self.dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        for dir in [self.dir.as_path(), parent] {
            let synced = File::open(dir).and_then(|dir| dir.sync_all());
            synced.map_err(|e| outside(dir, e))?;
        }
        self.kept = true;
        Ok(())
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // It was empty, so that everything in it is from here.
        for entry in self.dir.read_dir().into_iter().flatten().flatten() {
            let _ = std::fs::remove_file(entry.path());
        }
        if self.made {
            let _ = std::fs::remove_dir(&self.dir);
        }
    }
}

fn outside(path: &Path, source: io::Error) -> Error {
    Error::Outside {
        path: path.display().to_string(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_an_export_is_not_a_database() {
        let names = ["000012.sst", "CURRENT", "MANIFEST-000005", "OPTIONS-000007"];
        let ordered = current_last(names.map(str::to_owned).to_vec());
        assert_eq!(ordered.last().map(String::as_str), Some("CURRENT"));
        assert_eq!(ordered.len(), names.len());
    }
}
