//! Writes pages in place, in an order in which a crash between any two writes leaves the old or the
//! new state.
//!
//! What nothing names yet is written first, all together. Then come the commit points, one by one,
//! each durable before the next. Then what nothing names any longer is cleared. Batches in flight
//! together share nothing except flushes.
//!
//! When the write of a commit point has failed, its page is the old one or the new one, or it is
//! torn. It is read back. If the new one is there and durable, the change was made after all.
//! Otherwise the old pages are restored in the opposite order, so that a power cut in the middle
//! leaves a state that a cut of the change itself could have left. The outcome is open only if that
//! fails too.

use std::sync::Arc;

use pumice_bdev::{DmaBuf, DmaSlice, Op};

use super::super::error::Error;
use super::super::format::{PAGE_SIZE, Page, PageHeader, page_crc, stored_crc};
use super::super::geometry::Geometry;
use super::super::mdio::{MdChannels, MdIo, Persist, dma};
use super::super::retry::{may_land, repeat};
use super::super::super_page;
use super::{Batch, Cleared, Commit, CommitPoint, Failure, Old, Restore};

/// See the module.
#[derive(Debug)]
pub(crate) struct InPlace {
    channels: Arc<MdChannels>,
}

impl InPlace {
    pub fn new(channels: Arc<MdChannels>) -> InPlace {
        InPlace { channels }
    }
}

impl Commit for InPlace {
    fn append(&self, batch: Batch) -> Result<Cleared, Failure> {
        let io = &mut *self.channels.get()?;
        let Batch {
            geo,
            unmark,
            prepare,
            fresh,
            super_block,
            carried,
            points,
            erase,
            clear,
            given_up: _,
            names_log: _,
        } = batch;
        if !carried.is_empty() {
            return Err(Error::invalid("only a journal carries bytes").into());
        }
        // All memory is taken before the first write: a change must not end half-way for want of it.
        let mut before = prepare;
        if let Some(page) = unmark {
            before.push(write(0, dma(&page[..])?));
        }
        for (index, page) in fresh {
            before.push(write(geo.md_lba(index), dma(&page[..])?));
        }
        let points = points
            .into_iter()
            .map(Prepared::new)
            .collect::<Result<Vec<_>, Error>>()?;
        let mut spare = DmaBuf::new(PAGE_SIZE).map_err(Error::from)?;
        let mut after = Vec::new();
        if !erase.is_empty() {
            let zeroes = dma(&[0; PAGE_SIZE])?;
            after.extend(
                erase
                    .into_iter()
                    .map(|index| write(geo.md_lba(index), zeroes.clone())),
            );
        }
        after.extend(clear);

        // What nothing names yet, together with the mark of a store that is not clean.
        io.run_durable(before)?;
        if let Some(super_block) = super_block {
            super_page::write(io, &geo, &super_block)?;
        }
        let mut done = Vec::with_capacity(points.len());
        for point in points {
            let written = write_page(io, &geo, point.index, &point.page);
            done.push(point);
            if let Err(error) = written {
                (spare, done) = settle(io, &geo, spare, done, error)?;
            }
        }
        Ok(clear_all(io, after))
    }

    fn restore(&self, geo: &Geometry, restore: &mut Restore) -> Result<(), Error> {
        let io = &mut *self.channels.get()?;
        match restore {
            Restore::Pages(pages) => restore_pages(io, geo, pages),
            Restore::SuperBlock(old) => super_page::restore(io, geo, old),
            // There is no journal.
            Restore::Ring => Ok(()),
        }
    }

    fn settle(&self) -> Result<(), Error> {
        Ok(())
    }

    fn put_pages(&self) -> Result<(), Error> {
        Ok(())
    }

    fn end(&self) {}

    fn is_halted(&self) -> bool {
        false
    }
}

/// Clears what nothing names any longer. An error does harm only if the operation may still land.
pub(in super::super) fn clear_all(io: &mut MdIo, ops: Vec<Op>) -> Cleared {
    let mut cleared = Cleared::Ended;
    for op in ops {
        if let Err(error) = io.run([op]) {
            tracing::warn!(%error, "what is no longer used could not be cleared");
            if may_land(&error) {
                cleared = Cleared::MayLand;
            }
        }
    }
    cleared
}

