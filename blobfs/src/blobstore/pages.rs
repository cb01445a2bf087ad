//! Reads of many metadata pages at a time.

use std::ops::Range;
use std::time::Duration;

use pumice_bdev::{DmaBuf, Op};

use super::error::Error;
use super::format::{PAGE_SIZE, Page};
use super::geometry::Geometry;
use super::mdio::MdIo;

/// Most pages of one read.
const READ_PAGES: u32 = 256;
/// Most unneeded pages that are read along instead of beginning another read.
const GAP_PAGES: u32 = 16;

/// Number of attempts to read a page, and the first pause between them.
const READ_TRIES: u32 = 4;
const READ_PAUSE: Duration = Duration::from_millis(1);

/// Divides the whole region into reads.
pub(crate) fn all_ranges(geo: &Geometry) -> impl Iterator<Item = Range<u32>> + use<> {
    let end = geo.md_len;
    let starts = (0..end).step_by(READ_PAGES as usize);
    starts.map(move |start| start..end.min(start.saturating_add(READ_PAGES)))
}

/// Groups sorted indices into reads.
pub(crate) fn ranges(indices: impl Iterator<Item = u32>) -> impl Iterator<Item = Range<u32>> {
    let mut indices = indices.peekable();
    std::iter::from_fn(move || {
        let start = indices.next()?;
        let mut end = start + 1;
        while let Some(next) =
            indices.next_if(|next| next - end <= GAP_PAGES && next - start < READ_PAGES)
        {
            end = next + 1;
        }
        Some(start..end)
    })
}

/// Reads ranges of metadata pages, many at a time, and passes on each page with its index. A page
/// that cannot be read comes with the error's text.
pub(crate) fn read_pages(
    io: &mut MdIo,
    geo: &Geometry,
    ranges: &mut dyn Iterator<Item = Range<u32>>,
    mut page: impl FnMut(u32, Result<&Page, String>),
) -> Result<(), Error> {
    let replayed = io.replayed();
    read_in_place(io, geo, ranges, |index, read| match replayed.get(&index) {
        Some(newer) => page(index, Ok(newer)),
        None => page(index, read),
    })
}

/// Reads pages as they are on the device.
fn read_in_place(
    io: &mut MdIo,
    geo: &Geometry,
    ranges: &mut dyn Iterator<Item = Range<u32>>,
    mut page: impl FnMut(u32, Result<&Page, String>),
) -> Result<(), Error> {
    let read = |range: Range<u32>| {
        let buf = DmaBuf::new(range.len() * PAGE_SIZE)?;
        Ok(Op::Read {
            lba: geo.md_lba(range.start),
            buf,
        })
    };
    let index_of = |lba: u64| {
        let index = (lba - geo.md_lba(0)) / (geo.md_lba(1) - geo.md_lba(0));
        u32::try_from(index).expect("an index that was given out as u32")
    };
    let mut singly: Vec<Range<u32>> = Vec::new();
    let per_read = u32::try_from(io.can().max_io_blocks() * geo.block_size / PAGE_SIZE as u64)
        .unwrap_or(u32::MAX)
        .max(1);
    let mut pieces = ranges.flat_map(|range| {
        let end = range.end;
        range
            .step_by(per_read as usize)
            .map(move |start| start..end.min(start.saturating_add(per_read)))
    });
    io.stream(pieces.by_ref().map(read), |op, result| {
        let Op::Read { lba, buf } = op else {
            unreachable!("only reads were submitted")
        };
        let first = index_of(lba);
        match result {
            Ok(()) => {
                for (bytes, index) in buf.chunks_exact(PAGE_SIZE).zip(first..) {
                    page(index, Ok(bytes.try_into().expect("a whole page")));
                }
            }
            Err(error) => {
                tracing::warn!(%error, "reading metadata failed; trying page by page");
                let count = u32::try_from(buf.len() / PAGE_SIZE).expect("at most READ_PAGES");
                singly.extend((first..first + count).map(|index| index..index + 1));
            }
        }
        Ok(())
    })?;
    // A read error may be transient: nothing is decided from it before another attempt.
    for attempt in 1..=READ_TRIES {
        let mut failed = Vec::new();
        let last = attempt == READ_TRIES;
        io.stream(
            std::mem::take(&mut singly).into_iter().map(read),
            |op, result| {
                let Op::Read { lba, buf } = op else {
                    unreachable!("only reads were submitted")
                };
                let index = index_of(lba);
                match result {
                    Ok(()) => page(index, Ok(buf[..].try_into().expect("a whole page"))),
                    Err(error) if last => page(index, Err(error.to_string())),
                    Err(_) => failed.push(index..index + 1),
                }
                Ok(())
            },
        )?;
        if failed.is_empty() {
            break;
        }
        std::thread::sleep(READ_PAUSE * 4u32.pow(attempt - 1));
        singly = failed;
    }
    Ok(())
}
