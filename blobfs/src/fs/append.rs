//! Making a file longer, by appended bytes and the zeroes of a gap, completely or not at all.
//!
//! A long append writes full buffers to the device as it proceeds. Until it has succeeded, the
//! length stays the same and a [`Growth`] keeps what is needed to undo everything. After an error
//! the length, the buffer, the frame and the record of submitted bytes are those from before, and
//! no write is in flight beyond the length.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::buffers::Buffers;
use super::error::{FsError, Result};
use super::fill::{FillBuf, FillWriter};
use super::frame::{Frame, LONGEST, REGION, split};
use super::inode::{Inode, now_ns};
use super::recorder::Recorder;
use super::space::Space;
use super::tail::Tail;
use super::volume::Volume;
use super::writeback::Writeback;

/// Longest gap that goes through the tail buffer as zeroes. The device zeroes a longer one.
const GAP_COPY_MAX: u64 = 4 << 20;

/// The reason why a file longer than [`LONGEST`] is refused.
pub(crate) const TOO_LONG: &str = "no file that is written to is longer than 128 TiB";

/// A file that is being made longer; see the module.
pub(crate) struct Growth {
    /// The length at its beginning.
    len: u64,
    /// The end of the pushed bytes.
    at: u64,
    /// The buffer with the earlier end of the file.
    bytes: Arc<FillBuf>,
    submitted: u64,
    supplied_from: u64,
    /// Number of writes submitted before.
    sent: u64,
}

/// Appends to files.
pub(crate) struct Appender {
    pub vol: Arc<Volume>,
    pub writeback: Arc<Writeback>,
    pub space: Arc<Space>,
    pub buffers: Arc<Buffers>,
    pub recorder: Arc<Recorder>,
}

impl Appender {
    /// Appends `data`. It is only a copy if the data fits; see [`super::tail`].
    #[inline]
    pub fn append(&self, ino: &Arc<Inode>, data: &[u8]) -> Result<()> {
        // In a forked child the buffer is the parent's memory.
        self.vol.check_fork()?;
        let mut room = self.recorder.room_to_append(data.len());
        {
            let mut tail = ino.tail.lock();
            let len = ino.len();
            self.append_locked(ino, &mut tail, data)?;
            room.note(ino, &mut tail, len, len, data);
        }
        if room.too_long {
            self.recorder.place_instead(ino);
        }
        Ok(())
    }

    #[inline]
    pub fn append_locked(&self, ino: &Arc<Inode>, tail: &mut Tail, data: &[u8]) -> Result<()> {
        if tail.push_fast(data) {
            // Only the holder of the append lock changes the length.
            let len = ino.len.load(Ordering::Relaxed) + data.len() as u64;
            ino.len.store(len, Ordering::Release);
            return Ok(());
        }
        self.append_slow(ino, tail, data)
    }

    #[cold]
    fn append_slow(&self, ino: &Arc<Inode>, tail: &mut Tail, data: &[u8]) -> Result<()> {
        self.grow(ino, tail, ino.len(), data.len() as u64, |tail, growth| {
            self.push_bytes(ino, tail, growth, data)
        })
    }

    /// Fills the file up to `off`, which is at or past its end, with zeroes, and appends `data`.
    pub fn append_after_gap(
        &self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        off: u64,
        data: &[u8],
    ) -> Result<()> {
        self.grow(ino, tail, off, data.len() as u64, |tail, growth| {
            self.push_gap(ino, tail, growth, off)?;
            self.push_bytes(ino, tail, growth, data)
        })
    }

    /// Makes the file `off + more` bytes long with the bytes that `fill` pushes.
    ///
    /// # Errors
    /// The file is then unchanged.
    pub fn grow(
        &self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        off: u64,
        more: u64,
        fill: impl FnOnce(&mut Tail, &mut Growth) -> Result<()>,
    ) -> Result<()> {
        self.vol.check_writable(|| ino.path())?;
        if ino.is_frozen() {
            return Err(FsError::ReadOnly { path: ino.path() });
        }
        let end = off
            .checked_add(more)
            .ok_or_else(|| FsError::invalid(&ino.path(), "a file longer than 2^64 bytes"))?;
        if end == ino.len() {
            return Ok(());
        }
        // On a smaller device there is no space for it, which is what the caller is told then.
        if end > LONGEST && (ino.is_thin() || self.space.vol.dev.info().len_bytes() > LONGEST) {
            return Err(FsError::invalid(&ino.path(), TOO_LONG));
        }
        self.space.reserve(ino, tail, end, false)?;
        let mut growth = self.begin(ino, tail)?;
        if let Err(e) = fill(tail, &mut growth) {
            self.take_back(ino, tail, growth);
            tail.check(ino.len());
            return Err(e);
        }
        ino.len.store(growth.at, Ordering::Release);
        ino.mtime_ns.store(now_ns(), Ordering::Relaxed);
        tail.allow_fast_path(growth.at);
        tail.check(growth.at);
        Ok(())
    }

