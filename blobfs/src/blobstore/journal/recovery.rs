//! Finding a journal at a load, and putting in place what a crash has left in it.
//!
//! - Rules 20 to 22: bytes that batches carry go in order, byte-exact, into the clusters that their
//!   blob has in its last map. None of them has moved since, see [`carry`](super::super::carry).
//! - Rule 12: nothing is written before a flush, since what was read may be in a cache only. Then
//!   pages go in place, a flush, a header with a new epoch; only then anything else. A crash in the
//!   middle leaves the ring as it was. A damaged ring is not written to unless the caller accepts
//!   the loss.
//! - Rule 13: the blob of the journal is compared with the super block before it is used.
//! - Rule 24: a load that may not write reads what is in the ring from memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use pumice_bdev::IoErrorKind;

use super::super::alloc::Bitmap;
use super::super::carried::{Carried, Patch};
use super::super::error::Error;
use super::super::format::{BlobId, PAGE_SIZE_U64, Page, SuperBlock};
use super::super::geometry::Geometry;
use super::super::mdio::MdIo;
use super::super::meta::BlobMeta;
use super::super::replayed::Unplaced;
use super::super::retry::may_land;
use super::super::scan::{Roots, scan};
use super::again::{Debts, Kept, Left, Room, begin_with, full};
use super::format::{RING_AT, RingPlace, Spot};
use super::heads::Heads;
use super::place::{blocks_of, count_blocks, put_all};
use super::walk::{OnDevice, Walked, newer, read_headers, walk};

/// The name of the journal's blob, which is not a path: no file can have it. SPDK's file system
/// needs a name and a length of every blob.
pub(crate) const NAME: &[u8] = b"pumice.journal";
/// Least bytes of a journal, of one that is made and of one that is loaded: what a store has stays loadable.
pub(crate) const LEAST_BYTES: u64 = 128 << 10;
/// Most bytes of a journal. A load has its pages in memory.
pub(crate) const MOST_BYTES: u64 = 256 << 20;

/// More blocks than this times the ring's bytes are damage. A batch has a page for each blob that it
/// has bytes of, and these begin and end in blocks that they may not fill.
const BLOCKS_PER_RING: u64 = 2;

/// A journal that a load has found.
#[derive(Debug)]
pub(crate) struct FoundJournal {
    pub place: RingPlace,
    pub heads: Heads,
    /// Whether the super block has the guard, and the ring an epoch of this load.
    pub begun: bool,
    /// The content that could not be put in place, and is carried again in that epoch. Otherwise it is empty.
    pub left: Option<Kept>,
}

/// The result of looking for a journal.
#[derive(Debug, Default)]
pub(crate) struct Search {
    /// The journal, if there is one that can be used.
    pub journal: Option<FoundJournal>,
    /// The reason why changes may be missing.
    pub damage: Option<String>,
    /// Blocks of blobs that are in the journal and not in place.
    pub blocks: Unplaced,
}

/// The treatment of a journal by a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Treat {
    /// It writes nothing.
    ReadOnly,
    /// It puts in place what is there, unless the journal is damaged.
    Whole,
    /// It puts in place what is there, and gives up what damage has cost.
    Damaged,
}

/// Finds the journal of a store, and recovers from it. A load that writes nothing reads its pages
/// from memory from then on.
///
/// # Errors
/// Fails if the super block has the guard and the journal is damaged, or its place cannot be used,
/// unless that is accepted or nothing is written; and when the device fails.
pub(crate) fn find(
    io: &mut MdIo,
    geo: &Geometry,
    sb: &SuperBlock,
    device: &str,
    treat: Treat,
) -> Result<Search, Error> {
    let place = match place_of(sb, geo) {
        Ok(Some(place)) => place,
        Ok(None) => return Ok(Search::default()),
        Err(reason) if sb.is_guarded() => {
            accept(device, &reason, treat)?;
            return Ok(Search {
                damage: Some(reason),
                ..Search::default()
            });
        }
        Err(reason) => {
            tracing::warn!(device, reason, "the journal is not used");
            return Ok(Search::default());
        }
    };
    let mut file = OnDevice::new(io, geo.cluster_lba(place.cluster), place.len);
    if sb.is_guarded() {
        let mut walked = walk(&mut file, place.blob, place.len);
        drop_foreign(&mut walked, geo);
        return recover(io, geo, place, walked, device, treat);
    }
    let headers = read_headers(&mut file, place.blob, place.len);
    let both = headers.iter().all(Result::is_ok);
    Ok(Search {
        journal: Some(FoundJournal {
            place,
            heads: Heads::new(geo, &place, newer(&headers), both),
            begun: false,
            left: None,
        }),
        ..Search::default()
    })
}

/// Fails if a load that treats the journal in this way does not go on with this damage.
fn accept(device: &str, reason: &str, treat: Treat) -> Result<(), Error> {
    if treat == Treat::Whole {
        return Err(Error::Journal {
            device: device.to_owned(),
            reason: reason.to_owned(),
        });
    }
    tracing::error!(
        device,
        reason,
        "the journal is damaged; changes may be missing"
    );
    Ok(())
}

