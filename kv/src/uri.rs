//! `blobfs://…` URIs, which name file systems for RocksDB's own C++ tools.

use crate::{Error, plugin};

/// Registers the URIs `blobfs://DEVICE[?…]` with RocksDB in this process, where DEVICE is a path or
/// a device URI: `blobfs:///tmp/kv.img`, `blobfs://malloc://1G`. So `--fs_uri` of its tools, and
/// `FileSystem::CreateFromString`, find Pumice. In addition to the device's parameters there are
/// `root=/dir` (the directory that becomes `/`) and `cache=SIZE`.
///
/// RocksDB interprets a `=` as its own option syntax. Write `:` instead (`?size:1G&create`), or the
/// URI as `id={…}`.
///
/// A device that is named twice is mounted once, with the options of the first URI. Devices in memory
/// (`malloc://…`) are new each time. A file system that is mounted this way is unmounted when its last
/// user is gone, at the latest when the process exits.
pub fn register_uri() {
    plugin::register_uri();
}

/// Returns the environment that RocksDB's registry makes for a URI, after [`register_uri`].
///
/// # Errors
/// Fails with [`Error::Uri`] and RocksDB's text.
pub fn env_from_uri(uri: &str) -> Result<rocksdb::Env, Error> {
    register_uri();
    plugin::env_from_uri(uri).map_err(|e| Error::Uri {
        uri: uri.to_owned(),
        reason: e.0,
    })
}
