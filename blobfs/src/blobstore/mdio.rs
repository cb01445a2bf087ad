//! Metadata I/O: a channel for each change in progress, with many operations in flight on each.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use pumice_bdev::{BlockDevice, DeviceInfo, DmaBuf, DmaSlice, Engine, IoError, Op, OpKind};

use super::error::Error;
use super::format::Page;
use super::retry::first_or_late;
use super::steady::FailedFlush;

/// Number of operations that are kept in flight on a channel.
const DEPTH: usize = 32;
/// Most channels for a store's metadata. A change that finds all of them in use waits for one.
const CHANNELS: usize = 16;
/// Longest single read, write or clear on a device that gives no limit, in bytes.
const MAX_IO_BYTES: u64 = 1 << 20;
/// Longest single write-zeroes or unmap, in bytes.
const MAX_CLEAR_BYTES: u64 = 1 << 30;

/// The event that makes a write durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Persist {
    /// The completion of the write, because the device has no volatile cache.
    Completion,
    /// FUA.
    Fua,
    /// A flush after its completion, because the device has a volatile cache and no FUA.
    Flush,
}

/// The abilities of a device; it builds operations for the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Abilities {
    block_size: u64,
    persist: Persist,
    unmap: bool,
    write_zeroes: bool,
    copy: bool,
    max_io_blocks: u64,
}

/// Flushes of the metadata, which all its channels share.
#[derive(Debug, Default)]
struct Flushes {
    /// Number of runs of writes that have completed.
    completed: AtomicU64,
    /// Number of those that a flush has covered.
    covered: AtomicU64,
    /// Those that have failed, of all channels of the device.
    failed: Arc<FailedFlush>,
    /// Held during a flush.
    one: Mutex<()>,
}

/// A channel for metadata.
pub(crate) struct MdIo {
    engine: Engine<()>,
    can: Abilities,
    flushes: Arc<Flushes>,
    /// Metadata pages that a journal has and the device does not, of a load that writes nothing.
    replayed: Arc<BTreeMap<u32, Arc<Page>>>,
}

/// The channels for a store's metadata.
#[derive(Debug)]
pub(crate) struct MdChannels {
    dev: Arc<dyn BlockDevice>,
    flushes: Arc<Flushes>,
    channels: Mutex<Pool>,
    returned: Condvar,
}

#[derive(Debug)]
struct Pool {
    idle: Vec<MdIo>,
    lent: usize,
    closed: bool,
}

/// A channel in use. Dropping it returns it.
#[derive(Debug)]
pub(crate) struct Lent<'a> {
    io: Option<MdIo>,
    channels: &'a MdChannels,
}

impl std::fmt::Debug for MdIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MdIo").finish_non_exhaustive()
    }
}

impl MdChannels {
    /// Makes the channels; `first` is one that is open already.
    pub fn new(dev: Arc<dyn BlockDevice>, first: MdIo) -> MdChannels {
        MdChannels {
            dev,
            flushes: Arc::clone(&first.flushes),
            channels: Mutex::new(Pool {
                idle: vec![first],
                lent: 0,
                closed: false,
            }),
            returned: Condvar::new(),
        }
    }

    /// Takes a channel for one change. If the device has no more of them, or all are in use, this
    /// waits until one is returned. A thread that has one must not call this.
    ///
    /// # Errors
    /// Fails with [`Error::Unloaded`].
    pub fn get(&self) -> Result<Lent<'_>, Error> {
        let mut pool = self.channels.lock();
        let mut may_open = true;
        loop {
            if pool.closed {
                return Err(Error::Unloaded);
            }
            if let Some(io) = pool.idle.pop() {
                pool.lent += 1;
                return Ok(self.lend(io));
            }
            if may_open && pool.lent < CHANNELS {
                pool.lent += 1;
                drop(pool);
                let opened = MdIo::sharing(&self.dev, Arc::clone(&self.flushes));
                pool = self.channels.lock();
                match opened {
                    Ok(io) => return Ok(self.lend(io)),
                    Err(error) => {
                        pool.lent -= 1;
                        if pool.lent == 0 && pool.idle.is_empty() {
                            return Err(error);
                        }
                        tracing::debug!(%error, "no further channel for metadata; waiting for one");
                        may_open = false;
                        continue;
                    }
                }
            }
            self.returned.wait(&mut pool);
        }
    }

    fn lend(&self, io: MdIo) -> Lent<'_> {
        Lent {
            io: Some(io),
            channels: self,
        }
    }

    /// Closes all channels, between changes. Later requests fail.
    pub fn close(&self) {
        let mut pool = self.channels.lock();
        pool.closed = true;
        pool.idle.clear();
    }
}

impl Deref for Lent<'_> {
    type Target = MdIo;
    fn deref(&self) -> &MdIo {
        self.io.as_ref().expect("there until it is dropped")
    }
}

