//! Device numbers: the nodes of a controller, and the device that a path leads to.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use super::super::Host;
use super::{Unchecked, unchecked};

/// The kernel's number of a device. Nodes can have any name, anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum DeviceNumber {
    Block(u32, u32),
    Char(u32, u32),
}

/// A device of a controller: a namespace, one of its partitions, or a character device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub name: String,
    pub number: DeviceNumber,
    /// The directory in sysfs, for block devices.
    pub dir: String,
    /// Whether it is a whole namespace, which can be claimed.
    pub is_disk: bool,
}

/// Parses a number such as `259:3`, as sysfs and mountinfo write it.
pub(super) fn parse_number(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Returns the number of the node that `meta` describes, if it is a device node.
pub(super) fn number_of(meta: &fs::Metadata) -> Option<DeviceNumber> {
    let rdev = meta.rdev();
    let (major, minor) = (libc::major(rdev), libc::minor(rdev));
    if meta.file_type().is_block_device() {
        Some(DeviceNumber::Block(major, minor))
    } else if meta.file_type().is_char_device() {
        Some(DeviceNumber::Char(major, minor))
    } else {
        None
    }
}

/// Returns every device that the kernel made for the controller: namespaces with their partitions,
/// and the character devices of the namespaces and of the controller.
pub(super) fn of_controller(
    host: &Host,
    function_dir: &str,
    disks: &[String],
) -> Result<Vec<Node>, Unchecked> {
    let mut all = Vec::new();
    for disk in disks {
        block_nodes(host, disk, &mut all)?;
        if let Some(rest) = disk.strip_prefix("nvme") {
            let generic = format!("ng{rest}");
            char_node(
                host,
                &format!("/sys/class/nvme-generic/{generic}"),
                &mut all,
            );
        }
    }
    for controller in host.names(&format!("{function_dir}/nvme")) {
        char_node(host, &format!("{function_dir}/nvme/{controller}"), &mut all);
    }
    Ok(all)
}

fn char_node(host: &Host, dir: &str, all: &mut Vec<Node>) {
    let number = host.read(&format!("{dir}/dev")).ok().flatten();
    if let Some((major, minor)) = number.as_deref().and_then(parse_number) {
        all.push(Node {
            name: dir.rsplit('/').next().unwrap_or_default().to_owned(),
            number: DeviceNumber::Char(major, minor),
            dir: dir.to_owned(),
            is_disk: false,
        });
    }
}

fn block_nodes(host: &Host, disk: &str, all: &mut Vec<Node>) -> Result<(), Unchecked> {
    let dir = format!("/sys/class/block/{disk}");
    let mut add = |name: &str, dir: &str, is_disk| {
        let text = host.read(&format!("{dir}/dev"))?;
        if let Some((major, minor)) = text.as_deref().and_then(parse_number) {
            all.push(Node {
                name: name.to_owned(),
                number: DeviceNumber::Block(major, minor),
                dir: dir.to_owned(),
                is_disk,
            });
            return Ok(true);
        }
        Ok(false)
    };
    let here = add(disk, &dir, true)
        .map_err(|e: super::super::PciError| unchecked(disk, e.to_string()))?;
    if !here {
        return Err(unchecked(
            disk,
            format!("{dir}/dev does not give its device number; mount sysfs at /sys"),
        ));
    }
    for name in host.names(&dir) {
        let below = format!("{dir}/{name}");
        if name.starts_with(disk) {
            add(&name, &below, false).map_err(|e| unchecked(&name, e.to_string()))?;
        }
    }
    Ok(())
}

/// Follows the symbolic links of a path of the machine, whose `/` may be another directory.
fn resolve(host: &Host, absolute: &str) -> Option<PathBuf> {
    const LINKS: usize = 40;
    let mut rest: Vec<std::ffi::OsString> = parts(Path::new(absolute));
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = rest.pop() {
        if part == ".." {
            at.pop();
            continue;
        }
        let next = at.join(&part);
        match fs::read_link(host.path(next.to_str()?)) {
            Ok(target) => {
                links += 1;
                if links > LINKS {
                    return None;
                }
                if target.is_absolute() {
                    at = PathBuf::from("/");
                }
                rest.extend(parts(&target));
            }
            Err(_) => at = next,
        }
    }
    Some(at)
}

/// Returns the components of a path, last one first.
fn parts(path: &Path) -> Vec<std::ffi::OsString> {
    let wanted = path.components().filter_map(|c| match c {
        Component::Normal(part) => Some(part.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    });
    let mut parts: Vec<_> = wanted.collect();
    parts.reverse();
    parts
}

/// The object that a path of the machine leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leads {
    ToDevice(DeviceNumber),
    /// Something else, such as a file or a directory.
    Elsewhere,
    /// Nothing: the name does not exist in this mount namespace.
    Nowhere,
}

/// Returns what a path of the machine leads to. If `/dev` has no node of a name, sysfs gives the
/// number of the device of that name.
pub(super) fn look_up(host: &Host, absolute: &str) -> Leads {
    let resolved = resolve(host, absolute);
    let text = resolved.as_deref().and_then(Path::to_str);
    let meta = text.map(|t| fs::symlink_metadata(host.path(t)));
    if let Some(Ok(meta)) = &meta
        && let Some(number) = number_of(meta)
    {
        return Leads::ToDevice(number);
    }
    for path in text.into_iter().chain([absolute]) {
        if let Some(number) = path.strip_prefix("/dev/").and_then(|n| by_name(host, n)) {
            return Leads::ToDevice(number);
        }
    }
    match meta {
        Some(Ok(_)) => Leads::Elsewhere,
        _ => match absolute.strip_suffix(" (deleted)") {
            Some(was) => match look_up(host, was) {
                Leads::ToDevice(number) => Leads::ToDevice(number),
                _ => Leads::Nowhere,
            },
            None => Leads::Nowhere,
        },
    }
}

fn by_name(host: &Host, name: &str) -> Option<DeviceNumber> {
    // Sysfs has an exclamation mark where a device's name has a slash.
    let name = name.replace('/', "!");
    let read = |class: &str| {
        let text = host.read(&format!("/sys/class/{class}/{name}/dev"));
        parse_number(text.ok().flatten().as_deref()?)
    };
    if let Some((major, minor)) = read("block").or_else(|| partition(host, &name)) {
        return Some(DeviceNumber::Block(major, minor));
    }
    let (major, minor) = read("nvme").or_else(|| read("nvme-generic"))?;
    Some(DeviceNumber::Char(major, minor))
}

/// Returns the number of a partition, which sysfs lists below its disk.
fn partition(host: &Host, name: &str) -> Option<(u32, u32)> {
    let disks = host.names("/sys/class/block").into_iter();
    disks
        .filter(|disk| name.starts_with(disk))
        .find_map(|disk| {
            let text = host.read(&format!("/sys/class/block/{disk}/{name}/dev"));
            parse_number(text.ok().flatten().as_deref()?)
        })
}
