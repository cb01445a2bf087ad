//! Appending: a `memcpy` into the file's tail buffer, and write-behind of what is full.
//!
//! The tail buffer covers the region (1 MiB) that the end of the file lies in and is at the same
//! time that region's frame, so readers see it. When it is full it goes to the device as one
//! write, submitted by the appending thread, which does not wait; it becomes clean page cache when
//! the write completes, wherever that is noticed.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;
use pumice_bdev::DmaBuf;

use super::behind::Pending;
use super::core::Core;
use super::error::{FsError, Result};
use super::fill::{FillBuf, FillWriter};
use super::frame::{Frame, PAGE, REGION, split};
use super::inode::Inode;
use super::space::ESSENTIAL_MAX;
use super::unflushed::Unflushed;
use crate::blobstore::{ClusterInit, Spend};

/// First size of the tail buffer of a new file; most files stay below it.
const SMALL: usize = 64 << 10;
/// Least step of allocation ahead after a file's first cluster.
const GROW_MIN: u64 = 1 << 20;
/// Largest step of allocation ahead of an appending writer.
const GROW_MAX: u64 = 64 << 20;

/// The end of a file: what the append lock protects.
///
/// Whenever the lock is free:
/// - `submitted <= len`, and all bytes of `[submitted, len)` are in the buffer;
/// - each write in `pending` that has not arrived holds the frame of its region dirty, and that
///   frame is in the file's table, so its bytes can be read and can be sent again;
/// - no write in `pending` goes beyond the block in which the file ends.
pub(crate) struct Tail {
    writer: Option<FillWriter>,
    /// The frame that `writer` fills.
    frame: Option<Arc<Frame>>,
    region: usize,
    /// Bytes that can be appended with nothing but a copy.
    room: usize,
    /// Bytes that have clusters.
    pub allocated: u64,
    /// Bytes below this have been handed to the device.
    pub submitted: u64,
    /// The buffer's bytes from here on came from the writer; those before may have been read back
    /// from the device.
    pub supplied_from: u64,
    pub pending: Vec<Arc<Pending>>,
    /// Writes handed to the device so far; numbers them.
    pub sent: u64,
    /// A caller allocated space ahead: it is not trimmed while the file is open.
    pub reserved: bool,
    /// Clusters past the end are ours to give back.
    pub grown: bool,
    /// Syncs so far that had something to do.
    pub syncs: u32,
    /// What has been written and waits for a flush.
    pub unflushed: Unflushed,
}

impl Tail {
    pub fn new(len: u64, allocated: u64) -> Tail {
        Tail {
            writer: None,
            frame: None,
            region: 0,
            room: 0,
            allocated,
            submitted: len,
            supplied_from: len,
            pending: Vec::new(),
            sent: 0,
            reserved: false,
            grown: false,
            syncs: 0,
            unflushed: Unflushed::default(),
        }
    }

    /// The invariants that need no look into the table; checked in debug builds.
    pub fn check(&self, len: u64) {
        debug_assert!(self.submitted <= len, "{} > {len}", self.submitted);
        debug_assert!(self.submitted == len || self.holding(self.submitted, len).is_some());
        debug_assert!(self.room == 0 || self.writer.is_some());
    }

    /// Copies `data` to the buffer if there is room for nothing but that.
    #[inline]
    pub fn push_fast(&mut self, data: &[u8]) -> bool {
        match &mut self.writer {
            Some(writer) if data.len() <= self.room => {
                writer.push(data);
                self.room -= data.len();
                true
            }
            _ => false,
        }
    }

    /// Bytes that fit into the buffer.
    pub fn writer_room(&self) -> usize {
        self.writer.as_ref().map_or(0, FillWriter::room)
    }

    /// Lets `push` append to the buffer, if there is one.
    pub fn with_writer(&mut self, push: impl FnOnce(&mut FillWriter)) {
        if let Some(writer) = &mut self.writer {
            push(writer);
        }
    }

    /// The buffer's bytes.
    pub fn buffer(&self) -> Option<Arc<FillBuf>> {
        self.frame.as_ref().map(|frame| Arc::clone(&frame.bytes))
    }

