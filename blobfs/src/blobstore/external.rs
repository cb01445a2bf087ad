//! External snapshots: devices outside of the store, below thin blobs.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use pumice_bdev::{BdevError, BlockDevice, DmaBuf};

use super::channels::Channels;
use super::error::Error;
use super::format::BlobId;
use super::steady::Steady;

/// Opens the external snapshot that a blob names by these bytes.
pub type OpenExternal = Arc<dyn ExternalOpener>;

/// The interface of [`OpenExternal`]. Every closure of this form implements it.
pub trait ExternalOpener: Send + Sync {
    /// Opens the snapshot `ext_id` for `blob`. It is called without any lock of the store, so other
    /// operations go on meanwhile. Threads that need the same snapshot may each call it; one of the
    /// results is used.
    ///
    /// # Errors
    /// Returns the error of opening the device. The blob cannot be opened then.
    fn open(&self, blob: BlobId, ext_id: &[u8]) -> Result<Arc<dyn BlockDevice>, BdevError>;
}

impl<F> ExternalOpener for F
where
    F: Fn(BlobId, &[u8]) -> Result<Arc<dyn BlockDevice>, BdevError> + Send + Sync,
{
    fn open(&self, blob: BlobId, ext_id: &[u8]) -> Result<Arc<dyn BlockDevice>, BdevError> {
        self(blob, ext_id)
    }
}

impl std::fmt::Debug for dyn ExternalOpener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ExternalOpener")
    }
}

/// The external snapshots that are open, and the way to open others.
#[derive(Debug, Default)]
pub(crate) struct Externals {
    pub opener: Option<OpenExternal>,
    open: HashMap<Arc<[u8]>, Weak<External>>,
}

impl Externals {
    pub fn new(opener: Option<OpenExternal>) -> Externals {
        Externals {
            opener,
            open: HashMap::new(),
        }
    }

    /// Returns an external snapshot, if it is open.
    pub fn get(&self, external_id: &Arc<[u8]>) -> Option<Arc<External>> {
        self.open.get(external_id)?.upgrade()
    }

    /// Whether `external` is the open one of this name.
    pub fn is_open(&self, external_id: &Arc<[u8]>, external: Option<&Arc<External>>) -> bool {
        let open = self.get(external_id);
        open.zip(external)
            .is_some_and(|(open, external)| Arc::ptr_eq(&open, external))
    }

    pub fn add(&mut self, external_id: &Arc<[u8]>, external: &Arc<External>) {
        self.open.retain(|_, external| external.strong_count() > 0);
        self.open
            .insert(Arc::clone(external_id), Arc::downgrade(external));
    }

    /// Returns the external snapshot below `blob`, which must be open.
    pub fn opened(&self, blob: BlobId, external_id: &Arc<[u8]>) -> Result<Arc<External>, Error> {
        self.get(external_id).ok_or_else(|| Error::CannotOpen {
            blob,
            reason: format!(
                "its external snapshot \"{}\" is not open",
                external_id.escape_ascii()
            ),
        })
    }
}

/// An open external snapshot.
#[derive(Debug)]
pub(crate) struct External {
    dev: Arc<dyn BlockDevice>,
    channels: Channels,
}

impl External {
    pub fn new(dev: Arc<dyn BlockDevice>) -> External {
        let dev: Arc<dyn BlockDevice> = Steady::new(dev);
        External {
            channels: Channels::new(Arc::clone(&dev)),
            dev,
        }
    }

    /// Size in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.dev.info().len_bytes()
    }

    /// Reads into `out` from `offset`, zeroes past the end. Blocks, since the caller's channel
    /// belongs to another device.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), Error> {
        let info = self.dev.info();
        let block = u64::from(info.block_size);
        let inside = out
            .len()
            .min(usize::try_from(self.len_bytes().saturating_sub(offset)).unwrap_or(usize::MAX));
        let (out, past) = out.split_at_mut(inside);
        past.fill(0);
        let limit = info.transfer_blocks(1 << 20) * block;
        let channel = self.channels.get()?;
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            let first = at / block;
            let skip = usize::try_from(at % block).expect("less than a block");
            let end = (offset + out.len() as u64).div_ceil(block) * block;
            let len = (end - first * block).min(limit);
            let buf = DmaBuf::new(usize::try_from(len).expect("at most 1 MiB"))?;
            let buf = channel.block_on(channel.read(first, buf))?;
            let now = (buf.len() - skip).min(out.len() - done);
            out[done..done + now].copy_from_slice(&buf[skip..skip + now]);
            done += now;
        }
        Ok(())
    }
}
