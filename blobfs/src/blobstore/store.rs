//! [`Blobstore`]: making, loading and unloading a store, and its properties.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, ReentrantMutex};
use pumice_bdev::contents::{Formatting, Overwrite};
use pumice_bdev::{AsyncChannel, BlockDevice, SharedChannels};
#[cfg(doc)]
use pumice_bdev::{BdevError, contents};
use zerocopy::little_endian::U32;

use super::alloc::Bitmap;
use super::blob::{Blob, Shared};
use super::channels::Channels;
use super::claims::Claim;
use super::commit::in_place::InPlace;
use super::commit::{Commit, Failure};
use super::data::Cut;
use super::edit::Edit;
use super::error::Error;
use super::external::OpenExternal;
use super::format::{
    BlobId, BsType, MaskKind, PAGE_SIZE_U64, PageError, SuperBlock, decode_mask, encode_mask,
    mask_pages,
};
use super::geometry::{Geometry, Layout, tears_pages};
use super::journal::Journal;
use super::journal::format::RingPlace;
use super::journal::recovery::{self, Treat};
use super::mdio::{Abilities, MdChannels, MdIo, dma};
use super::meta::ClearMethod;
use super::ops::CreateOptions;
use super::order::{Order, Scope};
use super::retry::may_land;
use super::scan::{Remains, Roots, Scan, scan};
use super::space::SpacePolicy;
use super::state::{Slot, State};
use super::steady::{FailedFlush, Steady};
use super::super_page::{self, Found};
use super::transaction::Transaction;

/// Options of a new store.
#[derive(Debug, Clone)]
pub struct InitOptions {
    /// Bytes of a cluster, a multiple of 4096.
    pub cluster_size: u32,
    /// Number of pages of the metadata region, by default one for each cluster, but not more than a
    /// quarter of the device. A blob takes at least one. The region can grow later
    /// ([`Blobstore::grow_md_pages`]).
    pub md_pages: Option<u32>,
    /// The type, which says what the store is used for.
    pub bstype: BsType,
    /// The treatment of the device's data.
    pub clear_method: ClearMethod,
    /// The function that opens external snapshots.
    pub open_external: Option<OpenExternal>,
    /// Bytes of a journal, rounded up to clusters, 128 KiB to 256 MiB; none by default, as in SPDK's
    /// stores. With one, a change of metadata is one write to the journal, which changes of several
    /// threads share, and a page that a power cut tears is made whole again. The exception is a
    /// change of so many blobs that their roots take more than a quarter of the journal: it is
    /// written as without one. SPDK refuses such a store until it has been unloaded in order.
    pub journal: Option<u64>,
    /// Whether to make the store over whatever the device holds. Otherwise a device that holds
    /// anything but zeroes is refused.
    pub force: bool,
}

impl Default for InitOptions {
    fn default() -> InitOptions {
        InitOptions {
            cluster_size: 1 << 20,
            md_pages: None,
            bstype: BsType::NONE,
            clear_method: ClearMethod::Default,
            open_external: None,
            journal: None,
            force: false,
        }
    }
}

/// Options of a load.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// The type that the store must have; any if `None` or [`BsType::NONE`].
    pub bstype: Option<BsType>,
    /// The function that opens external snapshots. Without it their clones cannot be opened.
    pub open_external: Option<OpenExternal>,
    /// Whether to load without ever writing. Snapshots that a crash left half made then stay as
    /// they are, and no change is accepted.
    pub read_only: bool,
    /// Whether to refuse a store with damaged blobs: [`Error::DamagedStore`] then names them, and
    /// nothing was written but what the journal had. Otherwise they are left out
    /// ([`Blobstore::damaged`]).
    pub refuse_damage: bool,
    /// Whether to give up the changes that a damaged journal has lost. Otherwise a store with one
    /// can only be loaded read-only ([`Error::Journal`]).
    pub accept_journal_damage: bool,
    /// Whether the caller looks after the log in shared memory that a killed process may have left for the store
    /// ([`SuperBlock::session`]). Otherwise a load that writes gives it up, since what the log says may not hold any longer.
    pub keep_session: bool,
}

