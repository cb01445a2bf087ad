//! `pumice doctor`: what this machine lacks to drive an NVMe device in userspace, and the commands
//! that help.

use std::fs::File;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use pumice_bdev_control::terminal::{print, print_json};
use pumice_nvme::dma::{Memlock, memlock};
use pumice_nvme::pci::{Function, Host, PciAddress};
use serde_json::{Value, json};

/// Check IOMMU, modules, permissions and limits; print what is missing and the command that helps
#[derive(Args)]
pub struct Doctor {
    /// Check only this controller, such as 0000:01:00.0; without it all of them
    address: Option<PciAddress>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Directory to use as the machine's `/`
    #[arg(long, default_value = "/", hide = true)]
    root: PathBuf,
}

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CheckState {
    /// Everything is in order.
    Good,
    /// It works, with a restriction.
    Note,
    /// Something is missing.
    Missing,
}

impl CheckState {
    fn word(self) -> &'static str {
        match self {
            CheckState::Good => "ok",
            CheckState::Note => "note",
            CheckState::Missing => "missing",
        }
    }
}

#[derive(Debug)]
struct Check {
    name: String,
    state: CheckState,
    detail: String,
    fix: Option<String>,
}

fn check(name: impl Into<String>, state: CheckState, detail: impl Into<String>) -> Check {
    Check {
        name: name.into(),
        state,
        detail: detail.into(),
        fix: None,
    }
}

impl Check {
    fn fix(mut self, command: impl Into<String>) -> Check {
        self.fix = Some(command.into());
        self
    }
}

/// Properties of the process that do not come from files, so that tests can set them.
struct Process {
    memlock: Memlock,
    /// Whether the memlock limit does not apply (CAP_IPC_LOCK).
    unlimited: bool,
}

/// Runs the command. The exit code is 1 when something is missing.
pub fn run(args: &Doctor) -> ExitCode {
    let host = Host::at(&args.root);
    let status = host.read("/proc/self/status").ok().flatten();
    let process = Process {
        memlock: memlock(),
        unlimited: has_ipc_lock(status.as_deref().unwrap_or("")),
    };
    let checks = examine(&host, args.address, &process);
    let sick = checks.iter().any(|c| c.state == CheckState::Missing);
    if args.json {
        print_json(&as_json(&checks));
    } else {
        print(&as_text(&checks));
    }
    ExitCode::from(u8::from(sick))
}

fn as_json(checks: &[Check]) -> Value {
    let list: Vec<Value> = checks
        .iter()
        .map(|c| json!({"name": c.name, "state": c.state.word(), "detail": c.detail, "fix": c.fix}))
        .collect();
    let ready = checks.iter().all(|c| c.state != CheckState::Missing);
    json!({ "ready": ready, "checks": list })
}

fn as_text(checks: &[Check]) -> String {
    let mut out = String::new();
    for c in checks {
        out.push_str(&format!("{:<8} {}: {}\n", c.state.word(), c.name, c.detail));
        if let Some(fix) = &c.fix {
            out.push_str(&format!("         -> {fix}\n"));
        }
    }
    let missing = checks
        .iter()
        .filter(|c| c.state == CheckState::Missing)
        .count();
    out.push_str(&match missing {
        0 => "nothing is missing\n".to_owned(),
        n => format!("{n} missing\n"),
    });
    out
}

/// Reads `CapEff` (proc(5)); CAP_IPC_LOCK is bit 14 (capabilities(7)).
fn has_ipc_lock(status: &str) -> bool {
    status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|caps| caps >> 14 & 1 == 1)
}

fn examine(host: &Host, only: Option<PciAddress>, process: &Process) -> Vec<Check> {
    let mut checks = Vec::new();
    let functions = controllers(host, only, &mut checks);
    let uio = functions
        .iter()
        .any(|f| f.driver.as_deref() == Some("uio_pci_generic"));
    let translated = iommu(host, &mut checks);
    modules(host, uio, &mut checks);
    for function in &functions {
        controller(host, function, only.is_some(), &mut checks);
    }
    limits(process, translated, &mut checks);
    huge_pages(host, uio || !translated, &mut checks);
    io_uring(host, &mut checks);
    if functions.is_empty() && only.is_none() && checks[0].state == CheckState::Note {
        // There is no device to drive, so nothing that it would need is missing.
        for check in &mut checks {
            if check.state == CheckState::Missing {
                check.state = CheckState::Note;
            }
        }
    }
    checks
}

fn controllers(host: &Host, only: Option<PciAddress>, checks: &mut Vec<Check>) -> Vec<Function> {
    let found = match only {
        Some(address) => host.nvme_function(address).map(|f| vec![f]),
        None => host.nvme_functions(),
    };
    match found {
        Ok(list) if list.is_empty() => {
            checks.push(check(
                "controllers",
                CheckState::Note,
                "no NVMe controller on the PCI bus; image files and memory devices need none",
            ));
            list
        }
        Ok(list) => {
            let names: Vec<String> = list.iter().map(|f| f.address.to_string()).collect();
            checks.push(check("controllers", CheckState::Good, names.join(" ")));
            list
        }
        Err(e) => {
            checks.push(check("controllers", CheckState::Missing, e.to_string()));
            Vec::new()
        }
    }
}

