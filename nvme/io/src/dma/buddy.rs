//! Buddy lists over the regions: the free blocks of each power of two.
//!
//! They are used only when the size classes' lists are empty, so clarity comes before speed here.

use std::collections::BTreeSet;

/// log2 of the smallest block.
pub(super) const MIN_SHIFT: u32 = 9;
/// log2 of the largest block.
pub(super) const MAX_SHIFT: u32 = 28;
/// log2 of the size of a page.
const PAGE_SHIFT: u32 = 12;
/// log2 of the size of a chunk, which is that of a huge page.
const CHUNK_SHIFT: u32 = 21;
/// Number of words with the bits of a chunk's pages.
const CHUNK_WORDS: usize = 1 << (CHUNK_SHIFT - PAGE_SHIFT - 6);
/// Number of block sizes.
pub(super) const CLASSES: usize = (MAX_SHIFT - MIN_SHIFT + 1) as usize;

/// Returns the class (0 = 512 bytes) that holds `len` bytes; `len` is 1 to `1 << MAX_SHIFT`.
pub(super) fn class_of(len: usize) -> usize {
    let shift = len.next_power_of_two().trailing_zeros().max(MIN_SHIFT);
    (shift - MIN_SHIFT) as usize
}

/// Length in bytes of a class's blocks.
pub(super) fn class_len(class: usize) -> usize {
    1 << (class + MIN_SHIFT as usize)
}

/// A block's place: its region's slot in the arena's list and its offset in the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub slot: u32,
    pub offset: u32,
}

/// The free blocks.
#[derive(Debug, Default)]
pub(super) struct Buddy {
    free: [BTreeSet<Place>; CLASSES],
    region_lens: Vec<usize>,
    /// For each region a bit for each page, set if the page may be present in memory.
    present: Vec<Vec<u64>>,
    present_pages: usize,
    /// For each region, whether each chunk was handed out to be made a huge page of.
    joined: Vec<Vec<bool>>,
    free_bytes: usize,
}

impl Buddy {
    /// Adds a region of `len` bytes, all free; its slot is the number of regions before it.
    pub fn add_region(&mut self, len: usize) {
        let slot = u32::try_from(self.region_lens.len()).expect("few regions");
        self.region_lens.push(len);
        self.present.push(vec![0; (len >> PAGE_SHIFT) / 64 + 1]);
        self.joined.push(vec![false; len >> CHUNK_SHIFT]);
        let mut at = 0usize;
        // A region's length may not be a power of two: cut it into the largest aligned blocks.
        while at < len {
            let fits = (len - at).ilog2();
            let aligned = if at == 0 {
                MAX_SHIFT
            } else {
                at.trailing_zeros()
            };
            let shift = fits.min(aligned).min(MAX_SHIFT);
            let offset = u32::try_from(at).expect("regions are below 4 GiB");
            self.free[(shift - MIN_SHIFT) as usize].insert(Place { slot, offset });
            at += 1 << shift;
        }
        self.free_bytes += len;
    }

    /// Takes a block of `class`, splitting a larger one if necessary.
    pub fn take(&mut self, class: usize) -> Option<Place> {
        let from = (class..CLASSES).find(|&c| !self.free[c].is_empty())?;
        let place = self.free[from].pop_first()?;
        for c in (class..from).rev() {
            let half = u32::try_from(class_len(c)).expect("blocks are below 4 GiB");
            self.free[c].insert(Place {
                slot: place.slot,
                offset: place.offset + half,
            });
        }
        self.free_bytes -= class_len(class);
        let mut new = 0;
        for (word, bit) in self.pages(place, class) {
            new += (bit & !*word).count_ones() as usize;
            *word |= bit;
        }
        self.present_pages += new;
        Some(place)
    }

    /// The words and bits of the pages of a block.
    fn pages(&mut self, place: Place, class: usize) -> impl Iterator<Item = (&mut u64, u64)> {
        let first = place.offset as usize >> PAGE_SHIFT;
        let last = (place.offset as usize + class_len(class) - 1) >> PAGE_SHIFT;
        let words = self.present[place.slot as usize][first / 64..=last / 64].iter_mut();
        words.enumerate().map(move |(n, word)| {
            let at = (first / 64 + n) * 64;
            let (from, to) = (first.max(at) - at, last.min(at + 63) - at);
            (word, (u64::MAX >> (63 - to)) & (u64::MAX << from))
        })
    }

