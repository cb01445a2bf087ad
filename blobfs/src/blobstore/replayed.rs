//! Blocks that a journal has and that may not be in place, as reads find them.

use std::collections::BTreeMap;

use pumice_bdev::{Completion, Op};

/// Blocks of the device and their new contents.
pub(crate) type Blocks = BTreeMap<u64, Box<[u8]>>;

/// Blocks of which a part has new content: each with its parts in order, by the byte of the block where they begin.
pub(crate) type Parts = BTreeMap<u64, Vec<(usize, Box<[u8]>)>>;

/// Blocks that a journal has.
#[derive(Debug, Default)]
pub(crate) struct Unplaced {
    pub blocks: Blocks,
    /// Those of which the rest cannot be read.
    pub parts: Parts,
}

impl Unplaced {
    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len() + self.parts.len()
    }
}

/// Blocks with their contents, and parts of others. A write of one of them that succeeds gives it the new content, so that a
/// read that was sent before finds that, whichever of the two the device has done first.
#[derive(Debug)]
pub(super) struct Replayed {
    /// Bytes of a block.
    unit: usize,
    blocks: Blocks,
    parts: Parts,
}

impl Replayed {
    pub fn new(unit: usize, Unplaced { blocks, parts }: Unplaced) -> Replayed {
        Replayed {
            unit,
            blocks,
            parts,
        }
    }

    /// Puts blocks into a buffer that was read from `first` on.
    fn put(&self, first: u64, buf: &mut [u8]) {
        let behind = first + (buf.len() / self.unit) as u64;
        for (at, block) in self.blocks.range(first..behind) {
            place(self.unit, at - first, 0, block, buf);
        }
        for (at, parts) in self.parts.range(first..behind) {
            for (skip, bytes) in parts {
                place(self.unit, at - first, *skip, bytes, buf);
            }
        }
    }

    /// Takes blocks from what was written from `first` on.
    fn take(&mut self, first: u64, data: &[u8]) {
        for (lba, new) in (first..).zip(data.chunks_exact(self.unit)) {
            if self.parts.remove(&lba).is_some() || self.blocks.contains_key(&lba) {
                self.blocks.insert(lba, new.into());
            }
        }
    }
}

/// Puts bytes into a buffer, in the block of this number, from its byte `skip` on.
fn place(unit: usize, number: u64, skip: usize, bytes: &[u8], buf: &mut [u8]) {
    let start = usize::try_from(number).expect("within the buffer") * unit + skip;
    buf[start..start + bytes.len()].copy_from_slice(bytes);
}

/// Puts these blocks into what was read of them, and what was written to them into these.
#[cold]
pub(super) fn show(replayed: &mut Replayed, ended: &mut [Completion]) {
    let unit = replayed.unit;
    for completion in ended.iter_mut().filter(|ended| ended.result.is_ok()) {
        match &mut completion.op {
            Op::Read { lba, buf } => replayed.put(*lba, buf),
            Op::ReadV { lba, bufs } => {
                let mut at = *lba;
                for buf in bufs {
                    replayed.put(at, buf);
                    at += (buf.len() / unit) as u64;
                }
            }
            Op::Write { lba, data, .. } => replayed.take(*lba, data),
            Op::WriteV { lba, data, .. } => {
                let mut at = *lba;
                for data in data {
                    replayed.take(at, data);
                    at += (data.len() / unit) as u64;
                }
            }
            Op::WriteZeroes {
                lba, len_blocks, ..
            }
            | Op::Unmap { lba, len_blocks } => {
                let range = *lba..*lba + *len_blocks;
                let known: Vec<u64> = replayed.parts.range(range.clone()).map(|p| *p.0).collect();
                for lba in known {
                    replayed.parts.remove(&lba);
                    replayed.blocks.insert(lba, vec![0; unit].into());
                }
                let zeroed = replayed.blocks.range_mut(range);
                zeroed.for_each(|(_, block)| block.fill(0));
            }
            // Nobody reads what is being copied to.
            Op::Copy {
                dst_lba,
                len_blocks,
                ..
            } => {
                let copied = *dst_lba..*dst_lba + *len_blocks;
                replayed.blocks.retain(|lba, _| !copied.contains(lba));
                replayed.parts.retain(|lba, _| !copied.contains(lba));
            }
            _ => {}
        }
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
        let blocks = (10..16).map(|lba| (lba, block(1))).collect();
        // Of one block only a part is known.
        let parts = Parts::from([(16, vec![(1000, block(5)[..500].into())])]);
        let mut replayed = Replayed::new(4096, Unplaced { blocks, parts });
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
                buf: DmaBuf::zeroed(8 * 4096).unwrap(),
            },
        ]
        .map(ended);
        show(&mut replayed, &mut all);
        let Op::Read { buf, .. } = &all[3].op else {
            panic!("another operation");
        };
        let found: Vec<u8> = buf.chunks(4096).map(|block| block[4095]).collect();
        assert_eq!(found, [0, 2, 3, 4, 0, 1, 1, 0]);
        let part = &buf[7 * 4096..];
        let known = part.iter().enumerate().filter(|(_, byte)| **byte == 5);
        assert!(known.map(|(at, _)| at).eq(1000..1500));
        let mut written = [Op::Write {
            lba: 16,
            data: data(6, 1),
            fua: false,
        }]
        .map(ended);
        show(&mut replayed, &mut written);
        let mut read = [Op::Read {
            lba: 16,
            buf: DmaBuf::zeroed(4096).unwrap(),
        }]
        .map(ended);
        show(&mut replayed, &mut read);
        let Op::Read { buf, .. } = &read[0].op else {
            panic!("another operation");
        };
        assert!(buf.iter().all(|byte| *byte == 6));
    }
}
