//! Making files durable: data first, then the length; or both at once, in the journal.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::attributes::Moment;
use super::buffers::Buffers;
use super::error::Result;
use super::inode::{Inode, Life, now_ns, xattr};
use super::shm_log::ShmLog;
use super::space::Space;
use super::tail::Tail;
use super::volume::Volume;
use super::writeback::{Pending, Writeback, failure};
use crate::blobstore::{BeginCarry, Carrying, Error as StoreError, Persist, Spend, Transaction};

/// Most bytes of an append that the journal carries. Carried bytes are written twice, so a longer
/// append, whose second write takes longer than the wait that it saves, goes to its place at once
/// (measured: `docs/journal.md`).
const CARRY_MAX: u64 = 64 << 10;

/// An append that the journal is going to carry.
struct Append {
    carrying: Carrying,
    from: u64,
    bytes: Vec<u8>,
    /// [`Tail::lowered`] at its beginning.
    lowered: u64,
    /// The attributes then.
    moment: Moment,
}

/// Makes files durable.
pub(crate) struct Syncer {
    pub vol: Arc<Volume>,
    pub writeback: Arc<Writeback>,
    pub space: Arc<Space>,
    pub buffers: Arc<Buffers>,
    pub log: Arc<ShmLog>,
}

impl Syncer {
    /// Makes data and length of the file durable. Threads that wait for a sync under way share the
    /// next one.
    ///
    /// Bytes that were not submitted yet are written, with FUA if they are all that the device may
    /// still have in a volatile cache, otherwise followed by one flush that concurrent syncs share.
    /// Then the blob's root page is written with the new length. Nothing is written when nothing
    /// changed.
    ///
    /// On a store with a journal, a short append to a file whose earlier bytes are durable is in the
    /// same write to the journal as the length. A checkpoint puts it in place.
    ///
    /// # Errors
    /// After a failed write the bytes stay in memory, and the next sync sends them again. After a
    /// failed flush it sends what is still in the append buffer. If that is not all, it and each
    /// later sync of the file fail, since it is unknown what the device has kept.
    pub fn sync(&self, ino: &Arc<Inode>) -> Result<()> {
        self.vol.check_mounted(|| ino.path())?;
        self.sync_inner(ino)
    }

    /// Makes data and length durable, and leaves out attributes that were set if the length has not changed.
    ///
    /// # Errors
    /// Fails as [`Syncer::sync`] does.
    pub fn sync_data(&self, ino: &Arc<Inode>) -> Result<()> {
        self.vol.check_mounted(|| ino.path())?;
        self.sync_shared(ino)
    }

    /// Syncs as [`Syncer::sync`] does, also while unmounting.
    pub fn sync_inner(&self, ino: &Arc<Inode>) -> Result<()> {
        self.sync_shared(ino)?;
        if ino.own.lock().is_unwritten() {
            self.commit_attributes(ino)?;
        }
        Ok(())
    }

    fn sync_shared(&self, ino: &Arc<Inode>) -> Result<()> {
        if self.vol.opts.read_only {
            return Ok(());
        }
        let asked = ino.syncs.ask();
        ino.syncs.once_since(asked, || {
            let mark = self.log.mark();
            self.sync_now(ino)?;
            self.log.recorded(ino, mark);
            Ok(())
        })
    }

    /// Writes what the file has at this moment to its clusters, not durably, and tells the log in shared memory.
    ///
    /// # Errors
    /// Returns the device's error. The bytes stay in memory.
    pub fn place(&self, ino: &Arc<Inode>) -> Result<()> {
        self.vol.check_mounted(|| ino.path())?;
        // A truncation would come between the length and its entry.
        let _one = ino.syncs.hold_off();
        let mark = self.log.mark();
        let (len, pending) = {
            let mut tail = ino.tail.lock();
            tail.prune(ino);
            self.writeback.resend_failed(ino, &tail)?;
            let len = ino.len();
            self.buffers.submit_upto(ino, &mut tail, len, false)?;
            (len, tail.pending.clone())
        };
        self.wait_all(ino, &pending)?;
        self.log.placed(ino, mark, len);
        Ok(())
    }

    /// Makes durable what the file has at this moment. No other sync of the file is under way.
    fn sync_now(&self, ino: &Arc<Inode>) -> Result<()> {
        if self.sync_carried(ino)? {
            return Ok(());
        }
        let (target, pending) = {
            let mut tail = ino.tail.lock();
            tail.prune(ino);
            self.resend_doubtful(ino, &mut tail)?;
            self.writeback.resend_failed(ino, &tail)?;
            let target = ino.len();
            let others = !tail.pending.is_empty() || self.needs_flush(ino);
            let fua = self.vol.persist == Persist::Fua && !others;
            self.buffers.submit_upto(ino, &mut tail, target, fua)?;
            (target, tail.pending.clone())
        };
        self.wait_all(ino, &pending)?;
        let upto = ino.unflushed.load(Ordering::Acquire);
        if self.needs_flush(ino) {
            self.writeback.flush_upto(upto)?;
        }
        self.flushed_upto(ino, upto)?;
        if target != ino.durable_len.load(Ordering::Acquire)
            && !matches!(ino.life.load(), Life::Orphan | Life::Gone)
        {
            self.commit_length(ino, target)?;
        }
        Ok(())
    }

