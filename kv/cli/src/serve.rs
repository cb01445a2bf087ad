//! `pumice bdev serve`: a process that opens block devices and answers requests for them.

use std::path::Path;
use std::sync::Arc;

use pumice_bdev::BlockDevice;
use pumice_bdev_control::config::App;
use pumice_bdev_control::metrics::MetricsServer;
use pumice_bdev_control::rpc::{RpcServer, ServerOptions};
use pumice_bdev_control::say;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Serves until a signal ends it. Blocks.
pub fn run(app: App, socket: &Path, metrics: Option<&str>) -> Result<bool, String> {
    // This comes before the socket exists, so that a process that sees the socket can send a
    // signal.
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(|e| format!("signals: {e}"))?;
    let app = Arc::new(app);
    let rpc = RpcServer::start(Arc::clone(&app), socket, ServerOptions::default())
        .map_err(|e| e.to_string())?;
    let metrics = metrics
        .map(|address| MetricsServer::start(app.registry.clone(), address))
        .transpose()
        .map_err(|e| e.to_string())?;
    for bdev in app.registry.list() {
        say!("{}", bdev.info().name);
    }
    say!("serving on {}; SIGINT or SIGTERM ends it", socket.display());
    signals.forever().next();
    // No request is in progress when the devices are closed.
    drop((rpc, metrics));
    Ok(true)
}
