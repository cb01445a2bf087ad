//! The bytes of blobs that are durable in the ring and not in place.

use std::collections::HashMap;

use super::super::carried::{Carried, Patch};
use super::super::format::BlobId;
use super::again::Debts;

/// See the module. It has the blobs that are owed bytes, or are going to be.
#[derive(Debug, Default)]
pub(super) struct Owed {
    debts: HashMap<BlobId, Debt>,
    /// The number of those bytes.
    bytes: u64,
    /// Blobs whose bytes the last checkpoint could not put in place.
    left: Vec<BlobId>,
}

/// The debt to one blob.
#[derive(Debug, Default)]
struct Debt {
    /// The number of appends that are being carried.
    carrying: u32,
    /// The byte of the blob behind which all of them are.
    from: u64,
    /// Bytes in order, with their places, each with the number of its batch.
    carried: Vec<(u64, Carried, Vec<Patch>)>,
}

impl Debt {
    fn is_over(&self) -> bool {
        self.carrying == 0 && self.carried.is_empty()
    }

    fn bytes(&self) -> u64 {
        let bytes = self.carried.iter();
        bytes
            .map(|(_, carried, _)| carried.bytes.len() as u64)
            .sum()
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
        debt.from = match debt.carried.is_empty() {
            true => carried.offset,
            false => debt.from.min(carried.offset),
        };
        self.bytes += carried.bytes.len() as u64;
        debt.carried
            .push((number, carried.clone(), patches.to_vec()));
    }

    /// Whether bytes of a blob are being carried.
    pub fn is_carrying(&self, blob: BlobId) -> bool {
        self.debts.get(&blob).is_some_and(|debt| debt.carrying > 0)
    }

    /// Whether a blob is owed bytes.
    pub fn has(&self, blob: BlobId) -> bool {
        let debt = self.debts.get(&blob);
        debt.is_some_and(|debt| !debt.carried.is_empty())
    }

    /// Returns a byte of the blob behind which everything is that it is owed.
    pub fn from(&self, blob: BlobId) -> Option<u64> {
        let debt = self.debts.get(&blob);
        debt.filter(|debt| !debt.carried.is_empty())
            .map(|debt| debt.from)
    }

    /// Forgets what batches before this one owe. It is in place, or void.
    pub fn forget(&mut self, number: u64) {
        for debt in self.debts.values_mut() {
            debt.carried.retain(|(batch, ..)| *batch >= number);
        }
        self.debts.retain(|_, debt| !debt.is_over());
        self.bytes = self.debts.values().map(Debt::bytes).sum();
        self.left.clear();
    }

    /// Records that a batch of this number has again what these blobs are owed, and that nothing else is owed.
    pub fn keep(&mut self, blobs: impl IntoIterator<Item = BlobId>, number: u64) {
        self.left = blobs.into_iter().collect();
        for (blob, debt) in &mut self.debts {
            match self.left.contains(blob) {
                true => debt
                    .carried
                    .iter_mut()
                    .for_each(|(batch, ..)| *batch = number),
                false => debt.carried.clear(),
            }
        }
        self.debts.retain(|_, debt| !debt.is_over());
        self.bytes = self.debts.values().map(Debt::bytes).sum();
    }

    /// Whether a blob is owed bytes that the last checkpoint could not put in place, and this many more would be too many.
    pub fn is_left(&self, blob: BlobId, more: u64, most: u64) -> bool {
        let left = self.left.iter().filter_map(|blob| self.debts.get(blob));
        self.left.contains(&blob) && left.map(Debt::bytes).sum::<u64>() + more > most
    }

    /// Returns everything but what these blobs are owed, in the order of the batches.
    pub fn all_but(&self, given_up: &[BlobId]) -> Debts {
        let counts = |blob: &BlobId| !given_up.contains(blob);
        let debts = self.debts.iter().filter(|(blob, _)| counts(blob));
        let of = |debt: &Debt| {
            let carried = debt.carried.iter();
            carried
                .map(|(_, carried, patches)| (carried.clone(), patches.clone()))
                .collect::<Vec<_>>()
        };
        let debts = debts.map(|(blob, debt)| (*blob, of(debt)));
        debts.filter(|(_, debt)| !debt.is_empty()).collect()
    }
}
