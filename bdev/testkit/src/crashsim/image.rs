//! Contents of a device that are cheap to copy: copies share chunks until one of them writes.

use std::ops::Range;
use std::sync::Arc;

const CHUNK: usize = 64 << 10;

/// The bytes of a simulated device. A copy shares the chunks that neither side has changed since.
#[derive(Clone)]
pub struct CrashImage {
    chunks: Vec<Option<Arc<Vec<u8>>>>,
    len: u64,
}

impl CrashImage {
    /// Makes an image of `len` zeroes.
    pub fn zeroed(len: u64) -> CrashImage {
        let n =
            usize::try_from(len.div_ceil(CHUNK as u64)).expect("a simulated device fits memory");
        CrashImage {
            chunks: vec![None; n],
            len,
        }
    }

    /// Makes an image with a copy of `bytes`.
    pub fn from_bytes(bytes: &[u8]) -> CrashImage {
        let mut image = CrashImage::zeroed(bytes.len() as u64);
        image.write(0, bytes);
        image
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len
    }

    /// Returns all bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.len).expect("fits memory")];
        self.read(0, &mut bytes);
        bytes
    }

    /// Returns the next range at or behind `offset` that may have been written.
    pub(super) fn next_written(&self, offset: u64) -> Option<Range<u64>> {
        let first = usize::try_from(offset / CHUNK as u64).unwrap_or(usize::MAX);
        let found = (first..self.chunks.len()).find(|i| self.chunks[*i].is_some())?;
        let start = (found * CHUNK) as u64;
        Some(start.max(offset)..(start + CHUNK as u64).min(self.len))
    }

    /// The chunks that were written, each with its number.
    pub(super) fn written_chunks(&self) -> impl Iterator<Item = (usize, &[u8])> {
        let chunks = self.chunks.iter().enumerate();
        chunks.filter_map(|(at, chunk)| Some((at, &chunk.as_ref()?[..])))
    }

    /// Reads into `out` from byte `offset`.
    ///
    /// # Panics
    /// Panics when the range is not inside the image.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        let chunks = &self.chunks;
        for_chunks(self.len, offset, out.len(), |chunk, at, done, n| {
            let out = &mut out[done..done + n];
            match &chunks[chunk] {
                Some(bytes) => out.copy_from_slice(&bytes[at..at + n]),
                None => out.fill(0),
            }
        });
    }

    /// Writes `data` at byte `offset`.
    ///
    /// # Panics
    /// Panics when the range is not inside the image.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let chunks = &mut self.chunks;
        for_chunks(self.len, offset, data.len(), |chunk, at, done, n| {
            own(&mut chunks[chunk])[at..at + n].copy_from_slice(&data[done..done + n]);
        });
    }

    /// Fills `len` bytes from `offset` with `byte`.
    ///
    /// # Panics
    /// Panics when the range is not inside the image.
    pub fn fill(&mut self, offset: u64, len: usize, byte: u8) {
        let chunks = &mut self.chunks;
        for_chunks(self.len, offset, len, |chunk, at, _, n| {
            if byte == 0 && n == CHUNK {
                chunks[chunk] = None;
            } else if byte != 0 || chunks[chunk].is_some() {
                own(&mut chunks[chunk])[at..at + n].fill(byte);
            }
        });
    }
}

fn own(chunk: &mut Option<Arc<Vec<u8>>>) -> &mut Vec<u8> {
    Arc::make_mut(chunk.get_or_insert_with(|| Arc::new(vec![0; CHUNK])))
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the image fits memory, so its offsets do"
)]
fn for_chunks(limit: u64, offset: u64, len: usize, mut f: impl FnMut(usize, usize, usize, usize)) {
    let end = offset.checked_add(len as u64).filter(|end| *end <= limit);
    assert!(
        end.is_some(),
        "{len} bytes at {offset} are not inside {limit}"
    );
    let start = offset as usize;
    let mut done = 0;
    while done < len {
        let at = (start + done) % CHUNK;
        let n = (CHUNK - at).min(len - done);
        f((start + done) / CHUNK, at, done, n);
        done += n;
    }
}

impl std::fmt::Debug for CrashImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let used = self.chunks.iter().flatten().count();
        write!(
            f,
            "CrashImage({} bytes, {used} chunks of 64 KiB in use)",
            self.len
        )
    }
}
