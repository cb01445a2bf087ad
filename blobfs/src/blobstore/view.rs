//! The data path's view of a blob: its map and those of its ancestors.

use std::sync::Arc;

use super::extents::ExtentMap;
use super::external::External;

/// The sources of a blob's data. Immutable except for entries of its own map.
#[derive(Debug)]
pub(crate) struct View {
    /// The blob's own map.
    pub own: Arc<ExtentMap>,
    /// The maps of its parent and so on, shared by everything with the same parent.
    pub below: Option<Arc<Line>>,
    pub external: Option<Arc<External>>,
    pub read_only: bool,
}

/// A snapshot and its ancestors. A line of snapshots exists once, however many blobs use it.
#[derive(Debug)]
pub(crate) struct Line {
    pub map: Arc<ExtentMap>,
    pub below: Option<Arc<Line>>,
    /// The external snapshot at the end of the line.
    pub external_id: Option<Arc<[u8]>>,
}

impl Drop for Line {
    fn drop(&mut self) {
        // The line is dropped one element after another, since a long line must not cause deep
        // recursion.
        let mut next = self.below.take();
        while let Some(mut line) = next.and_then(Arc::into_inner) {
            next = line.below.take();
        }
    }
}

/// The source of a blob's cluster.
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
    /// Number of clusters of the blob.
    #[inline]
    pub fn num_clusters(&self) -> u64 {
        self.own.num_clusters()
    }

    /// The maps of its ancestors, its parent's first.
    pub fn ancestors(&self) -> impl Iterator<Item = &Arc<ExtentMap>> {
        let mut next = self.below.as_deref();
        std::iter::from_fn(move || {
            let line = next?;
            next = line.below.as_deref();
            Some(&line.map)
        })
    }

    /// Returns the source of cluster `index`.
    #[inline]
    pub fn source(&self, index: u64) -> Source {
        match self.own.cluster(index) {
            Some(cluster) => Source::Cluster(cluster),
            None if index >= self.own.num_clusters() => Source::Zeroes,
            None => self.parent_source(index),
        }
    }

    /// Returns the source of cluster `index` in the blob itself.
    #[inline]
    pub fn own_source(&self, index: u64) -> Source {
        self.own
            .cluster(index)
            .map_or(Source::Zeroes, Source::Cluster)
    }

    /// Returns the source of cluster `index` if the blob itself did not have it.
    pub fn parent_source(&self, index: u64) -> Source {
        for map in self.ancestors() {
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

    /// Whether there is anything below the blob's own clusters.
    pub fn has_backing(&self) -> bool {
        self.below.is_some() || self.external.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blobstore::{Blobstore, CreateOptions, InitOptions};

    #[test]
    fn a_line_of_snapshots_is_kept_once() {
        let dev = pumice_bdev::open("malloc://16M?block_size=4096").unwrap();
        let opts = InitOptions::default().cluster_size(8192);
        let store = Blobstore::init(dev, &opts).unwrap();
        let id = store.create(&CreateOptions::default()).unwrap();
        let snapshots: Vec<_> = (0..30).map(|_| store.snapshot(id, &[]).unwrap()).collect();
        // It is one line, whether it is opened from the top or from the bottom.
        let blob = store.open(id).unwrap();
        let mut line = blob.shared.view.load().below.clone();
        for snapshot in snapshots.iter().rev() {
            let here = line.unwrap();
            let blob = store.open(*snapshot).unwrap();
            let view = blob.shared.view.load();
            assert!(Arc::ptr_eq(&view.own, &here.map));
            match (&view.below, &here.below) {
                (Some(a), Some(b)) => assert!(Arc::ptr_eq(a, b)),
                (a, b) => assert!(a.is_none() && b.is_none()),
            }
            line = here.below.clone();
        }
        assert!(line.is_none());
        assert_eq!(blob.shared.view.load().ancestors().count(), 30);
    }

    #[test]
    fn a_long_line_is_dropped_without_a_deep_recursion() {
        let mut below = None;
        for _ in 0..200_000 {
            below = Some(Arc::new(Line {
                map: Arc::new(ExtentMap::new(0, 0, 1)),
                below,
                external_id: None,
            }));
        }
        drop(below);
    }
}
