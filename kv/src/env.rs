//! RocksDB environments over a file system.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;

use pumice_blobfs::fs::FileSystem;
use pumice_rocksdb_fs::{Binding, normal, offers};

use crate::Error;
use crate::plugin;

/// Makes an environment for `rocksdb::Options::set_env` whose files are all in `fs`.
///
/// It keeps `fs` mounted until its last clone and the last database opened with it are dropped, or
/// [`FileSystem::unmount`] ends its use.
#[must_use]
pub fn env(fs: &FileSystem) -> rocksdb::Env {
    EnvOptions::new()
        .build(fs)
        .expect("the root `/` is a path that a directory can have")
}

/// Options of an environment's use of its file system.
///
/// ```
/// # use pumice::{EnvOptions, MountOptions};
/// let fs = pumice::mount("malloc://256M", &MountOptions::new())?;
/// let env = EnvOptions::new().root("/orders").build(&fs)?;
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
    /// The bits of [`offers`].
    offers: u32,
}

impl Default for EnvOptions {
    fn default() -> Self {
        EnvOptions {
            root: "/".to_owned(),
            offers: offers::ASYNC_READS | offers::PREFETCH | offers::REREADING,
        }
    }
}

impl EnvOptions {
    /// Offers the whole file system, with all of its abilities but [`EnvOptions::lend_cached`].
    #[must_use]
    pub fn new() -> EnvOptions {
        EnvOptions::default()
    }

    /// Sets the directory that the environment calls `/`. It is created, with its parents, when a
    /// database is created there.
    ///
    /// `rocksdb::DB::open` always creates its path as a directory of the *kernel's* file system. So
    /// open a database at `/`, which exists there, in an environment whose root is the directory
    /// for its files. A path with `..` leads out of the root, up to the file system's own.
    #[must_use]
    pub fn root(mut self, root: &str) -> EnvOptions {
        root.clone_into(&mut self.root);
        self
    }

    /// Sets whether `ReadAsync` is offered (`ReadOptions::async_io`). The default is yes.
    #[must_use]
    pub fn async_reads(mut self, offered: bool) -> EnvOptions {
        self.offer(offers::ASYNC_READS, offered);
        self
    }

    /// Sets whether cached blocks are lent to RocksDB without a copy. The default is no: RocksDB copies a lent block into
    /// its own cache unless it is compressed, and one copy straight to that place is faster.
    #[must_use]
    pub fn lend_cached(mut self, offered: bool) -> EnvOptions {
        self.offer(offers::LENDING, offered);
        self
    }

    /// Sets whether RocksDB prefetches through the file system, or into its own buffers. The
    /// default is yes.
    #[must_use]
    pub fn prefetch(mut self, offered: bool) -> EnvOptions {
        self.offer(offers::PREFETCH, offered);
        self
    }

    fn offer(&mut self, what: u32, offered: bool) {
        if offered {
            self.offers |= what;
        } else {
            self.offers &= !what;
        }
    }

    /// Makes an environment over `fs`. It keeps the file system mounted until the last clone of the
    /// environment and the last database opened with it are dropped, or [`FileSystem::unmount`]
    /// ends its use.
    ///
    /// # Errors
    /// [`Error::FileSystem`] for a root that no directory can have, [`Error::Environment`].
    pub fn build(&self, fs: &FileSystem) -> Result<rocksdb::Env, Error> {
        Ok(self.build_bound(fs)?.0)
    }

    /// Makes an environment as [`EnvOptions::build`] does, as a C++ `rocksdb::Env*` for C++ code in
    /// the same program. That code owns it, and deletes it after the last database that was opened
    /// with it, or never.
    ///
    /// # Errors
    /// Fails as [`EnvOptions::build`] does.
    pub fn build_cpp(&self, fs: &FileSystem) -> Result<NonNull<c_void>, Error> {
        let root = normal(&self.root)?;
        let made = plugin::make_cpp_env(fs.clone(), root, self.offers);
        Ok(made.map_err(|e| Error::Environment(e.0))?.0)
    }

    /// Makes an environment as [`EnvOptions::build`] does, with an object that ends its use while
    /// there are handles.
    pub(crate) fn build_bound(
        &self,
        fs: &FileSystem,
    ) -> Result<(rocksdb::Env, Arc<Binding>), Error> {
        let root = normal(&self.root)?;
        let made = plugin::make_env(fs.clone(), root, self.offers);
        made.map_err(|e| Error::Environment(e.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_offered_but_loans_and_each_ability_is_an_option() {
        let all = offers::ASYNC_READS | offers::LENDING | offers::PREFETCH | offers::REREADING;
        let default = EnvOptions::new();
        assert_eq!(default.offers, all & !offers::LENDING);
        let lending = default.clone().lend_cached(true);
        assert_eq!(lending.offers, all);
        assert_eq!(lending.lend_cached(false).offers, default.offers);
        let less = default.async_reads(false).prefetch(false);
        assert_eq!(less.offers, offers::REREADING);
        assert_eq!(
            less.async_reads(true).offers,
            offers::REREADING | offers::ASYNC_READS
        );
    }
}
