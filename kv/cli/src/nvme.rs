//! `pumice nvme`: shows a controller's properties and logs, resets and formats it.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Subcommand};
use pumice_bdev_control::complain;
use pumice_bdev_control::terminal::{print, print_json};
use pumice_nvme::pci::Host;
use pumice_nvme::spec::{
    ErrorLogEntry, FormatNvm, IdentifyController, NsDescriptor, SmartLog, ascii,
};
use pumice_nvme::{Controller, Namespace, Opened};
use serde_json::{Value, json};

/// Show NVMe controllers and namespaces, reset and format them
#[derive(Args)]
pub struct Nvme {
    #[command(subcommand)]
    command: Command,
}

/// The device that a subcommand works on.
#[derive(Args)]
struct Device {
    /// nvme://0000:01:00.0[/nsid], vfio-user:///run/cntrl[/nsid], soft://memory
    uri: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// List the NVMe functions of this machine, or a device's namespaces
    List {
        /// Device; without it, all PCI functions
        uri: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Identify the controller
    IdCtrl(Device),
    /// Identify a namespace
    IdNs(Device),
    /// Show the SMART / health log
    SmartLog(Device),
    /// Show the error log
    ErrorLog {
        #[command(flatten)]
        device: Device,
        /// Most entries to show, newest first
        #[arg(short = 'n', long, default_value_t = 64)]
        entries: usize,
    },
    /// Reset the controller
    Reset(Device),
    /// Format a namespace: all its data is lost
    Format {
        #[command(flatten)]
        device: Device,
        /// Index of the LBA format in the list of `id-ns`
        #[arg(short, long)]
        lbaf: u8,
        /// 0 none, 1 user data erase, 2 cryptographic erase
        #[arg(short, long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
        ses: u8,
        /// Format every namespace of the controller
        #[arg(long)]
        all: bool,
        /// Do not ask for confirmation
        #[arg(long)]
        yes: bool,
    },
}

type Error = Box<dyn std::error::Error>;

/// The result of a subcommand, as text and as JSON.
struct Answer {
    text: String,
    json: Value,
}

/// Runs the subcommand.
pub fn run(args: &Nvme) -> ExitCode {
    let (answer, json) = match &args.command {
        Command::List { uri, json } => (list(uri.as_deref()), *json),
        Command::IdCtrl(d) => (with(d, id_ctrl), d.json),
        Command::IdNs(d) => (with(d, id_ns), d.json),
        Command::SmartLog(d) => (with(d, smart_log), d.json),
        Command::ErrorLog { device: d, entries } => {
            (with(d, |o| error_log(&o.controller, *entries)), d.json)
        }
        Command::Reset(d) => (with(d, reset), d.json),
        Command::Format {
            device: d,
            lbaf,
            ses,
            all,
            yes,
        } => {
            let format = FormatNvm {
                lbaf: *lbaf,
                secure_erase: *ses,
            };
            let done = with(d, |o| match all {
                false => format_one(o, format, *yes),
                true => format_all(o, format, *yes),
            });
            (done, d.json)
        }
    };
    match answer {
        Ok(answer) => {
            if json {
                print_json(&answer.json);
            } else {
                print(&answer.text);
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            if json {
                print_json(&json!({ "error": error.to_string() }));
            }
            complain!("pumice nvme: {error}");
            ExitCode::FAILURE
        }
    }
}

fn with(
    device: &Device,
    f: impl FnOnce(&Opened) -> Result<Answer, Error>,
) -> Result<Answer, Error> {
    f(&pumice_nvme_soft::open(&device.uri)?)
}

/// Aligned lines, and the same as a JSON object.
#[derive(Default)]
struct Fields {
    text: String,
    json: serde_json::Map<String, Value>,
}

impl Fields {
    fn add(&mut self, name: &str, value: impl Into<Value>) {
        let value = value.into();
        let shown = match &value {
            Value::String(s) => s.clone(),
            other => other.to_string(),
        };
        self.text.push_str(&format!("{name:<32} {shown}\n"));
        self.json.insert(name.to_owned(), value);
    }

    fn answer(self) -> Answer {
        Answer {
            text: self.text,
            json: Value::Object(self.json),
        }
    }
}

/// Returns a 128-bit number as a JSON number if it fits, otherwise as text.
fn wide(n: u128) -> Value {
    u64::try_from(n).map_or_else(|_| Value::from(n.to_string()), Value::from)
}

fn list(uri: Option<&str>) -> Result<Answer, Error> {
    match uri {
        Some(uri) => list_device(&pumice_nvme_soft::open(uri)?),
        None => list_machine(),
    }
}

/// Lists the functions from sysfs only: no device is opened, so a disk in use is not disturbed.
fn list_machine() -> Result<Answer, Error> {
    let mut text = format!(
        "{:<14} {:<11} {:<10} {:<16} {}\n",
        "ADDRESS", "ID", "DRIVER", "KERNEL DEVICES", "URI"
    );
    let mut all = Vec::new();
    for f in Host::new().nvme_functions()? {
        let id = format!("{:04x}:{:04x}", f.vendor, f.device);
        let driver = f.driver.clone().unwrap_or_else(|| "-".into());
        let disks = f.block_devices.join(",");
        let ours = matches!(driver.as_str(), "vfio-pci" | "uio_pci_generic");
        let uri = if ours {
            format!("nvme://{}", f.address)
        } else {
            format!("(after: pumice setup bind {})", f.address)
        };
        let address = f.address.to_string();
        text.push_str(&format!(
            "{address:<14} {id:<11} {driver:<10} {disks:<16} {uri}\n"
        ));
        all.push(json!({
            "address": address, "id": id, "driver": f.driver,
            "block_devices": f.block_devices,
            "uri": ours.then_some(uri),
        }));
    }
    if all.is_empty() {
        text = "no NVMe function on this machine\n".into();
    }
    Ok(Answer {
        text,
        json: Value::Array(all),
    })
}

fn list_device(opened: &Opened) -> Result<Answer, Error> {
    let id = opened.controller.identify()?;
    let mut text = format!(
        "{} {} {} firmware {}\n{:>5} {:>20} {:>6}  {}\n",
        opened.controller.name(),
        ascii(&id.mn),
        ascii(&id.sn),
        ascii(&id.fr),
        "NSID",
        "BYTES",
        "BLOCK",
        "STATE"
    );
    let mut all = Vec::new();
    for ns in opened.controller.namespaces() {
        let state = ns.unusable().unwrap_or("usable");
        text.push_str(&format!(
            "{:>5} {:>20} {:>6}  {state}\n",
            ns.nsid(),
            ns.len_bytes(),
            ns.block_size()
        ));
        all.push(json!({
            "nsid": ns.nsid(), "bytes": ns.len_bytes(), "block_size": ns.block_size(),
            "unusable": ns.unusable(),
        }));
    }
    Ok(Answer {
        text,
        json: json!({
            "name": opened.controller.name(), "model": ascii(&id.mn), "serial": ascii(&id.sn),
            "firmware": ascii(&id.fr), "namespaces": all,
        }),
    })
}

fn id_ctrl(opened: &Opened) -> Result<Answer, Error> {
    let c = &opened.controller;
    let id: IdentifyController = c.identify()?;
    let mut f = Fields::default();
    f.add("vid", format!("{:#06x}", id.vid.get()));
    f.add("ssvid", format!("{:#06x}", id.ssvid.get()));
    f.add("sn", ascii(&id.sn));
    f.add("mn", ascii(&id.mn));
    f.add("fr", ascii(&id.fr));
    f.add("ver", c.version()?.to_string());
    f.add("cntlid", id.cntlid.get());
    f.add("cntrltype", id.cntrltype);
    f.add("mdts", id.mdts);
    f.add("transfer_bytes", c.transfer_bytes()?);
    f.add("nn", id.nn.get());
    f.add("oacs", format!("{:#x}", id.oacs.get()));
    f.add("oncs", format!("{:#x}", id.oncs.get()));
    f.add("oaes", format!("{:#x}", id.oaes.get()));
    f.add("sgls", format!("{:#x}", id.sgls.get()));
    f.add("fuses", format!("{:#x}", id.fuses.get()));
    f.add("fna", format!("{:#x}", id.fna));
    f.add("vwc", format!("{:#x}", id.vwc));
    f.add("write_cache_on", c.write_cache());
    f.add("awun_z", id.awun_z.get());
    f.add("awupf_z", id.awupf_z.get());
    f.add("acl_z", id.acl_z);
    f.add("aerl_z", id.aerl_z);
    f.add("elpe_z", id.elpe_z);
    f.add("sqes", format!("{:#04x}", id.sqes));
    f.add("cqes", format!("{:#04x}", id.cqes));
    f.add("maxcmd", id.maxcmd.get());
    f.add("rtd3e_us", id.rtd3e.get());
    f.add("wctemp_kelvin", id.wctemp.get());
    f.add("cctemp_kelvin", id.cctemp.get());
    f.add("tnvmcap_bytes", wide(id.tnvmcap.get()));
    f.add("unvmcap_bytes", wide(id.unvmcap.get()));
    f.add("subnqn", ascii(&id.subnqn));
    f.add("queue_entries", u32::from(c.capabilities().mqes_z()) + 1);
    f.add("io_queue_pairs", c.queue_limit());
    f.add("interrupts", c.interrupt_count());
    f.add("shadow_doorbells_used", c.shadow_doorbells());
    f.add("sgl_used", c.uses_sgl());
    Ok(f.answer())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn id_ns(opened: &Opened) -> Result<Answer, Error> {
    let ns: Arc<Namespace> = opened.namespace()?;
    let id = ns.identify();
    let mut f = Fields::default();
    f.add("nsid", ns.nsid());
    f.add("nsze_blocks", id.nsze.get());
    f.add("ncap_blocks", id.ncap.get());
    f.add("nuse_blocks", id.nuse.get());
    f.add("block_size", ns.block_size());
    f.add(
        "usable",
        ns.unusable().map_or("yes".into(), |w| format!("no: {w}")),
    );
    f.add("nsfeat", format!("{:#x}", id.nsfeat));
    f.add("dps", format!("{:#x}", id.dps));
    f.add("nmic", format!("{:#x}", id.nmic));
    f.add("dlfeat", format!("{:#x}", id.dlfeat));
    f.add("noiob_blocks", id.noiob.get());
    f.add("atomic_blocks", ns.atomic_blocks());
    f.add("atomic_power_blocks", ns.atomic_power_blocks());
    f.add("write_cache", ns.write_cache());
    f.add("mssrl_blocks", id.mssrl.get());
    f.add("mcl_blocks", id.mcl.get());
    f.add("nguid", hex(&id.nguid));
    f.add("eui64", hex(&id.eui64));
    for d in ns.descriptors() {
        if let NsDescriptor::Uuid(uuid) = d {
            f.add("uuid", hex(uuid));
        }
    }
    let count = usize::from(id.nlbaf_z).min(63) + 1;
    for (n, format) in id.lbaf.iter().take(count).enumerate() {
        let used = if n == id.format_index() {
            ", in use"
        } else {
            ""
        };
        let text = format!(
            "2^{} bytes, {} bytes of metadata, performance {}{used}",
            format.lbads,
            format.ms.get(),
            format.rp & 3
        );
        f.add(&format!("lbaf{n}"), text);
    }
    Ok(f.answer())
}

fn smart_log(opened: &Opened) -> Result<Answer, Error> {
    let log: SmartLog = opened.controller.smart_log()?;
    let kelvin = log.composite_temperature.get();
    let mut f = Fields::default();
    f.add("critical_warning", format!("{:#x}", log.critical_warning));
    f.add("temperature_celsius", i32::from(kelvin) - 273);
    f.add("available_spare_percent", log.available_spare);
    f.add("spare_threshold_percent", log.available_spare_threshold);
    f.add("percentage_used", log.percentage_used);
    f.add("data_units_read", wide(log.data_units_read.get()));
    f.add("data_units_written", wide(log.data_units_written.get()));
    f.add("host_read_commands", wide(log.host_reads.get()));
    f.add("host_write_commands", wide(log.host_writes.get()));
    f.add(
        "controller_busy_minutes",
        wide(log.controller_busy_time.get()),
    );
    f.add("power_cycles", wide(log.power_cycles.get()));
    f.add("power_on_hours", wide(log.power_on_hours.get()));
    f.add("unsafe_shutdowns", wide(log.unsafe_shutdowns.get()));
    f.add("media_errors", wide(log.media_errors.get()));
    f.add("error_log_entries", wide(log.error_log_entries.get()));
    f.add(
        "warning_temperature_minutes",
        log.warning_temperature_time.get(),
    );
    f.add(
        "critical_temperature_minutes",
        log.critical_temperature_time.get(),
    );
    Ok(f.answer())
}

fn error_log(controller: &Controller, entries: usize) -> Result<Answer, Error> {
    let log: Vec<ErrorLogEntry> = controller.error_log(entries)?;
    let mut text = String::new();
    let mut all = Vec::new();
    for e in &log {
        text.push_str(&format!(
            "#{} sqid:{} cid:{} nsid:{} lba:{} {}\n",
            e.error_count,
            e.sq_id,
            e.cid,
            e.nsid,
            e.lba,
            e.status()
        ));
        all.push(json!({
            "error_count": e.error_count.get(), "sqid": e.sq_id.get(), "cid": e.cid.get(),
            "nsid": e.nsid.get(), "lba": e.lba.get(), "status": e.status().to_string(),
            "sct": e.status().sct().0, "sc": e.status().sc(),
            "parameter_location": e.parameter_location.get(),
        }));
    }
    if log.is_empty() {
        text = "no errors logged\n".into();
    }
    Ok(Answer {
        text,
        json: Value::Array(all),
    })
}

fn reset(opened: &Opened) -> Result<Answer, Error> {
    opened.controller.reset()?;
    Ok(Answer {
        text: format!("{}: reset, and ready again\n", opened.controller.name()),
        json: json!({ "name": opened.controller.name(), "reset": true }),
    })
}

/// Asks whether `name` may be formatted.
fn confirm(name: &str, len_bytes: u64, yes: bool) -> Result<(), Error> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        let what = format!("formatting destroys all {len_bytes} bytes of {name}");
        return Err(format!("{what}; add --yes to do it").into());
    }
    complain!("All {len_bytes} bytes of {name} will be lost. Type yes and Enter.");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    match line.trim() {
        "yes" => Ok(()),
        _ => Err("not formatted".into()),
    }
}

/// Returns the answer about a namespace that was formatted.
fn formatted(controller: &Controller, ns: &Namespace) -> Answer {
    let (name, nsid) = (controller.name(), ns.nsid());
    let (blocks, block_size) = (ns.num_blocks(), ns.block_size());
    Answer {
        text: format!(
            "{name} namespace {nsid}: formatted, {blocks} blocks of {block_size} bytes\n"
        ),
        json: json!({
            "name": name, "nsid": nsid, "num_blocks": blocks, "block_size": block_size,
        }),
    }
}

fn format_one(opened: &Opened, format: FormatNvm, yes: bool) -> Result<Answer, Error> {
    let ns = opened.namespace()?;
    let controller = &opened.controller;
    let name = format!("{} namespace {}", controller.name(), ns.nsid());
    confirm(&name, ns.len_bytes(), yes)?;
    controller.format(ns.nsid(), format)?;
    let now = controller.namespace(ns.nsid())?;
    Ok(formatted(controller, &now))
}

fn format_all(opened: &Opened, format: FormatNvm, yes: bool) -> Result<Answer, Error> {
    let controller = &opened.controller;
    let before = controller.namespaces();
    let name = format!("all {} namespaces of {}", before.len(), controller.name());
    confirm(&name, before.iter().map(|ns| ns.len_bytes()).sum(), yes)?;
    controller.format_all(format)?;
    let now = controller.namespaces();
    let each = now.iter().map(|ns| formatted(controller, ns));
    let (text, list): (String, Vec<Value>) = each.map(|one| (one.text, one.json)).unzip();
    Ok(Answer {
        text,
        json: list.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> Opened {
        pumice_nvme_soft::open("soft://memory?size=4M&namespaces=1").unwrap()
    }

    #[test]
    fn every_page_has_text_and_json() {
        let o = open();
        for answer in [
            id_ctrl(&o),
            id_ns(&o),
            smart_log(&o),
            list_device(&o),
            reset(&o),
        ] {
            let answer = answer.unwrap();
            assert!(!answer.text.is_empty());
            assert!(answer.json.is_object());
        }
        assert_eq!(id_ns(&o).unwrap().json["block_size"], 512);
        assert_eq!(error_log(&o.controller, 4).unwrap().json, json!([]));
    }

    #[test]
    fn format_wants_a_yes() {
        let o = open();
        let large = FormatNvm {
            lbaf: 1,
            secure_erase: 0,
        };
        if !std::io::stdin().is_terminal() {
            for refused in [format_one(&o, large, false), format_all(&o, large, false)] {
                let error = refused.err().unwrap().to_string();
                assert!(error.contains("--yes"), "{error}");
            }
        }
        let answer = format_one(&o, large, true).unwrap();
        assert_eq!(answer.json["block_size"], 4096);
        let unknown = FormatNvm { lbaf: 7, ..large };
        assert!(format_one(&o, unknown, true).is_err());
    }

    #[test]
    fn all_namespaces_are_formatted() {
        let o = pumice_nvme_soft::open("soft://memory?size=4M&namespaces=3").unwrap();
        let large = FormatNvm {
            lbaf: 1,
            secure_erase: 0,
        };
        let answer = format_all(&o, large, true).unwrap();
        assert_eq!(answer.text.lines().count(), 3);
        assert_eq!(answer.json[2]["block_size"], 4096);
    }
}
