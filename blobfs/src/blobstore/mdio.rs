//! Metadata I/O: a channel for each change in progress, with many operations in flight on each.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use pumice_bdev::{BlockDevice, DeviceInfo, DmaBuf, DmaSlice, Engine, IoError, Op, OpKind};

use super::error::Error;
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
        })
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
            let ended = self.engine.reap(|_, (), op, result| {
                let error = done(op, result).err();
                failed = failed.take().or(error);
                None
            });
            if ended == 0 {
                if self.engine.in_flight() == 0 {
                    return failed.map_or(Ok(()), Err);
                }
                self.engine.wait(Duration::from_millis(100));
            }
        }
    }

    /// Performs all operations. Returns the first error when all have ended.
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
mod tests {
    use super::super::steady::Steady;
    use super::*;
    use pumice_bdev::AsyncChannel;
    use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
    use pumice_bdev_testkit::crashsim::{Action, CrashDevice, CrashImage, CrashOptions, Event};

    /// Devices on top of one that makes nothing durable without a flush.
    struct Devices {
        holds: Arc<ErrorDevice>,
        fails: Arc<ErrorDevice>,
        base: CrashDevice,
        flushes: Arc<Flushes>,
        steady: Arc<Steady>,
    }

    fn channels<const N: usize>() -> (Devices, [MdIo; N]) {
        let options = CrashOptions {
            block_size: 4096,
            write_cache: true,
            fua: false,
            ..CrashOptions::default()
        };
        let base = CrashDevice::with_options(&options, CrashImage::zeroed(1 << 20));
        let fails = Arc::new(ErrorDevice::new(None, Arc::new(base.clone())));
        let holds = Arc::new(ErrorDevice::new(None, fails.clone()));
        let steady = Steady::new(holds.clone());
        let as_dyn: Arc<dyn BlockDevice> = steady.clone();
        let first = MdIo::new(&as_dyn, steady.failed_flush()).unwrap();
        let flushes = first.flushes;
        let all = std::array::from_fn(|_| MdIo::sharing(&as_dyn, Arc::clone(&flushes)).unwrap());
        let devices = Devices {
            holds,
            fails,
            base,
            flushes,
            steady,
        };
        (devices, all)
    }

    fn inject(dev: &ErrorDevice, failure: Failure) {
        dev.inject(Injection {
            op: Some(OpKind::Flush),
            failure,
            count: 1,
            range: None,
            queue_depth: 0,
        });
    }

    fn write(lba: u64) -> Vec<Op> {
        let data = DmaBuf::zeroed(4096).unwrap().freeze();
        vec![Op::Write {
            lba,
            data,
            fua: false,
        }]
    }

    fn until(what: &str, mut done: impl FnMut() -> bool) {
        let start = std::time::Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(60), "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The first flush was sent before the others had written, so it does not cover them. One more
    /// covers them all.
    #[test]
    fn one_flush_serves_all_that_wait_for_it_and_none_that_was_sent_before() {
        let (devices, all) = channels::<8>();
        inject(&devices.holds, Failure::Hang);
        std::thread::scope(|scope| {
            let mut all = all.into_iter();
            let mut first = all.next().unwrap();
            let first = scope.spawn(move || first.run_durable(write(0)));
            until("the first flush is held back", || {
                devices.holds.injections().is_empty()
            });
            let others: Vec<_> = (1..)
                .zip(all)
                .map(|(lba, mut io)| scope.spawn(move || io.run_durable(write(lba))))
                .collect();
            until("all have written", || {
                devices.flushes.completed.load(Ordering::Acquire) == 8
            });
            assert!(others.iter().all(|other| !other.is_finished()));
            devices.holds.resume();
            first.join().unwrap().unwrap();
            for other in others {
                other.join().unwrap().unwrap();
            }
        });
        let flush = |event: &Event| match event {
            Event::Submitted(change) => matches!(change.action, Action::Flush),
            _ => false,
        };
        let flushes = devices.base.log().into_iter().filter(flush).count();
        assert_eq!(flushes, 2);
    }

    /// A flush that fails while another channel's writes are in the cache may have lost them.
    #[test]
    fn a_failed_flush_fails_all_whose_writes_it_may_have_lost() {
        let (devices, [mut one, mut two]) = channels::<2>();
        inject(&devices.holds, Failure::Hang);
        inject(&devices.fails, Failure::Fail);
        std::thread::scope(|scope| {
            let one = scope.spawn(move || {
                let result = one.run_durable(write(0));
                (one, result)
            });
            until("the flush is held back", || {
                devices.holds.injections().is_empty()
            });
            let two = scope.spawn(move || two.run_durable(write(1)));
            until("both have written", || {
                devices.flushes.completed.load(Ordering::Acquire) == 2
            });
            devices.holds.resume();
            let (mut one, result) = one.join().unwrap();
            result.unwrap_err();
            two.join().unwrap().unwrap_err();
            // What is written once more is durable.
            one.run_durable(write(0)).unwrap();
        });
    }

    /// It may have failed between a write and the flush that was to cover it, or during that flush.
    #[test]
    fn a_failed_flush_of_another_channel_counts() {
        let (devices, [mut io]) = channels::<1>();
        let data = AsyncChannel::new(devices.steady.open_channel().unwrap());
        let failed = io.failed_flushes();
        io.run(write(0)).unwrap();
        inject(&devices.fails, Failure::Fail);
        data.block_on(data.flush()).unwrap_err();
        io.flush_since(failed).unwrap_err();
        inject(&devices.holds, Failure::Hang);
        std::thread::scope(|scope| {
            let held = scope.spawn(move || io.run_durable(write(0)));
            until("the flush is held back", || {
                devices.holds.injections().is_empty()
            });
            inject(&devices.fails, Failure::Fail);
            data.block_on(data.flush()).unwrap_err();
            devices.holds.resume();
            held.join().unwrap().unwrap_err();
        });
    }
}
