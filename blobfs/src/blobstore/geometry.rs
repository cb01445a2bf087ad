//! The places of everything on the device, from a checked super block.

use std::ops::Range;

use pumice_bdev::DeviceInfo;

use super::error::Error;
use super::format::{PAGE_SIZE_U64, SuperBlock, mask_pages};

/// Sizes and positions that were checked against the device.
#[derive(Debug, Clone)]
pub(crate) struct Geometry {
    /// Bytes of a device block.
    pub block_size: u64,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Bytes of an io unit.
    pub io_unit_size: u32,
    /// Number of clusters of the store, including those of the metadata.
    pub total_clusters: u32,
    /// Number of clusters at the front of the device that a blob never has: those of the super
    /// block.
    pub front_clusters: u32,
    /// Clusters of the masks and the metadata region. They begin at the front in a new store, and
    /// may be anywhere after the region has moved.
    pub md_clusters: Range<u32>,
    /// First page of the metadata region.
    pub md_start: u32,
    /// Number of pages of the metadata region.
    pub md_len: u32,
}

/// Returns how many bytes a device writes whole, if that is less than a metadata page.
pub(crate) fn tears_pages(info: &DeviceInfo) -> Option<u64> {
    let whole = u64::from(info.atomic_unit_blocks) * u64::from(info.block_size);
    (whole < PAGE_SIZE_U64).then_some(whole)
}

/// A region of the device in pages.
struct Region(&'static str, u64, u64);

impl Geometry {
    /// Checks the values of `sb` against each other and the device.
    pub fn new(sb: &SuperBlock, info: &DeviceInfo) -> Result<Geometry, Error> {
        let bad = |reason: String| Error::Geometry {
            device: info.name.clone(),
            reason,
        };
        let block_size = u64::from(info.block_size);
        let dev_bytes = info.len_bytes();
        if !PAGE_SIZE_U64.is_multiple_of(block_size) {
            return Err(bad(format!(
                "device blocks of {block_size} bytes; 512 to 4096 can be used"
            )));
        }
        let io_unit_size = if sb.io_unit_size.get() == 0 {
            4096
        } else {
            sb.io_unit_size.get()
        };
        if !io_unit_size.is_power_of_two() || !(512..=65536).contains(&io_unit_size) {
            return Err(bad(format!("io units of {io_unit_size} bytes")));
        }
        if u64::from(io_unit_size) < block_size {
            return Err(bad(format!(
                "io units of {io_unit_size} bytes are smaller than the device's blocks of {block_size}; \
                 use it on a device with {io_unit_size}-byte blocks, or make a file system here and copy the files \
                 (`pumice cp -r`, `pumice rescue`)"
            )));
        }
        let md_page_size = sb.md_page_size.get();
        if md_page_size != 0 && u64::from(md_page_size) != PAGE_SIZE_U64 {
            return Err(bad(format!(
                "metadata pages of {md_page_size} bytes; only 4096 is supported"
            )));
        }
        let cluster_size = u64::from(sb.cluster_size.get());
        if cluster_size == 0
            || !cluster_size.is_multiple_of(PAGE_SIZE_U64.max(u64::from(io_unit_size)))
        {
            return Err(bad(format!(
                "clusters of {cluster_size} bytes, must be a multiple of 4096"
            )));
        }
        let size = if sb.size.get() == 0 {
            dev_bytes
        } else {
            sb.size.get()
        };
        if size > dev_bytes {
            return Err(bad(format!(
                "the store has {size} bytes, the device {dev_bytes}; use the whole device that it was made on"
            )));
        }
        let total_clusters = u32::try_from(size / cluster_size).map_err(|_| {
            bad(format!(
                "{} clusters, more than 2^32 - 1",
                size / cluster_size
            ))
        })?;
        let (md_start, md_len) = (sb.md_start.get(), sb.md_len.get());
        let clusters_mask = u64::from(sb.used_cluster_mask_len.get());
        let mut regions = vec![
            Region("super block", 0, 1),
            Region(
                "page mask",
                sb.used_page_mask_start.get().into(),
                sb.used_page_mask_len.get().into(),
            ),
            Region(
                "cluster mask",
                sb.used_cluster_mask_start.get().into(),
                clusters_mask,
            ),
            Region("metadata region", md_start.into(), md_len.into()),
        ];
        if sb.used_blobid_mask_len.get() != 0 {
            let start = sb.used_blobid_mask_start.get().into();
            regions.push(Region(
                "blobid mask",
                start,
                sb.used_blobid_mask_len.get().into(),
            ));
        }
        for (name, bits, pages) in [
            ("page mask", md_len, sb.used_page_mask_len.get()),
            (
                "cluster mask",
                total_clusters,
                sb.used_cluster_mask_len.get(),
            ),
            ("blobid mask", md_len, sb.used_blobid_mask_len.get()),
        ] {
            let absent = name == "blobid mask" && pages == 0;
            if !absent && u64::from(pages) < mask_pages(bits.into()) {
                return Err(bad(format!("{name} of {pages} pages for {bits} bits")));
            }
        }
        regions.sort_by_key(|region| region.1);
        for pair in regions.windows(2) {
            if pair[0].1 + pair[0].2 > pair[1].1 {
                return Err(bad(format!("{} and {} overlap", pair[0].0, pair[1].0)));
            }
        }
        let md_end = (u64::from(md_start) + u64::from(md_len)) * PAGE_SIZE_U64;
        let meta_end = regions
            .iter()
            .map(|region| region.1 + region.2)
            .max()
            .unwrap_or(0)
            * PAGE_SIZE_U64;
        if md_len == 0 || meta_end > size || meta_end > md_end {
            return Err(bad(format!(
                "metadata up to byte {meta_end}, metadata region {md_start}+{md_len} pages, {size} bytes in all"
            )));
        }
        let md_cluster_end = u32::try_from(md_end.div_ceil(cluster_size))
            .ok()
            .filter(|end| *end <= total_clusters)
            .ok_or_else(|| {
                bad(format!(
                    "the metadata takes more than the {total_clusters} clusters"
                ))
            })?;
        // The regions are sorted. The first one is the super block.
        let begin = regions.get(1).map_or(0, |region| region.1) * PAGE_SIZE_U64 / cluster_size;
        let begin = u32::try_from(begin).expect("not behind the end, which is a u32");
        Ok(Geometry {
            block_size,
            cluster_size,
            io_unit_size,
            total_clusters,
            front_clusters: 1,
            md_clusters: begin..md_cluster_end,
            md_start,
            md_len,
        })
    }

    /// Returns the first block of a page of the device.
    pub fn page_lba(&self, page: u64) -> u64 {
        page * (PAGE_SIZE_U64 / self.block_size)
    }

    /// Returns the first block of a metadata page, by its index in the region.
    pub fn md_lba(&self, index: u32) -> u64 {
        self.page_lba(u64::from(self.md_start) + u64::from(index))
    }

    /// Returns the first block of a cluster.
    pub fn cluster_lba(&self, cluster: u32) -> u64 {
        u64::from(cluster) * self.cluster_blocks()
    }

    /// Number of blocks of a cluster.
    pub fn cluster_blocks(&self) -> u64 {
        self.cluster_size / self.block_size
    }

    /// Whether this is the number of a cluster that may belong to a blob.
    pub fn is_data_cluster(&self, cluster: u64) -> bool {
        cluster >= u64::from(self.front_clusters)
            && !(u64::from(self.md_clusters.start)..u64::from(self.md_clusters.end))
                .contains(&cluster)
            && cluster < u64::from(self.total_clusters)
    }

    /// Returns the clusters that no blob can have: those of the super block, the masks and the
    /// metadata region.
    pub fn own_clusters(&self) -> impl Iterator<Item = u32> + use<> {
        let front = self.front_clusters.min(self.md_clusters.start);
        (0..front).chain(self.md_clusters.clone())
    }

    /// Number of clusters that blobs can have.
    pub fn data_clusters(&self) -> u32 {
        let front = self.front_clusters.min(self.md_clusters.start);
        self.total_clusters - front - (self.md_clusters.end - self.md_clusters.start)
    }

    /// Returns the lowest cluster that a blob can have, for messages.
    pub fn first_data_cluster(&self) -> u32 {
        if self.md_clusters.start <= self.front_clusters {
            self.md_clusters.end
        } else {
            self.front_clusters
        }
    }

    /// Number of pages of a cluster.
    pub fn pages_per_cluster(&self) -> u64 {
        self.cluster_size / PAGE_SIZE_U64
    }
}

/// The places of the masks and the metadata region, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    page_mask: u32,
    cluster_mask: u32,
    cluster_mask_len: u32,
    blobid_mask: u32,
    mask_len: u32,
    md_start: u32,
    md_len: u32,
    /// The first page after all of them.
    pub end: u64,
}

