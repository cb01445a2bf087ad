//! A database and the file system that it lives in.

use std::ops::Deref;

use pumice_blobfs::fs::{FileSystem, FsError};
use rocksdb::backup::{BackupEngine, BackupEngineInfo, BackupEngineOptions, RestoreOptions};
use rocksdb::checkpoint::Checkpoint;
use rocksdb::{DBWithThreadMode, Env, MultiThreaded, Options};

use crate::plugin::path::{from_root, resolve};
use crate::{EnvOptions, Error, MountOptions, mount};

/// The database type of the `rocksdb` crate that [`Db`] is made of.
pub type Rocks = DBWithThreadMode<MultiThreaded>;

/// A RocksDB database inside a Pumice file system.
///
/// It dereferences to [`rocksdb::DBWithThreadMode`], so reading and writing are that type's:
/// `get`, `put`, `delete`, `merge`, `write` a `WriteBatch`, `iterator`, `snapshot`, `cf_handle`,
/// `create_cf`, `flush`, `compact_range`, `property_value` and the rest. What is here is what
/// concerns the file system: opening, checkpoints, backups, closing.
///
/// `Send` and `Sync`: threads share it by reference or in an `Arc`, and each drives the device by a
/// queue of its own.
///
/// ```
/// let dir = tempfile::tempdir()?;
/// let device = format!("file://{}/kv.img?size=256M&create=1", dir.path().display());
///
/// let db = pumice::Db::open(&device)?;
/// db.put(b"fruit", b"apple")?;
/// assert_eq!(db.get(b"fruit")?.as_deref(), Some(&b"apple"[..]));
/// db.close()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Db {
    // In the order in which they have to go.
    db: Rocks,
    env: Env,
    fs: FileSystem,
    root: String,
    read_only: bool,
    owns_fs: bool,
}

/// How a [`Db`] is opened.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let device = format!("file://{}/kv.img?size=256M&create=1", dir.path().display());
/// use pumice::rocksdb::{Options, WriteOptions};
///
/// let mut events = Options::default();
/// events.set_enable_blob_files(true);
/// let db = pumice::DbOptions::new()
///     .path("/orders")
///     .configure(|options| options.set_write_buffer_size(32 << 20))
///     .column_family("events", events)
///     .open(&device)?;
///
/// let mut sync = WriteOptions::default();
/// sync.set_sync(true);
/// let events = db.cf_handle("events").ok_or("no such column family")?;
/// db.put_cf_opt(&events, b"1", b"shipped", &sync)?;
/// # drop(events);
/// # db.close()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct DbOptions {
    path: String,
    options: Options,
    column_families: Vec<(String, Options)>,
    read_only: bool,
    mount: MountOptions,
    env: EnvOptions,
}

impl Default for DbOptions {
    fn default() -> Self {
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        DbOptions {
            path: "/".to_owned(),
            options,
            column_families: Vec::new(),
            read_only: false,
            mount: MountOptions::default(),
            env: EnvOptions::default(),
        }
    }
}

impl std::fmt::Debug for DbOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self
            .column_families
            .iter()
            .map(|(name, _)| &name[..])
            .collect();
        f.debug_struct("DbOptions")
            .field("path", &self.path)
            .field("column_families", &names)
            .field("read_only", &self.read_only)
            .field("mount", &self.mount)
            .field("env", &self.env)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db")
            .field("path", &self.root)
            .finish_non_exhaustive()
    }
}

impl DbOptions {
    /// A database at `/`, made if it is not there, with RocksDB's own defaults.
    #[must_use]
    pub fn new() -> DbOptions {
        DbOptions::default()
    }

    /// The directory of the file system that holds the database; several databases may share one.
    /// `/` unless called.
    #[must_use]
    pub fn path(mut self, path: &str) -> DbOptions {
        path.clone_into(&mut self.path);
        self
    }

    /// RocksDB's options, in place of the present ones. The environment is set by opening.
    #[must_use]
    pub fn rocksdb(mut self, options: Options) -> DbOptions {
        self.options = options;
        self
    }

