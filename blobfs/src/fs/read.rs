//! Reading: from memory without a lock, from the device on the calling thread's own channel.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pumice_bdev::{DmaBuf, IoError, Op};

use super::core::{Core, Unallocated};
use super::error::{FsError, Result};
use super::fill::FillBuf;
use super::frame::{Frame, PAGE, split};
use super::inode::Inode;
use super::pool::{Outcome, Ticket};

/// Longest frame that a read makes.
pub(crate) const FRAME_MAX: usize = 64 << 10;

/// Bytes of a file that were read from the device.
#[derive(Clone)]
pub(crate) struct Piece {
    pub off: u64,
    pub bytes: Arc<FillBuf>,
}

impl Piece {
    /// Copies what it has at `off`; 0 if it has none of it.
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

/// How a read of existing bytes has ended.
enum Read {
    Filled,
    /// The file was truncated meanwhile; what has been copied counts for nothing.
    Overtaken,
}

/// Reads of one file to be done.
pub(crate) struct Plan {
    pub ops: Vec<Op>,
    /// Offset in the file and bytes that count, for each buffer of `ops` in order.
    places: Vec<(u64, usize)>,
    generation: u64,
    keep: bool,
}

impl Plan {
    /// Turns the buffers that have come back into pieces, and into cache.
    pub fn finish(&self, ino: &Inode, ops: Vec<Op>) -> Vec<Piece> {
        let mut bufs = Vec::with_capacity(self.places.len());
        for op in ops {
            match op {
                Op::Read { buf, .. } => bufs.push(buf),
                Op::ReadV { bufs: many, .. } => bufs.extend(many),
                _ => {}
            }
        }
        let mut pieces = Vec::with_capacity(bufs.len());
        for (buf, (off, valid)) in bufs.into_iter().zip(&self.places) {
            let valid = (*valid).min(buf.len());
            let bytes = Arc::new(FillBuf::from_buf(buf, valid));
            if self.keep {
                let (region, start) = split(*off);
                let frame = Frame::new(&ino.frames, region, start, Arc::clone(&bytes), false);
                ino.frames.install(self.generation, &frame, || ino.len());
            }
            pieces.push(Piece { off: *off, bytes });
        }
        pieces
    }
}

/// One of several reads that are done together.
#[derive(Debug)]
pub struct ReadRequest<'a> {
    /// Offset in the file.
    pub off: u64,
    /// Where the data goes.
    pub buf: &'a mut [u8],
    /// Bytes read (less than the buffer at the end of the file), or why not. Filled in.
    pub result: Result<usize>,
}

impl<'a> ReadRequest<'a> {
    /// A request.
    pub fn new(off: u64, buf: &'a mut [u8]) -> ReadRequest<'a> {
        ReadRequest {
            off,
            buf,
            result: Ok(0),
        }
    }
}

impl Core {
    /// Reads at `off` what is there, at most `out.len()` bytes. With `keep`, what came from the
    /// device stays in memory.
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
        self.check_mounted(|| ino.path())?;
        loop {
            let epoch = ino.epoch.load(Ordering::Acquire);
            let len = ino.len();
            if off >= len {
                return Ok(0);
            }
            let n = usize::try_from(len - off).map_or(out.len(), |rest| rest.min(out.len()));
            let read = self.read_missing(ino, off, &mut out[..n], epoch, keep);
            // What a truncation has taken away is no error of the device.
            if ino.epoch.load(Ordering::Acquire) == epoch && !matches!(read, Ok(Read::Overtaken)) {
                return read.map(|_| n);
            }
        }
    }

