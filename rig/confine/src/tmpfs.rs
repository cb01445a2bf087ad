//! A small file system in memory, which is soon full, in a mount namespace of a child.

use std::path::{Path, PathBuf};
use std::process::Command;

const PLACE: &str = "PUMICE_SMALL_TMPFS";
/// The exit code of a child that may not mount.
const CANNOT_MOUNT: i32 = 77;

/// Runs the test `child` of this test program in a process of its own, in which `dir` is a tmpfs of
/// `size`. Prints on behalf of `test` that it is skipped where that cannot be done.
///
/// # Panics
/// Panics when the child fails.
pub fn with_small_tmpfs(test: &str, size: &str, dir: &Path, child: &str) {
    let script = format!(
        "mount -t tmpfs -o size={size} none \"${PLACE}\" || exit {CANNOT_MOUNT}
         exec \"$0\" --exact --nocapture {child}"
    );
    let status = Command::new("unshare")
        .args(["-rm", "sh", "-c", &script])
        .arg(std::env::current_exe().expect("this program"))
        .env(PLACE, dir)
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) if status.code() == Some(CANNOT_MOUNT) => {
            println!("skipped: {test}: tmpfs cannot be mounted");
        }
        Ok(status) => panic!("{child}: {status}"),
        Err(e) => println!("skipped: {test}: no unshare ({e})"),
    }
}

/// Returns the tmpfs in a child of [`with_small_tmpfs`], and `None` in any other process.
#[must_use]
pub fn small_tmpfs() -> Option<PathBuf> {
    std::env::var_os(PLACE).map(PathBuf::from)
}
