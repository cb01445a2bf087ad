//! What the data path sees of a blob: its map, its ancestors' maps, what lies below.

use std::sync::Arc;

use super::extents::ExtentMap;
use super::external::External;

/// A blob's way to its data. Immutable but for entries of the first map.
#[derive(Debug)]
pub(crate) struct View {
    /// The blob's own map, then its parent's, and so on.
    pub maps: Vec<Arc<ExtentMap>>,
    pub external: Option<Arc<External>>,
    pub read_only: bool,
}

/// Where a cluster of a blob is read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A cluster of the store.
    Cluster(u32),
    /// Nothing was ever written there.
    Zeroes,
    /// The external snapshot, at the same offset.
    External,
}

impl View {
    /// Clusters of the blob.
    #[inline]
    pub fn num_clusters(&self) -> u64 {
        self.maps[0].num_clusters()
    }

    /// Where cluster `index` is read from.
    #[inline]
    pub fn source(&self, index: u64) -> Source {
        self.source_from(0, index)
    }

    /// Where cluster `index` would be read from if the blob itself did not have it.
    pub fn parent_source(&self, index: u64) -> Source {
        self.source_from(1, index)
    }

    fn source_from(&self, first: usize, index: u64) -> Source {
        for map in &self.maps[first..] {
            if let Some(cluster) = map.cluster(index) {
                return Source::Cluster(cluster);
            }
            // Past the end of an ancestor there are zeroes, whatever its own parent has there.
            if index >= map.num_clusters() {
                return Source::Zeroes;
            }
        }
        if self.external.is_some() {
            Source::External
        } else {
            Source::Zeroes
        }
    }

    /// Does anything lie below the blob's own clusters?
    pub fn has_backing(&self) -> bool {
        self.maps.len() > 1 || self.external.is_some()
    }
}
