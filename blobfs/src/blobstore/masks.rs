//! The masks of an orderly unload: which metadata pages, clusters and roots are in use.

use zerocopy::little_endian::U32;

use super::alloc::Bitmap;
use super::error::Error;
use super::format::{MaskKind, PAGE_SIZE_U64, SuperBlock, decode_mask, encode_mask, mask_pages};
use super::geometry::Geometry;
use super::mdio::MdIo;
use super::state::State;

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

/// Returns the masks of a store, each with the page where it begins.
pub(crate) fn of(state: &State) -> Vec<(u32, Vec<u8>)> {
    let mut blobids = Bitmap::new(state.space.geo.md_len);
    for root in state.blobs.by_root.keys().chain(state.blobs.damaged.keys()) {
        blobids.set(*root);
    }
    // No blob names what late writes may still reach: it is free from the next load on.
    let (mut pages, mut clusters) = (state.space.pages.clone(), state.space.clusters.clone());
    for taken in &state.space.late {
        for page in &taken.pages {
            pages.clear(*page);
        }
        for cluster in &taken.clusters {
            clusters.clear(*cluster);
        }
    }
    let sb = &state.sb;
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