    /// The buffer, if all of `[from, upto)` is in it.
    fn holding(&self, from: u64, upto: u64) -> Option<&Arc<Frame>> {
        let frame = self.frame.as_ref()?;
        let base = self.region as u64 * REGION as u64;
        (base <= from && upto - base <= frame.bytes.filled() as u64).then_some(frame)
    }

    /// Whether the region is the one being appended to.
    pub fn is_tail(&self, region: usize) -> bool {
        self.frame.is_some() && self.region == region
    }

    /// Whether there is a buffer, and its bytes from `off` on came from the writer.
    pub fn supplies(&self, off: u64) -> bool {
        self.frame.is_some() && self.supplied_from <= off
    }

    /// The next append takes the slow path.
    pub fn stop_fast_path(&mut self) {
        self.room = 0;
    }

    /// Appends that fit into the buffer and into the clusters need no more than a copy.
    pub fn allow_fast_path(&mut self, len: u64) {
        let space = usize::try_from(self.allocated - len).unwrap_or(usize::MAX);
        self.room = self.writer_room().min(space);
    }

    /// Forgets finished writes, and remembers what of them a flush has to cover.
    pub fn prune(&mut self, ino: &Inode) {
        let mut written = Vec::new();
        self.pending.retain(|p| match p.written_seq() {
            Some(seq) => {
                written.push((seq, Arc::clone(p)));
                false
            }
            None => true,
        });
        written.sort_unstable_by_key(|(seq, _)| *seq);
        for (seq, p) in written {
            self.note_written(ino, p.from..p.upto, p.supplied_from..p.upto, seq);
        }
    }

    /// Takes note of a completed write of `range`, of which the bytes `supplied` came from the
    /// writer. A flush has to cover `seq`; 0: it is durable.
    pub fn note_written(&mut self, ino: &Inode, range: Range<u64>, supplied: Range<u64>, seq: u64) {
        if seq > 0 {
            ino.unflushed.fetch_max(seq, Ordering::AcqRel);
            self.unflushed.rewritten(range, seq);
            self.unflushed.written(supplied, seq);
        } else {
            self.unflushed.cut(supplied);
        }
    }

    /// Bytes from `len` on do not exist any more: whether a flush has covered them is of no
    /// interest.
    pub fn cut_unflushed(&mut self, len: u64) {
        self.unflushed.cut(len..u64::MAX);
    }

    /// Takes out the writes that were handed over after the first `sent`.
    pub fn take_sent_after(&mut self, sent: u64) -> Vec<Arc<Pending>> {
        let all = std::mem::take(&mut self.pending);
        let (kept, taken) = all.into_iter().partition(|p| p.no <= sent);
        self.pending = kept;
        taken
    }

    /// Takes out the writes that go beyond `len`.
    pub fn take_beyond(&mut self, len: u64) -> Vec<Arc<Pending>> {
        let all = std::mem::take(&mut self.pending);
        let (kept, taken) = all.into_iter().partition(|p| p.upto <= len);
        self.pending = kept;
        taken
    }

    /// Makes `frame` the buffer, in place of whatever the table has for its region. Writes of the
    /// region that have not arrived hold it dirty from now on, and no longer the one before.
    pub fn set_frame(&mut self, ino: &Inode, frame: Arc<Frame>, writer: Option<FillWriter>) {
        self.replace_whole(ino, &frame);
        self.writer = writer;
        self.region = frame.region;
        self.frame = Some(frame);
        self.room = 0;
    }

    /// Makes `frame` the whole frame of its region; see [`Tail::set_frame`].
    pub fn replace_whole(&self, ino: &Inode, frame: &Arc<Frame>) {
        for p in &self.pending {
            p.hold_instead(frame);
        }
        ino.frames.install_whole(frame);
    }
}

impl Core {
    /// Makes `at`, the end of what was pushed, the beginning of free room: starts a buffer, or
    /// hands a full one to the device and starts the next.
    pub fn next_buffer(&self, ino: &Arc<Inode>, tail: &mut Tail, at: u64) -> Result<()> {
        // Whether or not there is a writer: an append that failed here has taken it away.
        if tail.frame.is_some() && split(at).0 != tail.region {
            self.bound_failed(ino, tail)?;
            self.hand_over(ino, tail, at)?;
            self.back_pressure(ino, tail);
        }
        self.open_buffer(ino, tail, at)
    }

