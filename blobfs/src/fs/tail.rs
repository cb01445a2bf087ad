//! Appending: a `memcpy` into the file's tail buffer, and writeback of full buffers.
//!
//! The tail buffer covers the region (1 MiB) that contains the end of the file and is also that
//! region's frame, so readers see it. When it is full the appending thread submits it as one write
//! and does not wait. It becomes clean page cache when the write completes, on whichever thread
//! notices that.
//!
//! Bytes that the journal has carried count as submitted. Until they are in place, readers get them
//! from the tail buffer only, so it is kept: [`Buffers`](super::buffers::Buffers) has them put in
//! place before it lets a buffer become cache.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::durable::Landed;
use super::fill::{FillBuf, FillWriter};
use super::frame::{Frame, REGION};
use super::inode::Inode;
use super::unflushed::Unflushed;
use super::writeback::Pending;

/// The entries of a file in the log. The append lock protects it.
#[derive(Default)]
pub(crate) struct Logged {
    /// Position of the first that the device may not have.
    pub from: Option<u64>,
    /// Position of the last one, of any kind.
    pub last: Option<u64>,
    /// Whether the first and only one says that its clusters have its bytes.
    pub is_placed: bool,
}

/// The end of a file, which the append lock protects.
///
/// Whenever the lock is free:
/// - `submitted <= len`, and all bytes of `[submitted, len)` are in the buffer;
/// - each write in `pending` that has not completed holds the frame of its region dirty, and that
///   frame is in the file's table, so its bytes can be read and sent again;
/// - no write in `pending` goes beyond the block in which the file ends.
pub(crate) struct Tail {
    writer: Option<FillWriter>,
    /// The frame that `writer` fills.
    frame: Option<Arc<Frame>>,
    region: usize,
    /// Number of bytes that can be appended by a copy alone.
    room: usize,
    /// Number of bytes that have clusters.
    pub allocated: u64,
    /// Bytes below this were submitted to the device.
    pub submitted: u64,
    /// The first byte of the buffer that came from the writer. Those before may have been read back
    /// from the device.
    pub supplied_from: u64,
    pub pending: Vec<Arc<Pending>>,
    /// Number of writes submitted so far.
    pub sent: u64,
    /// Whether a caller allocated space ahead, which is not freed while the file is open.
    pub reserved: bool,
    /// Whether clusters past the end may be freed.
    pub grown: bool,
    /// Number of times that bytes became unsubmitted again: they were replaced in the buffer, or a
    /// failed write may have damaged them on the device.
    pub lowered: u64,
    /// Number of syncs that had something to do.
    pub syncs: u32,
    /// Written ranges that wait for a flush.
    pub unflushed: Unflushed,
    /// The entries in the log in shared memory.
    pub logged: Logged,
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
            lowered: 0,
            syncs: 0,
            unflushed: Unflushed::default(),
            logged: Logged::default(),
        }
    }

    /// Checks the invariants that need no look into the table, in debug builds.
    pub fn check(&self, len: u64) {
        debug_assert!(self.submitted <= len, "{} > {len}", self.submitted);
        debug_assert!(self.submitted == len || self.holding(self.submitted, len).is_some());
        debug_assert!(self.room == 0 || self.writer.is_some());
    }

    /// Copies `data` to the buffer if nothing else is necessary. Returns whether it did.
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

    /// Number of bytes that fit into the buffer.
    pub fn writer_room(&self) -> usize {
        self.writer.as_ref().map_or(0, FillWriter::room)
    }

    /// Calls `push` to append to the buffer, if there is one.
    pub fn with_writer(&mut self, push: impl FnOnce(&mut FillWriter)) {
        if let Some(writer) = &mut self.writer {
            push(writer);
        }
    }

    /// Returns the buffer's bytes.
    pub fn buffer(&self) -> Option<Arc<FillBuf>> {
        self.frame.as_ref().map(|frame| Arc::clone(&frame.bytes))
    }

    /// Returns the buffer, if all of `[from, upto)` is in it.
    pub fn holding(&self, from: u64, upto: u64) -> Option<&Arc<Frame>> {
        let frame = self.frame.as_ref()?;
        let base = self.base();
        (base <= from && upto - base <= frame.bytes.filled() as u64).then_some(frame)
    }

    /// Whether the region is the one being appended to.
    pub fn is_tail(&self, region: usize) -> bool {
        self.frame_of(region).is_some()
    }

    /// Whether there is a buffer of another region than this.
    pub fn is_past(&self, region: usize) -> bool {
        self.frame.is_some() && self.region != region
    }

    /// Returns the buffer, if it is of this region.
    pub fn frame_of(&self, region: usize) -> Option<&Arc<Frame>> {
        self.frame.as_ref().filter(|_| self.region == region)
    }

    /// Returns the offset of the buffer's region in the file.
    pub fn base(&self) -> u64 {
        self.region as u64 * REGION as u64
    }

    /// Whether there is a buffer, and its bytes from `off` on came from the writer.
    pub fn supplies(&self, off: u64) -> bool {
        self.frame.is_some() && self.supplied_from <= off
    }

    /// Makes the next append take the slow path.
    pub fn stop_fast_path(&mut self) {
        self.room = 0;
    }

    /// Lets appends that fit into the buffer and into the clusters be a copy alone.
    pub fn allow_fast_path(&mut self, len: u64) {
        let space = usize::try_from(self.allocated - len).unwrap_or(usize::MAX);
        self.room = self.writer_room().min(space);
    }

    /// Removes finished writes, and records which of their ranges a flush has to cover.
    pub fn prune(&mut self, ino: &Inode) {
        let mut written = Vec::new();
        self.pending.retain(|p| match p.landed() {
            Some(landed) => {
                written.push((landed, Arc::clone(p)));
                false
            }
            None => true,
        });
        written.sort_unstable_by_key(|(landed, _)| landed.seq);
        for (landed, p) in written {
            self.note_written(ino, p.from..p.upto, p.supplied_from..p.upto, landed);
        }
    }

    /// Records a completed write of `range`, of which the bytes `supplied` came from the writer.
    pub fn note_written(
        &mut self,
        ino: &Inode,
        range: Range<u64>,
        supplied: Range<u64>,
        landed: Landed,
    ) {
        let Landed { seq, doubtful } = landed;
        if seq > 0 {
            ino.unflushed.fetch_max(seq, Ordering::AcqRel);
            self.unflushed.rewritten(range, seq);
            self.unflushed.written(supplied, seq, doubtful);
        } else {
            self.unflushed.cut(supplied);
        }
    }

    /// Records that bytes from `len` on no longer exist, so that no flush has to cover them.
    pub fn cut_unflushed(&mut self, len: u64) {
        self.unflushed.cut(len..u64::MAX);
    }

    /// Takes out the writes that were submitted after the first `sent`.
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

    /// Makes `frame` the buffer, in place of the table's frame for its region. Writes of the region
    /// that have not completed hold it dirty from now on, and no longer the earlier one.
    pub fn set_frame(&mut self, ino: &Inode, frame: Arc<Frame>, writer: Option<FillWriter>) {
        self.replace_whole(ino, &frame);
        self.writer = writer;
        self.region = frame.region;
        self.frame = Some(frame);
        self.room = 0;
    }

    /// Takes the buffer away, so that nothing can be appended to it.
    pub fn take_buffer(&mut self) -> Option<Arc<Frame>> {
        self.writer = None;
        self.room = 0;
        self.frame.take()
    }

    /// Drops the buffer of a file that is deleted or is about to be closed for good.
    pub fn drop_buffer(&mut self) {
        drop(self.take_buffer());
    }

    /// Makes `frame` the whole frame of its region; see [`Tail::set_frame`].
    pub fn replace_whole(&self, ino: &Inode, frame: &Arc<Frame>) {
        for p in &self.pending {
            p.hold_instead(frame);
        }
        ino.frames.install_whole(frame);
    }
}
