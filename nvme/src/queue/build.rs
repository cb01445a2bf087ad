//! Validation of an I/O, and its division into commands.

use pumice_io::{Limits, Op};
use zerocopy::transmute;

use super::data::{ListArea, NotMapped, PointerStyle, Segment, point_at_many};
use crate::dma::AddressTable;
use crate::error::InvalidIo;
use crate::namespace::CommandLimits;
use crate::spec::{BlocksIo, Command, DsmRange, IoFlags, IoOpcode, SourceRange};

/// The rest of an I/O that takes more than one plain command.
#[derive(Debug)]
pub(crate) enum Work {
    /// Consecutive blocks.
    Blocks {
        op: IoOpcode,
        flags: IoFlags,
        lba: u64,
        left: u64,
        /// Limits at which commands are cut.
        cut: Limits,
        /// Byte of the data that comes next; `None` for a command without data.
        pos: Option<usize>,
    },
    /// Blocks to deallocate.
    Deallocate { lba: u64, left: u64 },
    /// Blocks to copy.
    Copy { from: u64, to: u64, left: u64 },
}

/// Checks that `blocks`, at least one, lie in the namespace from `lba` on.
#[inline]
pub(super) fn check_range(limits: &CommandLimits, lba: u64, blocks: u64) -> Result<(), InvalidIo> {
    if blocks == 0 {
        return Err(InvalidIo::Empty);
    }
    match lba.checked_add(blocks) {
        Some(end) if end <= limits.num_blocks => Ok(()),
        _ => Err(InvalidIo::OutOfRange {
            lba,
            blocks,
            num_blocks: limits.num_blocks,
        }),
    }
}

/// Checks that a buffer holds whole blocks and starts at a multiple of four bytes. Returns its
/// blocks.
#[inline]
pub(super) fn check_segment(limits: &CommandLimits, s: &Segment) -> Result<u64, InvalidIo> {
    let mask = (1usize << limits.block_shift) - 1;
    if s.len & mask != 0 {
        return Err(InvalidIo::Length {
            len: s.len,
            block_size: 1 << limits.block_shift,
        });
    }
    if s.offset & 3 != 0 {
        return Err(InvalidIo::NotAligned);
    }
    Ok((s.len >> limits.block_shift) as u64)
}

fn check_all(
    limits: &CommandLimits,
    segments: impl Iterator<Item = Segment>,
) -> Result<u64, InvalidIo> {
    let mut blocks = 0;
    for s in segments {
        blocks += check_segment(limits, &s)?;
    }
    Ok(blocks)
}

