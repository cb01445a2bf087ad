//! The ends of operations.

use std::fmt;

use crate::error::IoError;
use crate::op::Op;

/// An ended operation with its buffers.
#[derive(Debug)]
pub struct Completion {
    /// The submitter's tag.
    pub tag: u64,
    /// The operation as it was submitted.
    pub op: Op,
    /// The result.
    pub result: Result<(), Box<IoError>>,
}

/// A submission that the channel did not accept. The operation comes back.
#[derive(Debug)]
pub enum SubmitError {
    /// The queue is full: poll, then submit again.
    Busy(Op),
    /// The operation can never be done: it is out of range, misaligned or unsupported, or the
    /// device is gone.
    Refused(Op, Box<IoError>),
}

impl SubmitError {
    /// Returns the operation.
    pub fn into_op(self) -> Op {
        match self {
            SubmitError::Busy(op) | SubmitError::Refused(op, _) => op,
        }
    }

    /// Returns the operation.
    pub fn op_mut(&mut self) -> &mut Op {
        match self {
            SubmitError::Busy(op) | SubmitError::Refused(op, _) => op,
        }
    }
}

impl fmt::Display for SubmitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SubmitError::Busy(op) => write!(f, "queue full: {} not submitted", op.kind()),
            SubmitError::Refused(_, e) => write!(f, "{e}"),
        }
    }
}

impl std::error::Error for SubmitError {}
