//! The common part of the programs `pumice-ldb` and `pumice-sst_dump`: the device before the tool's
//! own arguments.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use pumice::{MountOptions, mount};
use pumice_bdev_control::config::NamedDevices;

use crate::Files;

/// Whether a tool changes the content of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device is opened for reading only, which several programs may do at a time.
    Read,
    /// The device is opened for writing.
    Write,
}

/// Mounts the device that the first argument names, runs `tool` with the others, and unmounts.
pub fn run(
    name: &str,
    access: fn(&[OsString]) -> Access,
    tool: fn(&Files, &[OsString]) -> Result<i32, pumice::Error>,
) -> ExitCode {
    let mut args = std::env::args_os().skip(1).peekable();
    let config = match args.next_if(|first| first == "--json") {
        Some(_) => args.next(),
        None => None,
    };
    let _named = config.map(|file| NamedDevices::new(Path::new(&file)));
    let Some(device) = args
        .next()
        .filter(|first| !first.as_encoded_bytes().starts_with(b"-"))
    else {
        eprintln!(
            "usage: pumice [--json FILE] {name} DEVICE [ARGUMENTS of RocksDB's {name}]\n\
             DEVICE is an image file, a block device, a device URI or, with SPDK's configuration FILE, a name.\n\
             Paths in the arguments are paths of the file system on it. `pumice {name} DEVICE --help` prints RocksDB's own help."
        );
        return ExitCode::from(2);
    };
    let args: Vec<OsString> = args.collect();
    let options = MountOptions::new()
        .read_only(access(&args) == Access::Read)
        .format_empty(None);
    let done = mount(&device.to_string_lossy(), &options).and_then(|fs| {
        let code = tool(&Files::Pumice(fs.clone()), &args)?;
        fs.unmount()?;
        Ok(code)
    });
    match done {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("pumice {name}: {}", pumice::chain(&error));
            ExitCode::FAILURE
        }
    }
}
