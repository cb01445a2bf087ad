//! What a module that opens devices by URI consists of.

use std::sync::Arc;

use pumice_io::uri::{Uri, UriError, parse_size};
use serde_json::{Value, json};

use crate::device::{BlockDevice, DeviceInfo};
use crate::error::BdevError;

/// Opens the device that a URI names.
pub(crate) type Open = fn(&mut Uri, OpenOptions) -> Result<Arc<dyn BlockDevice>, BdevError>;

/// A module that opens devices of one kind by URI.
#[derive(Debug)]
pub(crate) struct Module {
    /// A URI of each of its schemes, for messages.
    pub(crate) examples: &'static [&'static str],
    /// Opens the device that a URI of one of these schemes names.
    pub(crate) open: Open,
    /// Returns the call of a configuration that makes the device of such a URI again.
    pub(crate) call: fn(&mut Uri, &DeviceInfo) -> Option<Call>,
}

/// A method of SPDK's configurations, and its parameters.
pub type Call = (&'static str, Value);

/// Returns the parameters of a device that is made of its size alone.
pub(crate) fn memory_params(info: &DeviceInfo) -> Value {
    json!({
        "name": info.name,
        "num_blocks": info.num_blocks,
        "block_size": info.block_size,
        "uuid": crate::uuid::format(&info.uuid),
    })
}

impl Module {
    /// Whether the module opens URIs of this scheme.
    pub(crate) fn opens(&self, scheme: &str) -> bool {
        let mut schemes = self.examples.iter().filter_map(|uri| uri.split_once("://"));
        schemes.any(|(own, _)| own == scheme)
    }
}

/// Options of [`open_with`](crate::open_with).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenOptions {
    read_only: bool,
    grow_bytes: Option<u64>,
}

impl OpenOptions {
    /// Opens for reading and writing.
    pub fn new() -> OpenOptions {
        OpenOptions::default()
    }

    /// Opens for reading only, whatever the URI says: no byte, no length and no file is changed or
    /// created. A file or block device need not be writable. Several processes may read it at once,
    /// while none has it open for writing.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> OpenOptions {
        self.read_only = read_only;
        self
    }

    /// Makes a shorter image file this long, durably, if it holds one of our stores or nothing. The
    /// content has to be grown afterwards. The step can be repeated after a crash. Refuses a longer
    /// file, and every device that is not a file.
    #[must_use]
    pub fn grow_to(mut self, bytes: u64) -> OpenOptions {
        self.grow_bytes = Some(bytes);
        self
    }

    pub(crate) fn grow_bytes(self) -> Option<u64> {
        self.grow_bytes
    }

    /// Whether it opens for reading only.
    pub fn is_read_only(self) -> bool {
        self.read_only
    }
}

/// Returns the size in `malloc://1G` or `null://1T`, in blocks.
pub(crate) fn size_in_place(uri: &mut Uri, block_size: u32) -> Result<u64, UriError> {
    let size = match uri.place()? {
        "" => uri.size("size")?,
        text => Some(parse_size(text).map_err(|e| uri.invalid(e))?),
    };
    let Some(size) = size else {
        return Err(uri.invalid(format!("no size; write {}://1G", uri.scheme())));
    };
    if block_size == 0 || !size.is_multiple_of(u64::from(block_size)) {
        return Err(uri.invalid(format!("{size} bytes are not whole blocks of {block_size}")));
    }
    Ok(size / u64::from(block_size))
}
