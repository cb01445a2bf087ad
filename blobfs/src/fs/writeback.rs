//! Writeback: writes of a file's bytes in flight, and the handling of those that fail.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use pumice_bdev::{DmaSlice, IoError, Op, Ticket};

use super::durable::{Begun, Durability, Landed, lost};
use super::error::{FsError, Result};
use super::frame::{Frame, REGION};
use super::inode::Inode;
use super::tail::Tail;
use super::volume::Volume;
use crate::blobstore::{Error as StoreError, Persist};

/// The context of the error of a write that the device got; [`failure`] says more.
const SENT: &str = "write-behind";

/// A write in flight.
pub(crate) struct Pending {
    /// The number among the file's writes, from 1.
    pub no: u64,
    pub from: u64,
    pub upto: u64,
    /// The first byte that came from the writer. Those before may have been read back.
    pub supplied_from: u64,
    pub fua: bool,
    pub bytes: usize,
    /// The data, which is kept until it is written: the next sync sends a failed write again.
    data: Mutex<Option<(Arc<Frame>, Vec<DmaSlice>)>>,
    error: Mutex<Option<FsError>>,
    /// Whether it completed without error.
    written: AtomicBool,
    /// The completion; a write with FUA has no sequence.
    landed: Mutex<Landed>,
    ticket: Mutex<Option<Ticket>>,
}

impl Pending {
    /// Makes a write of `slices`, bytes `range` of the file, which `frame` has in memory.
    pub fn new(
        no: u64,
        range: Range<u64>,
        supplied_from: u64,
        fua: bool,
        frame: Arc<Frame>,
        slices: Vec<DmaSlice>,
    ) -> Pending {
        Pending {
            no,
            from: range.start,
            upto: range.end,
            supplied_from,
            fua,
            bytes: slices.iter().map(DmaSlice::len).sum(),
            data: Mutex::new(Some((frame, slices))),
            error: Mutex::new(None),
            written: AtomicBool::new(false),
            landed: Mutex::default(),
            ticket: Mutex::new(None),
        }
    }

    pub fn is_over(&self) -> bool {
        self.ticket.lock().as_ref().is_none_or(Ticket::is_done)
    }

    /// Returns what a flush has to cover once the write is on the device.
    pub fn landed(&self) -> Option<Landed> {
        let written = self.written.load(Ordering::Acquire) && self.is_over();
        written.then(|| *self.landed.lock())
    }

    /// Makes `frame`, if it is of the same region, the frame that stays dirty until the write has
    /// completed, instead of the earlier one.
    pub fn hold_instead(&self, frame: &Arc<Frame>) {
        if let Some((held, _)) = &mut *self.data.lock()
            && held.region == frame.region
        {
            frame.hold_dirty();
            *held = Arc::clone(frame);
        }
    }

    /// Whether it has ended and its data is not on the device.
    pub fn has_failed(&self) -> bool {
        self.is_over() && !self.written.load(Ordering::Acquire)
    }
}

/// Writes the bytes of files to the device, and makes them durable.
pub(crate) struct Writeback {
    pub vol: Arc<Volume>,
    pub writes: Arc<Durability>,
}

impl Writeback {
    /// Sends a write, for the first time or again.
    pub fn send(&self, ino: &Arc<Inode>, pending: &Arc<Pending>) -> Result<()> {
        let slices = match &*pending.data.lock() {
            Some((_, slices)) => slices.clone(),
            None => return Ok(()),
        };
        *pending.error.lock() = None;
        let blob = ino.blob()?;
        let begun = self.writes.begin();
        let (counters, p) = (Arc::clone(&self.writes), Arc::clone(pending));
        counters.in_flight.fetch_add(p.bytes, Ordering::Relaxed);
        let done = move |result| {
            counters.in_flight.fetch_sub(p.bytes, Ordering::Relaxed);
            p.complete(&counters, begun, result);
        };
        let error = match blob.start_write(pending.from, &slices, pending.fua, done) {
            Ok(ticket) => {
                *pending.ticket.lock() = Some(ticket);
                return Ok(());
            }
            Err(error) => error,
        };
        self.writes
            .in_flight
            .fetch_sub(pending.bytes, Ordering::Relaxed);
        match error {
            StoreError::Io(e) => {
                pending.complete(&self.writes, begun, Err(e));
                Ok(())
            }
            // It was not sent. It waits for the next sync, as a write that has failed does.
            e @ StoreError::Owed(_) => {
                let e = self.vol.store_error(ino.path(), e);
                tracing::error!(error = %e, "no writeback; the data stays in memory for the next sync");
                *pending.error.lock() = Some(e);
                Ok(())
            }
            e => {
                let e = self.vol.store_error(ino.path(), e);
                *pending.error.lock() = Some(e.clone());
                Err(e)
            }
        }
    }

    /// Waits until no write overlaps `[from, upto)`.
    pub fn wait_overlapping(&self, tail: &Tail, from: u64, upto: u64) {
        for p in &tail.pending {
            if p.from < upto && from < p.upto {
                self.wait_pending(p);
            }
        }
    }

    /// Waits as [`Writeback::wait_overlapping`] does, and sends a failed write again.
    ///
    /// # Errors
    /// Fails when it fails again.
    pub fn settle_overlapping(
        &self,
        ino: &Arc<Inode>,
        tail: &Tail,
        from: u64,
        upto: u64,
    ) -> Result<()> {
        self.wait_overlapping(tail, from, upto);
        for p in &tail.pending {
            if p.from < upto && from < p.upto && p.has_failed() {
                self.send(ino, p)?;
                self.wait_pending(p);
            }
        }
        let failed = |p: &&Arc<Pending>| p.from < upto && from < p.upto && p.has_failed();
        match tail.pending.iter().find(failed) {
            Some(p) => Err(failure(ino, p)),
            None => Ok(()),
        }
    }

