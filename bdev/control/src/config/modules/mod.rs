//! The methods of the modules: a file and a row for each.

use super::methods::Method;

mod delay;
mod devices;
mod error;
mod file;
mod malloc;
mod null;
mod nvme;
mod passthru;
mod raid;
mod split;

/// The methods of every module.
pub(super) static MODULES: &[&[Method]] = &[
    delay::METHODS,
    error::METHODS,
    file::METHODS,
    malloc::METHODS,
    null::METHODS,
    nvme::METHODS,
    passthru::METHODS,
    raid::METHODS,
    split::METHODS,
];
