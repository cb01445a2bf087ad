//! I/Os that take several commands.

use pumice_io::{Completion as IoCompletion, IoError, Op, SubmitError};

use super::build::Work;
use super::data::ListArea;
use super::pair::QueuePair;
use super::slot::SlotState;
use crate::error::Cause;
use crate::namespace::CommandLimits;
use crate::spec::Command;

/// An I/O of which some parts are in flight and others have not been sent yet.
#[derive(Debug)]
pub(crate) struct Split {
    pub tag: u64,
    pub io: Op,
    pub limits: CommandLimits,
    pub(super) work: Work,
    /// Number of commands that have not ended.
    pub outstanding: usize,
    /// The first failure. No command is sent after it.
    pub error: Option<Box<IoError>>,
    /// Whether it is listed in `waiting_splits`.
    pub queued: bool,
}

impl Split {
    /// Notes a failure, unless there was one before; nothing more is sent then.
    pub(super) fn fail(&mut self, device: &str, cause: Cause, command: &str) {
        if self.error.is_none() {
            let block_size = 1 << self.limits.block_shift;
            self.error = Some(cause.error(device, block_size, &self.io, command));
        }
    }

    fn has_more(&self) -> bool {
        self.error.is_none() && !self.work.is_over()
    }
}

impl QueuePair {
    /// Accepts an I/O that takes several commands. Sends as many as there is room for; later polls
    /// send the others.
    pub(super) fn submit_split(
        &mut self,
        limits: &CommandLimits,
        tag: u64,
        io: Op,
        work: Work,
    ) -> Result<(), SubmitError> {
        // There may be as many split I/Os as slots, which bounds the memory.
        if self.free_splits.is_empty() && self.splits.len() >= self.slots.len() {
            return Err(SubmitError::Busy(io));
        }
        let split = Box::new(Split {
            tag,
            io,
            limits: *limits,
            work,
            outstanding: 0,
            error: None,
            queued: false,
        });
        let index = match self.free_splits.pop() {
            Some(index) => {
                self.splits[index as usize] = Some(split);
                index
            }
            None => {
                let index = u32::try_from(self.splits.len()).unwrap_or(u32::MAX - 1);
                self.splits.push(Some(split));
                index
            }
        };
        self.send_parts(index);
        Ok(())
    }

    /// Sends commands of a split I/O while there are slots.
    fn send_parts(&mut self, index: u32) {
        let Some(Some(split)) = self.splits.get_mut(index as usize) else {
            return;
        };
        let mut ready: smallvec::SmallVec<[(u16, Command); 8]> = smallvec::SmallVec::new();
        while split.has_more() {
            let Some((slot, _)) = self.slots.take() else {
                break;
            };
            let at = usize::from(slot);
            let area = ListArea {
                words: &self.lists.as_u64()[at * self.list_words..(at + 1) * self.list_words],
                address: self.list_addresses[at],
            };
            let made =
                split
                    .work
                    .next_command(&split.limits, &split.io, &self.table, self.style, &area);
            match made {
                Ok(command) => {
                    split.outstanding += 1;
                    ready.push((slot, command));
                }
                Err(super::data::NotMapped) => {
                    self.slots.give(slot);
                    split.fail(self.core.name(), Cause::NotMapped, "");
                }
            }
        }
        let over = split.outstanding == 0 && !split.has_more();
        if split.has_more() && !split.queued {
            split.queued = true;
            self.waiting_splits.push_back(index);
        }
        let tag = split.tag;
        for (slot, command) in ready {
            let entry = &mut self.slots[slot];
            entry.tag = tag;
            entry.split = index;
            entry.retries = 0;
            self.send(slot, command);
        }
        if over {
            self.finish_split(index);
        }
    }

    /// Continues split I/Os that found no slot before.
    pub(super) fn continue_splits(&mut self) {
        for _ in 0..self.waiting_splits.len() {
            if self.slots.next().is_none() {
                break;
            }
            let Some(index) = self.waiting_splits.pop_front() else {
                break;
            };
            if let Some(Some(split)) = self.splits.get_mut(index as usize) {
                split.queued = false;
            }
            self.send_parts(index);
        }
    }

    /// A command of a split I/O is over; a failure comes with the command in words.
    pub(super) fn finish_part(&mut self, index: u32, failure: Option<(Cause, String)>) {
        let Some(Some(split)) = self.splits.get_mut(index as usize) else {
            return;
        };
        split.outstanding -= 1;
        if let Some((cause, command)) = failure {
            split.fail(self.core.name(), cause, &command);
        }
        if split.outstanding == 0 && !split.has_more() {
            self.finish_split(index);
        }
    }

    fn finish_split(&mut self, index: u32) {
        let Some(split) = self.splits.get_mut(index as usize).and_then(Option::take) else {
            return;
        };
        if split.queued {
            self.waiting_splits.retain(|&i| i != index);
        }
        self.free_splits.push(index);
        self.backlog.push(IoCompletion {
            tag: split.tag,
            op: split.io,
            result: split.error.map_or(Ok(()), Err),
        });
    }

    /// Ends every split I/O with an error. No command is in flight.
    pub(super) fn fail_splits(&mut self, cause: Cause) {
        for index in 0..self.splits.len() {
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            let Some(Some(split)) = self.splits.get_mut(index as usize) else {
                continue;
            };
            debug_assert!(split.outstanding == 0);
            split.fail(self.core.name(), cause, "");
            self.finish_split(index);
        }
        debug_assert!(self.slots.iter().all(|s| s.state == SlotState::Free));
    }
}
