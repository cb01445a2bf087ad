//! Aborting an I/O at the caller's request.

use super::pair::QueuePair;
use super::slot::{NO_RETRY, SlotState};
use crate::error::Cause;

impl QueuePair {
    /// Asks the controller to abort the I/O that was submitted with `tag` (Base section 5.1), and
    /// sends none of its commands again. Never blocks. The controller cannot abort a command that
    /// it has not fetched yet. The I/O still ends once, with success or as aborted. Returns whether
    /// it was in flight.
    pub fn abort(&mut self, tag: u64) -> bool {
        if !self.core.birth.is_here() {
            return false;
        }
        match &self.bounce {
            None => self.abort_here(tag),
            Some(bounce) => {
                let mut found = false;
                for number in bounce.numbers_of(tag) {
                    found |= self.abort_here(number);
                }
                found
            }
        }
    }

    fn abort_here(&mut self, tag: u64) -> bool {
        let mut found = false;
        for slot in self.slots.numbers() {
            let entry = &mut self.slots[slot];
            if entry.tag != tag {
                continue;
            }
            match entry.state {
                SlotState::Free => continue,
                SlotState::InFlight | SlotState::Overdue => {
                    entry.retries = NO_RETRY;
                    self.core.request_abort(self.shared.qid, entry.cid());
                }
                SlotState::Retrying => {
                    self.retrying.retain(|(_, s)| *s != slot);
                    self.finish_command(slot, Some(Cause::Aborted));
                }
            }
            found = true;
        }
        // The commands of a split I/O that were not sent yet are not sent.
        for split in self.splits.iter_mut().flatten().filter(|s| s.tag == tag) {
            found = true;
            split.fail(self.core.name(), Cause::Aborted, "");
        }
        found
    }
}