/// The longest single read or write of data, where the device takes as much.
const MAX_IO_BYTES: u64 = 8 << 20;
/// Largest metadata region, in bytes, that is zeroed by writing. A larger one is zeroed by the
/// device.
const MAX_WRITTEN_MD_BYTES: u64 = 80 << 20;

/// Counts of clusters or metadata pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    claim: Mutex<Option<Claim>>,
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

/// The result of a load.
struct Loaded {
    io: MdIo,
    sb: SuperBlock,
    geo: Geometry,
    scan: Scan,
    dirty: bool,
    read_only: bool,
    open_external: Option<OpenExternal>,
    journal: Option<recovery::FoundJournal>,
    journal_damage: Option<String>,
}

impl Blobstore {
    /// Makes an empty store on the device and loads it. Without [`InitOptions::force`] the device
    /// must be blank, by the rule of [`contents`]: every block that may hold data is read. Blocks.
    ///
    /// A crash in the middle leaves a device without a store, or one without the journal that was
    /// asked for, perhaps with an empty blob for it, named `pumice.journal`.
    ///
    /// # Errors
    /// Fails with [`BdevError::NotBlank`], for sizes that do not fit the device, when the device
    /// fails, and with [`BdevError::InUse`] if this process has loaded a store from the device. An
    /// image file that was created by opening the device is then removed when the device is closed.
    pub fn init(dev: Arc<dyn BlockDevice>, opts: &InitOptions) -> Result<Blobstore, Error> {
        let claim = Claim::new(&*dev, false)?;
        let formatting = Formatting::begin(&dev, Overwrite::forced(opts.force))?;
        let steady = Steady::new(Arc::clone(&dev));
        let as_dyn: Arc<dyn BlockDevice> = Arc::clone(&steady) as Arc<dyn BlockDevice>;
        let info = steady.info();
        let mut io = MdIo::new(&as_dyn, steady.failed_flush())?;
        let sb = lay_out(info.len_bytes(), info.block_size, opts)?;
        let geo = Geometry::new(&sb, info)?;
        // The old store becomes invalid first, then its metadata is cleared, then the new store is
        // written.
        let can = io.can();
        let no_super = can.written_zeroes(0, geo.page_lba(1))?;
        io.run_durable(no_super)?;
        let data = geo.cluster_lba(geo.first_data_cluster());
        match opts.clear_method {
            ClearMethod::None => {}
            ClearMethod::Default | ClearMethod::Unmap => {
                let ops = can.unmaps(data, info.num_blocks - data);
                io.run(ops)?;
            }
            ClearMethod::WriteZeroes => {
                let ops = can.zeroes(data, info.num_blocks - data)?;
                io.run(ops)?;
            }
        }
        // The host must have allocated a metadata page before it is first written, because that
        // write is a commit.
        let (first, blocks) = (geo.page_lba(1), geo.md_lba(geo.md_len - 1));
        let metadata = if blocks * geo.block_size <= MAX_WRITTEN_MD_BYTES {
            can.written_zeroes(first, blocks)?
        } else {
            can.zeroes(first, blocks)?
        };
        io.run_durable(metadata)?;
        let write = can.writes(0, &sb.encode())?;
        io.run_durable(write)?;
        let scan = Scan::empty(&geo);
        let loaded = Loaded {
            io,
            sb,
            geo,
            scan,
            dirty: true,
            read_only: false,
            open_external: opts.open_external.clone(),
            journal: None,
            journal_damage: None,
        };
        let store = Blobstore::with_state(steady, claim, loaded);
        let Some(bytes) = opts.journal else {
            formatting.finish();
            return Ok(store);
        };
        store.make_journal(bytes)?;
        store.unload()?;
        formatting.finish();
        drop(store);
        let load = LoadOptions {
            open_external: opts.open_external.clone(),
            ..LoadOptions::default()
        };
        Blobstore::load(dev, &load)
    }

