//! Batches that were not written.

use std::sync::Arc;

use super::super::commit::{Failure, Restore};
use super::super::error::Error;

/// The reason why a batch was not written.
#[derive(Debug)]
pub(super) struct BatchFault {
    pub error: Arc<Error>,
    /// Whether a part of it may be on the device.
    pub open: bool,
    /// Whether an epoch behind it takes it back.
    pub void: bool,
}

impl From<Error> for BatchFault {
    fn from(error: Error) -> BatchFault {
        BatchFault {
            error: Arc::new(error),
            open: false,
            void: false,
        }
    }
}

impl BatchFault {
    /// The fault of a batch that nothing takes back before the next load.
    pub fn lasting(error: Error) -> BatchFault {
        BatchFault {
            error: Arc::new(error),
            open: true,
            void: false,
        }
    }

    /// Returns the failure of one of the batch's changes.
    pub fn failure(&self) -> Failure {
        let error = match &*self.error {
            Error::Io(error) => Error::Io(error.clone()),
            // Each change has the error that it would have alone, so that it can be tried again.
            Error::Dma(error) => Error::Dma(Arc::clone(error)),
            Error::Stopped(reason) => Error::Stopped(reason.clone()),
            _ => Error::Shared(Arc::clone(&self.error)),
        };
        if !self.open {
            return Failure::TakenBack(error);
        }
        Failure::Open {
            error,
            restore: self.void.then_some(Restore::Ring),
        }
    }
}
