//! Carrying again what cannot be put in place (rule 23), so that one bad block keeps nothing else from being put in place.
//!
//! The metadata pages and the bytes of blobs that a checkpoint could not put in place become the first batches of a new
//! epoch, behind everything that the ring has. They are durable before the header of that epoch, which gives up the rest of
//! the ring. A power cut before the header leaves the old epoch, in which they do not count, and one behind it the new one.
//! So no batch has to be made void when one of them cannot be written: they are tried at another place of the ring.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use pumice_bdev::Op;

use super::super::carried::{Carried, Patch};
use super::super::error::Error;
use super::super::format::{BlobId, PAGE_SIZE_U64, Page};
use super::super::mdio::MdIo;
use super::super::retry::{may_land, repeat};
use super::format::{
    BATCH_LEN, Image, MOST_OF_RING, Spot, carried_bytes, encode_batch, record_bytes,
};
use super::heads::Heads;

/// Number of places of the ring at which they are tried.
const PLACES: u32 = 3;

/// The bytes that blobs are owed, in the order of the batches.
pub(crate) type Debts = BTreeMap<BlobId, Vec<(Carried, Vec<Patch>)>>;

/// The pages and blobs that a checkpoint could not put in place, with the reasons.
#[derive(Debug, Default)]
pub(crate) struct Left {
    pub blobs: Vec<(BlobId, Error)>,
    pub pages: Vec<(u32, Error)>,
}

impl Left {
    /// Whether everything is in place.
    pub fn is_none(&self) -> bool {
        self.blobs.is_empty() && self.pages.is_empty()
    }

    /// Returns the pages, which `page` finds by their indices, and the part of these debts.
    pub fn part_of<'a>(
        &self,
        page: impl Fn(u32) -> Option<&'a Arc<Page>>,
        debts: &Debts,
    ) -> (Vec<Image>, Debts) {
        let image = |index: u32| Some((index, Arc::clone(page(index)?)));
        let pages = self.pages.iter().filter_map(|(index, _)| image(*index));
        let debt = |blob: &BlobId| Some((*blob, debts.get(blob)?.clone()));
        let debts = self.blobs.iter().filter_map(|(blob, _)| debt(blob));
        (pages.collect(), debts.collect())
    }

    /// Fails if anything is not in place.
    ///
    /// # Errors
    /// Returns the first reason.
    pub fn check(self) -> Result<(), Error> {
        let pages = self.pages.into_iter().map(|(_, error)| error);
        let blobs = self.blobs.into_iter().map(|(_, error)| error);
        blobs.chain(pages).next().map_or(Ok(()), Err)
    }

    /// Fails if a page is not in place.
    ///
    /// # Errors
    /// Returns the first reason.
    pub fn check_all_pages(self) -> Result<(), Error> {
        let first = self.pages.into_iter().next();
        first.map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Fails if one of these pages is not in place.
    ///
    /// # Errors
    /// Returns the first reason.
    pub fn check_pages(self, mut pages: impl Iterator<Item = u32>) -> Result<(), Error> {
        let mut left: BTreeMap<u32, Error> = self.pages.into_iter().collect();
        pages
            .find_map(|index| left.remove(&index))
            .map_or(Ok(()), Err)
    }

    /// Fails if bytes of one of these blobs, or of any, are not in place.
    ///
    /// # Errors
    /// Returns the first reason.
    pub fn check_blobs(self, blobs: Option<&[BlobId]>) -> Result<(), Error> {
        let mut left = self.blobs.into_iter();
        let counts = |blob: &BlobId| blobs.is_none_or(|blobs| blobs.contains(blob));
        left.find(|(blob, _)| counts(blob))
            .map_or(Ok(()), |(_, error)| Err(error))
    }
}

/// Whether what failed with this error is carried again: the device has answered, and the write does not land later.
pub(super) fn stays(error: &Error) -> bool {
    matches!(error, Error::Io(_)) && !may_land(error)
}

/// Returns the error of what is left that could not be carried again either: `None` says that there is no room for it.
pub(super) fn full(left: Left, error: Option<Error>) -> Error {
    let Some(error) = error else {
        let Err(first) = left.check() else {
            return Error::invalid("nothing is left");
        };
        tracing::error!(error = %first, "more cannot be put in place than the journal can carry again");
        return first;
    };
    error
}

