//! The ring of the log in shared memory: its bytes, and its entries.
//!
//! An entry has a header of 40 bytes, and is padded to eight: the header's checksum, its kind, its position (bytes written before it,
//! which no two entries share), the blob, and two numbers that depend on the kind. It is there once the head is past it,
//! which one store publishes, so a killed process leaves whole entries only.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use pumice_bdev::SharedMemory;

const MAGIC: u64 = u64::from_le_bytes(*b"PUMSHLG1");
/// Indexes of the words.
const WORD_MAGIC: usize = 0;
const WORD_SESSION: usize = 1;
const WORD_TAIL: usize = 2;
const WORD_HEAD: usize = 3;
/// Number of bytes in the file that are words.
const WORDS_BYTES: usize = 4096;
const HEADER: usize = 40;

/// The fixed part of an entry.
struct EntryHeader {
    kind: u32,
    at: u64,
    blob: u64,
    first: u64,
    second: u64,
}

impl EntryHeader {
    /// Returns a checksum of its fields. The data is not covered: it is in memory, like the kernel's own page cache.
    #[inline]
    fn sum(&self) -> u32 {
        let words = [
            u64::from(self.kind),
            self.at,
            self.blob,
            self.first,
            self.second,
        ];
        let mix = |sum: u64, word: &u64| {
            (sum ^ word)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
        };
        let sum = words.iter().fold(MAGIC, mix);
        #[expect(clippy::cast_possible_truncation, reason = "a half of each is taken")]
        ((sum >> 32) as u32 ^ sum as u32)
    }

    #[inline]
    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&self.sum().to_le_bytes());
        bytes[4..8].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.at.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.blob.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.first.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.second.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER]) -> Option<EntryHeader> {
        let word32 = |i: usize| u32::from_le_bytes(bytes[i..i + 4].try_into().expect("four bytes"));
        let word64 =
            |i: usize| u64::from_le_bytes(bytes[i..i + 8].try_into().expect("eight bytes"));
        let header = EntryHeader {
            kind: word32(4),
            at: word64(8),
            blob: word64(16),
            first: word64(24),
            second: word64(32),
        };
        (header.sum() == word32(0)).then_some(header)
    }
}

/// A change of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What<D> {
    /// These bytes were written at this offset, inside the file or at its end.
    Bytes { off: u64, data: D },
    /// Zeroes made the file longer.
    Zeroes { old_len: u64, new_len: u64 },
    /// The file is about to be made shorter, which may have happened or not.
    Cutting { len: u64 },
    /// The file was made shorter.
    Cut { len: u64 },
    /// The device has the file with at least this length, and all that the entries below this position say.
    Recorded { len: u64, upto: u64 },
    /// The file's clusters hold its first `len` bytes, though its length on the device may be less. The entries below this
    /// position count for nothing.
    Placed { len: u64, upto: u64 },
    /// The file was deleted.
    Gone,
    /// Something was written that is too long for the log, and is being synced. It may be missing.
    Long,
}

impl<D: AsRef<[u8]>> What<D> {
    /// Returns the kind and the two numbers.
    fn encode(&self) -> (u32, u64, u64) {
        match *self {
            What::Bytes { off, ref data } => (1, off, data.as_ref().len() as u64),
            What::Zeroes { old_len, new_len } => (2, new_len, old_len),
            What::Cutting { len } => (3, len, 0),
            What::Cut { len } => (4, len, 0),
            What::Recorded { len, upto } => (5, len, upto),
            What::Gone => (6, 0, 0),
            What::Long => (7, 0, 0),
            What::Placed { len, upto } => (8, len, upto),
        }
    }

    /// Returns the bytes that its entry takes.
    pub fn entry_bytes(&self) -> u64 {
        entry_bytes(self.data().len())
    }

    fn data(&self) -> &[u8] {
        match self {
            What::Bytes { data, .. } => data.as_ref(),
            _ => &[],
        }
    }
}

/// Returns the bytes that an entry with so much data takes.
pub(super) fn entry_bytes(data: usize) -> u64 {
    (HEADER + data).next_multiple_of(8) as u64
}

/// An entry as it was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LogEntry {
    pub at: u64,
    pub blob: u64,
    pub what: What<Vec<u8>>,
}

/// The ring.
#[derive(Debug)]
pub(super) struct ShmRing {
    memory: SharedMemory,
    head: u64,
    tail: u64,
    /// The number of bytes, a power of two, less one.
    mask: u64,
}

impl ShmRing {
    /// Makes an empty ring of `bytes` bytes, a power of two.
    pub fn create(path: &Path, session: u64, bytes: usize) -> io::Result<ShmRing> {
        assert!(bytes.is_power_of_two());
        let memory = SharedMemory::create(path, WORDS_BYTES + bytes)?;
        memory.word(WORD_SESSION).store(session, Ordering::Relaxed);
        memory.word(WORD_MAGIC).store(MAGIC, Ordering::Release);
        Ok(ShmRing {
            memory,
            head: 0,
            tail: 0,
            mask: bytes as u64 - 1,
        })
    }