    /// Hands everything up to `at` to the device, without waiting, and closes the buffer: it becomes
    /// cache when it has arrived.
    pub fn hand_over(&self, ino: &Arc<Inode>, tail: &mut Tail, at: u64) -> Result<()> {
        self.submit_upto(ino, tail, at, false)?;
        if let Some(frame) = tail.frame.take() {
            frame.release_dirty();
        }
        tail.writer = None;
        tail.room = 0;
        Ok(())
    }

    /// Starts a tail buffer for position `at`, with what the file has before it in its region.
    fn open_buffer(&self, ino: &Arc<Inode>, tail: &mut Tail, at: u64) -> Result<()> {
        let (region, filled) = split(at);
        let bytes = if let Some(old) = tail.frame.as_ref().filter(|_| tail.region == region) {
            let head = old
                .bytes
                .get(0..filled)
                .expect("the buffer holds what was appended");
            tail_buffer(at, head)?
        } else {
            let mut head = DmaBuf::new(filled.max(1))?;
            self.read_exact(ino, at - filled as u64, &mut head[..filled])?;
            let bytes = tail_buffer(at, &head[..filled])?;
            tail.supplied_from = at;
            bytes
        };
        self.set_buffer(ino, tail, at, bytes);
        Ok(())
    }

    /// Replaces the tail buffer by one in which `data` stands at `off`; both inside it.
    pub fn patch_buffer(
        &self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        off: u64,
        data: &[u8],
    ) -> Result<()> {
        let len = ino.len();
        let base = tail.region as u64 * REGION as u64;
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
        Ok(())
    }

    /// Forgets the tail buffer of a file that is gone or is about to be closed for good.
    pub fn drop_buffer(&self, tail: &mut Tail) {
        tail.writer = None;
        tail.frame = None;
        tail.room = 0;
    }

    /// Makes `bytes` the tail buffer at `at`.
    pub fn set_buffer(&self, ino: &Arc<Inode>, tail: &mut Tail, at: u64, bytes: Arc<FillBuf>) {
        let writer = bytes.writer();
        let frame = Frame::new(&ino.frames, split(at).0, 0, bytes, true);
        tail.set_frame(ino, frame, writer);
    }

    /// Hands the bytes up to `upto` to the device; the last block is padded with zeroes.
    pub fn submit_upto(
        &self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        upto: u64,
        fua: bool,
    ) -> Result<()> {
        let block = self.block as u64;
        if tail.submitted >= upto {
            return Ok(());
        }
        let frame = tail.holding(tail.submitted, upto).cloned();
        let frame = frame.ok_or_else(|| ino.lost(tail.submitted, upto))?;
        let base = tail.region as u64 * REGION as u64;
        let from = (tail.submitted / block * block).max(base);
        let whole_end = upto / block * block;
        // One write of a block in flight, and none waiting to be sent again, which would replace
        // this one.
        self.settle_overlapping(ino, tail, from, upto.next_multiple_of(block))?;
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
            let mut bounce = DmaBuf::new(self.block)?;
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
        self.send(ino, &pending)
    }

    /// Sees to it that the first `end` bytes have clusters: exactly those, or some ahead.
    ///
    /// # Errors
    /// Nothing has changed if there is no space.
    pub fn reserve(&self, ino: &Arc<Inode>, tail: &mut Tail, end: u64, exact: bool) -> Result<()> {
        if end <= tail.allocated {
            return Ok(());
        }
        let needed = end.div_ceil(self.cluster);
        let have = tail.allocated / self.cluster;
        let bytes = |clusters: u64| (clusters - have) * self.cluster;
        let ahead = if exact {
            needed
        } else {
            let step = match have {
                0 => 0,
                have => (have * 3)
                    .max(GROW_MIN / self.cluster)
                    .min(GROW_MAX / self.cluster),
            };
            needed.max(have + step)
        };
        // The last clusters are not worth holding ahead.
        let spare = self.store.available_clusters();
        let host = self.host_room().unwrap_or(u64::MAX);
        let want = if ahead - have > spare / 4 || bytes(ahead) > host / 4 {
            needed
        } else {
            ahead
        };
        match self.extend(ino, tail, want) {
            Err(FsError::NoSpace { .. }) => {
                self.trim_others(ino);
                self.extend(ino, tail, needed)
            }
            result => result,
        }
    }

