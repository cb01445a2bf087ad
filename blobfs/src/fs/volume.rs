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

#[cfg(test)]
mod tests {
    use pumice_bdev::{IoErrorKind, Op};

    use super::*;
    use crate::blobstore::BlobId;
    use crate::blobstore::format::{PageError, PageProblem};

    #[test]
    fn an_error_of_the_store_keeps_its_kind() {
        let dev = pumice_bdev::open("malloc://1M").unwrap();
        let io = || dev.info().error(&Op::Flush, IoErrorKind::Media, "test");
        let of = |e| store_error("/f: test", e, 5);
        let (needed, free, total) = (3, 2, 9);
        let clusters = StoreError::NoSpace {
            needed,
            free,
            total,
        };
        let pages = StoreError::NoMdPages {
            needed,
            free,
            total,
        };
        for (error, expected) in [
            (clusters, SpaceKind::Clusters),
            (pages, SpaceKind::MetadataPages),
        ] {
            let error = of(error);
            assert!(
                matches!(&error, FsError::NoSpace { kind, free_bytes: 5, .. } if *kind == expected),
                "{error}"
            );
        }
        for (error, data_loss) in [
            (StoreError::Io(io()), false),
            (StoreError::Owed(io()), false),
            (StoreError::Lost(io()), true),
        ] {
            let error = of(error);
            assert!(matches!(error, FsError::Io { .. }), "{error}");
            assert_eq!(error.is_data_loss(), data_loss, "{error}");
        }
        let blob = BlobId::from_page(3);
        let read_only = of(StoreError::ReadOnly(blob));
        assert!(matches!(read_only, FsError::ReadOnly { .. }), "{read_only}");
        let source = PageError {
            page: 3,
            problem: PageProblem::Loop,
        };
        let damaged = of(StoreError::Damaged { blob, source });
        assert!(
            matches!(damaged, FsError::Corrupt { blob: id, .. } if id == blob.0),
            "{damaged}"
        );
    }
}