/// Checks an I/O against its namespace and returns the work to do. A flush needs none: it is one
/// plain command.
pub(super) fn plan(limits: &CommandLimits, io: &Op) -> Result<Option<Work>, InvalidIo> {
    if !limits.usable {
        return Err(InvalidIo::Format(limits.nsid));
    }
    let need = |have: bool, what| {
        if have {
            Ok(())
        } else {
            Err(InvalidIo::Unsupported(what))
        }
    };
    let blocks = |op, lba, left, cut, pos, flags| {
        check_range(limits, lba, left)?;
        Ok(Some(Work::Blocks {
            op,
            flags,
            lba,
            left,
            cut,
            pos,
        }))
    };
    match io {
        Op::Read { lba, buf } => {
            let n = check_segment(limits, &buf.into())?;
            blocks(IoOpcode::READ, *lba, n, limits.data, Some(0), IoFlags::NONE)
        }
        Op::ReadV { lba, bufs } => {
            let n = check_all(limits, bufs.iter().map(Segment::from))?;
            blocks(IoOpcode::READ, *lba, n, limits.data, Some(0), IoFlags::NONE)
        }
        Op::Write { lba, data, fua } => {
            let n = check_segment(limits, &data.into())?;
            blocks(
                IoOpcode::WRITE,
                *lba,
                n,
                limits.data,
                Some(0),
                IoFlags::fua(*fua),
            )
        }
        Op::WriteV { lba, data, fua } => {
            let n = check_all(limits, data.iter().map(Segment::from))?;
            blocks(
                IoOpcode::WRITE,
                *lba,
                n,
                limits.data,
                Some(0),
                IoFlags::fua(*fua),
            )
        }
        Op::Compare { lba, data } => {
            need(limits.supports.compare, "compare")?;
            let n = check_segment(limits, &data.into())?;
            blocks(
                IoOpcode::COMPARE,
                *lba,
                n,
                limits.data,
                Some(0),
                IoFlags::NONE,
            )
        }
        Op::WriteZeroes {
            lba,
            len_blocks,
            fua,
        } => {
            need(limits.supports.write_zeroes, "write zeroes")?;
            let mut flags = IoFlags::fua(*fua);
            if limits.zeroes_may_deallocate {
                flags = flags.with(IoFlags::DEALLOCATE);
            }
            let cut = Limits::new(limits.zeroes_blocks, 0);
            blocks(IoOpcode::WRITE_ZEROES, *lba, *len_blocks, cut, None, flags)
        }
        Op::Verify { lba, len_blocks } => {
            need(limits.supports.verify, "verify")?;
            let cut = Limits::new(limits.verify_blocks, 0);
            blocks(
                IoOpcode::VERIFY,
                *lba,
                *len_blocks,
                cut,
                None,
                IoFlags::NONE,
            )
        }
        Op::Unmap { lba, len_blocks } => {
            need(limits.supports.deallocate, "deallocate")?;
            check_range(limits, *lba, *len_blocks)?;
            Ok(Some(Work::Deallocate {
                lba: *lba,
                left: *len_blocks,
            }))
        }
        Op::Copy {
            src_lba,
            dst_lba,
            len_blocks,
        } => {
            need(limits.supports.copy, "copy")?;
            check_range(limits, *src_lba, *len_blocks)?;
            check_range(limits, *dst_lba, *len_blocks)?;
            Ok(Some(Work::Copy {
                from: *src_lba,
                to: *dst_lba,
                left: *len_blocks,
            }))
        }
        Op::CompareAndWrite(_) => Err(InvalidIo::Unsupported("fused operations")),
        Op::Zone { .. } => Err(InvalidIo::Unsupported("zones")),
        // The queue pair performs an abort and the controller a reset.
        Op::Abort { .. } | Op::Reset => Err(InvalidIo::Unsupported("a command for it")),
        Op::Flush => Ok(None),
    }
}

/// Returns the command and the data of a read or write of one buffer that fits one command as it
/// is.
#[inline]
pub(super) fn plain(limits: &CommandLimits, io: &Op) -> Option<(BlocksIo, Segment)> {
    let (op, lba, segment, flags) = match io {
        Op::Read { lba, buf } => (IoOpcode::READ, *lba, Segment::from(buf), IoFlags::NONE),
        Op::Write { lba, data, fua } => (
            IoOpcode::WRITE,
            *lba,
            Segment::from(data),
            IoFlags::fua(*fua),
        ),
        _ => return None,
    };
    let blocks = segment.len >> limits.block_shift;
    let whole = blocks << limits.block_shift == segment.len && segment.offset & 3 == 0;
    let blocks = blocks as u64;
    let end = lba.checked_add(blocks)?;
    let one_command = limits.data.first(lba, blocks) == blocks;
    if !whole || blocks == 0 || !one_command || end > limits.num_blocks || !limits.usable {
        return None;
    }
    let entry = BlocksIo {
        op,
        nsid: limits.nsid,
        lba,
        blocks: u32::try_from(blocks).ok()?,
        flags,
    };
    Some((entry, segment))
}

