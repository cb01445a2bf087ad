//! Appending: a `memcpy` into the file's tail buffer, and write-behind of what is full.
//!
//! The tail buffer covers the region (1 MiB) that the end of the file lies in and is at the same
//! time that region's frame, so readers see it. When it is full it goes to the device as one
//! write, submitted by the appending thread, which does not wait; it becomes clean page cache when
//! the write completes, wherever that is noticed.

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
use crate::blobstore::ClusterInit;

/// First size of the tail buffer of a new file; most files stay below it.
const SMALL: usize = 64 << 10;
/// Largest step of allocation ahead of an appending writer.
const GROW_MAX: u64 = 64 << 20;

/// The end of a file: what the append lock protects.
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
    pub pending: Vec<Arc<Pending>>,
    /// A caller allocated space ahead: it is not trimmed while the file is open.
    pub reserved: bool,
    /// Clusters past the end are ours to give back.
    pub grown: bool,
    /// Syncs so far that had something to do.
    pub syncs: u32,
    /// No write with a smaller sequence than this waits for a flush.
    pub unflushed_from: u64,
    /// Bytes below the durable length were overwritten since they were last flushed.
    pub overwritten: bool,
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
            pending: Vec::new(),
            reserved: false,
            grown: false,
            syncs: 0,
            unflushed_from: u64::MAX,
            overwritten: false,
        }
    }

    /// Whether the region is the one being appended to.
    pub fn is_tail(&self, region: usize) -> bool {
        self.frame.is_some() && self.region == region
    }

    /// Whether all of the file from `off` on is in the append buffer.
    pub fn buffer_begins_below(&self, off: u64) -> bool {
        self.frame.is_some() && self.region as u64 * REGION as u64 <= off
    }

    /// The next append takes the slow path.
    pub fn stop_fast_path(&mut self) {
        self.room = 0;
    }

    /// Forgets finished writes; `unflushed` takes what a flush has to cover.
    pub fn prune(&mut self, ino: &Inode) {
        let mut written = Vec::new();
        self.pending.retain(|p| match p.written_seq() {
            Some(seq) => {
                written.push(seq);
                false
            }
            None => true,
        });
        for seq in written {
            self.needs_flush(ino, seq);
        }
    }

    /// Takes note of a completed write that a flush has to cover; 0: none has to.
    pub fn needs_flush(&mut self, ino: &Inode, seq: u64) {
        if seq > 0 {
            ino.unflushed.fetch_max(seq, Ordering::AcqRel);
            self.unflushed_from = self.unflushed_from.min(seq);
        }
    }
}

impl Core {
    /// Appends `data`. Nothing but a copy if it fits; see the module.
    #[inline]
    pub fn append(&self, ino: &Arc<Inode>, data: &[u8]) -> Result<()> {
        // The buffer of an inherited file is the parent's memory.
        self.check_fork()?;
        let mut tail = ino.tail.lock();
        self.append_locked(ino, &mut tail, data)
    }

    #[inline]
    pub fn append_locked(&self, ino: &Arc<Inode>, tail: &mut Tail, data: &[u8]) -> Result<()> {
        if data.len() <= tail.room
            && let Some(writer) = &mut tail.writer
        {
            writer.push(data);
            tail.room -= data.len();
            // Only the holder of the append lock changes the length.
            let len = ino.len.load(Ordering::Relaxed) + data.len() as u64;
            ino.len.store(len, Ordering::Release);
            return Ok(());
        }
        self.append_slow(ino, tail, data.len(), |writer, done, n| {
            writer.push(&data[done..done + n]);
        })
    }

    /// Appends `n` zeroes.
    pub fn append_zeroes(&self, ino: &Arc<Inode>, tail: &mut Tail, n: usize) -> Result<()> {
        self.append_slow(ino, tail, n, |writer, _, n| writer.push_zeroes(n))
    }

