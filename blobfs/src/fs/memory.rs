//! How much memory a mount may take when nobody said so.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The bound of the page cache by default, where there is memory enough.
const CACHE_MOST: u64 = 256 << 20;
/// The least bound of the page cache; a smaller one slows every read and saves nothing worth it.
const CACHE_LEAST: u64 = 8 << 20;
/// The bound of data on its way to the device by default, where there is memory enough.
const BEHIND_MOST: u64 = 32 << 20;
/// The least bound of data on its way to the device.
const BEHIND_LEAST: u64 = 4 << 20;
/// The cache takes this part of the memory that the process may use. The rest is for the program, its own
/// caches and memtables, and for data on its way to the device.
const CACHE_PART: u64 = 8;
/// The cache takes at most this part of what is free at the start.
const CACHE_FREE_PART: u64 = 4;
/// A cache that grows takes all but this part of the limit, and leaves this part of it free.
const GROWTH_PART: u64 = 4;
const RESERVE_PART: u64 = 8;
/// The least that a cache that grows leaves free.
const RESERVE_LEAST: u64 = 32 << 20;
/// Data on its way to the device takes this part of the memory that the process may use.
const BEHIND_PART: u64 = 16;

/// The memory that this process can use: the machine's, or that of the tightest control group around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Memory {
    /// The limit in bytes.
    pub limit_bytes: u64,
    /// Bytes that were free below the limit when this was first asked. What the kernel caches of files counts
    /// as free.
    pub free_bytes: u64,
}

impl Memory {
    /// The memory of this process, as it was when this was first asked. `None` where the machine does not say.
    #[must_use]
    pub fn of_this_process() -> Option<Memory> {
        static MEMORY: OnceLock<Option<Memory>> = OnceLock::new();
        *MEMORY.get_or_init(Memory::now)
    }

    /// The memory of this process as it is now.
    pub(crate) fn now() -> Option<Memory> {
        Memory::read(Path::new("/proc"), Path::new("/sys/fs/cgroup"))
    }

    /// The least of the machine's and of every control group's around this process.
    fn read(proc: &Path, cgroups: &Path) -> Option<Memory> {
        let lines = std::fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default();
        let groups = lines.lines().flat_map(|line| Group::around(line, cgroups));
        let all: Vec<Memory> = groups
            .filter_map(|group| group.memory())
            .chain(machine(proc))
            .collect();
        Some(Memory {
            limit_bytes: all.iter().map(|m| m.limit_bytes).min()?,
            free_bytes: all.iter().map(|m| m.free_bytes).min()?,
        })
    }

    /// Bytes that stay free for the program and for others: an eighth of the limit, and no less than
    /// 32 MiB.
    pub(crate) fn reserve_bytes(self) -> u64 {
        (self.limit_bytes / RESERVE_PART).max(RESERVE_LEAST)
    }

    /// An eighth of the limit, at most a quarter of what is free, between 8 and 256 MiB.
    fn cache_bytes(self) -> u64 {
        (self.limit_bytes / CACHE_PART)
            .min(self.free_bytes / CACHE_FREE_PART)
            .clamp(CACHE_LEAST, CACHE_MOST)
    }

    /// A sixteenth of the limit, between 4 and 32 MiB.
    fn behind_bytes(self) -> u64 {
        (self.limit_bytes / BEHIND_PART).clamp(BEHIND_LEAST, BEHIND_MOST)
    }
}

/// The default bound of the page cache in bytes.
pub(crate) fn default_cache_bytes() -> u64 {
    Memory::of_this_process().map_or(CACHE_MOST, Memory::cache_bytes)
}

/// The size in bytes up to which the page cache of a [`MountOptions`](super::MountOptions) that says
/// so grows: three quarters of the memory that the process may use.
#[must_use]
pub fn cache_most_bytes() -> u64 {
    let limit = Memory::of_this_process().map_or(0, |memory| memory.limit_bytes);
    (limit - limit / GROWTH_PART).max(default_cache_bytes())
}

