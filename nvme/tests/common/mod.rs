//! Helpers for tests on a soft controller.
#![allow(dead_code, reason = "no test file uses all of it")]

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use pumice_nvme::dma::DmaBuf;
use pumice_nvme::spec::Status;
use pumice_nvme::{
    Completion, Controller, ControllerOptions, IoErrorKind, Namespace, Op, QueueOptions, QueuePair,
    SubmitError,
};
use pumice_nvme_soft::{MemoryBackend, SoftConfig, SoftController, SoftNamespace};

pub mod watched;

/// Ends the process when the test that holds this takes too long, so that a hang is a failure.
pub struct Watchdog(Sender<()>);

pub fn watchdog() -> Watchdog {
    watchdog_for(PATIENCE)
}

pub fn watchdog_for(limit: Duration) -> Watchdog {
    let (sender, receiver) = channel();
    let test = std::thread::current().name().map(str::to_owned);
    std::thread::spawn(move || {
        if receiver.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            eprintln!("{test:?} hangs: no end after {limit:?}");
            std::process::abort();
        }
    });
    Watchdog(sender)
}

pub struct Rig {
    pub soft: SoftController,
    pub controller: Arc<Controller>,
    pub ns: Arc<Namespace>,
}

pub fn disk() -> SoftNamespace {
    SoftNamespace::new(Box::new(MemoryBackend::new(4 << 20)), 512)
}

pub fn rig_with(change: impl FnOnce(&mut SoftConfig, &mut ControllerOptions)) -> Rig {
    let mut config = SoftConfig::new(vec![disk(), disk()]);
    let mut options = ControllerOptions::default();
    options.admin_timeout = NEVER;
    // CAP.TO is long, because a busy machine may be slow to bring the controller up.
    config.timeout_500ms = 240;
    change(&mut config, &mut options);
    let soft = SoftController::new(config).unwrap();
    let controller = Controller::new(soft.transport(), options).unwrap();
    let ns = controller.namespace(1).unwrap();
    Rig {
        soft,
        controller,
        ns,
    }
}

pub fn rig() -> Rig {
    rig_with(|_, _| {})
}

/// A time-out that no test reaches, however slow the machine.
pub const NEVER: Duration = Duration::from_secs(600);
/// A time-out that tests of time-outs wait for.
pub const SOON: Duration = Duration::from_millis(100);
/// Longest wait for an event that must come.
pub const PATIENCE: Duration = Duration::from_secs(120);

pub fn queue(rig: &Rig, change: impl FnOnce(&mut QueueOptions)) -> QueuePair {
    let mut options = QueueOptions::default().depth(16);
    options.timeout = NEVER;
    change(&mut options);
    rig.controller.queue_pair(&options).unwrap()
}

pub fn read(lba: u64) -> Op {
    Op::Read {
        lba,
        buf: DmaBuf::new(512).unwrap(),
    }
}

pub fn write(lba: u64, byte: u8) -> Op {
    let mut buf = DmaBuf::new(512).unwrap();
    buf.fill(byte);
    Op::Write {
        lba,
        data: buf.freeze(),
        fua: false,
    }
}

/// Polls until everything has ended. Fails when that takes too long.
pub fn settle(q: &mut QueuePair) -> Vec<Completion> {
    let mut out = Vec::new();
    let start = Instant::now();
    while q.in_flight() > 0 {
        if q.poll(&mut out) == 0 && q.wait(Duration::from_millis(100)).is_err() {
            q.poll(&mut out);
        }
        assert!(start.elapsed() < PATIENCE, "{} hang", q.in_flight());
    }
    let mut tags: Vec<u64> = out.iter().map(|d| d.tag).collect();
    tags.sort_unstable();
    tags.dedup();
    assert_eq!(tags.len(), out.len(), "an I/O ended twice");
    out
}

/// Waits until the controller has fetched so many commands that a fault applies to.
pub fn until_struck(rig: &Rig, count: u64) {
    let start = Instant::now();
    while rig.soft.faults().struck() < count {
        assert!(start.elapsed() < PATIENCE, "the controller does not fetch");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn one(rig: &Rig, q: &mut QueuePair, io: Op) -> Completion {
    let mut io = io;
    while let Err(error) = q.submit(&rig.ns, 1, io) {
        // The controller may be resetting.
        assert!(matches!(error, SubmitError::Busy(_)), "{error}");
        io = error.into_op();
        std::thread::sleep(Duration::from_millis(1));
    }
    settle(q).pop().unwrap()
}

pub fn kind(done: &Completion) -> IoErrorKind {
    done.result.as_ref().unwrap_err().kind
}

/// The status that the controller has completed the command with.
pub fn status(done: &Completion) -> Option<Status> {
    let error = done.result.as_ref().unwrap_err();
    error.nvme_status.map(Status::from)
}
