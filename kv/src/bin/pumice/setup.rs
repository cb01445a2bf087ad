//! `pumice setup`: which controllers there are, and giving one to Pumice and back.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::{Args, Subcommand, ValueEnum};
use pumice_nvme::pci::{Function, Host, PciAddress, PciError};
use serde_json::{Value, json};

/// Show NVMe controllers, give one to Pumice, give it back to the kernel
#[derive(Args)]
pub struct Setup {
    #[command(subcommand)]
    action: Option<Action>,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    /// Directory that is the machine's `/`
    #[arg(long, global = true, default_value = "/", hide = true)]
    root: PathBuf,
}

#[derive(Subcommand)]
enum Action {
    /// List the NVMe controllers: driver, IOMMU group, what they are used for (the default)
    Status,
    /// Take controllers from the kernel's driver for Pumice
    Bind {
        /// PCI addresses, as 0000:01:00.0
        #[arg(required = true)]
        addresses: Vec<PciAddress>,
        /// Which way Pumice reaches them
        #[arg(long, value_enum, default_value_t = Way::Vfio)]
        driver: Way,
        /// User who may open them without being root
        #[arg(long)]
        user: Option<String>,
    },
    /// Give controllers back to the driver that they had
    Unbind {
        /// PCI addresses, as 0000:01:00.0
        #[arg(required = true)]
        addresses: Vec<PciAddress>,
    },
    /// Reserve 2 MiB pages (only no-IOMMU and uio need them)
    HugePages {
        /// How many; 0 gives them back
        count: u64,
        /// On this NUMA node only
        #[arg(long)]
        node: Option<u32>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Way {
    /// vfio-pci: behind the IOMMU, no root needed to use it
    Vfio,
    /// uio_pci_generic: without an IOMMU, root and huge pages needed, polling only
    Uio,
}

impl Way {
    fn driver(self) -> &'static str {
        match self {
            Way::Vfio => "vfio-pci",
            Way::Uio => "uio_pci_generic",
        }
    }
}

/// Drivers under which a controller is Pumice's.
const OURS: [&str; 2] = ["vfio-pci", "uio_pci_generic"];

/// What was there before, one file for each function; gone with the next boot, as bindings are.
const STATE_DIR: &str = "/run/pumice/setup";

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

/// Runs it; exit code 1 when something was refused or failed.
pub fn run(args: &Setup) -> ExitCode {
    let host = Host::at(&args.root);
    let result = match &args.action {
        None | Some(Action::Status) => status(&host, args.json),
        Some(Action::Bind {
            addresses,
            driver,
            user,
        }) => check_all(&host, addresses, *driver).and_then(|()| {
            each(addresses, args.json, |a| {
                bind(&host, a, *driver, user.as_deref(), addresses)
            })
        }),
        Some(Action::Unbind { addresses }) => each(addresses, args.json, |a| unbind(&host, a)),
        Some(Action::HugePages { count, node }) => huge_pages(&host, *count, *node).map(|text| {
            if args.json {
                println!("{:#}", json!({ "huge_pages": huge_page_counts(&host) }));
            } else {
                println!("{text}");
            }
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            if args.json {
                println!("{:#}", json!({ "error": e.to_string() }));
            }
            eprintln!("pumice setup: {e}");
            if let SetupError::Pci(PciError::Io { source, .. }) | SetupError::Io { source, .. } = &e
                && source.kind() == std::io::ErrorKind::PermissionDenied
            {
                eprintln!("pumice setup: root is needed to change drivers: try again with sudo");
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
            println!("{text}");
        }
    }
    if as_json {
        println!("{:#}", json!({ "controllers": done }));
    }
    Ok(())
}

/// Of several controllers none is taken when one of them has to stay.
fn check_all(host: &Host, addresses: &[PciAddress], way: Way) -> Result<(), SetupError> {
    for address in addresses {
        let function = host.nvme_function(*address)?;
        if function.driver.as_deref() != Some(way.driver()) {
            check_bind(host, &function, way, addresses)?;
        }
    }
    Ok(())
}

/// One controller for `status`.
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
        println!(
            "{:#}",
            json!({ "controllers": list, "huge_pages": huge_page_counts(host) })
        );
    } else {
        print!("{}", table(&list));
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

/// What stands against giving a function away; nothing changes.
fn check_bind(
    host: &Host,
    function: &Function,
    way: Way,
    together: &[PciAddress],
) -> Result<(), SetupError> {
    let address = function.address;
    let uses = host.uses(function);
    if !uses.is_empty() {
        let list: Vec<String> = uses.iter().map(|u| format!("  {u}")).collect();
        return Err(SetupError::Refused(format!(
            "{address} is in use, and its data would be pulled from under its users:\n{}",
            list.join("\n")
        )));
    }
    if way == Way::Uio {
        return Ok(());
    }
    let unsafe_mode = host
        .read("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")?
        .is_some_and(|v| v == "Y" || v == "1");
    if function.group.is_none() && !unsafe_mode {
        return Err(SetupError::Refused(format!(
            "{address} has no IOMMU group, so vfio-pci cannot take it: turn the IOMMU on (pumice doctor says how), or do without its protection with: pumice setup bind {address} --driver uio"
        )));
    }
    let rivals: Vec<String> = host
        .group_rivals(function)
        .into_iter()
        .filter(|(a, _)| !together.contains(a))
        .map(|(a, driver)| format!("{a} ({driver})"))
        .collect();
    if !rivals.is_empty() {
        return Err(SetupError::Refused(format!(
            "the IOMMU group of {address} also holds {}: a group is given away as a whole, so name all its controllers in one command, or move the card to another slot",
            rivals.join(", ")
        )));
    }
    Ok(())
}

fn bind(
    host: &Host,
    address: PciAddress,
    way: Way,
    user: Option<&str>,
    together: &[PciAddress],
) -> Result<String, SetupError> {
    let function = host.nvme_function(address)?;
    let driver = way.driver();
    let mut text = if function.driver.as_deref() == Some(driver) {
        format!("{address}: bound to {driver} already")
    } else {
        check_bind(host, &function, way, together)?;
        load_driver(host, driver)?;
        // An address that was Pumice's in another way keeps what is remembered of it.
        if !is_ours(&function) {
            remember(host, address, function.driver.as_deref())?;
        }
        if let Err(error) = host.bind(address, Some(driver)) {
            let back = give_back(host, address, function.driver.as_deref());
            return Err(SetupError::Refused(format!(
                "{error}; {}",
                back.unwrap_or_else(|e| format!("and it could not be given back: {e}"))
            )));
        }
        let was = function.driver.as_deref().unwrap_or("no driver");
        format!("{address}: {was} -> {driver}; pumice setup unbind {address} gives it back")
    };
    if let Some(user) = user {
        text.push_str(&hand_over(host, address, way, user)?);
    }
    Ok(text)
}

/// Loads the module when the driver is not there. `modprobe` knows where modules are.
fn load_driver(host: &Host, driver: &str) -> Result<(), SetupError> {
    let there = || {
        host.path(&format!("/sys/bus/pci/drivers/{driver}"))
            .exists()
    };
    if there() {
        return Ok(());
    }
    let output = Command::new("modprobe").arg(driver).output();
    if there() {
        return Ok(());
    }
    let why = match output {
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(e) => e.to_string(),
    };
    Err(SetupError::Refused(format!(
        "the kernel has no driver {driver} (modprobe {driver}: {why})"
    )))
}

fn hand_over(host: &Host, address: PciAddress, way: Way, user: &str) -> Result<String, SetupError> {
    if way == Way::Uio {
        return Err(SetupError::Refused(
            "uio needs root (physical addresses), so there is nothing to hand over to a user"
                .to_owned(),
        ));
    }
    let passwd = host.read("/etc/passwd")?.unwrap_or_default();
    let Some((uid, gid)) = user_ids(&passwd, user) else {
        return Err(SetupError::Refused(format!("there is no user {user}")));
    };
    let group = host.function(address)?.group;
    let Some(group) = group.filter(|g| !g.no_iommu) else {
        return Err(SetupError::Refused(format!(
            "{address} has no IOMMU behind it; only root may use it"
        )));
    };
    let path = host.path(&group.node());
    std::os::unix::fs::chown(&path, Some(uid), Some(gid))
        .map_err(|source| SetupError::Io { path, source })?;
    Ok(format!("\n{} belongs to {user} now", group.node()))
}

fn user_ids(passwd: &str, user: &str) -> Option<(u32, u32)> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        if fields.next()? != user {
            return None;
        }
        Some((fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?))
    })
}

