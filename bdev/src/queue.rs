//! The completion queue of channels whose operations end when they are submitted, or at the next
//! poll.

use pumice_io::{Completion, IoError, Op, SubmitError};

/// Most completions that wait for a poll. With so many, the channel is busy.
const DEPTH: usize = 4096;

/// Completions that wait for [`crate::IoChannel::poll`].
#[derive(Debug, Default)]
pub(crate) struct Completed {
    queue: Vec<Completion>,
}

impl Completed {
    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        self.queue.len() >= DEPTH
    }

    #[inline]
    pub(crate) fn push(&mut self, tag: u64, op: Op, result: Result<(), Box<IoError>>) {
        self.queue.push(Completion { tag, op, result });
    }

    /// Returns the waiting completions, for channels that do the operations when they are polled.
    #[inline]
    pub(crate) fn as_mut_slice(&mut self) -> &mut [Completion] {
        &mut self.queue
    }

    #[inline]
    pub(crate) fn drain_into(&mut self, out: &mut Vec<Completion>) -> usize {
        let n = self.queue.len();
        if n == 0 {
            return 0;
        }
        if out.is_empty() && out.capacity() >= n {
            std::mem::swap(&mut self.queue, out);
        } else {
            out.append(&mut self.queue);
        }
        n
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.queue.len()
    }
}

/// Refuses an operation for which [`crate::DeviceInfo::check`] has returned an error.
#[inline]
pub(crate) fn refuse(op: Op, e: Box<IoError>) -> Result<(), SubmitError> {
    Err(SubmitError::Refused(op, e))
}
