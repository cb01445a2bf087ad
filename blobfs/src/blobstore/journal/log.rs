//! The state of the ring in memory.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::super::commit::Failure;
use super::super::error::Error;
use super::super::format::{BlobId, PAGE_SIZE_U64, Page};
use super::super::geometry::Geometry;
use super::again::{Begun, Debts, Left};
use super::format::{Image, MOST_OF_RING, Spot};
use super::group::Waiting;
use super::owed::Owed;

/// Most bytes that are owed, which are in memory, before carried appends wait for a checkpoint.
pub(super) const OWED_BYTES: u64 = 4 << 20;

/// Returns the most bytes that are owed, in a ring of which batches may have `most` bytes, so that all can be carried again. Each
/// page of a blob has a record of its own then, and up to three pages are lost where batches end.
pub(super) fn most_owed(most: u64) -> u64 {
    (most - most / 32).saturating_sub(3 * PAGE_SIZE_U64)
}

/// The content of the ring that is durable, and goes in place.
#[derive(Debug)]
pub(super) struct Durable {
    /// The next batch.
    pub head: Spot,
    /// Units in use.
    pub used: u64,
    pub pages: HashMap<u32, (u64, Arc<Page>)>,
    pub debts: Debts,
    pub geo: Geometry,
}

impl Durable {
    /// Returns the part of it that could not be put in place.
    pub fn part(&self, left: &Left) -> (Vec<Image>, Debts) {
        left.part_of(|index| Some(&self.pages.get(&index)?.1), &self.debts)
    }
}

/// The state of the ring, and those who wait. It is locked only briefly.
#[derive(Debug)]
pub(super) struct Log {
    /// Whether this use of the ring has its epoch, and the super block its guard.
    pub begun: bool,
    /// Whether a header could not be written, so that the one that counts may be damaged. It is written again before a batch.
    pub unconfirmed: bool,
    /// The reason why nothing is appended.
    pub broken: Option<Halt>,
    /// Whether a batch is on its way.
    pub writing: bool,
    /// Whether a checkpoint in the background has begun and not ended.
    pub checkpointing: bool,
    /// No checkpoint in the background begins before this, since the last one failed.
    pub paused_until: Option<Instant>,
    pub waiting: VecDeque<Waiting>,
    /// The results of those that have not fetched theirs.
    pub results: HashMap<u64, Result<(), Failure>>,
    pub next_ticket: u64,
    /// The mark of the epoch's batches.
    pub mark: u64,
    /// The next batch.
    pub head: Spot,
    /// Units from the oldest batch that is not in place to the head.
    pub used: u64,
    /// Pages that are durable in the ring and not in place, each with the number of its batch.
    pub pages: HashMap<u32, (u64, Arc<Page>)>,
    /// The places of those pages.
    pub geo: Geometry,
    pub owed: Owed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Halt {
    /// A batch that failed may be on the device. An epoch that begins behind it, at this unit,
    /// makes it void.
    Batch(u64),
    /// A write that has timed out may still land, so nothing is written before the next load.
    ForGood,
}

impl Log {
    /// The state of an empty ring, whose next batch has this mark.
    pub fn new(begun: bool, mark: u64, geo: Geometry) -> Log {
        Log {
            begun,
            unconfirmed: false,
            broken: None,
            writing: false,
            checkpointing: false,
            paused_until: None,
            waiting: VecDeque::new(),
            results: HashMap::new(),
            next_ticket: 0,
            mark,
            head: Spot::first(0),
            used: 0,
            pages: HashMap::new(),
            geo,
            owed: Owed::default(),
        }
    }

    /// Begins an epoch.
    pub fn reset(&mut self, mark: u64, head: Spot) {
        self.mark = mark;
        self.head = head;
        self.used = 0;
        self.pages.clear();
        self.owed.forget(u64::MAX);
    }

