//! Submission to one channel: tags, operations in flight, and operations that wait for a full
//! queue.
//!
//! One thread at a time uses an [`Engine`]. [`AsyncChannel`](crate::AsyncChannel) adds futures to
//! it, and [`SharedChannels`](crate::SharedChannels) a lock and batches.

use std::collections::VecDeque;
use std::thread;
use std::time::Duration;

use pumice_io::{Completion, IoError, IoErrorKind, Op, SubmitError};

use crate::device::{DeviceInfo, IoChannel};
use crate::error::BdevError;
use crate::slots::Slots;

/// The pause when others have all places of a queue, or while the device is being reset.
const FULL: Duration = Duration::from_micros(20);
/// The pause after a wait that failed.
const FAILED: Duration = Duration::from_micros(50);

/// Operations on one channel. Each has an owner of type `T` that gets the completion.
pub struct Engine<T> {
    channel: Box<dyn IoChannel>,
    owners: Slots<T>,
    /// Operations that found the queue full, with their tags.
    waiting: VecDeque<(u64, Op)>,
    reaped: Vec<Completion>,
}

/// An operation that ended without having been in flight: its owner, the operation and the reason.
pub type Refused<T> = (T, Op, Box<IoError>);

impl<T> Engine<T> {
    /// Makes an engine on `channel`.
    pub fn new(channel: Box<dyn IoChannel>) -> Engine<T> {
        Engine {
            channel,
            owners: Slots::default(),
            waiting: VecDeque::new(),
            reaped: Vec::new(),
        }
    }

    /// Submits `op` and returns its tag. If the queue is full, [`Engine::reap`] submits it as soon
    /// as there is room.
    ///
    /// # Errors
    /// Returns the operation, which was refused and has ended.
    #[inline]
    pub fn submit(&mut self, owner: T, op: Op) -> Result<u64, Refused<T>> {
        let tag = self.owners.insert(owner);
        if !self.waiting.is_empty() {
            // Operations that came earlier go first.
            self.waiting.push_back((tag, op));
            return Ok(tag);
        }
        match self.channel.submit(tag, op) {
            Ok(()) => Ok(tag),
            Err(SubmitError::Busy(op)) => {
                self.waiting.push_back((tag, op));
                Ok(tag)
            }
            Err(SubmitError::Refused(op, error)) => {
                let owner = self.owners.remove(tag).expect("it was put there above");
                Err((owner, op, error))
            }
        }
    }

    /// Passes submitted operations to the device, calls `done` for each completion, and submits
    /// waiting operations. `done` also gets the tag. The owner that it returns keeps the tag until
    /// [`Engine::take`]; with `None` the tag is free. Never blocks. Returns the number of
    /// completions.
    pub fn reap(
        &mut self,
        mut done: impl FnMut(u64, T, Op, Result<(), Box<IoError>>) -> Option<T>,
    ) -> usize {
        let mut total = 0;
        let mut reaped = std::mem::take(&mut self.reaped);
        loop {
            let n = self.channel.poll(&mut reaped);
            for Completion { tag, op, result } in reaped.drain(..) {
                self.complete(tag, op, result, &mut done);
            }
            total += n;
            if self.waiting.is_empty() {
                break;
            }
            let before = self.waiting.len();
            total += self.submit_waiting(&mut done);
            // Submitted operations have to reach the device before anybody sleeps.
            if self.waiting.len() == before {
                break;
            }
        }
        self.reaped = reaped;
        total
    }

    fn complete(
        &mut self,
        tag: u64,
        op: Op,
        result: Result<(), Box<IoError>>,
        done: &mut impl FnMut(u64, T, Op, Result<(), Box<IoError>>) -> Option<T>,
    ) {
        let Some(owner) = self.owners.lend(tag) else {
            tracing::error!(tag, "completion of an operation that is not in flight");
            return;
        };
        match done(tag, owner, op, result) {
            Some(owner) => self.owners.put_back(tag, owner),
            None => self.owners.free(tag),
        }
    }