/// A ring, and the part of it that has nothing that a recovery needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    /// First block of the ring.
    pub lba: u64,
    /// Bytes of a unit.
    pub unit: u64,
    /// Number of units of the ring.
    pub units: u64,
    /// The first free unit.
    pub from: u64,
    /// Number of free units.
    pub free: u64,
}

/// Batches that are not written yet.
struct Layout {
    /// Each with the unit where it begins.
    batches: Vec<(u64, Vec<u8>)>,
    /// The place behind them.
    head: Spot,
    /// Units that they take.
    used: u64,
}

/// The pages and bytes that a load has carried again.
#[derive(Debug)]
pub(crate) struct Kept {
    pub begun: Begun,
    pub pages: Vec<Image>,
    pub debts: Debts,
}

/// The beginning of an epoch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Begun {
    /// The next batch.
    pub head: Spot,
    /// Units in use.
    pub used: u64,
}

/// Begins an epoch with these pages and bytes. Fails if they are more than a batch may have, or than there is room for.
///
/// # Errors
/// Fails with `None` if there is no room, and with the device's error. The header of the epoch may be on the device then,
/// and is the one that counts if [`Heads::mark`] has changed.
pub(super) fn begin_with(
    io: &mut MdIo,
    heads: &mut Heads,
    mut room: Room,
    pages: &[Image],
    debts: &Debts,
) -> Result<(Begun, Result<(), Error>), Option<Error>> {
    let next = heads.next();
    let carried: Vec<Carried> = debts.values().flat_map(|debt| pieces_of(debt)).collect();
    let most = room.units / MOST_OF_RING;
    let mut tries = PLACES;
    loop {
        tries -= 1;
        let layout = lay_out(room, next.mark(), pages, &carried);
        let Some(layout) = layout.filter(|layout| layout.used <= most.min(room.free)) else {
            return Err(None);
        };
        match write(io, room, &layout.batches) {
            Ok(()) => {
                let begun = Begun {
                    head: layout.head,
                    used: layout.used,
                };
                let written = heads.begin_as(io, next, Spot::first(room.from));
                return Ok((begun, written));
            }
            Err(error) if tries == 0 || !stays(&error) => return Err(Some(error)),
            Err(error) => {
                tracing::warn!(%error, "what cannot be put in place is carried at another place of the journal");
                room.from = layout.head.at;
                room.free -= layout.used;
            }
        }
    }
}

/// Makes batches durable. They have to be before the header.
fn write(io: &mut MdIo, room: Room, batches: &[(u64, Vec<u8>)]) -> Result<(), Error> {
    repeat(|| {
        let mut ops: Vec<Op> = Vec::new();
        for (at, batch) in batches {
            ops.extend(io.can().writes(room.lba + at, batch)?);
        }
        io.run_durable(ops)
    })
}

/// Returns what a blob is owed in pieces that end at a page of the blob: of a block that was written as a whole, no other
/// part is needed to put it in place again.
fn pieces_of(debt: &[(Carried, Vec<Patch>)]) -> Vec<Carried> {
    let mut pieces: Vec<(u64, Vec<u8>, bool, BlobId)> = Vec::new();
    for (carried, _) in debt {
        let mut at = carried.offset;
        let mut rest = &carried.bytes[..];
        while !rest.is_empty() {
            let page_end = (at / PAGE_SIZE_U64 + 1) * PAGE_SIZE_U64;
            let now = usize::try_from(page_end - at).map_or(rest.len(), |n| n.min(rest.len()));
            let ends = carried.ends && now == rest.len();
            match pieces.last_mut() {
                Some((from, bytes, last_ends, _))
                    if *from + bytes.len() as u64 == at && !at.is_multiple_of(PAGE_SIZE_U64) =>
                {
                    bytes.extend_from_slice(&rest[..now]);
                    *last_ends = ends;
                }
                _ => {
                    // Others follow, so that the content does not end there.
                    if let Some((from, bytes, last_ends, _)) = pieces.last_mut()
                        && *from + bytes.len() as u64 == at
                    {
                        *last_ends = false;
                    }
                    pieces.push((at, rest[..now].to_vec(), ends, carried.blob));
                }
            }
            at += now as u64;
            rest = &rest[now..];
        }
    }
    let piece = |(offset, bytes, ends, blob): (u64, Vec<u8>, bool, BlobId)| Carried {
        blob,
        offset,
        bytes: bytes.into(),
        ends,
    };
    pieces.into_iter().map(piece).collect()
}