    /// Bounds the data that could not be written and stays in memory: by the limit of writeback
    /// and, if there is no space below (the host of an image file is full), to none.
    ///
    /// # Errors
    /// Fails when there is more and the device still does not accept it.
    pub fn bound_failed(&self, ino: &Arc<Inode>, tail: &mut Tail) -> Result<()> {
        let failed = tail.pending.iter().filter(|p| p.has_failed());
        let (mut bytes, mut full) = (0, false);
        for p in failed {
            bytes += p.bytes;
            full |= p.error.lock().as_ref().is_some_and(FsError::is_no_space);
        }
        if !full && bytes <= self.vol.opts.write_behind_bytes.max(REGION) {
            return Ok(());
        }
        self.resend_failed(ino, tail)?;
        self.wait_overlapping(tail, 0, u64::MAX);
        tail.prune(ino);
        self.write_error(ino, tail).map_or(Ok(()), Err)
    }

    /// Waits for one write, whatever its result.
    pub fn wait_pending(&self, pending: &Pending) {
        let ticket = pending.ticket.lock().clone();
        if let Some(ticket) = ticket {
            self.vol.shared().wait(&ticket);
        }
    }

    /// Sends failed writes again.
    pub fn resend_failed(&self, ino: &Arc<Inode>, tail: &Tail) -> Result<()> {
        for p in &tail.pending {
            if p.has_failed() {
                self.send(ino, p)?;
            }
        }
        Ok(())
    }

    /// Returns the error of a failed write, if there is one.
    pub fn write_error(&self, ino: &Inode, tail: &Tail) -> Option<FsError> {
        let failed = tail.pending.iter().find(|p| p.has_failed());
        failed.map(|p| failure(ino, p))
    }

    /// Waits while too much is in flight, preferably for this file's own writes.
    pub fn back_pressure(&self, ino: &Inode, tail: &mut Tail) {
        let limit = self.vol.opts.write_behind_bytes.max(REGION);
        while self.writes.in_flight.load(Ordering::Relaxed) > limit {
            match tail.pending.iter().find(|p| !p.is_over()) {
                Some(p) => self.wait_pending(p),
                None => {
                    if !self.vol.shared().wait_any() {
                        break;
                    }
                }
            }
        }
        tail.prune(ino);
    }

    /// Writes whole blocks of a file and waits.
    pub fn write_through(&self, ino: &Arc<Inode>, from: u64, slice: &DmaSlice) -> Result<()> {
        let result = Arc::new(Mutex::new(Ok(())));
        let slot = Arc::clone(&result);
        let done = move |written| *slot.lock() = written;
        let ticket = ino
            .blob()?
            .start_write(from, std::slice::from_ref(slice), false, done)
            .map_err(|e| self.vol.store_error(ino.path(), e))?;
        self.vol.shared().wait(&ticket);
        std::mem::replace(&mut *result.lock(), Ok(()))
            .map_err(|e| FsError::io(format!("{}: writing at offset {from}", ino.path()), e))
    }

    /// Writes zeroes over `[off, off + len)` of a file (multiples of the block size) and waits.
    /// They are not durable yet.
    pub fn zero_range(&self, ino: &Inode, off: u64, len: u64) -> Result<Landed> {
        /// Number of bytes in flight together.
        const STEP: u64 = 64 << 20;
        let blob = ino.blob()?;
        let begun = self.writes.begin();
        let mut done = 0;
        while done < len {
            let now = STEP.min(len - done);
            blob.write_zeroes_at(off + done, now).map_err(|e| {
                self.vol
                    .store_error(format!("{}: zeroing a gap", ino.path()), e)
            })?;
            done += now;
        }
        Ok(self.writes.completed(begun))
    }

    /// Makes every completed write up to `seq` durable. Concurrent callers share flushes.
    pub fn flush_upto(&self, seq: u64) -> Result<()> {
        if self.vol.persist == Persist::Completion {
            return Ok(());
        }
        self.writes.flushes.cover(seq, || {
            self.vol.shared().run(vec![Op::Flush]).map_err(|e| {
                // Other failures were recorded where they came back from the device.
                if e.is_retryable() {
                    self.writes.flush_failed(&e);
                }
                lost(&e)
            })
        })
    }
}

/// Returns the reason why a write has failed.
pub(crate) fn failure(ino: &Inode, pending: &Pending) -> FsError {
    let context = format!("{}: writing at offset {}", ino.path(), pending.from);
    match pending.error.lock().clone() {
        Some(FsError::Io {
            context: sent,
            source,
            data_loss,
        }) if sent == SENT => FsError::Io {
            context,
            source,
            data_loss,
        },
        Some(e) => e,
        None => FsError::invalid(&context, "not written yet; sync again"),
    }
}

impl Pending {
    fn complete(
        &self,
        counters: &Durability,
        begun: Begun,
        result: std::result::Result<(), Box<IoError>>,
    ) {
        match result {
            Ok(()) => {
                if !self.fua {
                    *self.landed.lock() = counters.completed(begun);
                }
                let data = self.data.lock().take();
                self.written.store(true, Ordering::Release);
                if let Some((frame, slices)) = data {
                    drop(slices);
                    frame.release_dirty();
                }
            }
            Err(e) => {
                tracing::error!(error = %e, "writeback failed; the data stays in memory for the next sync");
                *self.error.lock() = Some(FsError::io(SENT, e));
            }
        }
    }
}