    /// Fills `out`, all of it inside the file. Each round copies something, or waits for one
    /// read-ahead, or reads from the device what the next round copies: so it ends.
    fn read_missing(
        &self,
        ino: &Inode,
        off: u64,
        out: &mut [u8],
        epoch: u64,
        keep: bool,
    ) -> Result<Read> {
        let mut done = 0;
        let mut pieces: Vec<Piece> = Vec::new();
        let mut waited = false;
        while done < out.len() {
            let at = off + done as u64;
            let n = pieces
                .iter()
                .map(|p| p.copy(at, &mut out[done..]))
                .find(|n| *n > 0);
            let n = n.unwrap_or_else(|| ino.frames.copy(at, &mut out[done..]));
            if n > 0 {
                done += n;
                waited = false;
                continue;
            }
            if ino.epoch.load(Ordering::Acquire) != epoch || ino.len() <= at {
                return Ok(Read::Overtaken);
            }
            // Once for each place: what was read ahead may not have been kept.
            if !waited && self.wait_ahead(ino, at) {
                waited = true;
                continue;
            }
            let Some(plan) = self.plan(ino, at, out.len() - done, keep)? else {
                // It has come into memory since it was looked for.
                continue;
            };
            pieces = self.run_plan(ino, plan)?;
            let found = pieces.iter().any(|p| p.copy(at, &mut [0]) > 0);
            if !found && ino.epoch.load(Ordering::Acquire) == epoch && ino.len() > at {
                return Err(FsError::Corrupt {
                    blob: ino.id.0,
                    reason: format!("no data at offset {at} of {}", ino.path()),
                });
            }
        }
        Ok(Read::Filled)
    }

    /// The reads that bring what is missing of `[off, off + want)` into memory; `None` if nothing
    /// is.
    pub fn plan(&self, ino: &Inode, off: u64, want: usize, keep: bool) -> Result<Option<Plan>> {
        // In this order: a file that grows after the length was taken has a new generation, or the
        // frame of its end in memory.
        let generation = ino.frames.generation();
        let len = ino.len();
        let map = ino.extents.load();
        let end = (off + want as u64).min(len);
        let mut plan = Plan {
            ops: Vec::new(),
            places: Vec::new(),
            generation,
            keep,
        };
        let mut at = off;
        while at < end {
            let Some(missing) = ino.frames.first_missing(at, end) else {
                break;
            };
            at = missing.end;
            let size = usize::try_from(missing.end - missing.start).unwrap_or(0);
            match self.runs(&map, missing.start, size) {
                Ok(runs) => {
                    for run in runs {
                        let mut bufs = Vec::with_capacity(1);
                        let mut done = 0;
                        while done < run.len {
                            let n = FRAME_MAX.min(run.len - done);
                            let from = run.off + done as u64;
                            // A run that was cut inside a page cannot be cached as pages.
                            plan.keep &= from.is_multiple_of(PAGE as u64) && n.is_multiple_of(PAGE);
                            let valid =
                                usize::try_from(len.saturating_sub(from)).unwrap_or(usize::MAX);
                            plan.places.push((from, valid.min(n)));
                            bufs.push(DmaBuf::new(n)?);
                            done += n;
                        }
                        let lba = run.lba;
                        plan.ops.push(match bufs.len() {
                            1 => Op::Read {
                                lba,
                                buf: bufs.remove(0),
                            },
                            _ => Op::ReadV { lba, bufs },
                        });
                    }
                }
                Err(Unallocated) => {
                    // A thin file of a foreign image: the blobstore knows its parents.
                    let blob = ino.blob()?;
                    let buf = blob
                        .read_at(missing.start, DmaBuf::new(size)?)
                        .map_err(|e| self.store_error(ino.path(), e))?;
                    let valid =
                        usize::try_from(len.saturating_sub(missing.start)).unwrap_or(usize::MAX);
                    plan.places.push((missing.start, valid.min(size)));
                    // Comes back at once.
                    plan.ops.push(Op::Read { lba: u64::MAX, buf });
                }
            }
        }
        Ok(if plan.ops.is_empty() {
            None
        } else {
            Some(plan)
        })
    }

    /// Runs a plan on this thread's channel, everything in flight together.
    fn run_plan(&self, ino: &Inode, mut plan: Plan) -> Result<Vec<Piece>> {
        let ops = std::mem::take(&mut plan.ops);
        let ops = self.read_ops(ops).map_err(|e| self.read_error(ino, e))?;
        Ok(plan.finish(ino, ops))
    }

