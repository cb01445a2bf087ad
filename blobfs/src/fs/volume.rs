//! The state that all parts of a mount use: the blobstore, the device, the options, and the phase
//! of an unmount.

use std::sync::Arc;

use crossbeam::atomic::AtomicCell;
use pumice_bdev::process::Birth;
use pumice_bdev::{BlockDevice, SharedChannels};

use super::error::{FsError, Result, SpaceKind};
use super::metered::Metered;
use super::options::MountOptions;
use crate::blobstore::{Blobstore, Error as StoreError, Persist, Spend, Transaction};

/// The phase of an unmount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// There was no unmount, or it has failed.
    Mounted,
    /// Nothing new begins. The files are being made durable and closed.
    Ending,
    /// Whether the files are closed and the blobstore is not unloaded yet: an unmount that failed
    /// at its last step continues there.
    Unloading,
    /// The device has been released.
    Unmounted,
}

/// The state that all parts of a mount use.
pub(crate) struct Volume {
    pub store: Blobstore,
    pub metered: Arc<Metered>,
    pub dev: Arc<dyn BlockDevice>,
    pub opts: MountOptions,
    pub phase: AtomicCell<Phase>,
    /// The process that mounted it. In a forked child that is the parent.
    pub born: Birth,
    /// Lengths of writes to the device are multiples of this.
    pub block: usize,
    pub cluster: u64,
    /// The event that makes a write durable.
    pub persist: Persist,
}

impl Volume {
    /// Returns the error of a closed or a read-only mount.
    pub fn check_writable(&self, path: impl Fn() -> String) -> Result<()> {
        self.check_mounted(&path)?;
        if self.opts.read_only {
            Err(FsError::ReadOnly { path: path() })
        } else {
            Ok(())
        }
    }

    /// Returns the error of a mount that the parent of this process made. It is checked before any
    /// lock is taken, since in a forked child the holder of the lock may not exist.
    #[inline]
    pub fn check_fork(&self) -> Result<()> {
        if !self.born.is_here() {
            return Err(self.forked());
        }
        Ok(())
    }

    /// Returns the error of a mount that belongs to the parent of this process.
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

    /// Converts an error of the blobstore.
    pub fn store_error(&self, context: impl Into<String>, e: StoreError) -> FsError {
        store_error(context, e, self.store.available_clusters() * self.cluster)
    }

    /// Returns the error of a commit, which says so if the change may have been made nevertheless.
    pub fn commit_error(&self, what: String, e: StoreError) -> FsError {
        let before = matches!(e, StoreError::Stopped(_));
        let error = self.store_error(what.clone(), e);
        // The store stops when it does not know the state of the device.
        if !before && self.store.is_stopped() {
            let source = Arc::new(error);
            return FsError::Undecided { what, source };
        }
        error
    }

    /// Returns the channels that all threads share.
    pub fn shared(&self) -> &SharedChannels {
        self.store.shared().expect("they were opened at the mount")
    }

    /// Makes a transaction that frees space, or takes none permanently: it may use the reserve.
    pub fn releasing(&self) -> Transaction {
        let mut tx = self.store.transaction();
        tx.spend(Spend::Releasing);
        tx
    }
}

/// Converts an error of the blobstore; `free_bytes` is for the text.
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
        StoreError::Owed(e) => FsError::io(
            format!("{context}: putting in place what the journal has"),
            e,
        ),
        StoreError::Lost(e) => FsError::Io {
            context,
            source: Arc::from(e),
            data_loss: true,
        },
        StoreError::Device(e) => FsError::from(e),
        StoreError::Dma(e) => FsError::NoMemory(e),
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
