//! Checked register accesses to a mapped BAR, for transports that have one.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pumice_io::sys::{DeviceMapping, Doorbell, MmioMap};

use super::TransportError;

/// The mapped BAR 0.
#[derive(Debug)]
pub(crate) struct MappedBar {
    device: String,
    mapping: Arc<DeviceMapping>,
    mmio: MmioMap,
}

impl MappedBar {
    pub(crate) fn new(device: &str, mapping: Arc<DeviceMapping>) -> MappedBar {
        let mmio = mapping.mmio();
        MappedBar {
            device: device.to_owned(),
            mapping,
            mmio,
        }
    }

    fn outside(&self, offset: u32) -> TransportError {
        TransportError::OutOfRange {
            device: self.device.clone(),
            what: "register",
            offset: u64::from(offset),
            limit: self.mmio.len() as u64,
        }
    }

    pub(crate) fn read32(&self, offset: u32) -> Result<u32, TransportError> {
        let word = self.mmio.word32(offset as usize);
        let word = word.ok_or_else(|| self.outside(offset))?;
        Ok(u32::from_le(word.load(Ordering::Acquire)))
    }

    pub(crate) fn read64(&self, offset: u32) -> Result<u64, TransportError> {
        let word = self.mmio.word64(offset as usize);
        let word = word.ok_or_else(|| self.outside(offset))?;
        Ok(u64::from_le(word.load(Ordering::Acquire)))
    }

    pub(crate) fn write32(&self, offset: u32, value: u32) -> Result<(), TransportError> {
        let word = self.mmio.word32(offset as usize);
        let word = word.ok_or_else(|| self.outside(offset))?;
        word.store(value.to_le(), Ordering::Release);
        Ok(())
    }

    pub(crate) fn write64(&self, offset: u32, value: u64) -> Result<(), TransportError> {
        let word = self.mmio.word64(offset as usize);
        let word = word.ok_or_else(|| self.outside(offset))?;
        word.store(value.to_le(), Ordering::Release);
        Ok(())
    }

    pub(crate) fn doorbell(&self, offset: u32) -> Result<Doorbell, TransportError> {
        Doorbell::mapped(&self.mmio, offset as usize).ok_or_else(|| self.outside(offset))
    }

    /// Replaces the device's pages for every holder of a register or doorbell.
    pub(crate) fn retire(&self) {
        if let Err(error) = self.mapping.retire() {
            tracing::error!(device = self.device, %error, "BAR 0 stays mapped, so the kernel cannot have the device back before this process ends");
        }
    }
}
