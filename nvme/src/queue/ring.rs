//! The two rings of a queue pair and their doorbells.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use pumice_io::sys::{Doorbell, MmioMap};

use crate::dma::{DmaShared, Entries};
use crate::spec::Completion;

/// The place of a queue's entries.
#[derive(Debug, Clone)]
pub(crate) enum QueueMem {
    /// The host's memory.
    Host(Arc<DmaShared>),
    /// The controller's memory buffer, from this byte on.
    Controller(MmioMap, usize),
}

/// A doorbell, with its shadow when the controller has accepted a doorbell buffer.
#[derive(Debug)]
pub(crate) struct Bell {
    mmio: Doorbell,
    shadow: Option<Shadow>,
    last: u16,
    /// Number of writes to the register.
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
    /// Sets the queue's shadow doorbell and event index to 0, while the queue does not exist.
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

    /// Tells the controller the new tail or head.
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

/// The memory accesses of [`announce`], apart from it so that a model can try all their orders.
trait Memory {
    type Word;
    /// Stores with Release.
    fn store(word: &Self::Word, value: u32);
    /// Loads with Relaxed.
    fn load(word: &Self::Word) -> u32;
    /// Is a sequentially consistent fence.
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

/// Writes a shadow doorbell. Returns whether the controller sleeps, so that the register must be
/// written too.
#[inline]
fn announce<M: Memory>(word: &M::Word, event: &M::Word, value: u16, old: u16) -> bool {
    M::store(word, value.into());
    // The controller stores the event index, then looks at the shadow again; one of the two sees
    // the other's store.
    M::fence();
    needs_ring(M::load(event), value, old)
}

/// Whether moving from `old` to `new` passes the controller's event index. A controller that polls
/// writes all ones for "never".
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

    /// Whether there are entries that the controller has not been told of.
    #[inline]
    pub fn is_dirty(&self) -> bool {
        self.tail != self.rung
    }

    /// Tells the controller of new entries.
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

    /// Resets the ring and its doorbell to the beginning, for a queue that was created again.
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
    /// Makes a ring that acknowledges consumed entries to the controller once there are `ack_at` of
    /// them.
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

    /// Whether the next entry has arrived.
    #[inline]
    pub fn is_ready(&self) -> bool {
        let [_, high] = self.entries.at(self.head);
        let high = high.load(Ordering::Acquire);
        u64::from_le(high) >> 48 & 1 == self.phase
    }

    /// Takes the next entry, if it has arrived.
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

    /// Whether enough entries were consumed to tell the controller.
    #[inline]
    pub fn wants_ack(&self) -> bool {
        self.unacked >= self.ack_at
    }

    /// Whether any consumed entry is not acknowledged yet.
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

    /// Starts again on (cleared) memory, for a queue that was created again.
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

    /// In no order of the two sides' accesses does the controller go to sleep while there is a
    /// command of which nobody tells it.
    #[test]
    fn a_shadow_doorbell_is_seen_or_rung() {
        loom::model(|| {
            use loom::sync::Arc;
            use loom::sync::atomic::AtomicU32;
            // Nothing passes this event index: the controller is awake.
            let words = Arc::new((AtomicU32::new(0), AtomicU32::new(5)));
            let host = Arc::clone(&words);
            let host = loom::thread::spawn(move || announce::<Model>(&host.0, &host.1, 1, 0));
            // The controller asks for a ring when the doorbell passes 0, then looks a last time.
            words.1.store(0, Ordering::Relaxed);
            Model::fence();
            let seen = words.0.load(Ordering::Acquire) == 1;
            let rung = host.join().unwrap();
            assert!(seen || rung, "a command that nobody looks at");
        });
    }

    /// After a reset the first doorbell reaches a controller that sleeps, wherever the last one was.
    #[test]
    fn the_first_doorbell_after_a_reset_is_rung() {
        use std::sync::atomic::AtomicU64;
        let page = || Arc::new(DmaShared::zeroed_in(None, 4096).expect("memory"));
        let shadow = |index| Shadow {
            values: page(),
            events: page(),
            index,
        };
        let map = MmioMap::from_words((0..4).map(|_| AtomicU64::new(0)).collect());
        let bell =
            |at, shadow| Bell::new(Doorbell::mapped(&map, at).expect("inside"), Some(shadow));
        let memory = || Arc::new(DmaShared::zeroed_in(None, 4096).expect("memory"));
        let mut sq = SubmissionRing::new(QueueMem::Host(memory()), 8, bell(0, shadow(0)));
        let mut cq = CompletionRing::new(memory(), 8, 1, bell(4, shadow(1)));
        for generation in 1..=3 {
            sq.push([0; 8]);
            sq.ring();
            // The controller's memory says that an entry has arrived.
            cq.entries.at(0)[1].store((1u64 << 48).to_le(), Ordering::Relaxed);
            assert!(cq.pop().is_some());
            cq.ack();
            assert_eq!((sq.rings(), cq.rings()), (generation, generation));
            sq.restart(Some(shadow(0)));
            cq.restart(memory(), Some(shadow(1)));
        }
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
