//! Reading, from memory without a lock, and from the device on the calling thread's own channel.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pumice_bdev::{DmaBuf, IoError, Op, Outcome, Ticket};

use super::cache::Cache;
use super::error::{FsError, Result};
use super::fill::FillBuf;
use super::frame::{Frame, PAGE, REGION, split};
use super::inode::Inode;
use super::volume::Volume;
use crate::blobstore::Blob;
use crate::blobstore::data::{Access, Piece};

/// Longest frame that a read makes.
pub(crate) const FRAME_MAX: usize = 64 << 10;

/// Most bytes of one read that are in flight together, in memory besides the caller's.
const ROUND: usize = 16 << 20;

/// Bytes of a file that were read from the device.
#[derive(Clone)]
pub(crate) struct Chunk {
    off: u64,
    bytes: Arc<FillBuf>,
}

impl Chunk {
    /// Copies its bytes at `off`. Returns their number, which is 0 if it has none.
    pub fn copy(&self, off: u64, out: &mut [u8]) -> usize {
        let Some(skip) = off
            .checked_sub(self.off)
            .and_then(|s| usize::try_from(s).ok())
        else {
            return 0;
        };
        let n = self.bytes.filled().saturating_sub(skip).min(out.len());
        match self.bytes.get(skip..skip + n) {
            Some(bytes) if n > 0 => {
                out[..n].copy_from_slice(bytes);
                n
            }
            _ => 0,
        }
    }
}

/// Copies the bytes of a file at `off` that `chunks` or the cache have to `out`, up to the first
/// byte that neither has. Returns their number.
pub(crate) fn copy_chunks(ino: &Inode, chunks: &[Chunk], off: u64, out: &mut [u8]) -> usize {
    let mut done = 0;
    while done < out.len() {
        let (at, rest) = (off + done as u64, &mut out[done..]);
        let n = chunks.iter().map(|c| c.copy(at, rest)).find(|n| *n > 0);
        match n.unwrap_or_else(|| ino.frames.copy(at, rest)) {
            0 => break,
            n => done += n,
        }
    }
    done
}

/// The result of a read of existing bytes.
enum Read {
    Filled,
    /// The file was truncated meanwhile, so the copied bytes do not count.
    Overtaken,
}

/// The completion of reads of one file, once their operations are done.
pub(crate) struct Plan {
    /// Buffers in the order of the file that were filled without the device; `None` for an
    /// operation.
    filled: Vec<Option<DmaBuf>>,
    /// Offset in the file and number of valid bytes of each buffer, in the same order.
    places: Vec<(u64, usize)>,
    generation: u64,
    keep: bool,
}

impl Plan {
    pub fn add(&mut self, buf: &DmaBuf, at: &mut u64, len: u64) {
        // A run that was divided inside a page cannot be cached as pages.
        self.keep &= at.is_multiple_of(PAGE as u64) && buf.len().is_multiple_of(PAGE);
        let valid = usize::try_from(len.saturating_sub(*at)).unwrap_or(usize::MAX);
        self.places.push((*at, valid.min(buf.len())));
        *at += buf.len() as u64;
    }

    /// Returns the offset in the file where it begins to read.
    fn begins(&self) -> Option<u64> {
        self.places.first().map(|(off, _)| *off)
    }

    /// Turns the returned buffers into chunks, and into cache. Takes as many of `ops` as belong to
    /// the plan.
    pub fn finish(self, ino: &Inode, ops: &mut impl Iterator<Item = Op>) -> Vec<Chunk> {
        let (keep, generation) = (self.keep, self.generation);
        let mut chunks = Vec::with_capacity(self.places.len());
        let mut places = self.places.into_iter();
        let mut add = |buf: DmaBuf| {
            let Some((off, valid)) = places.next() else {
                return;
            };
            let valid = valid.min(buf.len());
            let bytes = Arc::new(FillBuf::from_buf(buf, valid));
            if keep {
                let (region, start) = split(off);
                let frame = Frame::new(&ino.frames, region, start, Arc::clone(&bytes), false);
                ino.frames.install(generation, &frame);
            }
            chunks.push(Chunk { off, bytes });
        };
        for filled in self.filled {
            match filled.map_or_else(|| ops.next(), |buf| Some(Op::Read { lba: 0, buf })) {
                Some(Op::Read { buf, .. }) => add(buf),
                Some(Op::ReadV { bufs, .. }) => bufs.into_iter().for_each(&mut add),
                _ => {}
            }
        }
        chunks
    }
}

