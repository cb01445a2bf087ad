//! What all handles of an open blob share, and what keeps it open.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::format::BlobId;
use super::gate::{Gate, Inside};
use super::meta::BlobMeta;
use super::view::View;

/// Name and new value of an xattr; `None` stands for removed.
pub(super) type PendingXattr = (Box<[u8]>, Option<Arc<[u8]>>);

/// The part of an open blob that all its handles share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub id: BlobId,
    pub gate: Arc<Gate>,
    pub view: ArcSwap<View>,
    pub meta: ArcSwap<BlobMeta>,
    /// Changes of xattrs that wait for [`Blob::sync_md`](super::Blob::sync_md).
    pub pending: Mutex<Vec<PendingXattr>>,
    /// Held while pending changes are written, since two writers would each write the same changes.
    pub syncing: Mutex<()>,
    pub has_pending: AtomicBool,
}

impl Shared {
    pub fn new(meta: Arc<BlobMeta>, view: View) -> Shared {
        Shared {
            id: meta.id,
            gate: Arc::default(),
            view: ArcSwap::from_pointee(view),
            meta: ArcSwap::new(meta),
            pending: Mutex::default(),
            syncing: Mutex::default(),
            has_pending: AtomicBool::new(false),
        }
    }

    /// Passes an entry of the blob's gate to an object that lives as long as necessary.
    pub fn owe(self: &Arc<Shared>, inside: Inside<'_>) -> Owed {
        Owed {
            lane: inside.pass(&self.gate),
            blob: Some(Arc::clone(self)),
            gate: Arc::clone(&self.gate),
        }
    }
}

/// Blobs whose gates are closed. They open when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Frozen(Vec<Arc<Shared>>);

impl Frozen {
    /// Whether the gates of all these blobs are closed.
    pub fn covers(&self, blobs: &[Arc<Shared>]) -> bool {
        blobs.iter().all(|blob| self.has(blob))
    }

    fn has(&self, blob: &Arc<Shared>) -> bool {
        self.0.iter().any(|closed| Arc::ptr_eq(closed, blob))
    }

    /// Closes those gates that are open, and waits until no I/O is in flight behind them. Meanwhile
    /// `drive` takes completions of I/O that no particular thread waits for. Must not be called
    /// with the metadata locked, which others need meanwhile.
    ///
    /// # Errors
    /// Returns the blob whose I/O does not end.
    pub fn close(&mut self, blobs: Vec<Arc<Shared>>, drive: &dyn Fn()) -> Result<(), BlobId> {
        let first = self.0.len();
        for blob in blobs {
            if !self.has(&blob) {
                blob.gate.shut();
                self.0.push(blob);
            }
        }
        let start = Instant::now();
        let stuck = self.0[first..]
            .iter()
            .find(|blob| !blob.gate.wait_empty(start, drive));
        stuck.map_or(Ok(()), |blob| Err(blob.id))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for blob in &self.0 {
            blob.gate.open();
        }
    }
}

/// The entry of I/O that outlives the call that began it. It leaves when this is dropped, which is
/// when the device has answered.
#[derive(Debug)]
pub(crate) struct Owed {
    /// The blob, which counts as open.
    blob: Option<Arc<Shared>>,
    gate: Arc<Gate>,
    lane: usize,
}

impl Drop for Owed {
    fn drop(&mut self) {
        // In this order, since a thread that finds the gate empty may delete the blob.
        self.blob = None;
        self.gate.leave(self.lane);
    }
}
