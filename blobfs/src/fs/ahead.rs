//! Reads ahead of the reader, and reads that somebody else waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use pumice_bdev::{IoError, Ticket};

use super::core::Core;
use super::error::{FsError, Result};
use super::file::Open;
use super::inode::Inode;
use super::read::{Chunk, copy_chunks};

/// One read of a read-ahead.
const STEP: u64 = 256 << 10;
/// First window of a reader that has turned out to be sequential.
const FIRST: u64 = 64 << 10;

/// What a handle knows about how it is read.
#[derive(Default)]
pub(crate) struct Pattern {
    /// Where the last miss ended: a miss that begins there is sequential.
    next: AtomicU64,
    /// A read that passes this starts the next window; `u64::MAX` while not sequential.
    marker: AtomicU64,
    /// What has been asked for ahead ends here.
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
}

impl Core {
    /// Before a read that is not in memory: detects sequential readers and starts the window.
    pub fn ahead_of_miss(
        &self,
        ino: &Arc<Inode>,
        pattern: &Pattern,
        off: u64,
        len: usize,
        eager: bool,
    ) {
        let max = self.window_max();
        let end = off + len as u64;
        let page = super::frame::PAGE as u64;
        let expected = pattern.next.swap(end, Ordering::Relaxed);
        let sequential = eager
            || (expected != u64::MAX && off <= expected.next_multiple_of(page) && end > expected);
        if max == 0 || !sequential || end >= ino.len() {
            pattern.marker.store(u64::MAX, Ordering::Relaxed);
            pattern.window.store(0, Ordering::Relaxed);
            return;
        }
        let window = (pattern.window.load(Ordering::Relaxed) * 2).clamp(FIRST.min(max), max);
        pattern.window.store(window, Ordering::Relaxed);
        self.extend_window(ino, pattern, end, end, window);
    }

    /// After a read that passed the marker: the next window.
    #[cold]
    pub fn ahead_of_hit(&self, ino: &Arc<Inode>, pattern: &Pattern, end: u64) {
        let ahead = pattern.ahead.load(Ordering::Relaxed);
        if end > ahead.saturating_add(self.window_max()) || ahead >= ino.len() {
            pattern.marker.store(u64::MAX, Ordering::Relaxed);
            return;
        }
        let window =
            (pattern.window.load(Ordering::Relaxed) * 2).clamp(FIRST, self.window_max().max(FIRST));
        pattern.window.store(window, Ordering::Relaxed);
        pattern.next.store(end, Ordering::Relaxed);
        self.extend_window(ino, pattern, end, ahead.max(end), window);
    }

    fn window_max(&self) -> u64 {
        (self.opts.read_ahead_bytes as u64).min(self.cache.stats().capacity_bytes / 8)
    }

    fn extend_window(&self, ino: &Arc<Inode>, pattern: &Pattern, end: u64, from: u64, window: u64) {
        let upto = (end + window).min(ino.len());
        pattern.ahead.store(upto, Ordering::Relaxed);
        pattern
            .marker
            .store(upto.saturating_sub(window / 2), Ordering::Relaxed);
        if upto > from
            && let Err(error) = self.prefetch(ino, from, upto - from)
        {
            tracing::debug!(file = ino.path(), %error, "read-ahead failed");
        }
    }

    /// Starts reads of what is not in memory of `[off, off + len)`, several at once, and returns.
    pub fn prefetch(&self, ino: &Arc<Inode>, off: u64, len: u64) -> Result<()> {
        self.check_mounted(|| ino.path())?;
        let end = off.saturating_add(len).min(ino.len());
        let mut at = off;
        while at < end {
            let step_end = (at / STEP * STEP + STEP).min(end);
            let missing = ino.frames.first_missing(at, step_end);
            if let Some(missing) = missing
                && !self.is_ahead(ino, missing.start)
            {
                let want = usize::try_from(step_end - at).unwrap_or(0);
                let mut runs = ino.ahead.lock();
                runs.runs.retain(|(_, t)| !t.is_done());
                let ticket = self.start_read(ino, at, want, true, |_| {})?;
                if let Some(ticket) = ticket {
                    runs.runs.push((missing.start..step_end, ticket));
                }
                ino.ahead_count.store(runs.runs.len(), Ordering::Release);
            }
            at = step_end;
        }
        Ok(())
    }

