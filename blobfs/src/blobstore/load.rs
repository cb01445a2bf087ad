//! Loading a store: the super block, the journal, then the masks or a scan.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, ReentrantMutex};
#[cfg(doc)]
use pumice_bdev::BdevError;
use pumice_bdev::{BlockDevice, DeviceInfo};

use super::blobs::{Blobs, Slot};
use super::channels::Channels;
use super::claims::Claim;
use super::commit::in_place::InPlace;
use super::commit::{Commit, Failure};
use super::data::Cut;
use super::error::Error;
use super::external::{Externals, OpenExternal};
use super::format::{BlobId, BsType, PAGE_SIZE_U64, SuperBlock};
use super::geometry::{Geometry, tears_pages};
use super::journal::Journal;
use super::journal::format::RingPlace;
use super::journal::recovery::{self, FoundJournal, Treat};
use super::late_writes::LateWrites;
use super::lifecycle::{CleanMark, Lifecycle};
use super::masks::Masks;
use super::mdio::{Abilities, MdChannels, MdIo, dma};
use super::order::Order;
use super::remains;
use super::scan::{Roots, Scan, scan};
use super::space::Allocator;
use super::state::State;
use super::steady::Steady;
use super::store::{Blobstore, Inner};
use super::super_page::{self, Found};

/// Options of a load.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
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

pumice_bdev::setters!(LoadOptions: bstype: Option<BsType>, open_external: Option<OpenExternal>, read_only: bool, refuse_damage: bool,
    accept_journal_damage: bool, keep_session: bool);

/// The longest single read or write of data, where the device takes as much.
const MAX_IO_BYTES: u64 = 8 << 20;

/// The metadata of a store that has been read.
pub(super) struct Metadata {
    pub sb: SuperBlock,
    pub geo: Geometry,
    pub scan: Scan,
    /// Whether the super block on disk does not have the mark of an orderly unload.
    pub dirty: bool,
    pub read_only: bool,
    pub open_external: Option<OpenExternal>,
}

impl Metadata {
    /// Makes the state of the store.
    fn into_state(
        self,
        can: Abilities,
        journal: Option<BlobId>,
        late_writes: Arc<LateWrites>,
    ) -> State {
        let Scan {
            blobs,
            damaged,
            remains,
            pages,
            clusters,
            shared_clusters,
            shared_pages,
            ..
        } = self.scan;
        let roots = blobs.into_iter().map(|(root, meta)| {
            let slot = Slot::new(Arc::new(meta));
            (root, slot)
        });
        let clean_mark = match self.dirty {
            true => CleanMark::Removed,
            false => CleanMark::Set,
        };
        let mut space = Allocator::new(self.geo, (pages, clusters), late_writes, can);
        space.shared_clusters = shared_clusters;
        space.shared_pages = shared_pages;
        let externals = Externals::new(self.open_external);
        let mut blobs = Blobs::new(roots.collect(), journal, externals);
        blobs.damaged = damaged;
        blobs.remains = remains;
        State {
            sb: self.sb,
            lifecycle: Lifecycle::new(clean_mark, self.read_only),
            space,
            blobs,
        }
    }
}

/// The parts of a store that has been loaded or made.
pub(super) struct Loaded {
    pub io: MdIo,
    pub metadata: Metadata,
    pub journal: Option<FoundJournal>,
    pub journal_damage: Option<String>,
    pub steady: Arc<Steady>,
    pub claim: Claim,
}