/// The default bound in bytes of data on its way to the device.
pub(crate) fn default_behind_bytes() -> usize {
    let bytes = Memory::of_this_process().map_or(BEHIND_MOST, Memory::behind_bytes);
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// The names of a control group's files.
#[derive(Debug)]
struct Names {
    limit: &'static str,
    used: &'static str,
    /// The rows of `memory.stat` that count what the kernel caches of files.
    cached: [&'static str; 2],
}

static VERSION_1: Names = Names {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    cached: ["total_inactive_file", "total_active_file"],
};

static VERSION_2: Names = Names {
    limit: "memory.max",
    used: "memory.current",
    cached: ["inactive_file", "active_file"],
};

/// A control group that may limit memory.
struct Group {
    dir: PathBuf,
    names: &'static Names,
}

impl Group {
    /// The group of a line of `/proc/self/cgroup`, and those that it is in. In a container the path may be the
    /// host's; the group is then the top.
    fn around(line: &str, cgroups: &Path) -> Vec<Group> {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            return Vec::new();
        };
        let (tops, names) = if controllers.is_empty() {
            // Version 2, where version 1 has other controllers mounted beside it as well.
            ([cgroups.to_owned(), cgroups.join("unified")], &VERSION_2)
        } else if controllers.split(',').any(|c| c == "memory") {
            (
                [cgroups.join("memory"), cgroups.join(controllers)],
                &VERSION_1,
            )
        } else {
            return Vec::new();
        };
        let inside = Path::new(path.trim_start_matches('/'));
        tops.iter()
            .flat_map(|top| inside.ancestors().map(|group| top.join(group)))
            .map(|dir| Group { dir, names })
            .collect()
    }

    /// Returns the limit and the free memory below it. `None` if there is no limit.
    fn memory(&self) -> Option<Memory> {
        let limit_bytes = self.number(self.names.limit)?;
        let used = self.number(self.names.used).unwrap_or(0);
        let stat = std::fs::read_to_string(self.dir.join("memory.stat")).unwrap_or_default();
        let cached: u64 = stat
            .lines()
            .filter_map(|line| line.split_once(' '))
            .filter(|(name, _)| self.names.cached.contains(name))
            .filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok())
            .fold(0, u64::saturating_add);
        Some(Memory {
            limit_bytes,
            free_bytes: limit_bytes.saturating_sub(used.saturating_sub(cached)),
        })
    }

    fn number(&self, file: &str) -> Option<u64> {
        let text = std::fs::read_to_string(self.dir.join(file)).ok()?;
        text.trim().parse().ok()
    }
}

