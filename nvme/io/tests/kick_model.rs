//! A model of a sleeping controller thread, in all orders in which two threads can see each other's
//! steps: it never sleeps on while there is work of which it was told.

mod sync {
    use std::time::Duration;

    pub use loom::sync::atomic::{AtomicBool, Ordering, fence};
    pub use loom::thread::{Thread, current};

    /// A mutex with the interface of the one that the driver uses.
    #[derive(Debug, Default)]
    pub struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
            self.0.lock().unwrap()
        }
    }

    /// Sleeps until woken. Time does not pass in a model, so a thread that nobody wakes fails it.
    pub fn park_timeout(_: Duration) {
        loom::thread::park();
    }
}
#[path = "../src/sys/kick.rs"]
mod kick;

use std::time::Duration;

use kick::Kick;
use loom::sync::Arc;
use sync::{AtomicBool, Ordering};

#[test]
fn a_thread_that_was_told_of_work_does_not_sleep_on() {
    loom::model(|| {
        let kick = Arc::new((Kick::default(), AtomicBool::new(false)));
        let controller = Arc::clone(&kick);
        // Nobody joins it, because loom takes the wake-up of a thread that joins for the other's end.
        loom::thread::spawn(move || {
            let (kick, work) = &*controller;
            kick.attach();
            let busy = || work.load(Ordering::Relaxed);
            while !busy() {
                kick.sleep_unless(Duration::MAX, busy);
            }
        });
        kick.1.store(true, Ordering::Relaxed);
        kick.0.wake();
    });
}