    fn is_ahead(&self, ino: &Inode, off: u64) -> bool {
        ino.ahead_count.load(Ordering::Acquire) > 0
            && ino
                .ahead
                .lock()
                .runs
                .iter()
                .any(|(r, t)| r.contains(&off) && !t.is_done())
    }

    /// If a read that covers `off` is under way, waits for it.
    pub fn wait_ahead(&self, ino: &Inode, off: u64) -> bool {
        if ino.ahead_count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let ticket = {
            let mut ahead = ino.ahead.lock();
            ahead.runs.retain(|(_, t)| !t.is_done());
            ino.ahead_count.store(ahead.runs.len(), Ordering::Release);
            ahead
                .runs
                .iter()
                .find(|(r, _)| r.contains(&off))
                .map(|(_, t)| t.clone())
        };
        match ticket {
            Some(ticket) => {
                self.shared().wait(&ticket);
                true
            }
            None => false,
        }
    }
}

type Arrived = Mutex<Option<std::result::Result<Vec<Chunk>, Box<IoError>>>>;

/// A read under way; see [`File::read_async`](super::File::read_async). Dropping it cancels it.
pub struct ReadHandle {
    open: Arc<Open>,
    off: u64,
    len: usize,
    /// The file's truncations when it began.
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
        core.check_mounted(|| open.ino.path())?;
        let arrived: Arc<Arrived> = Arc::default();
        let slot = Arc::clone(&arrived);
        let keep = !open.is_direct();
        let epoch = open.ino.epoch.load(Ordering::Acquire);
        let ticket = core.start_read(&open.ino, off, len, keep, move |r| *slot.lock() = Some(r))?;
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

    /// Whether [`ReadHandle::read_into`] would return at once. Reaps completions; never blocks.
    pub fn poll(&self) -> bool {
        match &self.ticket {
            Some(ticket) => self.open.core.shared().poll(ticket),
            None => true,
        }
    }

    fn is_done(&self) -> bool {
        self.ticket.as_ref().is_none_or(Ticket::is_done)
    }

    /// Waits until the data is there.
    pub fn wait(&self) {
        if let Some(ticket) = &self.ticket {
            self.open.core.shared().wait(ticket);
        }
    }

    /// Waits, and copies the data to `out`. Returns how much there is: less than was asked for at
    /// the end of the file.
    ///
    /// # Errors
    /// The device's.
    pub fn read_into(self, out: &mut [u8]) -> Result<usize> {
        self.wait();
        let ino = &self.open.ino;
        let n = self.len.min(out.len());
        let out = &mut out[..n];
        let chunks = match self.arrived.lock().take() {
            Some(Ok(chunks)) => chunks,
            Some(Err(e)) => return Err(FsError::io(format!("{}: read", ino.path()), e)),
            None => Vec::new(),
        };
        if ino.epoch.load(Ordering::Acquire) != self.epoch {
            return self.open.core.read_at(ino, self.off, out, false);
        }
        let len = ino.len();
        if self.off >= len {
            return Ok(0);
        }
        let n = usize::try_from(len - self.off).map_or(n, |rest| rest.min(n));
        let done = copy_chunks(ino, &chunks, self.off, &mut out[..n]);
        if done == n {
            return Ok(n);
        }
        // Evicted since: read what is left now.
        let keep = !self.open.is_direct();
        let rest =
            (self.open.core).read_at(ino, self.off + done as u64, &mut out[done..n], keep)?;
        Ok(done + rest)
    }

    /// Gives the read up. Its buffers live until the device is done with them.
    pub fn cancel(self) {}
}