    /// Submits waiting operations in order, as many as there is room for. Returns how many were
    /// refused.
    fn submit_waiting(
        &mut self,
        done: &mut impl FnMut(u64, T, Op, Result<(), Box<IoError>>) -> Option<T>,
    ) -> usize {
        let mut refused = 0;
        while let Some((tag, op)) = self.waiting.pop_front() {
            match self.channel.submit(tag, op) {
                Ok(()) => {}
                Err(SubmitError::Busy(op)) => {
                    self.waiting.push_front((tag, op));
                    break;
                }
                Err(SubmitError::Refused(op, error)) => {
                    self.complete(tag, op, Err(error), done);
                    refused += 1;
                }
            }
        }
        refused
    }

    /// Returns the owner of a tag.
    #[inline]
    pub fn owner(&mut self, tag: u64) -> Option<&mut T> {
        self.owners.get_mut(tag)
    }

    /// Returns the tags and their owners.
    pub fn owners(&self) -> impl Iterator<Item = (u64, &T)> {
        self.owners.iter()
    }

    /// Takes the owner of a tag whose operation has ended. The tag is free.
    #[inline]
    pub fn take(&mut self, tag: u64) -> Option<T> {
        self.owners.remove(tag)
    }

    /// Takes back an operation that still waits for room, and frees its tag. Returns `None` if it
    /// was submitted.
    pub fn take_back(&mut self, tag: u64) -> Option<(T, Op)> {
        let at = self.waiting.iter().position(|(waits, _)| *waits == tag)?;
        let (_, op) = self.waiting.remove(at)?;
        Some((self.owners.remove(tag)?, op))
    }

    /// Number of operations whose completions were not given to their owners.
    pub fn in_flight(&self) -> usize {
        self.channel.in_flight() + self.waiting.len()
    }

    /// Returns when there may be a completion or room, or when `timeout` is over. Returns at once
    /// if nothing is in flight.
    pub fn wait(&mut self, timeout: Duration) {
        if let Err(error) = self.channel.wait(timeout) {
            tracing::warn!(%error, "waiting for completions failed; polling instead");
            thread::sleep(FAILED);
        } else if !self.waiting.is_empty() && self.channel.in_flight() == 0 {
            // The device is being reset, or others have all places. The channel may know for how
            // long, so it is not asked again at once.
            thread::sleep(FULL);
        }
    }

    /// Releases the device: later operations are refused. Nothing may be in flight.
    pub fn close(&mut self, info: &DeviceInfo) {
        self.channel = Box::new(Closed(info.clone()));
    }
}

impl<T> std::fmt::Debug for Engine<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

/// Replaces the channel of a released device. It holds nothing of the device.
struct Closed(DeviceInfo);

impl IoChannel for Closed {
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::DmaBuf;

    /// A channel with room for two operations, which records their order.
    #[derive(Default)]
    struct Narrow {
        /// Room that it has got meanwhile, as when others have had it.
        more: Arc<AtomicUsize>,
        taken: Vec<(u64, Op)>,
        order: Vec<u64>,
    }

    impl IoChannel for Narrow {
        fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
            if self.taken.len() == 2 + self.more.load(Ordering::Relaxed) {
                return Err(SubmitError::Busy(op));
            }
            self.order.push(op.lba());
            self.taken.push((tag, op));
            Ok(())
        }

        fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
            assert!(self.order.is_sorted(), "{:?}", self.order);
            let done = self.taken.drain(..).map(|(tag, op)| Completion {
                tag,
                op,
                result: Ok(()),
            });
            let before = out.len();
            out.extend(done);
            out.len() - before
        }

        fn wait(&mut self, _timeout: Duration) -> Result<(), BdevError> {
            Ok(())
        }

        fn in_flight(&self) -> usize {
            self.taken.len()
        }
    }

    fn read(lba: u64) -> Op {
        let buf = DmaBuf::new(512).unwrap();
        Op::Read { lba, buf }
    }

    #[test]
    fn what_finds_the_queue_full_goes_in_order() {
        let mut engine = Engine::new(Box::new(Narrow::default()));
        let mut tags: Vec<u64> = (0..9)
            .map(|lba| engine.submit(lba, read(lba)).unwrap())
            .collect();
        assert_eq!(engine.in_flight(), 9);
        // A waiting operation is taken back; one in flight is not.
        assert_eq!(engine.take_back(tags[5]).map(|(owner, _)| owner), Some(5));
        assert!(engine.take_back(tags[0]).is_none());
        tags.remove(5);
        let mut done = Vec::new();
        while engine.in_flight() > 0 {
            engine.reap(|_, owner, op, result| {
                assert_eq!((owner, result), (op.lba(), Ok(())));
                done.push(owner);
                None
            });
            engine.wait(Duration::from_millis(1));
        }
        assert_eq!(done, [0, 1, 2, 3, 4, 6, 7, 8]);
        assert_eq!(engine.owners().count(), 0);
    }

    #[test]
    fn what_comes_when_there_is_room_again_waits_behind_the_others() {
        let narrow = Narrow::default();
        let more = Arc::clone(&narrow.more);
        let mut engine = Engine::new(Box::new(narrow));
        for lba in 0..4 {
            engine.submit(lba, read(lba)).unwrap();
        }
        more.store(8, Ordering::Relaxed);
        engine.submit(4, read(4)).unwrap();
        let mut done = Vec::new();
        while engine.in_flight() > 0 {
            engine.reap(|_, owner, _, _| {
                done.push(owner);
                None
            });
        }
        assert_eq!(done, [0, 1, 2, 3, 4]);
    }

    /// A channel that has no room, until it refuses everything.
    #[derive(Default)]
    struct Turning {
        refuses: Arc<AtomicUsize>,
        polls: usize,
    }

    impl IoChannel for Turning {
        fn submit(&mut self, _tag: u64, op: Op) -> Result<(), SubmitError> {
            if self.refuses.load(Ordering::Relaxed) == 0 {
                return Err(SubmitError::Busy(op));
            }
            let info = DeviceInfo::new("d", "test", 512, 8);
            let error = info.error(&op, IoErrorKind::Removed, "");
            Err(SubmitError::Refused(op, error))
        }

        fn poll(&mut self, _out: &mut Vec<Completion>) -> usize {
            self.polls += 1;
            assert!(self.polls < 100, "whoever only asks is kept here");
            0
        }

        fn wait(&mut self, _timeout: Duration) -> Result<(), BdevError> {
            Ok(())
        }

        fn in_flight(&self) -> usize {
            0
        }
    }

    #[test]
    fn what_waits_and_is_refused_ends_with_the_error() {
        let channel = Turning::default();
        let refuses = Arc::clone(&channel.refuses);
        let mut engine = Engine::new(Box::new(channel));
        let tags: Vec<u64> = (0..3)
            .map(|lba| engine.submit(lba, read(lba)).unwrap())
            .collect();
        let none = engine.reap(|_, _, _, _| panic!("nothing has ended"));
        assert_eq!((none, engine.in_flight()), (0, 3));
        refuses.store(1, Ordering::Relaxed);
        let mut ended = Vec::new();
        let count = engine.reap(|tag, owner, op, result| {
            let kind = result.unwrap_err().kind;
            ended.push((tag, owner, op.lba(), kind));
            None
        });
        let expected = (0..3).zip(tags);
        let expected = expected.map(|(lba, tag)| (tag, lba, lba, IoErrorKind::Removed));
        assert_eq!(ended, expected.collect::<Vec<_>>());
        assert_eq!((count, engine.in_flight()), (3, 0));
        assert_eq!(engine.owners().count(), 0);
    }

    #[test]
    fn an_owner_that_stays_keeps_its_tag() {
        let mut engine = Engine::new(Box::new(Narrow::default()));
        let kept = engine.submit("kept", read(0)).unwrap();
        engine.reap(|_, owner, _, _| Some(owner));
        let other = engine.submit("other", read(1)).unwrap();
        assert_ne!(kept, other);
        engine.reap(|_, _, _, _| None);
        assert_eq!(engine.take(kept), Some("kept"));
        assert_eq!(engine.take(other), None);
    }

    #[test]
    fn a_closed_engine_refuses() {
        let dev = crate::open("malloc://1M").unwrap();
        let mut engine = Engine::new(dev.open_channel().unwrap());
        engine.close(dev.info());
        let (owner, _, error) = engine.submit(7, read(0)).unwrap_err();
        assert_eq!((owner, error.kind), (7, IoErrorKind::Removed));
        assert_eq!(engine.owners().count(), 0);
    }
}
