//! Metadata I/O: one channel, used under the metadata lock, many operations in flight.

use std::sync::Arc;
use std::time::Duration;

use pumice_bdev::{
    BlockDevice, Completion, DeviceInfo, DmaBuf, DmaSlice, IoChannel, IoError, Op, OpKind,
    SubmitError,
};

use super::error::Error;
use crate::closed::ClosedChannel;

/// Operations that are kept in flight.
const DEPTH: usize = 32;
/// Longest single read, write, or clearing of a device that gives no limit.
const MAX_IO_BYTES: u64 = 1 << 20;
/// Longest single write-zeroes or unmap.
const MAX_CLEAR_BYTES: u64 = 1 << 30;

/// The channel of the metadata, and what its device can do.
pub(crate) struct MdIo {
    channel: Box<dyn IoChannel>,
    block_size: u64,
    write_cache: bool,
    fua: bool,
    unmap: bool,
    write_zeroes: bool,
    copy: bool,
    max_io_blocks: u64,
    reaped: Vec<Completion>,
    next_tag: u64,
}

impl std::fmt::Debug for MdIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MdIo").finish_non_exhaustive()
    }
}

impl MdIo {
    pub fn new(dev: &Arc<dyn BlockDevice>) -> Result<MdIo, Error> {
        let info = dev.info();
        let block_size = u64::from(info.block_size);
        let limit = if info.max_io_blocks == 0 {
            u64::MAX
        } else {
            info.max_io_blocks.into()
        };
        Ok(MdIo {
            channel: dev.open_channel()?,
            block_size,
            write_cache: info.write_cache,
            fua: info.ops.has(OpKind::Fua),
            unmap: info.ops.has(OpKind::Unmap),
            write_zeroes: info.ops.has(OpKind::WriteZeroes),
            copy: info.ops.has(OpKind::Copy),
            max_io_blocks: limit.min(MAX_IO_BYTES / block_size),
            reaped: Vec::new(),
            next_tag: 0,
        })
    }

    /// Gives up the channel, between operations: what comes from now on is refused.
    pub fn close(&mut self, info: &DeviceInfo) {
        self.channel = Box::new(ClosedChannel(info.clone()));
    }

    /// Does the device have a volatile cache?
    pub fn has_cache(&self) -> bool {
        self.write_cache
    }

    /// Can the device copy by itself?
    pub fn can_copy(&self) -> bool {
        self.copy
    }

    /// Longest read or write, in blocks.
    pub fn max_io_blocks(&self) -> u64 {
        self.max_io_blocks
    }

    /// Does all operations, many at a time, and hands each to `done` as it completes, in any order. Returns
    /// when none is in flight any more; after an error of `done` nothing new is begun.
    pub fn stream(
        &mut self,
        ops: impl IntoIterator<Item = Result<Op, Error>>,
        mut done: impl FnMut(Op, Result<(), Box<IoError>>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut ops = ops.into_iter();
        let mut waiting = None;
        let mut failed = None;
        loop {
            while failed.is_none() && self.channel.in_flight() < DEPTH {
                let op = match waiting.take().map_or_else(|| ops.next(), |op| Some(Ok(op))) {
                    Some(Ok(op)) => op,
                    Some(Err(error)) => {
                        failed = Some(error);
                        break;
                    }
                    None => break,
                };
                self.next_tag += 1;
                match self.channel.submit(self.next_tag, op) {
                    Ok(()) => {}
                    Err(SubmitError::Busy(op)) => {
                        waiting = Some(op);
                        break;
                    }
                    Err(SubmitError::Refused(op, error)) => failed = done(op, Err(error)).err(),
                }
            }
            self.channel.poll(&mut self.reaped);
            if self.reaped.is_empty() {
                if self.channel.in_flight() == 0 && (waiting.is_none() || failed.is_some()) {
                    return failed.map_or(Ok(()), Err);
                }
                if let Err(error) = self.channel.wait(Duration::from_millis(100)) {
                    tracing::warn!(%error, "waiting for metadata I/O failed; polling instead");
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
            for completion in self.reaped.drain(..) {
                if let Err(error) = done(completion.op, completion.result) {
                    failed = failed.or(Some(error));
                }
            }
        }
    }

    /// Does all operations; the first error, when all have ended.
    pub fn run(&mut self, ops: impl IntoIterator<Item = Op>) -> Result<(), Error> {
        self.stream(ops.into_iter().map(Ok), |_, result| Ok(result?))
    }

    /// Does writes and clearings such that they are durable when it returns.
    pub fn run_durable(&mut self, mut ops: Vec<Op>) -> Result<(), Error> {
        if ops.is_empty() {
            return Ok(());
        }
        let each = self.write_cache && self.fua;
        for op in &mut ops {
            if let Op::Write { fua, .. } | Op::WriteV { fua, .. } | Op::WriteZeroes { fua, .. } = op
            {
                *fua = each;
            }
        }
        let unfit = !each || ops.iter().any(|op| !op.fua());
        self.run(ops)?;
        if self.write_cache && unfit {
            self.flush()
        } else {
            Ok(())
        }
    }

    /// Makes everything durable that has completed. Nothing to do without a volatile cache.
    pub fn flush(&mut self) -> Result<(), Error> {
        if self.write_cache {
            self.run([Op::Flush])
        } else {
            Ok(())
        }
    }

    /// Reads whole blocks.
    pub fn read(&mut self, lba: u64, len: usize) -> Result<DmaBuf, Error> {
        let buf = DmaBuf::new(len)?;
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

    /// Operations that write `bytes` (whole blocks) at `lba`.
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

    /// As [`MdIo::zeroes`], by writing: on a sparse image the blocks have their place on the host from then on.
    pub fn written_zeroes(&self, lba: u64, len_blocks: u64) -> Result<Vec<Op>, Error> {
        self.zeroes_by(false, lba, len_blocks)
    }

    /// Operations after which `len_blocks` blocks read as zeroes.
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

    /// Operations that tell the device that blocks are not needed; none if it cannot be told.
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

/// A copy of `bytes` that a device can read.
pub(crate) fn dma(bytes: &[u8]) -> Result<DmaSlice, Error> {
    let mut buf = DmaBuf::new(bytes.len())?;
    buf.copy_from_slice(bytes);
    Ok(buf.freeze())
}

/// Cuts a range into pieces of at most `step`.
fn pieces(start: u64, len: u64, step: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..len.div_ceil(step)).map(move |i| (start + i * step, step.min(len - i * step)))
}
