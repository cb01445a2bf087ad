//! Counters of a queue pair.

use super::rings::RingStats;

/// Counters of a queue pair since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct QueueStats {
    /// Commands written to the submission queue, retries included.
    pub commands: u64,
    /// Completions consumed.
    pub completions: u64,
    /// Writes to the submission doorbell register.
    pub sq_doorbells: u64,
    /// Writes to the completion doorbell register.
    pub cq_doorbells: u64,
    /// Commands sent again.
    pub retries: u64,
    /// Commands that exceeded their time-out.
    pub timeouts: u64,
    /// Controller resets that this queue pair went through.
    pub resets: u64,
    /// Times that `wait` went to sleep.
    pub sleeps: u64,
    /// Sleeps that an interrupt ended.
    pub interrupts: u64,
    /// Number of times that the queue's interrupt vector was switched off for a polling thread, or
    /// on again.
    pub interrupt_switches: u64,
}

impl QueueStats {
    /// Returns the counters with those of the rings.
    pub(super) fn with(self, rings: &RingStats) -> QueueStats {
        QueueStats {
            completions: rings.completions,
            sq_doorbells: rings.sq_doorbells,
            cq_doorbells: rings.cq_doorbells,
            sleeps: rings.sleeps,
            interrupts: rings.interrupts,
            interrupt_switches: rings.interrupt_switches,
            ..self
        }
    }
}
