//! The free blocks of an arena: a list for each size class above the buddy lists.
//! `tests/free_model.rs` compiles this file again and tries orders in which threads take its steps.
//!
//! Locks: that of the pages, the lock of growth, the buddy lists, one of the class lists, in this order.

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
    /// Held while a chunk is chosen and joined, and while pages are chosen and released: a chunk that is joined has all of
    /// its pages, those too that were released since it was chosen.
    pages: Mutex<()>,
}

impl<B: Block> FreeBlocks<B> {
    pub fn new() -> FreeBlocks<B> {
        FreeBlocks {
            buddy: Mutex::new((Buddy::default(), Vec::new())),
            lists: std::array::from_fn(|_| Mutex::new(Vec::new())),
            pages: Mutex::new(()),
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

    /// Has `release` give the memory of free blocks whose pages may be present back to the system, at most of so many, if
    /// `may` agrees. `growth` is locked meanwhile. Returns the number of bytes, and an error of `release`.
    pub fn release<G, E>(
        &self,
        most: usize,
        growth: &Mutex<G>,
        may: impl FnOnce(&G) -> bool,
        mut release: impl FnMut(&B::Region, Place, usize) -> Result<(), E>,
    ) -> (usize, Option<E>)
    where
        B::Region: Clone,
    {
        let _pages = self.pages.lock();
        let growth = growth.lock();
        if !may(&growth) {
            return (0, None);
        }
        let taken: Vec<_> = {
            let (buddy, regions) = &mut *self.buddy.lock();
            let taken = buddy.take_present(most).into_iter();
            taken
                .map(|(place, class)| (place, class, regions[place.slot as usize].clone()))
                .collect()
        };
        let (mut bytes, mut failed) = (0, None);
        for (place, class, region) in taken {
            let released = release(&region, place, class_len(class));
            let buddy = &mut self.buddy.lock().0;
            match released {
                Ok(()) => {
                    buddy.give_released(place, class);
                    bytes += class_len(class);
                }
                Err(error) => {
                    buddy.give(place, class);
                    failed = Some(error);
                }
            }
        }
        (bytes, failed)
    }

    /// Has `join` make huge pages of chunks of which every page may be present, of at most so many, and of each once until a
    /// page of it is released. Returns their number, and an error of `join`, whose chunk is tried again by another call.
    pub fn join<E>(
        &self,
        most: usize,
        mut join: impl FnMut(&B::Region, Place) -> Result<(), E>,
    ) -> (usize, Option<E>)
    where
        B::Region: Clone,
    {
        let (mut done, mut failed) = (0, Vec::new());
        for _ in 0..most {
            let _pages = self.pages.lock();
            let full = {
                let (buddy, regions) = &mut *self.buddy.lock();
                let place = buddy.take_full();
                place.map(|place| (place, regions[place.slot as usize].clone()))
            };
            let Some((place, region)) = full else {
                break;
            };
            match join(&region, place) {
                Ok(()) => done += 1,
                Err(error) => failed.push((place, error)),
            }
        }
        for (place, _) in &failed {
            self.buddy.lock().0.not_joined(*place);
        }
        (done, failed.pop().map(|(_, error)| error))
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
