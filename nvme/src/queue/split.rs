//! I/Os that take several commands.

use std::collections::VecDeque;

use pumice_io::{Completion as IoCompletion, IoError, Op};

use super::build::Work;
use crate::error::Cause;
use crate::namespace::{CommandLimits, Namespace};

/// An I/O of which some parts are in flight and others have not been sent yet.
#[derive(Debug)]
pub(super) struct Split {
    pub tag: u64,
    pub io: Op,
    pub limits: CommandLimits,
    /// The number of its namespace, see `handles`.
    pub namespace: u32,
    pub work: Work,
    /// Number of commands that have not ended.
    pub outstanding: usize,
    /// The first failure. No command is sent after it.
    error: Option<Box<IoError>>,
    /// Whether it waits for slots.
    queued: bool,
}

impl Split {
    pub fn new(ns: &Namespace, namespace: u32, tag: u64, io: Op, work: Work) -> Box<Split> {
        Box::new(Split {
            tag,
            io,
            limits: ns.limits,
            namespace,
            work,
            outstanding: 0,
            error: None,
            queued: false,
        })
    }

    /// Notes a failure, unless there was one before; nothing more is sent then.
    pub fn fail(&mut self, device: &str, cause: Cause, command: &str) {
        if self.error.is_none() {
            let block_size = 1 << self.limits.block_shift;
            self.error = Some(cause.error(device, block_size, &self.io, command));
        }
    }

    /// Whether there are commands to be sent.
    pub fn has_more(&self) -> bool {
        self.error.is_none() && !self.work.is_over()
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.outstanding == 0 && !self.has_more()
    }
}

/// The split I/Os of a queue pair, by number.
#[derive(Debug, Default)]
pub(super) struct Splits {
    all: Vec<Option<Box<Split>>>,
    free: Vec<u32>,
    /// Those that wait for slots.
    waiting: VecDeque<u32>,
}

impl Splits {
    /// Number of split I/Os.
    pub fn len(&self) -> usize {
        self.all.len() - self.free.len()
    }

    /// Number of their commands that have not ended.
    pub fn outstanding(&self) -> usize {
        self.all.iter().flatten().map(|s| s.outstanding).sum()
    }

    /// Whether any waits for slots.
    #[inline]
    pub fn any_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Adds one and returns its number.
    pub fn add(&mut self, split: Box<Split>) -> u32 {
        if let Some(index) = self.free.pop() {
            self.all[index as usize] = Some(split);
            return index;
        }
        let index = u32::try_from(self.all.len()).unwrap_or(u32::MAX - 1);
        self.all.push(Some(split));
        index
    }

    pub fn get_mut(&mut self, index: u32) -> Option<&mut Split> {
        self.all.get_mut(index as usize)?.as_deref_mut()
    }

    /// Lists it among those that wait for slots, if it has commands to be sent.
    pub fn let_wait(&mut self, index: u32) {
        if let Some(split) = self.get_mut(index)
            && split.has_more()
            && !std::mem::replace(&mut split.queued, true)
        {
            self.waiting.push_back(index);
        }
    }

    /// Takes the one that has waited longest for slots.
    pub fn next_waiting(&mut self) -> Option<u32> {
        let index = self.waiting.pop_front()?;
        if let Some(split) = self.get_mut(index) {
            split.queued = false;
        }
        Some(index)
    }

    /// Notes that a command has ended; a failure comes with the command in words.
    pub fn part_ended(&mut self, device: &str, index: u32, failure: Option<(Cause, String)>) {
        let Some(split) = self.get_mut(index) else {
            return;
        };
        split.outstanding -= 1;
        if let Some((cause, command)) = failure {
            split.fail(device, cause, &command);
        }
    }

    /// Returns the completion of one that has ended.
    pub fn take_ended(&mut self, index: u32) -> Option<IoCompletion> {
        let place = self.all.get_mut(index as usize)?;
        let split = place.take_if(|split| split.is_over())?;
        if split.queued {
            self.waiting.retain(|&i| i != index);
        }
        self.free.push(index);
        Some(IoCompletion {
            tag: split.tag,
            op: split.io,
            result: split.error.map_or(Ok(()), Err),
        })
    }

    /// Notes a failure of those with a tag, of which nothing more is sent. Returns whether there
    /// are any.
    pub fn fail_tagged(&mut self, device: &str, tag: u64, cause: Cause) -> bool {
        let mut found = false;
        for split in self.all.iter_mut().flatten().filter(|s| s.tag == tag) {
            found = true;
            split.fail(device, cause, "");
        }
        found
    }

    /// Ends all with an error. No command is in flight.
    pub fn fail_all(&mut self, device: &str, cause: Cause) -> Vec<IoCompletion> {
        let mut ended = Vec::new();
        for index in 0..u32::try_from(self.all.len()).unwrap_or(u32::MAX) {
            if let Some(split) = self.get_mut(index) {
                debug_assert!(split.outstanding == 0);
                split.fail(device, cause, "");
            }
            ended.extend(self.take_ended(index));
        }
        ended
    }
}

#[cfg(test)]
mod tests {
    use pumice_io::IoErrorKind;

    use super::super::build::tests::limits;
    use super::*;

    fn unmap(tag: u64) -> Box<Split> {
        let limits = limits();
        let (lba, len_blocks) = (0, 1000);
        Box::new(Split {
            tag,
            io: Op::Unmap { lba, len_blocks },
            limits,
            namespace: 0,
            work: Work::Deallocate {
                lba,
                left: len_blocks,
            },
            outstanding: 0,
            error: None,
            queued: false,
        })
    }

    /// The next one of its number has one place in the line.
    #[test]
    fn one_that_has_ended_waits_for_no_slot() {
        let mut splits = Splits::default();
        let first = splits.add(unmap(7));
        splits.let_wait(first);
        splits.let_wait(first);
        assert_eq!(splits.waiting(), 1);
        assert!(splits.take_ended(first).is_none());
        assert!(splits.fail_tagged("d", 7, Cause::AskedFor));
        let done = splits.take_ended(first).expect("ended");
        assert_eq!(done.result.unwrap_err().kind, IoErrorKind::Aborted);
        assert!(!splits.any_waiting());
        assert_eq!(splits.add(unmap(8)), first);
        splits.let_wait(first);
        assert_eq!(splits.waiting(), 1);
    }

    #[test]
    fn a_failure_is_of_those_with_its_tag() {
        let mut splits = Splits::default();
        let all: Vec<u32> = [7, 8, 9]
            .into_iter()
            .map(|t| splits.add(unmap(t)))
            .collect();
        assert!(splits.fail_tagged("d", 8, Cause::AskedFor));
        assert!(!splits.fail_tagged("d", 6, Cause::AskedFor));
        let ended = all.iter().map(|n| splits.take_ended(*n).map(|d| d.tag));
        assert_eq!(ended.collect::<Vec<_>>(), [None, Some(8), None]);
        assert_eq!(splits.len(), 2);
    }
}
