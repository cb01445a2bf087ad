//! Opening a transport by URI.

use std::sync::Arc;

use pumice_io::uri::UriError;

use super::{
    NvmeUri, OpenTransport, Transport, TransportError, Uio, Vfio, VfioUser, uio, vfio_user,
};
use crate::pci::{Host, ParseAddressError, PciAddress};

/// Opens the transport that a URI names. Blocks until the device is present and its registers can
/// be read. The controller itself is not touched yet.
///
/// # Errors
/// Fails also for a parameter that the transport does not know.
pub fn open_transport(uri: &NvmeUri) -> Result<OpenTransport, TransportError> {
    check_parameters(uri)?;
    match uri.scheme() {
        "nvme" => open_function(uri).map(OpenTransport),
        "vfio-user" => Ok(OpenTransport(VfioUser::open(uri)?)),
        other => Err(uri
            .invalid(format!(
                "no transport '{other}'; there are nvme and vfio-user"
            ))
            .into()),
    }
}

/// Refuses parameters that the transport does not know.
pub(crate) fn check_parameters(uri: &NvmeUri) -> Result<(), UriError> {
    let mut options = uri.options();
    if uri.scheme() == "vfio-user" {
        vfio_user::timeout(&mut options)?;
    }
    options.finish()
}

/// Opens a PCIe function through the kernel driver that it is bound to.
fn open_function(uri: &NvmeUri) -> Result<Arc<dyn Transport>, TransportError> {
    let address: PciAddress = uri
        .address
        .parse()
        .map_err(|e: ParseAddressError| uri.invalid(e.to_string()))?;
    let driver = Host::new()
        .function(address)
        .map_err(|e| uri.invalid(e.to_string()))?
        .driver;
    if driver.as_deref() == Some(uio::DRIVER) {
        return Ok(Uio::open(address)?);
    }
    Ok(Vfio::open(address)?)
}
