//! The default size of the page cache.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Default size of the page cache on a machine with enough memory.
const MOST: u64 = 256 << 20;
/// Least default size. A smaller one would slow every read and save little.
const LEAST: u64 = 8 << 20;
/// Divisor of the memory that this process may use. The rest is for the program, its own caches and
/// memtables, and for data on its way to the device.
const PART: u64 = 8;

/// Returns the default size of the page cache in bytes: an eighth of the machine's memory, or of
/// the control group's limit where that is lower, between 8 and 256 MiB.
pub(crate) fn default_cache_bytes() -> u64 {
    static BYTES: OnceLock<u64> = OnceLock::new();
    *BYTES.get_or_init(|| cache_bytes(limit(Path::new("/proc"), Path::new("/sys/fs/cgroup"))))
}

fn cache_bytes(limit: Option<u64>) -> u64 {
    limit.map_or(MOST, |bytes| (bytes / PART).clamp(LEAST, MOST))
}

/// Returns the number of bytes that this process can use: the least of the machine's memory and of
/// the limits of all control groups around it.
fn limit(proc: &Path, cgroups: &Path) -> Option<u64> {
    let groups = std::fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default();
    let files = groups.lines().flat_map(|line| limit_files(line, cgroups));
    let limits = files.filter_map(|file| std::fs::read_to_string(file).ok()?.trim().parse().ok());
    limits.chain(machine(proc)).min()
}

/// Returns the files that may limit the memory of the group in a line of `/proc/self/cgroup`: its
/// own, and those of the groups that it is in. In a container the path may be the host's, and the
/// group is then at the top.
fn limit_files(line: &str, cgroups: &Path) -> Vec<PathBuf> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
        return Vec::new();
    };
    let (tops, name) = if controllers.is_empty() {
        // This is where version 2 is mounted when version 1 has other controllers beside it.
        ([cgroups.to_owned(), cgroups.join("unified")], "memory.max")
    } else if controllers.split(',').any(|c| c == "memory") {
        (
            [cgroups.join("memory"), cgroups.join(controllers)],
            "memory.limit_in_bytes",
        )
    } else {
        return Vec::new();
    };
    let inside = Path::new(path.trim_start_matches('/'));
    tops.iter()
        .flat_map(|top| inside.ancestors().map(|group| top.join(group).join(name)))
        .collect()
}

/// Returns the machine's memory in bytes.
fn machine(proc: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(proc.join("meminfo")).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes a machine with these files below `proc` and `cgroup`, and returns its limit.
    fn machine_with(files: &[(&str, &str)]) -> (tempfile::TempDir, Option<u64>) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let limit = limit(&dir.path().join("proc"), &dir.path().join("cgroup"));
        (dir, limit)
    }

    const MACHINE: (&str, &str) = (
        "proc/meminfo",
        "MemTotal:        8000000 kB\nMemFree: 1 kB\n",
    );

    #[test]
    fn the_machine_and_every_group_bound_it() {
        let (_dir, alone) = machine_with(&[MACHINE]);
        assert_eq!(alone, Some(8_000_000 << 10));
        let (_dir, v1) = machine_with(&[
            MACHINE,
            (
                "proc/self/cgroup",
                "9:name=systemd:/\n4:memory:/docker/abc\n0::/\n",
            ),
            (
                "cgroup/memory/docker/abc/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
            ("cgroup/memory/docker/memory.limit_in_bytes", "262144000\n"),
        ]);
        assert_eq!(v1, Some(262_144_000));
        let (_dir, v2) = machine_with(&[
            MACHINE,
            ("proc/self/cgroup", "0::/system.slice/app.service\n"),
            ("cgroup/system.slice/app.service/memory.max", "max\n"),
            ("cgroup/system.slice/memory.max", "104857600\n"),
        ]);
        assert_eq!(v2, Some(104_857_600));
        // This is a container: the path is the host's, and the file is at the top.
        let (_dir, inside) = machine_with(&[
            MACHINE,
            ("proc/self/cgroup", "0::/../../kubepods/x\n"),
            ("cgroup/memory.max", "52428800\n"),
        ]);
        assert_eq!(inside, Some(52_428_800));
        assert_eq!(machine_with(&[]).1, None);
    }

    #[test]
    fn a_part_of_it_is_the_cache() {
        assert_eq!(cache_bytes(None), 256 << 20);
        assert_eq!(cache_bytes(Some(64 << 30)), 256 << 20);
        assert_eq!(cache_bytes(Some(256 << 20)), 32 << 20);
        assert_eq!(cache_bytes(Some(1 << 20)), 8 << 20);
        assert!(default_cache_bytes() <= 256 << 20);
    }
}
