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
         any cluster; `pumice fsck --repair` or deleting that blob gives up what it holds"
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
    /// A metadata write failed at a moment when the device may hold the old or the new state. The store
    /// takes no more changes; reading goes on. Load it again to go on from what the device holds.
    #[error("the store stopped taking changes after an error: {0}; load it again")]
    Stopped(String),
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
