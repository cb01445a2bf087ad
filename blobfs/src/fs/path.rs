//! Paths: absolute, normalised, at most 255 bytes, as BlobFS stores them.

use super::error::{FsError, Result};

/// Longest path in bytes, including the leading slash but not the stored NUL.
pub const NAME_MAX: usize = 255;

/// Returns `path` without doubled or trailing slashes and without `.` components. A missing leading
/// slash is added.
///
/// # Errors
/// Fails for `..`, for NUL bytes and control characters, and for a path that is too long.
pub fn normalise(path: &str) -> Result<String> {
    let mut out = String::with_capacity(path.len() + 1);
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                return Err(FsError::invalid(
                    path,
                    "`..` has no meaning here; give the path itself",
                ));
            }
            part => {
                if part.bytes().any(|b| b < 0x20 || b == 0x7f) {
                    return Err(FsError::invalid(
                        &path.escape_debug().to_string(),
                        "names must not contain control characters",
                    ));
                }
                out.push('/');
                out.push_str(part);
            }
        }
    }
    if out.is_empty() {
        out.push('/');
    }
    if out.len() > NAME_MAX {
        return Err(FsError::NameTooLong {
            len: out.len(),
            path: out,
            max: NAME_MAX,
        });
    }
    Ok(out)
}

/// Returns the directory of a normalised path. The root's is the root.
pub(crate) fn parent(path: &str) -> &str {
    match path.rfind('/') {
        None | Some(0) => "/",
        Some(i) => &path[..i],
    }
}

/// Returns the last component of a normalised path.
pub(crate) fn base(path: &str) -> &str {
    path.rfind('/').map_or(path, |i| &path[i + 1..])
}

/// Returns the prefix of everything in directory `dir`.
pub(crate) fn dir_prefix(dir: &str) -> String {
    if dir == "/" {
        "/".to_owned()
    } else {
        format!("{dir}/")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_forms() {
        for (from, to) in [
            ("/", "/"),
            ("", "/"),
            ("a", "/a"),
            ("//a///b/", "/a/b"),
            ("/./a/./b/.", "/a/b"),
            ("/a b/ü", "/a b/ü"),
            ("/...", "/..."),
        ] {
            assert_eq!(normalise(from).unwrap(), to);
        }
        assert!(matches!(
            normalise("/a/../b"),
            Err(FsError::InvalidInput { .. })
        ));
        assert!(matches!(
            normalise("/a\0b"),
            Err(FsError::InvalidInput { .. })
        ));
        assert!(matches!(
            normalise("/a\nb"),
            Err(FsError::InvalidInput { .. })
        ));
        assert!(normalise(&format!("/{}", "x".repeat(254))).is_ok());
        assert!(matches!(
            normalise(&format!("/{}", "x".repeat(255))),
            Err(FsError::NameTooLong { len: 256, .. })
        ));
    }

    #[test]
    fn parts() {
        assert_eq!(parent("/a/b"), "/a");
        assert_eq!(parent("/a"), "/");
        assert_eq!(parent("/"), "/");
        assert_eq!(base("/a/b"), "b");
        assert_eq!(dir_prefix("/"), "/");
        assert_eq!(dir_prefix("/a"), "/a/");
    }
}