    /// Loads a store: by its masks if it was unloaded in order, else by a scan of its metadata.
    /// Writes nothing, unless a crash left a snapshot half made or half removed, a torn super block,
    /// or changes in a journal. A blob with damaged metadata is left out ([`Blobstore::damaged`]),
    /// and the others are loaded.
    ///
    /// If the store was not unloaded in order, it is not known which clusters and metadata pages a
    /// damaged blob holds. Then nothing is allocated ([`Error::Held`]) until that blob is deleted,
    /// here or by [`repair`](super::check::repair). Everything else works. An unload leaves such a
    /// store as one that was not unloaded in order. Blocks.
    ///
    /// # Errors
    /// Fails if there is no store, if it has another type, if its figures do not fit the device,
    /// when the device fails, and with [`BdevError::InUse`] if this process has loaded a store from the
    /// device already. Several may be loaded if all are read-only.
    pub fn load(dev: Arc<dyn BlockDevice>, opts: &LoadOptions) -> Result<Blobstore, Error> {
        Blobstore::load_with(dev, opts, false)
    }

    /// Loads a store by a scan whatever its super block says, as one that was not unloaded in
    /// order.
    pub(crate) fn load_by_scan(
        dev: Arc<dyn BlockDevice>,
        opts: &LoadOptions,
    ) -> Result<Blobstore, Error> {
        Blobstore::load_with(dev, opts, true)
    }

    fn load_with(
        dev: Arc<dyn BlockDevice>,
        opts: &LoadOptions,
        by_scan: bool,
    ) -> Result<Blobstore, Error> {
        let claim = Claim::new(&*dev, opts.read_only)?;
        let steady = Steady::new(dev);
        let dev: Arc<dyn BlockDevice> = Arc::clone(&steady) as Arc<dyn BlockDevice>;
        let info = dev.info();
        let name = || info.name.clone();
        if info.len_bytes() < PAGE_SIZE_U64 {
            let reason = format!(
                "a device of {} bytes is too small for a blobstore",
                info.len_bytes()
            );
            return Err(Error::Geometry {
                device: name(),
                reason,
            });
        }
        let mut io = MdIo::new(&dev, steady.failed_flush())?;
        let Found { sb, torn } = super_page::read(&mut io, info)?;
        if let Some(wanted) = opts.bstype
            && wanted != BsType::NONE
            && wanted != sb.bstype()
        {
            return Err(Error::WrongType {
                device: name(),
                found: sb.bstype(),
                wanted,
            });
        }
        let geo = Geometry::new(&sb, info)?;
        let treat = if opts.read_only {
            Treat::ReadOnly
        } else if opts.accept_journal_damage {
            Treat::Damaged
        } else {
            Treat::Whole
        };
        let search = recovery::find(&mut io, &geo, &sb, &info.name, treat)?;
        steady.set_replayed(search.blocks);
        // The masks of a store that was not unloaded in order are those of the last orderly unload.
        // They cannot be trusted, but they name the roots and clusters of that time.
        let (masks, past) = Masks::read(&mut io, &geo, &sb)?;
        let blobids = masks.as_ref().map(|masks| &masks.blobids[..]);
        let roots = match blobids {
            Some(blobids) if sb.is_clean() && !by_scan => Roots::Mask(blobids),
            // A damaged root that a valid mask names must not be forgotten.
            _ => Roots::Scan {
                sure: blobids.filter(|_| sb.is_clean()),
                past: past.blobids.as_deref(),
            },
        };
        if let Roots::Scan { .. } = roots {
            tracing::info!(device = info.name, "scanning all metadata");
        }
        let mut scan = scan(&mut io, &geo, &roots)?;
        if !opts.read_only {
            // From now on the journal knows what is not in place.
            io.set_replayed(BTreeMap::new());
        }
        let mut uncertain = false;
        match (&roots, &masks) {
            (Roots::Mask(_), Some(masks)) => scan.trust(masks),
            _ if scan.damaged.is_empty() => {}
            // Trusted masks know what the damaged blobs hold. Other masks know a part of it, and
            // then nothing is allocated.
            _ => {
                uncertain = masks.is_none() || !sb.is_clean();
                if let Some(clusters) = &past.clusters {
                    scan.clusters.merge(clusters);
                }
            }
        }
        if opts.refuse_damage && !scan.damaged.is_empty() {
            return Err(Error::DamagedStore {
                device: name(),
                damage: damage_list(&scan),
            });
        }
        let dirty = !sb.is_clean() || by_scan;
        let journal_damage = search.damage;
        let has_left = search
            .journal
            .as_ref()
            .is_some_and(|journal| journal.left.is_some());
        let journal = search.journal.filter(|journal| {
            let place = &journal.place;
            let meta = place.blob.page().and_then(|root| scan.blobs.get(&root));
            let is_its = meta.is_some_and(|meta| recovery::is_of(meta, place));
            if !is_its {
                tracing::warn!(
                    device = info.name,
                    "the journal's blob is damaged, or another program has changed it: the journal is no longer used"
                );
            }
            is_its
        });
        if journal.is_none() && has_left {
            // It is the only place of what could not be put in place.
            return Err(Error::Journal {
                device: name(),
                reason: "its blob is damaged, or another program has changed it, and it has bytes that cannot be put in place"
                    .to_owned(),
            });
        }
        if journal.is_none()
            && let Some(whole_bytes) = tears_pages(info)
        {
            tracing::info!(
                device = info.name,
                whole_bytes,
                "a power cut can tear a metadata page that is being written"
            );
        }
        let mut loaded = Loaded {
            io,
            sb,
            geo,
            scan,
            dirty,
            read_only: opts.read_only,
            open_external: opts.open_external.clone(),
            journal,
            journal_damage,
        };
        if torn && !opts.read_only {
            super_page::restore(&mut loaded.io, &loaded.geo, &dma(&loaded.sb.encode())?)?;
        }
        if loaded.sb.is_guarded() && loaded.journal.is_none() && !opts.read_only {
            // Its clusters may be given to others, whose bytes must not be read as a ring.
            RingPlace::remove(&mut loaded.sb);
            let removed = super_page::write(&mut loaded.io, &loaded.geo, &loaded.sb);
            removed.map_err(Failure::into_error)?;
        }
        let store = Blobstore::with_state(steady, claim, loaded);
        let held = {
            let mut state = store.inner.state.lock();
            state.uncertain = uncertain;
            let held = state.held().is_some();
            if held {
                state.note_unowned();
            }
            held
        };
        if held {
            tracing::error!(
                "nothing is allocated: it is not known which clusters the damaged blobs hold"
            );
        } else if !opts.read_only {
            store.end_half_done()?;
        }
        if !opts.read_only && !opts.keep_session && store.super_block().session() != 0 {
            store.set_session(0)?;
        }
        Ok(store)
    }

