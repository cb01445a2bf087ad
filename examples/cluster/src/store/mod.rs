//! The log store and the state machine of a node, in one file system.

use std::sync::Arc;

use openraft::{AnyError, ErrorSubject, ErrorVerb, StorageError, StorageIOError};
use pumice::{Db, DbOptions, FileSystem, FsError, rocksdb};

use crate::NodeId;

mod directories;
mod files;
mod installs;
mod log;
mod state;

pub use files::{FileLen, Files};
pub use installs::Announced;
pub use log::{LogReader, LogStore};
pub use state::{AppliedState, SnapshotBuilder, StateMachine};

use installs::Installs;

/// The reason why the store of a node could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A database or the file system has failed.
    #[error(transparent)]
    Pumice(#[from] pumice::Error),
    /// The bytes that are stored cannot be understood.
    #[error("{place} is not what a node of this version writes: {source}")]
    Encoding {
        /// The file, or the database and the key.
        place: String,
        /// The reason.
        source: serde_json::Error,
    },
    /// The store contradicts itself or what it was given.
    #[error("{place}: {reason}")]
    Inconsistent {
        /// The file or directory.
        place: String,
        /// The contradiction.
        reason: String,
    },
}

impl From<rocksdb::Error> for StoreError {
    fn from(error: rocksdb::Error) -> StoreError {
        StoreError::Pumice(error.into())
    }
}

impl From<FsError> for StoreError {
    fn from(error: FsError) -> StoreError {
        StoreError::Pumice(error.into())
    }
}

impl StoreError {
    fn inconsistent(place: &str, reason: impl Into<String>) -> StoreError {
        StoreError::Inconsistent {
            place: place.to_owned(),
            reason: reason.into(),
        }
    }

    /// Returns it as openraft's, with what was being done.
    pub(crate) fn raft(
        &self,
        subject: ErrorSubject<NodeId>,
        verb: ErrorVerb,
    ) -> StorageError<NodeId> {
        StorageIOError::new(subject, verb, AnyError::new(self)).into()
    }
}

/// Sizes of a store.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Bytes of a memtable of each column family.
    pub write_buffer_bytes: usize,
    /// Bytes of write-ahead log at which RocksDB writes the memtable that keeps the oldest part of it.
    pub wal_bytes: u64,
}

impl Default for StoreOptions {
    fn default() -> StoreOptions {
        StoreOptions {
            write_buffer_bytes: 8 << 20,
            wal_bytes: 32 << 20,
        }
    }
}

impl StoreOptions {
    /// Returns the options of a database with these column families.
    fn database(&self, path: &str, families: &[&str], opening: Opening) -> DbOptions {
        let create = opening == Opening::Create;
        let options = DbOptions::new().path(path).configure(|options| {
            options.create_if_missing(create);
            options.create_missing_column_families(create);
            options.set_write_buffer_size(self.write_buffer_bytes);
            options.set_max_total_wal_size(self.wal_bytes);
            options.set_keep_log_file_num(2);
        });
        let options = options.read_only(opening == Opening::ReadOnly);
        families.iter().fold(options, |options, family| {
            let mut own = rocksdb::Options::default();
            own.set_write_buffer_size(self.write_buffer_bytes);
            options.column_family(family, own)
        })
    }
}

/// The way in which a database is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opening {
    /// It is made if it is not there.
    Create,
    /// It has to be there.
    Existing,
    /// It has to be there, and stays as it is.
    ReadOnly,
}

/// The log and the state of a node.
///
/// Dropping both parts closes the databases.
pub struct Store {
    /// The log and the vote.
    pub log: LogStore,
    /// The state machine.
    pub state: StateMachine,
}

impl Store {
    /// Opens the store of a file system, and makes it if it is not there. Directories that an interrupted snapshot has left
    /// are removed.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(fs: &FileSystem, options: &StoreOptions) -> Result<Store, StoreError> {
        let state = AppliedState::open(fs, options)?;
        let log = LogStore::open(fs, options, Arc::clone(&state.installs))?;
        Ok(Store {
            log,
            state: StateMachine::new(state),
        })
    }
}

/// Runs what waits for the device on a thread that may wait.
async fn blocking<T, F>(work: F) -> Result<T, StoreError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, StoreError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(StoreError::inconsistent("the runtime", error.to_string())),
        },
    }
}

type Family<'a> = Arc<rocksdb::BoundColumnFamily<'a>>;

/// Returns a column family of the database at this path.
fn family<'a>(db: &'a Db, path: &str, name: &str) -> Result<Family<'a>, StoreError> {
    let missing = || format!("it has no column family {name}");
    db.cf_handle(name)
        .ok_or_else(|| StoreError::inconsistent(path, missing()))
}

/// Reads the value of a key that [`encode`] has written.
fn read<T: serde::de::DeserializeOwned>(
    db: &Db,
    family: &Family<'_>,
    key: &str,
) -> Result<Option<T>, StoreError> {
    let value = db.get_cf(family, key)?;
    value.map(|bytes| decode(key, &bytes)).transpose()
}

/// Reads what [`encode`] has written.
fn decode<T: serde::de::DeserializeOwned>(place: &str, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|source| StoreError::Encoding {
        place: place.to_owned(),
        source,
    })
}

fn encode<T: serde::Serialize>(place: &str, value: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(|source| StoreError::Encoding {
        place: place.to_owned(),
        source,
    })
}
