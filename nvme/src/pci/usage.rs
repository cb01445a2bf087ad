//! Whether the machine uses what is on a controller.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use super::Host;
use super::host::names;

/// One way in which a block device of a controller is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Use {
    /// A file system on it is mounted.
    Mounted {
        /// Block device or partition.
        device: String,
        /// Where.
        at: String,
    },
    /// The machine swaps to it.
    Swap {
        /// Block device or partition.
        device: String,
    },
    /// Something lies on top of it: LVM, md, dm-crypt, multipath, bcache.
    Held {
        /// Block device or partition.
        device: String,
        /// The kernel's name and, for device mapper, the volume's.
        holder: String,
    },
    /// A process has it open.
    Open {
        /// Block device or partition.
        device: String,
        /// Process.
        pid: u32,
        /// Its name.
        name: String,
    },
    /// The kernel says that somebody has claimed it, without saying who (a file system on
    /// several devices, a mount of another namespace, ZFS).
    Claimed {
        /// Block device or partition.
        device: String,
    },
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Use::Mounted { device, at } => write!(f, "{device} is mounted at {at} (umount {at})"),
            Use::Swap { device } => write!(f, "{device} is swap space (swapoff /dev/{device})"),
            Use::Held { device, holder } => write!(
                f,
                "{device} is part of {holder} (take that down first: vgchange -an, mdadm --stop, cryptsetup close)"
            ),
            Use::Open { device, pid, name } => {
                write!(f, "{device} is open in process {pid} ({name})")
            }
            Use::Claimed { device } => write!(
                f,
                "{device} is claimed by something that the tables do not name (another mount namespace, ZFS, a file system of several devices)"
            ),
        }
    }
}

/// Names of the namespaces that the kernel's driver shows for a function. With multipath the
/// path (`nvme0c1n2`) is hidden and the head (`nvme0n2`) is what is used.
pub(super) fn block_devices(host: &Host, function_dir: &str) -> Vec<String> {
    let mut found = Vec::new();
    for controller in host.names(&format!("{function_dir}/nvme")) {
        for name in host.names(&format!("{function_dir}/nvme/{controller}")) {
            if let Some(head) = namespace_name(&name)
                && !found.contains(&head)
            {
                found.push(head);
            }
        }
    }
    found
}

/// `nvme0n1` for `nvme0n1` and for `nvme0c3n1`; nothing for anything else.
fn namespace_name(name: &str) -> Option<String> {
    let rest = name.strip_prefix("nvme")?;
    let split = rest.find(|c: char| !c.is_ascii_digit())?;
    let (instance, rest) = rest.split_at(split);
    let rest = match rest.strip_prefix('c') {
        Some(path) => path.trim_start_matches(|c: char| c.is_ascii_digit()),
        None => rest,
    };
    let nsid = rest.strip_prefix('n')?;
    let number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    (number(instance) && number(nsid)).then(|| format!("nvme{instance}n{nsid}"))
}

/// A block device with its partitions: name and `major:minor`.
fn with_partitions(host: &Host, device: &str) -> Vec<(String, String)> {
    let dir = format!("/sys/class/block/{device}");
    let mut all = Vec::new();
    let mut add = |name: &str, dir: &str| {
        if let Ok(Some(number)) = host.read(&format!("{dir}/dev")) {
            all.push((name.to_owned(), number));
        }
    };
    add(device, &dir);
    for name in host.names(&dir) {
        if name.starts_with(device) {
            add(&name, &format!("{dir}/{name}"));
        }
    }
    all
}

pub(super) fn uses(host: &Host, devices: &[String]) -> Vec<Use> {
    let mut found = Vec::new();
    for device in devices {
        let parts = with_partitions(host, device);
        mounts(host, &parts, &mut found);
        swaps(host, &parts, &mut found);
        holders(host, device, &parts, &mut found);
        processes(host, &parts, &mut found);
        if found.is_empty() && is_claimed(host, device) {
            found.push(Use::Claimed {
                device: device.clone(),
            });
        }
    }
    found
}