    fn with_state(steady: Arc<Steady>, claim: Claim, loaded: Loaded) -> Blobstore {
        let (failed_flush, late_writes) = (steady.failed_flush(), steady.late_writes());
        let dev: Arc<dyn BlockDevice> = steady;
        let Loaded {
            io,
            sb,
            geo,
            scan,
            dirty,
            read_only,
            open_external,
            journal,
            journal_damage,
        } = loaded;
        let (cluster_size, io_unit_size, block_size) =
            (geo.cluster_size, geo.io_unit_size, geo.block_size);
        let bstype = sb.bstype();
        let blobs = scan
            .blobs
            .into_iter()
            .map(|(root, meta)| (root, Slot::new(Arc::new(meta))));
        let longest = dev.info().transfer_blocks(MAX_IO_BYTES) * block_size;
        let cut = Cut {
            cluster: cluster_size,
            block: block_size,
            // Pages are cached whole where an operation is not cut inside one.
            longest: match longest / PAGE_SIZE_U64 {
                0 => longest,
                pages => pages * PAGE_SIZE_U64,
            },
        };
        let mut state = State {
            sb,
            geo,
            can: io.can(),
            dirty,
            clean_in_doubt: false,
            journal: journal.as_ref().map(|journal| journal.place.blob),
            unloaded: false,
            unloading: false,
            read_only,
            stopped: None,
            doubts: Vec::new(),
            late: Vec::new(),
            late_writes,
            half_snapshot: None,
            pages: scan.pages,
            clusters: scan.clusters,
            policy: SpacePolicy::default(),
            growth_blocked: None,
            blobs: blobs.collect::<BTreeMap<_, _>>(),
            damaged: scan.damaged,
            remains: scan.remains,
            uncertain: false,
            unowned: None,
            lines: HashMap::new(),
            children: HashMap::new(),
            shared_clusters: scan.shared_clusters,
            shared_pages: scan.shared_pages,
            open_external,
            externals: HashMap::new(),
        };
        state.index_children();
        let channels = Channels::new(Arc::clone(&dev));
        let md_channels = Arc::new(MdChannels::new(Arc::clone(&dev), io));
        let commit: Box<dyn Commit> = match journal {
            Some(found) => {
                let channels = Arc::clone(&md_channels);
                Box::new(Journal::new(channels, &state.geo, found))
            }
            None => Box::new(InPlace::new(Arc::clone(&md_channels))),
        };
        let inner = Inner {
            dev,
            channels,
            shared: OnceLock::new(),
            opening: ReentrantMutex::new(()),
            cluster_size,
            io_unit_size,
            block_size,
            can: state.can,
            cut,
            bstype,
            failed_flush,
            read_only,
            claim: Mutex::new(Some(claim)),
            journal_damage,
            commit,
            md_channels,
            order: Order::default(),
            state: Mutex::new(state),
        };
        Blobstore {
            inner: Arc::new(inner),
        }
    }