    /// Makes sure that there is a buffer with room at the end of the file. Its changes are valid
    /// even if nothing is appended.
    pub fn begin(&self, ino: &Arc<Inode>, tail: &mut Tail) -> Result<Growth> {
        let len = ino.len();
        tail.stop_fast_path();
        if tail.writer_room() == 0 {
            self.buffers.next_buffer(ino, tail, len)?;
        }
        let bytes = tail.buffer().ok_or_else(|| ino.lost(tail.submitted, len))?;
        Ok(Growth {
            len,
            at: len,
            bytes,
            submitted: tail.submitted,
            supplied_from: tail.supplied_from,
            sent: tail.sent,
        })
    }

    fn push_bytes(
        &self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        growth: &mut Growth,
        data: &[u8],
    ) -> Result<()> {
        self.push(ino, tail, growth, data.len() as u64, |writer, done, n| {
            let done = usize::try_from(done).unwrap_or(usize::MAX);
            writer.push(&data[done..done + n]);
        })
    }

    pub fn push_zeroes(
        &self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        growth: &mut Growth,
        n: u64,
    ) -> Result<()> {
        self.push(ino, tail, growth, n, |writer, _, n| writer.push_zeroes(n))
    }

    /// Pushes `total` bytes: `copy` gets the writer, the number of bytes pushed, and the number to
    /// push.
    pub fn push(
        &self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        growth: &mut Growth,
        total: u64,
        mut copy: impl FnMut(&mut FillWriter, u64, usize),
    ) -> Result<()> {
        let mut done = 0;
        while done < total {
            let left = usize::try_from(total - done).unwrap_or(usize::MAX);
            let n = tail.writer_room().min(left);
            if n == 0 {
                self.buffers.next_buffer(ino, tail, growth.at)?;
                continue;
            }
            tail.with_writer(|writer| copy(writer, done, n));
            done += n as u64;
            growth.at += n as u64;
        }
        Ok(())
    }

    /// Pushes zeroes up to `to`. In a long gap the device zeroes the whole regions.
    fn push_gap(
        &self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        growth: &mut Growth,
        to: u64,
    ) -> Result<()> {
        let region = REGION as u64;
        if to - growth.at <= GAP_COPY_MAX || ino.is_thin() {
            return self.push_zeroes(ino, tail, growth, to - growth.at);
        }
        let head = growth.at.next_multiple_of(region) - growth.at;
        self.push_zeroes(ino, tail, growth, head)?;
        self.buffers.hand_over(ino, tail, growth.at)?;
        let upto = to / region * region;
        ino.frames.remove_from(split(growth.at).0);
        let landed = self
            .writeback
            .zero_range(ino, growth.at, upto - growth.at)?;
        tail.note_written(ino, growth.at..upto, growth.at..upto, landed);
        growth.at = upto;
        tail.submitted = upto;
        self.push_zeroes(ino, tail, growth, to - upto)
    }

    /// Undoes a failed growth: the file is as it was at the beginning. Waits for the writes that
    /// the growth has started, since the clusters past the length may go to another file as soon as
    /// the append lock is free.
    fn take_back(&self, ino: &Arc<Inode>, tail: &mut Tail, growth: Growth) {
        let started = tail.take_sent_after(growth.sent);
        for p in &started {
            self.writeback.wait_pending(p);
        }
        let region = split(growth.len).0;
        let base = region as u64 * REGION as u64;
        tail.submitted = if started.is_empty() && tail.sent == growth.sent {
            growth.submitted
        } else {
            // A write that began in the block of the old end may have damaged that block: write it
            // again.
            (growth.submitted / self.vol.block as u64 * self.vol.block as u64).max(base)
        };
        // A sync that the journal carries meanwhile must not count that block as submitted.
        tail.lowered += 1;
        tail.supplied_from = growth.supplied_from;
        tail.cut_unflushed(growth.len);
        ino.started.store(tail.submitted, Ordering::Relaxed);
        let frame = Frame::new(&ino.frames, region, 0, growth.bytes, true);
        // The buffer is filled past the length: the next growth copies the valid part.
        tail.set_frame(ino, frame, None);
        ino.frames.remove_from(region + 1);
        drop(started);
    }
}
