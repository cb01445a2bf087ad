//! `pumice config`: writes and checks configuration files.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use pumice_bdev::BlockDevice;
use pumice_bdev_control::config::{self, App};
use pumice_bdev_control::terminal::print_json;
use pumice_bdev_control::{complain, say};
use pumice_nvme::pci::{Host, PciAddress};
use serde_json::{Value, json};

/// Write or check a configuration file (SPDK's JSON)
#[derive(Args)]
pub struct Config {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Find this machine's NVMe controllers and write a configuration that attaches them
    Gen {
        /// Only controllers that no kernel driver has
        #[arg(long)]
        free: bool,
        /// Directory to use as the machine's `/`
        #[arg(long, default_value = "/", hide = true)]
        root: PathBuf,
    },
    /// Check the form and the methods of a configuration; with --open also open its devices
    Check {
        /// Configuration file
        file: PathBuf,
        /// Open the devices, list and close them
        #[arg(long)]
        open: bool,
    },
}

/// Runs the command.
pub fn run(args: &Config) -> ExitCode {
    let result = match &args.action {
        Action::Gen { free, root } => generate(&Host::at(root), *free).map(|c| print_json(&c)),
        Action::Check { file, open } => check(file, *open).map(|text| say!("{text}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            complain!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn generate(host: &Host, free: bool) -> Result<Value, String> {
    let mut config = Vec::new();
    let functions = host.nvme_functions().map_err(|e| e.to_string())?;
    for function in functions {
        let kernel = function.driver.as_deref() == Some("nvme");
        let address = function.address;
        if kernel {
            complain!(
                "{address}: the kernel's driver has it ({}); `{}` gives it to Pumice",
                function.block_devices.join(", "),
                bind_command(address)
            );
        }
        if free && kernel {
            continue;
        }
        let name = format!("Nvme{}", config.len());
        config.push(json!({
            "method": "bdev_nvme_attach_controller",
            "params": { "trtype": "PCIe", "name": name, "traddr": address.to_string() },
        }));
    }
    if config.is_empty() {
        complain!(
            "no NVMe controllers here; an image file is as good: file:///path?size=4G&create=1"
        );
    }
    Ok(json!({ "subsystems": [{ "subsystem": "bdev", "config": config }] }))
}

fn bind_command(address: PciAddress) -> String {
    format!("pumice setup bind {address}")
}

fn check(file: &std::path::Path, open: bool) -> Result<String, String> {
    let name = file.display().to_string();
    let text = std::fs::read_to_string(file).map_err(|e| format!("{name}: {e}"))?;
    let calls = config::check_form(&name, &text).map_err(|e| e.to_string())?;
    if !open {
        return Ok(format!("{name}: {calls} calls, well formed"));
    }
    let app = App::new();
    config::load(&app, &name, &text).map_err(|e| e.to_string())?;
    let names: Vec<String> = app
        .registry
        .list()
        .iter()
        .map(|b| b.info().name.clone())
        .collect();
    Ok(format!(
        "{name}: {calls} calls; bdevs: {}",
        names.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hint_names_a_command_that_exists() {
        use clap::Parser as _;
        let command = bind_command("0000:01:00.0".parse().unwrap());
        crate::Cli::try_parse_from(command.split(' ')).unwrap();
    }

    #[test]
    fn check_finds_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.json");
        let write = |text: &str| std::fs::write(&file, text).unwrap();
        let call = r#"{"method":"bdev_malloc_create","params":{"name":"M","num_blocks":8,"block_size":512}}"#;
        write(&format!(
            r#"{{"subsystems":[{{"subsystem":"bdev","config":[{call}]}}]}}"#
        ));
        assert!(check(&file, false).unwrap().contains("1 calls"));
        assert!(check(&file, true).unwrap().ends_with("bdevs: M"));
        write("{\n\"subsystems\": 3}");
        assert!(
            check(&file, false)
                .unwrap_err()
                .contains("c.json:2: `subsystems`")
        );
    }

    #[test]
    fn a_machine_without_controllers_gives_an_empty_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let config = generate(&Host::at(dir.path()), false);
        if let Ok(config) = config {
            assert_eq!(config["subsystems"][0]["config"], json!([]));
            config::check_form("gen", &config.to_string()).unwrap();
        }
    }
}
