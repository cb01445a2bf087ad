//! A channel that is a queue pair.

use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use pumice_nvme::controller::Phase;
use pumice_nvme::spec::Status;
use pumice_nvme::{
    BlockRange, Controller, InvalidIo, Io, IoDone, IoErrorKind as NvmeKind, Namespace, QueuePair,
    SubmitError as NvmeSubmit,
};

use super::{Place, Target};
use crate::device::{DeviceInfo, IoChannel};
use crate::error::{BdevError, IoError, IoErrorKind};
use crate::op::{Completion, Op, SubmitError};
use crate::queue::refuse;

pub(super) struct NvmeChannel {
    // The queue pair goes before its place is free again.
    pair: QueuePair,
    target: Target,
    done: Vec<IoDone>,
    resets: Vec<Resetting>,
    /// Aborts: the controller has been asked.
    asked: Vec<Completion>,
    _place: Place,
}

/// A controller reset under way, on a thread of its own since it blocks.
pub(super) struct Resetting {
    tag: u64,
    /// How it ended, once it has.
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
                // One that could not be reset is of no use any more; one that takes long may be.
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

    /// Of one that is over.
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

/// The driver's form of an operation that [`DeviceInfo::check`] has passed. `Err`: it has none.
pub(super) fn to_io(op: Op, ns: &Namespace) -> Result<Io, Op> {
    Ok(match op {
        Op::Read { lba, buf } => Io::Read { lba, buf },
        Op::ReadV { lba, bufs } => Io::ReadV { lba, bufs },
        Op::Write { lba, data, fua } => Io::Write { lba, data, fua },
        Op::WriteV { lba, data, fua } => Io::WriteV { lba, data, fua },
        Op::Compare { lba, data } => Io::Compare { lba, data },
        Op::Flush => Io::Flush,
        Op::WriteZeroes {
            lba,
            len_blocks,
            fua,
        } => Io::WriteZeroes {
            lba,
            blocks: len_blocks,
            fua,
            deallocate: ns.zeroes_may_deallocate(),
        },
        Op::Unmap { lba, len_blocks } => Io::Deallocate {
            ranges: vec![BlockRange {
                lba,
                blocks: len_blocks,
            }],
        },
        Op::Copy {
            src_lba,
            dst_lba,
            len_blocks,
        } => Io::Copy {
            ranges: vec![BlockRange {
                lba: src_lba,
                blocks: len_blocks,
            }],
            lba: dst_lba,
            fua: false,
        },
        op => return Err(op),
    })
}

/// Back from the driver's form.
pub(super) fn to_op(io: Io) -> Op {
    let first = |ranges: &[BlockRange]| {
        ranges
            .first()
            .copied()
            .unwrap_or(BlockRange { lba: 0, blocks: 0 })
    };
    match io {
        Io::Read { lba, buf } => Op::Read { lba, buf },
        Io::ReadV { lba, bufs } => Op::ReadV { lba, bufs },
        Io::Write { lba, data, fua } => Op::Write { lba, data, fua },
        Io::WriteV { lba, data, fua } => Op::WriteV { lba, data, fua },
        Io::Compare { lba, data } => Op::Compare { lba, data },
        Io::WriteZeroes {
            lba, blocks, fua, ..
        } => Op::WriteZeroes {
            lba,
            len_blocks: blocks,
            fua,
        },
        Io::Deallocate { ranges } => {
            let BlockRange { lba, blocks } = first(&ranges);
            Op::Unmap {
                lba,
                len_blocks: blocks,
            }
        }
        Io::Copy { ranges, lba, .. } => {
            let BlockRange {
                lba: src_lba,
                blocks,
            } = first(&ranges);
            Op::Copy {
                src_lba,
                dst_lba: lba,
                len_blocks: blocks,
            }
        }
        // Nothing else is ever submitted here.
        _ => Op::Flush,
    }
}

fn kind_of(kind: NvmeKind) -> IoErrorKind {
    match kind {
        NvmeKind::Status(status) => match status.code() {
            Status::COMPARE_FAILURE => IoErrorKind::Miscompare { offset_bytes: 0 },
            Status::LBA_OUT_OF_RANGE => IoErrorKind::OutOfRange,
            Status::CAPACITY_EXCEEDED => IoErrorKind::NoSpace,
            Status::ABORTED_BY_REQUEST => IoErrorKind::Aborted,
            // Media and Data Integrity Errors: Write Fault, Unrecovered Read Error.
            code if code.sct().0 == 2 && matches!(code.sc(), 0x80 | 0x81) => IoErrorKind::Media,
            code => IoErrorKind::Nvme {
                sct: code.sct().0,
                sc: code.sc(),
                dnr: status.do_not_retry(),
            },
        },
        NvmeKind::Timeout => IoErrorKind::TimedOut,
        NvmeKind::Aborted => IoErrorKind::Aborted,
        NvmeKind::NotMapped => IoErrorKind::NoMemory,
        _ => IoErrorKind::Removed,
    }
}

pub(super) fn to_completion(target: &Target, done: IoDone) -> Completion {
    let op = to_op(done.io);
    let result = done
        .result
        .map_err(|e| target.info.error(&op, kind_of(e.kind), e.to_string()));
    let result = target.flush_fault.settle(&target.info, &op, result);
    Completion {
        tag: done.tag,
        op,
        result,
    }
}

/// What the driver's refusal means.
pub(super) fn to_refusal(info: &DeviceInfo, e: NvmeSubmit) -> SubmitError {
    let text = e.to_string();
    match e {
        NvmeSubmit::Busy(io) => SubmitError::Busy(to_op(io)),
        NvmeSubmit::Invalid(io, why) => {
            let op = to_op(io);
            let kind = match why {
                // The namespace is not there, or not as it was: no fault of the buffer's.
                InvalidIo::Stale(_) => IoErrorKind::Removed,
                _ => IoErrorKind::Misaligned,
            };
            let e = info.error(&op, kind, text);
            SubmitError::Refused(op, e)
        }
        NvmeSubmit::Gone(io, kind) => {
            let op = to_op(io);
            let e: Box<IoError> = info.error(&op, kind_of(kind), text);
            SubmitError::Refused(op, e)
        }
    }
}

impl NvmeChannel {
    pub(super) fn new(target: Target, pair: QueuePair, place: Place) -> NvmeChannel {
        NvmeChannel {
            pair,
            target,
            done: Vec::new(),
            resets: Vec::new(),
            asked: Vec::new(),
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
        if let Op::Abort { tag: target } = op {
            self.pair.abort(target);
            self.asked.push(Completion {
                tag,
                op,
                result: Ok(()),
            });
            return Ok(());
        }
        match to_io(op, &self.target.ns) {
            Ok(io) => {
                let submitted = self.pair.submit(&self.target.ns, tag, io);
                submitted.map_err(|e| to_refusal(&self.target.info, e))
            }
            Err(op) => match Resetting::start(tag, self.pair.controller()) {
                Ok(reset) => {
                    self.resets.push(reset);
                    Ok(())
                }
                Err(e) => {
                    let e = self
                        .target
                        .info
                        .error(&op, IoErrorKind::NoMemory, e.to_string());
                    refuse(op, e)
                }
            },
        }
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        let before = out.len();
        if self.pair.poll(&mut self.done) > 0 {
            out.extend(
                self.done
                    .drain(..)
                    .map(|done| to_completion(&self.target, done)),
            );
        }
        out.append(&mut self.asked);
        if !self.resets.is_empty() && self.pair.in_flight() == 0 {
            let over = self.resets.extract_if(.., |r| r.is_over());
            out.extend(over.map(|r| r.completion(&self.target.info)));
        }
        out.len() - before
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        if !self.asked.is_empty() {
            return Ok(());
        }
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
        self.pair.in_flight() + self.resets.len() + self.asked.len()
    }
}
