//! The bytes of blobs that are durable in the ring and not in place.

use std::collections::HashMap;

use super::super::carried::{Carried, Patch};
use super::super::format::BlobId;

/// See the module. It has the blobs that are owed bytes, or are going to be.
#[derive(Debug, Default)]
pub(super) struct Owed {
    debts: HashMap<BlobId, Debt>,
    /// The number of those bytes.
    bytes: u64,
}

/// The debt to one blob.
#[derive(Debug, Default)]
struct Debt {
    /// The number of appends that are being carried.
    carrying: u32,
    /// The byte of the blob behind which all of them are.
    from: u64,
    /// Bytes in order, each with the number of its batch.
    patches: Vec<(u64, Patch)>,
}

impl Debt {
    fn is_over(&self) -> bool {
        self.carrying == 0 && self.patches.is_empty()
    }
}

impl Owed {
    /// Number of blobs.
    pub fn len(&self) -> usize {
        self.debts.len()
    }

    /// Number of bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Records that a batch is going to carry bytes of a blob.
    pub fn begin(&mut self, blob: BlobId) {
        self.debts.entry(blob).or_default().carrying += 1;
    }

    /// Ends what [`Owed::begin`] has begun.
    pub fn end(&mut self, blob: BlobId) {
        if let Some(debt) = self.debts.get_mut(&blob) {
            debt.carrying -= 1;
            if debt.is_over() {
                self.debts.remove(&blob);
            }
        }
    }

    /// Adds what a durable batch of this number has carried.
    pub fn add(&mut self, carried: &Carried, number: u64, patches: &[Patch]) {
        let debt = self.debts.entry(carried.blob).or_default();
        debt.from = match debt.patches.is_empty() {
            true => carried.offset,
            false => debt.from.min(carried.offset),
        };
        for patch in patches {
            self.bytes += patch.bytes().len() as u64;
            debt.patches.push((number, patch.clone()));
        }
    }

    /// Whether bytes of a blob are being carried.
    pub fn is_carrying(&self, blob: BlobId) -> bool {
        self.debts.get(&blob).is_some_and(|debt| debt.carrying > 0)
    }

    /// Whether a blob is owed bytes.
    pub fn has(&self, blob: BlobId) -> bool {
        let debt = self.debts.get(&blob);
        debt.is_some_and(|debt| !debt.patches.is_empty())
    }

    /// Forgets what a blob is owed that is deleted.
    pub fn forget_blob(&mut self, blob: BlobId) {
        if let Some(debt) = self.debts.remove(&blob) {
            let bytes = debt.patches.iter().map(|(_, patch)| patch.bytes().len());
            self.bytes -= bytes.sum::<usize>() as u64;
        }
    }

    /// Returns a byte of the blob behind which everything is that it is owed.
    pub fn from(&self, blob: BlobId) -> Option<u64> {
        let debt = self.debts.get(&blob);
        debt.filter(|debt| !debt.patches.is_empty())
            .map(|debt| debt.from)
    }

    /// Forgets what batches before this one owe. It is in place, or void.
    pub fn forget(&mut self, number: u64) {
        self.bytes = 0;
        for debt in self.debts.values_mut() {
            debt.patches.retain(|(batch, _)| *batch >= number);
            let left = debt.patches.iter().map(|(_, patch)| patch.bytes().len());
            self.bytes += left.sum::<usize>() as u64;
        }
        self.debts.retain(|_, debt| !debt.is_over());
    }

    /// Returns everything but what these blobs are owed, in the order of the batches.
    pub fn all_but(&self, given_up: &[BlobId]) -> Vec<Patch> {
        let counts = |blob: &BlobId| !given_up.contains(blob);
        let debts = self.debts.iter().filter(|(blob, _)| counts(blob));
        let debts = debts.map(|(_, debt)| debt);
        let mut all: Vec<&(u64, Patch)> = debts.flat_map(|debt| &debt.patches).collect();
        all.sort_by_key(|(number, _)| *number);
        all.into_iter().map(|(_, patch)| patch.clone()).collect()
    }
}
