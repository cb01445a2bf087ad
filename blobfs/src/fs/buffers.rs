//! The append buffers of files: starting one, submitting a full one, dropping the last one at the
//! last close.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pumice_bdev::DmaBuf;

use super::error::Result;
use super::fill::FillBuf;
use super::frame::{Frame, PAGE, REGION, split};
use super::inode::Inode;
use super::read::Reader;
use super::space::Space;
use super::tail::Tail;
use super::volume::Volume;
use super::writeback::{Pending, Writeback};

/// First size of the tail buffer of a new file. Most files stay below it.
const SMALL: usize = 64 << 10;

/// Manages the append buffers.
pub(crate) struct Buffers {
    pub vol: Arc<Volume>,
    pub reader: Arc<Reader>,
    pub writeback: Arc<Writeback>,
    pub space: Arc<Space>,
}

impl Buffers {
    /// Makes `at`, the end of the pushed bytes, the beginning of free room: starts a buffer, or
    /// submits a full one and starts the next.
    pub fn next_buffer(&self, ino: &Arc<Inode>, tail: &mut Tail, at: u64) -> Result<()> {
        // Whether or not there is a writer: an append that failed here has removed it.
        if tail.is_past(split(at).0) {
            self.writeback.bound_failed(ino, tail)?;
            self.hand_over(ino, tail, at)?;
            self.writeback.back_pressure(ino, tail);
        }
        self.open_buffer(ino, tail, at)
    }

    /// Submits everything up to `at` without waiting, and closes the buffer, which becomes cache
    /// when the write has completed.
    pub fn hand_over(&self, ino: &Arc<Inode>, tail: &mut Tail, at: u64) -> Result<()> {
        self.submit_upto(ino, tail, at, false)?;
        ino.settle()?;
        if let Some(frame) = tail.take_buffer() {
            frame.release_dirty();
        }
        Ok(())
    }

    /// Starts a tail buffer for position `at`, with the file's earlier bytes in its region.
    fn open_buffer(&self, ino: &Arc<Inode>, tail: &mut Tail, at: u64) -> Result<()> {
        let (region, filled) = split(at);
        let bytes = if let Some(old) = tail.frame_of(region) {
            let head = old
                .bytes
                .get(0..filled)
                .expect("the buffer holds what was appended");
            tail_buffer(at, head)?
        } else {
            let mut head = DmaBuf::new(filled.max(1))?;
            self.reader
                .read_exact(ino, at - filled as u64, &mut head[..filled])?;
            let bytes = tail_buffer(at, &head[..filled])?;
            tail.supplied_from = at;
            bytes
        };
        self.set_buffer(ino, tail, at, bytes);
        Ok(())
    }

    /// Replaces the tail buffer by one with `data` at `off`; both are inside it.
    pub fn patch_buffer(
        &self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        off: u64,
        data: &[u8],
    ) -> Result<()> {
        let len = ino.len();
        let base = tail.base();
        let Some(old) = tail.holding(base, len).filter(|_| off >= base) else {
            return Err(ino.lost(tail.submitted, len));
        };
        let filled = usize::try_from(len - base).unwrap_or(0);
        let mut buf = DmaBuf::new(old.bytes.cap())?;
        let bytes = old
            .bytes
            .get(0..filled)
            .expect("the buffer holds what was appended");
        buf[..filled].copy_from_slice(bytes);
        let at = split(off).1;
        buf[at..at + data.len()].copy_from_slice(data);
        self.set_buffer(ino, tail, off, Arc::new(FillBuf::from_buf(buf, filled)));
        tail.submitted = tail.submitted.min(off);
        tail.lowered += 1;
        Ok(())
    }

    /// Makes `bytes` the tail buffer at `at`.
    pub fn set_buffer(&self, ino: &Arc<Inode>, tail: &mut Tail, at: u64, bytes: Arc<FillBuf>) {
        let writer = bytes.writer();
        let frame = Frame::new(&ino.frames, split(at).0, 0, bytes, true);
        tail.set_frame(ino, frame, writer);
    }