/// The machine's memory.
fn machine(proc: &Path) -> Option<Memory> {
    let text = std::fs::read_to_string(proc.join("meminfo")).ok()?;
    let bytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    let limit_bytes = bytes("MemTotal:")?;
    Some(Memory {
        limit_bytes,
        free_bytes: bytes("MemAvailable:").unwrap_or(limit_bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine with these files, below `proc` and `cgroup`.
    fn machine_with(files: &[(&str, &str)]) -> Option<Memory> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Memory::read(&dir.path().join("proc"), &dir.path().join("cgroup"))
    }

    fn limit_with(files: &[(&str, &str)]) -> Option<u64> {
        machine_with(files).map(|m| m.limit_bytes)
    }

    const MACHINE: (&str, &str) = (
        "proc/meminfo",
        "MemTotal:        8000000 kB\nMemFree: 1 kB\nMemAvailable:    4000000 kB\n",
    );

    #[test]
    fn the_machine_and_every_group_bound_it() {
        assert_eq!(
            machine_with(&[MACHINE]),
            Some(Memory {
                limit_bytes: 8_000_000 << 10,
                free_bytes: 4_000_000 << 10,
            })
        );
        let v1 = limit_with(&[
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
        let v2 = limit_with(&[
            MACHINE,
            ("proc/self/cgroup", "0::/system.slice/app.service\n"),
            ("cgroup/system.slice/app.service/memory.max", "max\n"),
            ("cgroup/system.slice/memory.max", "104857600\n"),
        ]);
        assert_eq!(v2, Some(104_857_600));
        // In a container: the path is the host's, the file is at the top.
        let inside = limit_with(&[
            MACHINE,
            ("proc/self/cgroup", "0::/../../kubepods/x\n"),
            ("cgroup/memory.max", "52428800\n"),
        ]);
        assert_eq!(inside, Some(52_428_800));
        assert_eq!(machine_with(&[]), None);
    }

    #[test]
    fn what_is_free_bounds_it_too() {
        let v2 = machine_with(&[
            MACHINE,
            ("proc/self/cgroup", "0::/app\n"),
            ("cgroup/app/memory.max", "1000000000\n"),
            ("cgroup/app/memory.current", "800000000\n"),
            (
                "cgroup/app/memory.stat",
                "anon 1\nfile 9\ninactive_file 50000000\nactive_file 10000000\n",
            ),
        ]);
        assert_eq!(v2.map(|m| m.free_bytes), Some(260_000_000));
        // The sibling that has used up what they share leaves this one little.
        let v1 = machine_with(&[
            MACHINE,
            ("proc/self/cgroup", "4:memory:/pod/app\n"),
            ("cgroup/memory/pod/app/memory.limit_in_bytes", "900000000\n"),
            ("cgroup/memory/pod/app/memory.usage_in_bytes", "1000\n"),
            ("cgroup/memory/pod/memory.limit_in_bytes", "1000000000\n"),
            ("cgroup/memory/pod/memory.usage_in_bytes", "900000000\n"),
            (
                "cgroup/memory/pod/memory.stat",
                "inactive_file 1\ntotal_inactive_file 1000\ntotal_active_file 2000\n",
            ),
        ]);
        assert_eq!(
            v1,
            Some(Memory {
                limit_bytes: 900_000_000,
                free_bytes: 100_003_000,
            })
        );
    }

    #[test]
    fn a_part_of_it_is_the_cache() {
        let cache = |limit_bytes: u64, free_bytes: u64| {
            let memory = Memory {
                limit_bytes,
                free_bytes,
            };
            (memory.cache_bytes() >> 20, memory.behind_bytes() >> 20)
        };
        assert_eq!(cache(64 << 30, 32 << 30), (256, 32));
        assert_eq!(cache(64 << 30, 400 << 20), (100, 32));
        assert_eq!(cache(256 << 20, 256 << 20), (32, 16));
        assert_eq!(cache(1 << 20, 0), (8, 4));
        assert!(default_cache_bytes() <= 256 << 20);
        assert!(default_behind_bytes() <= 32 << 20);
    }

    /// Files that contradict one another do not cause a panic.
    #[test]
    fn figures_that_cannot_be_are_borne() {
        let free = |used: &str, stat: &str| {
            let files = [
                MACHINE,
                ("proc/self/cgroup", "0::/app\n"),
                ("cgroup/app/memory.max", "1000\n"),
                ("cgroup/app/memory.current", used),
                ("cgroup/app/memory.stat", stat),
            ];
            machine_with(&files).unwrap().free_bytes
        };
        assert_eq!(free("100\n", "inactive_file 200\n"), 1000);
        assert_eq!(free("5000\n", ""), 0);
        let most = format!("inactive_file {0}\nactive_file {0}\n", u64::MAX);
        assert_eq!(free("100\n", &most), 1000);
        let huge = format!("MemTotal: {} kB\n", u64::MAX);
        assert_eq!(machine_with(&[("proc/meminfo", &huge)]), None);
    }

    #[test]
    fn a_small_machine_leaves_32_mib_free() {
        let reserve = |limit_bytes: u64| {
            let free_bytes = limit_bytes;
            let memory = Memory {
                limit_bytes,
                free_bytes,
            };
            memory.reserve_bytes() >> 20
        };
        assert_eq!((reserve(64 << 20), reserve(1 << 30)), (32, 128));
    }
}
