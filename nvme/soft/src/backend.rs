//! The storage behind a soft controller's namespace.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::memory::DeviceMemory;

/// The data of a command in the host's memory, addressed by its byte position.
pub struct Transfer<'a> {
    pub(super) memory: &'a DeviceMemory,
    /// Device address and length of each piece.
    pub(super) pieces: &'a [(u64, usize)],
    /// The position at which this transfer begins in the pieces.
    pub(super) start: usize,
    pub(super) len: usize,
}

impl<'a> Transfer<'a> {
    /// The data of a command of `len` bytes.
    pub(super) fn new(memory: &'a DeviceMemory, pieces: &'a [(u64, usize)], len: usize) -> Self {
        Transfer {
            memory,
            pieces,
            start: 0,
            len,
        }
    }

    /// Number of bytes of the transfer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to transfer.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Writes `bytes` to the host, from position `at` of the transfer on.
    ///
    /// # Errors
    /// Fails when they do not fit or the host's memory is not mapped.
    pub fn put_at(&mut self, at: usize, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        self.each(at, bytes.len(), |memory, address, len| {
            let ok = memory.write(address, &bytes[done..done + len]);
            done += len;
            ok
        })
    }

    /// Reads from the host, from position `at` of the transfer on.
    ///
    /// # Errors
    /// Fails when the transfer is shorter or the host's memory is not mapped.
    pub fn get_at(&mut self, at: usize, bytes: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        self.each(at, bytes.len(), |memory, address, len| {
            let ok = memory.read(address, &mut bytes[done..done + len]);
            done += len;
            ok
        })
    }

    fn each(
        &self,
        at: usize,
        len: usize,
        mut f: impl FnMut(&DeviceMemory, u64, usize) -> bool,
    ) -> io::Result<()> {
        let fault = || io::Error::new(io::ErrorKind::InvalidInput, "data transfer error");
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(fault());
        }
        let mut skip = self.start + at;
        let mut left = len;
        for &(address, piece) in self.pieces {
            if left == 0 {
                break;
            }
            if skip >= piece {
                skip -= piece;
                continue;
            }
            let n = (piece - skip).min(left);
            if !f(self.memory, address + skip as u64, n) {
                return Err(fault());
            }
            skip = 0;
            left -= n;
        }
        if left == 0 { Ok(()) } else { Err(fault()) }
    }
}

/// Storage of a namespace of a soft controller. Called from the controller's thread only. Offsets
/// and lengths are in bytes, in whole blocks and inside `len_bytes`.
///
/// An error becomes a media error of the command: Unrecovered Read Error or Write Fault.
pub trait Backend: Send {
    /// Size in bytes.
    fn len_bytes(&self) -> u64;
    /// Reads `to.len()` bytes.
    fn read(&mut self, offset: u64, to: &mut Transfer<'_>) -> io::Result<()>;
    /// Writes `from.len()` bytes.
    fn write(&mut self, offset: u64, from: &mut Transfer<'_>) -> io::Result<()>;
    /// Reads into memory (for Compare, Copy and Verify).
    fn read_bytes(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()>;
    /// Writes from memory (for Copy and the write cache).
    fn write_bytes(&mut self, offset: u64, from: &[u8]) -> io::Result<()>;
    /// Makes everything written durable.
    fn flush(&mut self) -> io::Result<()>;
    /// Writes zeroes to a range.
    fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()>;
}

const CHUNK: usize = 64 << 10;

/// Storage in memory, allocated as it is written. It starts as zeroes.
#[derive(Default)]
pub struct MemoryBackend {
    len: u64,
    chunks: Vec<Option<Box<[u8]>>>,
}

impl MemoryBackend {
    /// Makes storage of `len` bytes.
    pub fn new(len: u64) -> MemoryBackend {
        let count = usize::try_from(len.div_ceil(CHUNK as u64)).unwrap_or(0);
        MemoryBackend {
            len,
            chunks: (0..count).map(|_| None).collect(),
        }
    }

    /// Returns the pieces of a range: the chunk, the range in the chunk and the position in the
    /// range.
    fn pieces(
        offset: u64,
        len: usize,
    ) -> impl Iterator<Item = (usize, std::ops::Range<usize>, usize)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == len {
                return None;
            }
            let at = offset + done as u64;
            let chunk = usize::try_from(at / CHUNK as u64).ok()?;
            let within = usize::try_from(at % CHUNK as u64).ok()?;
            let n = (CHUNK - within).min(len - done);
            let item = (chunk, within..within + n, done);
            done += n;
            Some(item)
        })
    }

