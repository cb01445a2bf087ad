//! Tests of the orderly end of a controller.

use std::sync::mpsc::channel;

use pumice_nvme::{Controller, ControllerOptions};
use pumice_nvme_soft::{SoftConfig, SoftController, SoftNamespace};

use common::watched::{DiskCall, WatchedDisk};
use common::*;

mod common;

/// The controller is told of its shutdown (CC.SHN), so that it puts its cache on the medium before it is taken away. The
/// soft controller does so in its own thread, and once more when it is detached, in the caller's.
#[test]
fn a_controller_is_told_of_its_shutdown() {
    let _watchdog = watchdog();
    for by_drop in [false, true] {
        let (flushes, flushed) = channel();
        let backend = WatchedDisk::new(4 << 20, move |call| {
            let name = std::thread::current().name().unwrap_or_default().to_owned();
            if call == DiskCall::Flush {
                // A test that has ended is not there to hear it.
                let _ = flushes.send(name);
            }
        });
        let mut config = SoftConfig::new(vec![SoftNamespace::new(Box::new(backend), 512)]);
        config.timeout_500ms = 240;
        let soft = SoftController::new(config).unwrap();
        let controller = Controller::new(soft.transport(), ControllerOptions::default()).unwrap();
        if !by_drop {
            controller.shutdown().unwrap();
        }
        drop(controller);
        let names: Vec<String> = flushed.try_iter().collect();
        let its_own = names.first().is_some_and(|name| name.starts_with("soft-"));
        assert!(its_own, "by drop: {by_drop}: {names:?}");
    }
}
