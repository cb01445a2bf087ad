//! The lock of the metadata, in orders of steps that a test with threads hardly ever meets: one has it at a
//! time, nobody who waits is forgotten, and a future that is dropped takes nobody's turn with it.

mod sync {
    pub use shuttle::sync::MutexGuard;
    pub use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    pub use shuttle::thread::{Thread, current, park};

    /// A mutex without poison, as the library's.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub fn new(value: T) -> Mutex<T> {
            Mutex(shuttle::sync::Mutex::new(value))
        }

        pub fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap()
        }
    }
}
#[path = "../src/blobstore/lock.rs"]
mod lock;

use std::future::Future as _;
use std::sync::Arc;
use std::task::{Context, Waker};

use lock::FairLock;
use sync::{AtomicUsize, Ordering};

/// How many orders are tried, at random and by preemption at few points.
const ORDERS: usize = 3000;

/// Counts one more, and looks that nobody else is at it.
fn count(value: &mut u32, inside: &AtomicUsize) {
    assert_eq!(
        inside.fetch_add(1, Ordering::SeqCst),
        0,
        "two have the lock"
    );
    *value += 1;
    inside.fetch_sub(1, Ordering::SeqCst);
}

fn all_kinds_of_waiters() {
    let lock = Arc::new(FairLock::new(0));
    let inside = Arc::new(AtomicUsize::new(0));
    let spawn = |work: fn(&FairLock<u32>, &AtomicUsize)| {
        let (lock, inside) = (Arc::clone(&lock), Arc::clone(&inside));
        shuttle::thread::spawn(move || work(&lock, &inside))
    };
    let threads = [
        // Threads that sleep.
        spawn(|lock, inside| {
            for _ in 0..2 {
                count(&mut lock.lock(), inside);
            }
        }),
        // A future that is polled by whoever comes first, then by somebody else.
        spawn(|lock, inside| {
            let mut waiting = Box::pin(lock.lock_async());
            let mut nobody = Context::from_waker(Waker::noop());
            match waiting.as_mut().poll(&mut nobody) {
                std::task::Poll::Ready(mut value) => count(&mut value, inside),
                std::task::Poll::Pending => {
                    count(&mut shuttle::future::block_on(waiting), inside);
                }
            }
        }),
        // A future that is dropped, before or after its turn has come.
        spawn(|lock, inside| {
            let mut waiting = Box::pin(lock.lock_async());
            let mut nobody = Context::from_waker(Waker::noop());
            if waiting.as_mut().poll(&mut nobody).is_pending() {
                shuttle::thread::yield_now();
            }
            drop(waiting);
            count(&mut lock.lock(), inside);
        }),
    ];
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(*lock.lock(), 4);
}

/// Who is forgotten sleeps for ever: the model ends with a deadlock then.
#[test]
fn everybody_who_waits_has_a_turn() {
    shuttle::check_random(all_kinds_of_waiters, ORDERS);
    shuttle::check_pct(all_kinds_of_waiters, ORDERS, 3);
}
