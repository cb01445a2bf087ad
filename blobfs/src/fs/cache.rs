//! The policy for clean frames in memory: a clock with a bound in bytes, which may follow the memory
//! that is free ([`elastic`]).
//!
//! The files' tables own the frames. The cache only has weak references to them, adds up their
//! bytes and evicts those that nobody has used since the hand last passed. A hit does not come
//! here: it sets a bit in its frame. A frame with unwritten bytes is not in the cache at all, so it
//! cannot be evicted.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use crossbeam::utils::CachePadded;
use parking_lot::Mutex;
use pumice_bdev::thread_number;

use super::elastic::{self, Bound, Bounded};
use super::frame::Frame;

const SHARDS: usize = 16;
const STRIPES: usize = 16;

/// Counters of the page cache since the mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheStats {
    /// Number of reads that were answered from memory alone.
    pub hits: u64,
    /// Number of reads that needed the device.
    pub misses: u64,
    /// Current bytes of clean frames in memory.
    pub used_bytes: u64,
    /// The bound in bytes. It changes if the cache follows the memory that is free.
    pub capacity_bytes: u64,
    /// The bound up to which it may grow.
    pub most_bytes: u64,
    /// Number of evicted frames.
    pub evictions: u64,
}

#[derive(Default)]
struct Shard {
    frames: VecDeque<Weak<Frame>>,
    /// Length of the queue at which dead entries are removed.
    sweep_at: usize,
}

/// The clock; see the module.
pub(crate) struct Cache {
    bound: Bound,
    used: AtomicU64,
    evictions: AtomicU64,
    next: AtomicUsize,
    hand: AtomicUsize,
    shards: Box<[CachePadded<Mutex<Shard>>]>,
    hits: Box<[CachePadded<AtomicU64>]>,
    misses: Box<[CachePadded<AtomicU64>]>,
}

impl Cache {
    pub fn new(bound: Bound) -> Arc<Cache> {
        Arc::new(Cache {
            bound,
            used: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            hand: AtomicUsize::new(0),
            shards: (0..SHARDS).map(|_| CachePadded::default()).collect(),
            hits: (0..STRIPES).map(|_| CachePadded::default()).collect(),
            misses: (0..STRIPES).map(|_| CachePadded::default()).collect(),
        })
    }

    #[inline]
    pub fn count_hit(&self) {
        self.hits[thread_number() % STRIPES].fetch_add(1, Ordering::Relaxed);
    }

    pub fn count_miss(&self) {
        self.misses[thread_number() % STRIPES].fetch_add(1, Ordering::Relaxed);
    }

    /// The bound in bytes.
    pub fn capacity(&self) -> u64 {
        self.bound.bytes()
    }

    pub fn uncharge(&self, bytes: usize) {
        self.used.fetch_sub(bytes as u64, Ordering::Relaxed);
    }

    pub fn stats(&self) -> CacheStats {
        let sum = |c: &[CachePadded<AtomicU64>]| c.iter().map(|c| c.load(Ordering::Relaxed)).sum();
        CacheStats {
            hits: sum(&self.hits),
            misses: sum(&self.misses),
            used_bytes: self.used(),
            capacity_bytes: self.bound.bytes(),
            most_bytes: self.bound.most(),
            evictions: self.evictions.load(Ordering::Relaxed),
        }
    }

    /// Adds a clean frame that is in its file's table, and makes room if necessary. Takes no lock
    /// but one shard's and, for evicted frames, their files' table locks.
    pub fn admit(self: &Arc<Cache>, frame: &Arc<Frame>) {
        let bytes = frame.bytes.cap();
        let before = frame.set_charge(bytes);
        self.bound.count(bytes);
        self.used.fetch_add(bytes as u64, Ordering::Relaxed);
        self.uncharge(before);
        self.push(
            self.next.fetch_add(1, Ordering::Relaxed),
            Arc::downgrade(frame),
        );
        if self.used() > self.capacity() {
            if self.bound.is_full() {
                let me: Arc<dyn Bounded> = self.clone();
                elastic::watch(Arc::downgrade(&me));
            }
            self.evict_beyond();
        }
    }

    fn push(&self, n: usize, frame: Weak<Frame>) {
        let mut shard = self.shards[n % SHARDS].lock();
        if shard.frames.len() >= shard.sweep_at.max(256) {
            shard.frames.retain(|f| f.strong_count() > 0);
            shard.sweep_at = shard.frames.len() * 2;
        }
        shard.frames.push_back(frame);
    }

