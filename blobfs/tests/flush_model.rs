//! A model of which writes a flush has covered, in orders of steps that a test with threads hardly
//! ever meets: what a caller was told to be durable is durable.

mod primitives {
    pub use shuttle::sync::atomic::{AtomicU64, Ordering};

    /// A mutex without poison, like the library's.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub fn lock(&self) -> shuttle::sync::MutexGuard<'_, T> {
            self.0.lock().unwrap()
        }
    }
}
#[path = "../src/fs/flushes.rs"]
mod flushes;

use std::sync::Arc;

use flushes::Flushes;
use primitives::{AtomicU64, Ordering};

/// Number of orders that are tried, at random and by preemption at few points.
const ORDERS: usize = 3000;

/// A device, with a bit for each write.
#[derive(Default)]
struct Device {
    cache: AtomicU64,
    durable: AtomicU64,
}

impl Device {
    /// Makes durable what is in the cache when it begins.
    fn flush(&self) {
        let begun = self.cache.load(Ordering::SeqCst);
        shuttle::thread::yield_now();
        self.durable.fetch_or(begun, Ordering::SeqCst);
    }
}

fn writers_share_flushes() {
    let shared = Arc::new((Device::default(), Flushes::default()));
    let threads: Vec<_> = (0..3)
        .map(|n| {
            let shared = Arc::clone(&shared);
            shuttle::thread::spawn(move || {
                let (device, flushes) = &*shared;
                for bit in [1 << (2 * n), 1 << (2 * n + 1)] {
                    device.cache.fetch_or(bit, Ordering::SeqCst);
                    let seq = flushes.completed();
                    let sent = flushes.cover(seq, || {
                        device.flush();
                        Ok::<(), ()>(())
                    });
                    assert_eq!(sent, Ok(()));
                    let durable = device.durable.load(Ordering::SeqCst);
                    assert_ne!(durable & bit, 0, "said to be durable, and is not");
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    let flushes = &shared.1;
    assert_eq!(flushes.covered(), flushes.reached());
}

#[test]
fn what_is_said_to_be_durable_is() {
    shuttle::check_random(writers_share_flushes, ORDERS);
    shuttle::check_pct(writers_share_flushes, ORDERS, 3);
}
