//! Devices by URI, and the table of the modules that open them.

use std::sync::Arc;

use pumice_io::uri::Uri;

use crate::device::{BlockDevice, DeviceInfo};
use crate::error::BdevError;
use crate::module::{Call, Module, OpenOptions};
use crate::read_only::ReadOnly;

/// Every module that opens devices by URI.
static MODULES: &[&Module] = &[
    &crate::file::MODULE,
    &crate::malloc::MODULE,
    &crate::null::MODULE,
    #[cfg(feature = "nvme")]
    &crate::nvme::MODULE,
];

/// Opens the device that a URI names.
///
/// | URI | device |
/// | --- | --- |
/// | `file:///path?size=4G&block_size=512&create=1` | an image file, block device or loop device |
/// | `malloc://1G?block_size=4096` | memory of this process |
/// | `null://1T` | nothing: writes vanish, reads give whatever the buffer held |
/// | `nvme://0000:5e:00.0/1` | namespace 1 of a PCIe function, through VFIO or uio |
/// | `vfio-user:///path/to/socket` | a controller in another process |
/// | `soft://memory?size=1G` | a controller in this process, over memory, nothing or a file |
///
/// A plain path (`/dev/loop0`, `disk.img`: it contains a slash or a dot) is the file of that name.
/// It has no options, and a `%` or a `?` in it has no special meaning.
/// [`name_devices`] adds names (`Nvme0n1`).
///
/// [`name_devices`]: crate::name_devices
///
/// # Errors
/// Fails for a URI that names no device, and with the module's errors.
pub fn open(uri: &str) -> Result<Arc<dyn BlockDevice>, BdevError> {
    open_with(uri, OpenOptions::new())
}

/// Opens a device as [`open`] does. The options override those of the URI.
///
/// # Errors
/// Fails as [`open`] does.
pub fn open_with(uri: &str, options: OpenOptions) -> Result<Arc<dyn BlockDevice>, BdevError> {
    if options.grow_bytes().is_some() && options.is_read_only() {
        return Err(BdevError::InvalidUri {
            uri: uri.to_owned(),
            reason: "open for reading only, it cannot grow".to_owned(),
        });
    }
    if let Some(opened) = crate::named::open(uri, options) {
        return opened;
    }
    let examples: Vec<&str> = MODULES.iter().flat_map(|m| m.examples).copied().collect();
    let mut parsed = Uri::parse(uri, &examples)?;
    if options.grow_bytes().is_some() && parsed.scheme() != "file" {
        return Err(parsed
            .invalid("only an image file can be made longer")
            .into());
    }
    let Some(module) = MODULES.iter().find(|m| m.opens(parsed.scheme())) else {
        let (scheme, examples) = (parsed.scheme(), examples.join(", "));
        let reason = format!("unknown scheme `{scheme}`; one of {examples}");
        return Err(parsed.invalid(reason).into());
    };
    let dev = (module.open)(&mut parsed, options)?;
    Ok(if options.is_read_only() {
        ReadOnly::of(dev)
    } else {
        dev
    })
}

/// Returns the call of a configuration that makes a device as `uri` did; `info` is the device's.
/// Returns `None` for a URI that cannot be taken apart, and for a module without such a method.
pub fn call_for(uri: &str, info: &DeviceInfo) -> Option<Call> {
    let mut uri = Uri::parse(uri, &[]).ok()?;
    let module = MODULES.iter().find(|m| m.opens(uri.scheme()))?;
    (module.call)(&mut uri, info)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(uri: &str) -> String {
        open(uri).unwrap_err().to_string()
    }

    #[test]
    fn errors_say_what_would_be_right() {
        assert!(error("nonsense").contains("malloc://1G"));
        assert!(error("ftp://x").contains("unknown scheme `ftp`"));
        assert!(error("malloc://").contains("no size"));
        assert!(error("malloc://1G?colour=red").contains("unknown option `colour`"));
        assert!(error("malloc://1G?block_size=513").contains("513"));
        assert!(error("malloc://1G?block_size=512&block_size=512").contains("twice"));
        assert!(error("malloc://1%zzG").contains("percent"));
        assert!(error("malloc://1000").contains("whole blocks"));
    }

    #[test]
    fn what_is_only_read_does_not_grow() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![0; 4096]).unwrap();
        let options = OpenOptions::new().read_only(true).grow_to(8192);
        let e = open_with(path.to_str().unwrap(), options).unwrap_err();
        assert!(e.to_string().contains("cannot grow"), "{e}");
        assert_eq!(path.metadata().unwrap().len(), 4096);
    }

    #[test]
    #[cfg(feature = "nvme")]
    fn read_only_makes_no_file_of_the_soft_controller() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let uri = format!("soft://{}?size=1M&create=1", path.display());
        assert!(open_with(&uri, OpenOptions::new().read_only(true)).is_err());
        assert!(!path.exists());
    }
}
