//! Options of new blobs, and what can be stored as an xattr.

use super::error::Error;
use super::format::MAX_XATTR_LEN;
use super::meta::ClearMethod;

/// The content of newly mapped clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClusterInit {
    /// Zeroes, which are durable before the clusters belong to the blob.
    #[default]
    Zeroes,
    /// The old content. The caller promises that nobody reads a byte that was not written before.
    CallerWrites,
}

/// Options of a new blob.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CreateOptions {
    /// Size in clusters.
    pub num_clusters: u64,
    /// Whether clusters are allocated when they are first written.
    pub thin: bool,
    /// The first xattrs.
    pub xattrs: Vec<(String, Vec<u8>)>,
    /// The treatment of clusters that the blob frees.
    pub clear_method: ClearMethod,
    /// The content of the clusters of a thick blob.
    pub init: ClusterInit,
    /// Whether it has an extent table, as new blobs do, or run-length extents, as in old stores.
    pub extent_table: bool,
    /// Makes a clone of an external snapshot, which the application finds by these bytes. The blob is thin.
    pub external_snapshot: Option<Vec<u8>>,
}

pumice_bdev::setters!(CreateOptions: num_clusters: u64, thin: bool, xattrs: Vec<(String, Vec<u8>)>, clear_method: ClearMethod,
    init: ClusterInit, extent_table: bool, external_snapshot: Option<Vec<u8>>);

impl Default for CreateOptions {
    fn default() -> CreateOptions {
        CreateOptions {
            num_clusters: 0,
            thin: false,
            xattrs: Vec::new(),
            clear_method: ClearMethod::Default,
            init: ClusterInit::Zeroes,
            extent_table: true,
            external_snapshot: None,
        }
    }
}

/// Checks whether this can be stored as an xattr.
pub(crate) fn check_xattr(name: &[u8], value: &[u8]) -> Result<(), Error> {
    if name.is_empty() || name.contains(&0) {
        let text = format!(
            "xattr name \"{}\": must not be empty or hold a NUL",
            name.escape_ascii()
        );
        return Err(Error::InvalidInput(text));
    }
    if name.len() + value.len() > MAX_XATTR_LEN {
        let (name, len) = (name.escape_ascii(), name.len() + value.len());
        return Err(Error::InvalidInput(format!(
            "xattr `{name}`: name and value have {len} bytes, at most {MAX_XATTR_LEN}"
        )));
    }
    Ok(())
}
