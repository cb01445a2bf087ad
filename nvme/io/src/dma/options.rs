//! The options of an arena, and its figures.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use super::mapper::MAX_CHUNKS;
use super::region::CHUNK_LEN;

/// Whether the arena uses huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// Ordinary pages.
    #[default]
    Never,
    /// Huge pages as long as the system has free ones, then ordinary pages.
    Auto,
    /// Huge pages only; an error when there are none left. Needed without an IOMMU.
    Always,
}

/// Options of the arena; see [`configure`](super::configure).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ArenaOptions {
    /// Whether to use huge pages.
    pub huge: HugePages,
    /// Most bytes that the arena may take.
    pub max_bytes: usize,
    /// Fewest bytes to grow by, rounded up to a multiple of 2 MiB, at most 256 MiB.
    pub region_min: usize,
}

impl Default for ArenaOptions {
    fn default() -> Self {
        ArenaOptions {
            huge: HugePages::Never,
            max_bytes: MAX_CHUNKS * CHUNK_LEN,
            region_min: CHUNK_LEN,
        }
    }
}

/// The sizes of the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaStats {
    /// Bytes taken from the system.
    pub total_bytes: usize,
    /// Bytes free in the shared lists. The blocks in the threads' caches count as used.
    pub free_bytes: usize,
    /// Bytes that take memory: those that are in use, and those that were and have not gone back to the system
    /// since ([`release_free`](super::release_free)).
    pub present_bytes: usize,
    /// Number of regions.
    pub regions: usize,
}

impl ArenaStats {
    /// Bytes that take memory and are free.
    #[must_use]
    pub fn slack_bytes(&self) -> usize {
        let used = self.total_bytes - self.free_bytes.min(self.total_bytes);
        self.present_bytes.saturating_sub(used)
    }
}

/// The options, apart from the arena, so that a forked child's arena has them as well.
pub(super) struct Configured {
    huge: AtomicU8,
    max_bytes: AtomicUsize,
    region_min: AtomicUsize,
}

pub(super) static CONFIGURED: Configured = Configured {
    huge: AtomicU8::new(0),
    max_bytes: AtomicUsize::new(MAX_CHUNKS * CHUNK_LEN),
    region_min: AtomicUsize::new(CHUNK_LEN),
};

impl Configured {
    pub fn options(&self) -> ArenaOptions {
        ArenaOptions {
            huge: match self.huge.load(Ordering::Relaxed) {
                0 => HugePages::Never,
                1 => HugePages::Auto,
                _ => HugePages::Always,
            },
            max_bytes: self.max_bytes.load(Ordering::Relaxed),
            region_min: self.region_min.load(Ordering::Relaxed),
        }
    }

    pub fn set(&self, options: &ArenaOptions) {
        self.huge.store(options.huge as u8, Ordering::Relaxed);
        self.max_bytes.store(options.max_bytes, Ordering::Relaxed);
        self.region_min.store(options.region_min, Ordering::Relaxed);
    }
}
