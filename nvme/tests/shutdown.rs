//! Tests of the orderly end of a controller.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pumice_nvme::dma::DmaBuf;
use pumice_nvme::spec::AdminOpcode;
use pumice_nvme::{Controller, ControllerOptions, IoErrorKind, QueueOptions, SubmitError};
use pumice_nvme_soft::{Fault, FaultRule, SoftConfig, SoftController, SoftNamespace};

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

/// Makes a controller that takes its time to flush. Also returns the end that hears when it begins, and the one to drop so that
/// it goes on.
fn held() -> (Arc<Controller>, Receiver<()>, Sender<()>) {
    let (flushes, flushed) = channel();
    let (go_on, goes_on) = channel::<()>();
    let controller = flushing(move |_| {
        let _ = flushes.send(());
        let _ = goes_on.recv();
    });
    (controller, flushed, go_on)
}

/// A second shutdown waits for the first one and does not take the controller away meanwhile.
#[test]
fn two_shutdowns_end_together() {
    let _watchdog = watchdog();
    let (controller, flushed, go_on) = held();
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

/// Nothing is given to a controller that is shutting down, and afterwards the reason is told.
#[test]
fn nothing_is_sent_once_a_shutdown_has_begun() {
    let _watchdog = watchdog();
    let (controller, flushed, go_on) = held();
    let ns = controller.namespace(1).unwrap();
    let mut q = controller
        .queue_pair(&QueueOptions::default().depth(4))
        .unwrap();
    let shuts_down = {
        let controller = Arc::clone(&controller);
        std::thread::spawn(move || controller.shutdown())
    };
    flushed.recv_timeout(PATIENCE).unwrap();
    let meanwhile = q.submit(&ns, 1, read(0));
    drop(go_on);
    shuts_down.join().unwrap().unwrap();
    assert!(
        matches!(meanwhile, Err(SubmitError::Busy(_))),
        "{meanwhile:?}"
    );
    let afterwards = q.submit(&ns, 1, read(0));
    let Err(SubmitError::Refused(_, error)) = afterwards else {
        panic!("{afterwards:?}");
    };
    assert_eq!(error.kind, IoErrorKind::Removed, "{error}");
    let error = controller
        .queue_pair(&QueueOptions::default().depth(4))
        .unwrap_err();
    assert!(error.to_string().contains("shut down"), "{error}");
}

/// Returns the place of a buffer.
fn place(buf: &DmaBuf) -> String {
    format!("{:?} {}", buf.region(), buf.region_offset())
}

/// Whether a new buffer of that size is at this place.
fn is_free(its: &str) -> bool {
    let bufs: Vec<_> = (0..200).map(|_| DmaBuf::new(512).unwrap()).collect();
    bufs.iter().any(|buf| place(buf) == its)
}

/// The buffer of an admin command that the controller has comes back when the controller is detached, and not before.
#[test]
fn the_buffer_of_a_command_in_flight_comes_back_behind_the_detach() {
    let _watchdog = watchdog();
    let its = Arc::new(Mutex::new(String::new()));
    let (looks, looked) = channel();
    let its_place = Arc::clone(&its);
    let backend = WatchedDisk::new(4 << 20, move |call| {
        let thread = std::thread::current();
        let is_detach = !thread.name().unwrap_or_default().starts_with("soft-");
        if call == DiskCall::Flush && is_detach {
            let _ = looks.send(is_free(&its_place.lock().unwrap()));
        }
    });
    let mut config = SoftConfig::new(vec![SoftNamespace::new(Box::new(backend), 512)]);
    config.timeout_500ms = 240;
    let soft = SoftController::new(config).unwrap();
    let mut options = ControllerOptions::default();
    options.admin_timeout = NEVER;
    let controller = Controller::new(soft.transport(), options).unwrap();
    let late = FaultRule::admin(AdminOpcode::GET_LOG_PAGE, Fault::Delay(NEVER));
    soft.faults().add(late);
    let reader = {
        let (controller, its) = (Arc::clone(&controller), Arc::clone(&its));
        std::thread::spawn(move || {
            // A thread gets the buffer again that it has freed last, so the command has this one.
            *its.lock().unwrap() = place(&DmaBuf::new(512).unwrap());
            controller.smart_log()
        })
    };
    while soft.faults().struck() == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    controller.shutdown().unwrap();
    reader.join().unwrap().unwrap_err();
    let early: Vec<bool> = looked.try_iter().collect();
    assert_eq!(early, [false], "whether it was free before the detach");
    assert!(is_free(&its.lock().unwrap()), "it never comes back");
}
