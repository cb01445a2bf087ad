//! Opening a controller and a namespace by URI.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use pumice_io::process::PerProcess;

use crate::controller::{Controller, ControllerOptions, Phase};
use crate::error::NvmeError;
use crate::namespace::Namespace;
use crate::pci::PciAddress;
use crate::transport::{NvmeUri, check_parameters, open_transport, vfio_user_socket};

/// A controller that was opened by a URI, with the namespace that the URI names.
#[derive(Debug, Clone)]
pub struct Opened {
    /// The enabled controller.
    pub controller: Arc<Controller>,
    /// The namespace identifier in the URI, if it has one.
    pub nsid: Option<u32>,
}

impl Opened {
    /// Returns the namespace that the URI names, or the controller's only one.
    ///
    /// # Errors
    /// Fails when the controller has no active namespace, or several and the URI does not name one.
    pub fn namespace(&self) -> Result<Arc<Namespace>, NvmeError> {
        if let Some(nsid) = self.nsid {
            return self.controller.namespace(nsid);
        }
        let mut all = self.controller.namespaces();
        match all.len() {
            1 => Ok(all.remove(0)),
            0 => Err(NvmeError::Unsupported {
                device: self.controller.name().to_owned(),
                what: "the controller has no active namespace".into(),
            }),
            _ => {
                let ids: Vec<String> = all.iter().map(|n| n.nsid().to_string()).collect();
                Err(NvmeError::Unsupported {
                    device: self.controller.name().to_owned(),
                    what: format!(
                        "there are namespaces {}; name one: …/{}",
                        ids.join(", "),
                        ids[0]
                    ),
                })
            }
        }
    }
}

/// The controllers that this process has open. A URI of another namespace of one of them shares the
/// controller. Each device has a lock of its own, which is held over its bring-up, so that two
/// threads that open one device get one controller, and a device that does not respond delays no
/// other.
static OPEN: PerProcess<Mutex<HashMap<String, Device>>> = PerProcess::new(Mutex::default);

type Device = Arc<Mutex<Weak<Controller>>>;

/// Returns the entry of a device, and forgets those that nobody uses.
fn entry(key: String) -> Device {
    let mut open = OPEN.get().lock();
    // An entry without a second reference is not locked.
    open.retain(|_, device| Arc::strong_count(device) > 1 || device.lock().strong_count() > 0);
    Arc::clone(open.entry(key).or_default())
}

/// Opens the controller that a URI names, with default options; see
/// [`NvmeUri`](crate::transport::NvmeUri) for the forms. Blocks for bring-up.
///
/// A PCIe function or a vfio-user socket that this process has open already gives the same
/// controller.
pub fn open(uri: &str) -> Result<Opened, NvmeError> {
    open_with(uri, ControllerOptions::default())
}

/// Opens a controller as [`open`] does, with these options. They have no effect on a controller
/// that is open already.
pub fn open_with(uri: &str, options: ControllerOptions) -> Result<Opened, NvmeError> {
    let uri = NvmeUri::parse(uri)?;
    let nsid = uri.nsid;
    check_parameters(&uri)?;
    let device = entry(device_key(&uri));
    let mut device = device.lock();
    if let Some(controller) = device.upgrade()
        && matches!(controller.phase(), Phase::Live | Phase::Resetting)
    {
        return Ok(Opened { controller, nsid });
    }
    let controller = Controller::new(open_transport(&uri)?, options)?;
    *device = Arc::downgrade(&controller);
    Ok(Opened { controller, nsid })
}

/// Returns the same text for every spelling of one device's URI.
fn device_key(uri: &NvmeUri) -> String {
    let address = match uri.scheme() {
        "nvme" => uri.address.parse().map(|a: PciAddress| a.to_string()).ok(),
        _ => {
            let socket = vfio_user_socket(Path::new(&uri.address));
            let whole = socket.canonicalize().unwrap_or(socket);
            Some(whole.to_string_lossy().into_owned())
        }
    };
    let address = address.unwrap_or_else(|| uri.address.clone());
    format!("{}://{address}", uri.scheme())
}
