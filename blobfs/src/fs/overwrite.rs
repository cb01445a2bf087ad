//! Writes inside a file: to the device first, then to the cache.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pumice_bdev::DmaBuf;

use super::append::Appender;
use super::buffers::Buffers;
use super::error::{FsError, Result};
use super::fill::FillBuf;
use super::frame::{Frame, PAGE, REGION, split};
use super::inode::{Inode, now_ns};
use super::read::{FRAME_MAX, Reader};
use super::space::Space;
use super::tail::Tail;
use super::volume::Volume;
use super::writeback::Writeback;

/// Performs writes inside files.
pub(crate) struct Overwriter {
    pub vol: Arc<Volume>,
    pub reader: Arc<Reader>,
    pub writeback: Arc<Writeback>,
    pub space: Arc<Space>,
    pub buffers: Arc<Buffers>,
    pub appender: Arc<Appender>,
}

impl Overwriter {
    /// Writes `data` at `off`. A gap past the end becomes zeroes. Bytes inside the file are written
    /// through to the device, unless they are still in the tail buffer.
    pub fn write_at(&self, ino: &Arc<Inode>, off: u64, data: &[u8]) -> Result<()> {
        let mut room = self.appender.recorder.room(data.len());
        {
            let mut tail = ino.tail.lock();
            let len = ino.len();
            let kept = self.write_locked(ino, &mut tail, off, data)?;
            // Empty data changes nothing, not even beyond the end.
            if data.is_empty() {
                return Ok(());
            }
            if ino.len() > len {
                room.note(ino, &mut tail, len, off, data);
            } else {
                room.note_inside(ino, &mut tail, off, data, kept);
            }
        }
        if room.too_long {
            self.appender.recorder.place_instead(ino);
        }
        Ok(())
    }

    /// Writes as [`Overwriter::write_at`] does. Returns whether some of it is only in memory.
    fn write_locked(
        &self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        off: u64,
        data: &[u8],
    ) -> Result<bool> {
        let len = ino.len();
        if off == len {
            self.appender.append_locked(ino, tail, data)?;
            return Ok(true);
        }
        self.vol.check_writable(|| ino.path())?;
        if ino.is_frozen() {
            return Err(FsError::ReadOnly { path: ino.path() });
        }
        let end = off
            .checked_add(data.len() as u64)
            .ok_or_else(|| FsError::invalid(&ino.path(), "a file longer than 2^64 bytes"))?;
        if data.is_empty() {
            return Ok(false);
        }
        if off > len {
            self.appender.append_after_gap(ino, tail, off, data)?;
            return Ok(true);
        }
        self.space.reserve(ino, tail, end, false)?;
        let inside = usize::try_from(len - off)
            .unwrap_or(usize::MAX)
            .min(data.len());
        let (mut done, mut kept) = (0, inside < data.len());
        while done < inside {
            let at = off + done as u64;
            let (region, in_region) = split(at);
            let n = (REGION - in_region).min(inside - done);
            let piece = &data[done..done + n];
            if tail.is_tail(region) {
                self.buffers.patch_buffer(ino, tail, at, piece)?;
                tail.stop_fast_path();
                kept = true;
            } else {
                self.overwrite(ino, tail, at, piece)?;
            }
            done += n;
        }
        ino.mtime_ns.store(now_ns(), Ordering::Relaxed);
        if inside < data.len() {
            self.appender.append_locked(ino, tail, &data[inside..])?;
        }
        Ok(kept)
    }

    /// Replaces bytes of one region that is not the tail: device first, then cache.
    fn overwrite(&self, ino: &Arc<Inode>, tail: &mut Tail, off: u64, data: &[u8]) -> Result<()> {
        let page = PAGE as u64;
        let end = off + data.len() as u64;
        let from = off / page * page;
        let upto = end.next_multiple_of(page);
        // The write covers all of the region: its frame is replaced by one that counts as written.
        // Failed writes are sent again first.
        let base = off / REGION as u64 * REGION as u64;
        self.writeback
            .settle_overlapping(ino, tail, base, base + REGION as u64)?;
        tail.prune(ino);
        let len = ino.len();
        let have = usize::try_from(upto.min(len) - from).unwrap_or(0);
        let total = usize::try_from(upto - from).unwrap_or(0);
        let mut buf = DmaBuf::new(total)?;
        buf[have..].fill(0);
        let skip = usize::try_from(off - from).unwrap_or(0);
        if skip > 0 {
            self.reader.read_exact(ino, from, &mut buf[..skip])?;
        }
        if skip + data.len() < have {
            self.reader
                .read_exact(ino, end, &mut buf[skip + data.len()..have])?;
        }
        buf[skip..skip + data.len()].copy_from_slice(data);
        let slice = buf.freeze();
        let begun = self.writeback.writes.begin();
        let written = self.writeback.write_through(ino, from, &slice);
        // This holds also after an error, since a part may be in the device's cache.
        let supplied = if written.is_ok() { off..end } else { off..off };
        let landed = self.writeback.writes.completed(begun);
        tail.note_written(ino, from..upto, supplied, landed);
        if written.is_err() || self.show(ino, tail, from, &slice[..have]).is_err() {
            // The cache no longer has what the device has, and nothing in it is unwritten.
            ino.frames.forget_region(split(base).0);
        }
        written
    }

    /// Shows `bytes`, whole written pages at `from`, in the cache. The end of the file may cut the
    /// last page short.
    ///
    /// # Errors
    /// Fails when there is no memory for it. The cache may then show a part.
    fn show(&self, ino: &Arc<Inode>, tail: &Tail, from: u64, bytes: &[u8]) -> Result<()> {
        let (region, start) = split(from);
        if !ino.frames.has_place(region) {
            return Ok(());
        }
        if let Some(old) = ino.frames.whole(region) {
            let filled = old.bytes.filled();
            let mut copy = DmaBuf::new(old.bytes.cap())?;
            if let Some(old_bytes) = old.bytes.get(0..filled) {
                copy[..filled].copy_from_slice(old_bytes);
            }
            copy[start..start + bytes.len()].copy_from_slice(bytes);
            let filled = filled.max(start + bytes.len());
            let filled = Arc::new(FillBuf::from_buf(copy, filled));
            let frame = Frame::new(&ino.frames, region, 0, filled, true);
            tail.replace_whole(ino, &frame);
            frame.release_dirty();
            return Ok(());
        }
        for (piece, i) in bytes.chunks(FRAME_MAX).zip(0..) {
            let mut copy = DmaBuf::zeroed(piece.len().next_multiple_of(PAGE))?;
            copy[..piece.len()].copy_from_slice(piece);
            let fill = Arc::new(FillBuf::from_buf(copy, piece.len()));
            let frame = Frame::new(&ino.frames, region, start + i * FRAME_MAX, fill, true);
            ino.frames.replace_pages(&frame);
            frame.release_dirty();
        }
        Ok(())
    }
}
