//! The two rings of a queue pair and their doorbells.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use pumice_io::sys::{Doorbell, MmioMap};

use crate::dma::{DmaShared, Entries};
use crate::spec::Completion;

/// Where a queue's entries lie.
#[derive(Debug, Clone)]
pub(crate) enum QueueMem {
    /// In the host's memory.
    Host(Arc<DmaShared>),
    /// In the controller's memory buffer, from this byte on.
    Controller(MmioMap, usize),
}

/// A doorbell, with its shadow when the controller has taken a doorbell buffer.
#[derive(Debug)]
pub(crate) struct Bell {
    mmio: Doorbell,
    shadow: Option<Shadow>,
    last: u16,
    /// Writes to the register, for statistics.
    pub rings: u64,
}

/// A queue's words in the shadow doorbell and event index pages (Base section 5.8, B.5).
#[derive(Debug, Clone)]
pub(crate) struct Shadow {
    pub values: Arc<DmaShared>,
    pub events: Arc<DmaShared>,
    pub index: usize,
}

impl Shadow {
    /// Sets the queue's shadow doorbell and event index to 0; the queue does not exist.
    pub fn clear(&self) {
        for page in [&self.values, &self.events] {
            if let Some(word) = page.as_u32().get(self.index) {
                word.store(0, Ordering::Relaxed);
            }
        }
    }
}

impl Bell {
    pub fn new(mmio: Doorbell, shadow: Option<Shadow>) -> Bell {
        Bell {
            mmio,
            shadow,
            last: 0,
            rings: 0,
        }
    }

    /// Tells the controller a new tail or head.
    #[inline]
    pub fn ring(&mut self, value: u16) {
        if let Some(shadow) = &self.shadow {
            let old = std::mem::replace(&mut self.last, value);
            let (Some(word), Some(event)) = (
                shadow.values.as_u32().get(shadow.index),
                shadow.events.as_u32().get(shadow.index),
            ) else {
                return;
            };
            if !announce::<Hardware>(word, event, value, old) {
                return;
            }
        }
        self.rings += 1;
        self.mmio.ring(u32::from(value));
    }
}

/// The accesses of [`announce`], apart from it, so that a model can try all their orders.
trait Memory {
    type Word;
    /// Release.
    fn store(word: &Self::Word, value: u32);
    /// Relaxed.
    fn load(word: &Self::Word) -> u32;
    /// Sequentially consistent.
    fn fence();
}

enum Hardware {}

impl Memory for Hardware {
    type Word = AtomicU32;

    #[inline]
    fn store(word: &AtomicU32, value: u32) {
        word.store(value.to_le(), Ordering::Release);
    }

    #[inline]
    fn load(word: &AtomicU32) -> u32 {
        u32::from_le(word.load(Ordering::Relaxed))
    }

    #[inline]
    fn fence() {
        fence(Ordering::SeqCst);
    }
}

/// Writes a shadow doorbell. True: the controller sleeps, and the register has to be written, too.
#[inline]
fn announce<M: Memory>(word: &M::Word, event: &M::Word, value: u16, old: u16) -> bool {
    M::store(word, value.into());
    // The controller stores the event index, then looks at the shadow again; one of the two sees
    // the other's store.
    M::fence();
    needs_ring(M::load(event), value, old)
}

