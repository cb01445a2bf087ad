//! Putting pages in their places, and the bytes that batches carry into the clusters of their blobs.
//!
//! Rule 20: they are byte-exact. Of a block that they begin in the middle of, the bytes before them
//! are read from the device. Zeroes follow the end of the content in its last block.

use std::collections::btree_map::Entry;

use pumice_bdev::{DmaSlice, Op};

use super::super::carried::Patch;
use super::super::error::Error;
use super::super::format::Page;
use super::super::geometry::Geometry;
use super::super::mdio::{MdIo, dma};
use super::super::replayed::{Blocks, Unplaced};
use super::super::retry::{may_land, repeat};
use super::again::{Debts, Left, stays};

/// Returns the number of blocks that these patches change.
pub(super) fn count_blocks(patches: &[Patch], unit: u64) -> u64 {
    let range = |patch: &Patch| {
        let end = patch.at + patch.bytes().len() as u64;
        (patch.at / unit, end.div_ceil(unit))
    };
    let mut ranges: Vec<(u64, u64)> = patches.iter().map(range).collect();
    ranges.sort_unstable();
    let (mut count, mut upto) = (0, 0);
    for (from, end) in ranges {
        count += end.saturating_sub(from.max(upto));
        upto = upto.max(end);
    }
    count
}

/// Returns the blocks that these patches change, one after another. A block of which they change a
/// part, and that cannot be read, is left out, and returned beside the others with the first error.
pub(super) fn blocks_of<'a>(
    io: &mut MdIo,
    patches: impl IntoIterator<Item = &'a Patch>,
) -> (Unplaced, Option<Error>) {
    let unit = io.can().block_size();
    let size = usize::try_from(unit).expect("at most a page");
    let (mut found, mut failed) = (Unplaced::default(), None);
    let Unplaced { blocks, parts } = &mut found;
    for patch in patches {
        let mut rest = patch.bytes();
        let mut at = patch.at;
        while !rest.is_empty() {
            let (lba, skip) = (at / unit, usize::try_from(at % unit).expect("in a block"));
            let (now, behind) = rest.split_at(rest.len().min(size - skip));
            let end = skip + now.len();
            let zeroed = behind.is_empty() && patch.ends;
            at += now.len() as u64;
            rest = behind;
            let is_whole = skip == 0 && (end == size || zeroed);
            if is_whole {
                parts.remove(&lba);
            } else if let Entry::Vacant(block) = blocks.entry(lba) {
                // A block that could not be read lacks earlier parts, also if it can be read now.
                let there = match parts.contains_key(&lba) {
                    true => None,
                    false => io.read(lba, size).map_err(|e| failed.get_or_insert(e)).ok(),
                };
                let Some(there) = there else {
                    let mut part = now.to_vec();
                    part.resize(if zeroed { size - skip } else { now.len() }, 0);
                    parts.entry(lba).or_default().push((skip, part.into()));
                    continue;
                };
                block.insert(there[..].into());
            }
            let block = blocks
                .entry(lba)
                .or_insert_with(|| vec![0; size].into_boxed_slice());
            block[skip..end].copy_from_slice(now);
            if zeroed {
                block[end..].fill(0);
            }
        }
    }
    let failed = failed.filter(|_| !parts.is_empty());
    (found, failed)
}

/// Writes blocks, each several times if necessary. A flush has to follow.
///
/// # Errors
/// Returns the first error. The others are written nevertheless, unless a write may still land.
pub(super) fn write_blocks(io: &mut MdIo, blocks: &Blocks) -> Result<(), Error> {
    let mut result = Ok(());
    let all: Vec<(&u64, &Box<[u8]>)> = blocks.iter().collect();
    for run in all.chunk_by(|a, b| a.0 + 1 == *b.0) {
        let bytes: Vec<u8> = run
            .iter()
            .flat_map(|(_, block)| block.iter())
            .copied()
            .collect();
        let written = repeat(|| {
            let writes = io.can().writes(*run[0].0, &bytes)?;
            io.run(writes)
        });
        if written.as_ref().is_err_and(may_land) {
            return written;
        }
        result = result.and(written);
    }
    result
}

/// Writes pages in their places and makes them durable, each several times if necessary, together
/// with what was written since `failed` was the number of flushes that had failed. Returns the pages
/// that cannot be written.
///
/// # Errors
/// Fails when a flush does, and when a write may still land.
pub(super) fn put_pages<'a>(
    io: &mut MdIo,
    geo: &Geometry,
    pages: impl IntoIterator<Item = (u32, &'a Page)>,
    failed: u64,
) -> Result<Vec<(u32, Error)>, Error> {
    let mut again = Vec::new();
    let write = |index: u32, data: DmaSlice| Op::Write {
        lba: geo.md_lba(index),
        data,
        fua: false,
    };
    let pages: Vec<(u32, &Page)> = pages.into_iter().collect();
    let ops = pages
        .iter()
        .map(|(index, page)| Ok(write(*index, dma(&page[..])?)));
    io.stream(ops, |op, result| match result.map_err(Error::from) {
        Err(error) if may_land(&error) => Err(error),
        Err(_) => {
            again.push(op.lba());
            Ok(())
        }
        Ok(()) => Ok(()),
    })?;
    io.flush_since(failed)?;
    let mut lost = Vec::new();
    for (index, page) in pages {
        if !again.contains(&geo.md_lba(index)) {
            continue;
        }
        let data = dma(&page[..])?;
        match repeat(|| io.run_durable(vec![write(index, data.clone())])) {
            Err(error) if may_land(&error) => return Err(error),
            Err(error) => lost.push((index, error)),
            Ok(()) => {}
        }
    }
    Ok(lost)
}

/// Puts pages, and what blobs are owed, in their places, and makes them durable. Returns what cannot be.
///
/// # Errors
/// Fails when a flush does, when a write may still land, and for other reasons than the device's.
pub(super) fn put_all<'a>(
    io: &mut MdIo,
    geo: &Geometry,
    pages: impl IntoIterator<Item = (u32, &'a Page)>,
    debts: &Debts,
) -> Result<Left, Error> {
    let failed = io.failed_flushes();
    let mut left = Left::default();
    for (blob, debt) in debts {
        let (found, unreadable) = blocks_of(io, debt.iter().flat_map(|(_, patches)| patches));
        match write_blocks(io, &found.blocks).err().or(unreadable) {
            None => {}
            Some(error) if stays(&error) => left.blobs.push((*blob, error)),
            Some(error) => return Err(error),
        }
    }
    left.pages = put_pages(io, geo, pages, failed)?;
    Ok(left)
}
