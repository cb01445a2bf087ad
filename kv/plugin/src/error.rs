//! Errors of mounting, and texts of errors.

use std::error::Error as StdError;

use pumice_bdev::BdevError;
use pumice_blobfs::fs::FsError;

/// An error of mounting a file system. The causes are its [sources](StdError::source), and [`chain`]
/// writes all of them in one line.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The device could not be opened or examined.
    #[error("{}", text::not_opened(uri))]
    Device {
        /// The URI as it was given.
        uri: String,
        /// The reason.
        source: BdevError,
    },
    /// The device has no file system, and is not empty either.
    #[error("{}", text::not_empty(device, found))]
    NotEmpty {
        /// Name of the device.
        device: String,
        /// The content of the device.
        found: String,
    },
    /// An error of the file system.
    #[error(transparent)]
    FileSystem(#[from] FsError),
    /// A `blobfs://` URI is wrong.
    #[error("{uri}: {reason}")]
    Uri {
        /// The URI as it was given.
        uri: String,
        /// The error in it.
        reason: String,
    },
}

/// The texts of errors that `pumice::Error` has too.
pub mod text {
    /// Says that a device could not be opened.
    #[must_use]
    pub fn not_opened(uri: &str) -> String {
        format!("the device {uri} could not be opened")
    }

    /// Says that a device has other content than a file system of Pumice.
    #[must_use]
    pub fn not_empty(device: &str, found: &str) -> String {
        format!(
            "{device}: holds {found}, and no file system that Pumice knows; nothing was changed; if nobody needs it, \
             `pumice mkfs --force` makes one there"
        )
    }
}

/// The error of a call through the environment of a closed database.
pub const CLOSED: &str = "the database has been closed";

/// Returns an error and its causes in one line: what failed, then why. Leaves out a cause that the
/// text before it contains already.
#[must_use]
pub fn chain(error: &dyn StdError) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        let text = e.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = e.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MountOptions, mount};

    #[test]
    fn a_chain_names_every_cause_once() {
        let error = mount("file:///nowhere/at/all.img", &MountOptions::new())
            .err()
            .unwrap();
        assert!(error.source().is_some());
        let line = chain(&error);
        assert!(line.contains("could not be opened: "), "{line}");
        assert_eq!(line.matches("all.img").count(), 2, "{line}");
        assert!(!error.to_string().contains("o such file"), "{error}");
    }
}
