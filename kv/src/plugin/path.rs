//! Paths as RocksDB writes them, made normal.

use super::{Fault, Result};
use crate::Error;

/// `path` below `root`, normal: RocksDB writes `//CURRENT` for a database at `/`. Components `.`
/// and empty ones vanish; `..` goes up from wherever it stands, also out of `root`, and stays at
/// `/` there. A relative path is taken from `root`.
pub(crate) fn resolve(root: &str, path: &[u8]) -> Result<String> {
    let path = std::str::from_utf8(path).map_err(|_| {
        Fault::new(
            libc::EINVAL,
            format!("path {:?} is not UTF-8", String::from_utf8_lossy(path)),
        )
    })?;
    if path.contains('\0') {
        return Err(Fault::new(
            libc::EINVAL,
            format!("path {path:?} holds a NUL"),
        ));
    }
    let mut normal = String::with_capacity(root.len() + path.len() + 1);
    for component in root.split('/').chain(path.split('/')) {
        match component {
            "" | "." => {}
            ".." => normal.truncate(normal.rfind('/').unwrap_or(0)),
            name => {
                normal.push('/');
                normal.push_str(name);
            }
        }
    }
    if normal.is_empty() {
        normal.push('/');
    }
    Ok(normal)
}

/// A path of the whole file system, normal, or why no file can have it.
pub(crate) fn normal(path: &str) -> std::result::Result<String, Error> {
    checked(path).map_err(|reason| Error::Path {
        path: path.to_owned(),
        reason,
    })
}

fn checked(path: &str) -> std::result::Result<String, String> {
    let normal = resolve("/", path.as_bytes()).map_err(|fault| fault.text)?;
    if normal.chars().any(char::is_control) {
        return Err("it holds a control character".to_owned());
    }
    Ok(normal)
}

/// How a path of the whole file system is written inside an environment rooted at `root`, such
/// that [`resolve`] gives it back.
pub(crate) fn from_root(root: &str, path: &str) -> Result<String> {
    let absolute = resolve("/", path.as_bytes())?;
    let root = resolve("/", root.as_bytes())?;
    if root == "/" {
        return Ok(absolute);
    }
    let depth = root.matches('/').count();
    Ok(format!("{}{absolute}", "/..".repeat(depth)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_normal() {
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
            assert_eq!(
                resolve(root, path.as_bytes()).unwrap(),
                normal,
                "{root} {path}"
            );
        }
    }

    #[test]
    fn foreign_bytes_are_refused() {
        assert_eq!(resolve("/", b"/\xff").unwrap_err().errno, libc::EINVAL);
        assert_eq!(resolve("/", b"/a\0b").unwrap_err().errno, libc::EINVAL);
    }

    #[test]
    fn outside_paths_come_back() {
        for root in ["/", "/db", "/a/b/c", "//a/./b"] {
            for path in ["/", "/x", "/a/b/x", "/db"] {
                let inside = from_root(root, path).unwrap();
                assert!(inside.starts_with('/'));
                assert_eq!(
                    resolve(root, inside.as_bytes()).unwrap(),
                    path,
                    "{root} {path}"
                );
            }
        }
    }
}
