//! Readahead, and reads that another thread waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use pumice_bdev::{IoError, Ticket};

use super::error::{FsError, Result};
use super::file::Open;
use super::frame::PAGE;
use super::inode::Inode;
use super::read::{Chunk, Reader, copy_chunks};

/// First window of a sequential reader. What a caller asks for by `prefetch` has no window.
const FIRST: u64 = 64 << 10;

/// A handle's access pattern.
#[derive(Default)]
pub(crate) struct Pattern {
    /// End of the last miss. A miss that begins there is sequential.
    next: AtomicU64,
    /// A read that passes this starts the next window; `u64::MAX` while the reader is not
    /// sequential.
    marker: AtomicU64,
    /// End of the range that was read ahead.
    ahead: AtomicU64,
    window: AtomicU64,
}

impl Pattern {
    pub fn new() -> Pattern {
        Pattern {
            marker: AtomicU64::new(u64::MAX),
            next: AtomicU64::new(u64::MAX),
            ..Pattern::default()
        }
    }

    /// Whether a read that ended at `end` has to start the next window.
    #[inline]
    pub fn passed(&self, end: u64) -> bool {
        end > self.marker.load(Ordering::Relaxed)
    }

    /// Handles a read that is not in memory: recognises sequential readers and starts the window.
    pub fn missed(&self, reader: &Reader, ino: &Arc<Inode>, off: u64, len: usize, eager: bool) {
        let max = reader.window_max();
        let end = off + len as u64;
        let page = PAGE as u64;
        let expected = self.next.swap(end, Ordering::Relaxed);
        let sequential = eager
            || (expected != u64::MAX && off <= expected.next_multiple_of(page) && end > expected);
        if max == 0 || !sequential || end >= ino.len() {
            self.marker.store(u64::MAX, Ordering::Relaxed);
            self.window.store(0, Ordering::Relaxed);
            return;
        }
        let window = self.widen(max);
        self.extend(reader, ino, end, end, window);
    }

    /// Starts the next window after a read that passed the marker.
    #[cold]
    pub fn hit(&self, reader: &Reader, ino: &Arc<Inode>, end: u64) {
        let ahead = self.ahead.load(Ordering::Relaxed);
        if end > ahead.saturating_add(reader.window_max()) || ahead >= ino.len() {
            self.marker.store(u64::MAX, Ordering::Relaxed);
            return;
        }
        let window = self.widen(reader.window_max());
        self.next.store(end, Ordering::Relaxed);
        self.extend(reader, ino, end, ahead.max(end), window);
    }

    /// Doubles the window, up to `max`.
    fn widen(&self, max: u64) -> u64 {
        let window = (self.window.load(Ordering::Relaxed) * 2).clamp(FIRST.min(max), max);
        self.window.store(window, Ordering::Relaxed);
        window
    }

    fn extend(&self, reader: &Reader, ino: &Arc<Inode>, end: u64, from: u64, window: u64) {
        let upto = (end + window).min(ino.len());
        self.ahead.store(upto, Ordering::Relaxed);
        self.marker
            .store(upto.saturating_sub(window / 2), Ordering::Relaxed);
        if upto > from
            && let Err(error) = reader.prefetch(ino, from, upto - from)
        {
            tracing::debug!(file = ino.path(), %error, "read-ahead failed");
        }
    }
}

type Arrived = Mutex<Option<std::result::Result<Vec<Chunk>, Box<IoError>>>>;

/// A read in flight; see [`File::read_async`](super::File::read_async). Dropping it cancels it.
pub struct ReadHandle {
    open: Arc<Open>,
    off: u64,
    len: usize,
    /// The number of truncations of the file when the read began.
    epoch: u64,
    ticket: Option<Ticket>,
    arrived: Arc<Arrived>,
}

impl std::fmt::Debug for ReadHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "ReadHandle({} bytes at {}, done: {})",
            self.len,
            self.off,
            self.is_done()
        )
    }
}

impl ReadHandle {
    pub(crate) fn start(open: &Arc<Open>, off: u64, len: usize) -> Result<ReadHandle> {
        let core = &open.core;
        core.vol.check_mounted(|| open.ino.path())?;
        let arrived: Arc<Arrived> = Arc::default();
        let slot = Arc::clone(&arrived);
        let keep = !open.is_direct();
        let epoch = open.ino.epoch.load(Ordering::Acquire);
        // What is in flight as a whole is not read once more: it is taken from memory afterwards.
        let end = off.saturating_add(len as u64).min(open.ino.len());
        let ticket = match open.ino.ahead.covering(off) {
            Some((run, ticket)) if run.end >= end => Some(ticket),
            _ => core
                .reader
                .start_read(&open.ino, off, len, keep, move |r| *slot.lock() = Some(r))?,
        };
        Ok(ReadHandle {
            open: Arc::clone(open),
            off,
            len,
            epoch,
            ticket,
            arrived,
        })
    }

    /// Offset in the file.
    pub fn offset(&self) -> u64 {
        self.off
    }

    /// Whether [`ReadHandle::read_into`] would return at once. Takes completions. Never blocks.
    pub fn poll(&self) -> bool {
        match &self.ticket {
            Some(ticket) if self.is_here() => self.open.core.vol.shared().poll(ticket),
            _ => true,
        }
    }

    /// Whether it was not begun by the parent of this process, whose channels are not this one's.
    fn is_here(&self) -> bool {
        self.open.core.vol.check_fork().is_ok()
    }

    fn is_done(&self) -> bool {
        self.ticket.as_ref().is_none_or(Ticket::is_done)
    }

    /// Waits until the data has arrived.
    pub fn wait(&self) {
        if let Some(ticket) = &self.ticket
            && self.is_here()
        {
            self.open.core.vol.shared().wait(ticket);
        }
    }

    /// Waits, and copies the data to `out`. Returns the number of bytes, which is less than
    /// requested at the end of the file.
    ///
    /// # Errors
    /// Returns the device's error.
    pub fn read_into(self, out: &mut [u8]) -> Result<usize> {
        self.open.core.vol.check_fork()?;
        self.wait();
        let ino = &self.open.ino;
        let n = self.len.min(out.len());
        let out = &mut out[..n];
        // Not even an error counts for a file that was truncated meanwhile.
        if ino.epoch.load(Ordering::Acquire) != self.epoch {
            return self.open.core.reader.read_at(ino, self.off, out, false);
        }
        let chunks = match self.arrived.lock().take() {
            Some(Ok(chunks)) => chunks,
            Some(Err(e)) => return Err(FsError::io(format!("{}: read", ino.path()), e)),
            None => Vec::new(),
        };
        let len = ino.len();
        if self.off >= len {
            return Ok(0);
        }
        let n = usize::try_from(len - self.off).map_or(n, |rest| rest.min(n));
        let done = copy_chunks(ino, &chunks, self.off, &mut out[..n]);
        if done == n {
            return Ok(n);
        }
        // It was evicted since: read the rest now.
        let keep = !self.open.is_direct();
        let reader = &self.open.core.reader;
        let rest = reader.read_at(ino, self.off + done as u64, &mut out[done..n], keep)?;
        Ok(done + rest)
    }

    /// Cancels the read. Its buffers live until the device no longer uses them.
    pub fn cancel(self) {}
}