fn state_path(host: &Host, address: PciAddress) -> PathBuf {
    host.path(&format!("{STATE_DIR}/{address}"))
}

fn remember(host: &Host, address: PciAddress, driver: Option<&str>) -> Result<(), SetupError> {
    let path = state_path(host, address);
    let dir = host.path(STATE_DIR);
    fs::create_dir_all(&dir)
        .and_then(|()| fs::write(&path, driver.unwrap_or("")))
        .map_err(|source| SetupError::Io { path, source })
}

/// The driver of before: `None` nothing is remembered, `Some(None)` it had none.
fn remembered(host: &Host, address: PciAddress) -> Option<Option<String>> {
    let text = fs::read_to_string(state_path(host, address)).ok()?;
    let text = text.trim();
    Some((!text.is_empty()).then(|| text.to_owned()))
}

fn unbind(host: &Host, address: PciAddress) -> Result<String, SetupError> {
    let function = host.nvme_function(address)?;
    if !is_ours(&function) {
        let driver = function.driver.as_deref().unwrap_or("no driver");
        return Ok(format!(
            "{address}: is not Pumice's, its driver is {driver}"
        ));
    }
    let node = function.group.as_ref().map(pumice_nvme::pci::Group::node);
    let resource =
        fs::canonicalize(host.path(&format!("/sys/bus/pci/devices/{address}/resource0")));
    let paths = node
        .into_iter()
        .chain(resource.ok().map(|p| p.display().to_string()));
    let users: Vec<String> = paths
        .flat_map(|path| host.openers(&path))
        .map(|(pid, name)| format!("process {pid} ({name})"))
        .collect();
    if !users.is_empty() {
        return Err(SetupError::Refused(format!(
            "{address} is in use by {}: stop it first (the kernel would wait for it)",
            users.join(", ")
        )));
    }
    let before = remembered(host, address).unwrap_or_else(|| Some("nvme".to_owned()));
    let text = give_back(host, address, before.as_deref())?;
    let _ = fs::remove_file(state_path(host, address));
    Ok(text)
}

