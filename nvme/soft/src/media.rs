//! A namespace of a soft controller: blocks on a backend, with a volatile write cache whose content
//! a power cut loses.

use std::collections::BTreeMap;
use std::io;

use super::backend::{Backend, Transfer};

/// Number of bytes that the write cache holds before it writes back the lowest blocks.
const CACHE_MAX: usize = 32 << 20;

/// The storage and geometry of a namespace.
pub struct SoftNamespace {
    pub(super) backend: Box<dyn Backend>,
    pub(super) block_shift: u32,
    /// Optimal I/O boundary in blocks; 0 for none.
    pub(super) boundary_blocks: u16,
    /// Blocks that were written and are not durable yet.
    dirty: BTreeMap<u64, Box<[u8]>>,
    pub(super) uuid: [u8; 16],
}

impl std::fmt::Debug for SoftNamespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "SoftNamespace({} blocks of {})",
            self.num_blocks(),
            1u32 << self.block_shift
        )
    }
}

impl SoftNamespace {
    /// Makes a namespace on `backend` with blocks of 512 or 4096 bytes.
    ///
    /// # Panics
    /// Panics with another block size.
    pub fn new(backend: Box<dyn Backend>, block_size: u32) -> SoftNamespace {
        assert!(matches!(block_size, 512 | 4096), "block size {block_size}");
        SoftNamespace {
            backend,
            block_shift: block_size.trailing_zeros(),
            boundary_blocks: 0,
            dirty: BTreeMap::new(),
            uuid: [0; 16],
        }
    }

    /// Sets the optimal I/O boundary (NOIOB), in blocks.
    #[must_use]
    pub fn boundary(mut self, blocks: u16) -> SoftNamespace {
        self.boundary_blocks = blocks;
        self
    }

    /// Size in blocks.
    pub fn num_blocks(&self) -> u64 {
        self.backend.len_bytes() >> self.block_shift
    }

    pub(super) fn block_size(&self) -> usize {
        1 << self.block_shift
    }

    fn byte(&self, lba: u64) -> u64 {
        lba << self.block_shift
    }

    pub(super) fn read(&mut self, lba: u64, to: &mut Transfer<'_>) -> io::Result<()> {
        self.backend.read(lba << self.block_shift, to)?;
        if self.dirty.is_empty() {
            return Ok(());
        }
        let size = self.block_size();
        let end = lba + (to.len() / size) as u64;
        for (block, bytes) in self.dirty.range(lba..end) {
            let at = usize::try_from(block - lba).unwrap_or(0) * size;
            to.put_at(at, bytes)?;
        }
        Ok(())
    }

    pub(super) fn read_bytes(&mut self, lba: u64, to: &mut [u8]) -> io::Result<()> {
        self.backend.read_bytes(lba << self.block_shift, to)?;
        let size = self.block_size();
        let end = lba + (to.len() / size) as u64;
        for (block, bytes) in self.dirty.range(lba..end) {
            let at = usize::try_from(block - lba).unwrap_or(0) * size;
            to[at..at + size].copy_from_slice(bytes);
        }
        Ok(())
    }

    /// Writes, into the cache when there is one and the write may stay there.
    pub(super) fn write(
        &mut self,
        lba: u64,
        from: &mut Transfer<'_>,
        cache: bool,
    ) -> io::Result<()> {
        let size = self.block_size();
        let blocks = (from.len() / size) as u64;
        if !cache {
            self.forget(lba, blocks);
            self.backend.write(lba << self.block_shift, from)?;
            return self.backend.flush();
        }
        for n in 0..blocks {
            let mut bytes = vec![0; size].into_boxed_slice();
            from.get_at(usize::try_from(n).unwrap_or(0) * size, &mut bytes)?;
            self.dirty.insert(lba + n, bytes);
        }
        self.bound()
    }

    pub(super) fn write_bytes(&mut self, lba: u64, from: &[u8], cache: bool) -> io::Result<()> {
        let size = self.block_size();
        if !cache {
            self.forget(lba, (from.len() / size) as u64);
            self.backend.write_bytes(lba << self.block_shift, from)?;
            return self.backend.flush();
        }
        for (n, block) in from.chunks_exact(size).enumerate() {
            self.dirty.insert(lba + n as u64, block.into());
        }
        self.bound()
    }

    pub(super) fn write_zeroes(&mut self, lba: u64, blocks: u64, cache: bool) -> io::Result<()> {
        // A large range bypasses the cache: it becomes durable early, which is allowed.
        if cache && blocks <= 64 {
            let zero = vec![0u8; self.block_size()].into_boxed_slice();
            for n in 0..blocks {
                self.dirty.insert(lba + n, zero.clone());
            }
            return self.bound();
        }
        self.forget(lba, blocks);
        let (offset, len) = (self.byte(lba), self.byte(blocks));
        self.backend.write_zeroes(offset, len)?;
        if cache { Ok(()) } else { self.backend.flush() }
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        while let Some((lba, bytes)) = self.dirty.pop_first() {
            self.backend.write_bytes(lba << self.block_shift, &bytes)?;
        }
        self.backend.flush()
    }

    /// Applies a power cut: `survives` decides for each cached block whether it reaches the
    /// backend.
    pub(super) fn lose(&mut self, mut survives: impl FnMut(u64) -> bool) -> io::Result<()> {
        for (lba, bytes) in std::mem::take(&mut self.dirty) {
            if survives(lba) {
                self.backend.write_bytes(lba << self.block_shift, &bytes)?;
            }
        }
        self.backend.flush()
    }

    /// Zeroes everything and sets another block size.
    pub(super) fn format(&mut self, block_shift: u32) -> io::Result<()> {
        self.dirty.clear();
        self.block_shift = block_shift;
        let len = self.backend.len_bytes();
        self.backend.write_zeroes(0, len)?;
        self.backend.flush()
    }

    fn forget(&mut self, lba: u64, blocks: u64) {
        if self.dirty.is_empty() {
            return;
        }
        let gone: Vec<u64> = self
            .dirty
            .range(lba..lba + blocks)
            .map(|(block, _)| *block)
            .collect();
        for block in gone {
            self.dirty.remove(&block);
        }
    }

    fn bound(&mut self) -> io::Result<()> {
        let max = CACHE_MAX >> self.block_shift;
        while self.dirty.len() > max {
            let Some((lba, bytes)) = self.dirty.pop_first() else {
                break;
            };
            self.backend.write_bytes(lba << self.block_shift, &bytes)?;
        }
        Ok(())
    }
}
