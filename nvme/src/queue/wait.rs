//! Waiting for completions: spin while that is worthwhile, then sleep until the interrupt.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::pair::QueuePair;
use crate::controller::state::{self, Phase};
use crate::error::{Cause, NvmeError};

/// Adapts the time to spin to the waits of the recent past.
#[derive(Debug)]
pub(crate) struct Spin {
    /// Moving average of the waits, in nanoseconds.
    average_ns: u64,
    waits: u32,
}

impl Spin {
    pub fn new() -> Spin {
        Spin {
            average_ns: 5_000,
            waits: 0,
        }
    }

    /// Returns how long to spin now: about twice the usual wait, hardly at all when waits are
    /// usually longer than `max`, and occasionally `max` itself, to notice that they became
    /// shorter.
    fn budget(&mut self, max: Duration) -> Duration {
        self.waits = self.waits.wrapping_add(1);
        let max_ns = u64::try_from(max.as_nanos()).unwrap_or(u64::MAX);
        if self.waits.is_multiple_of(64) {
            return max;
        }
        if self.average_ns > max_ns {
            return max / 16;
        }
        Duration::from_nanos((self.average_ns * 2 + 2_000).min(max_ns))
    }

    fn learn(&mut self, took: Duration) {
        let took = u64::try_from(took.as_nanos())
            .unwrap_or(u64::MAX)
            .min(1_000_000_000);
        self.average_ns = self.average_ns - self.average_ns / 8 + took / 8;
    }
}

/// Number of completions after the last sleep from which the thread counts as one that polls.
const POLLING_COMPLETIONS: u64 = 1024;

/// State of the queue's interrupt vector.
#[derive(Debug)]
pub(crate) struct Interrupting {
    /// Whether this queue pair has switched its vector off.
    off: bool,
    /// The count of completions at the last sleep.
    since: u64,
}

impl Interrupting {
    pub fn new() -> Interrupting {
        Interrupting {
            off: false,
            since: 0,
        }
    }
}

/// The longest single sleep, so that time-outs and a lost interrupt are noticed.
const SLICE_MAX: Duration = Duration::from_millis(500);

impl QueuePair {
    /// Blocks until [`poll`](Self::poll) may have something to hand back or to do, or until
    /// `timeout` is over. Rings the doorbells first. Spins for a bounded time that follows the
    /// recent waits, then sleeps until the queue's interrupt (or in short naps, where there is
    /// none). Returns at once when nothing is in flight, except while the controller is being
    /// reset, whose end it waits for.
    ///
    /// # Errors
    /// Fails when the controller is gone and everything has been handed back.
    pub fn wait(&mut self, timeout: Duration) -> Result<(), NvmeError> {
        if !self.core.birth.is_here() {
            return Err(self.core.gone(Cause::OtherProcess));
        }
        let word = self.core.state.load(Ordering::Acquire);
        if state::phase(word) == Phase::Resetting && self.backlog.is_empty() && self.dead.is_none()
        {
            // Until the reset ends there is nothing to hand back and nothing can be submitted.
            self.core.wait_changed(word, timeout.min(SLICE_MAX));
            return Ok(());
        }
        if self.ready() {
            return Ok(());
        }
        if let Some(kind) = self.dead {
            return Err(self.core.gone(kind));
        }
        if self.sq.is_dirty() || self.cq.has_unacked() {
            self.ring_all();
        }
        if self.slots.in_use() == 0 && self.waiting_splits.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        let budget = self.spin.budget(self.options.spin_max).min(timeout);
        loop {
            for _ in 0..32 {
                if self.ready() {
                    self.spin.learn(start.elapsed());
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= budget {
                break;
            }
        }
        self.sleep(start, timeout);
        self.spin.learn(start.elapsed());
        Ok(())
    }

    /// Whether `poll` has something to do.
    #[inline]
    fn ready(&self) -> bool {
        self.cq.is_ready()
            || !self.backlog.is_empty()
            || (self.dead.is_none() && self.state_changed())
    }

    fn state_changed(&self) -> bool {
        let word = self.core.state.load(Ordering::Acquire);
        word != self.seen && state::phase(word) != Phase::Resetting
    }

    /// Rings the doorbells and acknowledges every consumed entry: before a sleep the controller
    /// must not believe that the queue is fuller than it is.
    pub(super) fn ring_all(&mut self) {
        self.ring();
        let Self {
            shared,
            core,
            cq,
            seen,
            ..
        } = self;
        if cq.has_unacked() {
            shared.ringing.while_in(&core.state, *seen, || cq.ack());
        }
    }

    /// Switches the interrupt off when the thread finds its completions by polling: each interrupt
    /// would cost the kernel about as much as the I/O itself.
    pub(super) fn interrupt_off_while_polling(&mut self) {
        let polled = self.stats.completions - self.interrupting.since;
        if !self.interrupting.off && polled >= POLLING_COMPLETIONS {
            self.interrupting.since = self.stats.completions;
            self.switch_interrupt(false);
        }
    }

    /// Switches the interrupt on again, for a sleep, after a reset has set up the vector again, and
    /// for its next user.
    pub(super) fn interrupt_on(&mut self) {
        if self.interrupting.off {
            self.switch_interrupt(true);
        }
    }

    fn switch_interrupt(&mut self, on: bool) {
        let Some(vector) = self.shared.vector else {
            return;
        };
        match self.core.transport.switch_interrupt(vector, on) {
            Ok(true) => {
                self.interrupting.off = !on;
                self.stats.interrupt_switches += 1;
            }
            Ok(false) => {}
            Err(error) => {
                tracing::debug!(device = self.core.name(), vector, on, %error, "interrupt not switched");
            }
        }
    }

    fn sleep(&mut self, start: Instant, timeout: Duration) {
        let mut slice = timeout
            .saturating_sub(start.elapsed())
            .min(SLICE_MAX)
            .min(self.until_tick().max(Duration::from_micros(50)));
        if slice.is_zero() {
            self.polls |= 0x3f;
            return;
        }
        self.interrupt_on();
        if self.interrupting.off {
            slice = slice.min(Duration::from_millis(1));
        }
        self.stats.sleeps += 1;
        if let Some(interrupt) = self.shared.interrupt.clone() {
            interrupt.arm(true);
            interrupt.drain();
            if !self.ready() && interrupt.wait(slice) {
                self.stats.interrupts += 1;
            }
            interrupt.arm(false);
            self.interrupting.since = self.stats.completions;
        } else {
            let end = Instant::now() + slice;
            let mut nap = Duration::from_micros(20);
            while !self.ready() && Instant::now() < end {
                std::thread::sleep(nap);
                nap = (nap * 2).min(Duration::from_millis(1));
            }
        }
        // The next poll looks at the clock.
        self.polls |= 0x3f;
    }
}