impl Work {
    /// Whether every command has been made.
    pub fn is_over(&self) -> bool {
        match self {
            Work::Blocks { left, .. } | Work::Deallocate { left, .. } | Work::Copy { left, .. } => {
                *left == 0
            }
        }
    }

    /// Makes the next command. Its data pointer or range list goes into the slot's list area.
    pub fn next_command(
        &mut self,
        limits: &CommandLimits,
        io: &Op,
        table: &AddressTable,
        style: PointerStyle,
        area: &ListArea<'_>,
    ) -> Result<Command, NotMapped> {
        match self {
            Work::Blocks {
                op,
                flags,
                lba,
                left,
                cut,
                pos,
            } => {
                let mut n = cut.first(*lba, *left);
                let mut command = Command::new(op.0, limits.nsid);
                if let Some(at) = pos {
                    let want = usize::try_from(n).map_err(|_| NotMapped)? << limits.block_shift;
                    let covered = point(&mut command, io, table, *at, want, style, area)?;
                    let whole = covered >> limits.block_shift << limits.block_shift;
                    if whole == 0 {
                        return Err(NotMapped);
                    }
                    n = (whole >> limits.block_shift) as u64;
                    *at += whole;
                    if whole < covered {
                        // The pointer must describe exactly what the command transfers.
                        point(&mut command, io, table, *at - whole, whole, style, area)?;
                    }
                }
                command.set_lba(*lba);
                let blocks_z = u32::try_from(n - 1).map_err(|_| NotMapped)?;
                command.cdw12 = blocks_z | flags.0;
                *lba += n;
                *left -= n;
                Ok(command)
            }
            Work::Deallocate { lba, left } => {
                let room = (area.words.len() / 2)
                    .min(limits.deallocate_ranges as usize)
                    .clamp(1, 256);
                let mut total = 0u64;
                let mut count = 0u32;
                while (count as usize) < room && *left > 0 {
                    let n = (*left)
                        .min(u64::from(limits.deallocate_blocks))
                        .min(limits.deallocate_total_blocks.saturating_sub(total));
                    if n == 0 {
                        break;
                    }
                    let range = DsmRange {
                        attributes: 0,
                        len_blocks: u32::try_from(n).map_err(|_| NotMapped)?,
                        lba: *lba,
                    };
                    area.put_descriptor::<2>(count as usize, transmute!(range));
                    count += 1;
                    total += n;
                    *lba += n;
                    *left -= n;
                }
                let mut command = Command::deallocate(limits.nsid, count.max(1));
                command.prp1 = area.address;
                Ok(command)
            }
            Work::Copy { from, to, left } => {
                let room = (area.words.len() / 4)
                    .min(limits.copy_ranges as usize)
                    .clamp(1, 256);
                let start = *to;
                let mut total = 0u64;
                let mut count = 0u32;
                while (count as usize) < room && *left > 0 {
                    let n = (*left)
                        .min(u64::from(limits.copy_range_blocks))
                        .min(u64::from(limits.copy_blocks).saturating_sub(total))
                        .min(65_536);
                    if n == 0 {
                        break;
                    }
                    let range = SourceRange {
                        lba: *from,
                        blocks_z: u16::try_from(n - 1).map_err(|_| NotMapped)?,
                        ..SourceRange::default()
                    };
                    area.put_descriptor::<4>(count as usize, transmute!(range));
                    count += 1;
                    total += n;
                    *from += n;
                    *left -= n;
                }
                *to += total;
                let mut command = Command::copy(limits.nsid, start, count.max(1), IoFlags::NONE);
                command.prp1 = area.address;
                Ok(command)
            }
        }
    }
}

