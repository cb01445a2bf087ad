//! The environment of rusty-leveldb on a BlobFS file system.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pumice_bdev::contents;
use pumice_blobfs::fs::{
    File, FileLock as Lock, FileSystem, FormatOptions, FsError, MountOptions, OpenOptions,
};
use rusty_leveldb::env::{Env, FileLock, Logger, RandomAccess};
use rusty_leveldb::{Options, Result, Status, StatusCode};

/// A mounted file system as the environment of databases. Clones share the mount. It may be used by many threads, and blocks
/// on the device.
#[derive(Debug, Clone)]
pub struct BlobFsEnv {
    fs: FileSystem,
    locks: Arc<Mutex<Vec<(String, Lock)>>>,
}

/// An open file, and the position of its reader.
struct EnvFile {
    file: File,
    at: u64,
}

impl BlobFsEnv {
    /// Uses a mounted file system.
    #[must_use]
    pub fn new(fs: FileSystem) -> BlobFsEnv {
        BlobFsEnv {
            fs,
            locks: Arc::default(),
        }
    }

    /// Opens the device that a URI names, and mounts its file system. A device that holds nothing but zeroes is formatted.
    ///
    /// # Errors
    /// Fails when the device cannot be opened, and when it holds anything but a file system of ours.
    pub fn open(uri: &str) -> std::result::Result<BlobFsEnv, FsError> {
        let dev = pumice_bdev::open(uri)?;
        if contents::recognise(&*dev)?.is_none() {
            FileSystem::format(Arc::clone(&dev), &FormatOptions::default())?;
        }
        FileSystem::mount(dev, &MountOptions::default()).map(BlobFsEnv::new)
    }

    /// Returns the crate's default options with this environment.
    #[must_use]
    pub fn options(&self) -> Options {
        Options {
            env: Rc::new(Box::new(self.clone())),
            ..rusty_leveldb::in_memory()
        }
    }

    /// The file system.
    #[must_use]
    pub fn file_system(&self) -> &FileSystem {
        &self.fs
    }

    /// Makes everything durable and releases the device. Close the databases first.
    ///
    /// # Errors
    /// Fails as [`FileSystem::unmount`] does.
    pub fn unmount(&self) -> std::result::Result<(), FsError> {
        self.fs.unmount()
    }

    fn handle(&self, path: &Path, how: OpenOptions) -> Result<EnvFile> {
        let file = self.fs.open(text(path)?, how).map_err(status)?;
        Ok(EnvFile { file, at: 0 })
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        let why = format!("{}: a name has to be UTF-8", path.display());
        Status::new(StatusCode::InvalidArgument, &why)
    })
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn status(e: FsError) -> Status {
    let code = match &e {
        FsError::NotFound { .. } => StatusCode::NotFound,
        FsError::Exists { .. } => StatusCode::AlreadyExists,
        FsError::Locked { .. } => StatusCode::LockError,
        FsError::ReadOnly { .. } => StatusCode::PermissionDenied,
        FsError::Corrupt { .. } | FsError::Damaged { .. } => StatusCode::Corruption,
        FsError::InvalidInput { .. } | FsError::NameTooLong { .. } => StatusCode::InvalidArgument,
        _ => StatusCode::IOError,
    };
    Status::new(code, &e.to_string())
}

impl Read for EnvFile {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(self.at, out).map_err(io::Error::other)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Write for EnvFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.file.append(data).map_err(io::Error::other)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync().map_err(io::Error::other)
    }
}

impl RandomAccess for EnvFile {
    fn read_at(&self, off: usize, out: &mut [u8]) -> Result<usize> {
        self.file.read_at(off as u64, out).map_err(status)
    }
}

impl Env for BlobFsEnv {
    fn open_sequential_file(&self, path: &Path) -> Result<Box<dyn Read>> {
        Ok(Box::new(self.handle(path, OpenOptions::READ)?))
    }

    fn open_random_access_file(&self, path: &Path) -> Result<Box<dyn RandomAccess>> {
        Ok(Box::new(self.handle(path, OpenOptions::READ)?))
    }

    fn open_writable_file(&self, path: &Path) -> Result<Box<dyn Write>> {
        let how = OpenOptions::CREATE.truncate(true);
        Ok(Box::new(self.handle(path, how)?))
    }

    fn open_appendable_file(&self, path: &Path) -> Result<Box<dyn Write>> {
        Ok(Box::new(self.handle(path, OpenOptions::CREATE)?))
    }

    fn exists(&self, path: &Path) -> Result<bool> {
        self.fs.exists(text(path)?).map_err(status)
    }

    fn children(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let entries = self.fs.list(text(path)?).map_err(status)?;
        Ok(entries.into_iter().map(|entry| entry.name.into()).collect())
    }

    fn size_of(&self, path: &Path) -> Result<usize> {
        let stat = self.fs.stat(text(path)?).map_err(status)?;
        usize::try_from(stat.len).map_err(|e| Status::new(StatusCode::InvalidData, &e.to_string()))
    }

    fn delete(&self, path: &Path) -> Result<()> {
        self.fs.unlink(text(path)?).map_err(status)
    }

    /// Makes the directories above it too.
    fn mkdir(&self, path: &Path) -> Result<()> {
        let mut dirs: Vec<&Path> = path.ancestors().collect();
        dirs.reverse();
        for dir in dirs {
            let dir = text(dir)?;
            if dir.is_empty() || dir == "/" {
                continue;
            }
            match self.fs.mkdir(dir) {
                Ok(()) | Err(FsError::Exists { .. }) => {}
                Err(e) => return Err(status(e)),
            }
        }
        Ok(())
    }

    /// Removes what is in it too.
    fn rmdir(&self, path: &Path) -> Result<()> {
        let dir = text(path)?;
        for entry in self.fs.list(dir).map_err(status)? {
            let inside = path.join(&entry.name);
            if entry.is_dir {
                self.rmdir(&inside)?;
            } else {
                self.delete(&inside)?;
            }
        }
        self.fs.rmdir(dir).map_err(status)
    }

    /// Syncs the file first: the engine relies on a renamed file being whole, and does not flush it.
    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let (from, to) = (text(from)?, text(to)?);
        let file = self.fs.open(from, OpenOptions::READ).map_err(status)?;
        file.sync().map_err(status)?;
        self.fs.rename(from, to).map_err(status)
    }

    fn lock(&self, path: &Path) -> Result<FileLock> {
        let id = text(path)?.to_owned();
        let lock = self.fs.lock(&id).map_err(status)?;
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        locks.push((id.clone(), lock));
        Ok(FileLock { id })
    }

    fn unlock(&self, lock: FileLock) -> Result<()> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = locks.iter().position(|(id, _)| *id == lock.id) else {
            let why = format!("{}: it is not locked", lock.id);
            return Err(Status::new(StatusCode::LockError, &why));
        };
        locks.swap_remove(at);
        Ok(())
    }

    fn new_logger(&self, path: &Path) -> Result<Logger> {
        self.open_appendable_file(path).map(Logger::new)
    }

    fn micros(&self) -> u64 {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
    }

    fn sleep_for(&self, micros: u32) {
        std::thread::sleep(Duration::from_micros(micros.into()));
    }
}
