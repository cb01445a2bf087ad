//! `blobfs://…` URIs, which name file systems for RocksDB's own C++ tools.

use pumice_blobfs::fs::FileSystem;

use crate::{Error, MountOptions, mount, plugin};

/// Registers the URIs `blobfs://DEVICE[?…]` with RocksDB in this process, where DEVICE is a path or
/// a device URI: `blobfs:///tmp/kv.img`, `blobfs://malloc://1G`. So `--fs_uri` of its tools, and
/// `FileSystem::CreateFromString`, find Pumice. In addition to the device's parameters there are
/// `root=/dir` (the directory that becomes `/`) and `cache=SIZE`.
///
/// RocksDB interprets a `=` as its own option syntax. Write `:` instead (`?size:1G&create`), or the
/// URI as `id={…}`.
///
/// A file system that is mounted this way is unmounted when the process exits, as every mount is.
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

/// The parts of a `blobfs://` URI.
#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    device: String,
    root: String,
    cache_bytes: Option<u64>,
}

fn parse(uri: &str) -> Result<Parsed, String> {
    let rest = uri
        .strip_prefix("blobfs://")
        .ok_or("it does not begin with blobfs://")?;
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    if place.is_empty() {
        return Err("the device is missing: blobfs:///path/to/image".to_owned());
    }
    let mut device = if place.contains("://") {
        place.to_owned()
    } else {
        format!("file://{place}")
    };
    let (mut root, mut cache_bytes, mut joint) = ("/".to_owned(), None, '?');
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once(['=', ':']).unwrap_or((parameter, "1"));
        match name {
            "root" => value.clone_into(&mut root),
            "cache" => {
                let bytes =
                    pumice_bdev::parse_size(value).map_err(|e| format!("cache={value}: {e}"))?;
                cache_bytes = Some(bytes);
            }
            _ => {
                device.push(joint);
                device.push_str(name);
                device.push('=');
                device.push_str(value);
                joint = '&';
            }
        }
    }
    Ok(Parsed {
        device,
        root,
        cache_bytes,
    })
}

/// Mounts the file system that a `blobfs://` URI names. Returns it and the normalised root in it.
pub(crate) fn mount_uri(uri: &str) -> Result<(FileSystem, String), Error> {
    let parsed = parse(uri).map_err(|reason| Error::Uri {
        uri: uri.to_owned(),
        reason,
    })?;
    let mut options = MountOptions::new();
    if let Some(bytes) = parsed.cache_bytes {
        options = options.cache_bytes(bytes);
    }
    let root = plugin::normal(&parsed.root)?;
    Ok((mount(&parsed.device, &options)?, root))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(device: &str, root: &str, cache_bytes: Option<u64>) -> Parsed {
        Parsed {
            device: device.into(),
            root: root.into(),
            cache_bytes,
        }
    }

    #[test]
    fn devices_and_parameters() {
        for (uri, want) in [
            (
                "blobfs:///tmp/x.img",
                parsed("file:///tmp/x.img", "/", None),
            ),
            (
                "blobfs://file:///tmp/x.img",
                parsed("file:///tmp/x.img", "/", None),
            ),
            ("blobfs://malloc://1G", parsed("malloc://1G", "/", None)),
            (
                "blobfs:///x?size:1G&root:/db&create&cache=64M",
                parsed("file:///x?size=1G&create=1", "/db", Some(64 << 20)),
            ),
        ] {
            assert_eq!(parse(uri).unwrap(), want, "{uri}");
        }
        assert!(parse("blobfs://").unwrap_err().contains("missing"));
        assert!(parse("blobfs:///x?cache=lots").is_err());
        assert!(parse("posix://").is_err());
    }
}
