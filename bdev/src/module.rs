//! The table of modules.

use std::sync::Arc;

use pumice_io::uri::Uri;
use serde_json::{Value, json};

use crate::OpenOptions;
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

/// Returns the call of a configuration that makes a device as `uri` did; `info` is the device's. Returns `None` for a URI that
/// cannot be taken apart, and for a module without such a method.
pub fn call_for(uri: &str, info: &DeviceInfo) -> Option<Call> {
    let mut uri = Uri::parse(uri, &[]).ok()?;
    let module = MODULES.iter().find(|m| m.opens(uri.scheme()))?;
    (module.call)(&mut uri, info)
}

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

/// Every module that opens devices by URI.
pub(crate) static MODULES: &[&Module] = &[
    &crate::file::MODULE,
    &crate::malloc::MODULE,
    &crate::null::MODULE,
    #[cfg(feature = "nvme")]
    &crate::nvme::MODULE,
];
