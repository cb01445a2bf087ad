//! Bytes of a blob that a batch of the journal carries, until they are in the blob's own clusters.

use std::ops::Range;
use std::sync::Arc;

use super::extents::ExtentMap;
use super::format::BlobId;
use super::geometry::Geometry;

/// Bytes at the end of a blob's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Carried {
    pub blob: BlobId,
    /// The byte of the blob where they begin.
    pub offset: u64,
    pub bytes: Arc<[u8]>,
    /// Whether the content ends with them, so that zeroes fill their last block.
    pub ends: bool,
}

/// A part of them that is in one place on the device.
#[derive(Debug, Clone)]
pub(crate) struct Patch {
    /// The byte of the device.
    pub at: u64,
    bytes: Arc<[u8]>,
    range: Range<usize>,
    /// Whether zeroes fill its last block.
    pub ends: bool,
}

impl Patch {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.range.clone()]
    }
}

impl Carried {
    /// Returns the places of the bytes. `None` if the blob does not have all of the clusters.
    pub fn patches(&self, map: &ExtentMap, geo: &Geometry) -> Option<Vec<Patch>> {
        let mut patches: Vec<Patch> = Vec::with_capacity(1);
        let mut done = 0;
        while done < self.bytes.len() {
            let here = self.offset.checked_add(done as u64)?;
            let cluster = map.cluster(here / geo.cluster_size)?;
            let within = here % geo.cluster_size;
            let room = usize::try_from(geo.cluster_size - within).unwrap_or(usize::MAX);
            let end = done + room.min(self.bytes.len() - done);
            patches.push(Patch {
                at: u64::from(cluster) * geo.cluster_size + within,
                bytes: Arc::clone(&self.bytes),
                range: done..end,
                ends: self.ends && end == self.bytes.len(),
            });
            done = end;
        }
        Some(patches)
    }
}