    #[cold]
    fn append_slow(
        &self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        total: usize,
        mut push: impl FnMut(&mut FillWriter, usize, usize),
    ) -> Result<()> {
        self.check_writable(|| ino.path())?;
        if ino.frozen {
            return Err(FsError::ReadOnly { path: ino.path() });
        }
        let len = ino.len();
        let end = len
            .checked_add(total as u64)
            .ok_or_else(|| FsError::invalid(&ino.path(), "a file longer than 2^64 bytes"))?;
        self.reserve(ino, tail, end, false)?;
        tail.room = 0;
        let mut done = 0;
        while done < total {
            let room = tail.writer.as_ref().map_or(0, FillWriter::room);
            if room == 0 {
                if let Err(e) = self.next_buffer(ino, tail, len + done as u64) {
                    // What was pushed lies past the length; the next append starts a buffer anew.
                    tail.writer = None;
                    return Err(e);
                }
                continue;
            }
            let n = room.min(total - done);
            if let Some(writer) = &mut tail.writer {
                push(writer, done, n);
            }
            done += n;
        }
        ino.len.store(end, Ordering::Release);
        ino.mtime_ns
            .store(super::inode::now_ns(), Ordering::Relaxed);
        let room = tail.writer.as_ref().map_or(0, FillWriter::room);
        let space = usize::try_from(tail.allocated - end).unwrap_or(usize::MAX);
        tail.room = room.min(space);
        Ok(())
    }

    /// Makes `at`, the end of what was pushed, the beginning of free room: starts a buffer, or
    /// hands a full one to the device and starts the next.
    fn next_buffer(&self, ino: &Arc<Inode>, tail: &mut Tail, at: u64) -> Result<()> {
        // Whether or not there is a writer: an append that failed here has taken it away.
        let full = tail.frame.is_some() && split(at).0 != tail.region;
        if full {
            self.bound_failed(ino, tail)?;
            self.submit_upto(ino, tail, at, false)?;
            if let Some(frame) = tail.frame.take() {
                frame.release_dirty();
            }
            tail.writer = None;
            self.back_pressure(ino, tail);
        }
        self.open_buffer(ino, tail, at)
    }

    /// Starts a tail buffer for position `at`, with what the file has before it in its region.
    pub fn open_buffer(&self, ino: &Arc<Inode>, tail: &mut Tail, at: u64) -> Result<()> {
        let (region, filled) = split(at);
        match tail.frame.clone() {
            Some(old) if tail.region == region => {
                let head = old
                    .bytes
                    .get(0..filled)
                    .expect("the buffer holds what was appended");
                self.reopen_buffer(ino, tail, at, head)
            }
            _ => {
                let mut head = DmaBuf::new(filled.max(1))?;
                self.read_exact(ino, at - filled as u64, &mut head[..filled])?;
                self.reopen_buffer(ino, tail, at, &head[..filled])
            }
        }
    }

