//! Random I/O checked against bytes in memory.

use pumice_io::dma::{DmaBuf, DmaSlice};
use pumice_nvme::{Namespace, Op};

use super::{Random, Stop};

/// The expected content of the blocks.
pub(super) struct Model {
    pub base: u64,
    pub blocks: u64,
    size: usize,
    bytes: Vec<u8>,
    /// Whether an I/O in flight touches each block.
    busy: Vec<bool>,
}

impl Model {
    pub fn new(ns: &Namespace, base: u64, blocks: u64) -> Model {
        let size = ns.block_size() as usize;
        let count = usize::try_from(blocks).unwrap_or(0);
        Model {
            base,
            blocks,
            size,
            bytes: vec![0; count * size],
            busy: vec![false; count],
        }
    }

    fn index(&self, lba: u64) -> usize {
        usize::try_from(lba - self.base).unwrap_or(0)
    }

    fn slice(&self, lba: u64, blocks: u64) -> std::ops::Range<usize> {
        let at = self.index(lba);
        at * self.size..(at + usize::try_from(blocks).unwrap_or(0)) * self.size
    }

    pub fn bytes(&self, lba: u64, blocks: u64) -> &[u8] {
        &self.bytes[self.slice(lba, blocks)]
    }

    /// Takes a range that nothing in flight touches.
    fn take(&mut self, random: &mut Random, most: u64) -> Option<(u64, u64)> {
        for _ in 0..20 {
            let blocks = 1 + random.below(most.min(self.blocks));
            let lba = self.base + random.below(self.blocks - blocks + 1);
            let at = self.index(lba);
            let end = at + usize::try_from(blocks).ok()?;
            if self.busy[at..end].iter().all(|b| !b) {
                self.busy[at..end].fill(true);
                return Some((lba, blocks));
            }
        }
        None
    }

    pub fn release(&mut self, lba: u64, blocks: u64) {
        let at = self.index(lba);
        let end = at + usize::try_from(blocks).unwrap_or(0);
        self.busy[at..end].fill(false);
    }

    /// Returns a random I/O. Its effect is in the model already.
    pub fn next(
        &mut self,
        ns: &Namespace,
        random: &mut Random,
        most: u64,
    ) -> Result<Option<(Op, u64, u64)>, Stop> {
        let Some((lba, blocks)) = self.take(random, most) else {
            return Ok(None);
        };
        let range = self.slice(lba, blocks);
        let io = match random.below(10) {
            0..=3 => {
                let mut data = DmaBuf::new(range.len())?;
                let mark = random.next();
                for (n, word) in data.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                    *word = (mark ^ n as u64).to_le_bytes();
                }
                self.bytes[range].copy_from_slice(&data);
                Op::Write {
                    lba,
                    data: data.freeze(),
                    fua: random.below(4) == 0,
                }
            }
            4 => {
                let mut data: Vec<DmaSlice> = Vec::new();
                for n in 0..usize::try_from(blocks).unwrap_or(0) {
                    let mut block = DmaBuf::new(self.size)?;
                    let mark = (random.next() & 0xff) as u8;
                    block.fill(mark);
                    let start = range.start + n * self.size;
                    self.bytes[start..start + self.size].fill(mark);
                    data.push(block.freeze());
                }
                Op::WriteV {
                    lba,
                    data,
                    fua: false,
                }
            }
            5 if ns.supports().write_zeroes => {
                self.bytes[range].fill(0);
                Op::WriteZeroes {
                    lba,
                    len_blocks: blocks,
                    fua: false,
                }
            }
            6 if ns.supports().deallocate && ns.deallocated_reads_zero() => {
                // The device may choose whether to deallocate a block, so its content is unknown
                // until it is written again. This reads as written.
                Op::Unmap {
                    lba,
                    len_blocks: blocks,
                }
            }
            7 if ns.supports().compare => {
                let data = DmaBuf::copy_from(&self.bytes[range])?.freeze();
                Op::Compare { lba, data }
            }
            _ => Op::Read {
                lba,
                buf: DmaBuf::new(range.len())?,
            },
        };
        Ok(Some((io, lba, blocks)))
    }

    /// Accepts the content of a block that was deallocated: it may be the old content or that of a
    /// deallocated block, and nothing else.
    pub fn adopt(&mut self, lba: u64, got: &[u8]) -> Result<(), Stop> {
        let size = self.size;
        let range = self.slice(lba, (got.len() / size) as u64);
        for (ours, theirs) in self.bytes[range]
            .chunks_exact_mut(size)
            .zip(got.chunks_exact(size))
        {
            if theirs.iter().all(|b| *b == 0) {
                ours.fill(0);
            } else if ours != theirs {
                return Err(Stop::Failed(format!(
                    "a deallocated block near {lba} shows foreign bytes"
                )));
            }
        }
        Ok(())
    }
}
