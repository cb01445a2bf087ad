//! `nvme-soft-target SOCKET [soft-URI]` serves a soft controller to other processes through a
//! vfio-user socket.

use std::path::PathBuf;
use std::process::ExitCode;

use pumice_nvme::transport::{NvmeUri, TransportError};
use pumice_nvme_soft::{SoftController, SoftServer, config};

const USAGE: &str = "usage: nvme-soft-target SOCKET-OR-DIRECTORY [soft://memory?size=1G…]

Serves a controller in this process to another one, which opens it as vfio-user://SOCKET.
A directory stands for the socket `cntrl` in it, which only its owner can connect to. Memory that a
client shares must be sealed against shrinking (QEMU: memory-backend-memfd). Ends with Ctrl-C.";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (path, uri) = match args.as_slice() {
        [flag] if flag == "-h" || flag == "--help" => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        [path] => (path, "soft://memory?size=1G"),
        [path, uri] => (path, uri.as_str()),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    let mut path = PathBuf::from(path);
    if path.is_dir() {
        path.push("cntrl");
    }
    let served = NvmeUri::parse(uri)
        .map_err(TransportError::from)
        .and_then(|uri| config(&uri))
        .and_then(|config| SoftController::new(config.served()))
        .and_then(|soft| SoftServer::start(soft, &path));
    match served {
        Ok(server) => {
            println!("vfio-user://{}", path.display());
            server.join();
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("nvme-soft-target: {e}");
            ExitCode::FAILURE
        }
    }
}
