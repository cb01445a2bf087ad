//! What takes the place of a channel when the device is given up.

use std::time::Duration;

use pumice_bdev::{BdevError, Completion, DeviceInfo, IoChannel, IoErrorKind, Op, SubmitError};

/// A channel that refuses everything: it holds nothing of the device that it was once open on.
pub(crate) struct ClosedChannel(pub DeviceInfo);

impl IoChannel for ClosedChannel {
    fn submit(&mut self, _tag: u64, op: Op) -> Result<(), SubmitError> {
        let error = self.0.error(
            &op,
            IoErrorKind::Removed,
            "the device was given up at the unmount",
        );
        Err(SubmitError::Refused(op, error))
    }

    fn poll(&mut self, _out: &mut Vec<Completion>) -> usize {
        0
    }

    fn wait(&mut self, _timeout: Duration) -> Result<(), BdevError> {
        Ok(())
    }

    fn in_flight(&self) -> usize {
        0
    }
}
