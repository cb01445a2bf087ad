//! `blobfs://…` URIs, which name file systems for RocksDB's own C++ tools.

use crate::{MountError, MountOptions, Use, mount_device, normal, open_device};

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

/// Mounts the file system that a `blobfs://` URI names, or shares it if this process has mounted its
/// device by a URI. Returns the share of it, and the normalised directory that is to become `/`.
///
/// The first user's size of the page cache holds for all. A device in memory (`malloc://…`) is new
/// each time.
///
/// # Errors
/// [`MountError::Uri`] for a URI with an error, and as [`crate::mount`].
pub fn mount_uri(uri: &str) -> Result<(Use, String), MountError> {
    mount_uri_with(uri, MountOptions::new())
}

/// Mounts as [`mount_uri`] does, with options for the case that the device is not mounted yet. A size of the cache in the URI
/// has precedence. For reading only, it shares what is mounted for reading only.
///
/// # Errors
/// Fails as [`mount_uri`] does.
pub fn mount_uri_with(uri: &str, mut options: MountOptions) -> Result<(Use, String), MountError> {
    let parsed = parse(uri).map_err(|reason| MountError::Uri {
        uri: uri.to_owned(),
        reason,
    })?;
    if let Some(bytes) = parsed.cache_bytes {
        options = options.cache_bytes(bytes);
    }
    let root = normal(&parsed.root)?;
    let open = || open_device(&parsed.device, &options);
    let mounted = Use::of(&parsed.device, options.is_read_only(), open, |device, _| {
        mount_device(&device, &options)
    })?;
    Ok((mounted, root))
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

    #[test]
    fn the_same_device_is_mounted_once_and_another_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let uri = |name: &str| {
            let path = dir.path().join(name);
            format!("blobfs://{}?size:64M&create", path.display())
        };
        let (one, root) = mount_uri(&uri("one.img")).unwrap();
        let (again, below) = mount_uri(&format!("{}&root:/db", uri("one.img"))).unwrap();
        let (two, _) = mount_uri(&uri("two.img")).unwrap();
        assert_eq!((&root[..], &below[..]), ("/", "/db"));
        one.fs().mkdir("/mark").unwrap();
        assert!(again.fs().exists("/mark").unwrap());
        assert!(!two.fs().exists("/mark").unwrap());
        // The last user unmounts, and only that one.
        drop(one);
        assert!(again.fs().exists("/mark").unwrap());
        let fs = again.fs().clone();
        drop(again);
        assert!(fs.exists("/mark").is_err());
        let (one, _) = mount_uri(&uri("one.img")).unwrap();
        assert!(one.fs().exists("/mark").unwrap());
    }
}
