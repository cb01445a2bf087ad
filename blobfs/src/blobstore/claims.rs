//! One store per device: which devices this process has loaded a store from.
//!
//! Other processes are kept out by the device's own lock. Within a process nothing else would keep two stores
//! from writing to one device, each by its own idea of what is free.

use std::collections::HashMap;
use std::sync::LazyLock;

use parking_lot::Mutex;
use pumice_bdev::BlockDevice;

use super::error::Error;

/// How a device is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    /// By so many stores that only read.
    Read(usize),
    /// By one store that may write.
    Write,
}

static USES: LazyLock<Mutex<HashMap<usize, Use>>> = LazyLock::new(Mutex::default);

/// The right to use a device; given up when it is dropped. Whoever has it keeps the device alive.
#[derive(Debug)]
pub(crate) struct Claim(usize);

impl Claim {
    /// Claims a device: alone, or for reading together with others that read.
    ///
    /// # Errors
    /// [`Error::Busy`].
    pub fn new(dev: &dyn BlockDevice, read_only: bool) -> Result<Claim, Error> {
        let key = dev.identity();
        let mut uses = USES.lock();
        let next = match (uses.get(&key), read_only) {
            (None, true) => Use::Read(1),
            (None, false) => Use::Write,
            (Some(Use::Read(n)), true) => Use::Read(n + 1),
            (Some(_), _) => {
                return Err(Error::Busy(format!(
                    "{}: this process has loaded a store from this device already; unload that first",
                    dev.info().name
                )));
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
