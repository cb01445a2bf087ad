//! The state that a queue pair's owner shares with the controller's reset.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};
use pumice_io::sys::{EventFd, barrier};

use super::ring::QueueMem;
use crate::dma::DmaShared;
use crate::spec::QueuePriority;

/// The part of a queue pair from which the controller creates its queues again.
///
/// There is memory for two completion queues: a reset creates the queue on the other one, so that
/// the owner can still read what was completed before the reset. Further resets, before the owner
/// has caught up, leave the one that it reads alone.
#[derive(Debug)]
pub(crate) struct QueueShared {
    pub qid: u16,
    pub sq_entries: u16,
    pub cq_entries: u16,
    pub vector: Option<u16>,
    pub interrupt: Option<Arc<EventFd>>,
    pub priority: QueuePriority,
    pub sq_mem: QueueMem,
    pub sq_address: u64,
    pub cq_mem: [Arc<DmaShared>; 2],
    pub cq_address: [u64; 2],
    /// Whether the owner is writing doorbells.
    pub ringing: Ringing,
    /// Lock order: after the controller's registry of queues.
    pub bank: Mutex<Bank>,
}

/// The completion queue memory in use, and whether the device has the queues.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bank {
    pub current: usize,
    pub created: bool,
    /// Whether the owner's rings are on the current memory.
    pub joined: bool,
}

/// Whether a queue pair's owner is writing doorbells.
///
/// The registers belong to the queues of one generation. So a reset first changes the controller's
/// state word and then waits for every owner that looked at it before. See [`barrier`] for why one
/// of the two sees the other.
#[derive(Debug, Default)]
pub(crate) struct Ringing(AtomicBool);

impl Ringing {
    /// Writes doorbells by `write`, unless the controller's state is no longer the one in which the
    /// queues were created.
    #[inline]
    pub fn while_in(&self, state: &AtomicU64, seen: u64, write: impl FnOnce()) {
        self.0.store(true, Ordering::Relaxed);
        barrier::light();
        if state.load(Ordering::Acquire) == seen {
            write();
        }
        self.0.store(false, Ordering::Release);
    }

    /// Waits until the owner writes no doorbell.
    fn wait(&self) {
        while self.0.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    }
}

/// Stops the owners of queue pairs from writing doorbells: changes the controller's state by
/// `change`, then waits for those who looked at it before. A pair that `queues` does not have yet
/// finds the new state.
pub(crate) fn freeze<Q>(
    change: impl FnOnce(),
    queues: impl FnOnce() -> Vec<Q>,
    ringing: impl Fn(&Q) -> &Ringing,
) {
    change();
    barrier::heavy();
    for q in queues() {
        ringing(&q).wait();
    }
}

/// Locks the bank of a queue pair whose controller is in the state `word`. Returns `None` when it
/// no longer is: then a further reset has begun, which decides about the queues under this lock.
/// The state does not change the bank while the lock is held.
pub(crate) fn bank_in<'a, B>(
    bank: &'a Mutex<B>,
    state: &AtomicU64,
    word: u64,
) -> Option<MutexGuard<'a, B>> {
    bank_while(bank, || state.load(Ordering::Acquire) == word)
}

fn bank_while<B>(bank: &Mutex<B>, holds: impl FnOnce() -> bool) -> Option<MutexGuard<'_, B>> {
    let guard = bank.lock();
    holds().then_some(guard)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::controller::state::{Phase, word};

    #[test]
    fn no_doorbell_is_written_once_a_reset_has_begun() {
        let (ringing, seen) = (Ringing::default(), word(7, Phase::Live));
        let state = AtomicU64::new(seen);
        let mut writes = 0;
        ringing.while_in(&state, seen, || {
            assert!(ringing.0.load(Ordering::Relaxed), "the reset has to wait");
            writes += 1;
        });
        ringing.wait();
        for later in [
            word(8, Phase::Resetting),
            word(8, Phase::Live),
            word(9, Phase::Removed),
        ] {
            state.store(later, Ordering::SeqCst);
            ringing.while_in(&state, seen, || writes += 1);
            ringing.wait();
        }
        assert_eq!(writes, 1);
    }

    /// The state is looked at when the lock is held: a reset that begins before that may have
    /// found the bank as it is, or changed it.
    #[test]
    fn the_state_is_looked_at_under_the_banks_lock() {
        let bank = Mutex::new(());
        let mut looked = false;
        let guard = bank_while(&bank, || {
            looked = true;
            assert!(bank.try_lock().is_none(), "the bank may change meanwhile");
            true
        });
        assert!(looked && guard.is_some());
        drop(guard);
        let state = AtomicU64::new(word(7, Phase::Live));
        assert!(bank_in(&bank, &state, word(7, Phase::Live)).is_some());
        for later in [word(8, Phase::Resetting), word(8, Phase::Live)] {
            state.store(later, Ordering::SeqCst);
            assert!(bank_in(&bank, &state, word(7, Phase::Live)).is_none());
        }
        assert!(bank.try_lock().is_some(), "the bank stays locked");
    }

    /// A reset changes the state and waits then. An owner who is writing sees that it has begun, and one who comes after the
    /// wait does not find the old state.
    #[test]
    fn a_reset_changes_the_state_before_it_waits_for_owners() {
        let (ringing, seen) = (Ringing::default(), word(7, Phase::Live));
        let (state, later) = (AtomicU64::new(seen), word(8, Phase::Resetting));
        let has_begun = || state.load(Ordering::SeqCst) == later;
        let reset = || {
            let queues = || {
                assert!(has_begun(), "the state is still the old one");
                vec![&ringing]
            };
            freeze(|| state.store(later, Ordering::SeqCst), queues, |q| *q);
        };
        let (mut begun, mut waits) = (false, false);
        std::thread::scope(|scope| {
            ringing.while_in(&state, seen, || {
                let thread = scope.spawn(reset);
                while !has_begun() && !thread.is_finished() {
                    std::thread::yield_now();
                }
                // It has time to end, if it does not wait.
                std::thread::sleep(Duration::from_millis(20));
                (begun, waits) = (has_begun(), !thread.is_finished());
            });
        });
        assert!(begun && waits, "begun: {begun}, waits: {waits}");
        ringing.while_in(&state, seen, || panic!("the reset has begun"));
    }
}