    /// Submits the bytes up to `upto`. The last block is padded with zeroes.
    pub fn submit_upto(
        &self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        upto: u64,
        fua: bool,
    ) -> Result<()> {
        let block = self.vol.block as u64;
        if tail.submitted >= upto {
            return Ok(());
        }
        let frame = tail.holding(tail.submitted, upto).cloned();
        let frame = frame.ok_or_else(|| ino.lost(tail.submitted, upto))?;
        let base = tail.base();
        let from = (tail.submitted / block * block).max(base);
        let whole_end = upto / block * block;
        // There is one write of a block in flight, and none waiting to be sent again, which would
        // replace this one.
        self.writeback
            .settle_overlapping(ino, tail, from, upto.next_multiple_of(block))?;
        let at = |off: u64| usize::try_from(off - base).unwrap_or(usize::MAX);
        let mut slices = Vec::with_capacity(2);
        if whole_end > from {
            slices.push(frame.bytes.dma(at(from)..at(whole_end)));
        }
        if upto > whole_end {
            let last = whole_end.max(from);
            let bytes = frame
                .bytes
                .get(at(last)..at(upto))
                .expect("the buffer holds what was appended");
            let mut bounce = DmaBuf::new(self.vol.block)?;
            bounce[..bytes.len()].copy_from_slice(bytes);
            bounce[bytes.len()..].fill(0);
            slices.push(bounce.freeze());
        }
        frame.hold_dirty();
        tail.sent += 1;
        let range = from..upto.next_multiple_of(block);
        let supplied_from = tail.submitted.max(tail.supplied_from);
        let pending = Pending::new(tail.sent, range, supplied_from, fua, frame, slices);
        let pending = Arc::new(pending);
        tail.submitted = upto;
        ino.started.store(upto, Ordering::Relaxed);
        tail.pending.push(Arc::clone(&pending));
        self.writeback.send(ino, &pending)
    }

    /// Starts writing the collected bytes, if there are many: for callers who flush after each
    /// record without needing durability.
    pub fn start_write_behind(&self, ino: &Arc<Inode>, min: u64, upto: u64) -> Result<()> {
        let mut tail = ino.tail.lock();
        let block = self.vol.block as u64;
        let upto = upto.min(ino.len()) / block * block;
        if upto < tail.submitted.saturating_add(min) {
            return Ok(());
        }
        self.submit_upto(ino, &mut tail, upto, false)?;
        self.writeback.back_pressure(ino, &mut tail);
        Ok(())
    }

    /// Handles the drop of the last handle: the tail is written and becomes cache, and what was
    /// allocated ahead is freed.
    pub fn seal(&self, ino: &Arc<Inode>) -> Result<()> {
        let mut tail = ino.tail.lock();
        // A thread that deletes the file has taken over, and may have freed its clusters already.
        if ino.is_going() {
            return Ok(());
        }
        let sealed = self.seal_buffer(ino, &mut tail);
        tail.reserved = false;
        // Fewer clusters wait for an unmount, or for a file that needs them: a log is deleted soon,
        // and a table was allocated about as large as it has become.
        let spare = (tail.allocated / self.vol.cluster)
            .saturating_sub(ino.len().div_ceil(self.vol.cluster));
        if spare * self.vol.cluster > tail.allocated / 4 {
            self.space.trim(ino, tail);
        }
        sealed
    }

    fn seal_buffer(&self, ino: &Arc<Inode>, tail: &mut Tail) -> Result<()> {
        let len = ino.len();
        self.hand_over(ino, tail, len)?;
        tail.prune(ino);
        self.shrink_frame(ino, tail, len);
        Ok(())
    }

    /// Replaces the frame of the last region by one of the size that its bytes need, if it is much
    /// larger and none of it is in flight.
    fn shrink_frame(&self, ino: &Inode, tail: &Tail, len: u64) {
        let (region, filled) = split(len);
        let Some(frame) = ino.frames.whole(region) else {
            return;
        };
        let cap = filled.next_multiple_of(PAGE);
        if filled == 0 || frame.bytes.cap() < 2 * cap || !tail.pending.is_empty() {
            return;
        }
        let (Some(bytes), Ok(mut buf)) = (frame.bytes.get(0..filled), DmaBuf::zeroed(cap)) else {
            return;
        };
        buf[..filled].copy_from_slice(bytes);
        let bytes = Arc::new(FillBuf::from_buf(buf, filled));
        let small = Frame::new(&ino.frames, region, 0, bytes, true);
        tail.replace_whole(ino, &small);
        small.release_dirty();
    }
}

/// Makes a buffer for the region of `at` that begins with `head`.
pub(crate) fn tail_buffer(at: u64, head: &[u8]) -> Result<Arc<FillBuf>> {
    let (region, filled) = split(at);
    let cap = if region == 0 && filled < SMALL / 2 {
        SMALL
    } else {
        REGION
    };
    let mut buf = DmaBuf::new(cap)?;
    buf[..filled].copy_from_slice(head);
    Ok(Arc::new(FillBuf::from_buf(buf, filled)))
}
