//! Claims: devices that one module uses exclusively.

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

    fn below(&self) -> Option<&dyn BlockDevice> {
        Some(&self.bdev)
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        self.bdev.open_channel()
    }
}