    /// Begins an epoch that has these pages, and what these blobs are owed, which could not be put in place.
    pub fn reset_with(&mut self, mark: u64, begun: Begun, pages: &[Image], debts: &Debts) {
        let number = begun.head.sequence - 1;
        self.owed.keep(debts.keys().copied(), number);
        (self.mark, self.head, self.used) = (mark, begun.head, begun.used);
        let numbered = pages
            .iter()
            .map(|(index, page)| (*index, (number, Arc::clone(page))));
        self.pages = numbered.collect();
    }

    /// Returns what is durable, without what these blobs are owed, and blobs that a batch has deleted: a recovery finds no
    /// clusters of theirs.
    pub fn durable(&self, given_up: &[BlobId]) -> Durable {
        let mut debts = self.owed.all_but(given_up);
        debts.retain(|blob, _| !self.is_deleted(*blob));
        Durable {
            head: self.head,
            used: self.used,
            pages: self.pages.clone(),
            debts,
            geo: self.geo.clone(),
        }
    }

    fn is_deleted(&self, blob: BlobId) -> bool {
        let root = blob.page().and_then(|root| self.pages.get(&root));
        root.is_some_and(|(_, page)| page.iter().all(|byte| *byte == 0))
    }

    /// Whether a batch that takes so many units of a ring leaves enough of it to carry again what a checkpoint cannot put in
    /// place.
    pub fn has_room(&self, taken: u64, units: u64) -> bool {
        self.used + taken + units / MOST_OF_RING <= units
    }

    /// Whether an append of `len` bytes need not wait for a checkpoint of a ring of so many units, of which `most` bytes can be
    /// carried again.
    pub fn has_carry_room(&self, units: u64, len: u64, most: u64) -> bool {
        let owed = self.owed.bytes();
        self.used <= units / 2 && owed <= OWED_BYTES && owed + len <= most
    }

    pub fn check(&self) -> Result<(), Error> {
        match self.broken {
            None => Ok(()),
            Some(_) => Err(Error::Stopped(
                "a write to the journal has failed, and it is not known what is on the device"
                    .to_owned(),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::carried::Carried;
    use super::super::group::tests::geometry;
    use super::*;

    /// Between the batch of a deletion and the checkpoint that forgets it, another one may carry again what is left.
    #[test]
    fn rules_22_and_23_a_blob_that_a_batch_has_deleted_is_owed_nothing() {
        let mut log = Log::new(true, 1, geometry());
        let blobs = [7, 8].map(BlobId::from_page);
        for blob in blobs {
            let bytes = Carried {
                blob,
                offset: 0,
                bytes: vec![1; 10].into(),
                ends: true,
            };
            log.owed.add(&bytes, 1, &[]);
        }
        log.pages.insert(7, (2, Arc::new([0; 4096])));
        log.pages.insert(8, (2, Arc::new([1; 4096])));
        let debts = log.durable(&[]).debts;
        assert!(debts.keys().eq(&blobs[1..]), "{debts:?}");
        // What is carried again is all that is owed then.
        let mut head = Spot::first(0);
        head.sequence += 1;
        let begun = Begun { head, used: 3 };
        log.reset_with(2, begun, &[], &debts);
        assert!(!log.owed.has(blobs[0]) && log.owed.has(blobs[1]));
        assert_eq!(log.owed.bytes(), 10);
    }

    /// The bytes of an earlier epoch are in place: a checkpoint of this one would put older pages over newer ones.
    #[test]
    fn rules_7_and_20_an_epoch_has_nothing_of_the_one_before() {
        let mut log = Log::new(true, 1, geometry());
        let bytes = Carried {
            blob: BlobId::from_page(7),
            offset: 0,
            bytes: vec![1; 10].into(),
            ends: true,
        };
        log.owed.add(&bytes, 1, &[]);
        log.owed.keep([bytes.blob], 1);
        log.pages.insert(7, (1, Arc::new([1; 4096])));
        log.used = 5;
        log.reset(2, Spot::first(5));
        assert_eq!((log.used, log.pages.len()), (0, 0));
        assert_eq!((log.owed.len(), log.owed.bytes()), (0, 0));
        log.owed.add(&bytes, 1, &[]);
        assert!(!log.owed.is_left(bytes.blob, 1, 0));
    }
}
