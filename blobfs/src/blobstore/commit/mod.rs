//! How a change reaches the device: a [`Batch`] says what to write, and a [`Commit`] writes it.
//!
//! A change is staged with the state locked, which makes a batch. The batch is appended without
//! that lock, and many batches may be at the same time. The change is then published or taken back,
//! with the lock again. [`order`](super::order) decides which changes may run at the same time:
//! batches in flight together name different blobs.

pub(super) mod in_place;

use std::sync::Arc;

use pumice_bdev::{DmaSlice, Op};

use super::carried::{Carried, Patch};
use super::error::Error;
use super::format::{BlobId, PAGE_SIZE, Page, SuperBlock, encode_blob, seal_chain};
use super::geometry::Geometry;
use super::meta::{BlobMeta, patched_page};

/// The writes of one change.
#[derive(Debug)]
pub(crate) struct Batch {
    /// The positions of the pages.
    pub geo: Geometry,
    /// The super block, if the mark of an orderly unload has to be removed. Nothing else in it
    /// changes.
    pub unmark: Option<Box<Page>>,
    /// Operations that write the content of clusters that nothing names yet.
    pub prepare: Vec<Op>,
    /// Metadata pages that nothing names yet, with their index.
    pub fresh: Vec<(u32, Box<Page>)>,
    /// A super block with other positions, sizes or names.
    pub super_block: Option<Box<SuperBlock>>,
    /// Whether nothing changes in it but the number of the log in shared memory.
    pub names_log: bool,
    /// Bytes of blobs that the batch carries, and their places.
    pub carried: Vec<(Carried, Vec<Patch>)>,
    /// The pages whose writes make the change, in this order.
    pub points: Vec<CommitPoint>,
    /// Metadata pages that nothing names any longer. They are zeroed.
    pub erase: Vec<u32>,
    /// Operations that clear clusters which nothing names any longer.
    pub clear: Vec<Op>,
    /// Blobs that are deleted and owed bytes that cannot be put in place.
    pub given_up: Vec<BlobId>,
}

impl Batch {
    /// Makes a batch that writes nothing.
    pub fn new(geo: Geometry) -> Batch {
        Batch {
            geo,
            unmark: None,
            prepare: Vec::new(),
            fresh: Vec::new(),
            super_block: None,
            names_log: false,
            carried: Vec::new(),
            points: Vec::new(),
            erase: Vec::new(),
            clear: Vec::new(),
            given_up: Vec::new(),
        }
    }
}

/// A page whose write is a step of a change: a root, a root that is zeroed, or the one extent page of a change of
/// one cluster.
#[derive(Debug)]
pub(crate) struct CommitPoint {
    /// Index of the page in the metadata region.
    pub index: u32,
    /// The content to write.
    pub page: Box<Page>,
    /// The content before.
    pub old: Old,
}

/// The content of a page before a change. It is encoded only if the change has to be taken back.
#[derive(Debug)]
pub(crate) enum Old {
    /// Nothing that a reader of the format recognises: the blob is new, or its root is damaged.
    Blank,
    /// The root of a blob.
    Root(Arc<BlobMeta>),
    /// The extent page of this number of a blob.
    ExtentPage(Arc<BlobMeta>, u32),
}

impl Old {
    /// Returns the page as a reader of the format sees it.
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

/// Whether the pages and clusters that a written batch has cleared may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cleared {
    /// Nothing reaches them any longer.
    Ended,
    /// An operation that clears them has timed out and may still reach them, or the next load may write there.
    MayLand,
}

/// The reason why a batch was not written.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The device has the old state.
    TakenBack(Error),
    /// A part of the batch may be on the device, now or later.
    Open {
        /// The first error.
        error: Error,
        /// The writes that take the batch back. `None` if they are unknown, because a
        /// write may still reach the device.
        restore: Option<Restore>,
    },
}

