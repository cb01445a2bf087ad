//! A read-only view of the blobstore below a mount.

use super::core::Core;
use crate::blobstore::format::SuperBlock;
use crate::blobstore::{BlobId, ExtentMap, Usage};

/// A read-only view of the blobstore below a mounted file system. It cannot change the store:
/// clusters that move, or blobs that shrink or vanish, without the file system's knowledge would
/// put one file's bytes into another.
#[derive(Clone, Copy)]
pub struct StoreView<'a> {
    core: &'a Core,
}

impl std::fmt::Debug for StoreView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StoreView({} blobs)", self.blobs().len())
    }
}

impl<'a> StoreView<'a> {
    pub(crate) fn new(core: &'a Core) -> StoreView<'a> {
        StoreView { core }
    }

    /// The ids of all blobs: files, directories and others.
    #[must_use]
    pub fn blobs(&self) -> Vec<BlobId> {
        self.core.vol.store.blobs()
    }

    /// Blobs that were set aside because their metadata is damaged.
    #[must_use]
    pub fn damaged(&self) -> Vec<BlobId> {
        let damaged = self.core.vol.store.damaged().into_iter();
        damaged.map(|(id, _)| id).collect()
    }

    /// Returns the map of a file's clusters, or `None` if the blob is not a file with a name.
    #[must_use]
    pub fn extents(&self, id: BlobId) -> Option<std::sync::Arc<ExtentMap>> {
        // No file is deleted meanwhile, since that needs its blob closed.
        let _ops = self.core.names.ops.lock();
        let files = self.core.names.inodes();
        let file = files.iter().find(|ino| ino.id == id)?;
        Some(file.blob().ok()?.extents())
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.core.vol.store.cluster_size()
    }

    /// Number of clusters that belong to no blob.
    #[must_use]
    pub fn free_clusters(&self) -> u64 {
        self.core.vol.store.free_clusters()
    }

    /// Number of metadata pages, and of used ones.
    #[must_use]
    pub fn md_pages(&self) -> Usage {
        self.core.vol.store.md_pages()
    }

    /// The super block.
    #[must_use]
    pub fn super_block(&self) -> SuperBlock {
        self.core.vol.store.super_block()
    }
}
