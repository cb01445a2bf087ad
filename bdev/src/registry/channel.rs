//! The channel of a registered device, which counts and times operations, limits their time, and
//! ends them on removal.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pumice_io::sys::Clock;
use pumice_io::{Completion, IoErrorKind, Op, OpKind, SubmitError};

use super::Entry;
use crate::device::IoChannel;
use crate::error::BdevError;
use crate::queue::refuse;
use crate::stats::ChannelStats;

/// The bit that marks tags of the channel's own operations.
const OWN: u64 = 1 << 63;
/// Number of polls between two looks for late operations.
const LATE_EVERY: u32 = 256;

/// The reaction to an operation that takes too long. It stays in flight until the device hands it
/// back, and may still take effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimeoutAction {
    /// Logs a warning.
    #[default]
    Log,
    /// Aborts the operation.
    Abort,
    /// Resets the device.
    Reset,
}

pub(super) struct BdevChannel {
    inner: Box<dyn IoChannel>,
    entry: Arc<Entry>,
    stats: Arc<ChannelStats>,
    clock: Clock,
    slots: Vec<Flying>,
    free: Vec<u32>,
    /// Spans of operations, while the log is at trace level.
    spans: Vec<Option<tracing::Span>>,
    own_in_flight: usize,
    own_tag: u64,
    ending: bool,
    polls: u32,
}

#[derive(Clone, Copy)]
struct Flying {
    tag: u64,
    start: u64,
    /// The submitter's tag of the operation that an abort aborts.
    target: u64,
    busy: bool,
    /// Time of the last reaction to its being late; 0 if there was none.
    acted: u64,
}

impl BdevChannel {
    pub(super) fn new(
        inner: Box<dyn IoChannel>,
        entry: Arc<Entry>,
        stats: Arc<ChannelStats>,
    ) -> BdevChannel {
        BdevChannel {
            inner,
            entry,
            stats,
            clock: Clock::get(),
            slots: Vec::new(),
            free: Vec::new(),
            spans: Vec::new(),
            own_in_flight: 0,
            own_tag: OWN,
            ending: false,
            polls: 0,
        }
    }

    #[cold]
    fn grow(&mut self) -> u32 {
        let i = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
        let idle = Flying {
            tag: 0,
            start: 0,
            target: 0,
            busy: false,
            acted: 0,
        };
        self.slots.push(idle);
        i
    }

    /// Submits an operation of the channel's own. Returns `false` when the device is too busy.
    fn own(&mut self, op: Op) -> bool {
        self.own_tag = OWN | self.own_tag.wrapping_add(1);
        match self.inner.submit(self.own_tag, op) {
            Ok(()) => self.own_in_flight += 1,
            Err(SubmitError::Busy(_)) => return false,
            Err(SubmitError::Refused(op, error)) => {
                let kind = op.kind();
                tracing::warn!(%error, %kind, "the abort or reset of late operations was refused");
            }
        }
        true
    }

    /// Does checks that are not needed for each completion.
    #[cold]
    fn look_around(&mut self) {
        if self.entry.is_removed() && !self.ending {
            // A reset ends operations that a module holds back. If the device is too busy, it is
            // asked again.
            let has_reset = self.entry.dev.info().ops.has(OpKind::Reset);
            self.ending = self.inner.in_flight() == 0 || !has_reset || self.own(Op::Reset);
        }
        let limit = self.entry.timeout_ticks.load(Ordering::Relaxed);
        if limit == 0 {
            return;
        }
        let now = self.clock.now();
        let action = *self.entry.timeout_action.lock();
        let is_late = |s: &Flying| match s.acted {
            0 => now.saturating_sub(s.start) > limit,
            // An abort may have come too early or too late for the device: ask again.
            acted => action == TimeoutAction::Abort && now.saturating_sub(acted) > limit,
        };
        let late: Vec<usize> = (0..self.slots.len())
            .filter(|i| self.slots[*i].busy && is_late(&self.slots[*i]))
            .collect();
        if late.is_empty() {
            return;
        }
        // One reset is enough for all of them.
        if action == TimeoutAction::Reset && !self.own(Op::Reset) {
            return; // too busy: at the next look
        }
        for i in late {
            if action == TimeoutAction::Abort && !self.own(Op::Abort { tag: i as u64 }) {
                return;
            }
            self.slots[i].acted = now.max(1);
            let device = &self.entry.dev.info().name;
            let tag = self.slots[i].tag;
            let us = self.clock.to_ns(now - self.slots[i].start) / 1000;
            tracing::warn!(device, tag, us, ?action, "an operation is late");
        }
    }