    /// Moves the hand until a frame was evicted. Returns false if there is nothing left to evict.
    fn evict_one(&self) -> bool {
        let mut empty = 0;
        // Every frame is passed at most twice: once to clear its marks, once to evict it.
        let mut budget = 1 << 20;
        while empty < SHARDS && budget > 0 {
            budget -= 1;
            let n = self.hand.fetch_add(1, Ordering::Relaxed);
            let Some(weak) = self.shards[n % SHARDS].lock().frames.pop_front() else {
                empty += 1;
                continue;
            };
            empty = 0;
            let Some(frame) = weak.upgrade() else {
                continue;
            };
            let hot = frame.take_hot();
            let hot_pages: u32 = hot.iter().map(|w| w.count_ones()).sum();
            let Some(owner) = frame.owner() else { continue };
            if hot_pages == 0 {
                owner.remove(&frame);
            } else if frame.is_large() && hot_pages < 96 && owner.is_whole(&frame) {
                for kept in owner.thin_out(&frame, hot) {
                    let bytes = kept.bytes.cap();
                    kept.set_charge(bytes);
                    self.used.fetch_add(bytes as u64, Ordering::Relaxed);
                    let n = self.next.fetch_add(1, Ordering::Relaxed);
                    self.push(n, Arc::downgrade(&kept));
                }
            } else {
                self.push(n, weak);
                continue;
            }
            self.evictions.fetch_add(1, Ordering::Relaxed);
            return true;
        }
        false
    }
}

impl Bounded for Cache {
    fn bound(&self) -> &Bound {
        &self.bound
    }

    fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn evict_beyond(&self) {
        while self.used() > self.capacity() && self.evict_one() {}
    }
}

#[cfg(test)]
mod tests {
    use super::super::fill::FillBuf;
    use super::super::frame::{FileCache, PAGE, split};
    use super::*;
    use pumice_bdev::DmaBuf;

    fn fixed(bytes: u64) -> Arc<Cache> {
        Cache::new(Bound::new(bytes, bytes))
    }

    fn put(fc: &Arc<FileCache>, page: u64) {
        let buf = DmaBuf::zeroed(PAGE).unwrap();
        let (region, start) = split(page * PAGE as u64);
        let fill = Arc::new(FillBuf::from_buf(buf, PAGE));
        let frame = Frame::new(fc, region, start, fill, false);
        assert!(fc.install(fc.generation(), &frame));
    }

    #[test]
    fn it_is_bounded_and_spares_what_is_used() {
        let cache = fixed(100 * PAGE as u64);
        let fc = FileCache::new(&cache);
        let mut b = [0u8; 1];
        for page in 0..1000 {
            put(&fc, page);
            assert!(cache.used() <= 100 * PAGE as u64);
            assert_eq!(fc.copy(0, &mut b), 1, "page 0 is used all the time");
        }
        let present = (0..1000)
            .filter(|p| fc.find(p * PAGE as u64).is_some())
            .count();
        assert!((90..=100).contains(&present), "{present}");
        assert!(cache.stats().evictions >= 900);
    }

    #[test]
    fn dirty_frames_are_not_its_business() {
        let cache = fixed(4 * PAGE as u64);
        let fc = FileCache::new(&cache);
        let fill = Arc::new(FillBuf::from_buf(DmaBuf::zeroed(PAGE).unwrap(), PAGE));
        let dirty = Frame::new(&fc, 0, 0, fill, true);
        fc.replace_pages(&dirty);
        for page in 10..100 {
            put(&fc, page);
        }
        assert!(fc.find(0).is_some());
        dirty.release_dirty();
        for page in 100..200 {
            put(&fc, page);
        }
        drop(dirty);
        assert!(fc.find(0).is_none());
        assert!(cache.used() <= 4 * PAGE as u64);
    }

    #[test]
    fn dead_entries_do_not_pile_up() {
        let cache = fixed(1 << 30);
        for _ in 0..50 {
            let fc = FileCache::new(&cache);
            for page in 0..500 {
                put(&fc, page);
            }
        }
        assert_eq!(cache.used(), 0);
        let entries: usize = cache.shards.iter().map(|s| s.lock().frames.len()).sum();
        assert!(entries < 16 * 600, "{entries}");
    }
}
