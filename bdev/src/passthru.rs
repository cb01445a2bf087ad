//! `passthru`: a device that passes every operation to the one below it.
//!
//! It is a template for your own module: copy it and change the operations that pass. The example
//! `custom_bdev` shows how.

use std::sync::Arc;
use std::time::Duration;

use pumice_io::{Completion, Op, SubmitError};

use crate::device::{BlockDevice, DeviceInfo, IoChannel};
use crate::error::BdevError;

/// Another device under a new name.
#[derive(Debug)]
pub struct Passthru {
    info: DeviceInfo,
    base: Arc<dyn BlockDevice>,
}

impl Passthru {
    /// Puts the device `name` on top of `base`.
    pub fn new(name: &str, base: Arc<dyn BlockDevice>) -> Passthru {
        let mut info = base.info().clone();
        name.clone_into(&mut info.name);
        info.aliases.clear();
        info.module = "passthru";
        "passthru".clone_into(&mut info.product);
        info.uuid = crate::uuid::derived(format!("{name} on {:?}", base.info().uuid).as_bytes());
        Passthru { info, base }
    }

    /// Sets a UUID in place of the one derived from the name and the base.
    #[must_use]
    pub fn with_uuid(mut self, uuid: [u8; 16]) -> Passthru {
        self.info.uuid = uuid;
        self
    }
}

impl BlockDevice for Passthru {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        Some(&*self.base)
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        Ok(Box::new(PassthruChannel {
            base: self.base.open_channel()?,
        }))
    }

    fn driver_specific(&self) -> serde_json::Value {
        serde_json::json!({
            "passthru": { "name": self.info.name, "base_bdev_name": self.base.info().name }
        })
    }
}

struct PassthruChannel {
    base: Box<dyn IoChannel>,
}

impl IoChannel for PassthruChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        self.base.submit(tag, op)
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        self.base.poll(out)
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