    /// Reads on this thread's channel; the operations come back in order.
    fn read_ops(&self, mut ops: Vec<Op>) -> std::result::Result<Vec<Op>, ReadFailure> {
        let channel = self.store.channel().map_err(ReadFailure::Store)?;
        if let [Op::Read { lba, .. }] = &ops[..]
            && *lba != u64::MAX
            && let Some(op) = ops.pop()
        {
            let (op, result) = channel.block_on(channel.io(op));
            return result.map(|()| vec![op]).map_err(ReadFailure::Io);
        }
        let mut ready = Vec::new();
        let mut run = Vec::new();
        for (i, op) in ops.into_iter().enumerate() {
            if matches!(op, Op::Read { lba: u64::MAX, .. }) {
                ready.push((i, op));
            } else {
                run.push((i, op));
            }
        }
        let (places, ops): (Vec<usize>, Vec<Op>) = run.into_iter().unzip();
        let outcomes = channel.block_on(channel.io_all(ops));
        for (i, (op, result)) in places.into_iter().zip(outcomes) {
            result.map_err(ReadFailure::Io)?;
            ready.push((i, op));
        }
        ready.sort_unstable_by_key(|(i, _)| *i);
        Ok(ready.into_iter().map(|(_, op)| op).collect())
    }

    fn read_error(&self, ino: &Inode, e: ReadFailure) -> FsError {
        match e {
            ReadFailure::Io(e) => FsError::io(format!("{}: read", ino.path()), e),
            ReadFailure::Store(e) => self.store_error(ino.path(), e),
        }
    }

    /// Fills `out` from `off`; an error if the file is shorter. For callers who hold the append lock:
    /// no truncation can overtake them.
    pub fn read_exact(&self, ino: &Inode, off: u64, out: &mut [u8]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        let epoch = ino.epoch.load(Ordering::Acquire);
        match self.read_missing(ino, off, out, epoch, false)? {
            Read::Filled => Ok(()),
            Read::Overtaken => Err(ino.lost(off, off + out.len() as u64)),
        }
    }

