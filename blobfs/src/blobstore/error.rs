//! Errors of the blobstore.

use std::sync::Arc;

use pumice_bdev::{BdevError, DmaError, IoError};

use super::format::{BlobId, BsType, PageError, SuperBlockError};

/// An error of the blobstore. Unless a variant says otherwise, the operation changed nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device operation failed.
    #[error(transparent)]
    Io(#[from] Box<IoError>),
    /// The device could not be opened or waited for.
    #[error(transparent)]
    Device(#[from] BdevError),
    /// There is no memory for I/O.
    #[error(transparent)]
    Dma(Arc<DmaError>),
    /// The journal has bytes of a blob that cannot be put in place, which has to come before a write to
    /// the blob, its deletion, and a change that moves clusters. They are still in the journal.
    #[error("what the journal has could not be put in place: {0}")]
    Owed(#[source] Box<IoError>),
    /// The error of a batch of the journal, which all changes in it share.
    #[error(transparent)]
    Shared(Arc<Error>),
    /// The super block is missing or damaged.
    #[error("{device}: {source}")]
    SuperBlock {
        /// Name of the device.
        device: String,
        /// The error in the super block.
        #[source]
        source: SuperBlockError,
    },
    /// The values in the super block contradict each other or the device.
    #[error("{device}: the super block cannot be used: {reason}")]
    Geometry {
        /// Name of the device.
        device: String,
        /// The contradiction, and what to do.
        reason: String,
    },
    /// The store has another type.
    #[error("{device}: the blobstore has the type \"{found}\", and \"{wanted}\" is needed")]
    WrongType {
        /// Name of the device.
        device: String,
        /// The type in the super block.
        found: BsType,
        /// The requested type.
        wanted: BsType,
    },
    /// There is no blob of this id.
    #[error("there is no blob {0} in this store")]
    NoSuchBlob(BlobId),
    /// The blob was set aside at load because its metadata is damaged.
    #[error("blob {blob} is damaged: {source}; `pumice fsck` shows the whole store")]
    Damaged {
        /// Id of the blob.
        blob: BlobId,
        /// The damaged page and the damage.
        #[source]
        source: PageError,
    },
    /// The store has damaged blobs, and was to be loaded only if it had none. Nothing was written
    /// but what the journal had, if the store has one.
    #[error(
        "{device}: {} damaged: {}; load it read-only, or accept the damage",
        count(.damage.len()), some(.damage)
    )]
    DamagedStore {
        /// Name of the device.
        device: String,
        /// A line for each damaged blob.
        damage: Vec<String>,
    },
    /// The store was not unloaded in order, and its journal is damaged, so that changes may be
    /// missing. Nothing was written.
    #[error(
        "{device}: the journal is damaged, and changes that it held may be missing: {reason}; load the store \
         read-only to copy what is there, or give up what is missing with `pumice fsck --repair`"
    )]
    Journal {
        /// Name of the device.
        device: String,
        /// The damage.
        reason: String,
    },
    /// Nothing can be allocated: the store was not unloaded in order, a blob is damaged, and it is
    /// not known which clusters and metadata pages it has.
    #[error(
        "nothing can be allocated: the store was not unloaded in order, and blob {0}, which is damaged, may hold \
         any cluster; `pumice fsck --repair` removes it"
    )]
    Held(BlobId),
    /// A newer version wrote the blob, or its parent does not exist.
    #[error("blob {blob} cannot be opened: {reason}")]
    CannotOpen {
        /// Id of the blob.
        blob: BlobId,
        /// The reason.
        reason: String,
    },
    /// There are too few free clusters.
    #[error(
        "no space left: {needed} clusters are needed, and {free} of {total} are free; delete blobs or grow the store"
    )]
    NoSpace {
        /// Number of clusters needed.
        needed: u64,
        /// Number of free clusters.
        free: u64,
        /// Number of clusters of the store.
        total: u64,
    },
    /// There are too few free metadata pages.
    #[error(
        "no metadata pages left: {needed} are needed, and {free} of {total} are free; delete blobs, or make a store with more (md_pages)"
    )]
    NoMdPages {
        /// Number of pages needed.
        needed: u64,
        /// Number of free pages.
        free: u64,
        /// Number of pages of the region.
        total: u64,
    },
    /// The blob's data or metadata must not be changed.
    #[error("blob {0} is read-only")]
    ReadOnly(BlobId),
    /// Another operation or use has to end first.
    #[error("busy: {0}")]
    Busy(String),
    /// The request is invalid.
    #[error("{0}")]
    InvalidInput(String),
    /// The offset and length do not lie inside the blob.
    #[error("blob {blob}: {len} bytes at offset {offset} are outside its {size} bytes")]
    OutOfRange {
        /// Id of the blob.
        blob: BlobId,
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Size of the blob in bytes.
        size: u64,
    },
    /// A metadata write failed, and neither could the old state be restored nor the new one be
    /// confirmed. The store accepts no changes, but can be read. Each change first tries to restore
    /// the old state. After the store is loaded again, the state of the device is known.
    #[error(
        "the store takes no changes after an error: {0}; load it again if the device works and this goes on"
    )]
    Stopped(String),
    /// A flush of the device failed, now or earlier. Data written before it without FUA may be
    /// lost, and no later flush says anything about it. Load the store again, write the data again
    /// and flush.
    #[error(
        "a flush of the device failed, and what was written before it may be lost: {0}; load the store again"
    )]
    Lost(#[source] Box<IoError>),
    /// A change failed, and so did the attempt to undo it. Whether it was made is unknown until the
    /// device works again. The next change first tries to undo it.
    #[error("it is open whether this was done: {0}; load the store again to see")]
    Undecided(#[source] Box<Error>),
    /// The store was loaded read-only.
    #[error("the blobstore was loaded read-only; load it for writing to change it")]
    ReadOnlyStore,
    /// The store was unloaded.
    #[error("the blobstore is unloaded")]
    Unloaded,
}

/// Formats a number of blobs: "1 blob is", "3 blobs are".
fn count(n: usize) -> String {
    if n == 1 {
        "1 blob is".to_owned()
    } else {
        format!("{n} blobs are")
    }
}

/// Formats the first few lines of a list.
pub(crate) fn some(lines: &[String]) -> String {
    let shown = lines.iter().take(4).map(String::as_str);
    let mut text = shown.collect::<Vec<_>>().join("; ");
    if lines.len() > 4 {
        text.push_str("; …");
    }
    text
}

impl From<DmaError> for Error {
    fn from(error: DmaError) -> Error {
        Error::Dma(Arc::new(error))
    }
}

impl Error {
    /// Returns the error of a checkpoint for those who wait for what is owed.
    pub(crate) fn owed(error: Error) -> Error {
        match error {
            Error::Io(error) => Error::Owed(error),
            error => error,
        }
    }

    /// Whether the device has failed, and nothing else is wrong.
    pub(crate) fn is_of_device(&self) -> bool {
        match self {
            Error::Io(_) | Error::Device(_) | Error::Owed(_) | Error::Lost(_) => true,
            Error::Shared(error) => error.is_of_device(),
            Error::Undecided(error) => error.is_of_device(),
            _ => false,
        }
    }

    pub(crate) fn invalid(text: impl Into<String>) -> Error {
        Error::InvalidInput(text.into())
    }
}
