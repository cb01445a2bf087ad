//! Making an empty store on a device.

use std::sync::Arc;

use pumice_bdev::BlockDevice;
use pumice_bdev::contents::{Formatting, Overwrite};
#[cfg(doc)]
use pumice_bdev::{BdevError, contents};

use super::Blobstore;
use super::claims::Claim;
use super::error::Error;
use super::external::OpenExternal;
use super::format::{BsType, PAGE_SIZE_U64, SuperBlock};
use super::geometry::{Geometry, Layout};
use super::load::{LoadOptions, Loaded, Metadata};
use super::mdio::MdIo;
use super::meta::ClearMethod;
use super::scan::Scan;
use super::steady::Steady;

/// Options of a new store.
#[derive(Debug, Clone)]
#[non_exhaustive]
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

pumice_bdev::setters!(InitOptions: cluster_size: u32, md_pages: Option<u32>, bstype: BsType, clear_method: ClearMethod,
    open_external: Option<OpenExternal>, journal: Option<u64>, force: bool);

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

/// Largest metadata region, in bytes, that is zeroed by writing. A larger one is zeroed by the
/// device.
const MAX_WRITTEN_MD_BYTES: u64 = 80 << 20;

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
        write_empty(&mut io, &geo, &sb, info.num_blocks, opts.clear_method)?;
        let loaded = Loaded {
            io,
            metadata: Metadata {
                scan: Scan::empty(&geo),
                sb,
                geo,
                dirty: true,
                read_only: false,
                open_external: opts.open_external.clone(),
            },
            journal: None,
            journal_damage: None,
            steady,
            claim,
        };
        let store = loaded.into_store();
        let Some(bytes) = opts.journal else {
            formatting.finish();
            return Ok(store);
        };
        store.make_journal(bytes)?;
        store.unload()?;
        formatting.finish();
        drop(store);
        let load = LoadOptions::default().open_external(opts.open_external.clone());
        Blobstore::load(dev, &load)
    }
}

/// Writes the metadata of an empty store.
fn write_empty(
    io: &mut MdIo,
    geo: &Geometry,
    sb: &SuperBlock,
    num_blocks: u64,
    clear_method: ClearMethod,
) -> Result<(), Error> {
    // The old store becomes invalid first, then its metadata is cleared, then the new store is
    // written.
    let can = io.can();
    let no_super = can.written_zeroes(0, geo.page_lba(1))?;
    io.run_durable(no_super)?;
    let data = geo.cluster_lba(geo.first_data_cluster());
    match clear_method {
        ClearMethod::None => {}
        ClearMethod::Default | ClearMethod::Unmap => {
            let ops = can.unmaps(data, num_blocks - data);
            io.run(ops)?;
        }
        ClearMethod::WriteZeroes => {
            let ops = can.zeroes(data, num_blocks - data)?;
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
    io.run_durable(write)
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