fn point(
    command: &mut Command,
    io: &Op,
    table: &AddressTable,
    skip: usize,
    want: usize,
    style: PointerStyle,
    area: &ListArea<'_>,
) -> Result<usize, NotMapped> {
    let one = |s: Segment| std::iter::once(s);
    match io {
        Op::Read { buf, .. } => {
            point_at_many(command, table, one(buf.into()), skip, want, style, area)
        }
        Op::Write { data, .. } | Op::Compare { data, .. } => {
            point_at_many(command, table, one(data.into()), skip, want, style, area)
        }
        Op::ReadV { bufs, .. } => {
            let segments = bufs.iter().map(Segment::from);
            point_at_many(command, table, segments, skip, want, style, area)
        }
        Op::WriteV { data, .. } => {
            let segments = data.iter().map(Segment::from);
            point_at_many(command, table, segments, skip, want, style, area)
        }
        _ => Err(NotMapped),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::namespace::Supports;

    pub(in crate::queue) fn limits() -> CommandLimits {
        CommandLimits {
            nsid: 1,
            block_shift: 9,
            num_blocks: 1 << 30,
            data: Limits::new(256, 0),
            zeroes_blocks: 256,
            verify_blocks: 256,
            deallocate_blocks: 100,
            deallocate_total_blocks: 250,
            deallocate_ranges: 4,
            copy_ranges: 4,
            copy_range_blocks: 100,
            copy_blocks: 250,
            zeroes_may_deallocate: false,
            supports: Supports::default(),
            usable: true,
        }
    }

    /// Returns the commands of `work`, each with the words of its list area.
    fn commands(limits: &CommandLimits, mut work: Work) -> Vec<(Command, Vec<u64>)> {
        let words: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
        let area = ListArea {
            words: &words,
            address: 0xabc000,
        };
        let style = PointerStyle {
            page_len: 4096,
            sgl: false,
        };
        let table = AddressTable::new();
        let mut all = Vec::new();
        while !work.is_over() {
            let made = work.next_command(limits, &Op::Flush, &table, style, &area);
            let list = words
                .iter()
                .map(|word| u64::from_le(word.load(Ordering::Relaxed)));
            all.push((made.expect("no data"), list.collect()));
        }
        all
    }

    /// Every block is discarded once, by commands that keep to all three limits.
    #[test]
    fn discards_keep_to_their_limits() {
        for (ranges, sums) in [(4, vec![250, 250, 250, 250]), (2, vec![200; 5])] {
            let mut limits = limits();
            limits.deallocate_ranges = ranges;
            let work = Work::Deallocate {
                lba: 10,
                left: 1000,
            };
            let (mut next, mut totals) = (10, Vec::new());
            for (command, list) in commands(&limits, work) {
                let count = (command.cdw10 & 0xff) as usize + 1;
                assert!(count <= ranges as usize);
                totals.push(0);
                for range in list.chunks(2).take(count) {
                    let len = range[0] >> 32;
                    assert!(range[1] == next && len <= 100);
                    next += len;
                    *totals.last_mut().expect("one") += len;
                }
            }
            assert_eq!((next, totals), (1010, sums));
        }
    }

    /// The same for copies, each to its own place.
    #[test]
    fn copies_keep_to_their_limits() {
        let mut limits = limits();
        let copy = |left| Work::Copy {
            from: 10,
            to: 5000,
            left,
        };
        let (mut from, mut to) = (10, 5000);
        for (command, list) in commands(&limits, copy(1000)) {
            assert_eq!(command.lba(), to);
            let count = (command.cdw12 & 0xff) as usize + 1;
            let mut total = 0;
            for range in list.chunks(4).take(count) {
                let len = range[2] + 1;
                assert!(range[1] == from && len <= 100);
                from += len;
                total += len;
            }
            assert!(count <= 4 && total <= 250);
            to += total;
        }
        assert_eq!((from, to), (1010, 6000));
        // A range counts its blocks in 16 bits.
        (limits.copy_range_blocks, limits.copy_blocks) = (u32::MAX, u32::MAX);
        let (_, list) = commands(&limits, copy(70_000)).remove(0);
        assert_eq!((list[2], list[6]), (65_535, 70_000 - 65_536 - 1));
    }
}
