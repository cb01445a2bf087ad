//! [`Blobstore`]: a store in use, its blobs and its properties.

use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, ReentrantMutex};
use pumice_bdev::{AsyncChannel, BlockDevice, SharedChannels};

use super::blob::Blob;
use super::channels::Channels;
use super::claims::Claim;
use super::commit::Commit;
use super::data::Cut;
use super::error::Error;
use super::format::{BlobId, BsType, PageError, SuperBlock};
use super::mdio::{Abilities, MdChannels};
use super::ops::CreateOptions;
use super::order::{Order, Scope};
use super::remains;
use super::repair;
use super::shared::Shared;
use super::space::{SpacePolicy, Spend};
use super::state::State;
use super::steady::FailedFlush;
use super::transaction::Transaction;

/// Counts of clusters or metadata pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// The number of all.
    pub total: u64,
    /// The number in use.
    pub used: u64,
}

/// A blobstore: blobs of clusters on a block device, in SPDK's format. It is cheap to clone, and
/// all clones are the same store. Metadata operations block and may be called from any thread;
/// those of different blobs overlap.
///
/// Dropping the last clone without [`Blobstore::unload`] loses nothing that was durable, but the
/// next load has to scan the metadata.
#[derive(Debug, Clone)]
pub struct Blobstore {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    /// Writes changes to the device. It is dropped before the claim, since it may still write then.
    pub commit: Box<dyn Commit>,
    /// Dropped at the unload.
    pub claim: Mutex<Option<Claim>>,
    pub dev: Arc<dyn BlockDevice>,
    pub channels: Channels,
    /// For I/O that outlives the call that begins it; opened at the first use.
    pub shared: OnceLock<SharedChannels>,
    /// Held while the application opens an external snapshot, so that it opens each once. Never taken
    /// with the state locked; an application may open another blob meanwhile.
    pub opening: ReentrantMutex<()>,
    pub cluster_size: u64,
    pub io_unit_size: u32,
    pub block_size: u64,
    /// Abilities of the device.
    pub can: Abilities,
    /// The rules for dividing ranges of blobs into operations.
    pub cut: Cut,
    pub bstype: BsType,
    pub failed_flush: Arc<FailedFlush>,
    /// Whether it was loaded so that nothing is ever written.
    pub read_only: bool,
    pub md_channels: Arc<MdChannels>,
    /// The reason why changes may be missing, if the load has found the journal damaged.
    pub journal_damage: Option<String>,
    /// Decides which changes may run at the same time. It is entered before the state is locked.
    pub order: Order,
    /// Locked only briefly, and never while a device works.
    pub state: Mutex<State>,
}

impl Blobstore {
    /// Creates a blob, durably. Blocks.
    ///
    /// # Errors
    /// Fails if there is no space or no metadata page, if an option is not valid, and when the
    /// device fails.
    pub fn create(&self, opts: &CreateOptions) -> Result<BlobId, Error> {
        let mut transaction = self.transaction();
        let blob = transaction.create(opts.clone());
        Ok(transaction.commit()?.id(blob))
    }

    /// Opens a blob. Opens are counted, so it may be open more than once.
    ///
    /// # Errors
    /// Fails if there is no such blob, if its metadata is damaged, if its parent is missing, and if
    /// a change of it does not come to an end ([`Error::Busy`]).
    pub fn open(&self, id: BlobId) -> Result<Blob, Error> {
        if let Some(shared) = opened(&self.inner.state.lock(), id)? {
            return Ok(self.handle(shared));
        }
        // A change in progress may delete it or take clusters from it, so nobody looks at it
        // meanwhile. One that ends before the turn comes may have given it another parent.
        loop {
            let external = self.open_external_of(id)?;
            let _turn = self.turn(Scope::Blobs(vec![id]))?;
            let mut state = self.inner.state.lock();
            if let Some(shared) = opened(&state, id)? {
                return Ok(self.handle(shared));
            }
            let named = state.blobs.external_id(id)?;
            if named.is_none_or(|named| {
                let externals = &state.blobs.externals;
                externals.is_open(&named, external.as_ref())
            }) {
                return Ok(self.handle(state.blobs.make_handle(id)?));
            }
        }
    }

    /// Opens a blob that a change has just created, while its turn lasts: so nothing has to be
    /// waited for. The blob has no parent.
    pub(crate) fn open_created(&self, id: BlobId) -> Result<Blob, Error> {
        let mut state = self.inner.state.lock();
        let shared = match state.blobs.shared(id) {
            Some(shared) => shared,
            None => state.blobs.make_handle(id)?,
        };
        drop(state);
        Ok(self.handle(shared))
    }

    fn handle(&self, shared: Arc<Shared>) -> Blob {
        Blob {
            store: self.clone(),
            shared,
        }
    }

    /// Returns the blobs in order of their ids, without those that were left out, and without the
    /// one that holds the journal.
    #[must_use]
    pub fn blobs(&self) -> Vec<BlobId> {
        let state = self.inner.state.lock();
        let ids = state.blobs.by_root.values().map(|slot| slot.meta.id);
        ids.filter(|id| state.blobs.journal != Some(*id)).collect()
    }

