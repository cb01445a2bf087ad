//! A channel that consists of a queue pair.

use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use pumice_io::{Completion, IoError, IoErrorKind, Op, SubmitError};
use pumice_nvme::controller::Phase;
use pumice_nvme::{Controller, QueuePair};

use super::{Place, Target};
use crate::device::{DeviceInfo, IoChannel};
use crate::error::BdevError;
use crate::queue::refuse;

pub(super) struct NvmeChannel {
    // The queue pair is dropped before its place is free again.
    pair: QueuePair,
    target: Target,
    done: Vec<Completion>,
    resets: Vec<Resetting>,
    _place: Place,
}

/// A controller reset in progress, on a thread of its own because it blocks.
pub(super) struct Resetting {
    tag: u64,
    /// The result, once it has ended.
    over: Arc<OnceLock<Result<(), (IoErrorKind, String)>>>,
}

impl Resetting {
    pub(super) fn start(tag: u64, controller: &Arc<Controller>) -> std::io::Result<Resetting> {
        let over = Arc::new(OnceLock::new());
        let (done, controller) = (Arc::clone(&over), Arc::clone(controller));
        thread::Builder::new()
            .name("nvme-reset".to_owned())
            .spawn(move || {
                let result = controller.reset();
                if let Err(error) = &result {
                    tracing::warn!(%error, "controller reset");
                }
                // A controller that could not be reset is unusable; one that takes long may still
                // be.
                let kind = match controller.phase() {
                    Phase::Live | Phase::Resetting => IoErrorKind::TimedOut,
                    _ => IoErrorKind::Removed,
                };
                let _ = done.set(result.map_err(|e| (kind, e.to_string())));
            })?;
        Ok(Resetting { tag, over })
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.get().is_some()
    }

    /// Returns the completion of a reset that has ended.
    pub(super) fn completion(&self, info: &DeviceInfo) -> Completion {
        let failed = self.over.get().and_then(|r| r.as_ref().err());
        let result = match failed {
            None => Ok(()),
            Some((kind, why)) => Err(info.error(&Op::Reset, *kind, why.as_str())),
        };
        Completion {
            tag: self.tag,
            op: Op::Reset,
            result,
        }
    }
}

/// Turns an error of the driver into one of the device: it names the device, then the controller.
fn of_device(info: &DeviceInfo, error: &mut IoError) {
    error.detail = format!("{}: {}", error.device, error.detail);
    error.device.clone_from(&info.name);
}

/// Turns a completion of the driver into one of the device.
pub(super) fn settle(target: &Target, mut done: Completion) -> Completion {
    if let Err(error) = &mut done.result {
        of_device(&target.info, error);
    }
    done.result = target
        .flush_fault
        .settle(&target.info, &done.op, done.result);
    done
}

/// Turns a refusal of the driver into one of the device.
pub(super) fn refused(info: &DeviceInfo, mut e: SubmitError) -> SubmitError {
    if let SubmitError::Refused(_, error) = &mut e {
        of_device(info, error);
    }
    e
}

impl NvmeChannel {
    pub(super) fn new(target: Target, pair: QueuePair, place: Place) -> NvmeChannel {
        NvmeChannel {
            pair,
            target,
            done: Vec::new(),
            resets: Vec::new(),
            _place: place,
        }
    }
}

impl IoChannel for NvmeChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        if let Err(e) = self.target.check(&op) {
            return refuse(op, e);
        }
        if !self.resets.is_empty() {
            return Err(SubmitError::Busy(op));
        }
        if !matches!(op, Op::Reset) {
            let submitted = self.pair.submit(&self.target.ns, tag, op);
            return submitted.map_err(|e| refused(&self.target.info, e));
        }
        match Resetting::start(tag, self.pair.controller()) {
            Ok(reset) => {
                self.resets.push(reset);
                Ok(())
            }
            Err(e) => {
                let info = &self.target.info;
                let e = info.error(&op, IoErrorKind::NoMemory, e.to_string());
                refuse(op, e)
            }
        }
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let before = out.len();
        if self.pair.poll(&mut self.done) > 0 {
            out.extend(self.done.drain(..).map(|done| settle(&self.target, done)));
        }
        if !self.resets.is_empty() && self.pair.in_flight() == 0 {
            let over = self.resets.extract_if(.., |r| r.is_over());
            out.extend(over.map(|r| r.completion(&self.target.info)));
        }
        out.len() - before
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        if !self.resets.is_empty() {
            thread::sleep(timeout.min(Duration::from_millis(1)));
            return Ok(());
        }
        Ok(self.pair.wait(timeout)?)
    }

    fn in_flight(&self) -> usize {
        if !self.target.info.is_here() {
            return 0;
        }
        self.pair.in_flight() + self.resets.len()
    }
}
