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
            self.backend.write(lba << self.block_shift, from)?;
            // A write that fails leaves what the cache has.
            self.forget(lba, blocks);
            return self.backend.flush();
        }
        self.make_room(blocks)?;
        for n in 0..blocks {
            let mut bytes = vec![0; size].into_boxed_slice();
            from.get_at(usize::try_from(n).unwrap_or(0) * size, &mut bytes)?;
            self.dirty.insert(lba + n, bytes);
        }
        Ok(())
    }

    pub(super) fn write_bytes(&mut self, lba: u64, from: &[u8], cache: bool) -> io::Result<()> {
        let size = self.block_size();
        let blocks = (from.len() / size) as u64;
        if !cache {
            self.backend.write_bytes(lba << self.block_shift, from)?;
            self.forget(lba, blocks);
            return self.backend.flush();
        }
        self.make_room(blocks)?;
        for (n, block) in from.chunks_exact(size).enumerate() {
            self.dirty.insert(lba + n as u64, block.into());
        }
        Ok(())
    }

    pub(super) fn write_zeroes(&mut self, lba: u64, blocks: u64, cache: bool) -> io::Result<()> {
        // A large range bypasses the cache: it becomes durable early, which is allowed.
        if cache && blocks <= 64 {
            self.make_room(blocks)?;
            let zero = vec![0u8; self.block_size()].into_boxed_slice();
            for n in 0..blocks {
                self.dirty.insert(lba + n, zero.clone());
            }
            return Ok(());
        }
        let (offset, len) = (self.byte(lba), self.byte(blocks));
        self.backend.write_zeroes(offset, len)?;
        self.forget(lba, blocks);
        if cache { Ok(()) } else { self.backend.flush() }
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        while self.write_back()? {}
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

    /// Writes back until so many more blocks fit the cache.
    fn make_room(&mut self, blocks: u64) -> io::Result<()> {
        let max = (CACHE_MAX >> self.block_shift) as u64;
        while self.dirty.len() as u64 + blocks > max && self.write_back()? {}
        Ok(())
    }

    /// Writes the lowest cached block back, if there is one. The cache has it until the backend
    /// does: the host believes that it was written.
    fn write_back(&mut self) -> io::Result<bool> {
        let Some(first) = self.dirty.first_entry() else {
            return Ok(false);
        };
        let offset = first.key() << self.block_shift;
        self.backend.write_bytes(offset, first.get())?;
        first.remove();
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::backend::MemoryBackend;
    use super::*;

    /// A disk that takes no writes while the flag is set, as an image on a full file system.
    struct Full {
        disk: MemoryBackend,
        full: Arc<AtomicBool>,
    }

    impl Full {
        fn check(&self) -> io::Result<()> {
            match self.full.load(Ordering::Relaxed) {
                true => Err(io::ErrorKind::StorageFull.into()),
                false => Ok(()),
            }
        }
    }

    impl Backend for Full {
        fn len_bytes(&self) -> u64 {
            self.disk.len_bytes()
        }
        fn read(&mut self, offset: u64, to: &mut Transfer<'_>) -> io::Result<()> {
            self.disk.read(offset, to)
        }
        fn write(&mut self, offset: u64, from: &mut Transfer<'_>) -> io::Result<()> {
            self.check()?;
            self.disk.write(offset, from)
        }
        fn read_bytes(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()> {
            self.disk.read_bytes(offset, to)
        }
        fn write_bytes(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
            self.check()?;
            self.disk.write_bytes(offset, from)
        }
        fn flush(&mut self) -> io::Result<()> {
            self.disk.flush()
        }
        fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
            self.check()?;
            self.disk.write_zeroes(offset, len)
        }
    }

    const BLOCK: usize = 4096;

    fn full() -> (SoftNamespace, Arc<AtomicBool>) {
        let full = Arc::new(AtomicBool::new(false));
        let disk = MemoryBackend::new(2 * CACHE_MAX as u64);
        let backend = Full {
            disk,
            full: Arc::clone(&full),
        };
        (SoftNamespace::new(Box::new(backend), 4096), full)
    }

    fn byte(ns: &mut SoftNamespace, lba: u64) -> u8 {
        let mut block = [0; BLOCK];
        ns.read_bytes(lba, &mut block).unwrap();
        block[0]
    }

    /// The cache is full, and what would make room cannot be written back: the write that needs the
    /// room fails, as often as it is sent, and nothing that was written before it is lost.
    #[test]
    fn what_cannot_be_written_back_stays_in_the_cache() {
        let (mut ns, full) = full();
        let blocks = (CACHE_MAX / BLOCK) as u64;
        for lba in 0..blocks {
            ns.write_bytes(lba, &[1; BLOCK], true).unwrap();
        }
        full.store(true, Ordering::Relaxed);
        for _ in 0..3 {
            assert!(ns.write_bytes(blocks, &[2; BLOCK], true).is_err());
            assert!(ns.write_zeroes(blocks, 1, true).is_err());
            assert!(ns.flush().is_err());
        }
        assert_eq!((byte(&mut ns, 0), byte(&mut ns, blocks)), (1, 0));
        full.store(false, Ordering::Relaxed);
        ns.write_bytes(blocks, &[2; BLOCK], true).unwrap();
        ns.flush().unwrap();
        ns.lose(|_| false).unwrap();
        assert!((0..blocks).all(|lba| byte(&mut ns, lba) == 1));
        assert_eq!(byte(&mut ns, blocks), 2);
    }

    /// A block is in the cache, and a durable write of it fails: the block is what it was.
    #[test]
    fn a_durable_write_that_fails_leaves_what_the_cache_has() {
        let (mut ns, full) = full();
        ns.write_bytes(3, &[1; BLOCK], true).unwrap();
        full.store(true, Ordering::Relaxed);
        assert!(ns.write_bytes(3, &[2; BLOCK], false).is_err());
        assert_eq!(byte(&mut ns, 3), 1);
        assert!(ns.write_zeroes(3, 1, false).is_err());
        assert_eq!(byte(&mut ns, 3), 1);
        full.store(false, Ordering::Relaxed);
        ns.write_bytes(3, &[2; BLOCK], false).unwrap();
        ns.lose(|_| true).unwrap();
        assert_eq!(byte(&mut ns, 3), 2);
    }
}
