//! `null`: a block device that does nothing, for measuring the layers above it.
//!
//! Writes are discarded. A read leaves its buffer as it was.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pumice_io::uri::Uri;
use pumice_io::{Completion, Op, OpKind, OpSet, SubmitError};

use crate::device::{BlockDevice, DeviceInfo, IoChannel};
use crate::error::BdevError;
use crate::malloc::check_geometry;
use crate::module::{Module, memory_params, size_in_place};
use crate::queue::{Completed, refuse};
use crate::uuid;

/// A block device that does nothing.
#[derive(Debug, Clone)]
pub struct Null {
    info: Arc<DeviceInfo>,
}

impl Null {
    /// Makes the device. A `name` of `None` gives it the next free `NullN`.
    ///
    /// # Errors
    /// Fails for a block size that is not a power of two from 512 to 65536, and without any block.
    pub fn new(
        name: Option<String>,
        block_size: u32,
        num_blocks: u64,
        uuid: Option<[u8; 16]>,
    ) -> Result<Null, BdevError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = name.unwrap_or_else(|| format!("Null{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        check_geometry(&name, block_size, num_blocks)?;
        let mut info = DeviceInfo::new(&name, "null", block_size, num_blocks);
        "Null disk".clone_into(&mut info.product);
        info.uuid = uuid.unwrap_or_else(uuid::random);
        info.keeps_data = false;
        info.outlives_process = false;
        info.ops = OpSet::BASIC.with(OpKind::Unmap).with(OpKind::Abort);
        Ok(Null {
            info: Arc::new(info),
        })
    }
}

impl BlockDevice for Null {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(NullChannel {
            info: Arc::clone(&self.info),
            done: Completed::default(),
        }))
    }
}

struct NullChannel {
    info: Arc<DeviceInfo>,
    done: Completed,
}

impl IoChannel for NullChannel {
    #[inline]
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        if self.done.is_full() {
            return Err(SubmitError::Busy(op));
        }
        if let Err(e) = self.info.check(&op) {
            return refuse(op, e);
        }
        self.done.push(tag, op, Ok(()));
        Ok(())
    }

    #[inline]
    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        self.done.drain_into(out)
    }

    fn wait(&mut self, _timeout: Duration) -> Result<(), BdevError> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }
}

/// Opens devices by URI.
pub(crate) static MODULE: Module = Module {
    examples: &["null://1T"],
    open: |uri, _| open_uri(uri),
    call: |_, info| Some(("bdev_null_create", memory_params(info))),
};

fn open_uri(uri: &mut Uri) -> Result<Arc<dyn BlockDevice>, BdevError> {
    let block_size = uri.number("block_size", 0..=u64::MAX)?.unwrap_or(512);
    let name = uri.option("name");
    let num_blocks = size_in_place(uri, block_size)?;
    uri.finish()?;
    Ok(Arc::new(Null::new(name, block_size, num_blocks, None)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nobody can submit without end to a channel that is never polled.
    #[test]
    fn a_channel_that_nobody_polls_becomes_busy() {
        let dev = Null::new(None, 512, 8, None).unwrap();
        let mut channel = dev.open_channel().unwrap();
        let mut accepted = 0;
        while channel.submit(accepted, Op::Flush).is_ok() {
            accepted += 1;
            assert!(accepted < 100_000);
        }
        let busy = channel.submit(7, Op::Flush);
        assert!(matches!(busy, Err(SubmitError::Busy(Op::Flush))));
        assert_eq!(channel.in_flight() as u64, accepted);
        let mut out = Vec::new();
        assert_eq!(channel.poll(&mut out) as u64, accepted);
        channel.submit(7, Op::Flush).unwrap();
    }
}