/// A commit point with all the memory that it takes to write it and to take it back.
struct Prepared {
    index: u32,
    page: DmaSlice,
    old: Old,
    restore: DmaBuf,
}

impl Prepared {
    fn new(point: CommitPoint) -> Result<Prepared, Error> {
        Ok(Prepared {
            index: point.index,
            page: dma(&point.page[..])?,
            old: point.old,
            restore: DmaBuf::new(PAGE_SIZE)?,
        })
    }
}

/// After the write of the last of these commit points has failed: gives them back, with the memory
/// to read a page, if the page is there. Else takes all of them back.
fn settle(
    io: &mut MdIo,
    geo: &Geometry,
    spare: DmaBuf,
    mut points: Vec<Prepared>,
    error: Error,
) -> Result<(DmaBuf, Vec<Prepared>), Failure> {
    if may_land(&error) {
        // Whatever is read or written now, the device may still write the new page over it.
        return Err(Failure::Open {
            error,
            restore: None,
        });
    }
    let last = points.last().expect("one has failed");
    let (found, spare) = read_back(io, geo, spare, last);
    if found == Found::New
        && io.can().persist() == Persist::Completion
        && let Some(spare) = spare
    {
        tracing::warn!(%error, "a metadata write was reported as failed, but the page is there");
        return Ok((spare, points));
    }
    if found == Found::Old {
        points.pop();
    }
    let old = |mut point: Prepared| {
        point.restore.copy_from_slice(&point.old.page()[..]);
        (point.index, point.restore.freeze())
    };
    let mut pages = points.into_iter().rev().map(old).collect();
    match restore_pages(io, geo, &mut pages) {
        Ok(()) => {
            tracing::warn!(%error, "a metadata write failed; the change was taken back");
            Err(Failure::TakenBack(error))
        }
        Err(_) => Err(Failure::Open {
            error,
            restore: Some(Restore::Pages(pages)),
        }),
    }
}

fn restore_pages(
    io: &mut MdIo,
    geo: &Geometry,
    pages: &mut Vec<(u32, DmaSlice)>,
) -> Result<(), Error> {
    while let Some((index, page)) = pages.first() {
        if let Err(error) = write_page(io, geo, *index, page) {
            tracing::error!(%error, page = index, "a metadata page could not be restored");
            return Err(error);
        }
        pages.remove(0);
    }
    Ok(())
}

/// The content of a page that was read back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// The content that was to be written.
    New,
    /// The content before.
    Old,
    /// Neither, or it cannot be read.
    Unknown,
}

/// Reads the page of a commit point whose write has failed. Gives the memory back if the page could
/// be read.
fn read_back(
    io: &mut MdIo,
    geo: &Geometry,
    spare: DmaBuf,
    point: &Prepared,
) -> (Found, Option<DmaBuf>) {
    match io.read_into(geo.md_lba(point.index), spare) {
        Ok(page) => (compare(&page, point), Some(page)),
        Err(_) => (Found::Unknown, None),
    }
}

fn compare(found: &[u8], point: &Prepared) -> Found {
    let Ok(found) = <&Page>::try_from(found) else {
        return Found::Unknown;
    };
    if found[..] == point.page[..] {
        return Found::New;
    }
    let old = point.old.page();
    let is_whole = stored_crc(found) == page_crc(found);
    if *found == *old
        // Another writer of the format may have encoded the same content differently.
        || (is_whole
            && old.iter().any(|byte| *byte != 0)
            && PageHeader::read(found).id == PageHeader::read(&old).id)
    {
        Found::Old
    } else {
        Found::Unknown
    }
}

fn write(lba: u64, data: DmaSlice) -> Op {
    Op::Write {
        lba,
        data,
        fua: false,
    }
}

/// Writes a metadata page durably, several times if necessary. The write can be repeated because
/// the bytes are the same, and it is, also after errors that do not count as passing, before it
/// counts as failed.
fn write_page(io: &mut MdIo, geo: &Geometry, index: u32, page: &DmaSlice) -> Result<(), Error> {
    repeat(|| io.run_durable(vec![write(geo.md_lba(index), page.clone())]))
}
