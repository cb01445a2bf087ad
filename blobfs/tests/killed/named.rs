//! A device that other processes know by a name, on any other device.

use std::sync::Arc;

use pumice_bdev::{BdevError, BlockDevice, DeviceInfo, IoChannel};

/// The device. Each is one of its own, so that a mount of one does not exclude one of another.
#[derive(Debug)]
pub struct Named {
    base: Arc<dyn BlockDevice>,
    name: String,
}

impl Named {
    pub fn on(base: Arc<dyn BlockDevice>, name: &str) -> Arc<Named> {
        Arc::new(Named {
            base,
            name: name.to_owned(),
        })
    }
}

impl BlockDevice for Named {
    fn info(&self) -> &DeviceInfo {
        self.base.info()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        self.base.open_channel()
    }

    fn host_name(&self) -> Option<String> {
        Some(self.name.clone())
    }
}