/// Checks whether device addresses are translated.
fn iommu(host: &Host, checks: &mut Vec<Check>) -> bool {
    let groups = host.names("/sys/kernel/iommu_groups").len();
    if groups > 0 && !host.names("/sys/class/iommu").is_empty() {
        checks.push(check(
            "IOMMU",
            CheckState::Good,
            format!("on, {groups} groups"),
        ));
        return true;
    }
    let text = |path: &str| host.read(path).ok().flatten().unwrap_or_default();
    let cmdline = text("/proc/cmdline");
    let amd = text("/proc/cpuinfo").contains("AuthenticAMD");
    let word = if amd { "amd_iommu" } else { "intel_iommu" };
    let what = if amd { "AMD-Vi (IOMMU)" } else { "VT-d" };
    let off = [format!("{word}=off"), "iommu=off".to_owned()];
    let detail = if cmdline.split(' ').any(|w| off.iter().any(|o| o == w)) {
        "switched off on the kernel's command line"
    } else if cmdline.contains(&format!("{word}=on")) {
        "asked for on the kernel's command line, but the firmware offers none"
    } else {
        "off: without it a device reaches all memory, and VFIO refuses it"
    };
    checks.push(check("IOMMU", CheckState::Missing, detail).fix(format!(
        "turn {what} on in the firmware set-up; then in /etc/default/grub add {word}=on to GRUB_CMDLINE_LINUX, run update-grub and reboot"
    )));
    false
}

