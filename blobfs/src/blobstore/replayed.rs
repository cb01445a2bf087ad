//! Blocks that a journal has and that may not be in place, as reads find them.

use std::collections::BTreeMap;

use pumice_bdev::{Completion, Op};

/// Blocks with their contents. A write of one of them that succeeds gives it the new content, so that a read that was
/// sent before finds that, whichever of the two the device has done first.
pub(super) type Replayed = BTreeMap<u64, Box<[u8]>>;

/// Puts these blocks into what was read of them, and what was written to them into these.
#[cold]
pub(super) fn show(replayed: &mut Replayed, ended: &mut [Completion]) {
    let unit = replayed.values().next().map_or(1, |block| block.len());
    for completion in ended.iter_mut().filter(|ended| ended.result.is_ok()) {
        match &mut completion.op {
            Op::Read { lba, buf } => put(replayed, *lba, buf),
            Op::ReadV { lba, bufs } => {
                let mut at = *lba;
                for buf in bufs {
                    put(replayed, at, buf);
                    at += (buf.len() / unit) as u64;
                }
            }
            Op::Write { lba, data, .. } => take(replayed, *lba, data),
            Op::WriteV { lba, data, .. } => {
                let mut at = *lba;
                for data in data {
                    take(replayed, at, data);
                    at += (data.len() / unit) as u64;
                }
            }
            Op::WriteZeroes {
                lba, len_blocks, ..
            }
            | Op::Unmap { lba, len_blocks } => {
                let zeroed = replayed.range_mut(*lba..*lba + *len_blocks);
                zeroed.for_each(|(_, block)| block.fill(0));
            }
            // Nobody reads what is being copied to.
            Op::Copy {
                dst_lba,
                len_blocks,
                ..
            } => {
                let copied = *dst_lba..*dst_lba + *len_blocks;
                replayed.retain(|lba, _| !copied.contains(lba));
            }
            _ => {}
        }
    }
}

/// Puts blocks into a buffer that was read from `first` on.
fn put(replayed: &Replayed, first: u64, buf: &mut [u8]) {
    let mut rest = buf;
    let mut lba = first;
    while let Some((at, block)) = replayed.range(lba..).next() {
        let Some(skip) = usize::try_from(at - lba)
            .ok()
            .and_then(|blocks| blocks.checked_mul(block.len()))
            .filter(|skip| *skip < rest.len())
        else {
            return;
        };
        let (here, behind) = rest[skip..].split_at_mut(block.len());
        here.copy_from_slice(block);
        (rest, lba) = (behind, at + 1);
    }
}

/// Takes blocks from what was written from `first` on.
fn take(replayed: &mut Replayed, first: u64, data: &[u8]) {
    for (at, block) in replayed.range_mut(first..) {
        let unit = block.len();
        let skip = usize::try_from(at - first).unwrap_or(usize::MAX);
        let Some(new) = skip
            .checked_mul(unit)
            .and_then(|from| data.get(from..from.checked_add(unit)?))
        else {
            return;
        };
        block.copy_from_slice(new);
    }
}

#[cfg(test)]
mod tests {
    use pumice_bdev::DmaBuf;

    use super::*;

    /// A block of the journal that is written has its new content, also for a read that the device has done before.
    #[test]
    fn a_block_of_the_journal_has_what_was_written_last() {
        let block = |byte: u8| vec![byte; 4096].into_boxed_slice();
        let mut replayed: Replayed = (10..16).map(|lba| (lba, block(1))).collect();
        let data = |byte: u8, blocks: usize| {
            let mut buf = DmaBuf::zeroed(blocks * 4096).unwrap();
            buf.fill(byte);
            buf.freeze()
        };
        let ended = |op: Op| Completion {
            tag: 0,
            op,
            result: Ok(()),
        };
        let mut all = [
            Op::Write {
                lba: 9,
                data: data(2, 2),
                fua: false,
            },
            Op::WriteV {
                lba: 11,
                data: vec![data(3, 1), data(4, 1)],
                fua: false,
            },
            Op::WriteZeroes {
                lba: 13,
                len_blocks: 1,
                fua: false,
            },
            Op::Read {
                lba: 9,
                buf: DmaBuf::zeroed(7 * 4096).unwrap(),
            },
        ]
        .map(ended);
        show(&mut replayed, &mut all);
        let Op::Read { buf, .. } = &all[3].op else {
            panic!("another operation");
        };
        let found: Vec<u8> = buf.chunks(4096).map(|block| block[4095]).collect();
        assert_eq!(found, [0, 2, 3, 4, 0, 1, 1]);
    }
}