    /// Unloads the store in order: waits for I/O in flight on the channels of all threads, writes
    /// the masks, then marks the store clean. Writes nothing if nothing has changed since a clean
    /// load. Blocks; the metadata can be used while it waits for I/O.
    ///
    /// # Errors
    /// Fails if blobs are open, if I/O does not end ([`Error::Busy`]), and when the device fails;
    /// the store then stays loaded. With [`Error::Stopped`] the store is unloaded, but not in
    /// order, since it is not known what the device holds of the change that failed. The next load
    /// finds out.
    pub fn unload(&self) -> Result<(), Error> {
        self.end(false)
    }

    /// Unloads the store as [`Blobstore::unload`] does, and not in order if the device fails: what
    /// is durable stays so, in the journal if it cannot be put in place. The next load recovers.
    ///
    /// # Errors
    /// As [`Blobstore::unload`]. When the device has failed, the store is unloaded nevertheless.
    pub(crate) fn unload_anyway(&self) -> Result<(), Error> {
        self.end(true)
    }

    fn end(&self, anyway: bool) -> Result<(), Error> {
        let inner = &self.inner;
        {
            let mut state = inner.state.lock();
            state.check_unloadable()?;
            state.unloading = true;
        }
        if let Some(shared) = inner.shared.get() {
            shared.drain();
        }
        let quiet = inner.channels.quiesce();
        // Nobody else changes anything until it is unloaded.
        let (_edit, ended) = match self.edit_to_the_end() {
            Ok(edit) if quiet => {
                let ended = edit.unload();
                (Some(edit), ended)
            }
            Ok(edit) => {
                let error = Error::Busy(
                    "I/O on a channel of the store does not come to an end; drive or await it before unloading"
                        .to_owned(),
                );
                (Some(edit), Err(error))
            }
            Err(error) => (None, Err(error)),
        };
        let mut state = inner.state.lock();
        state.unloading = false;
        if let Err(error) = &ended
            && inner.commit.is_halted()
        {
            state.stop(error, true);
        }
        if let Err(error) = &ended
            && !matches!(error, Error::Stopped(_))
            && !(anyway && quiet && error.is_of_device())
        {
            inner.channels.reopen();
            return ended;
        }
        state.unloaded = true;
        let in_order = state.check_not_stopped().and(ended);
        drop(state);
        inner.channels.close();
        inner.commit.end();
        inner.md_channels.close();
        if let Some(shared) = inner.shared.get() {
            shared.close(inner.dev.info());
        }
        *inner.claim.lock() = None;
        in_order
    }

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
        if let Some(shared) = self.inner.state.lock().opened(id)? {
            return Ok(self.handle(shared));
        }
        // A change in progress may delete it or take clusters from it, so nobody looks at it
        // meanwhile. One that ends before the turn comes may have given it another parent.
        loop {
            let external = self.open_external_of(id)?;
            let _turn = self.turn(Scope::Blobs(vec![id]))?;
            let mut state = self.inner.state.lock();
            if let Some(shared) = state.opened(id)? {
                return Ok(self.handle(shared));
            }
            let named = state.external_id(id)?;
            if named.is_none_or(|named| state.is_external(&named, external.as_ref())) {
                return Ok(self.handle(state.make_handle(id)?));
            }
        }
    }

    /// Opens a blob that a change has just created, while its turn lasts: so nothing has to be
    /// waited for. The blob has no parent.
    pub(crate) fn open_created(&self, id: BlobId) -> Result<Blob, Error> {
        let mut state = self.inner.state.lock();
        let shared = match state.shared(id) {
            Some(shared) => shared,
            None => state.make_handle(id)?,
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
        let ids = state.blobs.values().map(|slot| slot.meta.id);
        ids.filter(|id| state.journal != Some(*id)).collect()
    }

    /// Returns the blob that holds the journal, if the store has one ([`InitOptions::journal`]). It
    /// cannot be opened or changed.
    #[must_use]
    pub fn journal(&self) -> Option<BlobId> {
        self.inner.state.lock().journal
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
        let children = state.children.get(&id).into_iter().flatten();
        children.copied().collect()
    }

    /// Returns the blobs that were left out because their metadata is damaged, and the reasons.
    #[must_use]
    pub fn damaged(&self) -> Vec<(BlobId, PageError)> {
        let state = self.inner.state.lock();
        state
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
        describe_damage(&state.damaged, &state.remains)
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
        u64::from(state.geo.data_clusters())
    }

    /// Returns the number of clusters that can be allocated: those that no blob has, or none while
    /// nothing is allocated ([`Error::Held`]).
    #[must_use]
    pub fn free_clusters(&self) -> u64 {
        let state = self.inner.state.lock();
        match state.held() {
            Some(_) => 0,
            None => u64::from(state.clusters.free()),
        }
    }

    /// Returns the number of metadata pages.
    #[must_use]
    pub fn md_pages(&self) -> Usage {
        let state = self.inner.state.lock();
        Usage {
            total: state.pages.len().into(),
            used: state.pages.used().into(),
        }
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
            change.super_block = Some(Box::new((sb, state.geo.clone())));
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
            change.super_block = Some(Box::new((sb, state.geo.clone())));
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
            if !state.is_damaged(id) {
                state.meta(id)?;
                return Err(Error::invalid(format!("blob {id} is not damaged")));
            }
            change.discarded.extend(id.page());
            Ok(())
        })
    }

    /// Completes or undoes half-made and half-removed snapshots, if there are any.
    pub(crate) fn end_half_done(&self) -> Result<(), Error> {
        if self.inner.state.lock().half_done().is_empty() {
            return Ok(());
        }
        self.edit(&Scope::All)?.end_half_done()
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

impl State {
    /// Makes the part that the handles of a blob share. The blob is not open.
    fn make_handle(&mut self, id: BlobId) -> Result<Arc<Shared>, Error> {
        let view = self.view(id)?;
        let meta = Arc::clone(self.meta(id)?);
        let shared = Arc::new(Shared::new(meta, view));
        let root = id.page().expect("it has metadata");
        let slot = self.blobs.get_mut(&root).expect("it has metadata");
        slot.handle = Arc::downgrade(&shared);
        Ok(shared)
    }

    /// Returns the blob, if it is open and can still be opened.
    fn opened(&self, id: BlobId) -> Result<Option<Arc<Shared>>, Error> {
        if self.unloaded {
            return Err(Error::Unloaded);
        }
        if self.unloading {
            return Err(Error::Busy("the store is being unloaded".to_owned()));
        }
        Ok(self.shared(id))
    }

    /// Fails if the store cannot be unloaded.
    fn check_unloadable(&self) -> Result<(), Error> {
        if self.unloaded {
            return Err(Error::Unloaded);
        }
        if self.unloading {
            return Err(Error::Busy("the store is being unloaded".to_owned()));
        }
        self.check_none_open()
    }

    fn check_none_open(&self) -> Result<(), Error> {
        let open = self
            .blobs
            .values()
            .find(|slot| slot.handle.strong_count() > 0);
        match open {
            Some(slot) => Err(Error::Busy(format!(
                "blob {} is open, or a write to it has not ended; close all blobs before unloading",
                slot.meta.id
            ))),
            None => Ok(()),
        }
    }

    /// Returns the masks, each with the page where it begins.
    fn masks(&self) -> Vec<(u32, Vec<u8>)> {
        let mut blobids = Bitmap::new(self.geo.md_len);
        for root in self.blobs.keys().chain(self.damaged.keys()) {
            blobids.set(*root);
        }
        // No blob names what late writes may still reach: it is free from the next load on.
        let (mut pages, mut clusters) = (self.pages.clone(), self.clusters.clone());
        for change in &self.late {
            change.give_back(&mut pages, &mut clusters);
        }
        let sb = &self.sb;
        let mask = |start: U32, kind, bits: &Bitmap| {
            (start.get(), encode_mask(kind, bits.len(), bits.words()))
        };
        let mut masks = vec![
            mask(sb.used_page_mask_start, MaskKind::Pages, &pages),
            mask(sb.used_cluster_mask_start, MaskKind::Clusters, &clusters),
        ];
        if sb.used_blobid_mask_len.get() != 0 {
            masks.push(mask(sb.used_blobid_mask_start, MaskKind::BlobIds, &blobids));
        }
        masks
    }
}

impl Edit<'_> {
    /// Leaves the device as an orderly unload leaves it.
    fn unload(&self) -> Result<(), Error> {
        {
            let state = self.state();
            state.check_none_open()?;
            if state.read_only {
                return Ok(());
            }
        }
        self.take_back_doubts();
        let (held, dirty) = {
            let state = self.state();
            state.check_not_stopped()?;
            (state.held(), state.dirty)
        };
        if let Some(id) = held {
            // Masks would let others allocate what the damaged blob holds.
            tracing::warn!(blob = %id, "the store stays marked as not unloaded in order: a blob is damaged");
            self.store.inner.commit.settle().map_err(Error::owed)?;
            return self.store.inner.md_channels.get()?.flush();
        }
        if dirty {
            self.write_masks()?;
        }
        Ok(())
    }

    /// Writes the masks and marks the store clean.
    fn write_masks(&self) -> Result<(), Error> {
        let commit = &self.store.inner.commit;
        commit.settle().map_err(Error::owed)?;
        // Whatever fails from here on: the next change begins another use of the journal, and
        // removes the mark of an orderly unload.
        self.state().clean_in_doubt = true;
        // Before a channel is taken, since this may wait for a thread that needs one.
        commit.end();
        let mut io = self.store.inner.md_channels.get()?;
        // Data and metadata that are in a volatile cache become durable before the mark.
        io.flush()?;
        let (masks, geo, mut sb) = {
            let state = self.state();
            (state.masks(), state.geo.clone(), state.sb.clone())
        };
        let mut ops = Vec::new();
        for (start, mask) in masks {
            ops.extend(io.can().writes(geo.page_lba(start.into()), &mask)?);
        }
        io.run_durable(ops)?;
        sb.clean = 1.into();
        if sb.is_guarded() {
            sb.set_guard(false);
        }
        let mark = io.can().writes(0, &sb.encode())?;
        let marked = io.run_durable(mark);
        let mut state = self.state();
        if let Err(error) = marked {
            if may_land(&error) {
                // It could land behind the change that removes it.
                state.stop(&error, true);
            }
            return Err(error);
        }
        state.clean_in_doubt = false;
        state.sb = sb;
        state.dirty = false;
        Ok(())
    }
}

