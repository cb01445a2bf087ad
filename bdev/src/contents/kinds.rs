//! The kinds of content.

use std::fmt;

/// The content of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Contents {
    /// Only zeroes. All of them were read, or the device knows them to be zeroes.
    Blank,
    /// A store in the format of this project.
    Ours(Ours),
    /// Other content: its name, or the offset of the first byte that is not zero.
    Foreign(String),
    /// The device could not be read, so it counts as in use. The text says why.
    Unknown(String),
}

/// A store in SPDK's format.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ours {
    /// A BlobFS.
    BlobFs,
    /// A blobstore without a type.
    Blobstore,
    /// A blobstore of another type, for instance `LVOLSTORE`.
    Typed(String),
}

impl fmt::Display for Ours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ours::BlobFs => f.write_str("BlobFS (SPDK blobstore)"),
            Ours::Blobstore => f.write_str("SPDK blobstore"),
            Ours::Typed(name) => write!(f, "SPDK blobstore ({name})"),
        }
    }
}

impl fmt::Display for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Contents::Blank => f.write_str("nothing but zeroes"),
            Contents::Ours(ours) => ours.fmt(f),
            Contents::Foreign(found) => f.write_str(found),
            Contents::Unknown(why) => write!(f, "what could not be read ({why})"),
        }
    }
}
