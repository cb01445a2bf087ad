//! The sides of a comparison.

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

/// A file system under RocksDB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The kernel's, as it is, in a directory.
    Host,
    /// ext4, made for this.
    Ext4,
    /// XFS, made for this.
    Xfs,
    /// Ours on the image file.
    Pumice,
    /// Ours on the loop or block device.
    PumiceDev,
    /// RocksDB's memory env.
    Mem,
}

impl Side {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Host,
        Self::Ext4,
        Self::Xfs,
        Self::Pumice,
        Self::PumiceDev,
        Self::Mem,
    ];

    /// Mounting, or opening a block device.
    #[must_use]
    pub fn needs_root(self) -> bool {
        matches!(self, Self::Ext4 | Self::Xfs | Self::PumiceDev)
    }

    /// Whether it can run when a device is given instead of an image file.
    #[must_use]
    pub fn fits(self, on_device: bool) -> bool {
        !(on_device && self == Self::Pumice)
    }

    /// Uses the loop or block device.
    #[must_use]
    pub fn needs_device(self) -> bool {
        self.needs_root()
    }
}

impl fmt::Display for Side {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Host => "host",
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Pumice => "pumice",
            Self::PumiceDev => "pumice-dev",
            Self::Mem => "mem",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_command_line_are_those_printed() {
        for s in Side::ALL {
            assert_eq!(Side::from_str(&s.to_string(), false), Ok(s));
        }
    }
}
