//! A directory for the image files of a test.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// The directory of what the file system keeps for the next mount after a kill.
const LOGS: &str = "/dev/shm";

/// A temporary directory for image files. What killed processes have left in shared memory for the file systems on them goes
/// with it, which nobody else can remove later: the logs of an image are found by the number of its inode.
#[derive(Debug)]
pub struct ImageDir(TempDir);

impl ImageDir {
    /// Makes a directory.
    ///
    /// # Errors
    /// Fails when none can be made.
    pub fn new() -> io::Result<ImageDir> {
        TempDir::new().map(ImageDir)
    }

    /// Returns its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for ImageDir {
    fn drop(&mut self) {
        let images = entries(self.path()).filter_map(|path| fs::symlink_metadata(path).ok());
        let prefixes: Vec<String> = images
            .filter(fs::Metadata::is_file)
            .map(|image| format!("pumice-file-{:x}-{:x}-", image.dev(), image.ino()))
            .collect();
        for log in entries(Path::new(LOGS)) {
            let name = log.file_name().unwrap_or_default();
            if has_one_of(name, &prefixes) {
                // A mount that ends at this moment removes it itself.
                let _ = fs::remove_file(&log);
            }
        }
    }
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path()))
}

fn has_one_of(name: &OsStr, prefixes: &[String]) -> bool {
    let name = name.to_string_lossy();
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logs_of_its_images_go_with_it() {
        let dir = ImageDir::new().unwrap();
        let image = dir.path().join("image");
        fs::write(&image, b"bytes").unwrap();
        let image = fs::metadata(&image).unwrap();
        let log = |ino: u64| {
            format!(
                "{LOGS}/pumice-file-{:x}-{ino:x}-0123456789abcdef",
                image.dev()
            )
        };
        // Of an image that nobody has: its inode would be a directory's.
        let other = fs::metadata(dir.path()).unwrap().ino();
        let (log, other) = (log(image.ino()), log(other));
        for log in [&log, &other] {
            fs::write(log, b"left").unwrap();
        }
        drop(dir);
        assert!(!Path::new(&log).exists());
        assert!(Path::new(&other).exists());
        fs::remove_file(other).unwrap();
    }
}
