//! Tests of the orderly end of a controller.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use pumice_nvme::{Controller, ControllerOptions};
use pumice_nvme_soft::{SoftConfig, SoftController, SoftNamespace};

use common::watched::{DiskCall, WatchedDisk};
use common::*;

mod common;

/// Makes a controller that calls `flushing` with the name of its thread before each flush.
fn flushing(mut flushing: impl FnMut(String) + Send + 'static) -> Arc<Controller> {
    let backend = WatchedDisk::new(4 << 20, move |call| {
        if call == DiskCall::Flush {
            flushing(std::thread::current().name().unwrap_or_default().to_owned());
        }
    });
    let mut config = SoftConfig::new(vec![SoftNamespace::new(Box::new(backend), 512)]);
    config.timeout_500ms = 240;
    let soft = SoftController::new(config).unwrap();
    Controller::new(soft.transport(), ControllerOptions::default()).unwrap()
}

/// The controller is told of its shutdown (CC.SHN), so that it puts its cache on the medium before it is taken away. The
/// soft controller does so in its own thread, and once more when it is detached, in the caller's.
#[test]
fn a_controller_is_told_of_its_shutdown() {
    let _watchdog = watchdog();
    for by_drop in [false, true] {
        let (flushes, flushed) = channel();
        let controller = flushing(move |thread| {
            // A test that has ended is not there to hear it.
            let _ = flushes.send(thread);
        });
        if !by_drop {
            controller.shutdown().unwrap();
        }
        drop(controller);
        let names: Vec<String> = flushed.try_iter().collect();
        let its_own = names.first().is_some_and(|name| name.starts_with("soft-"));
        assert!(its_own, "by drop: {by_drop}: {names:?}");
    }
}

/// A second shutdown waits for the first one and does not take the controller away meanwhile.
#[test]
fn two_shutdowns_end_together() {
    let _watchdog = watchdog();
    let (flushes, flushed) = channel();
    let (go_on, goes_on) = channel::<()>();
    let controller = flushing(move |_| {
        let _ = flushes.send(());
        // The other end is dropped when the controller may go on.
        let _ = goes_on.recv();
    });
    let (ends, ended) = channel();
    let shut_down = || {
        let (controller, ends) = (Arc::clone(&controller), ends.clone());
        std::thread::spawn(move || ends.send(controller.shutdown()).unwrap())
    };
    let first = shut_down();
    // The controller is shutting down, and takes as long as this test wants.
    flushed.recv_timeout(PATIENCE).unwrap();
    let second = shut_down();
    // The second has time to end, if it does not wait.
    let early = ended.recv_timeout(Duration::from_millis(200));
    drop(go_on);
    assert!(
        matches!(early, Err(RecvTimeoutError::Timeout)),
        "one has ended before the controller: {early:?}"
    );
    let results: Vec<_> = ended.iter().take(2).collect();
    assert!(results.iter().all(Result::is_ok), "{results:?}");
    first.join().unwrap();
    second.join().unwrap();
    assert!(controller.shutdown().is_ok());
}
