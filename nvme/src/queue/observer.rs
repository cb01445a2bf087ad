//! Latencies, and log records of commands at trace level. Each record is inside the span that was
//! current when its I/O was submitted, so that one operation can be followed down to its
//! completion.

use std::time::Instant;

use hdrhistogram::Histogram;
use tracing::{Level, Span};

use super::slot::Slot;
use crate::spec::{Completion, decode};

/// The target of the log records.
macro_rules! target {
    () => {
        "pumice_nvme::io"
    };
}

/// Records how long commands take, and logs them, where either is wanted.
#[derive(Debug)]
pub(super) struct Observer {
    epoch: Instant,
    histogram: Option<Box<Histogram<u64>>>,
    /// The span that submitted each slot's I/O, while commands are logged.
    spans: Vec<Option<Span>>,
    /// Whether latencies are recorded or commands were logged.
    observes: bool,
}

impl Observer {
    /// Makes one that records latencies, or only logs.
    pub fn new(latencies: bool) -> Observer {
        // The histogram covers one nanosecond to one minute with two significant digits.
        let histogram = || Histogram::new_with_bounds(1, 60_000_000_000, 2).ok();
        let histogram = latencies.then(histogram).flatten().map(Box::new);
        Observer {
            epoch: Instant::now(),
            observes: histogram.is_some(),
            histogram,
            spans: Vec::new(),
        }
    }

    /// Latencies in nanoseconds, if they are recorded.
    pub fn histogram(&self) -> Option<&Histogram<u64>> {
        self.histogram.as_deref()
    }

    /// Whether completions have to be shown to it.
    #[inline]
    pub fn observes(&self) -> bool {
        self.observes
    }

    /// Whether a command that is sent has to be shown to it. Costs a load and a branch when
    /// commands are not logged.
    #[inline]
    pub fn wants_commands(&self) -> bool {
        self.histogram.is_some() || tracing::enabled!(target: target!(), Level::TRACE)
    }

    /// Sees a command that goes into the submission queue.
    #[cold]
    pub fn sent(&mut self, device: &str, qid: u16, number: u16, slot: &mut Slot) {
        if self.histogram.is_some() {
            slot.started_ns = self.now_ns();
        }
        if !tracing::enabled!(target: target!(), Level::TRACE) {
            return;
        }
        self.observes = true;
        let at = usize::from(number);
        if self.spans.len() <= at {
            self.spans.resize(at + 1, None);
        }
        let span = Span::current();
        tracing::trace!(
            target: target!(),
            device,
            cid = slot.cid(),
            command = %decode::io_command(qid, &slot.command()),
            "nvme command"
        );
        self.spans[at] = Some(span);
    }

    /// Sees a completion that was taken from the completion queue.
    pub fn completed(&mut self, device: &str, number: u16, completion: &Completion) {
        if self.spans.is_empty() {
            return;
        }
        let span = self
            .spans
            .get_mut(usize::from(number))
            .and_then(Option::take);
        span.unwrap_or_else(Span::none).in_scope(|| {
            tracing::trace!(
                target: target!(),
                device,
                cid = completion.cid,
                completion = %decode::completion(completion),
                "nvme completion"
            );
        });
    }

    /// Records the latency of a command that succeeded.
    pub fn succeeded(&mut self, started_ns: u64) {
        if self.histogram.is_none() {
            return;
        }
        let took_ns = self.now_ns().saturating_sub(started_ns).max(1);
        if let Some(histogram) = &mut self.histogram {
            histogram.saturating_record(took_ns);
        }
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}
