//! What can go wrong above the file system.

use pumice_bdev::{BdevError, IoError};
use pumice_blobfs::fs::FsError;

/// A failure of mounting, opening or using a database.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device could not be opened.
    #[error("{uri}: {source}")]
    Device {
        /// As it was given.
        uri: String,
        /// Why.
        source: BdevError,
    },
    /// The device could not be read when it was looked at.
    #[error("{device}: {source}")]
    Read {
        /// The device.
        device: String,
        /// Why.
        source: Box<IoError>,
    },
    /// The device is not formatted, and not empty either.
    #[error(
        "{device}: holds {found}, and no file system that Pumice knows; nothing was changed; if \
         nobody needs it, `pumice mkfs --force` makes one there"
    )]
    NotEmpty {
        /// The device.
        device: String,
        /// What is on it.
        found: String,
    },
    /// No memory for buffers.
    #[error("no buffer memory: {0}")]
    Memory(String),
    /// The file system's own.
    #[error(transparent)]
    FileSystem(#[from] FsError),
    /// RocksDB's own, with the file system's cause in its text.
    #[error(transparent)]
    RocksDb(#[from] rocksdb::Error),
    /// RocksDB's registry could not open a URI.
    #[error("{uri}: {reason}")]
    Uri {
        /// As it was given.
        uri: String,
        /// RocksDB's text.
        reason: String,
    },
    /// A directory that cannot be used for what was asked.
    #[error("{path}: {reason}")]
    Directory {
        /// The directory, in the file system.
        path: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// The database could not be opened for want of space.
    #[error(
        "{source}; the file system is full: `DbOptions::read_only` still reads it, `pumice rm` \
         deletes files that are not the database's, `pumice grow` makes it larger"
    )]
    Full {
        /// RocksDB's own.
        source: rocksdb::Error,
    },
    /// Closing wrote everything that a log holds, but RocksDB could not write what was put with
    /// `disable_wal`.
    #[error(
        "{path}: what was put without a log (`disable_wal`) could not be written to a table; the \
         rest is durable"
    )]
    Unlogged {
        /// The database's directory.
        path: String,
    },
    /// A path that no file can have.
    #[error("path {path:?}: {reason}")]
    Path {
        /// As it was given.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}
