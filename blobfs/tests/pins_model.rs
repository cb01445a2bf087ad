//! A model of the pins of a frame, in all orders in which threads can see each other's steps. One
//! release is the last, and whoever does it sees what was done under the others: it gives the frame
//! to the cache, which may free it.

mod primitives {
    pub use loom::sync::atomic::{AtomicUsize, Ordering};
}
#[path = "../src/fs/pins.rs"]
mod pins;

use loom::sync::Arc;
use pins::Pins;
use primitives::{AtomicUsize, Ordering};

#[test]
fn the_last_release_sees_all_that_was_done_under_the_others() {
    loom::model(|| {
        // It is held by whoever appends, then by two writes.
        let shared = Arc::new((Pins::new(true), [AtomicUsize::new(0), AtomicUsize::new(0)]));
        let last = Arc::new(AtomicUsize::new(0));
        let release = |shared: &(Pins, [AtomicUsize; 2]), last: &AtomicUsize| {
            if shared.0.release() {
                last.fetch_add(1, Ordering::Relaxed);
                let done = shared.1.iter().map(|w| w.load(Ordering::Relaxed));
                assert_eq!(
                    done.sum::<usize>(),
                    2,
                    "a write under the frame was not seen"
                );
            }
        };
        let writes: Vec<_> = (0..2)
            .map(|n| {
                shared.0.hold();
                let (shared, last) = (Arc::clone(&shared), Arc::clone(&last));
                loom::thread::spawn(move || {
                    shared.1[n].store(1, Ordering::Relaxed);
                    release(&shared, &last);
                })
            })
            .collect();
        assert!(shared.0.any());
        release(&shared, &last);
        for write in writes {
            write.join().unwrap();
        }
        assert_eq!(last.load(Ordering::Relaxed), 1, "it was handed over once");
        assert!(!shared.0.any());
    });
}