/// Returns the place of the journal, if the super block has one, or the reason why it cannot be
/// used.
fn place_of(sb: &SuperBlock, geo: &Geometry) -> Result<Option<RingPlace>, String> {
    match RingPlace::read(sb)? {
        Some(place) if !fits(&place, geo) => {
            Err("its place in the super block is not inside the store".to_owned())
        }
        place => Ok(place),
    }
}

/// Leaves out pages that the metadata region does not have.
fn drop_foreign(walked: &mut Walked, geo: &Geometry) {
    let foreign = walked.pages.split_off(&geo.md_len);
    if let Some((index, _)) = foreign.first_key_value() {
        let reason = format!("it has metadata page {index}, and there are {}", geo.md_len);
        walked.damage.get_or_insert(reason);
    }
}

/// Puts in place what the ring has, or has it read from memory.
fn recover(
    io: &mut MdIo,
    geo: &Geometry,
    place: RingPlace,
    walked: Walked,
    device: &str,
    treat: Treat,
) -> Result<Search, Error> {
    let Walked {
        header,
        both,
        batches,
        end,
        used,
        pages,
        carried,
        mut damage,
    } = walked;
    // Its pages are read as they are going to be.
    io.set_replayed(pages.clone());
    let (mut debts, missing) = places_of(io, geo, &carried, &pages)?;
    damage = damage.or(missing);
    let blocks = count_blocks(&patches(&debts), geo.block_size);
    if blocks > BLOCKS_PER_RING * place.len / geo.block_size {
        let reason = format!(
            "it has bytes for {blocks} blocks of blobs, more than a ring of {} bytes can",
            place.len
        );
        damage.get_or_insert(reason);
        debts.clear();
    }
    if let Some(reason) = &damage {
        accept(device, reason, treat)?;
    }
    let heads = Heads::new(geo, &place, header, both);
    let mut found = FoundJournal {
        place,
        heads,
        begun: true,
        left: None,
    };
    let unplaced = |error: Error| format!("bytes of a blob cannot be put in place: {error}");
    if treat == Treat::ReadOnly {
        let (blocks, unreadable) = blocks_of(io, &patches(&debts));
        return Ok(Search {
            journal: Some(found),
            damage: damage.or(unreadable.map(unplaced)),
            blocks,
        });
    }
    io.set_replayed(BTreeMap::new());
    let placed = put_in_place(io, geo, (&pages, &debts), (end, used), &mut found, treat)?;
    let (batches, pages, carried) = (batches.len(), pages.len(), carried.len());
    tracing::info!(
        device,
        batches,
        pages,
        carried,
        "put in place what was in the journal"
    );
    let mut blocks = Unplaced::default();
    if let Some(kept) = &found.left {
        // This load, and the readers of the files, find it where it is going to be.
        io.set_replayed(kept.pages.iter().cloned().collect());
        blocks = blocks_of(io, &patches(&kept.debts)).0;
    }
    let unplaced = placed.unplaced.map(unplaced);
    Ok(Search {
        journal: placed.has_headers.then_some(found),
        damage: damage.or(placed.damage).or(unplaced),
        blocks,
    })
}

/// The places of everything that blobs are owed.
fn patches(debts: &Debts) -> Vec<Patch> {
    let all = debts.values().flatten();
    all.flat_map(|(_, patches)| patches).cloned().collect()
}

/// The outcome of putting in place what was in the ring.
#[derive(Default)]
struct Placed {
    /// The reason why bytes of blobs are not in place.
    unplaced: Option<Error>,
    damage: Option<String>,
    /// Whether the ring has a header of a new epoch. Otherwise the store goes on without the journal.
    has_headers: bool,
}

/// Makes pages, and what blobs are owed, durable in their places, and begins an epoch behind them. What cannot be put in place
/// is carried again in it, behind the batches of the ring, which end at unit `end` and take `used` units; if damage is accepted
/// it is given up.
///
/// # Errors
/// Fails with what may not be given up.
fn put_in_place(
    io: &mut MdIo,
    geo: &Geometry,
    (pages, debts): (&BTreeMap<u32, Arc<Page>>, &Debts),
    (end, used): (u64, u64),
    found: &mut FoundJournal,
    treat: Treat,
) -> Result<Placed, Error> {
    let mut placed = Placed::default();
    let is_final = |error: &Error| treat == Treat::Whole || may_land(error) || is_full(error);
    io.flush()?;
    let images = pages.iter().map(|(index, page)| (*index, &**page));
    let left = put_all(io, geo, images, debts)?;
    if !left.is_none() && treat == Treat::Whole {
        found.left = Some(carry_again(
            io,
            geo,
            (pages, debts),
            (end, used),
            found,
            left,
        )?);
        placed.has_headers = true;
        return Ok(placed);
    }
    if let Some((_, error)) = left.blobs.into_iter().next() {
        if is_final(&error) {
            return Err(error);
        }
        placed.unplaced = Some(error);
    }
    if let Some((index, error)) = left.pages.into_iter().next() {
        if is_final(&error) {
            return Err(error);
        }
        let damage = format!("metadata page {index} cannot be written: {error}");
        placed.damage = Some(damage);
    }
    match found.heads.begin(io, Spot::first(0)) {
        Err(error) if is_final(&error) => return Err(error),
        Err(error) => {
            let damage = format!("its headers cannot be written: {error}");
            placed.damage.get_or_insert(damage);
        }
        Ok(()) => placed.has_headers = true,
    }
    Ok(placed)
}

