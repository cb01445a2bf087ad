//! From a URI to a transport.

use std::sync::Arc;

use super::{NvmeUri, Transport, TransportError};

/// Opens the transport that a URI names. Blocks until the device is there and its registers
/// can be read; the controller itself is not touched yet.
pub fn open_transport(uri: &NvmeUri) -> Result<Arc<dyn Transport>, TransportError> {
    Err(uri.error(format!(
        "no transport '{}'; there are nvme, vfio-user and soft",
        uri.scheme
    )))
}
