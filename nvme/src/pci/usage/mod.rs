//! Finds out whether the machine uses a controller's disks. It asks every source that Linux has,
//! compares devices by their numbers, and counts a source that cannot be asked as a use.

use std::collections::HashSet;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use super::Host;
use nodes::{DeviceNumber, Node, number_of};

mod nodes;
mod process;
mod sources;

pub(super) use process::openers;

/// A use, or possible use, of a controller's block device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Use {
    /// A file system on it is mounted.
    Mounted {
        /// Name of the block device or partition.
        device: String,
        /// The mount point, as its mount namespace names it.
        at: String,
        /// A process of the mount namespace, if that is not this process's.
        namespace_of: Option<u32>,
    },
    /// The machine swaps to it.
    Swap {
        /// Name of the block device or partition.
        device: String,
    },
    /// A volume lies on top of it: LVM, md, dm-crypt, multipath, bcache.
    Held {
        /// Name of the block device or partition.
        device: String,
        /// The kernel's name of the volume and, for device mapper, the volume's own name.
        holder: String,
    },
    /// A part of the kernel has it open without a claim: a loop device, or a target that exports
    /// it.
    Exported {
        /// Name of the block device, partition or character device.
        device: String,
        /// The part of the kernel.
        by: String,
    },
    /// A process has it open or mapped.
    Open {
        /// Name of the block device, partition or character device.
        device: String,
        /// Process identifier.
        pid: u32,
        /// Name of the process.
        name: String,
    },
    /// The kernel reports a claim without its owner (a file system on several devices, a mount in
    /// another namespace, ZFS).
    Claimed {
        /// Name of the block device or partition.
        device: String,
    },
    /// A source could not be asked, so the device may be in use.
    Unchecked(Unchecked),
}

/// A source that could not be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unchecked {
    /// The device or the source.
    pub what: String,
    /// The reason why it could not be asked, and what to do.
    pub why: String,
}

fn unchecked(what: &str, why: impl Into<String>) -> Unchecked {
    Unchecked {
        what: what.to_owned(),
        why: why.into(),
    }
}

impl From<Unchecked> for Use {
    fn from(unchecked: Unchecked) -> Use {
        Use::Unchecked(unchecked)
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Use::Mounted {
                device,
                at,
                namespace_of: None,
            } => write!(f, "{device} is mounted at {at} (umount {at})"),
            Use::Mounted {
                device,
                at,
                namespace_of: Some(pid),
            } => write!(
                f,
                "{device} is mounted at {at} in the mount namespace of process {pid} (nsenter -t {pid} -m umount {at})"
            ),
            Use::Swap { device } => write!(f, "{device} is swap space (swapoff /dev/{device})"),
            Use::Held { device, holder } => write!(
                f,
                "{device} is part of {holder} (take that down first: vgchange -an, mdadm --stop, cryptsetup close)"
            ),
            Use::Exported { device, by } => write!(f, "{device} is open in {by}"),
            Use::Open { device, pid, name } => {
                write!(f, "{device} is open in process {pid} ({name})")
            }
            Use::Claimed { device } => write!(
                f,
                "{device} is claimed by something that the tables do not name (another mount namespace, ZFS, a file system of several devices)"
            ),
            Use::Unchecked(Unchecked { what, why }) => {
                write!(f, "{what} could not be checked and counts as in use: {why}")
            }
        }
    }
}

/// The disks of a controller, opened exclusively. While this lives nobody can mount them, swap to
/// them or build a volume on them.
#[derive(Debug, Default)]
pub struct Claims {
    files: Vec<File>,
}

impl Claims {
    /// Number of claimed disks.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether the controller has no disk.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }
}

/// Returns the names of the namespaces that the kernel's driver shows for a function. With
/// multipath the path (`nvme0c1n2`) is hidden and the head (`nvme0n2`) is used.
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

/// Returns `nvme0n1` for `nvme0n1` and `nvme0c3n1`, and `None` for anything else.
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

/// Claims the disks of a controller, or returns the uses of one that is in use.
pub(super) fn claim(host: &Host, function_dir: &str, disks: &[String]) -> Result<Claims, Vec<Use>> {
    let nodes = match nodes::of_controller(host, function_dir, disks) {
        Ok(nodes) => nodes,
        Err(unchecked) => return Err(vec![unchecked.into()]),
    };
    if nodes.is_empty() {
        return Ok(Claims::default());
    }
    let mut found = Vec::new();
    // The claim comes first, so that no other claim can be made after the look at the tables.
    let mut claims = Claims::default();
    let mut claimed = Vec::new();
    for node in nodes.iter().filter(|n| n.is_disk) {
        match open_exclusively(host, node) {
            Ok(file) => claims.files.push(file),
            Err(none) => claimed.push(none),
        }
    }
    sources::mounts(host, &nodes, &mut found);
    sources::swaps(host, &nodes, &mut found);
    sources::holders(host, &nodes, &mut found);
    sources::kernel_users(host, &nodes, &mut found);
    processes(host, &nodes, &mut found);
    for none in claimed {
        // A table that names the claim's owner says more.
        let known = matches!(&none, Use::Claimed { device } if found.iter().any(|u| claims_disk(u, device)));
        if !known {
            found.push(none);
        }
    }
    if found.is_empty() {
        Ok(claims)
    } else {
        Err(found)
    }
}

/// Whether a use explains the claim on a disk, because it is a use of the disk or of its
/// partitions.
fn claims_disk(one: &Use, disk: &str) -> bool {
    match one {
        Use::Mounted { device, .. } | Use::Swap { device } | Use::Held { device, .. } => {
            device.starts_with(disk)
        }
        _ => false,
    }
}

fn processes(host: &Host, nodes: &[Node], found: &mut Vec<Use>) {
    if let Err(unchecked) = process::all_are_visible(host) {
        found.push(unchecked.into());
    }
    let numbers: HashSet<DeviceNumber> = nodes.iter().map(|n| n.number).collect();
    let (openers, hidden) = process::openers_of(host, &numbers);
    for opener in openers {
        let device = opener.target.trim_start_matches("/dev/");
        found.push(Use::Open {
            device: device.escape_debug().to_string(),
            pid: opener.pid,
            name: opener.name,
        });
    }
    if hidden > 0 {
        let why =
            format!("this user may not look into {hidden} processes; run this command as root");
        found.push(unchecked("whether a process has it open", why).into());
    }
}

/// Opens a whole block device exclusively, which fails while anything has claimed it or a partition
/// (open(2), `O_EXCL`).
fn open_exclusively(host: &Host, node: &Node) -> Result<File, Use> {
    let path = format!("/dev/{}", node.name.replace('!', "/"));
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(host.path(&path));
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {
            return Err(Use::Claimed {
                device: node.name.clone(),
            });
        }
        Err(e) => return Err(unchecked(&node.name, format!("{path}: {e}")).into()),
    };
    let number = file.metadata().ok().and_then(|m| number_of(&m));
    if number.is_some_and(|n| n != node.number) {
        let why = format!("{path} is another device's node");
        return Err(unchecked(&node.name, why).into());
    }
    Ok(file)
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
