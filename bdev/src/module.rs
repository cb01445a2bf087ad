//! The table of modules.

use std::sync::Arc;

use pumice_io::uri::Uri;

use crate::OpenOptions;
use crate::device::BlockDevice;
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
