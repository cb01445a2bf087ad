//! RocksDB's paths below the root of an environment. The file system normalises them.

use std::borrow::Cow;

use pumice_blobfs::fs::{self, FsError};

/// Returns `path` below `root`, for the file system, which normalises it. `..` goes up from its
/// place, also out of `root`, and stays at `/`. A relative path starts at `root`.
#[must_use]
pub fn resolve<'a>(root: &str, path: &'a str) -> Cow<'a, str> {
    if !path.contains("..") {
        return match root {
            "/" => Cow::Borrowed(path),
            root => Cow::Owned(format!("{root}/{path}")),
        };
    }
    let mut resolved = String::with_capacity(root.len() + path.len() + 1);
    for component in root.split('/').chain(path.split('/')) {
        match component {
            "" | "." => {}
            ".." => resolved.truncate(resolved.rfind('/').unwrap_or(0)),
            name => {
                resolved.push('/');
                resolved.push_str(name);
            }
        }
    }
    Cow::Owned(resolved)
}

/// Normalises a path of the whole file system.
///
/// # Errors
/// Fails for a path that no file can have.
pub fn normal(path: &str) -> Result<String, FsError> {
    fs::normalise(&resolve("/", path))
}

/// Returns a normalised path of the whole file system as it is written inside an environment with
/// the root `root`, from which it leads back to the original.
#[must_use]
pub fn from_root(root: &str, path: &str) -> String {
    if root == "/" {
        return path.to_owned();
    }
    let depth = root.matches('/').count();
    format!("{}{path}", "/..".repeat(depth))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_below_the_root() {
        for (root, path, normal) in [
            ("/", "/", "/"),
            ("/", "", "/"),
            ("/", "//CURRENT", "/CURRENT"),
            ("/", "CURRENT", "/CURRENT"),
            ("/", "/./db//000001.log", "/db/000001.log"),
            ("/", "/db/", "/db"),
            ("/", "/db/../other", "/other"),
            ("/", "/../..", "/"),
            ("/db", "/", "/db"),
            ("/db", "/000001.log", "/db/000001.log"),
            ("/a/b", "/../../c", "/c"),
            ("/", "/...", "/..."),
        ] {
            let resolved = resolve(root, path);
            assert_eq!(fs::normalise(&resolved).unwrap(), normal, "{root} {path}");
        }
    }

    #[test]
    fn paths_that_no_file_can_have_are_refused() {
        for bad in ["/a\0b", "/a\nb", &"/x".repeat(200)] {
            assert!(normal(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn outside_paths_come_back() {
        for root in ["/", "/db", "/a/b/c"] {
            for path in ["/", "/x", "/a/b/x", "/db"] {
                let inside = from_root(root, path);
                assert!(inside.starts_with('/'));
                let resolved = resolve(root, &inside);
                assert_eq!(fs::normalise(&resolved).unwrap(), path, "{root} {path}");
            }
        }
    }
}