    /// Returns the blob that holds the journal, if the store has one ([`InitOptions::journal`](super::InitOptions::journal)). It
    /// cannot be opened or changed.
    #[must_use]
    pub fn journal(&self) -> Option<BlobId> {
        self.inner.state.lock().blobs.journal
    }

    /// Returns the reason why changes may be missing, if the journal was damaged when the store was
    /// loaded.
    #[must_use]
    pub fn journal_damage(&self) -> Option<&str> {
        self.inner.journal_damage.as_deref()
    }

    /// Returns the blobs that have `id` as their parent, in order of their ids. A blob that has
    /// some is a snapshot.
    #[must_use]
    pub fn clones(&self, id: BlobId) -> Vec<BlobId> {
        let state = self.inner.state.lock();
        let children = state.blobs.children.get(&id).into_iter().flatten();
        children.copied().collect()
    }

    /// Returns the blobs that were left out because their metadata is damaged, and the reasons.
    #[must_use]
    pub fn damaged(&self) -> Vec<(BlobId, PageError)> {
        let state = self.inner.state.lock();
        state
            .blobs
            .damaged
            .iter()
            .map(|(root, error)| (BlobId::from_page(*root), error.clone()))
            .collect()
    }

    /// Describes the damage of [`Blobstore::damaged`]: one line for each blob, with its xattr
    /// `name` if that can still be read.
    #[must_use]
    pub fn damage(&self) -> Vec<String> {
        let state = self.inner.state.lock();
        remains::describe(&state.blobs.damaged, &state.blobs.remains)
    }

