//! From a URI to a transport.

use std::sync::Arc;

use super::{NvmeUri, OpenTransport, Transport, TransportError, Uio, Vfio, VfioUser, uio};
use crate::pci::{Host, PciAddress};

/// Opens the transport that a URI names. Blocks until the device is there and its registers
/// can be read; the controller itself is not touched yet.
///
/// # Errors
/// Also for a parameter that the transport does not know.
pub fn open_transport(uri: &NvmeUri) -> Result<OpenTransport, TransportError> {
    check_parameters(uri)?;
    match uri.scheme.as_str() {
        "nvme" => open_function(uri).map(OpenTransport),
        "vfio-user" => Ok(OpenTransport(VfioUser::open(uri)?)),
        "soft" => crate::soft::open(uri),
        other => Err(uri.error(format!(
            "no transport '{other}'; there are nvme, vfio-user and soft"
        ))),
    }
}

/// Whether the transport knows the parameters of the URI.
pub(crate) fn check_parameters(uri: &NvmeUri) -> Result<(), TransportError> {
    match uri.scheme.as_str() {
        "nvme" => uri.only(&[]),
        "vfio-user" => uri.only(&["timeout_ms"]),
        // The soft controller looks at its own.
        _ => Ok(()),
    }
}

/// A PCIe function: by the kernel driver that it is bound to.
fn open_function(uri: &NvmeUri) -> Result<Arc<dyn Transport>, TransportError> {
    let address: PciAddress = uri.address.parse().map_err(|e| uri.error(format!("{e}")))?;
    let driver = Host::new()
        .function(address)
        .map_err(|e| uri.error(e.to_string()))?
        .driver;
    if driver.as_deref() == Some(uio::DRIVER) {
        return Ok(Uio::open(address)?);
    }
    Ok(Vfio::open(address)?)
}