impl Loaded {
    /// Begins the use of the store.
    pub fn into_store(self) -> Blobstore {
        let Loaded {
            io,
            metadata,
            journal,
            journal_damage,
            steady,
            claim,
        } = self;
        let (failed_flush, late_writes) = (steady.failed_flush(), steady.late_writes());
        let dev: Arc<dyn BlockDevice> = steady;
        let bstype = metadata.sb.bstype();
        let read_only = metadata.read_only;
        let can = io.can();
        let place = journal.as_ref().map(|journal| journal.place.blob);
        let state = metadata.into_state(can, place, late_writes);
        let geo = &state.space.geo;
        let channels = Channels::new(Arc::clone(&dev));
        let md_channels = Arc::new(MdChannels::new(Arc::clone(&dev), io));
        let commit: Box<dyn Commit> = match journal {
            Some(found) => Box::new(Journal::new(Arc::clone(&md_channels), geo, found)),
            None => Box::new(InPlace::new(Arc::clone(&md_channels))),
        };
        let inner = Inner {
            cluster_size: geo.cluster_size,
            io_unit_size: geo.io_unit_size,
            block_size: geo.block_size,
            cut: cut(geo, dev.info()),
            dev,
            channels,
            shared: OnceLock::new(),
            opening: ReentrantMutex::new(()),
            can,
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

    /// Writes the super block if it is torn, or if it has a guard for a journal that is not used.
    fn repair_super_block(&mut self, torn: bool) -> Result<(), Error> {
        let Metadata { sb, geo, .. } = &mut self.metadata;
        if torn {
            super_page::restore(&mut self.io, geo, &dma(&sb.encode())?)?;
        }
        if sb.is_guarded() && self.journal.is_none() {
            // Its clusters may be given to others, whose bytes must not be read as a ring.
            RingPlace::remove(sb);
            super_page::write(&mut self.io, geo, sb).map_err(Failure::into_error)?;
        }
        Ok(())
    }
}

/// Returns the rules for dividing ranges of blobs into operations.
fn cut(geo: &Geometry, info: &DeviceInfo) -> Cut {
    let longest = info.transfer_blocks(MAX_IO_BYTES) * geo.block_size;
    Cut {
        cluster: geo.cluster_size,
        block: geo.block_size,
        // Pages are cached whole where an operation is not cut inside one.
        longest: match longest / PAGE_SIZE_U64 {
            0 => longest,
            pages => pages * PAGE_SIZE_U64,
        },
    }
}

impl Blobstore {
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
        super_page::check_size(info)?;
        let mut io = MdIo::new(&dev, steady.failed_flush())?;
        let Found { sb, torn } = read_super_block(&mut io, info, opts)?;
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
        let (scan, uncertain) = read_blobs(&mut io, &geo, &sb, &info.name, by_scan)?;
        if !opts.read_only {
            // From now on the journal knows what is not in place.
            io.set_replayed(BTreeMap::new());
        }
        if opts.refuse_damage && !scan.damaged.is_empty() {
            return Err(Error::DamagedStore {
                device: info.name.clone(),
                damage: remains::describe(&scan.damaged, &scan.remains),
            });
        }
        let journal = usable_journal(search.journal, &scan, info)?;
        let mut loaded = Loaded {
            io,
            metadata: Metadata {
                dirty: !sb.is_clean() || by_scan,
                sb,
                geo,
                scan,
                read_only: opts.read_only,
                open_external: opts.open_external.clone(),
            },
            journal,
            journal_damage: search.damage,
            steady: Arc::clone(&steady),
            claim,
        };
        if !opts.read_only {
            loaded.repair_super_block(torn)?;
        }
        let store = loaded.into_store();
        if is_held(&store, uncertain) {
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
}

/// Whether nothing may be allocated, since it is not known what damaged blobs hold.
fn is_held(store: &Blobstore, uncertain: bool) -> bool {
    let state = &mut *store.inner.state.lock();
    match state.blobs.first_damaged() {
        Some(damaged) if uncertain => {
            let metas = state.blobs.by_root.values().map(|slot| &*slot.meta);
            state.space.hold(damaged, metas);
            true
        }
        _ => false,
    }
}

/// Reads the super block and checks the type of the store.
fn read_super_block(io: &mut MdIo, info: &DeviceInfo, opts: &LoadOptions) -> Result<Found, Error> {
    let found = super_page::read(io, info)?;
    let bstype = found.sb.bstype();
    match opts.bstype {
        Some(wanted) if wanted != BsType::NONE && wanted != bstype => Err(Error::WrongType {
            device: info.name.clone(),
            found: bstype,
            wanted,
        }),
        _ => Ok(found),
    }
}

/// Reads all blobs, by the masks or by a scan. Returns also whether it is unknown which clusters and
/// metadata pages damaged blobs hold.
fn read_blobs(
    io: &mut MdIo,
    geo: &Geometry,
    sb: &SuperBlock,
    device: &str,
    by_scan: bool,
) -> Result<(Scan, bool), Error> {
    // The masks of a store that was not unloaded in order are those of the last orderly unload.
    // They cannot be trusted, but they name the roots and clusters of that time.
    let (masks, past) = Masks::read(io, geo, sb)?;
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
        tracing::info!(device, "scanning all metadata");
    }
    let mut scan = scan(io, geo, &roots)?;
    let mut uncertain = false;
    match (&roots, &masks) {
        // What they call used is not allocated even if no blob names it.
        (Roots::Mask(_), Some(masks)) => {
            scan.pages.merge(&masks.pages);
            scan.clusters.merge(masks.clusters.words());
        }
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
    Ok((scan, uncertain))
}

/// Returns the journal if its blob is still its own.
///
/// # Errors
/// Fails if it is not, and the ring has bytes that cannot be put in place.
fn usable_journal(
    found: Option<FoundJournal>,
    scan: &Scan,
    info: &DeviceInfo,
) -> Result<Option<FoundJournal>, Error> {
    let has_left = found.as_ref().is_some_and(|journal| journal.left.is_some());
    let journal = found.filter(|journal| {
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
            device: info.name.clone(),
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
    Ok(journal)
}
