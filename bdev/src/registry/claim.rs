//! Claims: devices that one module uses exclusively.

use std::ops::Range;

use super::Bdev;
use crate::device::{BlockDevice, DeviceInfo, IoChannel};
use crate::error::BdevError;

/// A device that the holder uses exclusively. Dropping this releases the claim.
#[derive(Debug)]
pub struct Claimed {
    bdev: Bdev,
}

impl Claimed {
    /// Claims the device for `by`, unless somebody has claimed it.
    pub(super) fn new(bdev: Bdev, by: &str) -> Result<Claimed, BdevError> {
        let mut claim = bdev.entry.claim.lock();
        if let Some(by) = &*claim {
            return Err(BdevError::Claimed {
                name: bdev.info().name.clone(),
                by: by.clone(),
            });
        }
        *claim = Some(by.to_owned());
        drop(claim);
        Ok(Claimed { bdev })
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        *self.bdev.entry.claim.lock() = None;
    }
}

impl BlockDevice for Claimed {
    fn info(&self) -> &DeviceInfo {
        self.bdev.info()
    }

    fn host_space(&self) -> Option<crate::HostSpace> {
        self.bdev.host_space()
    }

    fn identity(&self) -> usize {
        self.bdev.identity()
    }

    fn host_name(&self) -> Option<String> {
        self.bdev.host_name()
    }

    fn own_channels(&self) -> Option<usize> {
        self.bdev.own_channels()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        self.bdev.open_channel()
    }

    fn driver_specific(&self) -> serde_json::Value {
        self.bdev.driver_specific()
    }

    fn next_data(&self, lba: u64) -> Result<Option<Range<u64>>, BdevError> {
        self.bdev.next_data(lba)
    }

    fn keep_file(&self, keep: bool) {
        self.bdev.keep_file(keep);
    }
}
