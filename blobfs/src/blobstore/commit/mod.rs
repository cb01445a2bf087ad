//! How a change reaches the device: a [`Batch`] says what is to be written, a [`Commit`] writes it.
//!
//! A change is staged with the state locked, which gives a batch; appended without that lock, many at a time; and
//! published, or taken back, with the lock again. Who changes what at the same time is for
//! [`order`](super::order) to say: batches that are on their way together name different blobs.

pub(super) mod in_place;

use std::sync::Arc;

use pumice_bdev::Op;

use super::change::patched_page;
use super::error::Error;
use super::format::{BlobId, PAGE_SIZE, Page, SuperBlock, encode_blob, seal_chain};
use super::geometry::Geometry;
use super::meta::BlobMeta;

/// What one change writes.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Where the pages lie.
    pub geo: Geometry,
    /// The super block, of which nothing changes but the mark of a store that was unloaded in order.
    pub unmark: Option<Box<Page>>,
    /// Make ready the content of clusters that nothing names yet.
    pub prepare: Vec<Op>,
    /// Metadata pages that nothing names yet, with their index.
    pub fresh: Vec<(u32, Box<Page>)>,
    /// A super block with other places, sizes or names.
    pub super_block: Option<Box<SuperBlock>>,
    /// The pages whose writes make the change, in this order.
    pub points: Vec<CommitPoint>,
    /// Metadata pages that nothing names any longer; they are zeroed.
    pub erase: Vec<u32>,
    /// Clear clusters that nothing names any longer.
    pub clear: Vec<Op>,
}

impl Batch {
    /// A batch that writes nothing.
    pub fn new(geo: Geometry) -> Batch {
        Batch {
            geo,
            unmark: None,
            prepare: Vec::new(),
            fresh: Vec::new(),
            super_block: None,
            points: Vec::new(),
            erase: Vec::new(),
            clear: Vec::new(),
        }
    }
}

/// A page whose write is a step of a change: a root, a root that is zeroed, or the one extent page of a change of
/// one cluster.
#[derive(Debug)]
pub(crate) struct CommitPoint {
    /// Its index in the metadata region.
    pub index: u32,
    /// What is written.
    pub page: Box<Page>,
    /// What is there before.
    pub old: Old,
}

/// What a page holds before a change. It is encoded only if the change has to be taken back.
#[derive(Debug)]
pub(crate) enum Old {
    /// Nothing that a reader of the format makes sense of: the blob is new, or its root is damaged.
    Blank,
    /// The root of a blob.
    Root(Arc<BlobMeta>),
    /// The extent page of this number of a blob.
    ExtentPage(Arc<BlobMeta>, u32),
}

impl Old {
    /// The page, to a reader of the format.
    pub fn page(&self) -> Box<Page> {
        match self {
            Old::Blank => Box::new([0; PAGE_SIZE]),
            Old::Root(meta) => {
                debug_assert_ne!(meta.id, BlobId::INVALID);
                let mut pages = encode_blob(&meta.record(&[]));
                seal_chain(&mut pages, &meta.chain);
                pages.swap_remove(0)
            }
            Old::ExtentPage(meta, number) => patched_page(meta, *number, &[]),
        }
    }
}

/// Why a batch was not written.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The device has the old state.
    TakenBack(Error),
    /// A part of it may be on the device, now or later.
    Open {
        /// What went wrong first.
        error: Error,
        /// What has to be written to take it back. None if that cannot be told: a write may still land.
        restore: Option<Restore>,
    },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::TakenBack(error)
    }
}

/// What takes back a change of which a part is on the device.
#[derive(Debug)]
pub(crate) enum Restore {
    /// These pages, in this order.
    Pages(Vec<(u32, Box<Page>)>),
    /// The super block.
    SuperBlock(Box<Page>),
}

/// A way to write batches.
pub(crate) trait Commit: std::fmt::Debug + Send + Sync {
    /// Makes a batch durable. A crash on the way leaves the old or the new state of each blob, and none new before
    /// one that comes earlier in the batch. Blocks; the state must not be locked. Batches of different threads
    /// overlap; their blobs differ.
    ///
    /// # Errors
    /// See [`Failure`].
    fn append(&self, batch: Batch) -> Result<(), Failure>;

    /// Takes back what a batch has left on the device; what is done goes out of `restore`.
    ///
    /// # Errors
    /// The device fails.
    fn restore(&self, geo: &Geometry, restore: &mut Restore) -> Result<(), Error>;
}
