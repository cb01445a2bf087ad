//! Tries the free blocks of an arena in orders of steps that a test with threads hardly ever meets:
//! a block has one owner, none is lost, and the arena grows no more than it has to.

mod sync {
    /// A mutex with the interface of the one that the arena uses.
    pub struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Mutex<T> {
            Mutex(shuttle::sync::Mutex::new(value))
        }

        pub fn lock(&self) -> shuttle::sync::MutexGuard<'_, T> {
            self.0.lock().unwrap()
        }
    }
}
#[path = "../src/dma/buddy.rs"]
#[allow(dead_code, reason = "the model needs a part of it")]
mod buddy;
#[path = "../src/dma/free.rs"]
#[allow(dead_code, reason = "the model needs a part of it")]
mod free;

use std::sync::Arc;

use buddy::{Place, class_len};
use free::{Block, FreeBlocks};
use shuttle::sync::atomic::{AtomicUsize, Ordering};
use sync::Mutex;

/// Number of orders that are tried, at random and by preemption at few points.
const ORDERS: usize = 2000;
/// Length of a region: two of the smallest blocks.
const REGION: usize = 1024;

struct Piece(Place);

impl Block for Piece {
    type Region = ();

    fn at(regions: &[()], place: Place, _: usize) -> Piece {
        assert!((place.slot as usize) < regions.len());
        Piece(place)
    }

    fn place(&self) -> Place {
        self.0
    }
}

struct Arena {
    free: FreeBlocks<Piece>,
    /// Number of regions.
    growth: Mutex<usize>,
    /// The owners of each piece of the smallest size.
    owners: [AtomicUsize; 8],
}

impl Arena {
    fn new() -> Arc<Arena> {
        Arc::new(Arena {
            free: FreeBlocks::new(),
            growth: Mutex::new(0),
            owners: std::array::from_fn(|_| AtomicUsize::new(0)),
        })
    }

    fn pieces(&self, piece: &Piece, class: usize) -> impl Iterator<Item = &AtomicUsize> {
        let first = piece.0.slot as usize * REGION + piece.0.offset as usize;
        let first = first / class_len(0);
        self.owners[first..first + class_len(class) / class_len(0)].iter()
    }

    fn take(&self, class: usize) -> Piece {
        let grow = |regions: &mut usize, _| -> Result<(), ()> {
            *regions += 1;
            self.free.add((), REGION);
            Ok(())
        };
        let mut got = self.free.take(class, 1, &self.growth, grow).unwrap();
        let piece = got.pop().expect("at least one");
        for owners in self.pieces(&piece, class) {
            assert_eq!(owners.fetch_add(1, Ordering::SeqCst), 0, "two owners");
        }
        piece
    }

    fn give(&self, class: usize, piece: Piece) {
        for owners in self.pieces(&piece, class) {
            owners.fetch_sub(1, Ordering::SeqCst);
        }
        self.free.give(class, [piece]);
    }

    fn regions(&self) -> usize {
        *self.growth.lock()
    }
}

/// Runs the steps on a thread each, and returns what they return.
fn on_threads<T: Send + 'static>(arena: &Arc<Arena>, steps: &[fn(&Arena) -> T]) -> Vec<T> {
    let threads: Vec<_> = steps
        .iter()
        .map(|step| {
            let (arena, step) = (Arc::clone(arena), *step);
            shuttle::thread::spawn(move || step(&arena))
        })
        .collect();
    threads.into_iter().map(|t| t.join().unwrap()).collect()
}

fn blocks_have_one_owner() {
    let arena = Arena::new();
    let small = |arena: &Arena| {
        for _ in 0..2 {
            let piece = arena.take(0);
            shuttle::thread::yield_now();
            arena.give(0, piece);
        }
    };
    // It needs the two halves of a region, which the others may have given back.
    let large = |arena: &Arena| {
        let piece = arena.take(1);
        shuttle::thread::yield_now();
        arena.give(1, piece);
    };
    on_threads(&arena, &[small, small, large]);
    let total = arena.regions() * REGION;
    assert_eq!(arena.free.free_bytes(), total, "bytes were lost");
    assert!(arena.regions() <= 2, "{} regions", arena.regions());
}

fn two_that_find_none_grow_it_once() {
    let arena = Arena::new();
    let take: fn(&Arena) -> Piece = |arena| arena.take(0);
    let taken = on_threads(&arena, &[take; 2]);
    assert_eq!(arena.regions(), 1, "the region holds both");
    for piece in taken {
        arena.give(0, piece);
    }
    // What was freed is joined again before the arena grows.
    let whole = arena.take(1);
    assert_eq!(arena.regions(), 1);
    arena.give(1, whole);
}

/// A chunk becomes a huge page with all of its pages.
fn a_huge_page_has_no_page_that_was_released() {
    const CHUNK: usize = 2 << 20;
    let free = Arc::new(FreeBlocks::<Piece>::new());
    let growth = Arc::new(Mutex::new(()));
    let present = Arc::new(AtomicUsize::new(CHUNK));
    free.add((), CHUNK);
    let class = buddy::class_of(CHUNK);
    let grow = |_: &mut (), _| Err::<(), _>("there is room");
    let used = free.take(class, 1, &growth, grow).unwrap();
    free.give(class, used);
    free.collect();
    let joins = {
        let (free, present) = (Arc::clone(&free), Arc::clone(&present));
        shuttle::thread::spawn(move || {
            free.join(1, |(), _| {
                shuttle::thread::yield_now();
                present.store(CHUNK, Ordering::SeqCst);
                Ok::<(), ()>(())
            })
        })
    };
    let release = |(): &(), _, len| {
        assert_eq!(present.fetch_sub(len, Ordering::SeqCst), CHUNK);
        Ok::<(), ()>(())
    };
    let (released, _) = free.release(9, &growth, |()| true, release);
    assert_eq!(released, CHUNK);
    joins.join().unwrap();
    assert_eq!(present.load(Ordering::SeqCst), free.present_bytes());
}

#[test]
fn no_huge_page_brings_released_memory_back() {
    shuttle::check_random(a_huge_page_has_no_page_that_was_released, ORDERS);
    shuttle::check_pct(a_huge_page_has_no_page_that_was_released, ORDERS, 3);
}

#[test]
fn a_block_has_one_owner_and_none_is_lost() {
    shuttle::check_random(blocks_have_one_owner, ORDERS);
    shuttle::check_pct(blocks_have_one_owner, ORDERS, 3);
}

#[test]
fn an_arena_grows_no_more_than_it_has_to() {
    shuttle::check_random(two_that_find_none_grow_it_once, ORDERS);
    shuttle::check_pct(two_that_find_none_grow_it_once, ORDERS, 3);
}
