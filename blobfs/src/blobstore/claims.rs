//! Claims of devices: a process loads at most one store from a device.
//!
//! The device's own lock excludes other processes. Without claims two stores of one process could
//! write to one device, each with its own view of the free space.

use std::collections::HashMap;
use std::sync::LazyLock;

use parking_lot::Mutex;
use pumice_bdev::{BdevError, BlockDevice};

use super::error::Error;

/// The use of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// Used by this number of stores that only read.
    Read(usize),
    /// Used by one store that may write.
    Write,
}

static USES: LazyLock<Mutex<HashMap<usize, Use>>> = LazyLock::new(Mutex::default);

/// A claim of a device, released when it is dropped. Its owner keeps the device alive.
#[derive(Debug)]
pub(crate) struct Claim(usize);

impl Claim {
    /// Claims a device exclusively, or for reading together with other readers.
    ///
    /// # Errors
    /// Fails with [`BdevError::InUse`].
    pub fn new(dev: &dyn BlockDevice, read_only: bool) -> Result<Claim, Error> {
        let key = dev.identity();
        let mut uses = USES.lock();
        let next = match (uses.get(&key), read_only) {
            (None, true) => Use::Read(1),
            (None, false) => Use::Write,
            (Some(Use::Read(n)), true) => Use::Read(n + 1),
            (Some(_), _) => {
                return Err(Error::Device(BdevError::InUse {
                    device: dev.info().name.clone(),
                    pid: Some(std::process::id()),
                }));
            }
        };
        uses.insert(key, next);
        Ok(Claim(key))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut uses = USES.lock();
        match uses.get(&self.0).copied() {
            Some(Use::Read(n)) if n > 1 => {
                let left = Use::Read(n - 1);
                uses.insert(self.0, left);
            }
            _ => {
                uses.remove(&self.0);
            }
        }
    }
}
