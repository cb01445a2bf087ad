//! The free blocks of an arena: a list for each size class above the buddy lists.
//! `tests/free_model.rs` compiles this file again and tries orders in which threads take its steps.
//!
//! Locks: the lock of growth, then the buddy lists, then one of the class lists.

use super::buddy::{Buddy, CLASSES, Place, class_len};
use super::sync::Mutex;

/// A block, as its owner sees it.
pub(super) trait Block: Sized {
    /// The regions that blocks are parts of.
    type Region;

    /// Makes the block at a place; `regions` are in the order in which they were added.
    fn at(regions: &[Self::Region], place: Place, class: usize) -> Self;

    /// Returns its place.
    fn place(&self) -> Place;
}

/// The free blocks.
pub(super) struct FreeBlocks<B: Block> {
    buddy: Mutex<(Buddy, Vec<B::Region>)>,
    lists: [Mutex<Vec<B>>; CLASSES],
}

impl<B: Block> FreeBlocks<B> {
    pub fn new() -> FreeBlocks<B> {
        FreeBlocks {
            buddy: Mutex::new((Buddy::default(), Vec::new())),
            lists: std::array::from_fn(|_| Mutex::new(Vec::new())),
        }
    }

    /// Takes at least one block of a class, and at most `want`. When there is none, `grow` adds a
    /// region that holds as many bytes as it is told, with `growth` locked.
    ///
    /// # Errors
    /// Fails as `grow` does.
    pub fn take<G, E>(
        &self,
        class: usize,
        want: usize,
        growth: &Mutex<G>,
        mut grow: impl FnMut(&mut G, usize) -> Result<(), E>,
    ) -> Result<Vec<B>, E> {
        let mut got = Vec::with_capacity(want);
        {
            let mut list = self.lists[class].lock();
            let keep = list.len().saturating_sub(want);
            got.extend(list.drain(keep..));
        }
        if got.is_empty() {
            self.refill(class, want, &mut got);
        }
        if got.is_empty() {
            let mut growth = growth.lock();
            // Another thread may have grown the arena while this one waited.
            self.refill(class, want, &mut got);
            if got.is_empty() {
                self.collect();
                self.refill(class, want, &mut got);
            }
            // Threads that find the class lists empty take from a new region without the growth
            // lock, so one region may not be enough.
            while got.is_empty() {
                grow(&mut growth, class_len(class))?;
                self.refill(class, want, &mut got);
            }
        }
        Ok(got)
    }

    /// Frees blocks of a class.
    pub fn give(&self, class: usize, blocks: impl IntoIterator<Item = B>) {
        self.lists[class].lock().extend(blocks);
    }

    /// Adds a region of `len` bytes, all free.
    pub fn add(&self, region: B::Region, len: usize) {
        let mut guard = self.buddy.lock();
        guard.0.add_region(len);
        guard.1.push(region);
    }

    /// Number of free bytes.
    pub fn free_bytes(&self) -> usize {
        let mut free = self.buddy.lock().0.free_bytes();
        for (class, list) in self.lists.iter().enumerate() {
            free += list.lock().len() * class_len(class);
        }
        free
    }

    /// Number of bytes of pages that may be present.
    pub fn present_bytes(&self) -> usize {
        self.buddy.lock().0.present_bytes()
    }

    fn refill(&self, class: usize, want: usize, out: &mut Vec<B>) {
        let mut guard = self.buddy.lock();
        let (buddy, regions) = &mut *guard;
        while out.len() < want {
            let Some(place) = buddy.take(class) else {
                break;
            };
            out.push(B::at(regions, place, class));
        }
    }

    /// Takes free blocks whose pages may be present, at most so many, to give their memory back to
    /// the system.
    pub fn take_present(&self, most: usize) -> Vec<(Place, usize)> {
        self.buddy.lock().0.take_present(most)
    }

    /// Frees a block of [`FreeBlocks::take_present`].
    pub fn give_back(&self, (place, class): (Place, usize), released: bool) {
        let buddy = &mut self.buddy.lock().0;
        match released {
            true => buddy.give_released(place, class),
            false => buddy.give(place, class),
        }
    }

    /// Takes chunks of which every page may be present; see [`Buddy::take_full`].
    pub fn take_full(&self, most: usize) -> Vec<Place> {
        self.buddy.lock().0.take_full(most)
    }

    /// Puts a chunk of [`FreeBlocks::take_full`] back.
    pub fn not_joined(&self, place: Place) {
        self.buddy.lock().0.not_joined(place);
    }

    /// Moves the blocks of the class lists back to the buddy lists, so that free neighbours join.
    pub fn collect(&self) {
        let mut guard = self.buddy.lock();
        for (class, list) in self.lists.iter().enumerate() {
            for block in list.lock().drain(..) {
                guard.0.give(block.place(), class);
            }
        }
    }
}
