//! RocksDB environments over a file system.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use pumice_blobfs::fs::FileSystem;

use crate::Error;
use crate::plugin::path::normal;
use crate::plugin::{self, Abilities, Gate, PluginFs};

/// An environment for `rocksdb::Options::set_env` whose files are all in `fs`.
///
/// It keeps `fs` mounted until the last clone of it and the last database opened with it are gone,
/// or [`FileSystem::unmount`] ends its use.
#[must_use]
pub fn env(fs: &FileSystem) -> rocksdb::Env {
    EnvOptions::new()
        .build(fs.clone())
        .expect("the root `/` is a good one")
}

/// How an environment uses its file system.
///
/// ```
/// # use pumice::{EnvOptions, plugin::MemoryFs};
/// let fs = MemoryFs::new(64 << 20);
/// let env = EnvOptions::new().root("/orders").build(fs)?;
/// let mut options = pumice::rocksdb::Options::default();
/// options.set_env(&env);
/// options.create_if_missing(true);
/// // "/" is the directory "/orders" of the file system, and nothing to the kernel.
/// let db = pumice::rocksdb::DB::open(&options, "/")?;
/// db.put(b"key", b"value")?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct EnvOptions {
    root: String,
    forbid: Abilities,
}

impl Default for EnvOptions {
    fn default() -> Self {
        EnvOptions {
            root: "/".to_owned(),
            forbid: Abilities::default(),
        }
    }
}

impl EnvOptions {
    /// The whole file system, with everything that it can do.
    #[must_use]
    pub fn new() -> EnvOptions {
        EnvOptions::default()
    }

    /// The directory that the environment calls `/`; made, with its parents, when a database is
    /// created there.
    ///
    /// `rocksdb::DB::open` makes its path as a directory of the *kernel's* file system, always. So
    /// a database is best opened at `/`, which is there already, in an environment rooted where its
    /// files are to be. A path with `..` leads out of the root, as far as the file system's own.
    #[must_use]
    pub fn root(mut self, root: &str) -> EnvOptions {
        root.clone_into(&mut self.root);
        self
    }

    /// Whether `ReadAsync` is offered (`ReadOptions::async_io`). On unless called.
    #[must_use]
    pub fn async_reads(mut self, offered: bool) -> EnvOptions {
        self.forbid.async_reads = !offered;
        self
    }

    /// Whether cached blocks are lent to RocksDB without a copy. On unless called.
    #[must_use]
    pub fn lend_cached(mut self, offered: bool) -> EnvOptions {
        self.forbid.pins = !offered;
        self
    }

    /// Whether RocksDB prefetches through the file system, or, when not, into buffers of its own.
    /// On unless called.
    #[must_use]
    pub fn prefetch(mut self, offered: bool) -> EnvOptions {
        self.forbid.prefetch = !offered;
        self
    }

    /// An environment over `fs`. It keeps its clone of `fs` until the last clone of the environment
    /// and the last database opened with it are gone.
    ///
    /// # Errors
    /// [`Error::Path`] for a root that no directory can have, [`Error::Memory`].
    pub fn build<F: PluginFs>(&self, fs: F) -> Result<rocksdb::Env, Error> {
        Ok(self.build_gated(fs)?.0)
    }

    /// As [`EnvOptions::build`], as a C++ `rocksdb::Env*`, for C++ code in the same program. That code owns it, and deletes it
    /// after the last database that was opened with it, or never.
    ///
    /// # Errors
    /// As [`EnvOptions::build`].
    pub fn build_cpp(&self, fs: &FileSystem) -> Result<NonNull<c_void>, Error> {
        let root = normal(&self.root)?;
        let made = plugin::make_cpp_env(fs.clone(), &root, self.forbid);
        Ok(made.map_err(|e| Error::Memory(e.0))?.0)
    }

    /// As [`EnvOptions::build`], with what ends the environment's use while handles on it are left.
    pub(crate) fn build_gated<F: PluginFs>(
        &self,
        fs: F,
    ) -> Result<(rocksdb::Env, Arc<Gate>), Error> {
        let root = normal(&self.root)?;
        plugin::make_env(fs, &root, self.forbid).map_err(|e| Error::Memory(e.0))
    }
}