/// Begins an epoch with what a load cannot put in place. Until its header is durable the ring is as the load has found it.
///
/// # Errors
/// Fails with the reason why something is not in place if there is no room for it.
fn carry_again(
    io: &mut MdIo,
    geo: &Geometry,
    (pages, debts): (&BTreeMap<u32, Arc<Page>>, &Debts),
    (end, used): (u64, u64),
    found: &mut FoundJournal,
    left: Left,
) -> Result<Kept, Error> {
    let units = (found.place.len - RING_AT) / geo.block_size;
    let room = Room {
        lba: geo.cluster_lba(found.place.cluster) + RING_AT / geo.block_size,
        unit: geo.block_size,
        units,
        from: end,
        free: units - used.min(units),
    };
    let (pages, debts) = left.part_of(|index| pages.get(&index), debts);
    match begin_with(io, &mut found.heads, room, &pages, &debts) {
        Ok((begun, written)) => {
            written?;
            tracing::warn!(
                pages = pages.len(),
                blobs = debts.len(),
                "the journal carries again what cannot be put in place"
            );
            Ok(Kept {
                begun,
                pages,
                debts,
            })
        }
        Err(error) => Err(full(left, error)),
    }
}

/// Whether the host of a sparse image has no space. Nothing is damaged then, and nothing given up.
fn is_full(error: &Error) -> bool {
    matches!(error, Error::Io(error) if error.kind == IoErrorKind::NoSpace)
}

/// Returns the places of bytes that batches carry, by the maps that their blobs have at the end. A blob that a batch has
/// deleted needs none. If others have none, which no power cut causes, returns the reason.
fn places_of(
    io: &mut MdIo,
    geo: &Geometry,
    carried: &[Carried],
    pages: &BTreeMap<u32, Arc<Page>>,
) -> Result<(Debts, Option<String>), Error> {
    if carried.is_empty() {
        return Ok((Debts::new(), None));
    }
    let root = |blob: BlobId| blob.page().filter(|root| *root < geo.md_len);
    let mut roots = Bitmap::new(geo.md_len);
    for root in carried.iter().filter_map(|carried| root(carried.blob)) {
        roots.set(root);
    }
    let found = scan(io, geo, &Roots::Mask(roots.words()))?;
    let (mut debts, mut missing) = (Debts::new(), None);
    for carried in carried {
        let root = root(carried.blob);
        let is_blank = |page: &&Arc<Page>| page.iter().all(|byte| *byte == 0);
        if root
            .and_then(|root| pages.get(&root))
            .is_some_and(|page| is_blank(&page))
        {
            continue;
        }
        let meta = root.and_then(|root| found.blobs.get(&root));
        match meta.and_then(|meta| carried.patches(&meta.map, geo)) {
            Some(places) => {
                let debt = debts.entry(carried.blob).or_default();
                debt.push((carried.clone(), places));
            }
            None => {
                let Carried { blob, offset, .. } = carried;
                missing.get_or_insert(format!(
                    "it has bytes of blob {blob} at offset {offset}, where the blob has no cluster"
                ));
            }
        }
    }
    Ok((debts, missing))
}

/// Whether the place is inside of the clusters that a blob may have.
pub(crate) fn fits(place: &RingPlace, geo: &Geometry) -> bool {
    let first = u64::from(place.cluster);
    let end = first + u64::from(place.count);
    let outside_metadata =
        end <= geo.md_clusters.start.into() || first >= geo.md_clusters.end.into();
    place.count > 0
        && geo.is_data_cluster(first)
        && geo.is_data_cluster(end - 1)
        && outside_metadata
        && place.len.is_multiple_of(PAGE_SIZE_U64)
        && (LEAST_BYTES..=MOST_BYTES).contains(&place.len)
        && place.len <= u64::from(place.count) * geo.cluster_size
}

/// Whether this blob is the one that holds the journal.
pub(crate) fn is_of(meta: &BlobMeta, place: &RingPlace) -> bool {
    let expected = (0u64..).zip(place.cluster..);
    meta.id == place.blob
        && meta.xattr(b"name").is_some_and(|name| **name == *NAME)
        && meta.map.num_clusters() == u64::from(place.count)
        && meta.map.num_allocated() == u64::from(place.count)
        && meta.map.allocated().eq(expected.take(place.count as usize))
}

const _: () = assert!(LEAST_BYTES > RING_AT);
