//! The length of a file and its space: truncation and allocation.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pumice_bdev::DmaBuf;

use super::append::{Appender, TOO_LONG};
use super::buffers::{Buffers, tail_buffer};
use super::error::{FsError, Result};
use super::frame::{LONGEST, split};
use super::inode::{Inode, now_ns, xattr};
use super::read::Reader;
use super::space::Space;
use super::tail::Tail;
use super::volume::Volume;
use super::writeback::Writeback;
use crate::blobstore::{ClusterInit, Error as StoreError, Spend};

/// Sets lengths and allocates space.
pub(crate) struct Truncater {
    pub vol: Arc<Volume>,
    pub reader: Arc<Reader>,
    pub writeback: Arc<Writeback>,
    pub space: Arc<Space>,
    pub buffers: Arc<Buffers>,
    pub appender: Arc<Appender>,
}

impl Truncater {
    /// Sets the length. A shorter one is durable on return, since the clusters behind it, and the
    /// bytes of its last block, may be used again at once.
    pub fn truncate(&self, ino: &Arc<Inode>, new_len: u64) -> Result<()> {
        let mut room = self.appender.recorder.room(0);
        let _one = ino.syncs.hold_off();
        let mut tail = ino.tail.lock();
        self.vol.check_writable(|| ino.path())?;
        if ino.is_frozen() {
            return Err(FsError::ReadOnly { path: ino.path() });
        }
        let len = ino.len();
        if new_len >= len {
            self.appender
                .append_after_gap(ino, &mut tail, new_len, &[])?;
            room.note(ino, &mut tail, len, new_len, &[]);
        } else if new_len > LONGEST {
            return Err(FsError::invalid(&ino.path(), TOO_LONG));
        } else {
            room.note_cutting(ino, &mut tail, new_len);
            self.shorten(ino, &mut tail, new_len)?;
            room.note_cut(ino, &mut tail, new_len);
        }
        Ok(())
    }

    /// Truncates the file. Bytes of the removed part that could not be written do not matter.
    fn shorten(&self, ino: &Arc<Inode>, tail: &mut Tail, new_len: u64) -> Result<()> {
        // The removed part may belong to another file at once, so no write to it may be in flight.
        self.writeback.wait_overlapping(tail, new_len, u64::MAX);
        tail.prune(ino);
        let cuts_owed = match ino.settle() {
            Ok(()) => false,
            // Bytes that are cut off need no place.
            Err(_) if ino.blob()?.owed_from().is_some_and(|from| from >= new_len) => true,
            Err(error) => return Err(error),
        };
        let len = ino.len();
        // The bytes that the tail's region keeps have to be available before anything is removed.
        let (region, kept) = split(new_len);
        let mut head = DmaBuf::new(kept.max(1))?;
        self.reader
            .read_exact(ino, new_len - kept as u64, &mut head[..kept])?;
        let buffer = if kept > 0 {
            Some(tail_buffer(new_len, &head[..kept])?)
        } else {
            None
        };
        // Behind this nothing may fail: the shorter length is durable.
        if cuts_owed {
            self.shorten_without_owed(ino, new_len)?;
        }
        // From here on no reader starts on the removed part, and one that has started reads again.
        ino.len.store(new_len, Ordering::Release);
        ino.epoch.fetch_add(1, Ordering::AcqRel);
        match self.commit_shorter(ino, tail, new_len) {
            Ok(()) => {}
            // The length is durable. The clusters are freed later.
            Err(error) if cuts_owed => {
                tracing::warn!(file = ino.path(), %error, "clusters behind the end were not freed");
                tail.grown = true;
            }
            Err(error) => {
                ino.len.store(len, Ordering::Release);
                return Err(error);
            }
        }
        let supplied_from = match tail.is_tail(region) {
            true => tail.supplied_from.min(new_len),
            false => new_len,
        };
        tail.drop_buffer();
        // A failed write that began before the new end: its bytes are in the buffer.
        let cut = tail.take_beyond(new_len);
        let begun = cut.iter().map(|p| p.from).min().unwrap_or(new_len);
        tail.submitted = tail.submitted.min(begun).min(new_len);
        tail.supplied_from = supplied_from;
        tail.cut_unflushed(new_len);
        tail.reserved = false;
        ino.started.store(tail.submitted, Ordering::Relaxed);
        match buffer {
            Some(buffer) => {
                self.buffers.set_buffer(ino, tail, new_len, buffer);
                ino.frames.remove_from(region + 1);
            }
            None => ino.frames.remove_from(region),
        }
        ino.own.lock().untime();
        ino.mtime_ns.store(now_ns(), Ordering::Relaxed);
        tail.check(new_len);
        Ok(())
    }