    /// Has the journal carry what was appended, together with the new length. Returns whether it did.
    fn sync_carried(&self, ino: &Arc<Inode>) -> Result<bool> {
        if !self.vol.store.carries() {
            return Ok(false);
        }
        let mut begun = self.begin_append(ino)?;
        // Only a sync that has something to carry waits for a checkpoint, without the append lock.
        if matches!(begun, BeginCarry::NoRoom) {
            if let Err(error) = self.vol.store.make_carry_room(CARRY_MAX) {
                tracing::warn!(%error, "the journal could not be emptied");
                return Ok(false);
            }
            begun = self.begin_append(ino)?;
        }
        let BeginCarry::Begun(append) = begun else {
            return Ok(false);
        };
        let target = append.from + append.bytes.len() as u64;
        let mtime = time_to_write(ino, append.moment);
        let mut tx = self.vol.store.transaction();
        tx.spend(Spend::Releasing);
        tx.set_xattr(ino.id, xattr::LENGTH, &target.to_le_bytes());
        stage_attributes(&mut tx, ino, mtime, append.moment);
        tx.carry(ino.id, append.from, &append.bytes);
        match tx.commit() {
            Ok(_) => {}
            // The blob is not one whose bytes can be carried.
            Err(StoreError::InvalidInput(_)) => return Ok(false),
            Err(e) => return Err(self.vol.store_error(format!("{}: sync", ino.path()), e)),
        }
        // The thread that has the append lock may wait for this.
        drop(append.carrying);
        let mut tail = ino.tail.lock();
        // What has become unsubmitted meanwhile stays so: the next sync writes it.
        if tail.lowered == append.lowered {
            tail.submitted = tail.submitted.max(target);
            ino.started.store(tail.submitted, Ordering::Relaxed);
        }
        ino.durable_len.store(target, Ordering::Release);
        show_time(ino, append.moment, mtime);
        Ok(true)
    }

    /// Returns what was appended since the last sync, if it is short, and nothing else of the file
    /// has to become durable. Most files are synced once and closed, which would cost a checkpoint,
    /// so the first sync is an ordinary one, unless the journal owes the file bytes: that waits for them.
    fn begin_append(&self, ino: &Arc<Inode>) -> Result<BeginCarry<Append>> {
        let mut tail = ino.tail.lock();
        tail.prune(ino);
        let (from, target) = (tail.submitted, ino.len());
        let len = target - from;
        let moment = ino.own.lock().moment(target);
        let is_append = (tail.syncs > 0 || ino.blob()?.owed_from().is_some())
            && from >= ino.durable_len.load(Ordering::Acquire)
            && tail.pending.is_empty()
            && tail.unflushed.is_empty()
            && ino.life.load() == Life::Named;
        if !is_append || !(1..=CARRY_MAX).contains(&len) || ino.is_thin() || ino.is_frozen() {
            return Ok(BeginCarry::Refused);
        }
        let (Some(frame), base) = (tail.holding(from, target).cloned(), tail.base()) else {
            return Err(ino.lost(from, target));
        };
        if !self.space.host_has_room_to_carry() {
            return Ok(BeginCarry::Refused);
        }
        let carrying = match ino.blob()?.begin_carry(len) {
            BeginCarry::Begun(carrying) => carrying,
            BeginCarry::NoRoom => return Ok(BeginCarry::NoRoom),
            BeginCarry::Refused => return Ok(BeginCarry::Refused),
        };
        tail.syncs = tail.syncs.saturating_add(1);
        let at = |off: u64| usize::try_from(off - base).unwrap_or(usize::MAX);
        let bytes = frame.bytes.get(at(from)..at(target));
        Ok(BeginCarry::Begun(Append {
            carrying,
            from,
            bytes: bytes.expect("the buffer holds what was appended").to_vec(),
            lowered: tail.lowered,
            moment,
        }))
    }

    /// Waits until all of these writes have completed. Another thread may send one again meanwhile.
    fn wait_all(&self, ino: &Arc<Inode>, pending: &[Arc<Pending>]) -> Result<()> {
        if pending.is_empty() {
            return Ok(());
        }
        loop {
            for p in pending {
                self.writeback.wait_pending(p);
            }
            let mut tail = ino.tail.lock();
            if let Some(failed) = pending.iter().find(|p| p.has_failed()) {
                tail.prune(ino);
                return Err(failure(ino, failed));
            }
            if pending.iter().all(|p| p.landed().is_some()) {
                tail.prune(ino);
                return Ok(());
            }
        }
    }