    /// Does several reads together: everything that is not in memory is in flight at once.
    pub fn read_many(&self, ino: &Inode, requests: &mut [ReadRequest<'_>], keep: bool) {
        let epoch = ino.epoch.load(Ordering::Acquire);
        let len = ino.len();
        let mut plans: Vec<(usize, Plan)> = Vec::new();
        let mut ops = Vec::new();
        for (i, r) in requests.iter_mut().enumerate() {
            let want = len.saturating_sub(r.off);
            let n = usize::try_from(want).map_or(r.buf.len(), |w| w.min(r.buf.len()));
            r.result = Ok(n);
            if ino.frames.copy(r.off, &mut r.buf[..n]) == n {
                self.cache.count_hit();
                continue;
            }
            self.cache.count_miss();
            match self
                .check_mounted(|| ino.path())
                .and_then(|()| self.plan(ino, r.off, n, keep))
            {
                Ok(Some(mut plan)) => {
                    ops.append(&mut plan.ops);
                    plans.push((i, plan));
                }
                // It has come into memory meanwhile, or was cut off.
                Ok(None) | Err(_) => r.result = self.read_at(ino, r.off, r.buf, keep),
            }
        }
        if plans.is_empty() {
            return;
        }
        let mut pieces = Vec::new();
        let failed = match self.read_ops(ops) {
            Ok(ops) => {
                let mut ops = ops.into_iter();
                for (_, plan) in &plans {
                    let mut mine = Vec::new();
                    let mut bufs = 0;
                    while bufs < plan.places.len() {
                        let Some(op) = ops.next() else { break };
                        bufs += if let Op::ReadV { bufs, .. } = &op {
                            bufs.len()
                        } else {
                            1
                        };
                        mine.push(op);
                    }
                    pieces.push(plan.finish(ino, mine));
                }
                false
            }
            Err(_) => true,
        };
        let again = failed || ino.epoch.load(Ordering::Acquire) != epoch;
        for (k, (i, _)) in plans.iter().enumerate() {
            let r = &mut requests[*i];
            if again {
                // One by one, so that an error comes to the request that it belongs to.
                r.result = self.read_at(ino, r.off, r.buf, keep);
                continue;
            }
            let n = *r.result.as_ref().unwrap_or(&0);
            let mut done = 0;
            while done < n {
                let at = r.off + done as u64;
                let out = &mut r.buf[done..n];
                let copied = pieces[k].iter().map(|p| p.copy(at, out)).find(|c| *c > 0);
                let copied = copied.unwrap_or_else(|| ino.frames.copy(at, out));
                if copied == 0 {
                    break;
                }
                done += copied;
            }
            if done < n {
                r.result = self.read_at(ino, r.off, r.buf, keep);
            }
        }
    }

    /// Starts reads of what is missing of `[off, off + want)` on a shared channel. `done` gets the
    /// pieces. `None` if nothing is missing.
    pub fn start_read(
        &self,
        ino: &Arc<Inode>,
        off: u64,
        want: usize,
        keep: bool,
        done: impl FnOnce(std::result::Result<Vec<Piece>, Box<IoError>>) + Send + 'static,
    ) -> Result<Option<Ticket>> {
        let Some(mut plan) = self.plan(ino, off, want, keep)? else {
            return Ok(None);
        };
        let ops = std::mem::take(&mut plan.ops);
        if ops
            .iter()
            .any(|op| matches!(op, Op::Read { lba: u64::MAX, .. }))
        {
            // Part of it was read through the blobstore: the rest now, too.
            let ops = self.read_ops(ops).map_err(|e| self.read_error(ino, e))?;
            let pieces = plan.finish(ino, ops);
            return Ok(Some(
                self.pool
                    .submit(Vec::new(), Box::new(move |_| done(Ok(pieces)))),
            ));
        }
        let file = Arc::clone(ino);
        let on_done = move |o: Outcome| match o.result {
            Ok(()) => done(Ok(plan.finish(&file, o.ops))),
            Err(e) => done(Err(e)),
        };
        Ok(Some(self.pool.submit(ops, Box::new(on_done))))
    }
}

enum ReadFailure {
    Io(Box<IoError>),
    Store(crate::blobstore::Error),
}

#[cfg(test)]
mod tests {
    use super::super::options::{FormatOptions, MountOptions, OpenOptions};
    use super::super::{FileSystem, load};
    use super::*;

    /// A reader whose idea of the length is older than a truncation stops, and looks again.
    #[test]
    fn a_reader_outlives_a_truncation() {
        let dev = pumice_bdev::open("malloc://16M?block_size=4096").unwrap();
        FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
        let core = load::mount(&dev, &MountOptions::default()).unwrap();
        let ino = core.open("/f", OpenOptions::CREATE).unwrap();
        core.append(&ino, &[7; 8192]).unwrap();
        core.sync(&ino).unwrap();
        let epoch = ino.epoch.load(Ordering::Acquire);
        core.truncate(&ino, 5050).unwrap();
        let mut out = [0; 100];
        let read = core.read_missing(&ino, 5000, &mut out, epoch, true);
        assert!(matches!(read, Ok(Read::Overtaken)));
        assert_eq!(core.read_at(&ino, 5000, &mut out, true).unwrap(), 50);
        core.truncate(&ino, 0).unwrap();
        // Not even its clusters are there any more.
        let read = core.read_missing(&ino, 5000, &mut out, epoch, true);
        assert!(matches!(read, Ok(Read::Overtaken)));
        assert_eq!(core.read_at(&ino, 5000, &mut out, true).unwrap(), 0);
        core.close(&ino);
        core.unmount().unwrap();
    }
}