    /// Opens the ring that a killed process has left, if there is one.
    ///
    /// # Errors
    /// Fails if it cannot be opened, and with `InvalidData` if it does not belong to `session`.
    pub fn open(path: &Path, session: u64) -> io::Result<Option<ShmRing>> {
        let memory = match SharedMemory::open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            memory => memory?,
        };
        let word = |index: usize| memory.word(index).load(Ordering::Acquire);
        let (head, tail) = (word(WORD_HEAD), word(WORD_TAIL));
        let its = word(WORD_MAGIC) == MAGIC && word(WORD_SESSION) == session && session != 0;
        let used = head.checked_sub(tail);
        let bytes = memory.num_bytes() as u64;
        let fits = used.is_some_and(|used| used <= bytes)
            && tail.is_multiple_of(8)
            && bytes.is_power_of_two();
        if !its || !fits {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Some(ShmRing {
            memory,
            head,
            tail,
            mask: bytes - 1,
        }))
    }

    /// Number of bytes that entries may take.
    pub fn capacity(&self) -> u64 {
        self.mask + 1
    }

    /// The position of the next entry.
    pub fn head(&self) -> u64 {
        self.head
    }

    /// The position of the oldest entry.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Frees the entries below `tail`.
    pub fn set_tail(&mut self, tail: u64) {
        self.tail = tail;
        self.memory.word(WORD_TAIL).store(tail, Ordering::Release);
    }

    /// Adds an entry. Returns its position, or `None` if there is no room.
    #[inline]
    pub fn push(&mut self, blob: u64, what: &What<&[u8]>) -> Option<u64> {
        let data = what.data();
        let (at, len) = (self.head, entry_bytes(data.len()));
        if at - self.tail + len > self.capacity() {
            return None;
        }
        let (kind, first, second) = what.encode();
        let header = EntryHeader {
            kind,
            at,
            blob,
            first,
            second,
        };
        let header = header.encode();
        let (start, first) = self.split(at, HEADER + data.len());
        if first == HEADER + data.len() {
            let (head, rest) = self.memory.bytes_mut(start, first).split_at_mut(HEADER);
            head.copy_from_slice(&header);
            rest.copy_from_slice(data);
        } else {
            self.put(at, &header);
            self.put(at + HEADER as u64, data);
        }
        self.head = at + len;
        // The entry is there, as a whole, from here on.
        self.memory
            .word(WORD_HEAD)
            .store(self.head, Ordering::Release);
        Some(at)
    }

    /// Copies bytes to a position, around the end.
    #[cold]
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let (start, first) = self.split(at, bytes.len());
        let (head, rest) = bytes.split_at(first);
        self.memory.bytes_mut(start, first).copy_from_slice(head);
        self.memory.bytes_mut(0, rest.len()).copy_from_slice(rest);
    }

    fn get(&self, at: u64, out: &mut [u8]) {
        let (start, first) = self.split(at, out.len());
        self.memory.read(start, &mut out[..first]);
        if first < out.len() {
            self.memory.read(0, &mut out[first..]);
        }
    }

    /// Returns where `len` bytes at a position begin, and how many are there before the end.
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "a position in memory")]
    fn split(&self, at: u64, len: usize) -> (usize, usize) {
        let start = at & self.mask;
        (start as usize, len.min((self.capacity() - start) as usize))
    }

    /// Reads all entries, from the oldest on.
    ///
    /// # Errors
    /// Returns what is wrong with the first one that is damaged.
    pub fn entries(&self) -> Result<Vec<LogEntry>, String> {
        let mut entries = Vec::new();
        let mut at = self.tail;
        while at < self.head {
            let left = self.head - at;
            let (entry, len) = self
                .entry(at, left)
                .ok_or_else(|| format!("its entry at {at} is damaged"))?;
            entries.push(entry);
            at += len;
        }
        Ok(entries)
    }

    fn entry(&self, at: u64, left: u64) -> Option<(LogEntry, u64)> {
        if left < HEADER as u64 {
            return None;
        }
        let mut header = [0; HEADER];
        self.get(at, &mut header);
        let EntryHeader {
            kind,
            at: its,
            blob,
            first,
            second,
        } = EntryHeader::decode(&header)?;
        let data_len = if kind == 1 { second } else { 0 };
        let data_len = usize::try_from(data_len)
            .ok()
            .filter(|len| *len as u64 <= left)?;
        let len = entry_bytes(data_len);
        if len > left || its != at {
            return None;
        }
        let mut data = vec![0; data_len];
        self.get(at + HEADER as u64, &mut data);
        let what = match kind {
            1 => What::Bytes { off: first, data },
            2 => What::Zeroes {
                old_len: second,
                new_len: first,
            },
            3 => What::Cutting { len: first },
            4 => What::Cut { len: first },
            5 => What::Recorded {
                len: first,
                upto: second,
            },
            6 => What::Gone,
            7 => What::Long,
            8 => What::Placed {
                len: first,
                upto: second,
            },
            _ => return None,
        };
        Some((LogEntry { at, blob, what }, len))
    }

    /// Makes the ring useless, and removes it.
    pub fn remove(self) {
        self.memory.word(WORD_MAGIC).store(0, Ordering::Release);
        if let Err(error) = self.memory.unlink() {
            tracing::warn!(%error, "a log in shared memory that is no longer needed could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    const SEVENS: What<&[u8]> = What::Bytes {
        off: 0,
        data: &[7; 100],
    };

    fn ring(bytes: usize) -> (tempfile::TempDir, ShmRing) {
        let dir = tempfile::tempdir().unwrap();
        let ring = ShmRing::create(&dir.path().join("log"), 9, bytes).unwrap();
        (dir, ring)
    }

    #[test]
    fn entries_are_read_as_they_were_written_also_around_the_end() {
        let (dir, mut ring) = ring(512);
        let data: Vec<u8> = (0..77).collect();
        let all: [What<&[u8]>; 6] = [
            What::Bytes {
                off: 5,
                data: &data,
            },
            What::Zeroes {
                old_len: 1,
                new_len: 8,
            },
            What::Cutting { len: 3 },
            What::Cut { len: 3 },
            What::Recorded { len: 7, upto: 40 },
            What::Gone,
        ];
        for round in 0..40 {
            let first = ring.push(round, &all[0]).unwrap();
            let second = ring
                .push(round, &all[usize::try_from(round).unwrap() % 6])
                .unwrap();
            let read = ring.entries().unwrap();
            assert_eq!(read.len(), 2);
            assert_eq!((read[0].at, read[1].at), (first, second));
            assert_eq!(
                read[0].what,
                What::Bytes {
                    off: 5,
                    data: data.clone()
                }
            );
            assert_eq!((read[0].blob, read[1].blob), (round, round));
            ring.set_tail(ring.head());
        }
        ring.push(1, &all[4]).unwrap();
        let left = ShmRing::open(&dir.path().join("log"), 9).unwrap().unwrap();
        assert_eq!(
            left.entries().unwrap()[0].what,
            What::Recorded { len: 7, upto: 40 }
        );
        assert!(ShmRing::open(&dir.path().join("log"), 8).is_err());
        left.remove();
        assert!(ShmRing::open(&dir.path().join("log"), 9).unwrap().is_none());
    }

    #[test]
    fn a_full_ring_takes_nothing_and_loses_nothing() {
        let (_dir, mut ring) = ring(256);
        assert_eq!(ring.push(1, &SEVENS), Some(0));
        assert_eq!(ring.push(1, &SEVENS), None);
        assert_eq!(ring.entries().unwrap().len(), 1);
        ring.set_tail(144);
        assert_eq!(ring.push(2, &SEVENS), Some(144));
        assert_eq!(ring.entries().unwrap()[0].blob, 2);
    }

    #[test]
    fn a_damaged_entry_is_told() {
        for at in 0..144 {
            let (_dir, mut ring) = ring(512);
            ring.push(1, &SEVENS).unwrap();
            ring.push(1, &What::Gone).unwrap();
            let mut byte = [0];
            ring.get(at, &mut byte);
            ring.put(at, &[byte[0] ^ 0x10]);
            let read = ring.entries();
            // Data is not covered.
            assert_eq!(read.is_ok(), at >= 40, "byte {at}: {read:?}");
        }
    }

    /// Bytes of a ring, and of its file when the memory behind them has been taken away.
    const LONG: usize = 1 << 20;
    const SHORT: usize = 256 << 10;

    /// A process that dies while it copies the bytes of an entry leaves those before it, and nothing of this one.
    #[test]
    fn an_entry_is_there_after_its_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let status = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "fs::shm_ring::tests::child_that_dies_in_an_entry",
            ])
            .env("PUMICE_RING", &path)
            // Where there would be a core file.
            .current_dir(dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
        // A ring is opened as a whole, so there is memory again, with other bytes.
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(&vec![9; WORDS_BYTES + LONG - SHORT])
            .unwrap();
        file.sync_all().unwrap();
        let left = ShmRing::open(&path, 9).unwrap().unwrap();
        let blobs: Vec<u64> = left.entries().unwrap().iter().map(|e| e.blob).collect();
        assert_eq!(blobs, [1]);
    }

    /// Without the memory of its last bytes, the copy of an entry ends the process.
    #[test]
    fn child_that_dies_in_an_entry() {
        let Some(path) = std::env::var_os("PUMICE_RING") else {
            return;
        };
        let path = Path::new(&path);
        let mut ring = ShmRing::create(path, 9, LONG).unwrap();
        ring.push(1, &SEVENS).unwrap();
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(SHORT as u64).unwrap();
        let data = vec![8; LONG / 2];
        let bytes = What::Bytes {
            off: 100,
            data: &data[..],
        };
        ring.push(2, &bytes);
    }
}