    /// Gives a file more clusters, if there is room for their bytes below the device, too.
    fn extend(&self, ino: &Inode, tail: &mut Tail, clusters: u64) -> Result<()> {
        let end = clusters * self.cluster;
        self.check_host(ino, end - tail.allocated)?;
        let essential = ino.essential.load(Ordering::Relaxed) && end <= ESSENTIAL_MAX;
        let spend = if essential {
            Spend::Opening
        } else {
            Spend::Ordinary
        };
        self.set_clusters(ino, tail, clusters, spend)
    }

    /// Changes the number of clusters, mostly to fewer; durable on return.
    pub fn resize(&self, ino: &Inode, tail: &mut Tail, clusters: u64) -> Result<()> {
        self.set_clusters(ino, tail, clusters, Spend::Releasing)
    }

    fn set_clusters(
        &self,
        ino: &Inode,
        tail: &mut Tail,
        clusters: u64,
        spend: Spend,
    ) -> Result<()> {
        // What a file gives back may be another's at once: no write may be on its way there.
        self.wait_overlapping(tail, clusters * self.cluster, u64::MAX);
        let mut tx = self.store.transaction();
        tx.spend(spend);
        tx.resize_with(ino.id, clusters, ClusterInit::CallerWrites);
        tx.commit()
            .map_err(|e| self.store_error(format!("{}: {clusters} clusters", ino.path()), e))?;
        tail.grown |= clusters * self.cluster > tail.allocated;
        self.resized(ino, tail, clusters);
        Ok(())
    }

    /// Takes note of a new number of clusters.
    pub fn resized(&self, ino: &Inode, tail: &mut Tail, clusters: u64) {
        tail.allocated = clusters * self.cluster;
        ino.allocated.store(tail.allocated, Ordering::Release);
        tail.room = 0;
    }

    /// Gives clusters that files hold ahead back to the store, but not those of `not`.
    pub fn trim_others(&self, not: &Inode) {
        for ino in self.names.inodes() {
            if ino.id == not.id || ino.is_thin() || ino.is_frozen() {
                continue;
            }
            // Who appends right now needs what it holds.
            if let Some(tail) = ino.tail.try_lock() {
                self.trim(&ino, tail);
            }
        }
    }

    /// Gives the clusters past the end of the file back.
    pub fn trim(&self, ino: &Inode, mut tail: MutexGuard<'_, Tail>) {
        let needed = ino.len().div_ceil(self.cluster);
        // Whoever deletes a file must be the last to have its blob.
        if ino.is_going()
            || tail.reserved
            || !tail.grown
            || tail.allocated / self.cluster <= needed
            || self.check_writable(String::new).is_err()
        {
            return;
        }
        if let Err(error) = self.resize(ino, &mut tail, needed) {
            tracing::warn!(file = ino.path(), %error, "space allocated ahead was not given back");
        }
    }

    /// Starts the write of what has gathered, if it is much: for callers who flush after each
    /// record without wanting durability.
    pub fn start_write_behind(&self, ino: &Arc<Inode>, min: u64, upto: u64) -> Result<()> {
        let mut tail = ino.tail.lock();
        let block = self.block as u64;
        let upto = upto.min(ino.len()) / block * block;
        if upto < tail.submitted.saturating_add(min) {
            return Ok(());
        }
        self.submit_upto(ino, &mut tail, upto, false)?;
        self.back_pressure(ino, &mut tail);
        Ok(())
    }

    /// The last handle is gone: the tail goes to the device and becomes cache, and what was
    /// allocated ahead goes back.
    pub fn seal(&self, ino: &Arc<Inode>) -> Result<()> {
        let mut tail = ino.tail.lock();
        // Whoever deletes it took over, perhaps has its clusters already.
        if ino.is_going() {
            return Ok(());
        }
        let sealed = self.seal_buffer(ino, &mut tail);
        tail.reserved = false;
        // Less than that waits for an unmount, or for somebody who needs it: a log is deleted soon,
        // and a table was allocated about as large as it has become.
        let spare =
            (tail.allocated / self.cluster).saturating_sub(ino.len().div_ceil(self.cluster));
        if spare * self.cluster > tail.allocated / 4 {
            self.trim(ino, tail);
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
    /// larger and nothing of it is on its way.
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

/// A buffer for the region of `at` that begins with `head`.
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
