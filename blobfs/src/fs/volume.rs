//! What every room of a mount knows: the blobstore, the device, the options, how far an unmount has come.

use std::sync::Arc;

use crossbeam::atomic::AtomicCell;
use pumice_bdev::process::Birth;
use pumice_bdev::{BlockDevice, SharedChannels};

use super::error::{FsError, Result, SpaceKind};
use super::metered::Metered;
use super::options::MountOptions;
use crate::blobstore::{Blobstore, Error as StoreError, Persist, Spend, Transaction};

/// How far an unmount has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// There was none, or it has failed.
    Mounted,
    /// Nothing new begins; the files are being made durable and closed.
    Ending,
    /// The files are finished and the blobstore is not unloaded yet: an unmount that failed at the
    /// last step goes on there.
    Unloading,
    /// The device has been given up.
    Unmounted,
}

/// See the module.
pub(crate) struct Volume {
    pub store: Blobstore,
    pub metered: Arc<Metered>,
    pub dev: Arc<dyn BlockDevice>,
    pub opts: MountOptions,
    pub phase: AtomicCell<Phase>,
    /// In which process it was mounted: in a forked child it is the parent's.
    pub born: Birth,
    /// Bytes of a write to the device are a multiple of this.
    pub block: usize,
    pub cluster: u64,
    /// What makes a write durable.
    pub persist: Persist,
}

impl Volume {
    /// The error of a closed mount, or of a read-only one.
    pub fn check_writable(&self, path: impl Fn() -> String) -> Result<()> {
        self.check_mounted(&path)?;
        if self.opts.read_only {
            Err(FsError::ReadOnly { path: path() })
        } else {
            Ok(())
        }
    }

    /// The error of a mount that was made by the process that this one was forked from. Asked before
    /// any lock is taken: in a forked child its holder may not be there.
    #[inline]
    pub fn check_fork(&self) -> Result<()> {
        if !self.born.is_here() {
            return Err(self.forked());
        }
        Ok(())
    }

    /// The error of a mount that belongs to the process that this one was forked from.
    #[cold]
    fn forked(&self) -> FsError {
        FsError::Forked {
            device: self.dev.info().name.clone(),
        }
    }

    pub fn check_mounted(&self, path: impl Fn() -> String) -> Result<()> {
        self.check_fork()?;
        if self.phase.load() == Phase::Mounted {
            Ok(())
        } else {
            Err(FsError::Unmounted { path: path() })
        }
    }

    /// Turns a blobstore error into ours.
    pub fn store_error(&self, context: impl Into<String>, e: StoreError) -> FsError {
        store_error(context, e, self.store.available_clusters() * self.cluster)
    }

    /// The error of a commit; it says so if the change may have been made all the same.
    pub fn commit_error(&self, what: String, e: StoreError) -> FsError {
        let before = matches!(e, StoreError::Stopped(_));
        let error = self.store_error(what.clone(), e);
        // The store stops when it does not know what the device has.
        let stopped = || {
            let probe = self.store.transaction().commit();
            matches!(probe, Err(StoreError::Stopped(_)))
        };
        if !before && stopped() {
            let source = Arc::new(error);
            return FsError::Undecided { what, source };
        }
        error
    }

    /// The channels that all threads share.
    pub fn shared(&self) -> &SharedChannels {
        self.store.shared().expect("they were opened at the mount")
    }

    /// A change that gives space back, or takes none for good: it may use the reserve.
    pub fn releasing(&self) -> Transaction {
        let mut tx = self.store.transaction();
        tx.spend(Spend::Releasing);
        tx
    }
}

/// Turns a blobstore error into ours; `free_bytes` is for the text.
pub(crate) fn store_error(context: impl Into<String>, e: StoreError, free_bytes: u64) -> FsError {
    let context = context.into();
    match e {
        StoreError::NoSpace { .. } => FsError::NoSpace {
            what: context,
            kind: SpaceKind::Clusters,
            free_bytes,
        },
        StoreError::NoMdPages { .. } => FsError::NoSpace {
            what: context,
            kind: SpaceKind::MetadataPages,
            free_bytes,
        },
        StoreError::Io(e) => FsError::io(context, e),
        StoreError::Lost(e) => FsError::Io {
            context,
            source: Arc::from(e),
            data_loss: true,
        },
        StoreError::Device(e) => FsError::from(e),
        StoreError::Dma(e) => FsError::from(e),
        StoreError::Damaged { blob, source } => FsError::Corrupt {
            blob: blob.0,
            reason: format!("{context}: {source}"),
        },
        StoreError::ReadOnly(blob) => FsError::ReadOnly {
            path: format!("{context}: blob {blob}"),
        },
        e => FsError::Store {
            context,
            source: Arc::new(e),
        },
    }
}
