//! The sides of a comparison.

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

/// A file system under RocksDB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// The existing kernel file system, in a directory.
    Host,
    /// ext4, made for the comparison with the defaults of mkfs and mount.
    Ext4,
    /// ext4, made, mounted and used as its experts do for a write-ahead log.
    Ext4Tuned,
    /// XFS, made for the comparison with the defaults of mkfs and mount.
    Xfs,
    /// XFS, made, mounted and used as its experts do for a write-ahead log.
    XfsTuned,
    /// Pumice on the image file.
    Pumice,
    /// Pumice on the loop or block device.
    PumiceDev,
    /// RocksDB's memory env.
    Mem,
}

impl Side {
    /// All sides.
    pub const ALL: [Self; 8] = [
        Self::Host,
        Self::Ext4,
        Self::Ext4Tuned,
        Self::Xfs,
        Self::XfsTuned,
        Self::Pumice,
        Self::PumiceDev,
        Self::Mem,
    ];

    /// Whether it needs root, to mount or to open a block device.
    #[must_use]
    pub fn needs_root(self) -> bool {
        matches!(
            self,
            Self::Ext4 | Self::Ext4Tuned | Self::Xfs | Self::XfsTuned | Self::PumiceDev
        )
    }

    /// Whether it can run when a device is given instead of an image file.
    #[must_use]
    pub fn fits(self, on_device: bool) -> bool {
        !(on_device && self == Self::Pumice)
    }

    /// Returns the program that this machine lacks to make the side's file system, as a message.
    #[must_use]
    pub fn missing_program(self) -> Option<String> {
        let (program, package) = match self {
            Self::Ext4 | Self::Ext4Tuned => ("mkfs.ext4", "e2fsprogs"),
            Self::Xfs | Self::XfsTuned => ("mkfs.xfs", "xfsprogs"),
            _ => return None,
        };
        missing(program, package, &search_path())
    }

    /// Whether it uses the loop or block device.
    #[must_use]
    pub fn needs_device(self) -> bool {
        self.needs_root()
    }
}

fn missing(program: &str, package: &str, path: &str) -> Option<String> {
    let found = std::env::split_paths(path).any(|dir| dir.join(program).is_file());
    (!found).then(|| format!("{program} is not installed (apt-get install {package})"))
}

/// Returns the directories of system programs. Debian keeps mkfs and losetup out of a user's PATH.
pub(super) fn search_path() -> String {
    std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin"
}

impl fmt::Display for Side {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Host => "host",
            Self::Ext4 => "ext4",
            Self::Ext4Tuned => "ext4-tuned",
            Self::Xfs => "xfs",
            Self::XfsTuned => "xfs-tuned",
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
    fn a_side_whose_program_is_missing_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = format!("/nowhere:{}", dir.path().display());
        let words = missing("mkfs.xfs", "xfsprogs", &path).unwrap();
        assert!(words.contains("apt-get install xfsprogs"), "{words}");
        std::fs::write(dir.path().join("mkfs.xfs"), "").unwrap();
        assert_eq!(missing("mkfs.xfs", "xfsprogs", &path), None);
        assert_eq!(Side::Pumice.missing_program(), None);
    }

    #[test]
    fn names_on_the_command_line_are_those_printed() {
        for s in Side::ALL {
            assert_eq!(Side::from_str(&s.to_string(), false), Ok(s));
            assert_eq!(serde_json::to_value(s).unwrap(), s.to_string());
        }
    }
}