    /// Returns the number of bytes of a cluster.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.inner.cluster_size
    }

    /// Returns the number of bytes of an io unit, the smallest read or write that SPDK does on this
    /// store.
    #[must_use]
    pub fn io_unit_size(&self) -> u32 {
        self.inner.io_unit_size
    }

    /// Returns what the store is used for.
    #[must_use]
    pub fn bstype(&self) -> BsType {
        self.inner.bstype
    }

    /// Returns the number of clusters for all blobs together.
    #[must_use]
    pub fn total_clusters(&self) -> u64 {
        let state = self.inner.state.lock();
        u64::from(state.space.geo.data_clusters())
    }

    /// Returns the number of clusters that can be allocated: those that no blob has, or none while
    /// nothing is allocated ([`Error::Held`]).
    #[must_use]
    pub fn free_clusters(&self) -> u64 {
        let state = self.inner.state.lock();
        match state.space.held() {
            Some(_) => 0,
            None => u64::from(state.space.clusters.free()),
        }
    }

    /// Returns the number of metadata pages.
    #[must_use]
    pub fn md_pages(&self) -> Usage {
        let state = self.inner.state.lock();
        Usage {
            total: state.space.pages.len().into(),
            used: state.space.pages.used().into(),
        }
    }

    /// Sets what is reserved, from the next change on.
    pub fn set_space_policy(&self, policy: SpacePolicy) {
        self.inner.state.lock().space.set_policy(policy);
    }

    /// Returns the number of clusters that an ordinary change can take.
    #[must_use]
    pub fn available_clusters(&self) -> u64 {
        let state = self.inner.state.lock();
        state.space.clusters_for(Spend::Ordinary)
    }

    /// Returns the number of clusters that are reserved from ordinary changes.
    #[must_use]
    pub fn reserved_clusters(&self) -> u64 {
        self.inner.state.lock().space.reserve_clusters().into()
    }

    /// Returns the number of clusters of the journal.
    #[must_use]
    pub fn journal_clusters(&self) -> u64 {
        let state = self.inner.state.lock();
        let root = state.blobs.journal.and_then(BlobId::page);
        let slot = root.and_then(|root| state.blobs.by_root.get(&root));
        slot.map_or(0, |slot| slot.meta.map.num_clusters())
    }

    /// Whether an ordinary change can take a metadata page, if necessary by growth of the region.
    #[must_use]
    pub fn can_take_md_page(&self) -> bool {
        self.inner.state.lock().space.can_take_page()
    }

    /// Returns the number of metadata pages that a new store of this size would have.
    #[must_use]
    pub fn fitting_md_pages(&self) -> u64 {
        self.inner.state.lock().space.fitting_pages()
    }

    /// Returns the number of metadata pages that an ordinary change can take before the region has
    /// to grow.
    #[must_use]
    pub fn available_md_pages(&self) -> u64 {
        let state = self.inner.state.lock();
        state.space.pages_for(Spend::Ordinary)
    }

    /// Returns the super block in memory.
    #[must_use]
    pub fn super_block(&self) -> SuperBlock {
        self.inner.state.lock().sb.clone()
    }

    /// Returns the application's super blob.
    #[must_use]
    pub fn super_blob(&self) -> Option<BlobId> {
        self.inner.state.lock().sb.super_blob()
    }

    /// Sets the application's super blob, durably. Blocks.
    ///
    /// # Errors
    /// Fails when the device does.
    pub fn set_super_blob(&self, id: Option<BlobId>) -> Result<(), Error> {
        let edit = self.edit(&Scope::All)?;
        edit.change(|state, change| {
            let mut sb = state.sb.clone();
            sb.super_blob = id.unwrap_or(BlobId::INVALID).0.into();
            change.super_block = Some(Box::new((sb, state.space.geo.clone())));
            Ok(())
        })
    }

    /// Names the log in shared memory that belongs to the store from now on; 0 for none. Durable on return. Blocks.
    pub(crate) fn set_session(&self, session: u64) -> Result<(), Error> {
        // Neither blobs nor metadata pages move, so that what cannot be put in place does not keep a store from being mounted.
        let edit = self.edit_around_blobs()?;
        edit.change(|state, change| {
            change.names_log = true;
            let mut sb = state.sb.clone();
            sb.set_session(session);
            change.super_block = Some(Box::new((sb, state.space.geo.clone())));
            Ok(())
        })
    }

    /// Deletes a damaged blob ([`Blobstore::damaged`]) and everything that it holds. Its clones can
    /// no longer be opened then. If it was the last one of a store in which nothing was allocated
    /// ([`Error::Held`]), allocation works from then on. Durable on return. Blocks.
    ///
    /// # Errors
    /// Fails if the blob is not damaged, and when the device fails.
    pub fn delete_damaged(&self, id: BlobId) -> Result<(), Error> {
        let edit = self.edit(&Scope::All)?;
        edit.change(|state, change| {
            if !state.blobs.is_damaged(id) {
                state.blobs.meta(id)?;
                return Err(Error::invalid(format!("blob {id} is not damaged")));
            }
            change.discarded.extend(id.page());
            Ok(())
        })
    }

    /// Completes or undoes half-made and half-removed snapshots, if there are any.
    pub(crate) fn end_half_done(&self) -> Result<(), Error> {
        if self.inner.state.lock().blobs.half_done().is_empty() {
            return Ok(());
        }
        repair::end_half_done(&self.edit(&Scope::All)?)
    }

    /// Whether appends can be carried: whether there is a journal.
    pub(crate) fn carries(&self) -> bool {
        self.inner.commit.carries()
    }

    /// Returns the number of bytes of blobs that the journal has and that are not in place.
    pub(crate) fn owed_bytes(&self) -> u64 {
        self.inner.commit.owed_bytes()
    }

    /// Makes room in the journal if it has none to carry an append of `len` bytes.
    ///
    /// # Errors
    /// Fails when the device does.
    pub(crate) fn make_carry_room(&self, len: u64) -> Result<(), Error> {
        self.inner.commit.make_carry_room(len)
    }

    /// Begins a list of changes for one commit.
    pub fn transaction(&self) -> Transaction {
        Transaction::new(self.clone())
    }

    /// Returns this thread's channel to the device, which is opened at the first use.
    ///
    /// # Errors
    /// Fails if the device gives no channel, and if the store is unloaded.
    pub fn channel(&self) -> Result<AsyncChannel, Error> {
        self.inner.channels.get()
    }

    /// Opens the channels that all threads share, at most `want`, one at first, for I/O that outlives
    /// the call that begins it. Done once; later calls change nothing.
    ///
    /// # Errors
    /// The device gives none.
    pub(crate) fn open_shared(&self, want: usize) -> Result<&SharedChannels, Error> {
        if let Some(shared) = self.inner.shared.get() {
            return Ok(shared);
        }
        let opened = SharedChannels::new(&self.inner.dev, want)?;
        Ok(self.inner.shared.get_or_init(|| opened))
    }

    /// The channels that all threads share.
    ///
    /// # Errors
    /// As [`Blobstore::open_shared`].
    pub(crate) fn shared(&self) -> Result<&SharedChannels, Error> {
        self.open_shared(1)
    }

    /// Waits a moment for I/O on the shared channels, if there is some in flight.
    pub(crate) fn drive_shared(&self) {
        self.inner.shared.get().map(SharedChannels::wait_any);
    }

    /// Reaps what has completed on the shared channels.
    pub(crate) fn poll_shared(&self) {
        self.inner.shared.get().map(SharedChannels::poll_all);
    }

    /// Calls `f` with this thread's channel to the device.
    ///
    /// # Errors
    /// Fails as [`Blobstore::channel`] does.
    pub fn with_channel<R>(&self, f: impl FnOnce(&AsyncChannel) -> R) -> Result<R, Error> {
        Ok(f(&self.channel()?))
    }

    /// Returns the device that holds the store.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.inner.dev
    }
}

/// Returns the blob, if it is open and can still be opened.
fn opened(state: &State, id: BlobId) -> Result<Option<Arc<Shared>>, Error> {
    state.lifecycle.check_loaded()?;
    Ok(state.blobs.shared(id))
}
