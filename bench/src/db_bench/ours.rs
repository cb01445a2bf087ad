//! Pumice's own file system below RocksDB.

use rocksdb::Env;

use super::flags::Flags;
use super::report::IoCount;
use super::target::Durability;

/// A mounted file system of ours.
#[derive(Debug)]
pub enum Ours {}

impl std::fmt::Display for Ours {
    fn fmt(&self, _out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {}
    }
}

impl Ours {
    /// Opens the device, formats it where asked, mounts it.
    ///
    /// # Errors
    /// In words for the user.
    pub fn open(_f: &Flags) -> Result<Self, String> {
        Err("--env=pumice: not in this build; use --env=kernel or --env=mem".to_owned())
    }

    /// The env for RocksDB.
    #[must_use]
    pub fn env(&self) -> Env {
        match *self {}
    }

    /// The database's directory.
    #[must_use]
    pub fn db(&self, _f: &Flags) -> String {
        match *self {}
    }

    /// What a completed write is worth.
    #[must_use]
    pub fn durability(&self) -> Durability {
        match *self {}
    }

    /// Device operations so far.
    #[must_use]
    pub fn io(&self) -> IoCount {
        match *self {}
    }

    /// Unmounts.
    ///
    /// # Errors
    /// In words for the user.
    pub fn close(self) -> Result<(), String> {
        match self {}
    }
}