    /// Records that a flush covers the file's writes up to `upto`. If an earlier flush of some of
    /// them has failed, they stay in doubt.
    fn flushed_upto(&self, ino: &Inode, upto: u64) -> Result<()> {
        if self.vol.persist == Persist::Completion {
            return Ok(());
        }
        let mut tail = ino.tail.lock();
        let mut covered = tail.unflushed.iter().filter(|(_, s)| *s.start() <= upto);
        if let Some(e) = covered.find_map(|(_, seqs)| self.writeback.writes.doubt(&seqs)) {
            return Err(e);
        }
        drop(covered);
        tail.unflushed.flushed(upto);
        Ok(())
    }

    /// After a failed flush, sends what is in doubt again, if all of it is in the append buffer as
    /// the writer supplied it.
    fn resend_doubtful(&self, ino: &Inode, tail: &mut Tail) -> Result<()> {
        let in_doubt = |(range, seqs)| Some((range, self.writeback.writes.doubt(&seqs)?));
        let doubtful: Vec<_> = tail.unflushed.iter().filter_map(in_doubt).collect();
        let Some((first, error)) = doubtful.first() else {
            return Ok(());
        };
        if !tail.supplies(first.start) {
            return Err(error.clone().in_file(&ino.path(), first.start));
        }
        self.writeback.wait_overlapping(tail, 0, u64::MAX);
        tail.prune(ino);
        tail.submitted = tail.submitted.min(first.start);
        for (range, _) in doubtful {
            tail.unflushed.cut(range);
        }
        Ok(())
    }

    fn needs_flush(&self, ino: &Inode) -> bool {
        self.vol.persist != Persist::Completion
            && ino.unflushed.load(Ordering::Acquire) > self.writeback.writes.flushes.covered()
    }

    /// Writes the root with the length `len`, whose bytes are durable. For a file that was written
    /// in one go, frees what was allocated ahead in the same commit.
    fn commit_length(&self, ino: &Arc<Inode>, len: u64) -> Result<()> {
        let mut tail = ino.tail.lock();
        tail.syncs = tail.syncs.saturating_add(1);
        let needed = len.div_ceil(self.vol.cluster);
        let trim = tail.syncs == 1
            && !tail.reserved
            && !ino.is_thin()
            && ino.len() == len
            && tail.allocated / self.vol.cluster > needed;
        let moment = ino.own.lock().moment(len);
        let mtime = time_to_write(ino, moment);
        let commit = |clusters: Option<u64>| {
            let mut tx = self.vol.store.transaction();
            tx.spend(Spend::Releasing);
            tx.set_xattr(ino.id, xattr::LENGTH, &len.to_le_bytes());
            stage_attributes(&mut tx, ino, mtime, moment);
            if let Some(clusters) = clusters {
                tx.resize(ino.id, clusters);
            }
            tx.commit().map(drop)
        };
        let failed = |e| self.vol.store_error(format!("{}: sync", ino.path()), e);
        if trim {
            match commit(Some(needed)) {
                Ok(()) => self.space.resized(ino, &mut tail, needed),
                // Freeing is optional; the length is not.
                Err(StoreError::NoMdPages { .. }) => commit(None).map_err(failed)?,
                Err(e) => return Err(failed(e)),
            }
        } else {
            drop(tail);
            commit(None).map_err(failed)?;
        }
        ino.durable_len.store(len, Ordering::Release);
        show_time(ino, moment, mtime);
        Ok(())
    }

    /// Writes the attributes that were set, if the file still has a name.
    fn commit_attributes(&self, ino: &Arc<Inode>) -> Result<()> {
        let _one = ino.syncs.hold_off();
        let moment = {
            let own = ino.own.lock();
            if !own.is_unwritten() || matches!(ino.life.load(), Life::Orphan | Life::Gone) {
                return Ok(());
            }
            own.moment(ino.len())
        };
        let mtime = ino.mtime_ns.load(Ordering::Relaxed);
        let mut tx = self.vol.store.transaction();
        tx.spend(Spend::Releasing);
        stage_attributes(&mut tx, ino, mtime, moment);
        tx.commit().map_err(|e| {
            self.vol
                .store_error(format!("{}: attributes", ino.path()), e)
        })?;
        ino.own.lock().wrote(moment);
        Ok(())
    }
}

/// Returns the time to write with a length: the one that was set, or this moment.
fn time_to_write(ino: &Inode, moment: Moment) -> u64 {
    if moment.keeps_time {
        ino.mtime_ns.load(Ordering::Relaxed)
    } else {
        now_ns()
    }
}

/// Records that `moment` was written with the time `mtime`, and shows that time unless another was
/// set meanwhile. A thread that sets a time holds the same lock.
fn show_time(ino: &Inode, moment: Moment, mtime: u64) {
    let mut own = ino.own.lock();
    if own.wrote(moment) {
        ino.mtime_ns.store(mtime, Ordering::Relaxed);
    }
}

/// Adds the attributes of a file to `tx`.
fn stage_attributes(tx: &mut Transaction, ino: &Inode, mtime: u64, moment: Moment) {
    tx.set_xattr(ino.id, xattr::MTIME, &mtime.to_le_bytes());
    if let Some(mode) = moment.mode {
        tx.set_xattr(ino.id, xattr::MODE, &mode.to_le_bytes());
    }
}