impl DerefMut for Lent<'_> {
    fn deref_mut(&mut self) -> &mut MdIo {
        self.io.as_mut().expect("there until it is dropped")
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        let mut pool = self.channels.channels.lock();
        pool.lent -= 1;
        if !pool.closed {
            pool.idle.extend(self.io.take());
        }
        drop(pool);
        self.channels.returned.notify_one();
    }
}

impl MdIo {
    /// Opens a channel with flushes of its own. `failed` are the failed ones of all channels.
    pub fn new(dev: &Arc<dyn BlockDevice>, failed: Arc<FailedFlush>) -> Result<MdIo, Error> {
        let flushes = Flushes {
            failed,
            ..Flushes::default()
        };
        MdIo::sharing(dev, Arc::new(flushes))
    }

    fn sharing(dev: &Arc<dyn BlockDevice>, flushes: Arc<Flushes>) -> Result<MdIo, Error> {
        Ok(MdIo {
            engine: Engine::new(dev.open_channel()?),
            can: Abilities::of(dev.info()),
            flushes,
            replayed: Arc::default(),
        })
    }

    /// Has reads of metadata pages find these instead of what is in their places.
    pub fn set_replayed(&mut self, pages: BTreeMap<u32, Arc<Page>>) {
        self.replayed = Arc::new(pages);
    }

    /// Returns the pages that take the place of the device's.
    pub fn replayed(&self) -> Arc<BTreeMap<u32, Arc<Page>>> {
        Arc::clone(&self.replayed)
    }

    /// Returns what the device can do.
    pub fn can(&self) -> Abilities {
        self.can
    }

    /// Performs all operations, many at a time, and passes each to `done` as it completes, in any
    /// order. Returns when none is in flight. After an error of `done` it begins no more.
    pub fn stream(
        &mut self,
        ops: impl IntoIterator<Item = Result<Op, Error>>,
        mut done: impl FnMut(Op, Result<(), Box<IoError>>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut ops = ops.into_iter();
        let mut failed = None;
        loop {
            while failed.is_none() && self.engine.in_flight() < DEPTH {
                let refused = match ops.next() {
                    Some(Ok(op)) => self.engine.submit((), op).err(),
                    Some(Err(error)) => {
                        failed = Some(error);
                        break;
                    }
                    None => break,
                };
                if let Some(((), op, error)) = refused {
                    failed = done(op, Err(error)).err();
                }
            }
            if self.engine.in_flight() > 0 {
                // This passes them to the device, too.
                self.engine.wait(Duration::from_millis(100));
            }
            let ended = self.engine.reap(|_, (), op, result| {
                let error = done(op, result).err();
                failed = first_or_late(failed.take(), error);
                None
            });
            if ended == 0 && self.engine.in_flight() == 0 {
                return failed.map_or(Ok(()), Err);
            }
        }
    }

    /// Performs all operations. Returns the first error when all have ended, or the first of a write that may still land.
    pub fn run(&mut self, ops: impl IntoIterator<Item = Op>) -> Result<(), Error> {
        self.stream(ops.into_iter().map(Ok), |_, result| Ok(result?))
    }

    /// Performs writes and clears so that they are durable on return.
    pub fn run_durable(&mut self, mut ops: Vec<Op>) -> Result<(), Error> {
        if ops.is_empty() {
            return Ok(());
        }
        let each = self.can.persist == Persist::Fua;
        for op in &mut ops {
            if let Op::Write { fua, .. } | Op::WriteV { fua, .. } | Op::WriteZeroes { fua, .. } = op
            {
                *fua = each;
            }
        }
        let unfit = !each || ops.iter().any(|op| !op.fua());
        let failed = self.failed_flushes();
        self.run(ops)?;
        if unfit {
            self.flush_since(failed)
        } else {
            Ok(())
        }
    }

    /// Makes everything durable that has completed. Does nothing if there is no volatile cache.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.flush_since(self.failed_flushes())
    }

    /// Returns the number of flushes that have failed on any channel.
    pub fn failed_flushes(&self) -> u64 {
        self.flushes.failed.count()
    }

    /// Makes everything durable that has completed, by one flush for all that wait for one.
    /// `failed` is [`MdIo::failed_flushes`] before the writes that it must cover. A flush that has
    /// failed since may have lost them, and a later one does not bring them back.
    pub fn flush_since(&mut self, failed: u64) -> Result<(), Error> {
        if self.can.persist == Persist::Completion {
            return Ok(());
        }
        let flushes = Arc::clone(&self.flushes);
        let mine = flushes.completed.fetch_add(1, Ordering::AcqRel) + 1;
        let _one = flushes.one.lock();
        let check = || match flushes.failed.get() {
            Some(error) if flushes.failed.count() != failed => Err(Error::Io(error)),
            _ => Ok(()),
        };
        check()?;
        if flushes.covered.load(Ordering::Acquire) >= mine {
            return Ok(());
        }
        let covers = flushes.completed.load(Ordering::Acquire);
        self.run([Op::Flush])?;
        // Those of other channels do not wait for this lock.
        check()?;
        flushes.covered.store(covers, Ordering::Release);
        Ok(())
    }

