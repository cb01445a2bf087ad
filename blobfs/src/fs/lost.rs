//! Parts of a damaged file that a mount gives up when it is told to (`MountOptions::accept_damage`).

use super::inode::xattr;
use crate::blobstore::{BlobId, Blobstore, Error, Spend};

/// A part of a file that cannot be used.
pub(crate) enum Lost {
    /// All names but the first.
    Links,
    /// The bytes behind this length.
    Beyond(u64),
}

impl Lost {
    /// Gives it up on the device, so that the next mount finds nothing wrong.
    pub fn give_up(&self, store: &Blobstore, id: BlobId) -> Result<(), Error> {
        let mut tx = store.transaction();
        tx.spend(Spend::Releasing);
        match self {
            Lost::Links => tx.remove_xattr(id, xattr::LINKS),
            Lost::Beyond(len) => tx.set_xattr(id, xattr::LENGTH, &len.to_le_bytes()),
        }
        tx.commit().map(drop)
    }
}
