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