fn give_back(host: &Host, address: PciAddress, driver: Option<&str>) -> Result<String, SetupError> {
    host.unbind(address)?;
    let Some(driver) = driver else {
        return Ok(format!("{address}: has no driver again"));
    };
    load_driver(host, driver)?;
    host.bind(address, None)?;
    match host.function(address)?.driver {
        Some(now) if now == driver => Ok(format!("{address}: {driver} has it again")),
        now => Err(SetupError::Refused(format!(
            "{address}: {driver} did not take it back (now: {}); dmesg tells why",
            now.as_deref().unwrap_or("no driver")
        ))),
    }
}

fn huge_page_counts(host: &Host) -> Value {
    let dir = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    let number = |name: &str| {
        let text = host.read(&format!("{dir}/{name}")).ok().flatten()?;
        text.parse::<u64>().ok()
    };
    json!({ "size_kib": 2048, "total": number("nr_hugepages"), "free": number("free_hugepages") })
}

fn huge_pages(host: &Host, count: u64, node: Option<u32>) -> Result<String, SetupError> {
    let path = match node {
        None => "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages".to_owned(),
        Some(n) => {
            format!("/sys/devices/system/node/node{n}/hugepages/hugepages-2048kB/nr_hugepages")
        }
    };
    host.write(&path, &count.to_string())?;
    let have = host.read(&path)?.and_then(|t| t.parse::<u64>().ok());
    match have {
        Some(have) if have >= count => Ok(format!("{have} pages of 2 MiB are reserved")),
        have => Err(SetupError::Refused(format!(
            "{} of {count} pages of 2 MiB could be reserved, memory is in pieces; reserve them at boot instead: hugepages={count} on the kernel's command line",
            have.unwrap_or(0)
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_host::FakeHost;

    fn address(text: &str) -> PciAddress {
        text.parse().expect("an address")
    }

    fn refusal(fake: &FakeHost, at: &str, way: Way) -> String {
        let host = fake.host();
        let function = host.nvme_function(address(at)).expect("there");
        match check_bind(&host, &function, way, &[address(at)]) {
            Ok(()) => String::new(),
            Err(e) => e.to_string(),
        }
    }

    const NVME: &str = "0000:01:00.0";

    #[test]
    fn a_free_controller_may_go() {
        let fake = FakeHost::new();
        fake.nvme(NVME, "nvme", Some(7));
        fake.block(NVME, "nvme0", "nvme0n1", "259:0", &[("nvme0n1p1", "259:1")]);
        assert_eq!(refusal(&fake, NVME, Way::Vfio), "");
    }

    #[test]
    fn whatever_is_in_use_stays() {
        let fake = FakeHost::new();
        fake.nvme(NVME, "nvme", Some(7));
        fake.block(
            NVME,
            "nvme0",
            "nvme0n1",
            "259:0",
            &[
                ("nvme0n1p1", "259:1"),
                ("nvme0n1p2", "259:2"),
                ("nvme0n1p3", "259:3"),
            ],
        );
        fake.file("/proc/self/mountinfo", "22 1 0:21 / /proc rw - proc proc rw\n30 1 259:1 / /srv\\040data rw,noatime shared:1 - ext4 /dev/nvme0n1p1 rw\n");
        let text = refusal(&fake, NVME, Way::Vfio);
        assert!(text.contains("nvme0n1p1 is mounted at /srv data"), "{text}");
        assert!(refusal(&fake, NVME, Way::Uio).contains("mounted"));

        fake.file(
            "/proc/self/mountinfo",
            "30 1 0:42 / /b rw shared:1 - btrfs /dev/nvme0n1p2 rw\n",
        );
        assert!(refusal(&fake, NVME, Way::Vfio).contains("mounted at /b"));

        fake.file("/proc/self/mountinfo", "");
        fake.file(
            "/proc/swaps",
            "Filename Type Size Used Priority\n/dev/nvme0n1p3 partition 1 0 -2\n",
        );
        assert!(refusal(&fake, NVME, Way::Vfio).contains("nvme0n1p3 is swap space"));

        fake.file(
            "/proc/swaps",
            "Filename Type Size Used Priority\n/dev/sda3 partition 1 0 -2\n",
        );
        fake.holder("nvme0n1", Some("nvme0n1p2"), "dm-3", Some("vg0-home"));
        assert!(refusal(&fake, NVME, Way::Vfio).contains("nvme0n1p2 is part of dm-3 (vg0-home)"));
    }

    #[test]
    fn whole_disk_raid_and_open_files() {
        let fake = FakeHost::new();
        fake.nvme(NVME, "nvme", Some(7));
        fake.block(NVME, "nvme0", "nvme0c0n1", "259:9", &[]);
        fake.block_device("nvme0n1", "259:0", &[]);
        fake.holder("nvme0n1", None, "md127", None);
        fake.process(4711, "qemu", "/dev/nvme0n1");
        let text = refusal(&fake, NVME, Way::Vfio);
        assert!(text.contains("nvme0n1 is part of md127"), "{text}");
        assert!(text.contains("open in process 4711 (qemu)"), "{text}");
    }

    #[test]
    fn groups_go_as_a_whole() {
        let fake = FakeHost::new();
        fake.nvme(NVME, "nvme", Some(7));
        fake.nvme("0000:02:00.0", "nvme", Some(7));
        fake.bridge("0000:00:01.0", Some(7));
        let text = refusal(&fake, NVME, Way::Vfio);
        assert!(
            text.contains("0000:02:00.0 (nvme)") && !text.contains("0000:00:01.0"),
            "{text}"
        );
        let host = fake.host();
        let function = host.nvme_function(address(NVME)).expect("there");
        let both = [address(NVME), address("0000:02:00.0")];
        assert!(check_bind(&host, &function, Way::Vfio, &both).is_ok());
    }

    #[test]
    fn of_several_none_goes_when_one_is_in_use() {
        let fake = FakeHost::new();
        fake.nvme(NVME, "nvme", Some(7));
        fake.nvme("0000:02:00.0", "nvme", Some(8));
        fake.block("0000:02:00.0", "nvme1", "nvme1n1", "259:4", &[]);
        let both = [address(NVME), address("0000:02:00.0")];
        assert!(check_all(&fake.host(), &both, Way::Vfio).is_ok());
        fake.process(4711, "qemu", "/dev/nvme1n1");
        let error = check_all(&fake.host(), &both, Way::Vfio).expect_err("in use");
        assert!(error.to_string().contains("process 4711"), "{error}");
    }

    #[test]
    fn no_iommu_is_said() {
        let fake = FakeHost::new();
        fake.nvme(NVME, "nvme", None);
        assert!(refusal(&fake, NVME, Way::Vfio).contains("no IOMMU group"));
        assert_eq!(refusal(&fake, NVME, Way::Uio), "");
        fake.file(
            "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
            "Y\n",
        );
        assert_eq!(refusal(&fake, NVME, Way::Vfio), "");
    }

    #[test]
    fn status_lists_all_and_only_nvme() {
        let fake = FakeHost::new();
        fake.nvme(NVME, "nvme", Some(7));
        fake.nvme("0000:02:00.0", "vfio-pci", Some(8));
        fake.bridge("0000:00:01.0", Some(1));
        let host = fake.host();
        remember(&host, address("0000:02:00.0"), Some("nvme")).expect("written");
        let functions = host.nvme_functions().expect("read");
        let list: Vec<Value> = functions.iter().map(|f| describe(&host, f)).collect();
        assert_eq!(list.len(), 2);
        assert_eq!(list[1]["restores_to"], "nvme");
        assert_eq!(list[1]["node"], "/dev/vfio/8");
        let text = table(&list);
        assert!(text.contains("given to Pumice"), "{text}");
        assert_eq!(text.lines().count(), 3);
    }

    #[test]
    fn unbinding_waits_for_nobody() {
        let fake = FakeHost::new();
        fake.nvme(NVME, "vfio-pci", Some(7));
        fake.process(99, "db", "/dev/vfio/7");
        let text = unbind(&fake.host(), address(NVME))
            .expect_err("in use")
            .to_string();
        assert!(text.contains("process 99 (db)"), "{text}");
        fake.nvme("0000:02:00.0", "nvme", Some(9));
        let text = unbind(&fake.host(), address("0000:02:00.0")).expect("nothing to do");
        assert!(text.contains("is not Pumice's"), "{text}");
    }

    #[test]
    fn other_devices_are_refused() {
        let fake = FakeHost::new();
        fake.bridge("0000:00:01.0", Some(1));
        let at = address("0000:00:01.0");
        let text = bind(&fake.host(), at, Way::Vfio, None, &[at])
            .expect_err("a bridge")
            .to_string();
        assert!(text.contains("no NVMe controller"), "{text}");
        let at = address("0000:09:00.0");
        let text = bind(&fake.host(), at, Way::Vfio, None, &[at])
            .expect_err("absent")
            .to_string();
        assert!(text.contains("no such PCI function"), "{text}");
    }

    #[test]
    fn huge_pages_are_counted_after() {
        let fake = FakeHost::new();
        let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
        fake.file(path, "0");
        assert!(
            huge_pages(&fake.host(), 64, None)
                .expect("written")
                .contains("64 pages")
        );
        assert!(huge_pages(&fake.host(), 64, Some(3)).is_err());
    }

    #[test]
    fn users() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\ndb:x:998:997::/nonexistent:/bin/false\n";
        assert_eq!(user_ids(passwd, "db"), Some((998, 997)));
        assert_eq!(user_ids(passwd, "d"), None);
    }
}
