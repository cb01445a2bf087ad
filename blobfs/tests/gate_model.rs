//! Tries the gate of a blob in orders of steps that a test with threads hardly ever meets: while it
//! is closed and empty, nobody is inside.

mod sync {
    pub use shuttle::sync::atomic::{AtomicUsize, Ordering};
}
#[path = "../src/blobstore/lanes.rs"]
mod lanes;

use std::sync::Arc;

use lanes::{LANES, Lanes};
use sync::{AtomicUsize, Ordering};

/// Number of orders that are tried, at random and by preemption at few points.
const ORDERS: usize = 3000;

fn nobody_is_inside_while_clusters_move() {
    let lanes = Arc::new(Lanes::default());
    // 1 while the closer has the clusters exclusively.
    let moving = Arc::new(AtomicUsize::new(0));
    let entered = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = (0..2)
        .map(|lane| {
            let (lanes, moving, entered) = (
                Arc::clone(&lanes),
                Arc::clone(&moving),
                Arc::clone(&entered),
            );
            shuttle::thread::spawn(move || {
                for _ in 0..2 {
                    if lanes.enter(lane * (LANES - 1)) {
                        entered.fetch_add(1, Ordering::SeqCst);
                        for _ in 0..2 {
                            assert_eq!(moving.load(Ordering::SeqCst), 0, "inside of a closed gate");
                        }
                        lanes.leave(lane * (LANES - 1));
                    }
                }
            })
        })
        .collect();
    let closer = {
        let (lanes, moving) = (Arc::clone(&lanes), Arc::clone(&moving));
        shuttle::thread::spawn(move || {
            for _ in 0..2 {
                lanes.shut();
                while !lanes.is_empty() {
                    shuttle::thread::yield_now();
                }
                moving.store(1, Ordering::SeqCst);
                moving.store(0, Ordering::SeqCst);
                assert!(lanes.open());
            }
        })
    };
    for thread in threads {
        thread.join().unwrap();
    }
    closer.join().unwrap();
    assert!(lanes.is_empty());
    assert!(lanes.enter(0), "open at the end");
}

#[test]
fn closed_and_empty_means_that_nobody_is_inside() {
    shuttle::check_random(nobody_is_inside_while_clusters_move, ORDERS);
    shuttle::check_pct(nobody_is_inside_while_clusters_move, ORDERS, 3);
}