    /// Reads whole blocks.
    pub fn read(&mut self, lba: u64, len: usize) -> Result<DmaBuf, Error> {
        self.read_into(lba, DmaBuf::new(len)?)
    }

    /// Reads whole blocks into a buffer. It is gone if that fails.
    pub fn read_into(&mut self, lba: u64, buf: DmaBuf) -> Result<DmaBuf, Error> {
        let mut read = None;
        self.stream([Ok(Op::Read { lba, buf })], |op, result| {
            result?;
            if let Op::Read { buf, .. } = op {
                read = Some(buf);
            }
            Ok(())
        })?;
        Ok(read.expect("a read comes back with its buffer"))
    }
}

impl Abilities {
    /// Reads what a device can do from its description.
    pub fn of(info: &DeviceInfo) -> Abilities {
        let block_size = u64::from(info.block_size);
        Abilities {
            block_size,
            persist: match (info.write_cache, info.ops.has(OpKind::Fua)) {
                (false, _) => Persist::Completion,
                (true, true) => Persist::Fua,
                (true, false) => Persist::Flush,
            },
            unmap: info.ops.has(OpKind::Unmap),
            write_zeroes: info.ops.has(OpKind::WriteZeroes),
            copy: info.ops.has(OpKind::Copy),
            max_io_blocks: info.transfer_blocks(MAX_IO_BYTES),
        }
    }

    /// Returns the bytes of a block.
    pub fn block_size(&self) -> u64 {
        self.block_size
    }

    /// Returns what makes a write durable.
    pub fn persist(&self) -> Persist {
        self.persist
    }

    /// Whether the device can copy by itself.
    pub fn can_copy(&self) -> bool {
        self.copy
    }

    /// Returns the length of the longest read or write, in blocks.
    pub fn max_io_blocks(&self) -> u64 {
        self.max_io_blocks
    }

    /// Returns operations that write `bytes` (whole blocks) at `lba`.
    pub fn writes(&self, lba: u64, bytes: &[u8]) -> Result<Vec<Op>, Error> {
        let step =
            usize::try_from(self.max_io_blocks * self.block_size).expect("at most MAX_IO_BYTES");
        let mut at = lba;
        let op = |chunk: &[u8]| {
            let op = Op::Write {
                lba: at,
                data: dma(chunk)?,
                fua: false,
            };
            at += chunk.len() as u64 / self.block_size;
            Ok(op)
        };
        bytes.chunks(step).map(op).collect()
    }

    /// Returns operations like those of [`Abilities::zeroes`] that write, so that on a sparse image
    /// the host allocates the blocks.
    pub fn written_zeroes(&self, lba: u64, len_blocks: u64) -> Result<Vec<Op>, Error> {
        self.zeroes_by(false, lba, len_blocks)
    }

    /// Returns operations after which `len_blocks` blocks read as zeroes.
    pub fn zeroes(&self, lba: u64, len_blocks: u64) -> Result<Vec<Op>, Error> {
        self.zeroes_by(self.write_zeroes, lba, len_blocks)
    }

    fn zeroes_by(&self, command: bool, lba: u64, len_blocks: u64) -> Result<Vec<Op>, Error> {
        let step = if command {
            MAX_CLEAR_BYTES / self.block_size
        } else {
            self.max_io_blocks
        };
        let mut data: Option<DmaSlice> = None;
        let mut ops = Vec::new();
        for (lba, len_blocks) in pieces(lba, len_blocks, step) {
            if command {
                ops.push(Op::WriteZeroes {
                    lba,
                    len_blocks,
                    fua: false,
                });
                continue;
            }
            let len = usize::try_from(len_blocks * self.block_size).expect("at most MAX_IO_BYTES");
            let whole = match &data {
                Some(data) => data.clone(),
                None => data.insert(DmaBuf::zeroed(len)?.freeze()).clone(),
            };
            ops.push(Op::Write {
                lba,
                data: whole.slice(0..len),
                fua: false,
            });
        }
        Ok(ops)
    }

    /// Returns operations that tell the device that blocks are not needed, or none if the device
    /// cannot be told.
    pub fn unmaps(&self, lba: u64, len_blocks: u64) -> Vec<Op> {
        let step = if self.unmap {
            MAX_CLEAR_BYTES / self.block_size
        } else {
            return Vec::new();
        };
        pieces(lba, len_blocks, step)
            .map(|(lba, len_blocks)| Op::Unmap { lba, len_blocks })
            .collect()
    }
}

/// Returns a copy of `bytes` that a device can read.
pub(crate) fn dma(bytes: &[u8]) -> Result<DmaSlice, Error> {
    let mut buf = DmaBuf::new(bytes.len())?;
    buf.copy_from_slice(bytes);
    Ok(buf.freeze())
}

/// Divides a range into pieces of at most `step`.
fn pieces(start: u64, len: u64, step: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..len.div_ceil(step)).map(move |i| (start + i * step, step.min(len - i * step)))
}

#[cfg(test)]
mod tests;
