//! Processes that have a device open.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::Path;

use super::super::Host;
use super::nodes::{DeviceNumber, Leads, look_up, number_of};
use super::{Unchecked, unchecked};

/// A process that has a file open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Opener {
    pub pid: u32,
    /// Name of the process, with control characters escaped, since a process may choose any name.
    pub name: String,
    /// The path by which it was opened.
    pub target: String,
}

/// Inode number of the first PID namespace (Linux include/linux/proc_ns.h, `PROC_PID_INIT_INO`).
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

/// Whether `/proc` shows every process of the machine.
pub(super) fn all_are_visible(host: &Host) -> Result<(), Unchecked> {
    let what = "whether a process has it open";
    match fs::read_dir(host.path("/proc/self")) {
        Ok(_) => {}
        Err(e) => {
            return Err(unchecked(
                what,
                format!("/proc/self: {e}; mount proc at /proc"),
            ));
        }
    }
    // A kernel without such namespaces does not have the link.
    match fs::read_link(host.path("/proc/self/ns/pid")) {
        Ok(link) if link != Path::new(FIRST_PID_NAMESPACE) => Err(unchecked(
            what,
            "this is a container that does not see the processes outside; run this command on the host",
        )),
        _ => Ok(()),
    }
}

pub(super) fn pids(host: &Host) -> Vec<u32> {
    let names = host.names("/proc");
    names.iter().filter_map(|n| n.parse().ok()).collect()
}

/// Returns the other processes that have a file open, or mapped, which leads to one of `numbers`,
/// and how many processes this one may not inspect.
pub(super) fn openers_of(host: &Host, numbers: &HashSet<DeviceNumber>) -> (Vec<Opener>, usize) {
    let mut seen: HashMap<String, bool> = HashMap::new();
    let mut leads_there = |path: &str| {
        *seen.entry(path.to_owned()).or_insert_with(
            || matches!(look_up(host, path), Leads::ToDevice(n) if numbers.contains(&n)),
        )
    };
    let mut found = Vec::new();
    let mut hidden = 0;
    for pid in pids(host) {
        if pid == std::process::id() {
            continue;
        }
        let by_number = |link: &Path| {
            let meta = fs::metadata(link).ok();
            meta.and_then(|m| number_of(&m))
                .is_some_and(|n| numbers.contains(&n))
        };
        let open = first_open(host, pid, |link, target| {
            by_number(link) || leads_there(target)
        });
        match open {
            Ok(Some(target)) => found.push(opener(host, pid, target)),
            Ok(None) => {
                let mapped = mapped_paths(host, pid);
                if let Some(target) = mapped.into_iter().find(|path| leads_there(path)) {
                    found.push(opener(host, pid, target));
                }
            }
            Err(()) => hidden += 1,
        }
    }
    (found, hidden)
}

/// Returns the processes that have a file open whose path satisfies `wanted`, as far as this
/// process may inspect them.
pub(in super::super) fn openers(host: &Host, wanted: impl Fn(&str) -> bool) -> Vec<Opener> {
    let mut found = Vec::new();
    for pid in pids(host) {
        if let Ok(Some(target)) = first_open(host, pid, |_, target| wanted(target)) {
            found.push(opener(host, pid, target));
        }
    }
    found
}

fn opener(host: &Host, pid: u32, target: String) -> Opener {
    let comm = host.read(&format!("/proc/{pid}/comm")).ok().flatten();
    let name = comm.unwrap_or_else(|| "?".to_owned());
    Opener {
        pid,
        name: name.escape_debug().to_string(),
        target,
    }
}

/// Returns the first descriptor of a process whose link and target satisfy `wanted`. Fails when
/// this process may not inspect it. A process that ended meanwhile has nothing open.
fn first_open(
    host: &Host,
    pid: u32,
    mut wanted: impl FnMut(&Path, &str) -> bool,
) -> Result<Option<String>, ()> {
    let fds = match fs::read_dir(host.path(&format!("/proc/{pid}/fd"))) {
        Ok(fds) => fds,
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Err(()),
        Err(_) => return Ok(None),
    };
    for fd in fds.filter_map(Result::ok) {
        let link = fd.path();
        let Ok(target) = fs::read_link(&link) else {
            continue;
        };
        let target = target.to_string_lossy().into_owned();
        if wanted(&link, &target) {
            return Ok(Some(target));
        }
    }
    Ok(None)
}

/// Returns the files that a process has mapped. A mapping outlives the descriptor that it was made
/// from (proc(5), `/proc/pid/maps`).
fn mapped_paths(host: &Host, pid: u32) -> HashSet<String> {
    let text = host.read(&format!("/proc/{pid}/maps")).ok().flatten();
    let text = text.unwrap_or_default();
    let path = |line: &str| {
        let at = line.find('/')?;
        Some(line.get(at..)?.to_owned())
    };
    text.lines().filter_map(path).collect()
}