fn damage_list(scan: &Scan) -> Vec<String> {
    describe_damage(&scan.damaged, &scan.remains)
}

/// Returns one line for each damaged blob.
pub(crate) fn describe_damage(
    damaged: &BTreeMap<u32, PageError>,
    remains: &BTreeMap<u32, Remains>,
) -> Vec<String> {
    let line = |(root, error): (&u32, &PageError)| {
        let id = BlobId::from_page(*root);
        match remains.get(root).and_then(|r| r.name.as_deref()) {
            Some(name) => format!("blob {id} (\"{name}\"): {error}"),
            None => format!("blob {id}: {error}"),
        }
    };
    damaged.iter().map(line).collect()
}

/// The masks of the last orderly unload.
pub(crate) struct Masks {
    pub pages: Vec<u64>,
    pub clusters: Bitmap,
    pub blobids: Vec<u64>,
}

/// The readable parts of the masks of the last orderly unload.
#[derive(Default)]
pub(crate) struct PastMasks {
    pub clusters: Option<Vec<u64>>,
    pub blobids: Option<Vec<u64>>,
}

impl Masks {
    /// Reads the masks. Returns `None` for them if one is missing or is not a mask; the metadata
    /// must then be scanned. The parts that can be read are returned beside them.
    pub fn read(
        io: &mut MdIo,
        geo: &Geometry,
        sb: &SuperBlock,
    ) -> Result<(Option<Masks>, PastMasks), Error> {
        if sb.used_blobid_mask_len.get() == 0 {
            return Ok((None, PastMasks::default()));
        }
        let mut read = |start: u32, kind: MaskKind, bits: u32| {
            let mut bytes = Vec::new();
            let mut page = u64::from(start);
            let end = page + mask_pages(bits.into());
            let step = (io.can().max_io_blocks() * geo.block_size / PAGE_SIZE_U64).max(1);
            while page < end {
                let now = step.min(end - page);
                let len = usize::try_from(now * PAGE_SIZE_U64).expect("at most 1 MiB");
                bytes.extend_from_slice(&io.read(geo.page_lba(page), len)?);
                page += now;
            }
            let mask = decode_mask(&bytes, kind, bits);
            if let (Err(error), true) = (&mask, sb.is_clean()) {
                tracing::warn!(%error, "a mask cannot be used; scanning the metadata");
            }
            Ok::<_, Error>(mask.ok())
        };
        let pages = read(sb.used_page_mask_start.get(), MaskKind::Pages, geo.md_len)?;
        let clusters = read(
            sb.used_cluster_mask_start.get(),
            MaskKind::Clusters,
            geo.total_clusters,
        )?;
        let blobids = read(
            sb.used_blobid_mask_start.get(),
            MaskKind::BlobIds,
            geo.md_len,
        )?;
        let masks = match (pages, &clusters, &blobids) {
            (Some(pages), Some(clusters), Some(blobids)) => {
                let mut map = Bitmap::new(geo.total_clusters);
                map.merge(clusters);
                Some(Masks {
                    pages,
                    clusters: map,
                    blobids: blobids.clone(),
                })
            }
            _ => None,
        };
        Ok((masks, PastMasks { clusters, blobids }))
    }
}

