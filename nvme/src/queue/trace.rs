//! Log records of commands, at trace level. Each is inside the span that was current when its I/O
//! was submitted, so that one operation can be followed down to its completion.

use tracing::{Level, Span};

use super::pair::QueuePair;
use crate::spec::{Completion, decode};

/// The target of the log records.
macro_rules! target {
    () => {
        "pumice_nvme::io"
    };
}

/// Whether commands are logged. Costs a load and a branch when they are not.
#[inline]
pub(super) fn is_on() -> bool {
    tracing::enabled!(target: target!(), Level::TRACE)
}

impl QueuePair {
    /// Logs a command that goes into the submission queue.
    #[cold]
    pub(super) fn trace_command(&mut self, slot: u16) {
        let at = usize::from(slot);
        if self.spans.is_empty() {
            self.spans.resize(self.slots.len(), None);
            self.observed = true;
        }
        let span = Span::current();
        tracing::trace!(
            target: target!(),
            device = self.core.name(),
            cid = self.slots[slot].cid(),
            command = %decode::io_command(self.shared.qid, &self.slots[slot].command()),
            "nvme command"
        );
        self.spans[at] = Some(span);
    }

    /// Logs a completion that was taken from the completion queue.
    #[cold]
    pub(super) fn trace_completion(&mut self, slot: u16, completion: &Completion) {
        let span = self.spans.get_mut(usize::from(slot)).and_then(Option::take);
        span.unwrap_or_else(Span::none).in_scope(|| {
            tracing::trace!(
                target: target!(),
                device = self.core.name(),
                cid = completion.cid,
                completion = %decode::completion(completion),
                "nvme completion"
            );
        });
    }
}