/// One of several reads that are done together.
#[derive(Debug)]
#[non_exhaustive]
pub struct ReadRequest<'a> {
    /// Offset in the file.
    pub off: u64,
    /// The buffer to fill.
    pub buf: &'a mut [u8],
    /// The result: the number of bytes (less than the buffer at the end of the file), or the error.
    pub result: Result<usize>,
}

impl<'a> ReadRequest<'a> {
    /// Makes a request.
    pub fn new(off: u64, buf: &'a mut [u8]) -> ReadRequest<'a> {
        ReadRequest {
            off,
            buf,
            result: Ok(0),
        }
    }
}

/// Reads files.
pub(crate) struct Reader {
    pub vol: Arc<Volume>,
    pub cache: Arc<Cache>,
}

impl Reader {
    /// Reads existing bytes at `off`, at most `out.len()`. With `keep`, bytes from the device stay
    /// in memory.
    #[inline]
    pub fn read_at(&self, ino: &Inode, off: u64, out: &mut [u8], keep: bool) -> Result<usize> {
        let len = ino.len();
        if off >= len {
            return Ok(0);
        }
        let n = usize::try_from(len - off).map_or(out.len(), |rest| rest.min(out.len()));
        if ino.frames.copy(off, &mut out[..n]) == n {
            self.cache.count_hit();
            return Ok(n);
        }
        self.cache.count_miss();
        self.read_slow(ino, off, out, keep)
    }

    #[cold]
    fn read_slow(&self, ino: &Inode, off: u64, out: &mut [u8], keep: bool) -> Result<usize> {
        self.vol.check_mounted(|| ino.path())?;
        loop {
            let epoch = ino.epoch.load(Ordering::Acquire);
            let len = ino.len();
            if off >= len {
                return Ok(0);
            }
            let n = usize::try_from(len - off).map_or(out.len(), |rest| rest.min(out.len()));
            // The caller has looked into memory, and the plan looks again.
            let read = self.read_missing(ino, off, &mut out[..n], 0, epoch, keep);
            // A read of bytes that a truncation has removed is not an error of the device.
            if ino.epoch.load(Ordering::Acquire) == epoch && !matches!(read, Ok(Read::Overtaken)) {
                return read.map(|_| n);
            }
        }
    }

    /// Fills `out`, all of it inside the file, from `done` on. Each round reads from the device and
    /// copies something, or copies what has come into memory, or waits for one readahead, so it
    /// ends.
    fn read_missing(
        &self,
        ino: &Inode,
        off: u64,
        out: &mut [u8],
        mut done: usize,
        epoch: u64,
        keep: bool,
    ) -> Result<Read> {
        let mut waited = false;
        loop {
            if done == out.len() {
                return Ok(Read::Filled);
            }
            let at = off + done as u64;
            if ino.epoch.load(Ordering::Acquire) != epoch || ino.len() <= at {
                return Ok(Read::Overtaken);
            }
            // Once for each place, since bytes that were read ahead may not have been kept.
            if !waited && self.wait_ahead(ino, at) {
                let copied = ino.frames.copy(at, &mut out[done..]);
                done += copied;
                waited = copied == 0;
                continue;
            }
            let blob = ino.blob.load();
            let access = self.access(ino, &blob)?;
            let want = (out.len() - done).min(ROUND);
            let Some((plan, ops)) = self.plan(&access, ino, at, want, keep)? else {
                // It has come into memory since the lookup.
                done += ino.frames.copy(at, &mut out[done..]);
                continue;
            };
            // What the plan has found in memory may have been evicted since, and is read next time.
            let reads_it = plan.begins().is_some_and(|begin| begin <= at);
            let ops = self.read_ops(ino, ops)?;
            drop(access);
            let chunks = plan.finish(ino, &mut ops.into_iter());
            let copied = copy_chunks(ino, &chunks, at, &mut out[done..]);
            done += copied;
            waited &= copied == 0;
            if copied == 0
                && reads_it
                && ino.epoch.load(Ordering::Acquire) == epoch
                && ino.len() > at
            {
                return Err(FsError::Corrupt {
                    blob: ino.id.0,
                    reason: format!("no data at offset {at} of {}", ino.path()),
                });
            }
        }
    }

