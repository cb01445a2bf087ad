//! Time-outs of commands.

use std::time::{Duration, Instant};

use super::shared::QueueShared;
use super::slot::{SlotState, Slots};
use super::stats::QueueStats;
use crate::controller::Core;
use crate::error::millis;
use crate::spec::decode;

/// A queue pair's clock, and when to look at it.
#[derive(Debug)]
pub(super) struct Watch {
    epoch: Instant,
    timeout_ms: u64,
    next_ms: u64,
}

impl Watch {
    pub fn new(timeout: Duration) -> Watch {
        Watch {
            epoch: Instant::now(),
            timeout_ms: millis(timeout).max(1),
            next_ms: 0,
        }
    }

    /// Looks for commands that exceed their time-out, and asks for their abort, later for a reset.
    /// Does next to nothing unless it is time to look.
    pub fn look(
        &mut self,
        core: &Core,
        queue: &QueueShared,
        slots: &mut Slots,
        stats: &mut QueueStats,
    ) {
        let now = millis(self.epoch.elapsed());
        if now < self.next_ms {
            return;
        }
        let timeout = self.timeout_ms;
        self.next_ms = now + (timeout / 8).clamp(1, 1000);
        if slots.in_use() == 0 {
            return;
        }
        for slot in slots.numbers() {
            let entry = &mut slots[slot];
            if !entry.is_sent() {
                continue;
            }
            if entry.deadline_ms == 0 {
                entry.deadline_ms = now + timeout;
                continue;
            }
            if now < entry.deadline_ms {
                continue;
            }
            let text = decode::io_command(queue.qid, &entry.command()).to_string();
            if entry.state == SlotState::InFlight {
                entry.state = SlotState::Overdue;
                // The abort gets half of the time-out to take effect.
                entry.deadline_ms = now + (timeout / 2).max(1);
                stats.timeouts += 1;
                tracing::warn!(
                    device = core.link.name(),
                    command = %text,
                    timeout_ms = timeout,
                    "no completion in time; aborting"
                );
                core.requests.abort(queue.qid, entry.cid());
            } else {
                entry.deadline_ms = now + timeout;
                core.requests
                    .reset(&format!("{text}: neither completed nor aborted in time"));
            }
        }
    }

    /// Returns the time until [`look`](Self::look) has something to do.
    pub fn until_next(&self) -> Duration {
        let now = millis(self.epoch.elapsed());
        Duration::from_millis(self.next_ms.saturating_sub(now))
    }
}
