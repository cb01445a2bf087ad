//! Control groups with a limit of memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::fresh_path;

/// A control group that is removed when no process is in it.
pub(super) struct MemoryGroup {
    pub dir: PathBuf,
}

impl MemoryGroup {
    pub fn new(memory_bytes: u64) -> Result<MemoryGroup, String> {
        let tops = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"];
        let limits = ["memory.limit_in_bytes", "memory.max"];
        let mut reasons = Vec::new();
        for (top, limit) in tops.iter().zip(limits) {
            let dir = fresh_path(Path::new(top));
            let made = fs::create_dir(&dir)
                .and_then(|()| fs::write(dir.join(limit), memory_bytes.to_string()));
            match made {
                Ok(()) => {
                    // Without swap accounting there is nothing to forbid.
                    let _ = fs::write(dir.join("memory.swap.max"), "0");
                    let _ = fs::write(dir.join("memory.swappiness"), "0");
                    return Ok(MemoryGroup { dir });
                }
                Err(e) => {
                    let _ = fs::remove_dir(&dir);
                    reasons.push(format!("{top}: {e}"));
                }
            }
        }
        Err(format!("no control group ({})", reasons.join("; ")))
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // The kernel needs a moment until the group is empty.
        for _ in 0..100 {
            if fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}
