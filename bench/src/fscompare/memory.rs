//! A control group, which bounds a run's memory including the page cache.

use std::path::{Path, PathBuf};

/// A control group of this process, removed at the end.
#[derive(Debug)]
pub struct Bound {
    dir: PathBuf,
}

impl Bound {
    /// Makes a group that uses at most `bytes`, in version 2 or version 1 of the interface.
    ///
    /// # Errors
    /// Returns a message for the user.
    pub fn new(bytes: u64) -> Result<Self, String> {
        let name = format!("fscompare-{}", std::process::id());
        let v2 = Path::new("/sys/fs/cgroup");
        let (dir, file) = if v2.join("cgroup.controllers").exists() {
            (v2.join(name), "memory.max")
        } else {
            (v2.join("memory").join(name), "memory.limit_in_bytes")
        };
        let fail = |e: std::io::Error| {
            format!(
                "--memory: control group {}: {e}; run as root, or without --memory",
                dir.display()
            )
        };
        std::fs::create_dir(&dir).map_err(fail)?;
        let bound = Self { dir: dir.clone() };
        std::fs::write(dir.join(file), bytes.to_string()).map_err(fail)?;
        // Without swap the bound is one on memory. Where swap is not accounted this file does not
        // exist.
        let _ = std::fs::write(dir.join("memory.swap.max"), "0");
        Ok(bound)
    }

    /// Returns a command line that moves itself into the group and runs `program`; its arguments
    /// follow.
    #[must_use]
    pub fn wrap(&self, program: &Path) -> Vec<String> {
        let procs = self.dir.join("cgroup.procs");
        vec![
            "sh".to_owned(),
            "-c".to_owned(),
            "echo $$ > \"$0\" && exec \"$@\"".to_owned(),
            procs.display().to_string(),
            program.display().to_string(),
        ]
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // The group of a process that has just ended may be busy for a moment.
        for _ in 0..20 {
            if std::fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        pumice_bdev_control::complain!(
            "fscompare: control group {} could not be removed",
            self.dir.display()
        );
    }
}
