//! A page cache whose size follows the memory that is free.
//!
//! It begins with its least size. When it is full, a thread looks at the memory of the machine and of the
//! control groups around the process ten times a second, and whenever 16 MiB have come into the
//! cache. It lets the cache grow into half of what is free beyond a reserve. When less than the
//! reserve is free, the cache shrinks, and the memory of what it evicts goes back to the system. The
//! thread ends when the cache has its least size and nobody has found it full.
//!
//! Evicted frames leave free memory in pieces that may be too small for what comes next, so that the
//! arena would hold more and more beside the cache. Where memory is short, 8 MiB of it go back.
//!
//! A device that has the memory mapped keeps it, so that none goes back. The cache does not grow
//! then.

use std::sync::Weak;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use pumice_bdev::dma;

use super::memory::Memory;

/// The longest time between two looks at the memory.
const TICK: Duration = Duration::from_millis(100);
/// Number of bytes that the arena has beside what is in use.
const SLACK_BYTES: usize = 8 << 20;
/// Number of looks at a cache that is not full after which the thread ends.
const CALM: u32 = 20;

/// The bound of a cache.
#[derive(Debug)]
pub(crate) struct Bound {
    bytes: AtomicU64,
    least: u64,
    most: u64,
    /// Whether the cache was full since the last look.
    was_full: AtomicBool,
    /// Whether the thread runs.
    watched: AtomicBool,
    due: Mutex<bool>,
    /// A look is due before its time.
    is_due: Condvar,
}

/// A cache with such a bound.
pub(crate) trait Bounded: Send + Sync {
    fn bound(&self) -> &Bound;

    /// Number of bytes in the cache.
    fn used(&self) -> u64;

    /// Evicts what is beyond the bound.
    fn evict_beyond(&self);
}

impl Bound {
    /// A bound that is `least` and grows up to `most`.
    pub fn new(least: u64, most: u64) -> Bound {
        Bound {
            bytes: AtomicU64::new(least),
            least,
            most: most.max(least),
            was_full: AtomicBool::new(false),
            watched: AtomicBool::new(false),
            due: Mutex::new(false),
            is_due: Condvar::new(),
        }
    }

    /// Has the thread look at the memory before its time, if it runs.
    pub fn look_soon(&self) {
        if self.watched.load(Ordering::Relaxed) {
            *self.due.lock() = true;
            self.is_due.notify_one();
        }
    }

    /// Waits until a look is due.
    fn wait(&self) {
        let mut due = self.due.lock();
        if !*due {
            self.is_due.wait_for(&mut due, TICK);
        }
        *due = false;
    }

    /// The bound in bytes.
    #[inline]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The bound up to which it may grow.
    pub fn most(&self) -> u64 {
        self.most
    }

    /// Records that the cache is full. Returns whether a thread has to be started.
    pub fn is_full(&self) -> bool {
        if self.bytes() == self.most || self.was_full.load(Ordering::Relaxed) {
            return false;
        }
        self.was_full.store(true, Ordering::SeqCst);
        !self.watched.swap(true, Ordering::SeqCst)
    }

    /// Returns another bound for so much memory and so many bytes in the cache.
    fn next(&self, memory: Memory, used: u64, was_full: bool) -> Option<u64> {
        let bytes = self.bytes();
        // What the cache may still take is not free for anybody else.
        let free = memory.free_bytes.saturating_sub(bytes.saturating_sub(used));
        let reserve = memory.reserve_bytes();
        let to = match free.checked_sub(reserve) {
            Some(spare) if was_full => (bytes + spare / 2).min(self.most),
            Some(_) => bytes,
            None => bytes.saturating_sub(reserve - free).max(self.least),
        };
        (to != bytes).then_some(to)
    }
}

/// Starts the thread that looks after the cache.
pub(crate) fn watch(cache: Weak<dyn Bounded>) {
    let again = Weak::clone(&cache);
    let thread = std::thread::Builder::new().name("pumice-cache".to_owned());
    if let Err(error) = thread.spawn(move || run(&cache)) {
        tracing::debug!(%error, "the page cache keeps its size");
        // It is tried again when the cache is full the next time.
        if let Some(cache) = again.upgrade() {
            cache.bound().watched.store(false, Ordering::SeqCst);
            cache.bound().was_full.store(false, Ordering::Relaxed);
        }
    }
}

fn run(cache: &Weak<dyn Bounded>) {
    let mut calm = 0;
    while let Some(cache) = cache.upgrade() {
        let bound = cache.bound();
        let was_full = bound.was_full.swap(false, Ordering::SeqCst);
        look(&*cache, was_full, Memory::now, dma::can_release());
        calm = match was_full || bound.bytes() > bound.least {
            true => 0,
            false => calm + 1,
        };
        if calm == CALM {
            bound.watched.store(false, Ordering::SeqCst);
            // Whoever has found it full since then may have seen that the thread runs.
            let starts = bound.was_full.load(Ordering::SeqCst);
            if !starts || bound.watched.swap(true, Ordering::SeqCst) {
                return;
            }
            calm = 0;
        }
        bound.wait();
    }
    dma::release_free();
}

