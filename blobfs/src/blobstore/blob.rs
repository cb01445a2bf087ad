//! Handles of open blobs.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Blobstore;
use super::error::Error;
use super::extents::ExtentMap;
use super::format::BlobId;
use super::meta::{ClearMethod, Parent};
use super::ops::ClusterInit;
use super::shared::{PendingXattr, Shared};

/// An open blob. Clones are handles of the same blob, which is closed when the last handle is
/// dropped. Any thread may use it.
#[derive(Debug, Clone)]
pub struct Blob {
    pub(crate) store: Blobstore,
    pub(crate) shared: Arc<Shared>,
}

impl Blob {
    /// Id of the blob.
    #[must_use]
    pub fn id(&self) -> BlobId {
        self.shared.id
    }

    /// The blobstore that contains it.
    #[must_use]
    pub fn store(&self) -> &Blobstore {
        &self.store
    }

    /// Size in clusters.
    #[must_use]
    pub fn num_clusters(&self) -> u64 {
        self.shared.view.load().num_clusters()
    }

    /// Size in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.num_clusters() * self.store.cluster_size()
    }

    /// Number of clusters that it has itself.
    #[must_use]
    pub fn num_allocated(&self) -> u64 {
        self.extents().num_allocated()
    }

    /// The map of its own clusters: a snapshot that is read without a lock. A resize makes a new
    /// map. Entries of this one change when a thin blob gets a cluster.
    #[must_use]
    pub fn extents(&self) -> Arc<ExtentMap> {
        Arc::clone(&self.shared.view.load().own)
    }

    /// Whether clusters may be unallocated.
    #[must_use]
    pub fn is_thin(&self) -> bool {
        self.shared.meta.load().flags.thin()
    }

    /// Whether its data, or the whole store, is read-only.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.store.inner.read_only || self.shared.meta.load().flags.data_read_only()
    }

    /// Returns the source of unallocated clusters.
    #[must_use]
    pub fn parent(&self) -> Parent {
        self.shared.meta.load().parent()
    }

    /// Returns the treatment of clusters that the blob frees.
    #[must_use]
    pub fn clear_method(&self) -> ClearMethod {
        self.shared.meta.load().clear_method()
    }

    /// Returns the value of an xattr, with changes that are not durable yet.
    #[must_use]
    pub fn xattr(&self, name: &str) -> Option<Vec<u8>> {
        if self.shared.has_pending.load(Ordering::Acquire) {
            self.xattr_with(&self.shared.pending.lock(), name.as_bytes())
        } else {
            self.xattr_with(&[], name.as_bytes())
        }
    }

    /// Returns the value of an xattr with these pending changes.
    fn xattr_with(&self, pending: &[PendingXattr], name: &[u8]) -> Option<Vec<u8>> {
        match pending.iter().rev().find(|(changed, _)| **changed == *name) {
            Some((_, value)) => value.as_ref().map(|value| value.to_vec()),
            None => self
                .shared
                .meta
                .load()
                .xattr(name)
                .map(|value| value.to_vec()),
        }
    }

    /// Returns the names of its xattrs, with changes that are not durable yet. Bytes that are not
    /// UTF-8 are replaced.
    #[must_use]
    pub fn xattr_names(&self) -> Vec<String> {
        self.xattrs()
            .iter()
            .map(|(name, _)| String::from_utf8_lossy(name).into_owned())
            .collect()
    }

    /// Returns its xattrs, with changes that are not durable yet.
    #[must_use]
    pub fn xattrs(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        // A thread that syncs publishes the changes first, and then removes them.
        let pending = self.shared.pending.lock();
        let mut meta = (**self.shared.meta.load()).clone();
        for (name, value) in pending.iter() {
            match value {
                Some(value) => super::meta::set(&mut meta.xattrs, name, value),
                None => meta.xattrs.retain(|xattr| *xattr.name != **name),
            }
        }
        meta.xattrs
            .into_iter()
            .map(|xattr| (xattr.name.to_vec(), xattr.value.to_vec()))
            .collect()
    }

    /// Sets an xattr in memory. [`Blob::sync_md`] makes it durable.
    ///
    /// # Errors
    /// Fails for a name or value that cannot be stored, and for a read-only blob.
    pub fn set_xattr(&self, name: &str, value: &[u8]) -> Result<(), Error> {
        super::ops::check_xattr(name.as_bytes(), value)?;
        self.pend(name, Some(value.into()))
    }

    /// Removes an xattr in memory. [`Blob::sync_md`] makes it durable.
    ///
    /// # Errors
    /// Fails when there is no such xattr, and for a read-only blob.
    pub fn remove_xattr(&self, name: &str) -> Result<(), Error> {
        self.pend(name, None)
    }

    fn pend(&self, name: &str, value: Option<Arc<[u8]>>) -> Result<(), Error> {
        if self.store.inner.read_only {
            return Err(Error::ReadOnlyStore);
        }
        if self.shared.meta.load().flags.md_read_only() {
            return Err(Error::ReadOnly(self.id()));
        }
        let mut pending = self.shared.pending.lock();
        if value.is_none() && self.xattr_with(&pending, name.as_bytes()).is_none() {
            return Err(Error::invalid(format!(
                "blob {} has no xattr `{name}`",
                self.id()
            )));
        }
        pending.push((name.as_bytes().into(), value));
        self.shared.has_pending.store(true, Ordering::Release);
        Ok(())
    }

    /// Makes changed xattrs durable. Blocks.
    ///
    /// # Errors
    /// Fails when no metadata pages are left, and with I/O errors. The changes then stay pending.
    pub fn sync_md(&self) -> Result<(), Error> {
        let _syncing = self.shared.syncing.lock();
        let changes: Vec<_> = self.shared.pending.lock().clone();
        if changes.is_empty() {
            return Ok(());
        }
        let mut transaction = self.store.transaction();
        for (name, value) in &changes {
            match value {
                Some(value) => transaction.set_xattr_bytes(self, name, value),
                None => {
                    // A transaction may have removed it meanwhile, and to remove what is not there is an error.
                    transaction.set_xattr_bytes(self, name, &[]);
                    transaction.remove_xattr_bytes(self, name);
                }
            }
        }
        transaction.commit()?;
        let mut pending = self.shared.pending.lock();
        pending.drain(..changes.len());
        self.shared
            .has_pending
            .store(!pending.is_empty(), Ordering::Release);
        Ok(())
    }

    /// Changes its size. Durable on return. New clusters of a thick blob read as zeroes. Blocks;
    /// waits for I/O in flight if the blob shrinks.
    ///
    /// # Errors
    /// Fails without space, for a read-only blob, and with I/O errors.
    pub fn resize(&self, num_clusters: u64) -> Result<(), Error> {
        self.resize_with(num_clusters, ClusterInit::Zeroes)
    }

    /// Changes its size as [`Blob::resize`] does, with a choice of the content of new clusters.
    ///
    /// # Errors
    /// Fails as [`Blob::resize`] does.
    pub fn resize_with(&self, num_clusters: u64, init: ClusterInit) -> Result<(), Error> {
        let mut transaction = self.store.transaction();
        transaction.resize_with(self, num_clusters, init);
        transaction.commit().map(drop)
    }

    /// Makes the blob permanently read-only. Waits for I/O in flight. Durable on return.
    ///
    /// # Errors
    /// Returns I/O errors.
    pub fn set_read_only(&self) -> Result<(), Error> {
        self.store.set_read_only(self.id())
    }
}