    /// Changes RocksDB's options.
    #[must_use]
    pub fn configure(mut self, change: impl FnOnce(&mut Options)) -> DbOptions {
        change(&mut self.options);
        self
    }

    /// Options of one column family, which is made if it is not there. Those that the database has
    /// and that are not named here are opened with the database's options.
    #[must_use]
    pub fn column_family(mut self, name: &str, options: Options) -> DbOptions {
        self.column_families.retain(|(known, _)| known != name);
        self.column_families.push((name.to_owned(), options));
        self
    }

    /// Refuses writes; the device may still be written by recovery.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> DbOptions {
        self.read_only = read_only;
        self
    }

    /// How [`DbOptions::open`] mounts.
    #[must_use]
    pub fn mount(mut self, mount: MountOptions) -> DbOptions {
        self.mount = mount;
        self
    }

    /// How RocksDB uses the file system. The root is set by [`DbOptions::path`].
    #[must_use]
    pub fn env(mut self, env: EnvOptions) -> DbOptions {
        self.env = env;
        self
    }

    /// Mounts the file system on the device that `uri` names and opens the database in it. A
    /// device that holds nothing is formatted first, unless [`MountOptions::format_empty`] was
    /// cleared. [`Db::close`] unmounts.
    ///
    /// # Errors
    /// [`Error::Device`], [`Error::FileSystem`], [`Error::RocksDb`].
    pub fn open(&self, uri: &str) -> Result<Db, Error> {
        let fs = mount(uri, &self.mount)?;
        self.open_on(fs, true)
    }

    /// Opens the database in a file system that is mounted already and stays so.
    ///
    /// # Errors
    /// [`Error::Path`], [`Error::RocksDb`].
    pub fn open_in(&self, fs: &FileSystem) -> Result<Db, Error> {
        self.open_on(fs.clone(), false)
    }

    fn open_on(&self, fs: FileSystem, owns_fs: bool) -> Result<Db, Error> {
        let root = normal(&self.path)?;
        let env = self.env.clone().root(&root).build(fs.clone());
        let mut options = self.options.clone();
        options.set_env(&env);
        let mut families = self.column_families.clone();
        // A database that is not there yet has none; what else is wrong, opening will say.
        for name in Rocks::list_cf(&options, "/").unwrap_or_default() {
            if !families.iter().any(|(known, _)| *known == name) {
                families.push((name, options.clone()));
            }
        }
        if !families.is_empty() && !families.iter().any(|(name, _)| name == "default") {
            families.push(("default".to_owned(), options.clone()));
        }
        let db = match (families.is_empty(), self.read_only) {
            (true, false) => Rocks::open(&options, "/"),
            (false, false) => Rocks::open_cf_with_opts(&options, "/", families),
            (true, true) => Rocks::open_for_read_only(&options, "/", false),
            (false, true) => Rocks::open_cf_with_opts_for_read_only(&options, "/", families, false),
        }?;
        Ok(Db {
            db,
            env,
            fs,
            root,
            read_only: self.read_only,
            owns_fs,
        })
    }

    /// Deletes the database's files.
    ///
    /// # Errors
    /// [`Error::Path`], [`Error::RocksDb`].
    pub fn destroy_in(&self, fs: &FileSystem) -> Result<(), Error> {
        let env = self
            .env
            .clone()
            .root(&normal(&self.path)?)
            .build(fs.clone());
        let mut options = self.options.clone();
        options.set_env(&env);
        Ok(Rocks::destroy(&options, "/")?)
    }
}

fn normal(path: &str) -> Result<String, Error> {
    resolve("/", path.as_bytes()).map_err(|fault| Error::Path {
        path: path.to_owned(),
        reason: fault.text,
    })
}

impl Db {
    /// The database at `/` of the device that `uri` names, both made if they are not there:
    /// [`DbOptions::new`] has the choices.
    ///
    /// # Errors
    /// As [`DbOptions::open`].
    pub fn open(uri: &str) -> Result<Db, Error> {
        DbOptions::new().open(uri)
    }