fn modules(host: &Host, uio: bool, checks: &mut Vec<Check>) {
    let wanted = if uio {
        vec![("uio_pci_generic", "uio_pci_generic")]
    } else {
        vec![
            ("vfio_pci", "vfio-pci"),
            ("vfio_iommu_type1", "vfio_iommu_type1"),
        ]
    };
    for (module, name) in wanted {
        // Built-in code has a directory there only if it has parameters; the driver's directory
        // tells.
        let there = host.path(&format!("/sys/module/{module}")).exists()
            || host.path(&format!("/sys/bus/pci/drivers/{name}")).exists();
        let what = format!("kernel module {name}");
        checks.push(if there {
            check(what, CheckState::Good, "loaded")
        } else {
            check(what, CheckState::Missing, "not loaded").fix(format!(
                "modprobe {name}; for every boot: echo {name} > /etc/modules-load.d/{name}.conf"
            ))
        });
    }
    let parameter = |name: &str| {
        let text = host.read(&format!("/sys/module/{name}")).ok().flatten();
        text.is_some_and(|t| t == "Y" || t == "1")
    };
    if parameter("vfio/parameters/enable_unsafe_noiommu_mode") {
        checks.push(check(
            "no-IOMMU mode",
            CheckState::Note,
            "VFIO takes devices without an IOMMU: a wrong address of a device overwrites any memory",
        ));
    }
    if parameter("vfio_iommu_type1/parameters/allow_unsafe_interrupts") {
        checks.push(check(
            "interrupt isolation",
            CheckState::Note,
            "allow_unsafe_interrupts is set: a device can forge interrupts",
        ));
    }
    let entries = host
        .read("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
        .ok()
        .flatten()
        .and_then(|t| t.parse::<u64>().ok());
    if let Some(entries) = entries {
        let (state, detail) = if entries >= 1024 {
            (CheckState::Good, format!("{entries} for each process"))
        } else {
            (
                CheckState::Note,
                format!("only {entries} for each process; caches take one for each 32 MiB"),
            )
        };
        checks.push(check("DMA mappings", state, detail));
    }
}

fn controller(host: &Host, function: &Function, asked_for: bool, checks: &mut Vec<Check>) {
    let address = function.address;
    let name = format!("controller {address}");
    match function.driver.as_deref() {
        Some("vfio-pci") => {}
        Some("uio_pci_generic") => {
            let root = File::options()
                .read(true)
                .write(true)
                .open(host.path(&format!("/sys/bus/pci/devices/{address}/resource0")));
            checks.push(match root {
                Ok(_) => check(name, CheckState::Good, "bound to uio_pci_generic"),
                Err(e) => check(name, CheckState::Missing, format!("resource0: {e}"))
                    .fix("run as root: uio needs physical addresses"),
            });
            return;
        }
        other => {
            let driver = other.unwrap_or("no driver");
            let uses: Vec<String> = host
                .uses(function)
                .iter()
                .map(ToString::to_string)
                .collect();
            let state = if asked_for {
                CheckState::Missing
            } else {
                CheckState::Note
            };
            checks.push(if uses.is_empty() {
                check(name, state, format!("bound to {driver}, not in use"))
                    .fix(format!("pumice setup bind {address}"))
            } else {
                check(
                    name,
                    state,
                    format!("bound to {driver} and in use: {}", uses.join("; ")),
                )
            });
            return;
        }
    }
    let Some(group) = &function.group else {
        checks.push(
            check(
                name,
                CheckState::Missing,
                "bound to vfio-pci, but has no IOMMU group",
            )
            .fix("turn the IOMMU on, see above"),
        );
        return;
    };
    let rivals = host.group_rivals(function);
    if !rivals.is_empty() {
        for (rival, driver) in rivals {
            checks.push(neighbour(host, &name, group.id, rival, &driver));
        }
    }
    let node = group.node();
    let opened = File::options()
        .read(true)
        .write(true)
        .open(host.path(&node));
    checks.push(match opened {
        Ok(_) => check(
            name,
            CheckState::Good,
            format!("bound to vfio-pci, {node} may be opened"),
        ),
        Err(e) if e.kind() == ErrorKind::ResourceBusy => {
            let users = host.openers(&node);
            let who = users.first().map_or_else(String::new, |(pid, name)| {
                format!(" by process {pid} ({name})")
            });
            check(
                name,
                CheckState::Note,
                format!("bound to vfio-pci, in use{who}"),
            )
        }
        Err(e) if e.kind() == ErrorKind::PermissionDenied => check(
            name,
            CheckState::Missing,
            format!("no permission for {node}"),
        )
        .fix(format!("sudo pumice setup bind {address} --user $USER")),
        Err(e) => check(name, CheckState::Missing, format!("{node}: {e}"))
            .fix("modprobe vfio-pci; then pumice setup status"),
    });
}

/// Checks another function of the group that the kernel drives. A function that is in use, or that
/// is not an NVMe controller (a network card, the disk of the machine), must never be unbound from
/// its driver.
fn neighbour(host: &Host, name: &str, group: u32, rival: PciAddress, driver: &str) -> Check {
    let shared = |what: String| {
        check(
            format!("{name}: group {group}"),
            CheckState::Missing,
            format!("shared with {rival} ({driver}), {what}"),
        )
    };
    let function = match host.function(rival) {
        Ok(function) => function,
        Err(e) => {
            return shared(format!("which cannot be looked at ({e})"))
                .fix("move one of the cards to another slot");
        }
    };
    if !function.is_nvme() {
        return shared("which is not an NVMe controller".to_owned())
            .fix("move one of the cards to another slot");
    }
    let uses = host.uses(&function);
    if uses.is_empty() {
        return shared("which is not in use".to_owned()).fix(format!("pumice setup bind {rival}"));
    }
    let uses: Vec<String> = uses.iter().map(ToString::to_string).collect();
    shared(format!("which is in use: {}", uses.join("; ")))
        .fix("move one of the cards to another slot, or end that use first")
}

/// Number of bytes that a process with a small cache pins.
const ENOUGH_BYTES: u64 = 1 << 30;

fn limits(process: &Process, translated: bool, checks: &mut Vec<Check>) {
    let (state, detail) = match process.memlock {
        _ if process.unlimited => (
            CheckState::Good,
            "this process may lock any amount (CAP_IPC_LOCK)".to_owned(),
        ),
        Memlock::Unlimited => (CheckState::Good, "unlimited".to_owned()),
        Memlock::Bytes(b) if b >= ENOUGH_BYTES => (CheckState::Good, format!("{} MiB", b >> 20)),
        Memlock::Bytes(b) => (
            if translated {
                CheckState::Missing
            } else {
                CheckState::Note
            },
            format!(
                "{} MiB; all memory that a device may reach is locked, caches included",
                b >> 20
            ),
        ),
        Memlock::Unknown => (CheckState::Note, "could not be read".to_owned()),
    };
    let found = check("memlock limit", state, detail);
    checks.push(if state == CheckState::Good {
        found
    } else {
        found.fix(
            "ulimit -l unlimited; for good: '* - memlock unlimited' in /etc/security/limits.conf, or LimitMEMLOCK=infinity in the service",
        )
    });
}

fn huge_pages(host: &Host, needed: bool, checks: &mut Vec<Check>) {
    let number = |name: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        let text = host.read(&path).ok().flatten()?;
        text.parse::<u64>().ok()
    };
    let (total, free) = (number("nr_hugepages"), number("free_hugepages"));
    let counts = format!(
        "{} reserved, {} free",
        total.unwrap_or(0),
        free.unwrap_or(0)
    );
    checks.push(if !needed {
        check(
            "huge pages",
            CheckState::Good,
            format!("{counts}; not needed behind an IOMMU"),
        )
    } else if free.unwrap_or(0) >= 32 {
        check("huge pages", CheckState::Good, counts)
    } else {
        check(
            "huge pages",
            CheckState::Missing,
            format!("{counts}; without an IOMMU all DMA memory is of huge pages"),
        )
        .fix("pumice setup huge-pages 64")
    });
}

fn io_uring(host: &Host, checks: &mut Vec<Check>) {
    let disabled = host
        .read("/proc/sys/kernel/io_uring_disabled")
        .ok()
        .flatten();
    if matches!(disabled.as_deref(), Some("1" | "2")) {
        checks.push(
            check(
                "io_uring",
                CheckState::Note,
                "disabled for users; image files are slower without it",
            )
            .fix("sysctl kernel.io_uring_disabled=0"),
        );
    }
}

#[cfg(test)]
mod tests;
