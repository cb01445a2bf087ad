//! Small appends that the journal carries: who may begin one, and who has to wait until the bytes
//! are in place.
//!
//! While the journal owes a blob bytes, only a checkpoint writes into that blob's clusters, and
//! they stay the blob's. So recovery never puts older bytes over newer ones (rule 21), and the
//! clusters in the blob's last map are those that the bytes were meant for (rule 22). A change
//! that writes there, or moves or frees clusters, has the bytes put in place first.

use super::Blobstore;
use super::blob::Blob;
use super::commit::BeginCarry;
use super::error::Error;
use super::format::BlobId;

/// An append that is about to be carried. Writes to the blob wait until this is dropped.
#[derive(Debug)]
pub(crate) struct Carrying {
    // Not the blob, which nobody may have open when it is deleted.
    store: Blobstore,
    blob: BlobId,
}

impl Drop for Carrying {
    fn drop(&mut self) {
        self.store.inner.commit.end_carry(self.blob);
    }
}

impl Blob {
    /// Announces an append of `len` bytes that a [`Transaction`](super::Transaction) carries. No
    /// write of the blob is in flight, and the caller lets nobody else begin one meanwhile.
    pub(crate) fn begin_carry(&self, len: u64) -> BeginCarry<Carrying> {
        match self.store.inner.commit.begin_carry(self.id(), len) {
            // This is made only after the beginning, since dropping it ends it.
            BeginCarry::Begun(()) => BeginCarry::Begun(Carrying {
                store: self.store.clone(),
                blob: self.id(),
            }),
            BeginCarry::NoRoom => BeginCarry::NoRoom,
            BeginCarry::Refused => BeginCarry::Refused,
        }
    }

    /// Waits for appends that are being carried, and has what is owed to the blob put in place. The
    /// caller has no turn in the order of changes, and has not passed the gate.
    ///
    /// # Errors
    /// Fails with [`Error::Owed`] when the device fails.
    #[inline]
    pub(crate) fn settle(&self) -> Result<(), Error> {
        self.store.inner.commit.settle_blob(self.id())
    }

    /// Returns a byte behind which everything is that the journal owes the blob. `None` if it owes nothing.
    pub(crate) fn owed_from(&self) -> Option<u64> {
        self.store.inner.commit.owed_from(self.id())
    }
}