impl Layout {
    /// Computes the layout from page `at` on, for `md_len` metadata pages and `clusters` clusters.
    /// The cluster mask has room for at least as many bits as there are pages. Returns `None` if a
    /// position does not fit its field.
    pub fn at(at: u64, md_len: u32, clusters: u32) -> Option<Layout> {
        let pages = |bits: u32| u32::try_from(mask_pages(bits.into())).expect("at most 2^17 pages");
        let (mask_len, cluster_mask_len) = (pages(md_len), pages(clusters));
        let cluster_mask = at + u64::from(mask_len);
        let blobid_mask = cluster_mask + u64::from(cluster_mask_len.max(mask_len));
        let md_start = blobid_mask + u64::from(mask_len);
        let end = md_start + u64::from(md_len);
        u32::try_from(end).ok()?;
        let page = |page: u64| u32::try_from(page).expect("not behind the end");
        Some(Layout {
            page_mask: page(at),
            cluster_mask: page(cluster_mask),
            cluster_mask_len,
            blobid_mask: page(blobid_mask),
            mask_len,
            md_start: page(md_start),
            md_len,
            end,
        })
    }

    /// Number of pages of the masks before the region.
    pub fn masks_len(md_len: u32, clusters: u32) -> u64 {
        let mask = mask_pages(md_len.into());
        2 * mask + mask_pages(clusters.into()).max(mask)
    }

    /// Writes the layout into a super block.
    pub fn set(&self, sb: &mut SuperBlock) {
        sb.used_page_mask_start = self.page_mask.into();
        sb.used_page_mask_len = self.mask_len.into();
        sb.used_cluster_mask_start = self.cluster_mask.into();
        sb.used_cluster_mask_len = self.cluster_mask_len.into();
        sb.used_blobid_mask_start = self.blobid_mask.into();
        sb.used_blobid_mask_len = self.mask_len.into();
        sb.md_start = self.md_start.into();
        sb.md_len = self.md_len.into();
    }
}