    fn chunk(&self, n: usize) -> &[u8] {
        let chunk = self.chunks.get(n).and_then(Option::as_deref);
        chunk.unwrap_or(&ZEROES)
    }

    fn chunk_mut(&mut self, n: usize) -> io::Result<&mut [u8]> {
        let slot = self.chunks.get_mut(n).ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(slot.get_or_insert_with(|| vec![0; CHUNK].into_boxed_slice()))
    }
}

static ZEROES: [u8; CHUNK] = [0; CHUNK];

impl Backend for MemoryBackend {
    fn len_bytes(&self) -> u64 {
        self.len
    }

    fn read(&mut self, offset: u64, to: &mut Transfer<'_>) -> io::Result<()> {
        for (chunk, range, at) in Self::pieces(offset, to.len()) {
            to.put_at(at, &self.chunk(chunk)[range])?;
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, from: &mut Transfer<'_>) -> io::Result<()> {
        for (chunk, range, at) in Self::pieces(offset, from.len()) {
            from.get_at(at, &mut self.chunk_mut(chunk)?[range])?;
        }
        Ok(())
    }

    fn read_bytes(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        for (chunk, range, at) in Self::pieces(offset, to.len()) {
            to[at..at + range.len()].copy_from_slice(&self.chunk(chunk)[range]);
        }
        Ok(())
    }

    fn write_bytes(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        for (chunk, range, at) in Self::pieces(offset, from.len()) {
            let n = range.len();
            self.chunk_mut(chunk)?[range].copy_from_slice(&from[at..at + n]);
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        for (chunk, range, _) in Self::pieces(offset, len) {
            if range.len() == CHUNK {
                if let Some(slot) = self.chunks.get_mut(chunk) {
                    *slot = None;
                }
            } else if let Some(Some(bytes)) = self.chunks.get_mut(chunk) {
                bytes[range].fill(0);
            }
        }
        Ok(())
    }
}

/// Discards writes, and leaves a read's buffer as it is. For measuring the driver.
pub struct NullBackend(
    /// Size in bytes.
    pub u64,
);

impl Backend for NullBackend {
    fn len_bytes(&self) -> u64 {
        self.0
    }
    fn read(&mut self, _: u64, _: &mut Transfer<'_>) -> io::Result<()> {
        Ok(())
    }
    fn write(&mut self, _: u64, _: &mut Transfer<'_>) -> io::Result<()> {
        Ok(())
    }
    fn read_bytes(&mut self, _: u64, to: &mut [u8]) -> io::Result<()> {
        to.fill(0);
        Ok(())
    }
    fn write_bytes(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Storage in an image file.
pub struct FileBackend {
    file: File,
    len: u64,
    scratch: Vec<u8>,
}

impl FileBackend {
    /// Opens an image for reading and writing. With `create`, makes one of that many bytes if it
    /// does not exist. A file lock refuses a second opener.
    pub fn open(path: &Path, create: Option<u64>) -> io::Result<FileBackend> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(create.is_some())
            .mode(0o600)
            .truncate(false)
            .open(path)?;
        file.try_lock().map_err(|e| match e {
            std::fs::TryLockError::Error(e) => e,
            std::fs::TryLockError::WouldBlock => io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!(
                    "{} is in use by another process or controller",
                    path.display()
                ),
            ),
        })?;
        let mut len = file.metadata()?.len();
        if let Some(size) = create
            && len == 0
        {
            file.set_len(size)?;
            len = size;
        }
        Ok(FileBackend {
            file,
            len,
            scratch: Vec::new(),
        })
    }
}

impl Backend for FileBackend {
    fn len_bytes(&self) -> u64 {
        self.len
    }

    fn read(&mut self, offset: u64, to: &mut Transfer<'_>) -> io::Result<()> {
        self.scratch.resize(to.len(), 0);
        self.file.read_exact_at(&mut self.scratch, offset)?;
        to.put_at(0, &self.scratch)
    }

    fn write(&mut self, offset: u64, from: &mut Transfer<'_>) -> io::Result<()> {
        self.scratch.resize(from.len(), 0);
        from.get_at(0, &mut self.scratch)?;
        self.file.write_all_at(&self.scratch, offset)
    }

    fn read_bytes(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(to, offset)
    }

    fn write_bytes(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let mut at = offset;
        let end = offset + len;
        while at < end {
            let n = (end - at).min(CHUNK as u64);
            self.file
                .write_all_at(&ZEROES[..usize::try_from(n).unwrap_or(CHUNK)], at)?;
            at += n;
        }
        Ok(())
    }
}
