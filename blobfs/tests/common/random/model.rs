//! The expected content of a file.

use std::ops::Range;

use pumice_blobfs::fs::File;

/// The expected content of a file.
#[derive(Default)]
pub struct Model {
    pub data: Vec<u8>,
    /// Bytes that a failed write may or may not have changed.
    pub unsure: Vec<Range<usize>>,
    /// Bytes that were written since the last sync, not by appends.
    pub unsynced: Vec<Range<usize>>,
    /// At least this many bytes are durable.
    pub durable: usize,
    /// Whether a sync has reported data loss, or may do so.
    pub doubtful: bool,
    pub handle: Option<File>,
}

impl Model {
    /// Records that these bytes are known.
    pub fn sure(&mut self, range: Range<usize>) {
        let parts = std::mem::take(&mut self.unsure);
        for r in parts {
            for part in [
                r.start..r.end.min(range.start),
                r.start.max(range.end)..r.end,
            ] {
                if part.start < part.end {
                    self.unsure.push(part);
                }
            }
        }
    }

    /// Records that a sync has made everything durable.
    pub fn is_durable(&mut self) {
        self.durable = self.data.len();
        self.doubtful = false;
        self.unsynced.clear();
    }

    pub fn compare(&self, path: &str, off: usize, got: &[u8]) {
        let end = off + got.len();
        let mut want = self.data[off..end].to_vec();
        for r in &self.unsure {
            let part = r.start.max(off)..r.end.min(end);
            if part.start < part.end {
                let part = part.start - off..part.end - off;
                want[part.clone()].copy_from_slice(&got[part]);
            }
        }
        if got == want {
            return;
        }
        let first = got.iter().zip(&want).position(|(a, b)| a != b);
        if let Some(first) = first {
            let wrong = got.iter().zip(&want).filter(|(a, b)| a != b).count();
            panic!(
                "{path}: byte {} is {}, should be {}; {wrong} of {} are wrong, {} in the file",
                off + first,
                got[first],
                want[first],
                got.len(),
                self.data.len()
            );
        }
    }
}
