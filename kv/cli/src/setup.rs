//! `pumice setup`: lists controllers, gives one to Pumice and back.

mod change;
mod huge_pages;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use pumice_bdev_control::terminal::{print, print_json};
use pumice_bdev_control::{complain, say};
use pumice_nvme::pci::{Function, Host, PciAddress, PciError};
use serde_json::{Value, json};

use change::{plan, remembered, unbind};

/// Show NVMe controllers, give one to Pumice, give it back to the kernel
#[derive(Args)]
pub struct Setup {
    #[command(subcommand)]
    action: Option<Action>,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    /// Directory to use as the machine's `/`
    #[arg(long, global = true, default_value = "/", hide = true)]
    root: PathBuf,
}

#[derive(Subcommand)]
enum Action {
    /// List the NVMe controllers with driver, IOMMU group and use (the default)
    Status,
    /// Take controllers from the kernel's driver for Pumice
    Bind {
        /// PCI addresses, such as 0000:01:00.0
        #[arg(required = true)]
        addresses: Vec<PciAddress>,
        /// Driver to bind them to
        #[arg(long, value_enum, default_value_t = BindDriver::Vfio)]
        driver: BindDriver,
        /// User who may open them without being root
        #[arg(long)]
        user: Option<String>,
    },
    /// Give controllers back to their earlier driver
    Unbind {
        /// PCI addresses, such as 0000:01:00.0
        #[arg(required = true)]
        addresses: Vec<PciAddress>,
    },
    /// Reserve 2 MiB pages (only no-IOMMU and uio need them)
    HugePages {
        /// Number of pages; 0 releases them
        count: u64,
        /// Reserve on this NUMA node only
        #[arg(long)]
        node: Option<u32>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BindDriver {
    /// vfio-pci: behind the IOMMU, usable without root
    Vfio,
    /// uio_pci_generic: without an IOMMU; needs root and huge pages, polls only
    Uio,
}

impl BindDriver {
    fn driver(self) -> &'static str {
        match self {
            BindDriver::Vfio => "vfio-pci",
            BindDriver::Uio => "uio_pci_generic",
        }
    }
}

/// Drivers under which a controller belongs to Pumice.
const OURS: [&str; 2] = ["vfio-pci", "uio_pci_generic"];

#[derive(Debug, thiserror::Error)]
enum SetupError {
    #[error(transparent)]
    Pci(#[from] PciError),
    #[error("{0}")]
    Refused(String),
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// Runs the command. The exit code is 1 when something was refused or failed.
pub fn run(args: &Setup) -> ExitCode {
    let host = Host::at(&args.root);
    let result = match &args.action {
        None | Some(Action::Status) => status(&host, args.json),
        Some(Action::Bind {
            addresses,
            driver,
            user,
        }) => plan(&host, addresses, *driver, user.as_deref())
            .and_then(|plan| each(addresses, args.json, |a| plan.bind(&host, a))),
        Some(Action::Unbind { addresses }) => each(addresses, args.json, |a| unbind(&host, a)),
        Some(Action::HugePages { count, node }) => {
            huge_pages::reserve(&host, *count, *node).map(|text| {
                if args.json {
                    print_json(&json!({ "huge_pages": huge_pages::counts(&host) }));
                } else {
                    say!("{text}");
                }
            })
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            if args.json {
                print_json(&json!({ "error": e.to_string() }));
            }
            complain!("pumice setup: {e}");
            if let SetupError::Pci(PciError::Io { source, .. }) | SetupError::Io { source, .. } = &e
                && source.kind() == std::io::ErrorKind::PermissionDenied
            {
                complain!("pumice setup: changing drivers needs root: try again with sudo");
            }
            ExitCode::FAILURE
        }
    }
}

fn each(
    addresses: &[PciAddress],
    as_json: bool,
    action: impl Fn(PciAddress) -> Result<String, SetupError>,
) -> Result<(), SetupError> {
    let mut done = Vec::new();
    for address in addresses {
        let text = action(*address)?;
        if as_json {
            done.push(json!({ "address": address.to_string(), "result": text }));
        } else {
            say!("{text}");
        }
    }
    if as_json {
        print_json(&json!({ "controllers": done }));
    }
    Ok(())
}

/// Describes one controller for `status`.
fn describe(host: &Host, function: &Function) -> Value {
    let uses: Vec<String> = host
        .uses(function)
        .iter()
        .map(ToString::to_string)
        .collect();
    let model = host
        .names(&format!("/sys/bus/pci/devices/{}/nvme", function.address))
        .iter()
        .find_map(|c| {
            let path = format!("/sys/bus/pci/devices/{}/nvme/{c}/model", function.address);
            host.read(&path).ok().flatten()
        });
    json!({
        "address": function.address.to_string(),
        "id": format!("{:04x}:{:04x}", function.vendor, function.device),
        "model": model,
        "driver": function.driver,
        "iommu_group": function.group.as_ref().map(|g| g.id),
        "no_iommu": function.group.as_ref().is_some_and(|g| g.no_iommu),
        "node": function.group.as_ref().map(pumice_nvme::pci::Group::node),
        "numa_node": function.numa_node,
        "block_devices": function.block_devices,
        "uses": uses,
        "ours": is_ours(function),
        "restores_to": remembered(host, function.address).flatten(),
    })
}

fn is_ours(function: &Function) -> bool {
    function
        .driver
        .as_deref()
        .is_some_and(|d| OURS.contains(&d))
}

fn status(host: &Host, as_json: bool) -> Result<(), SetupError> {
    let functions = host.nvme_functions()?;
    let list: Vec<Value> = functions.iter().map(|f| describe(host, f)).collect();
    if as_json {
        print_json(&json!({ "controllers": list, "huge_pages": huge_pages::counts(host) }));
    } else {
        print(&table(&list));
    }
    Ok(())
}

fn table(list: &[Value]) -> String {
    let mut out = String::new();
    if list.is_empty() {
        out.push_str("no NVMe controller on the PCI bus\n");
        return out;
    }
    let text = |v: &Value| match v {
        Value::String(s) => s.clone(),
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    };
    let _ = writeln!(
        out,
        "{:<14} {:<10} {:<5} {:<5} {:<16} USE",
        "ADDRESS", "ID", "GROUP", "NUMA", "DRIVER"
    );
    for c in list {
        let names = |key: &str, between: &str| {
            let list = c[key].as_array().into_iter().flatten();
            list.filter_map(Value::as_str)
                .collect::<Vec<_>>()
                .join(between)
        };
        let (uses, blocks) = (names("uses", "; "), names("block_devices", " "));
        let usage = if !uses.is_empty() {
            uses
        } else if c["ours"] == true {
            "given to Pumice".to_owned()
        } else if !blocks.is_empty() {
            format!("{blocks}, not in use")
        } else {
            "none".to_owned()
        };
        let _ = writeln!(
            out,
            "{:<14} {:<10} {:<5} {:<5} {:<16} {usage}",
            text(&c["address"]),
            text(&c["id"]),
            text(&c["iommu_group"]),
            text(&c["numa_node"]),
            text(&c["driver"]),
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_host::FakeHost;

    #[test]
    fn status_lists_all_and_only_nvme() {
        let fake = FakeHost::new();
        fake.nvme("0000:01:00.0", "nvme", Some(7));
        fake.nvme("0000:02:00.0", "vfio-pci", Some(8));
        fake.bridge("0000:00:01.0", Some(1));
        let host = fake.host();
        change::remember(
            &host,
            "0000:02:00.0".parse().expect("an address"),
            Some("nvme"),
        )
        .expect("written");
        let functions = host.nvme_functions().expect("read");
        let list: Vec<Value> = functions.iter().map(|f| describe(&host, f)).collect();
        assert_eq!(list.len(), 2);
        assert_eq!(list[1]["restores_to"], "nvme");
        assert_eq!(list[1]["node"], "/dev/vfio/8");
        let text = table(&list);
        assert!(text.contains("given to Pumice"), "{text}");
        assert_eq!(text.lines().count(), 3);
    }
}
