//! The kernel's tables that name the users of a block device.

use std::collections::HashSet;
use std::fs;

use super::super::Host;
use super::nodes::{DeviceNumber, Leads, Node, look_up, parse_number};
use super::process::pids;
use super::{Use, unchecked};

fn node_of(nodes: &[Node], number: DeviceNumber) -> Option<&Node> {
    nodes.iter().find(|n| n.number == number)
}

fn node_at<'a>(host: &Host, nodes: &'a [Node], path: &str) -> Option<&'a Node> {
    match look_up(host, path) {
        Leads::ToDevice(number) => node_of(nodes, number),
        _ => None,
    }
}

/// Decodes `\040` and similar escapes of a byte in the kernel's tables (proc(5)).
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match (first, octal) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Finds mounts of this process's namespace and of every other one that a process lives in.
pub(super) fn mounts(host: &Host, nodes: &[Node], found: &mut Vec<Use>) {
    match host.read("/proc/self/mountinfo") {
        Ok(Some(table)) => mounts_in(host, &table, None, nodes, found),
        Ok(None) => found.push(
            unchecked(
                "what is mounted",
                "/proc/self/mountinfo is not there; mount proc at /proc",
            )
            .into(),
        ),
        Err(e) => found.push(unchecked("what is mounted", e.to_string()).into()),
    }
    let namespace = |pid: &str| fs::read_link(host.path(&format!("/proc/{pid}/ns/mnt"))).ok();
    let mut seen: HashSet<_> = namespace("self").into_iter().collect();
    for pid in pids(host) {
        // This table may not be readable, or its process has ended. Its mounts are still claims,
        // which the kernel reports for the device itself.
        let known = namespace(&pid.to_string()).is_some_and(|n| !seen.insert(n));
        if !known && let Ok(Some(table)) = host.read(&format!("/proc/{pid}/mountinfo")) {
            mounts_in(host, &table, Some(pid), nodes, found);
        }
    }
}

/// Reads a table of mounts: the third field is the device, the second one behind the dash the
/// source.
fn mounts_in(host: &Host, table: &str, pid: Option<u32>, nodes: &[Node], found: &mut Vec<Use>) {
    for line in table.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (Some(number), Some(at)) = (fields.get(2), fields.get(4)) else {
            continue;
        };
        let number = parse_number(number).map(|(major, minor)| DeviceNumber::Block(major, minor));
        let mut hit = number.and_then(|number| node_of(nodes, number));
        if hit.is_none() {
            // A file system on several devices has a number of its own; its source is one of them.
            let dash = fields.iter().position(|f| *f == "-");
            let source = dash.and_then(|dash| fields.get(dash + 2));
            hit = source
                .filter(|s| s.starts_with('/'))
                .and_then(|s| node_at(host, nodes, &unescape(s)));
        }
        if let Some(node) = hit {
            let there = Use::Mounted {
                device: node.name.clone(),
                at: unescape(at).escape_debug().to_string(),
                namespace_of: pid,
            };
            let same = |u: &Use| match (u, &there) {
                (
                    Use::Mounted {
                        device: a, at: b, ..
                    },
                    Use::Mounted {
                        device: c, at: d, ..
                    },
                ) => a == c && b == d,
                _ => false,
            };
            if !found.iter().any(same) {
                found.push(there);
            }
        }
    }
}

pub(super) fn swaps(host: &Host, nodes: &[Node], found: &mut Vec<Use>) {
    // A kernel without swap does not have the table.
    let table = match host.read("/proc/swaps") {
        Ok(table) => table.unwrap_or_default(),
        Err(e) => {
            found.push(unchecked("swap space", e.to_string()).into());
            return;
        }
    };
    for line in table.lines().skip(1) {
        let Some(file) = line.split_whitespace().next() else {
            continue;
        };
        if let Some(node) = node_at(host, nodes, &unescape(file)) {
            found.push(Use::Swap {
                device: node.name.clone(),
            });
        }
    }
}

/// Finds device mapper, md, bcache and others that the block layer knows, by `holders` of the
/// device and `slaves` of every other.
pub(super) fn holders(host: &Host, nodes: &[Node], found: &mut Vec<Use>) {
    let mut held: Vec<(String, String)> = Vec::new();
    for node in nodes {
        for holder in host.names(&format!("{}/holders", node.dir)) {
            held.push((node.name.clone(), holder));
        }
    }
    for holder in host.names("/sys/class/block") {
        for slave in host.names(&format!("/sys/class/block/{holder}/slaves")) {
            let text = host.read(&format!("/sys/class/block/{slave}/dev"));
            let number = text.ok().flatten().as_deref().and_then(parse_number);
            let same = |n: &&Node| {
                n.name == slave
                    || number.is_some_and(|(a, b)| n.number == DeviceNumber::Block(a, b))
            };
            if let Some(node) = nodes.iter().find(same) {
                held.push((node.name.clone(), holder.clone()));
            }
        }
    }
    held.sort();
    held.dedup();
    for (device, holder) in held {
        let volume = host.read(&format!("/sys/class/block/{holder}/dm/name"));
        let holder = match volume.ok().flatten() {
            Some(volume) => format!("{holder} ({})", volume.escape_debug()),
            None => holder,
        };
        found.push(Use::Held { device, holder });
    }
}