    /// Replaces the tail buffer by one in which `data` stands at `off`; both inside it.
    pub fn patch_buffer(
        &self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        off: u64,
        data: &[u8],
    ) -> Result<()> {
        let Some(old) = tail.frame.clone() else {
            return Ok(());
        };
        let filled = usize::try_from(ino.len() - tail.region as u64 * REGION as u64).unwrap_or(0);
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

    /// Forgets the tail buffer; its bytes past `len` never existed.
    pub fn drop_buffer(&self, tail: &mut Tail) {
        tail.writer = None;
        tail.frame = None;
        tail.room = 0;
    }

    /// Starts a tail buffer at `at` whose region begins with `head`.
    fn reopen_buffer(&self, ino: &Arc<Inode>, tail: &mut Tail, at: u64, head: &[u8]) -> Result<()> {
        let bytes = tail_buffer(at, head)?;
        self.set_buffer(ino, tail, at, bytes);
        Ok(())
    }

    /// Makes `bytes` the tail buffer at `at`.
    pub fn set_buffer(&self, ino: &Arc<Inode>, tail: &mut Tail, at: u64, bytes: Arc<FillBuf>) {
        let region = split(at).0;
        tail.writer = bytes.writer();
        let frame = Frame::new(&ino.frames, region, 0, bytes, true);
        frame
            .transient
            .store(ino.transient.load(Ordering::Relaxed), Ordering::Relaxed);
        ino.frames.install_whole(&frame);
        tail.frame = Some(frame);
        tail.region = region;
        tail.room = 0;
    }

    /// Closes the tail buffer, all of which has been handed to the device: it becomes cache.
    pub fn close_buffer(&self, tail: &mut Tail) {
        if let Some(frame) = tail.frame.take() {
            frame.release_dirty();
        }
        tail.writer = None;
        tail.room = 0;
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
        let Some(frame) = tail.frame.clone() else {
            return Ok(());
        };
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
        let range = from..upto.next_multiple_of(block);
        let pending = Arc::new(Pending::new(range, fua, frame, slices));
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
        let ahead = if exact {
            needed
        } else {
            needed.max(have + (have * 3).min(GROW_MAX / self.cluster))
        };
        // The last clusters are not worth holding ahead.
        let spare = self.store.free_clusters();
        let want = if ahead - have > spare / 4 {
            needed
        } else {
            ahead
        };
        match self.resize(ino, tail, want) {
            Err(FsError::NoSpace { .. }) => {
                self.trim_others(ino);
                self.resize(ino, tail, needed)
            }
            result => result,
        }
    }

    /// Changes the number of clusters; durable on return.
    pub fn resize(&self, ino: &Inode, tail: &mut Tail, clusters: u64) -> Result<()> {
        let blob = ino.blob()?;
        blob.resize_with(clusters, ClusterInit::CallerWrites)
            .map_err(|e| self.store_error(format!("{}: {clusters} clusters", ino.path()), e))?;
        tail.grown |= clusters * self.cluster > tail.allocated;
        self.resized(ino, tail, clusters);
        Ok(())
    }

    /// Takes note of a new number of clusters.
    pub fn resized(&self, ino: &Inode, tail: &mut Tail, clusters: u64) {
        if let Ok(blob) = ino.blob() {
            ino.extents.store(blob.extents());
        }
        tail.allocated = clusters * self.cluster;
        tail.room = 0;
    }

    /// Gives clusters that files hold ahead back to the store, but not those of `not`.
    pub fn trim_others(&self, not: &Inode) {
        for ino in self.names.inodes() {
            if ino.id == not.id || ino.thin || ino.frozen {
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
        let going = ino.dying.load(Ordering::SeqCst) || ino.reaped.load(Ordering::SeqCst);
        if going
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
        if tail.writer.is_none() || upto < tail.submitted + min {
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
        if ino.dying.load(Ordering::SeqCst) || ino.reaped.load(Ordering::SeqCst) {
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
        let Some(frame) = tail.frame.clone() else {
            return Ok(());
        };
        let len = ino.len();
        self.submit_upto(ino, tail, len, false)?;
        self.drop_buffer(tail);
        tail.prune(ino);
        let filled = split(len).1;
        let oversized = frame.bytes.cap() >= 2 * filled.next_multiple_of(PAGE);
        if oversized && filled > 0 && tail.pending.is_empty() && frame.region == split(len).0 {
            let mut buf = DmaBuf::zeroed(filled.next_multiple_of(PAGE))?;
            let bytes = frame
                .bytes
                .get(0..filled)
                .expect("the buffer holds what was appended");
            buf[..filled].copy_from_slice(bytes);
            let bytes = Arc::new(FillBuf::from_buf(buf, filled));
            let small = Frame::new(&ino.frames, frame.region, 0, bytes, true);
            ino.frames.install_whole(&small);
            small.release_dirty();
        } else {
            frame.release_dirty();
        }
        Ok(())
    }

    /// Frames of this file are not kept once written (direct I/O), or are again.
    pub fn set_transient(&self, ino: &Inode, on: bool) {
        ino.transient.store(on, Ordering::Relaxed);
        if let Some(frame) = &ino.tail.lock().frame {
            frame.transient.store(on, Ordering::Relaxed);
        }
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
