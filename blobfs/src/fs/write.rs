//! Writes that are no appends: overwriting, gaps, truncation, allocation.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pumice_bdev::DmaBuf;

use super::core::{Core, Unallocated};
use super::error::{FsError, Result};
use super::fill::FillBuf;
use super::frame::{Frame, PAGE, REGION, split};
use super::inode::{Inode, now_ns, xattr};
use super::tail::{Tail, tail_buffer};
use crate::blobstore::ClusterInit;

/// A gap up to this goes through the tail buffer as zeroes; a longer one is zeroed by the device.
const GAP_COPY_MAX: u64 = 4 << 20;

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
        if ino.frozen {
            return Err(FsError::ReadOnly { path: ino.path() });
        }
        let end = off
            .checked_add(data.len() as u64)
            .ok_or_else(|| FsError::invalid(&ino.path(), "a file longer than 2^64 bytes"))?;
        if data.is_empty() {
            return Ok(());
        }
        self.reserve(ino, &mut tail, end, false)?;
        tail.overwritten |= off < ino.durable_len.load(Ordering::Acquire);
        if off > len {
            self.extend_zeroed(ino, &mut tail, off)?;
            return self.append_locked(ino, &mut tail, data);
        }
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
        // All of the region: its frame is replaced by one that counts as written.
        let base = off / REGION as u64 * REGION as u64;
        self.wait_overlapping(tail, base, base + REGION as u64);
        if let Some(e) = self.write_error(ino, tail) {
            return Err(e);
        }
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
        let bytes = Arc::new(FillBuf::from_buf(buf, total));
        let slice = bytes.dma(0..total);
        let map = ino.extents.load_full();
        match self.write_ops(&map, from, std::slice::from_ref(&slice), false) {
            Ok(ops) => self
                .run_ops(ops)
                .map_err(|e| FsError::io(format!("{}: writing at offset {off}", ino.path()), e))?,
            Err(Unallocated) => ino
                .blob()?
                .write_at(from, slice, false)
                .map_err(|e| self.store_error(ino.path(), e))?,
        }
        let seq = self.writes.seq.fetch_add(1, Ordering::AcqRel) + 1;
        tail.needs_flush(ino, seq);
        let (region, start) = split(from);
        if let Some(old) = ino.frames.whole(region) {
            let filled = old.bytes.filled();
            let mut copy = DmaBuf::new(old.bytes.cap())?;
            if let Some(old_bytes) = old.bytes.get(0..filled) {
                copy[..filled].copy_from_slice(old_bytes);
            }
            let at = split(off).1;
            copy[at..at + data.len()].copy_from_slice(data);
            let filled = Arc::new(FillBuf::from_buf(copy, filled.max(at + data.len())));
            let frame = Frame::new(&ino.frames, region, 0, filled, true);
            ino.frames.install_whole(&frame);
            frame.release_dirty();
        } else {
            // The frame shows no more of the last page than the file has.
            let mut shown = DmaBuf::new(total)?;
            shown.copy_from_slice(bytes.get(0..total).unwrap_or_default());
            let frame = Frame::new(
                &ino.frames,
                region,
                start,
                Arc::new(FillBuf::from_buf(shown, have)),
                true,
            );
            ino.frames.replace_pages(&frame);
            frame.release_dirty();
        }
        Ok(())
    }

    /// Makes the file `to` bytes long; the new bytes are zeroes.
    fn extend_zeroed(&self, ino: &Arc<Inode>, tail: &mut Tail, to: u64) -> Result<()> {
        let len = ino.len();
        self.reserve(ino, tail, to, false)?;
        let gap = to - len;
        let small = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        if gap <= GAP_COPY_MAX || ino.thin {
            return self.append_zeroes_long(ino, tail, gap);
        }
        let region = REGION as u64;
        let head = len.next_multiple_of(region) - len;
        self.append_zeroes(ino, tail, small(head))?;
        self.flush_tail(ino, tail)?;
        let from = len + head;
        let upto = to / region * region;
        let seq = self.zero_range(ino, from, upto - from)?;
        tail.needs_flush(ino, seq);
        ino.len.store(upto, Ordering::Release);
        tail.submitted = upto;
        self.append_zeroes(ino, tail, small(to - upto))
    }

    fn append_zeroes_long(&self, ino: &Arc<Inode>, tail: &mut Tail, mut n: u64) -> Result<()> {
        while n > 0 {
            let now = n.min(REGION as u64);
            self.append_zeroes(ino, tail, usize::try_from(now).unwrap_or(REGION))?;
            n -= now;
        }
        Ok(())
    }

    /// Hands everything to the device and closes the tail buffer, without waiting.
    fn flush_tail(&self, ino: &Arc<Inode>, tail: &mut Tail) -> Result<()> {
        self.submit_upto(ino, tail, ino.len(), false)?;
        self.close_buffer(tail);
        Ok(())
    }

    /// Sets the length. A shorter one is durable on return, since the clusters behind it, and the
    /// bytes of its last block, may be used again at once.
    pub fn truncate(&self, ino: &Arc<Inode>, new_len: u64) -> Result<()> {
        let _one = ino.sync_lock.lock();
        let mut tail = ino.tail.lock();
        self.check_writable(|| ino.path())?;
        if ino.frozen {
            return Err(FsError::ReadOnly { path: ino.path() });
        }
        let len = ino.len();
        if new_len >= len {
            if new_len > len {
                self.extend_zeroed(ino, &mut tail, new_len)?;
            }
            return Ok(());
        }
        self.wait_overlapping(&tail, 0, u64::MAX);
        tail.prune(ino);
        if let Some(e) = self.write_error(ino, &tail) {
            return Err(e);
        }
        // What the tail's region keeps has to be at hand before anything is cut.
        let (region, kept) = split(new_len);
        let mut head = DmaBuf::new(kept.max(1))?;
        self.read_exact(ino, new_len - kept as u64, &mut head[..kept])?;
        let old_durable = ino.durable_len.load(Ordering::Acquire);
        let old_submitted = tail.submitted;
        let buffer = if kept > 0 {
            Some(tail_buffer(new_len, &head[..kept])?)
        } else {
            None
        };
        // From here on no reader starts on what is cut, and one that is at it reads again.
        ino.len.store(new_len, Ordering::Release);
        ino.epoch.fetch_add(1, Ordering::AcqRel);
        if old_durable > new_len || tail.allocated > new_len.next_multiple_of(self.cluster) {
            let clusters = new_len.div_ceil(self.cluster);
            let durable = old_durable.min(new_len);
            let mut tx = self.store.transaction();
            tx.set_xattr(ino.id, xattr::LENGTH, &durable.to_le_bytes());
            tx.set_xattr(ino.id, xattr::MTIME, &now_ns().to_le_bytes());
            if !ino.thin {
                tx.resize_with(ino.id, clusters, ClusterInit::CallerWrites);
            }
            if let Err(e) = tx.commit() {
                ino.len.store(len, Ordering::Release);
                return Err(self.store_error(format!("{}: truncate to {new_len}", ino.path()), e));
            }
            let clusters = if ino.thin {
                tail.allocated / self.cluster
            } else {
                clusters
            };
            self.resized(ino, &mut tail, clusters);
            ino.durable_len.store(durable, Ordering::Release);
        }
        self.drop_buffer(&mut tail);
        tail.submitted = old_submitted.min(new_len);
        match buffer {
            Some(buffer) => {
                self.set_buffer(ino, &mut tail, new_len, buffer);
                ino.frames.remove_from(region + 1);
            }
            None => ino.frames.remove_from(region),
        }
        ino.mtime_ns.store(now_ns(), Ordering::Relaxed);
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
        if ino.thin {
            return Ok(());
        }
        self.reserve(ino, &mut tail, end, true)?;
        tail.reserved = true;
        Ok(())
    }
}
