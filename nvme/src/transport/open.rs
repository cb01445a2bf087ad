//! From a URI to a transport.

use std::sync::Arc;

use super::{NvmeUri, Transport, TransportError, Uio, Vfio, VfioUser, uio};
use crate::pci::{Host, PciAddress};

/// Opens the transport that a URI names. Blocks until the device is there and its registers
/// can be read; the controller itself is not touched yet.
pub fn open_transport(uri: &NvmeUri) -> Result<Arc<dyn Transport>, TransportError> {
    match uri.scheme.as_str() {
        "nvme" => open_function(uri),
        "vfio-user" => Ok(VfioUser::open(uri)?),
        "soft" => crate::soft::open(uri),
        other => Err(uri.error(format!(
            "no transport '{other}'; there are nvme, vfio-user and soft"
        ))),
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