    /// The database itself.
    #[must_use]
    pub fn rocksdb(&self) -> &Rocks {
        &self.db
    }

    /// The file system that it lives in.
    #[must_use]
    pub fn file_system(&self) -> &FileSystem {
        &self.fs
    }

    /// The environment that it was opened with, whose `/` is the database's directory.
    #[must_use]
    pub fn env(&self) -> &Env {
        &self.env
    }

    /// The database's directory in its file system.
    #[must_use]
    pub fn directory(&self) -> &str {
        &self.root
    }

    /// A copy of the database as it is now, openable on its own, at `path` of the same file system:
    /// tables are linked, not copied. `path` must not exist.
    ///
    /// # Errors
    /// [`Error::Path`], [`Error::RocksDb`].
    pub fn checkpoint(&self, path: &str) -> Result<(), Error> {
        self.make_parents(path)?;
        Ok(Checkpoint::new(self.rocksdb())?.create_checkpoint(self.inside(path)?)?)
    }

    /// Adds a backup of the database, memtables and all, to the ones at `path` of the same file
    /// system; what an earlier backup there holds is not copied again.
    ///
    /// # Errors
    /// [`Error::Path`], [`Error::RocksDb`].
    pub fn backup(&self, path: &str) -> Result<(), Error> {
        Ok(self
            .backups_at(path)?
            .create_new_backup_flush(self.rocksdb(), true)?)
    }

    /// The backups at `path`, oldest first.
    ///
    /// # Errors
    /// [`Error::Path`], [`Error::RocksDb`].
    pub fn backups(&self, path: &str) -> Result<Vec<BackupEngineInfo>, Error> {
        Ok(self.backups_at(path)?.get_backup_info())
    }

    /// Restores the latest backup at `path` into the empty or missing directory `to`, from where
    /// [`DbOptions::path`] opens it.
    ///
    /// # Errors
    /// [`Error::Path`], [`Error::RocksDb`].
    pub fn restore_backup(&self, path: &str, to: &str) -> Result<(), Error> {
        self.make_parents(to)?;
        let to = self.inside(to)?;
        let options = RestoreOptions::default();
        Ok(self
            .backups_at(path)?
            .restore_from_latest_backup(&to, &to, &options)?)
    }

    /// Makes everything written so far durable, then closes the database and, if opening mounted
    /// the file system, unmounts that. Dropping does the same without telling what failed; what was
    /// written with `sync` is durable in any case.
    ///
    /// # Errors
    /// [`Error::RocksDb`], [`Error::FileSystem`].
    pub fn close(self) -> Result<(), Error> {
        let Db {
            db,
            env,
            fs,
            read_only,
            owns_fs,
            ..
        } = self;
        db.cancel_all_background_work(true);
        let mut result = if read_only {
            Ok(())
        } else {
            db.flush_wal(true).map_err(Error::from)
        };
        drop(db);
        drop(env);
        if owns_fs {
            result = result.and(fs.unmount().map_err(Error::from));
        }
        result
    }

    fn inside(&self, path: &str) -> Result<String, Error> {
        from_root(&self.root, path).map_err(|fault| Error::Path {
            path: path.to_owned(),
            reason: fault.text,
        })
    }

    /// RocksDB makes the directory itself, and takes those above for granted.
    fn make_parents(&self, path: &str) -> Result<(), Error> {
        let path = normal(path)?;
        for (at, _) in path.match_indices('/').skip(1) {
            match self.fs.mkdir(&path[..at]) {
                Ok(()) | Err(FsError::Exists { .. }) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn backups_at(&self, path: &str) -> Result<BackupEngine, Error> {
        self.make_parents(path)?;
        let options = BackupEngineOptions::new(self.inside(path)?)?;
        Ok(BackupEngine::open(&options, &self.env)?)
    }
}

impl Deref for Db {
    type Target = Rocks;

    fn deref(&self) -> &Rocks {
        self.rocksdb()
    }
}
