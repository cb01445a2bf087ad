//! Both rings of a queue pair: their doorbells, their interrupt, and the state of the controller
//! for which they are valid.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::interrupt::Interrupt;
use super::ring::{CompletionRing, SubmissionRing};
use super::shared::QueueShared;
use crate::controller::state::{self, Phase};
use crate::controller::{Core, Lifecycle, Link};
use crate::spec::Completion;

/// The rings.
#[derive(Debug)]
pub(super) struct Rings {
    pub core: Arc<Core>,
    pub link: Arc<Link>,
    life: Arc<Lifecycle>,
    pub shared: Arc<QueueShared>,
    /// The controller's state word for which they are valid.
    seen: u64,
    sq: SubmissionRing,
    cq: CompletionRing,
    interrupt: Interrupt,
    completions: u64,
    sleeps: u64,
    interrupts: u64,
}

/// Counters of the rings.
pub(super) struct RingStats {
    pub sq_doorbells: u64,
    pub cq_doorbells: u64,
    pub completions: u64,
    pub sleeps: u64,
    pub interrupts: u64,
    pub interrupt_switches: u64,
}

impl Rings {
    pub fn new(
        core: Arc<Core>,
        shared: Arc<QueueShared>,
        word: u64,
        sq: SubmissionRing,
        cq: CompletionRing,
    ) -> Rings {
        Rings {
            link: Arc::clone(&core.link),
            life: Arc::clone(&core.life),
            core,
            seen: word,
            sq,
            cq,
            interrupt: Interrupt::new(shared.vector),
            completions: 0,
            sleeps: 0,
            interrupts: 0,
            shared,
        }
    }

    pub fn stats(&self) -> RingStats {
        RingStats {
            sq_doorbells: self.sq.rings(),
            cq_doorbells: self.cq.rings(),
            completions: self.completions,
            sleeps: self.sleeps,
            interrupts: self.interrupts,
            interrupt_switches: self.interrupt.switches(),
        }
    }

    /// Returns the controller's state word.
    #[inline]
    pub fn state(&self) -> u64 {
        self.life.word()
    }

    /// Whether the rings are valid in the controller's state.
    #[inline]
    pub fn are_valid(&self) -> bool {
        self.state() == self.seen
    }

    /// Whether the controller's state has changed, and a reset has ended.
    pub fn are_outdated(&self) -> bool {
        let word = self.state();
        word != self.seen && state::phase(word) != Phase::Resetting
    }

    /// Writes a command to the submission queue.
    #[inline]
    pub fn push(&mut self, words: [u64; 8]) {
        self.sq.push(words);
    }

    /// Takes a completion, if one has arrived.
    #[inline]
    pub fn pop(&mut self) -> Option<Completion> {
        self.cq.pop()
    }

    /// Counts a completion that names a command.
    #[inline]
    pub fn count(&mut self) {
        self.completions += 1;
    }

    /// Whether the head of the submission queue in a completion is possible.
    #[inline]
    pub fn has_entry(&self, sq_head: u16) -> bool {
        sq_head < self.sq.entries()
    }

    /// Whether a completion has arrived.
    #[inline]
    pub fn any_completion(&self) -> bool {
        self.cq.is_ready()
    }

    /// Rings the doorbells if that is worthwhile.
    #[inline]
    pub fn ring_if_worthwhile(&mut self) {
        if self.sq.is_dirty() || self.cq.wants_ack() {
            self.ring();
        }
    }

    /// Writes the doorbells, unless a reset has begun: the registers may then belong to another
    /// generation of the queues.
    #[inline]
    fn ring(&mut self) {
        let Self {
            shared,
            life,
            cq,
            sq,
            seen,
            ..
        } = self;
        shared.ringing.while_in(&life.state, *seen, || {
            // Make room for completions before there are more commands to complete.
            if cq.wants_ack() {
                cq.ack();
            }
            sq.ring();
        });
    }

    /// Rings the doorbells and acknowledges every consumed entry: before a sleep the controller
    /// must not believe that the queue is fuller than it is.
    pub fn ring_all(&mut self) {
        if self.sq.is_dirty() || self.cq.has_unacked() {
            self.ring();
        }
        let Self {
            shared,
            life,
            cq,
            seen,
            ..
        } = self;
        if cq.has_unacked() {
            shared.ringing.while_in(&life.state, *seen, || cq.ack());
        }
    }

    /// Starts again on the memory of this number, in the controller's state `word`.
    pub fn restart(&mut self, word: u64, memory: usize) {
        let (sq_shadow, cq_shadow) = self.core.queues.shadow.of(self.shared.qid);
        self.sq.restart(sq_shadow);
        let memory = Arc::clone(&self.shared.cq_mem[memory]);
        self.cq.restart(memory, cq_shadow);
        self.seen = word;
        self.interrupt_on();
    }

    /// Switches the interrupt on, for a sleep and for the vector's next user.
    pub fn interrupt_on(&mut self) {
        self.interrupt.on(&self.link);
    }

    /// Switches the interrupt off when the thread polls.
    pub fn interrupt_off_while_polling(&mut self) {
        self.interrupt
            .off_while_polling(&self.link, self.completions);
    }

    /// Sleeps for at most `slice`, until the queue's interrupt (or in short naps, where there is
    /// none), unless there is something to do already.
    pub fn sleep(&mut self, slice: Duration, ready: impl Fn(&Rings) -> bool) {
        self.interrupt_on();
        let slice = match self.interrupt.is_off() {
            true => slice.min(Duration::from_millis(1)),
            false => slice,
        };
        self.sleeps += 1;
        if let Some(interrupt) = self.shared.interrupt.clone() {
            interrupt.arm(true);
            interrupt.drain();
            if !ready(self) && interrupt.wait(slice) {
                self.interrupts += 1;
            }
            interrupt.arm(false);
            self.interrupt.slept(self.completions);
            return;
        }
        let end = Instant::now() + slice;
        let mut nap = Duration::from_micros(20);
        while !ready(self) && Instant::now() < end {
            std::thread::sleep(nap);
            nap = (nap * 2).min(Duration::from_millis(1));
        }
    }
}