/// Divides records among batches that fill the ring up to its end. `None` if one record does not fit a batch.
fn lay_out(room: Room, mark: u64, pages: &[Image], carried: &[Carried]) -> Option<Layout> {
    let most = room.units / MOST_OF_RING;
    let page_bytes = pages.iter().map(|(_, page)| record_bytes(page));
    let piece_bytes = carried
        .iter()
        .map(|piece| carried_bytes(piece.bytes.len() as u64));
    let sizes: Vec<u64> = page_bytes.chain(piece_bytes).collect();
    let mut spot = Spot::first(room.from);
    let (mut done, mut used, mut batches) = (0, 0, Vec::new());
    while done < sizes.len() {
        let behind = room.units - spot.at;
        let (mut at, mut skipped) = (spot.at, 0);
        let mut count = fitting(&sizes[done..], most.min(behind) * room.unit);
        if count == 0 && behind < most {
            (at, skipped) = (0, behind);
            count = fitting(&sizes[done..], most * room.unit);
        }
        if count == 0 {
            return None;
        }
        let range = done..done + count;
        let of_pages = clamp(&range, 0, pages.len());
        let of_pieces = clamp(&range, pages.len(), carried.len());
        let unit = usize::try_from(room.unit).expect("at most a page");
        let (batch, crc) = encode_batch(mark, spot, unit, &pages[of_pages], &carried[of_pieces]);
        let units = batch.len() as u64 / room.unit;
        batches.push((at, batch));
        used += skipped + units;
        done = range.end;
        spot = Spot {
            at: (at + units) % room.units,
            sequence: spot.sequence + 1,
            before: crc,
        };
    }
    Some(Layout {
        batches,
        head: spot,
        used,
    })
}

/// The part of a range that lies in `len` items from `start` on, counted from there.
fn clamp(range: &Range<usize>, start: usize, len: usize) -> Range<usize> {
    let at = |n: usize| n.saturating_sub(start).min(len);
    at(range.start)..at(range.end)
}

/// Number of the first records of these sizes that a batch of at most `most` bytes can have.
fn fitting(sizes: &[u64], most: u64) -> usize {
    let mut bytes = BATCH_LEN as u64;
    let fits = sizes.iter().take_while(|size| {
        bytes += **size;
        bytes <= most
    });
    fits.count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carried(offset: u64, len: usize, byte: u8) -> (Carried, Vec<Patch>) {
        let carried = Carried {
            blob: BlobId(1),
            offset,
            bytes: vec![byte; len].into(),
            ends: true,
        };
        (carried, Vec::new())
    }

    /// Only the last piece ends the content, since zeroes behind an earlier one would replace bytes of a later one.
    #[test]
    fn rule_23_what_a_blob_is_owed_is_cut_at_its_pages_and_ends_once() {
        let debt = [
            carried(4000, 50, 1),
            // It ends with a page, and others follow.
            carried(4050, 4142, 2),
            carried(8192, 858, 2),
            carried(9050, 10, 3),
        ];
        let pieces = pieces_of(&debt);
        let found: Vec<_> = pieces
            .iter()
            .map(|piece| (piece.offset, piece.bytes.len(), piece.ends))
            .collect();
        assert_eq!(
            found,
            [(4000, 96, false), (4096, 4096, false), (8192, 868, true)]
        );
        assert_eq!((pieces[0].bytes[49], pieces[0].bytes[50]), (1, 2));
        assert_eq!((pieces[2].bytes[857], pieces[2].bytes[858]), (2, 3));
    }

    #[test]
    fn rule_23_batches_fill_the_ring_up_to_its_end_and_go_on_at_its_beginning() {
        let room = |from| Room {
            lba: 0,
            unit: 4096,
            units: 30,
            from,
            free: 30,
        };
        let pages: Vec<Image> = (0..3)
            .map(|n| (n, std::sync::Arc::new([7; 4096])))
            .collect();
        let places = |from| {
            let layout = lay_out(room(from), 5, &pages, &[]).unwrap();
            let at: Vec<u64> = layout.batches.iter().map(|(at, _)| *at).collect();
            (at, layout.used, layout.head.at, layout.head.sequence)
        };
        assert_eq!(places(4), (vec![4], 4, 8, 2));
        assert_eq!(places(26), (vec![26], 4, 0, 2));
        assert_eq!(places(27), (vec![27, 0], 5, 2, 3));
        assert_eq!(places(29), (vec![0], 5, 4, 2));
    }
}
