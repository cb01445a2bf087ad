//! Names of devices that the process knows beside URIs, such as those of a configuration.

use std::sync::Arc;

use parking_lot::RwLock;
use pumice_io::uri::{is_path, is_uri};

use crate::device::BlockDevice;
use crate::error::BdevError;
use crate::module::OpenOptions;

/// Devices by name, for [`name_devices`].
pub trait Names: Send + Sync {
    /// Opens the device of this name, alias or UUID. Returns `None` if there is none.
    ///
    /// # Errors
    /// Fails if the device cannot be opened, and if it cannot be told which devices there are.
    fn open(
        &self,
        name: &str,
        options: OpenOptions,
    ) -> Option<Result<Arc<dyn BlockDevice>, BdevError>>;

    /// Returns the error for a name that no device has: it names the devices that there are.
    fn not_found(&self, name: &str) -> BdevError;
}

static NAMES: RwLock<Option<Arc<dyn Names>>> = RwLock::new(None);

/// From now on [`open`] and [`open_with`] find these devices by their names, in the whole process and in every layer above.
/// A URI is never taken for a name. A path is one only if a device has it. Names that were given before are forgotten.
///
/// [`open`]: crate::open()
/// [`open_with`]: crate::open_with
pub fn name_devices(names: Arc<dyn Names>) {
    *NAMES.write() = Some(names);
}

/// Ends what [`name_devices`] has begun, unless others have been named since.
pub fn forget_names(names: &Arc<dyn Names>) {
    let mut current = NAMES.write();
    if current
        .as_ref()
        .is_some_and(|current| Arc::ptr_eq(current, names))
    {
        *current = None;
    }
}

/// Opens the device that has a name of its own. Returns `None` for what is a URI or a path.
pub(crate) fn open(
    name: &str,
    options: OpenOptions,
) -> Option<Result<Arc<dyn BlockDevice>, BdevError>> {
    if is_uri(name) {
        return None;
    }
    // Opening may take long, and may itself open files by their paths.
    let names = NAMES.read().clone()?;
    match names.open(name, options) {
        None if is_path(name) => None,
        None => Some(Err(names.not_found(name))),
        Some(Ok(_)) if options.grow_bytes().is_some() => Some(Err(BdevError::Unsupported {
            device: name.to_owned(),
            reason: "a device with a name is not made longer; make what is below it longer, and leave the size out".to_owned(),
        })),
        found => found,
    }
}
