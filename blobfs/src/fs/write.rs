//! Writes that are no appends: overwriting, truncation, allocation.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use pumice_bdev::{DmaBuf, DmaSlice};

use super::core::Core;
use super::error::{FsError, Result};
use super::fill::FillBuf;
use super::frame::{Frame, PAGE, REGION, split};
use super::inode::{Inode, now_ns, xattr};
use super::read::FRAME_MAX;
use super::tail::{Tail, tail_buffer};
use crate::blobstore::{ClusterInit, Error as StoreError, Spend};

impl Core {
    /// Writes `data` at `off`. Past the end a gap becomes zeroes. Bytes inside the file are
    /// written through to the device, unless they are still in the tail buffer.
    pub fn write_at(&self, ino: &Arc<Inode>, off: u64, data: &[u8]) -> Result<()> {
        let mut tail = ino.tail.lock();
        let len = ino.len();
        if off == len {
            return self.append_locked(ino, &mut tail, data);
        }
        self.check_writable(|| ino.path())?;
        if ino.is_frozen() {
            return Err(FsError::ReadOnly { path: ino.path() });
        }
        let end = off
            .checked_add(data.len() as u64)
            .ok_or_else(|| FsError::invalid(&ino.path(), "a file longer than 2^64 bytes"))?;
        if data.is_empty() {
            return Ok(());
        }
        if off > len {
            return self.append_after_gap(ino, &mut tail, off, data);
        }
        self.reserve(ino, &mut tail, end, false)?;
        let inside = usize::try_from(len - off)
            .unwrap_or(usize::MAX)
            .min(data.len());
        let mut done = 0;
        while done < inside {
            let at = off + done as u64;
            let (region, in_region) = split(at);
            let n = (REGION - in_region).min(inside - done);
            let piece = &data[done..done + n];
            if tail.is_tail(region) {
                self.patch_buffer(ino, &mut tail, at, piece)?;
                tail.stop_fast_path();
            } else {
                self.overwrite(ino, &mut tail, at, piece)?;
            }
            done += n;
        }
        ino.mtime_ns.store(now_ns(), Ordering::Relaxed);
        if inside < data.len() {
            self.append_locked(ino, &mut tail, &data[inside..])
        } else {
            Ok(())
        }
    }

    /// Replaces bytes of one region that is not the tail: device first, then cache.
    fn overwrite(&self, ino: &Arc<Inode>, tail: &mut Tail, off: u64, data: &[u8]) -> Result<()> {
        let page = PAGE as u64;
        let end = off + data.len() as u64;
        let from = off / page * page;
        let upto = end.next_multiple_of(page);
        // All of the region: its frame is replaced by one that counts as written. What has failed is
        // sent again first.
        let base = off / REGION as u64 * REGION as u64;
        self.settle_overlapping(ino, tail, base, base + REGION as u64)?;
        tail.prune(ino);
        let len = ino.len();
        let have = usize::try_from(upto.min(len) - from).unwrap_or(0);
        let total = usize::try_from(upto - from).unwrap_or(0);
        let mut buf = DmaBuf::new(total)?;
        buf[have..].fill(0);
        let skip = usize::try_from(off - from).unwrap_or(0);
        if skip > 0 {
            self.read_exact(ino, from, &mut buf[..skip])?;
        }
        if skip + data.len() < have {
            self.read_exact(ino, end, &mut buf[skip + data.len()..have])?;
        }
        buf[skip..skip + data.len()].copy_from_slice(data);
        let slice = buf.freeze();
        let begun = self.writes.begin();
        let written = self.write_through(ino, from, &slice);
        // Also after an error: a part may be in the device's cache.
        let supplied = if written.is_ok() { off..end } else { off..off };
        let seq = self.writes.completed(begun);
        tail.note_written(ino, from..upto, supplied, seq);
        if written.is_err() || self.show(ino, tail, from, &slice[..have]).is_err() {
            // The cache no longer says what the device has, and nothing in it is unwritten.
            ino.frames.forget_region(split(base).0);
        }
        written
    }

    /// Writes whole blocks of a file and waits.
    fn write_through(&self, ino: &Arc<Inode>, from: u64, slice: &DmaSlice) -> Result<()> {
        let result = Arc::new(Mutex::new(Ok(())));
        let slot = Arc::clone(&result);
        let done = move |written| *slot.lock() = written;
        let ticket = ino
            .blob()?
            .start_write(from, std::slice::from_ref(slice), false, done)
            .map_err(|e| self.store_error(ino.path(), e))?;
        self.shared().wait(&ticket);
        std::mem::replace(&mut *result.lock(), Ok(()))
            .map_err(|e| FsError::io(format!("{}: writing at offset {from}", ino.path()), e))
    }

