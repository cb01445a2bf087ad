//! Making files durable: data first, then the length.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::core::Core;
use super::error::Result;
use super::inode::{Inode, now_ns, xattr};

impl Core {
    /// Data and length of the file are durable on return.
    ///
    /// The bytes not yet on their way are written, with FUA if they are all that the device may
    /// still hold in a volatile cache, else followed by one flush that concurrent syncs share;
    /// then the blob's root page with the new length. Nothing is written when nothing changed.
    ///
    /// # Errors
    /// On a failed write the bytes stay in memory, and the next sync sends them again.
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
        if self.needs_flush(ino) {
            self.flush_upto(ino.unflushed.load(Ordering::Acquire))?;
        }
        if target != ino.durable_len.load(Ordering::Acquire)
            && !ino.unlinked.load(Ordering::Acquire)
        {
            self.commit_length(ino, target)?;
        }
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