/// `/proc/self/mountinfo`: the third field is the device, the ninth or later the source
/// (proc(5)). Octal escapes stand for spaces.
fn mounts(host: &Host, parts: &[(String, String)], found: &mut Vec<Use>) {
    let Ok(Some(table)) = host.read("/proc/self/mountinfo") else {
        return;
    };
    for line in table.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (Some(number), Some(at)) = (fields.get(2), fields.get(4)) else {
            continue;
        };
        let source = fields
            .iter()
            .position(|f| *f == "-")
            .and_then(|dash| fields.get(dash + 2));
        let hit = parts.iter().find(|(name, have)| {
            have == number || source.and_then(|s| s.strip_prefix("/dev/")) == Some(name.as_str())
        });
        if let Some((name, _)) = hit {
            found.push(Use::Mounted {
                device: name.clone(),
                at: at.replace("\\040", " "),
            });
        }
    }
}

fn swaps(host: &Host, parts: &[(String, String)], found: &mut Vec<Use>) {
    let Ok(Some(table)) = host.read("/proc/swaps") else {
        return;
    };
    for line in table.lines().skip(1) {
        let Some(file) = line.split_whitespace().next() else {
            continue;
        };
        if let Some((name, _)) = parts
            .iter()
            .find(|(name, _)| file.strip_prefix("/dev/") == Some(name.as_str()))
        {
            found.push(Use::Swap {
                device: name.clone(),
            });
        }
    }
}

fn holders(host: &Host, device: &str, parts: &[(String, String)], found: &mut Vec<Use>) {
    for (name, _) in parts {
        let dir = if name == device {
            format!("/sys/class/block/{device}/holders")
        } else {
            format!("/sys/class/block/{device}/{name}/holders")
        };
        for holder in host.names(&dir) {
            let volume = host
                .read(&format!("/sys/class/block/{holder}/dm/name"))
                .ok()
                .flatten();
            let holder = match volume {
                Some(volume) => format!("{holder} ({volume})"),
                None => holder,
            };
            found.push(Use::Held {
                device: name.clone(),
                holder,
            });
        }
    }
}

fn processes(host: &Host, parts: &[(String, String)], found: &mut Vec<Use>) {
    let is_part = |target: &str| {
        let name = target.strip_prefix("/dev/");
        parts.iter().any(|(part, _)| Some(part.as_str()) == name)
    };
    for (pid, name, target) in openers(host, is_part) {
        found.push(Use::Open {
            device: target.trim_start_matches("/dev/").to_owned(),
            pid,
            name,
        });
    }
}

/// Processes that have a file open which `wanted` picks by its path: pid, name, path. As far as
/// this process may look.
pub(super) fn openers(host: &Host, wanted: impl Fn(&str) -> bool) -> Vec<(u32, String, String)> {
    let mut found = Vec::new();
    for process in host.names("/proc") {
        let Ok(pid) = process.parse::<u32>() else {
            continue;
        };
        let fds = host.path(&format!("/proc/{pid}/fd"));
        let open = names(&fds).into_iter().find_map(|fd| {
            let target = fs::read_link(fds.join(fd)).ok()?;
            let target = target.to_str()?;
            wanted(target).then(|| target.to_owned())
        });
        if let Some(target) = open {
            let comm = host.read(&format!("/proc/{pid}/comm")).ok().flatten();
            found.push((pid, comm.unwrap_or_else(|| "?".to_owned()), target));
        }
    }
    found
}

/// Opening a whole block device exclusively fails while anything holds it or a partition
/// (open(2), `O_EXCL`).
fn is_claimed(host: &Host, device: &str) -> bool {
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_CLOEXEC)
        .open(host.path(&format!("/dev/{device}")));
    matches!(opened, Err(e) if e.kind() == io::ErrorKind::ResourceBusy)
}

#[cfg(test)]
mod tests {
    use super::namespace_name;

    #[test]
    fn names_of_namespaces() {
        assert_eq!(namespace_name("nvme0n1").as_deref(), Some("nvme0n1"));
        assert_eq!(namespace_name("nvme10c3n12").as_deref(), Some("nvme10n12"));
        for other in ["nvme0", "ng0n1", "hwmon2", "nvmen1", "nvme0n1p1", "nvme0c1"] {
            assert_eq!(namespace_name(other), None, "{other}");
        }
    }
}
