//! Tests of a controller that hangs in a command, and may go on with it at any time: what it may
//! still write to belongs to nobody else before it is detached.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use pumice_nvme::controller::Phase;
use pumice_nvme::dma::DmaBuf;
use pumice_nvme::{Controller, ControllerEvent, ControllerOptions, NvmeError, QueuePair};
use pumice_nvme_soft::{SoftConfig, SoftController, SoftNamespace};

use common::watched::{DiskCall, WatchedDisk};
use common::*;

mod common;

/// Makes a disk that hangs in each read. Also returns the end that hears when a read begins, and the one to drop so that it goes
/// on.
fn disk() -> (SoftNamespace, Receiver<()>, Sender<()>) {
    let (begins, begun) = channel();
    let (go_on, goes_on) = channel();
    let backend = WatchedDisk::new(4 << 20, move |call| {
        if call == DiskCall::Read {
            // A test that has ended is not there to hear it.
            let _ = begins.send(());
            let _ = goes_on.recv();
        }
    });
    (SoftNamespace::new(Box::new(backend), 512), begun, go_on)
}

/// Submits a read of the controller's, and returns when it hangs.
fn hang_in_a_read(rig: &Rig, begun: &Receiver<()>) -> QueuePair {
    let mut q = queue(rig, |_| {});
    q.submit(&rig.ns, 0, read(0)).unwrap();
    q.poll(&mut Vec::new());
    begun.recv_timeout(PATIENCE).unwrap();
    q
}

/// Makes a controller that hangs in each read. Also returns the end that hears when a read begins,
/// and the one to drop so that the controller goes on.
fn hanging() -> (Rig, Receiver<()>, Sender<()>) {
    let start = Instant::now();
    loop {
        let (disk, begun, go_on) = disk();
        let mut config = SoftConfig::new(vec![disk]);
        // Short, because the test waits until resets have failed.
        config.timeout_500ms = 1;
        let mut options = ControllerOptions::default();
        options.admin_timeout = Duration::from_secs(2);
        let soft = SoftController::new(config).unwrap();
        match Controller::new(soft.transport(), options) {
            Ok(controller) => {
                let ns = controller.namespace(1).unwrap();
                let rig = Rig {
                    soft,
                    controller,
                    ns,
                };
                return (rig, begun, go_on);
            }
            // A busy machine may be slower than that. Then it is tried again.
            Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
        }
    }
}

/// While the DMA of a controller that could not be reset is being turned off, no buffer comes back:
/// the controller may still write to it.
#[test]
fn a_failed_controller_is_detached_before_buffers_come_back() {
    let _watchdog = watchdog();
    let (rig, begun, go_on) = hanging();
    let mut q = queue(&rig, |_| {});
    let mut out = Vec::new();
    for tag in 0..2 {
        q.submit(&rig.ns, tag, read(tag)).unwrap();
    }
    q.poll(&mut out);
    begun.recv_timeout(PATIENCE).unwrap();
    rig.soft.bus_error("a made-up bus error");
    let start = Instant::now();
    let has_failed = || {
        let events = rig.controller.take_events();
        let mut failures = events.iter();
        failures.any(|event| matches!(event, ControllerEvent::Failed(_)))
    };
    while !has_failed() {
        assert!(start.elapsed() < PATIENCE, "the reset has no end");
        std::thread::sleep(Duration::from_millis(1));
    }
    // The detach lasts as long as the read. All this time nothing comes back.
    for _ in 0..100 {
        q.poll(&mut out);
        std::thread::sleep(Duration::from_millis(2));
    }
    let early = out.len();
    drop(go_on);
    out.extend(settle(&mut q));
    assert_eq!(early, 0, "buffers came back while the controller had them");
    assert_eq!(out.len(), 2);
}

/// The buffer of an admin command that has timed out is not used again before the controller is
/// reset or detached: it may still be written to.
#[test]
fn the_buffer_of_an_admin_command_that_timed_out_is_kept() {
    let _watchdog = watchdog();
    let (rig, begun, go_on) = hanging();
    let mut q = hang_in_a_read(&rig, &begun);
    // A thread gets the buffer again that it has freed last, so the command has this one.
    let place = |buf: &DmaBuf| (buf.region(), buf.region_offset());
    let its = place(&DmaBuf::new(512).unwrap());
    let error = rig.controller.smart_log().unwrap_err();
    assert!(matches!(error, NvmeError::Unfinished { .. }), "{error}");
    let others: Vec<DmaBuf> = (0..200).map(|_| DmaBuf::new(512).unwrap()).collect();
    let used_again = others.iter().any(|buf| place(buf) == its);
    drop(go_on);
    assert_eq!(settle(&mut q).len(), 1);
    assert!(!used_again, "the controller may write to another's buffer");
}

/// A reset ends what the controller has when it is disabled, and not before: until then it may still write to it.
#[test]
fn a_reset_disables_the_controller_before_commands_end() {
    let _watchdog = watchdog();
    let (disk, begun, go_on) = disk();
    // It has all the time that it takes.
    let rig = rig_with(|config, _| config.namespaces = vec![disk]);
    let mut q = hang_in_a_read(&rig, &begun);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| rig.controller.smart_log());
        // It has time to be sent. On a busy machine it may be sent after the reset, and succeed.
        std::thread::sleep(Duration::from_millis(50));
        let reset = scope.spawn(|| rig.controller.reset());
        while rig.controller.phase() == Phase::Live {
            std::thread::sleep(Duration::from_millis(1));
        }
        // The command has time to end, if it does not wait for the controller.
        std::thread::sleep(Duration::from_millis(200));
        let early = reader.is_finished();
        drop(go_on);
        reset.join().unwrap().unwrap();
        if let Err(error) = reader.join().unwrap() {
            assert!(error.to_string().contains("reset"), "{error}");
        }
        assert!(!early, "the controller still had its buffer");
    });
    assert_eq!(settle(&mut q).len(), 1);
}
