//! Commands that have ended and are to be sent again.

use std::collections::VecDeque;
use std::time::Instant;

/// The slots of such commands, with the time of each.
#[derive(Debug, Default)]
pub(super) struct Retries(VecDeque<(Instant, u16)>);

impl Retries {
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn add(&mut self, when: Instant, slot: u16) {
        self.0.push_back((when, slot));
    }

    /// Takes a slot whose time has come.
    pub fn take_due(&mut self, now: Instant) -> Option<u16> {
        let at = self.0.iter().position(|(when, _)| *when <= now)?;
        self.0.remove(at).map(|(_, slot)| slot)
    }

    /// Returns the time of the next one.
    pub fn next(&self) -> Option<Instant> {
        self.0.iter().map(|(when, _)| *when).min()
    }

    pub fn forget(&mut self, slot: u16) {
        self.0.retain(|(_, s)| *s != slot);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }
}