impl Failure {
    /// Returns the first error.
    pub fn into_error(self) -> Error {
        match self {
            Failure::TakenBack(error) | Failure::Open { error, .. } => error,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::TakenBack(error)
    }
}

/// The writes that take back a change of which a part is on the device.
#[derive(Debug)]
pub(crate) enum Restore {
    /// These pages, in this order.
    Pages(Vec<(u32, DmaSlice)>),
    /// The super block.
    SuperBlock(DmaSlice),
    /// An epoch of the journal that begins behind the batch.
    Ring,
}

/// The answer to the announcement of an append that is to be carried.
#[derive(Debug)]
pub(crate) enum BeginCarry<T> {
    /// It has begun.
    Begun(T),
    /// It may begin behind a checkpoint; see [`Commit::make_carry_room`].
    NoRoom,
    /// It has to be written to the blob instead.
    Refused,
}

/// A way to write batches.
pub(crate) trait Commit: std::fmt::Debug + Send + Sync {
    /// Makes a batch durable. A crash in the middle leaves the old or the new state of each blob,
    /// and no new one before a new one that comes earlier in the batch. Blocks, so the state must
    /// not be locked. Batches of different threads overlap; their blobs differ.
    ///
    /// # Errors
    /// Returns [`Failure`], which says what is on the device.
    fn append(&self, batch: Batch) -> Result<Cleared, Failure>;

    /// Takes back what a batch has left on the device. What is done is removed from `restore`.
    ///
    /// # Errors
    /// Fails when the device does.
    fn restore(&self, geo: &Geometry, restore: &mut Restore) -> Result<(), Error>;

    /// Puts everything in place that was appended. No batch is appended meanwhile.
    ///
    /// # Errors
    /// Fails when the device does.
    fn settle(&self) -> Result<(), Error>;

    /// Puts every page in place that was appended. No batch is appended meanwhile. Bytes of blobs may stay where they are.
    ///
    /// # Errors
    /// Fails when the device does.
    fn put_pages(&self) -> Result<(), Error>;

    /// Ends a use of the device, behind [`Commit::settle`], before it is marked clean. The next
    /// batch begins another. It may wait for a thread that needs a channel, so the caller has none.
    fn end(&self);

    /// Whether batches can carry bytes of blobs.
    fn carries(&self) -> bool {
        false
    }

    /// Makes room if an append of `len` bytes could not be carried for want of it. The caller has no channel.
    ///
    /// # Errors
    /// Fails when the device does.
    fn make_carry_room(&self, _len: u64) -> Result<(), Error> {
        Ok(())
    }

    /// Records that a batch is going to carry `len` bytes of a blob, until [`Commit::end_carry`],
    /// if it may.
    fn begin_carry(&self, _blob: BlobId, _len: u64) -> BeginCarry<()> {
        BeginCarry::Refused
    }

    /// Ends what [`Commit::begin_carry`] has begun. The batch is durable, or there is none.
    fn end_carry(&self, _blob: BlobId) {}

    /// Waits for batches that are going to carry bytes of a blob, and puts in place what is owed to
    /// it. The caller has neither a turn in the order of changes nor a channel.
    ///
    /// # Errors
    /// Fails with [`Error::Owed`] when the device fails.
    fn settle_blob(&self, _blob: BlobId) -> Result<(), Error> {
        Ok(())
    }

    /// Puts in place what is owed to these blobs, or to all. The caller has their turn in the order
    /// of changes, and no channel.
    ///
    /// # Errors
    /// Fails with [`Error::Owed`] when the device fails.
    fn put_owed(&self, _blobs: Option<&[BlobId]>) -> Result<(), Error> {
        Ok(())
    }

    /// Returns the number of bytes that are owed.
    fn owed_bytes(&self) -> u64 {
        0
    }

    /// Returns a byte of the blob behind which everything is that it is owed.
    fn owed_from(&self, _blob: BlobId) -> Option<u64> {
        None
    }

    /// Whether one of these blobs is owed bytes.
    fn owes(&self, _blobs: &[BlobId]) -> bool {
        false
    }

    /// Puts in place what is owed to all but these blobs, which do not need theirs. It is given up.
    /// The caller has their turn in the order of changes, and no channel.
    ///
    /// # Errors
    /// Fails with [`Error::Owed`] when the device fails.
    fn give_up_owed(&self, _blobs: &[BlobId]) -> Result<(), Error> {
        Ok(())
    }

    /// Whether nothing can be appended or put in place before the next load, since a write that has
    /// timed out may still land.
    fn is_halted(&self) -> bool;
}