/// Looks at the memory once.
fn look(cache: &dyn Bounded, was_full: bool, memory: impl Fn() -> Option<Memory>, may_grow: bool) {
    let bound = cache.bound();
    let Some(now) = memory() else {
        return set(cache, bound.least);
    };
    if now.free_bytes < 2 * now.reserve_bytes() && dma::stats().slack_bytes() > SLACK_BYTES {
        dma::release_free();
    }
    match bound.next(now, cache.used(), was_full) {
        Some(bytes) if bytes > bound.bytes() && !may_grow => {}
        Some(bytes) if bytes > bound.bytes() => set(cache, bytes),
        Some(_) => {
            // What is free in the arena may be enough.
            dma::release_free();
            let again = memory().and_then(|now| bound.next(now, cache.used(), false));
            if let Some(bytes) = again {
                tracing::debug!(bytes, "the page cache gives memory back");
                set(cache, bytes);
                dma::release_free();
            }
        }
        None => {}
    }
}

/// Sets the bound, and evicts what is beyond it.
fn set(cache: &dyn Bounded, bytes: u64) {
    cache.bound().bytes.store(bytes, Ordering::Relaxed);
    cache.evict_beyond();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache that is always full.
    struct Full(Bound, AtomicU64);

    impl Bounded for Full {
        fn bound(&self) -> &Bound {
            &self.0
        }

        fn used(&self) -> u64 {
            self.1.load(Ordering::Relaxed)
        }

        fn evict_beyond(&self) {
            self.1.fetch_min(self.0.bytes(), Ordering::Relaxed);
        }
    }

    const MIB: u64 = 1 << 20;

    fn memory(limit_mib: u64, free_mib: u64) -> Memory {
        Memory {
            limit_bytes: limit_mib * MIB,
            free_bytes: free_mib * MIB,
        }
    }

    #[test]
    fn it_grows_into_half_of_what_is_free_and_gives_back_what_is_not() {
        let bound = Bound::new(40 * MIB, 240 * MIB);
        let next = |free, used, was_full| bound.next(memory(320, free), used * MIB, was_full);
        // 40 MiB of 320 stay free.
        assert_eq!(next(240, 40, true), Some(140 * MIB));
        assert_eq!(next(240, 40, false), None, "nobody needs it");
        assert_eq!(next(40, 40, true), None);
        // What it may still take is not free.
        assert_eq!(next(240, 20, true), Some(130 * MIB));
        assert_eq!(next(39, 40, true), None, "it has its least size");
        bound.bytes.store(200 * MIB, Ordering::Relaxed);
        assert_eq!(next(30, 200, true), Some(190 * MIB));
        assert_eq!(next(0, 200, false), Some(160 * MIB));
        assert_eq!(next(10, 100, false), Some(160 * MIB));
        assert_eq!(next(300, 200, true), Some(240 * MIB), "and no further");
        // A small group keeps 32 MiB free.
        assert_eq!(bound.next(memory(64, 31), 200 * MIB, true), Some(199 * MIB));
    }

    #[test]
    fn a_fixed_bound_is_never_full() {
        let bound = Bound::new(MIB, 0);
        assert_eq!((bound.bytes(), bound.most()), (MIB, MIB));
        assert!(!bound.is_full());
        let bound = Bound::new(MIB, 2 * MIB);
        assert!(bound.is_full(), "a thread is started");
        assert!(!bound.is_full(), "once");
        bound.was_full.store(false, Ordering::Relaxed);
        assert!(!bound.is_full(), "it runs");
    }

    #[test]
    fn one_look_grows_shrinks_or_leaves_it() {
        let cache = Full(Bound::new(MIB, 100 * MIB), AtomicU64::new(0));
        let bytes = || cache.0.bytes() / MIB;
        look(&cache, true, || Some(memory(1024, 200)), false);
        assert_eq!(bytes(), 1, "a device has the memory mapped");
        look(&cache, true, || Some(memory(1024, 200)), true);
        assert_eq!(bytes(), 36, "it may take 1 MiB already, and 71 are free");
        look(&cache, true, || Some(memory(1024, 100)), true);
        assert_eq!(bytes(), 1, "what it may still take is not free");
        look(&cache, true, || Some(memory(1024, 1000)), true);
        assert_eq!(bytes(), 100);
        look(&cache, false, || None, true);
        assert_eq!(bytes(), 1, "nobody knows what is free");
        // What the arena gives back is enough: the second look finds it free.
        look(&cache, true, || Some(memory(1024, 1000)), true);
        let looks = std::cell::Cell::new(0);
        let enough = || {
            looks.set(looks.get() + 1);
            Some(memory(1024, if looks.get() == 1 { 100 } else { 1000 }))
        };
        look(&cache, false, enough, true);
        assert_eq!((bytes(), looks.get()), (100, 2));
        // What it gives back is evicted.
        cache.1.store(100 * MIB, Ordering::Relaxed);
        look(&cache, false, || Some(memory(1024, 100)), true);
        assert_eq!((bytes(), cache.used() / MIB), (72, 72));
    }
}