    /// Begins to read a file. No cluster of it moves while the result lives.
    fn access<'b>(&self, ino: &Inode, blob: &'b Option<Arc<Blob>>) -> Result<Access<'b>> {
        let Some(blob) = blob else {
            return Err(FsError::Unmounted { path: ino.path() });
        };
        blob.access()
            .map_err(|e| self.vol.store_error(ino.path(), e))
    }

    /// Returns the operations that read the missing parts of `[off, off + want)` into memory, and
    /// their completion. Returns `None` if nothing is missing.
    fn plan(
        &self,
        access: &Access<'_>,
        ino: &Inode,
        off: u64,
        want: usize,
        keep: bool,
    ) -> Result<Option<(Plan, Vec<Op>)>> {
        // The order matters: a file that grows after the length was taken has a new generation, or
        // the frame of its end in memory. And the length is taken before the places of the
        // clusters: the file has the clusters of its length.
        let generation = ino.frames.generation();
        let len = ino.len();
        let end = off.saturating_add(want as u64).min(len);
        let mut plan = Plan {
            filled: Vec::with_capacity(1),
            places: Vec::with_capacity(1),
            generation,
            keep,
        };
        let mut ops = Vec::with_capacity(1);
        let mut at = off;
        while at < end {
            let Some(missing) = ino.frames.first_missing(at, end) else {
                break;
            };
            at = missing.end;
            let mut from = missing.start;
            let pieces = access
                .pieces(from, missing.end - from, FRAME_MAX)
                .map_err(|e| self.vol.store_error(ino.path(), e))?;
            for piece in pieces {
                match piece {
                    Piece::Filled(buf) => {
                        plan.add(&buf, &mut from, len);
                        plan.filled.push(Some(buf));
                    }
                    Piece::FromDevice(op) => {
                        match &op {
                            Op::Read { buf, .. } => plan.add(buf, &mut from, len),
                            Op::ReadV { bufs, .. } => {
                                bufs.iter().for_each(|buf| plan.add(buf, &mut from, len));
                            }
                            op => unreachable!("a read is not {op:?}"),
                        }
                        plan.filled.push(None);
                        ops.push(op);
                    }
                }
            }
        }
        Ok((!plan.places.is_empty()).then_some((plan, ops)))
    }

    /// Reads on this thread's channel, with everything in flight together. Returns the operations
    /// in order.
    fn read_ops(&self, ino: &Inode, mut ops: Vec<Op>) -> Result<Vec<Op>> {
        let channel = self.vol.store.channel();
        let channel = channel.map_err(|e| self.vol.store_error(ino.path(), e))?;
        let failed = |e| FsError::io(format!("{}: read", ino.path()), e);
        if ops.len() == 1
            && let Some(op) = ops.pop()
        {
            let (op, result) = channel.block_on(channel.io(op));
            result.map_err(failed)?;
            ops.push(op);
            return Ok(ops);
        }
        let outcomes = channel.block_on(channel.io_all(ops));
        let done = outcomes.into_iter().map(|(op, result)| result.map(|()| op));
        done.collect::<std::result::Result<_, _>>().map_err(failed)
    }

    /// Fills `out` from `off`. Fails if the file is shorter. For callers who hold the append lock,
    /// so that no truncation can overtake them.
    pub fn read_exact(&self, ino: &Inode, off: u64, out: &mut [u8]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let epoch = ino.epoch.load(Ordering::Acquire);
        let done = ino.frames.copy(off, out);
        match self.read_missing(ino, off, out, done, epoch, false)? {
            Read::Filled => Ok(()),
            Read::Overtaken => Err(ino.lost(off, off + out.len() as u64)),
        }
    }

    /// Carries out several reads together: everything that is not in memory is in flight at once.
    pub fn read_many(&self, ino: &Inode, requests: &mut [ReadRequest<'_>], keep: bool) {
        let epoch = ino.epoch.load(Ordering::Acquire);
        let len = ino.len();
        let (mut missed, mut one_by_one) = (Vec::new(), Vec::new());
        for (i, r) in requests.iter_mut().enumerate() {
            let inside = len.saturating_sub(r.off);
            let n = usize::try_from(inside).map_or(r.buf.len(), |n| n.min(r.buf.len()));
            r.result = Ok(n);
            if ino.frames.copy(r.off, &mut r.buf[..n]) == n {
                self.cache.count_hit();
            } else if n > ROUND || ino.ahead.covering(r.off).is_some() {
                one_by_one.push(i);
            } else {
                self.cache.count_miss();
                missed.push((i, r.off, n));
            }
        }
        if !missed.is_empty() {
            self.read_missed(ino, requests, missed, epoch, keep);
        }
        // What is in flight already is waited for rather than read once more, and long reads bound their memory.
        for i in one_by_one {
            let r = &mut requests[i];
            r.result = self.read_at(ino, r.off, r.buf, keep);
        }
    }

    /// Carries out the requests of `missed` (number, offset, length inside the file) together.
    fn read_missed(
        &self,
        ino: &Inode,
        requests: &mut [ReadRequest<'_>],
        missed: Vec<(usize, u64, usize)>,
        epoch: u64,
        keep: bool,
    ) {
        let read = self.read_together(ino, &missed, keep);
        let still = ino.epoch.load(Ordering::Acquire) == epoch;
        let chunks = read.ok().filter(|_| still).unwrap_or_default();
        for (k, (i, off, n)) in missed.into_iter().enumerate() {
            let r = &mut requests[i];
            let chunks = chunks.get(k).map_or(&[][..], Vec::as_slice);
            if !still || copy_chunks(ino, chunks, off, &mut r.buf[..n]) < n {
                // The requests are repeated one by one, so that an error goes to its own request.
                r.result = self.read_at(ino, r.off, r.buf, keep);
            }
        }
    }

    /// Reads the missing parts of several ranges (each with the caller's number) into memory.
    fn read_together(
        &self,
        ino: &Inode,
        ranges: &[(usize, u64, usize)],
        keep: bool,
    ) -> Result<Vec<Vec<Chunk>>> {
        self.vol.check_mounted(|| ino.path())?;
        let blob = ino.blob.load();
        let access = self.access(ino, &blob)?;
        let (mut plans, mut ops) = (Vec::with_capacity(ranges.len()), Vec::new());
        for (_, off, n) in ranges {
            let planned = self.plan(&access, ino, *off, *n, keep)?;
            plans.push(planned.map(|(plan, more)| {
                ops.extend(more);
                plan
            }));
        }
        let mut ops = self.read_ops(ino, ops)?.into_iter();
        drop(access);
        let finish = |plan: Option<Plan>| plan.map(|plan| plan.finish(ino, &mut ops));
        let chunks = plans.into_iter().map(finish);
        Ok(chunks.map(Option::unwrap_or_default).collect())
    }

    /// Starts reads of the missing parts of `[off, off + want)` on a shared channel. `done` gets
    /// the chunks. Returns `None` if nothing is missing.
    pub fn start_read(
        &self,
        ino: &Arc<Inode>,
        off: u64,
        want: usize,
        keep: bool,
        done: impl FnOnce(std::result::Result<Vec<Chunk>, Box<IoError>>) + Send + 'static,
    ) -> Result<Option<Ticket>> {
        let blob = ino.blob.load();
        let access = self.access(ino, &blob)?;
        let Some((plan, ops)) = self.plan(&access, ino, off, want, keep)? else {
            return Ok(None);
        };
        let held = access.hold();
        let file = Arc::clone(ino);
        let on_done = move |o: Outcome| {
            drop(held);
            let chunks = |()| plan.finish(&file, &mut o.ops.into_iter());
            done(o.result.map(chunks));
        };
        Ok(Some(self.vol.shared().submit(ops, on_done)))
    }

    /// Starts reads of the parts of `[off, off + len)` that are neither in memory nor in flight,
    /// and returns. Leaves out what would be in flight beyond half of the cache.
    ///
    /// # Errors
    /// Fails when the file system was unmounted, and without memory.
    pub fn prefetch(&self, ino: &Arc<Inode>, off: u64, len: u64) -> Result<()> {
        self.vol.check_mounted(|| ino.path())?;
        let end = off.saturating_add(len).min(ino.len());
        // Whole pages, so that what follows does not read the last one again; no read crosses a
        // region, since no frame does.
        let page = PAGE as u64;
        let pages = off / page * page..end.next_multiple_of(page);
        let most = self.cache.capacity() / 2 / page * page;
        ino.ahead.fill(pages, REGION as u64, most, |part| {
            let want = usize::try_from(part.end - part.start).unwrap_or(usize::MAX);
            self.start_read(ino, part.start, want, true, |_| {})
        })
    }

    /// Waits for a read in flight that covers `off`, if there is one.
    pub fn wait_ahead(&self, ino: &Inode, off: u64) -> bool {
        let Some((_, ticket)) = ino.ahead.covering(off) else {
            return false;
        };
        self.vol.shared().wait(&ticket);
        true
    }

    pub fn window_max(&self) -> u64 {
        (self.vol.opts.read_ahead_bytes as u64).min(self.cache.capacity() / 8)
    }
}

#[cfg(test)]
mod tests {
    use super::super::options::{FormatOptions, MountOptions, OpenOptions};
    use super::super::{FileSystem, load};
    use super::*;

    /// A reader with a length from before a truncation stops, and looks again.
    #[test]
    fn a_reader_outlives_a_truncation() {
        let dev = pumice_bdev::open("malloc://16M?block_size=4096").unwrap();
        FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
        let core = load::mount(&dev, &MountOptions::default()).unwrap();
        let ino = core.namespace.open("/f", OpenOptions::CREATE).unwrap();
        core.appender.append(&ino, &[7; 8192]).unwrap();
        core.syncer.sync(&ino).unwrap();
        let epoch = ino.epoch.load(Ordering::Acquire);
        core.truncater.truncate(&ino, 5050).unwrap();
        let mut out = [0; 100];
        let read = core
            .reader
            .read_missing(&ino, 5000, &mut out, 0, epoch, true);
        assert!(matches!(read, Ok(Read::Overtaken)));
        assert_eq!(core.reader.read_at(&ino, 5000, &mut out, true).unwrap(), 50);
        core.truncater.truncate(&ino, 0).unwrap();
        // Not even its clusters exist.
        let read = core
            .reader
            .read_missing(&ino, 5000, &mut out, 0, epoch, true);
        assert!(matches!(read, Ok(Read::Overtaken)));
        assert_eq!(core.reader.read_at(&ino, 5000, &mut out, true).unwrap(), 0);
        core.lives.close(&ino);
        core.unmount().unwrap();
    }
}
