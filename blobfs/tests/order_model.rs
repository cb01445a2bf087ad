//! A model of the order of changes, in orders of steps that a test with threads hardly ever meets:
//! changes of one blob do not run together, nobody who waits is forgotten, and neither a future that
//! is dropped nor a thread that gives up blocks the turn of others.

mod sync {
    pub use shuttle::sync::MutexGuard;
    pub use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    pub use shuttle::thread::{Thread, current};

    /// In the model time stands still.
    pub fn park_timeout(_: std::time::Duration) {
        shuttle::thread::park();
    }

    /// A mutex without poison, like the library's.
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
mod format {
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct BlobId(pub u64);
}
#[allow(dead_code, reason = "the model uses a part of it")]
#[path = "../src/blobstore/order.rs"]
mod order;

use std::future::Future as _;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use format::BlobId;
use order::{Order, Scope};
use sync::{AtomicUsize, Ordering};

/// Number of orders that are tried, at random and by preemption at few points.
const ORDERS: usize = 3000;
/// The wait of a thread that does not give up.
const LIMIT: Duration = Duration::from_secs(3600);

/// An order, and the number of threads at each of two blobs.
#[derive(Default)]
struct World {
    order: Order,
    inside: [AtomicUsize; 2],
    done: AtomicUsize,
}

fn blobs(ids: &[u64]) -> Scope {
    Scope::Blobs(ids.iter().map(|id| BlobId(*id)).collect())
}

impl World {
    /// Enters these blobs, and checks that nobody else is at them.
    fn change(&self, ids: &[usize]) {
        for id in ids {
            let others = self.inside[*id].fetch_add(1, Ordering::SeqCst);
            assert_eq!(others, 0, "two change blob {id}");
        }
        for id in ids {
            self.inside[*id].fetch_sub(1, Ordering::SeqCst);
        }
        self.done.fetch_add(1, Ordering::SeqCst);
    }
}

fn all_kinds_of_waiters() {
    let world = Arc::new(World::default());
    let spawn = |work: fn(&World)| {
        let world = Arc::clone(&world);
        shuttle::thread::spawn(move || work(&world))
    };
    let threads = [
        // These threads sleep.
        spawn(|world| {
            for ids in [&[0][..], &[0, 1]] {
                let scope = blobs(&ids.iter().map(|id| *id as u64).collect::<Vec<_>>());
                let _turn = world.order.enter(scope, LIMIT).unwrap();
                world.change(ids);
            }
        }),
        // This is a future that is first polled by one thread, then by another.
        spawn(|world| {
            let mut waiting = Box::pin(world.order.enter_async(Scope::All, LIMIT));
            let mut nobody = Context::from_waker(Waker::noop());
            let turn = match waiting.as_mut().poll(&mut nobody) {
                std::task::Poll::Ready(turn) => turn,
                std::task::Poll::Pending => shuttle::future::block_on(waiting),
            };
            let _turn = turn.unwrap();
            world.change(&[0, 1]);
        }),
        // This is a future that is dropped, before or after its turn has come.
        spawn(|world| {
            let mut waiting = Box::pin(world.order.enter_async(blobs(&[1]), LIMIT));
            let mut nobody = Context::from_waker(Waker::noop());
            if waiting.as_mut().poll(&mut nobody).is_pending() {
                shuttle::thread::yield_now();
            }
            drop(waiting);
            let _turn = world.order.enter(blobs(&[1]), LIMIT).unwrap();
            world.change(&[1]);
        }),
        // This thread gives up at once, perhaps when its turn has just come.
        spawn(|world| {
            if let Some(_turn) = world.order.enter(blobs(&[0]), Duration::ZERO) {
                world.change(&[0]);
                world.done.fetch_sub(1, Ordering::SeqCst);
            }
        }),
    ];
    for thread in threads {
        thread.join().unwrap();
    }
    let _turn = world.order.enter(Scope::All, LIMIT).unwrap();
    assert_eq!(world.done.load(Ordering::SeqCst), 4);
}

/// One that is forgotten sleeps for ever, and the model then ends with a deadlock.
#[test]
fn everybody_who_waits_has_a_turn() {
    shuttle::check_random(all_kinds_of_waiters, ORDERS);
    shuttle::check_pct(all_kinds_of_waiters, ORDERS, 3);
}
