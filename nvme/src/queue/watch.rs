//! Time-outs of commands.

use std::time::{Duration, Instant};

use super::shared::QueueShared;
use super::slot::{Slot, SlotState, Slots};
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

/// The means against a command that takes too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Late {
    Abort,
    Reset,
}

/// Looks at a slot at the time `now_ms`. A command gets its time from the first look on.
fn look_at(slot: &mut Slot, now_ms: u64, timeout_ms: u64) -> Option<Late> {
    if !slot.is_sent() {
        return None;
    }
    if slot.deadline_ms == 0 {
        slot.deadline_ms = now_ms + timeout_ms;
        return None;
    }
    if now_ms < slot.deadline_ms {
        return None;
    }
    if slot.state == SlotState::InFlight {
        slot.state = SlotState::Overdue;
        // The abort gets half of the time-out to take effect.
        slot.deadline_ms = now_ms + (timeout_ms / 2).max(1);
        return Some(Late::Abort);
    }
    slot.deadline_ms = now_ms + timeout_ms;
    Some(Late::Reset)
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
            let Some(late) = look_at(entry, now, timeout) else {
                continue;
            };
            let text = decode::io_command(queue.qid, &entry.command()).to_string();
            match late {
                Late::Abort => {
                    stats.timeouts += 1;
                    tracing::warn!(
                        device = core.link.name(),
                        command = %text,
                        timeout_ms = timeout,
                        "no completion in time; aborting"
                    );
                    core.requests.abort(queue.qid, entry.cid());
                }
                Late::Reset => {
                    core.requests
                        .reset(&format!("{text}: neither completed nor aborted in time"));
                }
            }
        }
    }

    /// Returns the time until [`look`](Self::look) has something to do.
    pub fn until_next(&self) -> Duration {
        let now = millis(self.epoch.elapsed());
        Duration::from_millis(self.next_ms.saturating_sub(now))
    }
}

#[cfg(test)]
mod tests {
    use pumice_io::Op;

    use super::*;

    /// The abort comes after the time-out, the first reset half of one later, and further ones at each time-out.
    #[test]
    fn a_command_has_its_time() {
        let mut slots = Slots::new(1, 2);
        let (number, slot) = slots.take().expect("free");
        slot.begin([0; 8], 0, 7, Op::Flush);
        let mut acts = Vec::new();
        for now in 50..=500 {
            let act = look_at(&mut slots[number], now, 100);
            acts.extend(act.map(|act| (now, act)));
        }
        let resets = [200, 300, 400, 500].map(|now| (now, Late::Reset));
        assert_eq!(acts[0], (150, Late::Abort));
        assert_eq!(acts[1..], resets);
    }

    /// A free slot, or one whose command waits to be sent again, is not late.
    #[test]
    fn what_the_controller_does_not_have_is_not_late() {
        let mut slots = Slots::new(1, 2);
        let (number, slot) = slots.take().expect("free");
        slot.begin([0; 8], 0, 7, Op::Flush);
        for state in [SlotState::Retrying, SlotState::Free] {
            (slots[number].state, slots[number].deadline_ms) = (state, 0);
            for now in [1, 1_000, 1_000_000] {
                assert_eq!(look_at(&mut slots[number], now, 100), None);
            }
        }
    }
}
