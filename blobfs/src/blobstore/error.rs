//! Errors of the blobstore.

use pumice_bdev::{BdevError, DmaError, IoError};

use super::format::{BlobId, BsType, PageError, SuperBlockError};

/// What can go wrong in the blobstore. Unless a variant says otherwise, the operation changed nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device operation failed.
    #[error(transparent)]
    Io(#[from] Box<IoError>),
    /// The device could not be opened or waited for.
    #[error(transparent)]
    Device(#[from] BdevError),
    /// No memory for I/O.
    #[error(transparent)]
    Dma(#[from] DmaError),
    /// The super block is none, or is damaged.
    #[error("{device}: {source}")]
    SuperBlock {
        /// The device.
        device: String,
        /// What is wrong.
        #[source]
        source: SuperBlockError,
    },
    /// The super block's figures contradict each other or the device.
    #[error("{device}: the super block cannot be used: {reason}")]
    Geometry {
        /// The device.
        device: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The store is used for something else.
    #[error("{device}: blobstore of type \"{found}\", wanted \"{wanted}\"")]
    WrongType {
        /// The device.
        device: String,
        /// What the super block says.
        found: BsType,
        /// What was asked for.
        wanted: BsType,
    },
    /// No such blob.
    #[error("no blob {0} in this store")]
    NoSuchBlob(BlobId),
    /// The blob was set aside at load because its metadata is damaged.
    #[error("blob {blob} is damaged: {source}; `pumice fsck` shows the whole store")]
    Damaged {
        /// The blob.
        blob: BlobId,
        /// Where and what.
        #[source]
        source: PageError,
    },
    /// The store has damaged blobs, and was to be loaded only without any. Nothing was written.
    #[error(
        "{device}: {} damaged: {}; load it read-only, or accept the damage",
        count(.damage.len()), some(.damage)
    )]
    DamagedStore {
        /// The device.
        device: String,
        /// A line for each damaged blob.
        damage: Vec<String>,
    },
    /// Nothing is allocated: the store was not unloaded in order, a blob is damaged, and which clusters and
    /// metadata pages it holds is not known.
    #[error(
        "nothing can be allocated: the store was not unloaded in order, and blob {0}, which is damaged, may hold \
         any cluster; `pumice fsck --repair` gives up what it holds"
    )]
    Held(BlobId),
    /// The blob was written by a newer version, or its parent is not there.
    #[error("blob {blob} cannot be opened: {reason}")]
    CannotOpen {
        /// The blob.
        blob: BlobId,
        /// Why.
        reason: String,
    },
    /// Too few free clusters.
    #[error(
        "no space: {needed} clusters needed, {free} of {total} free; delete blobs or grow the store"
    )]
    NoSpace {
        /// Clusters needed.
        needed: u64,
        /// Clusters free.
        free: u64,
        /// Clusters of the store.
        total: u64,
    },
    /// Too few free metadata pages.
    #[error(
        "no metadata pages left: {needed} needed, {free} of {total} free; delete blobs, or make a store with more (md_pages)"
    )]
    NoMdPages {
        /// Pages needed.
        needed: u64,
        /// Pages free.
        free: u64,
        /// Pages of the region.
        total: u64,
    },
    /// The blob's data or metadata must not be changed.
    #[error("blob {0} is read-only")]
    ReadOnly(BlobId),
    /// Something else has to end first.
    #[error("busy: {0}")]
    Busy(String),
    /// The request makes no sense as it stands.
    #[error("{0}")]
    InvalidInput(String),
    /// The offset and length do not lie inside the blob.
    #[error("blob {blob}: {len} bytes at offset {offset} are outside its {size} bytes")]
    OutOfRange {
        /// The blob.
        blob: BlobId,
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Size of the blob in bytes.
        size: u64,
    },
    /// A metadata write failed, and neither the old state could be restored nor the new one confirmed. The
    /// store takes no changes; reading goes on. Each change tries first to restore the old state; what the
    /// device holds is known after the store was loaded again.
    #[error(
        "the store takes no changes after an error: {0}; load it again if the device works and this goes on"
    )]
    Stopped(String),
    /// A flush of the device failed, now or earlier: what was written before it without FUA may be lost, and
    /// no later flush says anything about it. Write it again and flush after the store was loaded again.
    #[error(
        "a flush of the device failed, and what was written before it may be lost: {0}; load the store again"
    )]
    Lost(#[source] Box<IoError>),
    /// A change failed, and so did the attempt to take it back: whether it was made is open until the device
    /// works again. The next change tries to take it back first.
    #[error("it is open whether this was done: {0}")]
    Undecided(#[source] Box<Error>),
    /// The store was loaded read-only.
    #[error("the blobstore was loaded read-only")]
    ReadOnlyStore,
    /// The store was unloaded.
    #[error("the blobstore is unloaded")]
    Unloaded,
}

/// "1 blob is", "3 blobs are".
fn count(n: usize) -> String {
    if n == 1 {
        "1 blob is".to_owned()
    } else {
        format!("{n} blobs are")
    }
}

/// The first few lines of a list.
pub(crate) fn some(lines: &[String]) -> String {
    let shown = lines.iter().take(4).map(String::as_str);
    let mut text = shown.collect::<Vec<_>>().join("; ");
    if lines.len() > 4 {
        text.push_str("; …");
    }
    text
}

impl Error {
    pub(crate) fn invalid(text: impl Into<String>) -> Error {
        Error::InvalidInput(text.into())
    }
}
