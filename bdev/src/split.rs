//! `split`: one device divided into several of equal size: `Base` into `Basep0`, `Basep1`, ….

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use pumice_io::{Completion, Op, SubmitError};

use crate::device::{BlockDevice, DeviceInfo, IoChannel};
use crate::error::BdevError;
use crate::queue::refuse;

/// One part of a device.
#[derive(Debug)]
pub struct Split {
    info: Arc<DeviceInfo>,
    base: Arc<dyn BlockDevice>,
    offset: u64,
}

impl Split {
    /// Divides `base` into `count` parts of `size_mb` MiB each, or equally into all of its space.
    ///
    /// # Errors
    /// Fails for no parts, for parts without a block, and for more than the device holds.
    pub fn new(
        base: &Arc<dyn BlockDevice>,
        count: u64,
        size_mb: Option<u64>,
    ) -> Result<Vec<Split>, BdevError> {
        let info = base.info();
        let bs = u64::from(info.block_size);
        let invalid = |reason: String| {
            Err(BdevError::InvalidOption {
                name: format!("split of {}", info.name),
                reason,
            })
        };
        if count == 0 || count > 4096 {
            return invalid(format!("{count} parts; there are 1 to 4096"));
        }
        let fair = info.num_blocks / count;
        let blocks = match size_mb.filter(|mb| *mb > 0) {
            Some(mb) => mb.saturating_mul(1 << 20) / bs,
            None => match info.limits.boundary_blocks {
                Some(boundary) if fair >= boundary.get().into() => {
                    fair - fair % u64::from(boundary.get())
                }
                _ => fair,
            },
        };
        if blocks == 0 || blocks > fair {
            return invalid(format!(
                "{count} parts of {blocks} blocks; the device has {}",
                info.num_blocks
            ));
        }
        let part = |i: u64| {
            let mut info = base.info().clone();
            info.name = format!("{}p{i}", info.name);
            info.aliases.clear();
            info.module = "split";
            "Split Disk".clone_into(&mut info.product);
            let what = format!("part {i} of {count} of {:?}", info.uuid);
            info.uuid = crate::uuid::derived(what.as_bytes());
            info.num_blocks = blocks;
            let offset = i * blocks;
            // Groups that the base writes whole are none of a part that begins inside of one.
            if !offset.is_multiple_of(info.atomic_unit_blocks.into()) {
                info.atomic_unit_blocks = 1;
            }
            Split {
                info: Arc::new(info),
                base: Arc::clone(base),
                offset,
            }
        };
        Ok((0..count).map(part).collect())
    }
}

impl BlockDevice for Split {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn host_space(&self) -> Option<crate::HostSpace> {
        // It is not known which part has the blocks.
        let base = self.base.host_space()?;
        Some(crate::HostSpace {
            allocated_bytes: 0,
            ..base
        })
    }

    fn own_channels(&self) -> Option<usize> {
        self.base.own_channels()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(SplitChannel {
            info: Arc::clone(&self.info),
            base: self.base.open_channel()?,
            offset: self.offset,
        }))
    }

    fn driver_specific(&self) -> serde_json::Value {
        let base = &self.base.info().name;
        serde_json::json!({ "split": { "base_bdev": base, "offset_blocks": self.offset } })
    }

    fn next_data(&self, lba: u64) -> Result<Option<Range<u64>>, BdevError> {
        let end = self.info.num_blocks;
        if lba >= end {
            return Ok(None);
        }
        let range = self.base.next_data(self.offset + lba)?;
        Ok(range.and_then(|r| {
            let start = r.start.saturating_sub(self.offset).max(lba);
            (start < end).then(|| start..r.end.saturating_sub(self.offset).min(end))
        }))
    }

    fn keep_file(&self, keep: bool) {
        self.base.keep_file(keep);
    }
}

struct SplitChannel {
    info: Arc<DeviceInfo>,
    base: Box<dyn IoChannel>,
    offset: u64,
}

impl IoChannel for SplitChannel {
    fn submit(&mut self, tag: u64, mut op: Op) -> Result<(), SubmitError> {
        if let Err(e) = self.info.check(&op) {
            return refuse(op, e);
        }
        op.shift(self.offset);
        self.base.submit(tag, op).map_err(|e| match e {
            SubmitError::Busy(mut op) => {
                op.shift(self.offset.wrapping_neg());
                SubmitError::Busy(op)
            }
            SubmitError::Refused(mut op, e) => {
                op.shift(self.offset.wrapping_neg());
                SubmitError::Refused(op, e)
            }
        })
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let before = out.len();
        let n = self.base.poll(out);
        for completion in &mut out[before..] {
            completion.op.shift(self.offset.wrapping_neg());
        }
        n
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        self.base.wait(timeout)
    }

    fn in_flight(&self) -> usize {
        self.base.in_flight()
    }

    fn event_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.base.event_fd()
    }
}