    /// Shows `bytes`, whole pages at `from` that have been written, in the cache; the last page may
    /// be cut short by the end of the file.
    ///
    /// # Errors
    /// There is no memory for it; the cache may then show a part.
    fn show(&self, ino: &Arc<Inode>, tail: &Tail, from: u64, bytes: &[u8]) -> Result<()> {
        let (region, start) = split(from);
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

    /// Sets the length. A shorter one is durable on return, since the clusters behind it, and the
    /// bytes of its last block, may be used again at once.
    pub fn truncate(&self, ino: &Arc<Inode>, new_len: u64) -> Result<()> {
        let _one = ino.sync_lock.lock();
        let mut tail = ino.tail.lock();
        self.check_writable(|| ino.path())?;
        if ino.is_frozen() {
            return Err(FsError::ReadOnly { path: ino.path() });
        }
        if new_len >= ino.len() {
            self.append_after_gap(ino, &mut tail, new_len, &[])
        } else {
            self.shorten(ino, &mut tail, new_len)
        }
    }

    /// Cuts the file. What could not be written of the part that goes is of no interest any more.
    fn shorten(&self, ino: &Arc<Inode>, tail: &mut Tail, new_len: u64) -> Result<()> {
        // What is cut may be another file's at once: no write may be on its way there.
        self.wait_overlapping(tail, new_len, u64::MAX);
        tail.prune(ino);
        let len = ino.len();
        // What the tail's region keeps has to be at hand before anything is cut.
        let (region, kept) = split(new_len);
        let mut head = DmaBuf::new(kept.max(1))?;
        self.read_exact(ino, new_len - kept as u64, &mut head[..kept])?;
        let buffer = if kept > 0 {
            Some(tail_buffer(new_len, &head[..kept])?)
        } else {
            None
        };
        // From here on no reader starts on what is cut, and one that is at it reads again.
        ino.len.store(new_len, Ordering::Release);
        ino.epoch.fetch_add(1, Ordering::AcqRel);
        if let Err(e) = self.commit_shorter(ino, tail, new_len) {
            ino.len.store(len, Ordering::Release);
            return Err(e);
        }
        let supplied_from = match tail.is_tail(region) {
            true => tail.supplied_from.min(new_len),
            false => new_len,
        };
        self.drop_buffer(tail);
        // A write that has failed and began before the cut: its bytes are in the buffer.
        let cut = tail.take_beyond(new_len);
        let begun = cut.iter().map(|p| p.from).min().unwrap_or(new_len);
        tail.submitted = tail.submitted.min(begun).min(new_len);
        tail.supplied_from = supplied_from;
        tail.cut_unflushed(new_len);
        tail.reserved = false;
        ino.started.store(tail.submitted, Ordering::Relaxed);
        match buffer {
            Some(buffer) => {
                self.set_buffer(ino, tail, new_len, buffer);
                ino.frames.remove_from(region + 1);
            }
            None => ino.frames.remove_from(region),
        }
        ino.mtime_ns.store(now_ns(), Ordering::Relaxed);
        tail.check(new_len);
        Ok(())
    }

    /// Makes a shorter length durable and gives the clusters behind it back. The length on the device
    /// does not grow: it covers only what was durable before.
    fn commit_shorter(&self, ino: &Arc<Inode>, tail: &mut Tail, new_len: u64) -> Result<()> {
        let old_durable = ino.durable_len.load(Ordering::Acquire);
        if old_durable <= new_len && tail.allocated <= new_len.next_multiple_of(self.cluster) {
            return Ok(());
        }
        let durable = old_durable.min(new_len);
        let have = tail.allocated / self.cluster;
        let wanted = if ino.is_thin() {
            have
        } else {
            new_len.div_ceil(self.cluster)
        };
        let commit = |clusters: u64| {
            let mut tx = self.store.transaction();
            tx.spend(Spend::Releasing);
            tx.set_xattr(ino.id, xattr::LENGTH, &durable.to_le_bytes());
            tx.set_xattr(ino.id, xattr::MTIME, &now_ns().to_le_bytes());
            if clusters != have {
                tx.resize_with(ino.id, clusters, ClusterInit::CallerWrites);
            }
            tx.commit().map(|_| clusters)
        };
        let committed = match commit(wanted) {
            // Without a page for the shorter map the clusters stay, ahead of the file.
            Err(StoreError::NoMdPages { .. }) => {
                tail.grown = true;
                commit(have)
            }
            result => result,
        };
        let clusters = committed
            .map_err(|e| self.store_error(format!("{}: truncate to {new_len}", ino.path()), e))?;
        self.resized(ino, tail, clusters);
        ino.durable_len.store(durable, Ordering::Release);
        Ok(())
    }

    /// Allocates clusters for `[off, off + len)` and everything before, without a change of the
    /// length.
    pub fn allocate(&self, ino: &Arc<Inode>, off: u64, len: u64) -> Result<()> {
        self.check_writable(|| ino.path())?;
        let end = off
            .checked_add(len)
            .ok_or_else(|| FsError::invalid(&ino.path(), "a file longer than 2^64 bytes"))?;
        let mut tail = ino.tail.lock();
        if ino.is_thin() {
            return Ok(());
        }
        self.reserve(ino, &mut tail, end, true)?;
        // Kept until the last handle is closed or the file is cut.
        tail.reserved = true;
        Ok(())
    }
}