    /// Makes a shorter length durable for a file whose bytes in the journal cannot be put in place, all of which are behind it,
    /// and only then gives them up.
    fn shorten_without_owed(&self, ino: &Inode, new_len: u64) -> Result<()> {
        let durable = ino.durable_len.load(Ordering::Acquire).min(new_len);
        let mut tx = self.vol.store.transaction();
        tx.spend(Spend::Releasing);
        tx.set_xattr(ino.id, xattr::LENGTH, &durable.to_le_bytes());
        tx.commit().map_err(|e| {
            self.vol
                .store_error(format!("{}: truncate to {new_len}", ino.path()), e)
        })?;
        ino.durable_len.store(durable, Ordering::Release);
        let mut tx = self.vol.store.transaction();
        tx.give_up_owed(ino.id);
        if let Err(error) = tx.commit() {
            tracing::warn!(file = ino.path(), %error, "bytes behind the end stay in the journal");
        }
        Ok(())
    }

    /// Makes a shorter length durable and frees the clusters behind it. The length on the device
    /// does not grow: it covers only what was durable before.
    fn commit_shorter(&self, ino: &Arc<Inode>, tail: &mut Tail, new_len: u64) -> Result<()> {
        let old_durable = ino.durable_len.load(Ordering::Acquire);
        // A commit whose outcome is open may have made another length durable.
        let is_known = !self.vol.store.is_stopped();
        let fits = tail.allocated <= new_len.next_multiple_of(self.vol.cluster);
        if is_known && old_durable <= new_len && fits {
            return Ok(());
        }
        let durable = old_durable.min(new_len);
        let have = tail.allocated / self.vol.cluster;
        let wanted = if ino.is_thin() {
            have
        } else {
            new_len.div_ceil(self.vol.cluster)
        };
        let commit = |clusters: u64| {
            let mut tx = self.vol.store.transaction();
            tx.spend(Spend::Releasing);
            tx.set_xattr(ino.id, xattr::LENGTH, &durable.to_le_bytes());
            tx.set_xattr(ino.id, xattr::MTIME, &now_ns().to_le_bytes());
            if clusters != have {
                tx.resize_with(ino.id, clusters, ClusterInit::CallerWrites);
            }
            tx.commit().map(|_| clusters)
        };
        let committed = match commit(wanted) {
            // Without a page for the shorter map the file keeps the clusters.
            Err(StoreError::NoMdPages { .. }) => {
                tail.grown = true;
                commit(have)
            }
            result => result,
        };
        let clusters = committed.map_err(|e| {
            self.vol
                .store_error(format!("{}: truncate to {new_len}", ino.path()), e)
        })?;
        self.space.resized(ino, tail, clusters);
        ino.durable_len.store(durable, Ordering::Release);
        Ok(())
    }

    /// Allocates clusters for `[off, off + len)` and everything before, without changing the
    /// length.
    pub fn allocate(&self, ino: &Arc<Inode>, off: u64, len: u64) -> Result<()> {
        let mut tail = ino.tail.lock();
        self.vol.check_writable(|| ino.path())?;
        if ino.is_frozen() {
            return Err(FsError::ReadOnly { path: ino.path() });
        }
        let end = off
            .checked_add(len)
            .ok_or_else(|| FsError::invalid(&ino.path(), "a file longer than 2^64 bytes"))?;
        if ino.is_thin() {
            return Ok(());
        }
        self.space.reserve(ino, &mut tail, end, true)?;
        // They are kept until the last handle is closed or the file is truncated.
        tail.reserved = true;
        Ok(())
    }
}
