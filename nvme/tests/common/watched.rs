//! A disk in memory that calls a function before each operation.

use std::io;

use pumice_nvme_soft::{Backend, MemoryBackend, Transfer};

/// The operations that tests tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskCall {
    Read,
    Flush,
    Other,
}

/// See the module.
pub struct WatchedDisk {
    disk: MemoryBackend,
    before: Box<dyn FnMut(DiskCall) + Send>,
}

impl WatchedDisk {
    pub fn new(len: u64, before: impl FnMut(DiskCall) + Send + 'static) -> WatchedDisk {
        WatchedDisk {
            disk: MemoryBackend::new(len),
            before: Box::new(before),
        }
    }

    fn disk(&mut self, call: DiskCall) -> &mut MemoryBackend {
        (self.before)(call);
        &mut self.disk
    }
}

impl Backend for WatchedDisk {
    fn len_bytes(&self) -> u64 {
        self.disk.len_bytes()
    }

    fn read(&mut self, offset: u64, to: &mut Transfer<'_>) -> io::Result<()> {
        self.disk(DiskCall::Read).read(offset, to)
    }

    fn write(&mut self, offset: u64, from: &mut Transfer<'_>) -> io::Result<()> {
        self.disk(DiskCall::Other).write(offset, from)
    }

    fn read_bytes(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.disk(DiskCall::Other).read_bytes(offset, to)
    }

    fn write_bytes(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.disk(DiskCall::Other).write_bytes(offset, from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.disk(DiskCall::Flush).flush()
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.disk(DiskCall::Other).write_zeroes(offset, len)
    }
}