impl Scan {
    /// Marks what the masks of a clean store call used, so that it is not allocated even if no blob
    /// names it.
    fn trust(&mut self, masks: &Masks) {
        self.pages.merge(&masks.pages);
        self.clusters.merge(masks.clusters.words());
    }
}

/// Lays out the super block of a new store.
fn lay_out(size: u64, block_size: u32, opts: &InitOptions) -> Result<SuperBlock, Error> {
    let cluster_size = opts.cluster_size;
    if cluster_size < 4096 || !cluster_size.is_multiple_of(4096) {
        return Err(Error::invalid(format!(
            "cluster size {cluster_size}: must be a multiple of 4096 bytes"
        )));
    }
    let clusters = u32::try_from(size / u64::from(cluster_size))
        .map_err(|_| Error::invalid("more than 2^32 - 1 clusters; choose a larger cluster size"))?;
    let md_len = match opts.md_pages {
        Some(0) => {
            return Err(Error::invalid(
                "no metadata pages (md_pages): a blob needs one",
            ));
        }
        Some(md_len) => md_len,
        // Clusters of 4096 bytes would otherwise have a page each, which leaves no room for them.
        None => clusters
            .min(u32::try_from(size / (4 * PAGE_SIZE_U64)).unwrap_or(u32::MAX))
            .max(1),
    };
    let too_much = |md_clusters: u64| {
        Error::invalid(format!(
            "{size} bytes are {clusters} clusters of {cluster_size} bytes, and {md_len} metadata pages take \
             {md_clusters}; use a larger device, larger clusters, or fewer metadata pages (md_pages)"
        ))
    };
    let layout = Layout::at(1, md_len, clusters).ok_or_else(|| too_much(clusters.into()))?;
    let md_clusters = (layout.end * PAGE_SIZE_U64).div_ceil(cluster_size.into());
    if md_clusters >= u64::from(clusters) {
        return Err(too_much(md_clusters));
    }
    let mut sb = SuperBlock::new();
    layout.set(&mut sb);
    sb.cluster_size = cluster_size.into();
    sb.bstype = opts.bstype.0;
    sb.size = size.into();
    sb.io_unit_size = block_size.into();
    sb.md_page_size = 4096.into();
    Ok(sb)
}
