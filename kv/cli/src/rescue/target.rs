//! The target directory: nothing is written outside of it, and no existing file is overwritten.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use pumice_bdev_control::terminal::visible;

use crate::failure::Failure;

/// Longest name of the kernel's file systems in bytes.
const NAME_MAX: usize = 255;

/// A directory in the kernel's file system.
pub struct Target {
    root: PathBuf,
}

impl Target {
    /// Makes the directory if it does not exist.
    pub fn make(root: &Path) -> Result<Target, Failure> {
        let failed = |e: io::Error| Failure::from(format!("{}: {e}", root.display()));
        match DirBuilder::new().mode(0o700).create(root) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(e)),
            _ => {}
        }
        if !fs::metadata(root).map_err(failed)?.is_dir() {
            return Err(Failure::from(format!(
                "{}: is not a directory",
                root.display()
            )));
        }
        Ok(Target {
            root: root.to_owned(),
        })
    }

    /// Makes a directory with its parents. Uses an existing one, and does not follow a link.
    pub fn dir(&self, path: &str) -> io::Result<PathBuf> {
        let mut at = self.root.clone();
        for name in path.split('/').filter(|name| !name.is_empty()) {
            at.push(component(name));
            match DirBuilder::new().mode(0o700).create(&at) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                    if !fs::symlink_metadata(&at)?.is_dir() {
                        return Err(io::Error::new(e.kind(), "exists and is not a directory"));
                    }
                }
                result => result?,
            }
        }
        Ok(at)
    }

    /// Makes a file and its parent directories.
    pub fn file(&self, path: &str) -> io::Result<(File, PathBuf)> {
        let at = self.place(path)?;
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&at)?;
        Ok((file, at))
    }

    /// Gives a file that was made here another name.
    pub fn link(&self, file: &Path, path: &str) -> io::Result<()> {
        fs::hard_link(file, self.place(path)?)
    }

    fn place(&self, path: &str) -> io::Result<PathBuf> {
        let path = path.trim_end_matches('/');
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        Ok(self.dir(dir)?.join(component(name)))
    }
}

/// Returns a name that the kernel accepts: one component, which does not lead up, shows the
/// original and is not too long.
fn component(name: &str) -> String {
    let name = visible(name).replace(['/', '\0'], "_");
    let name = match name.as_str() {
        "" | "." | ".." => format!("_{name}"),
        _ => name,
    };
    if name.len() <= NAME_MAX {
        return name;
    }
    // Names with the same beginning stay different.
    let sum = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut cut = 200;
    while !name.is_char_boundary(cut) {
        cut -= 1;
    }
    format!("{}~{sum:016x}", &name[..cut])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        let target = Target::make(&root).unwrap();
        for path in [
            "/../x",
            "../../x",
            "/a/../../x",
            "/./x",
            "//x//y",
            "/a/..",
            "/.",
        ] {
            if let Ok((_, at)) = target.file(path) {
                let real = at.canonicalize().unwrap();
                assert!(real.starts_with(root.canonicalize().unwrap()), "{real:?}");
            }
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(component("a\u{1b}[2J"), "a\\u{1b}[2J");
        let (long, other) = (
            format!("{}a", "ö".repeat(200)),
            format!("{}b", "ö".repeat(200)),
        );
        assert!(component(&long).len() <= NAME_MAX);
        assert_ne!(component(&long), component(&other));
    }

    #[test]
    fn nothing_is_overwritten_and_no_link_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        fs::create_dir(&outside).unwrap();
        let target = Target::make(&root).unwrap();
        fs::write(root.join("there"), "mine").unwrap();
        target.file("/there").unwrap_err();
        target.file("/there/x").unwrap_err();
        assert_eq!(fs::read(root.join("there")).unwrap(), b"mine");
        std::os::unix::fs::symlink(&outside, root.join("link")).unwrap();
        target.file("/link/x").unwrap_err();
        std::os::unix::fs::symlink(outside.join("new"), root.join("dangling")).unwrap();
        target.file("/dangling").unwrap_err();
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }
}