    /// Takes free blocks of whole pages that may be present, at most so many. They are given back by
    /// [`Buddy::give_released`] or [`Buddy::give`].
    pub fn take_present(&mut self, most: usize) -> Vec<(Place, usize)> {
        let mut found = Vec::new();
        for class in (class_of(1 << PAGE_SHIFT)..CLASSES).rev() {
            let places: Vec<Place> = self.free[class].iter().copied().collect();
            for place in places {
                if found.len() == most {
                    return found;
                }
                if self.pages(place, class).any(|(word, bit)| *word & bit != 0) {
                    self.free[class].remove(&place);
                    self.free_bytes -= class_len(class);
                    found.push((place, class));
                }
            }
        }
        found
    }

    /// Returns the place of a chunk of which every page may be present. Each is returned once, until a page of it is released
    /// ([`Buddy::give_released`]) or it is put back ([`Buddy::not_joined`]).
    pub fn take_full(&mut self) -> Option<Place> {
        for (slot, (joined, present)) in self.joined.iter_mut().zip(&self.present).enumerate() {
            let chunks = joined.iter_mut().zip(present.chunks_exact(CHUNK_WORDS));
            let mut full = chunks.enumerate().filter(|(_, (joined, words))| {
                !**joined && words.iter().all(|word| *word == u64::MAX)
            });
            if let Some((chunk, (joined, _))) = full.next() {
                *joined = true;
                return Some(Place {
                    slot: u32::try_from(slot).expect("few regions"),
                    offset: u32::try_from(chunk << CHUNK_SHIFT).expect("regions are below 4 GiB"),
                });
            }
        }
        None
    }

    /// Puts a place of [`Buddy::take_full`] back.
    pub fn not_joined(&mut self, place: Place) {
        self.joined[place.slot as usize][place.offset as usize >> CHUNK_SHIFT] = false;
    }

    /// Frees a block whose pages are no longer present.
    pub fn give_released(&mut self, place: Place, class: usize) {
        let first = place.offset as usize >> CHUNK_SHIFT;
        let last = (place.offset as usize + class_len(class) - 1) >> CHUNK_SHIFT;
        self.joined[place.slot as usize][first..=last].fill(false);
        let mut gone = 0;
        for (word, bit) in self.pages(place, class) {
            gone += (bit & *word).count_ones() as usize;
            *word &= !bit;
        }
        self.present_pages -= gone;
        self.give(place, class);
    }

    /// Frees a block and joins it with its free buddies.
    pub fn give(&mut self, place: Place, class: usize) {
        self.free_bytes += class_len(class);
        let region_len = self.region_lens[place.slot as usize];
        let mut offset = place.offset;
        let mut c = class;
        while c + 1 < CLASSES {
            let len = u32::try_from(class_len(c)).expect("blocks are below 4 GiB");
            let buddy = Place {
                slot: place.slot,
                offset: offset ^ len,
            };
            if (offset & !len) as usize + 2 * len as usize > region_len
                || !self.free[c].remove(&buddy)
            {
                break;
            }
            offset &= !len;
            c += 1;
        }
        let fresh = self.free[c].insert(Place {
            slot: place.slot,
            offset,
        });
        assert!(fresh, "a DMA block was given back twice");
    }

    /// Number of bytes of pages that may be present.
    pub fn present_bytes(&self) -> usize {
        self.present_pages << PAGE_SHIFT
    }

