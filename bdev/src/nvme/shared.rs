//! A queue pair that several channels share, behind a lock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pumice_io::{Completion, IoErrorKind, Op, SubmitError};
use pumice_nvme::QueuePair;

use super::channel::{Resetting, refused, settle};
use super::{Share, Target};
use crate::device::IoChannel;
use crate::error::BdevError;
use crate::queue::refuse;
use crate::slots::Slots;

pub(super) struct SharedQueue {
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for SharedQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SharedQueue")
    }
}

struct Inner {
    pair: QueuePair,
    /// The channel and its tag of each operation in flight.
    owners: Slots<(u64, u64)>,
    /// Completions that one channel took for another, by channel. A dropped channel has no entry.
    for_others: BTreeMap<u64, Vec<Completion>>,
    done: Vec<Completion>,
    next_channel: u64,
}

impl SharedQueue {
    pub(super) fn new(pair: QueuePair) -> SharedQueue {
        SharedQueue {
            inner: Mutex::new(Inner {
                pair,
                owners: Slots::default(),
                for_others: BTreeMap::new(),
                done: Vec::new(),
                next_channel: 0,
            }),
        }
    }
}

impl Inner {
    fn reap(&mut self) {
        self.pair.poll(&mut self.done);
        for mut done in self.done.drain(..) {
            if let Some((channel, tag)) = self.owners.remove(done.tag)
                && let Some(for_others) = self.for_others.get_mut(&channel)
            {
                done.tag = tag;
                for_others.push(done);
            }
        }
    }
}

pub(super) struct SharedChannel {
    target: Target,
    // Dropped before the share, whose last one deletes the queue pair.
    shared: Arc<SharedQueue>,
    _share: Share,
    id: u64,
    in_flight: usize,
    resets: Vec<Resetting>,
    /// Completions of aborts that the controller has been asked for.
    asked: Vec<Completion>,
}

impl SharedChannel {
    pub(super) fn new(target: Target, shared: Arc<SharedQueue>, share: Share) -> SharedChannel {
        let mut inner = shared.inner.lock();
        let id = inner.next_channel;
        inner.next_channel += 1;
        inner.for_others.insert(id, Vec::new());
        drop(inner);
        SharedChannel {
            target,
            shared,
            _share: share,
            id,
            in_flight: 0,
            resets: Vec::new(),
            asked: Vec::new(),
        }
    }
}

impl IoChannel for SharedChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        if let Err(e) = self.target.check(&op) {
            return refuse(op, e);
        }
        if !self.resets.is_empty() {
            return Err(SubmitError::Busy(op));
        }
        let mut inner = self.shared.inner.lock();
        if let Op::Abort { tag: target } = op {
            let mine = (self.id, target);
            let slot = inner.owners.iter().find(|(_, o)| **o == mine);
            if let Some(slot) = slot.map(|(slot, _)| slot) {
                inner.pair.abort(slot);
            }
            self.in_flight += 1;
            self.asked.push(Completion {
                tag,
                op,
                result: Ok(()),
            });
            return Ok(());
        }
        if matches!(op, Op::Reset) {
            match Resetting::start(tag, inner.pair.controller()) {
                Ok(reset) => self.resets.push(reset),
                Err(e) => {
                    let info = &self.target.info;
                    let e = info.error(&op, IoErrorKind::NoMemory, e.to_string());
                    return refuse(op, e);
                }
            }
        } else {
            let slot = inner.owners.insert((self.id, tag));
            if let Err(e) = inner.pair.submit(&self.target.ns, slot, op) {
                inner.owners.remove(slot);
                return Err(refused(&self.target.info, e));
            }
        }
        self.in_flight += 1;
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        if !self.target.info.is_here() {
            return 0;
        }
        let before = out.len();
        let mut inner = self.shared.inner.lock();
        inner.reap();
        if let Some(for_others) = inner.for_others.get_mut(&self.id) {
            out.extend(for_others.drain(..).map(|done| settle(&self.target, done)));
        }
        drop(inner);
        out.append(&mut self.asked);
        self.in_flight -= out.len() - before;
        if self.in_flight == self.resets.len() {
            for reset in self.resets.extract_if(.., |r| r.is_over()) {
                out.push(reset.completion(&self.target.info));
                self.in_flight -= 1;
            }
        }
        out.len() - before
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        self.target.info.still_here()?;
        // Nobody may sleep with the lock held, so this sleeps in short naps, which become longer.
        let start = Instant::now();
        let mut nap = Duration::from_micros(5);
        while self.in_flight > 0 && self.asked.is_empty() && start.elapsed() < timeout {
            let mut inner = self.shared.inner.lock();
            inner.reap();
            let there = inner
                .for_others
                .get(&self.id)
                .is_some_and(|for_others| !for_others.is_empty());
            drop(inner);
            if there || self.resets.iter().any(Resetting::is_over) {
                return Ok(());
            }
            thread::sleep(nap);
            nap = (nap * 2).min(Duration::from_micros(200));
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        if !self.target.info.is_here() {
            return 0;
        }
        self.in_flight
    }
}

impl Drop for SharedChannel {
    fn drop(&mut self) {
        // In a forked child the lock may be held by a thread that the child does not have.
        if !self.target.info.is_here() {
            return;
        }
        // Operations of this channel stay in the queue pair, with their buffers, until they end.
        self.shared.inner.lock().for_others.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DmaBuf;
    use crate::nvme::{Nvme, attach};

    fn channel(device: &Nvme, shared: &Arc<SharedQueue>) -> SharedChannel {
        let target = Target {
            info: Arc::clone(&device.info),
            ns: Arc::clone(&device.namespace),
            flush_fault: Arc::clone(&device.flush_fault),
        };
        device.queues.state.lock().sharers += 1;
        SharedChannel::new(
            target,
            Arc::clone(shared),
            Share(Arc::clone(&device.queues)),
        )
    }

    /// Neither an operation that found no room nor a channel that has gone leaves anything in the queue that others share.
    #[test]
    fn what_was_not_accepted_and_who_has_gone_leave_nothing() {
        let (controller, devices) = attach("N", "soft://memory?size=1M&queues=1").unwrap();
        let pair = controller.queue_pair(&super::super::queue_options(&controller));
        let shared = Arc::new(SharedQueue::new(pair.unwrap()));
        let mut stays = channel(&devices[0], &shared);
        let mut goes = channel(&devices[0], &shared);
        let read = || Op::Read {
            lba: 0,
            buf: DmaBuf::new(512).unwrap(),
        };
        let mut submitted = 0;
        while let Ok(()) = goes.submit(7, read()) {
            submitted += 1;
            assert!(submitted < 5000, "nothing is taken back meanwhile");
        }
        assert_eq!(goes.in_flight(), submitted);
        for _ in 0..2 {
            assert!(matches!(
                goes.submit(7, read()),
                Err(SubmitError::Busy(Op::Read { .. }))
            ));
        }
        assert_eq!(shared.inner.lock().owners.len(), submitted);

        let id = goes.id;
        drop(goes);
        let mut out = Vec::new();
        while shared.inner.lock().owners.len() > 0 {
            stays.poll(&mut out);
        }
        assert!(out.is_empty(), "{out:?}");
        assert!(!shared.inner.lock().for_others.contains_key(&id));
        assert!(shared.inner.lock().for_others.contains_key(&stays.id));
    }
}
