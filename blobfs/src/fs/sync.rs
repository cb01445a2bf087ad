//! Making files durable: data first, then the length.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::core::Core;
use super::error::Result;
use super::inode::{Inode, now_ns, xattr};
use super::tail::Tail;

impl Core {
    /// Data and length of the file are durable on return.
    ///
    /// The bytes not yet on their way are written, with FUA if they are all that the device may
    /// still hold in a volatile cache, else followed by one flush that concurrent syncs share;
    /// then the blob's root page with the new length. Nothing is written when nothing changed.
    ///
    /// # Errors
    /// On a failed write the bytes stay in memory, and the next sync sends them again. After a failed
    /// flush it does so with what is still in the append buffer; where that is not all, it and each
    /// later sync of the file fail, since nobody knows what the device has kept.
    pub fn sync(&self, ino: &Arc<Inode>) -> Result<()> {
        self.check_mounted(|| ino.path())?;
        self.sync_inner(ino)
    }

    /// As [`Core::sync`], also while unmounting.
    pub fn sync_inner(&self, ino: &Arc<Inode>) -> Result<()> {
        if self.opts.read_only {
            return Ok(());
        }
        let _one = ino.sync_lock.lock();
        let (target, pending) = {
            let mut tail = ino.tail.lock();
            tail.prune(ino);
            self.resend_doubtful(ino, &mut tail)?;
            self.resend_failed(ino, &tail)?;
            let target = ino.len();
            let others = !tail.pending.is_empty() || self.needs_flush(ino);
            let fua = self.write_cache && self.fua && !others;
            self.submit_upto(ino, &mut tail, target, fua)?;
            (target, tail.pending.clone())
        };
        if !pending.is_empty() {
            for p in &pending {
                self.wait_pending(p);
            }
            let mut tail = ino.tail.lock();
            tail.prune(ino);
            if let Some(e) = self.write_error(ino, &tail) {
                return Err(e);
            }
        }
        let upto = ino.unflushed.load(Ordering::Acquire);
        if self.needs_flush(ino) {
            self.flush_upto(upto)?;
        }
        self.flushed_upto(ino, upto)?;
        if target != ino.durable_len.load(Ordering::Acquire)
            && !ino.unlinked.load(Ordering::Acquire)
        {
            self.commit_length(ino, target)?;
        }
        Ok(())
    }

    /// A flush covers the file's writes up to `upto`; but if one has failed that was to cover some of
    /// them, they are in doubt.
    fn flushed_upto(&self, ino: &Inode, upto: u64) -> Result<()> {
        if !self.write_cache {
            return Ok(());
        }
        let mut tail = ino.tail.lock();
        if tail.unflushed_from > upto {
            return Ok(());
        }
        if let Some(e) = self.doubt(tail.unflushed_from, upto) {
            return Err(e);
        }
        tail.unflushed_from = if ino.unflushed.load(Ordering::Acquire) > upto {
            upto + 1
        } else {
            u64::MAX
        };
        tail.overwritten = false;
        Ok(())
    }

    /// After a failed flush: what the file wrote since its last sync goes to the device again, if
    /// all of it is in the append buffer.
    fn resend_doubtful(&self, ino: &Inode, tail: &mut Tail) -> Result<()> {
        if !self.write_cache || tail.unflushed_from == u64::MAX {
            return Ok(());
        }
        let upto = ino.unflushed.load(Ordering::Acquire);
        let Some(e) = self.doubt(tail.unflushed_from, upto) else {
            return Ok(());
        };
        let durable = ino.durable_len.load(Ordering::Acquire);
        if tail.overwritten || !tail.buffer_begins_below(durable) {
            return Err(e);
        }
        self.wait_overlapping(tail, 0, u64::MAX);
        tail.submitted = tail.submitted.min(durable);
        tail.unflushed_from = u64::MAX;
        Ok(())
    }

    fn needs_flush(&self, ino: &Inode) -> bool {
        self.write_cache
            && ino.unflushed.load(Ordering::Acquire) > self.flushed.load(Ordering::Acquire)
    }

    /// Writes the root with the length `len`, whose bytes are durable. A file that was written in
    /// one go gives back what was allocated ahead, in the same commit.
    fn commit_length(&self, ino: &Arc<Inode>, len: u64) -> Result<()> {
        let mut tail = ino.tail.lock();
        tail.syncs = tail.syncs.saturating_add(1);
        let needed = len.div_ceil(self.cluster);
        let trim = tail.syncs == 1
            && !tail.reserved
            && !ino.thin
            && ino.len() == len
            && tail.allocated / self.cluster > needed;
        let mut tx = self.store.transaction();
        let mtime = now_ns();
        tx.set_xattr(ino.id, xattr::LENGTH, &len.to_le_bytes());
        tx.set_xattr(ino.id, xattr::MTIME, &mtime.to_le_bytes());
        let commit = |tx: crate::blobstore::Transaction| {
            tx.commit()
                .map_err(|e| self.store_error(format!("{}: sync", ino.path()), e))
        };
        if trim {
            tx.resize(ino.id, needed);
            commit(tx)?;
            self.resized(ino, &mut tail, needed);
        } else {
            drop(tail);
            commit(tx)?;
        }
        ino.durable_len.store(len, Ordering::Release);
        ino.mtime_ns.store(mtime, Ordering::Relaxed);
        Ok(())
    }
}