    /// Number of free bytes.
    pub fn free_bytes(&self) -> usize {
        self.free_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_powers_of_two_from_512() {
        assert_eq!(class_of(1), 0);
        assert_eq!(class_of(512), 0);
        assert_eq!(class_of(513), 1);
        assert_eq!(class_of(4096), 3);
        assert_eq!(class_len(class_of(4097)), 8192);
    }

    #[test]
    fn blocks_never_overlap_and_rejoin() {
        let mut buddy = Buddy::default();
        buddy.add_region(2 << 20);
        buddy.add_region(6 << 20);
        let mut seed = 0x9e37_79b9_u64;
        let mut live: Vec<(Place, usize)> = Vec::new();
        for _ in 0..if cfg!(miri) { 100 } else { 20_000 } {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let pick = (seed >> 33) as usize;
            if pick.is_multiple_of(3) && !live.is_empty() {
                let (p, c) = live.swap_remove(pick % live.len());
                buddy.give(p, c);
            } else if let Some(p) = buddy.take(pick % 12) {
                let c = pick % 12;
                let (a, b) = (p.offset as usize, p.offset as usize + class_len(c));
                for (q, d) in &live {
                    let (x, y) = (q.offset as usize, q.offset as usize + class_len(*d));
                    assert!(p.slot != q.slot || b <= x || y <= a);
                }
                live.push((p, c));
            }
        }
        for (p, c) in live {
            buddy.give(p, c);
        }
        assert_eq!(buddy.free_bytes(), 8 << 20);
        // All blocks have joined: the largest blocks are available.
        assert!(buddy.take(class_of(4 << 20)).is_some());
        assert!(buddy.take(class_of(2 << 20)).is_some());
        assert!(buddy.take(class_of(2 << 20)).is_some());
        assert!(buddy.take(0).is_none());
    }

    #[test]
    fn a_chunk_is_joined_once_until_a_page_of_it_is_released() {
        let mut buddy = Buddy::default();
        buddy.add_region(6 << 20);
        buddy.add_region(2 << 20);
        let take = |buddy: &mut Buddy, shift: u32| {
            let class = (shift - MIN_SHIFT) as usize;
            (buddy.take(class).expect("room"), class)
        };
        let full = |buddy: &mut Buddy| -> Vec<Place> {
            let mut all: Vec<Place> = std::iter::from_fn(|| buddy.take_full()).collect();
            all.sort();
            all
        };
        assert_eq!(full(&mut buddy), [], "nothing was used");
        // A chunk of another region, one of pages and one in one piece. The third of the first region is a page short.
        let mut blocks = vec![take(&mut buddy, 21)];
        blocks.extend((0..1023).map(|_| take(&mut buddy, 12)));
        blocks.push(take(&mut buddy, 21));
        let at = |slot, offset| Place { slot, offset };
        let all = full(&mut buddy);
        assert_eq!(all.len(), 3, "{all:?}");
        let missing = take(&mut buddy, 12);
        let last = at(missing.0.slot, missing.0.offset & !((2 << 20) - 1));
        assert!(!all.contains(&last));
        assert_eq!(full(&mut buddy), [last], "its last page was taken");
        assert_eq!(full(&mut buddy), [], "each of them once");
        buddy.not_joined(last);
        assert_eq!(full(&mut buddy), [last]);
        // A page that is free is present as before. One that is released is not.
        let (place, class) = blocks
            .iter()
            .copied()
            .find(|(_, class)| *class == 3)
            .expect("a page");
        buddy.give(place, class);
        assert_eq!(full(&mut buddy), []);
        for (place, class) in buddy.take_present(9) {
            buddy.give_released(place, class);
        }
        assert_eq!(full(&mut buddy), [], "a page is missing");
        assert_eq!(buddy.take(class), Some(place));
        let chunk = at(place.slot, place.offset & !((2 << 20) - 1));
        assert_eq!(full(&mut buddy), [chunk]);
    }

    #[test]
    fn blocks_that_were_used_are_released_once() {
        let len =
            |found: &[(Place, usize)]| found.iter().map(|(_, c)| class_len(*c)).sum::<usize>();
        let mut buddy = Buddy::default();
        buddy.add_region(2 << 20);
        assert_eq!(buddy.take_present(9), [], "nothing was used");
        // A block of one page, one of a part of a page, and one of many pages.
        let taken = [12, 9, 19].map(|shift: u32| (shift - MIN_SHIFT) as usize);
        let blocks = taken.map(|class| (buddy.take(class).unwrap(), class));
        assert_eq!(buddy.take_present(9), [], "nothing is free that was used");
        let (place, class) = blocks[2];
        buddy.give(place, class);
        assert_eq!(buddy.take_present(0), []);
        assert_eq!(buddy.present_bytes(), 4096 + 4096 + (512 << 10));
        let found = buddy.take_present(9);
        assert_eq!(len(&found), 512 << 10);
        assert_eq!(buddy.free_bytes(), (2 << 20) - (512 << 10) - 4096 - 512);
        for (place, class) in found {
            buddy.give_released(place, class);
        }
        assert_eq!(buddy.take_present(9), [], "released once");
        assert_eq!(buddy.present_bytes(), 4096 + 4096);
        for (place, class) in &blocks[..2] {
            buddy.give(*place, *class);
        }
        // The free blocks have joined; what is beside the pages that were used goes with them.
        let found = buddy.take_present(9);
        assert_eq!((found.len(), len(&found)), (1, 2 << 20));
        for (place, class) in found {
            buddy.give(place, class);
        }
        assert_eq!(buddy.take_present(9).len(), 1, "it was not released");
    }
}