/// Users inside the kernel that do not claim a device, each with the attribute that names the
/// device. A star stands for one directory.
const ATTRIBUTES: [(&str, &str); 9] = [
    ("/sys/class/block/*/loop/backing_file", "the loop device"),
    ("/sys/block/*/loop/backing_file", "the loop device"),
    (
        "/sys/kernel/config/nvmet/subsystems/*/namespaces/*/device_path",
        "the NVMe target (nvmet)",
    ),
    (
        "/sys/kernel/config/nvmet/subsystems/*/passthru/device_path",
        "the NVMe target (nvmet)",
    ),
    (
        "/sys/kernel/config/target/core/*/*/udev_path",
        "the SCSI target (LIO)",
    ),
    (
        "/sys/kernel/config/target/core/*/*/info",
        "the SCSI target (LIO)",
    ),
    (
        "/sys/kernel/config/usb_gadget/*/functions/*/*/file",
        "the USB gadget",
    ),
    (
        "/sys/kernel/scst_tgt/devices/*/filename",
        "the SCSI target (SCST)",
    ),
    (
        "/sys/class/rnbd-server/*/devices/*/block_dev/dev",
        "the network block device (RNBD)",
    ),
];

/// Modules whose open devices only the configuration file system shows.
const CONFIGURED: [&str; 3] = ["nvmet", "target_core_mod", "usb_f_mass_storage"];

/// Finds loop devices and targets, which have a device open without a claim and without a process.
pub(super) fn kernel_users(host: &Host, nodes: &[Node], found: &mut Vec<Use>) {
    let mut seen = HashSet::new();
    for (pattern, what) in ATTRIBUTES {
        for path in matching(host, pattern) {
            kernel_user(host, nodes, what, &path, &mut seen, found);
        }
    }
    let configured = host.path("/sys/kernel/config");
    for module in CONFIGURED {
        let loaded = host.path(&format!("/sys/module/{module}")).exists();
        if loaded && fs::read_dir(&configured).map_or(true, |mut d| d.next().is_none()) {
            found.push(
                unchecked(
                    "what the kernel exports",
                    format!("{module} is loaded and /sys/kernel/config cannot be read; mount -t configfs none /sys/kernel/config"),
                )
                .into(),
            );
        }
    }
}

fn kernel_user(
    host: &Host,
    nodes: &[Node],
    what: &str,
    path: &str,
    seen: &mut HashSet<String>,
    found: &mut Vec<Use>,
) {
    let user = user_name(path);
    let text = match host.read(path) {
        Ok(Some(text)) if !text.is_empty() => text,
        // It was removed meanwhile, or nothing is set.
        Ok(_) => return,
        Err(e) => {
            found.push(unchecked(&format!("{what} {user}"), e.to_string()).into());
            return;
        }
    };
    let is_loop = path.ends_with("backing_file");
    for target in targets(path, &text) {
        let hit = match parse_number(&target) {
            Some((major, minor)) => node_of(nodes, DeviceNumber::Block(major, minor)),
            None => match look_up(host, &target) {
                Leads::ToDevice(number) => node_of(nodes, number),
                Leads::Nowhere if is_loop && seen.insert(user.clone()) => {
                    found.push(
                        unchecked(
                            &format!("{what} {user}"),
                            format!(
                                "it lies on {}, which is not here; losetup -d /dev/{user} ends it",
                                target.escape_debug()
                            ),
                        )
                        .into(),
                    );
                    None
                }
                _ => None,
            },
        };
        if let Some(node) = hit
            && seen.insert(format!("{user} {}", node.name))
        {
            found.push(Use::Exported {
                device: node.name.clone(),
                by: format!("{what} {}", user.escape_debug()),
            });
        }
    }
}

/// Returns what an attribute names: the whole text, or the text behind `File:` in LIO's
/// description.
fn targets(path: &str, text: &str) -> Vec<String> {
    if !path.ends_with("/info") {
        return text.lines().map(str::to_owned).collect();
    }
    let mut words = text.split_whitespace();
    let mut found = Vec::new();
    while let Some(word) = words.next() {
        if word == "File:"
            && let Some(file) = words.next()
        {
            found.push(file.to_owned());
        }
    }
    found
}

/// Returns the part of an attribute's path by which its owner is known.
fn user_name(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
    let named = match parts.as_slice() {
        ["sys", "class", "block", name, ..] | ["sys", "block", name, ..] => name,
        ["sys", "kernel", "config", "nvmet", "subsystems", name, ..] => name,
        ["sys", "kernel", "config", "target", "core", _, name, ..] => name,
        ["sys", "kernel", "config", "usb_gadget", name, ..] => name,
        [.., name, _] => name,
        _ => path,
    };
    named.to_owned()
}

/// Returns the files of the machine that match a pattern in which a star stands for one directory.
fn matching(host: &Host, pattern: &str) -> Vec<String> {
    let mut found = vec![String::new()];
    for part in pattern.split('/').filter(|p| !p.is_empty()) {
        found = found
            .into_iter()
            .flat_map(|dir| {
                let names = if part == "*" {
                    host.names(&dir)
                } else {
                    vec![part.to_owned()]
                };
                names.into_iter().map(move |name| format!("{dir}/{name}"))
            })
            .filter(|path| host.path(path).exists())
            .collect();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{unescape, user_name};

    #[test]
    fn escapes_stand_for_bytes() {
        assert_eq!(unescape("/srv\\040a\\134b"), "/srv a\\b");
        assert_eq!(unescape("/x\\9"), "/x\\9");
        assert_eq!(unescape("\\1"), "\\1");
    }

    #[test]
    fn users_have_names() {
        assert_eq!(user_name("/sys/block/loop0/loop/backing_file"), "loop0");
        assert_eq!(
            user_name("/sys/kernel/config/nvmet/subsystems/nqn.x/namespaces/1/device_path"),
            "nqn.x"
        );
    }
}