    #[cold]
    fn trace_submit(&mut self, slot: usize, tag: u64, op: &Op) -> tracing::Span {
        let info = self.entry.dev.info();
        let span = tracing::trace_span!(
            target: "pumice_bdev::io", "io",
            bdev = %info.name, op = %op.kind(), lba = op.lba(),
            len_bytes = op.len_bytes(info.block_size), tag,
        );
        span.in_scope(|| tracing::trace!(target: "pumice_bdev::io", fua = op.fua(), "submit"));
        if self.spans.len() <= slot {
            self.spans.resize(slot + 1, None);
        }
        self.spans[slot] = Some(span.clone());
        span
    }

    #[cold]
    fn trace_complete(&mut self, slot: usize, latency: u64, completion: &Completion) {
        if let Some(span) = self.spans.get_mut(slot).and_then(Option::take) {
            let ns = self.clock.to_ns(latency);
            span.in_scope(|| match &completion.result {
                Ok(()) => tracing::trace!(target: "pumice_bdev::io", ns, "complete"),
                Err(error) => tracing::trace!(target: "pumice_bdev::io", ns, %error, "failed"),
            });
        }
    }

    #[cold]
    fn failed(&self, completion: &Completion) {
        let Err(error) = &completion.result else {
            return;
        };
        tracing::debug!(%error, "I/O failed");
        if error.kind == IoErrorKind::Removed {
            self.entry.surprise();
        }
    }
}

impl IoChannel for BdevChannel {
    #[inline]
    fn submit(&mut self, tag: u64, mut op: Op) -> Result<(), SubmitError> {
        if self.entry.is_removed() {
            let e = self.entry.dev.info().error(&op, IoErrorKind::Removed, "");
            return refuse(op, e);
        }
        let i = match self.free.pop() {
            Some(i) => i,
            None => self.grow(),
        };
        let slot = i as usize;
        let mut target = 0;
        if let Op::Abort { tag } = &mut op {
            target = *tag;
            let found = self.slots.iter().position(|s| s.busy && s.tag == target);
            *tag = found.map_or(OWN - 1, |i| i as u64);
        }
        let start = self.clock.now();
        let result = if tracing::enabled!(target: "pumice_bdev::io", tracing::Level::TRACE) {
            let span = self.trace_submit(slot, tag, &op);
            span.in_scope(|| self.inner.submit(u64::from(i), op))
        } else {
            self.inner.submit(u64::from(i), op)
        };
        match result {
            Ok(()) => {
                self.slots[slot] = Flying {
                    tag,
                    start,
                    target,
                    busy: true,
                    acted: 0,
                };
                self.stats.set_in_flight(self.in_flight());
                Ok(())
            }
            Err(mut e) => {
                self.free.push(i);
                e.op_mut().set_abort_target(Some(target));
                if let SubmitError::Refused(_, error) = &e
                    && error.kind == IoErrorKind::Removed
                {
                    self.entry.surprise();
                }
                Err(e)
            }
        }
    }

    #[inline]
    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(LATE_EVERY) || (self.entry.is_removed() && !self.ending) {
            self.look_around();
        }
        let before = out.len();
        let mut n = self.inner.poll(out);
        if n == 0 {
            return 0;
        }
        if self.own_in_flight > 0 {
            let mut i = before;
            while i < out.len() {
                if out[i].tag & OWN != 0 {
                    out.remove(i);
                    self.own_in_flight -= 1;
                    n -= 1;
                } else {
                    i += 1;
                }
            }
        }
        let now = self.clock.now();
        let block_size = self.entry.block_size;
        for completion in &mut out[before..] {
            #[expect(clippy::cast_possible_truncation, reason = "a slot's number")]
            let i = completion.tag as u32;
            let slot = &mut self.slots[i as usize];
            slot.busy = false;
            let (start, target) = (slot.start, slot.target);
            completion.tag = slot.tag;
            self.free.push(i);
            let (kind, bytes) = match &completion.op {
                Op::Read { buf, .. } => (OpKind::Read, buf.len() as u64),
                Op::Write { data, .. } => (OpKind::Write, data.len() as u64),
                op => (op.kind(), op.len_bytes(block_size)),
            };
            completion.op.set_abort_target(Some(target));
            let latency = now.saturating_sub(start);
            self.stats
                .record(kind, bytes, completion.result.is_ok(), latency);
            if !self.spans.is_empty() {
                self.trace_complete(i as usize, latency, completion);
            }
            if completion.result.is_err() {
                self.failed(completion);
            }
        }
        self.stats.set_in_flight(self.in_flight());
        n
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        let mut timeout = timeout;
        if self.entry.timeout_ticks.load(Ordering::Relaxed) > 0 {
            // Late operations are looked for at least this often, so the channel below must not block.
            self.look_around();
            timeout = timeout.min(Duration::from_millis(5));
        }
        self.inner.wait(timeout)
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.event_fd()
    }
}

impl Drop for BdevChannel {
    fn drop(&mut self) {
        self.entry.channel_closed(&self.stats);
    }
}