/// Whether moving from `old` to `new` passes the controller's event index. All ones is what a
/// controller that polls writes for "never".
fn needs_ring(event: u32, new: u16, old: u16) -> bool {
    let Ok(event) = u16::try_from(event) else {
        return false;
    };
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// A submission queue.
#[derive(Debug)]
pub(crate) struct SubmissionRing {
    entries: Entries<8>,
    tail: u16,
    rung: u16,
    bell: Bell,
}

impl SubmissionRing {
    pub fn new(mem: QueueMem, entries: u16, bell: Bell) -> SubmissionRing {
        let entries = match mem {
            QueueMem::Host(mem) => Entries::in_host(mem, entries),
            QueueMem::Controller(map, base) => Entries::in_controller(&map, base, entries),
        };
        SubmissionRing {
            entries,
            tail: 0,
            rung: 0,
            bell,
        }
    }

    /// Writes an entry. The caller keeps fewer than `entries` commands in flight.
    #[inline]
    pub fn push(&mut self, command: [u64; 8]) {
        for (place, word) in self.entries.at(self.tail).iter().zip(command) {
            place.store(word, Ordering::Relaxed);
        }
        self.tail = if self.tail + 1 == self.entries.count() {
            0
        } else {
            self.tail + 1
        };
    }

    /// Number of entries.
    #[inline]
    pub fn entries(&self) -> u16 {
        self.entries.count()
    }

    /// Whether entries were pushed that the controller was not told of.
    #[inline]
    pub fn is_dirty(&self) -> bool {
        self.tail != self.rung
    }

    /// Tells the controller.
    #[inline]
    pub fn ring(&mut self) {
        if self.is_dirty() {
            self.rung = self.tail;
            self.bell.ring(self.tail);
        }
    }

    pub fn rings(&self) -> u64 {
        self.bell.rings
    }

    /// Puts the ring and its doorbell back to the beginning, for a queue created anew.
    pub fn restart(&mut self, shadow: Option<Shadow>) {
        self.tail = 0;
        self.rung = 0;
        self.bell.last = 0;
        self.bell.shadow = shadow;
    }
}

/// A completion queue.
#[derive(Debug)]
pub(crate) struct CompletionRing {
    entries: Entries<2>,
    head: u16,
    phase: u64,
    unacked: u16,
    ack_at: u16,
    bell: Bell,
}

impl CompletionRing {
    /// A ring that tells the controller of consumed entries once `ack_at` have gathered.
    pub fn new(mem: Arc<DmaShared>, entries: u16, ack_at: u16, bell: Bell) -> CompletionRing {
        CompletionRing {
            entries: Entries::in_host(mem, entries),
            head: 0,
            phase: 1,
            unacked: 0,
            ack_at: ack_at.max(1),
            bell,
        }
    }

    /// Whether the next entry is there.
    #[inline]
    pub fn is_ready(&self) -> bool {
        let [_, high] = self.entries.at(self.head);
        let high = high.load(Ordering::Acquire);
        u64::from_le(high) >> 48 & 1 == self.phase
    }

    /// Takes the next entry, if it is there.
    #[inline]
    pub fn pop(&mut self) -> Option<Completion> {
        let head = self.head;
        let [low, high] = self.entries.at(head);
        // The phase tag is in the last word: what was loaded with it decides whether the first
        // word is valid, so it is loaded first, with Acquire (Base section 3.3.3.2, "P").
        let high = high.load(Ordering::Acquire);
        if u64::from_le(high) >> 48 & 1 != self.phase {
            return None;
        }
        let low = low.load(Ordering::Relaxed);
        self.head = head + 1;
        if self.head == self.entries.count() {
            self.head = 0;
            self.phase ^= 1;
        }
        self.unacked += 1;
        Some(Completion::from_words([low, high]))
    }

    /// Whether so many entries were consumed that the controller should hear of it.
    #[inline]
    pub fn wants_ack(&self) -> bool {
        self.unacked >= self.ack_at
    }

    /// Whether the controller lags behind at all.
    pub fn has_unacked(&self) -> bool {
        self.unacked > 0
    }

    /// Tells the controller which entries are free again.
    #[inline]
    pub fn ack(&mut self) {
        self.unacked = 0;
        self.bell.ring(self.head);
    }

    pub fn rings(&self) -> u64 {
        self.bell.rings
    }

    /// Starts over on (cleared) memory, for a queue created anew.
    pub fn restart(&mut self, mem: Arc<DmaShared>, shadow: Option<Shadow>) {
        self.entries = Entries::in_host(mem, self.entries.count());
        self.head = 0;
        self.phase = 1;
        self.unacked = 0;
        self.bell.last = 0;
        self.bell.shadow = shadow;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    enum Model {}

    impl Memory for Model {
        type Word = loom::sync::atomic::AtomicU32;

        fn store(word: &Self::Word, value: u32) {
            word.store(value, Ordering::Release);
        }

        fn load(word: &Self::Word) -> u32 {
            word.load(Ordering::Relaxed)
        }

        fn fence() {
            loom::sync::atomic::fence(Ordering::SeqCst);
        }
    }

    /// In no order of the two sides' accesses does the controller go to sleep on a command that
    /// nobody rings for.
    #[test]
    fn a_shadow_doorbell_is_seen_or_rung() {
        loom::model(|| {
            use loom::sync::Arc;
            use loom::sync::atomic::AtomicU32;
            // An event index that nothing passes: the controller is awake.
            let words = Arc::new((AtomicU32::new(0), AtomicU32::new(5)));
            let host = Arc::clone(&words);
            let host = loom::thread::spawn(move || announce::<Model>(&host.0, &host.1, 1, 0));
            // The controller: ring for what comes behind 0; then a last look.
            words.1.store(0, Ordering::Relaxed);
            Model::fence();
            let seen = words.0.load(Ordering::Acquire) == 1;
            let rung = host.join().unwrap();
            assert!(seen || rung, "a command that nobody looks at");
        });
    }

    #[test]
    fn event_index() {
        assert!(needs_ring(0, 1, 0));
        assert!(!needs_ring(5, 1, 0));
        assert!(needs_ring(5, 6, 3));
        assert!(!needs_ring(5, 5, 3));
        // The ring wraps at its size, not at 65536.
        assert!(needs_ring(31, 0, 31));
        assert!(!needs_ring(u32::MAX, 0, 31));
    }
}
