//! Tests of the registry that look inside.

use super::*;

fn null(registry: &Registry, name: &str) -> Bdev {
    let dev = crate::open(&format!("null://1M?name={name}")).expect("a device");
    registry.register(dev, Vec::new()).expect("a free name")
}

/// A device that reports its own removal takes no other one with it that has got its name.
#[test]
fn a_removal_that_is_reported_is_that_of_the_device() {
    let registry = Registry::new();
    let first = null(&registry, "M");
    registry.remove("M").expect("it is there");
    let second = null(&registry, "M");
    // The thread that reports it has looked before the removal.
    first.entry.removed.store(false, Ordering::Release);
    first.entry.surprise();
    assert!(!second.is_removed(), "the wrong device was removed");
    second.entry.surprise();
    assert!(second.is_removed() && registry.names().is_empty());
}

/// A time limit that is set while a device is about to be added is that device's, too.
#[test]
fn a_time_limit_is_that_of_a_device_added_meanwhile() {
    let registry = Registry::new();
    let limit = Duration::from_secs(7);
    let bdev = std::thread::scope(|scope| {
        // The lock is held as `set_timeout` holds it.
        let entries = registry.inner.entries.read();
        let adding = scope.spawn(|| null(&registry, "M"));
        // A thread that waits for the lock to change something keeps others from reading.
        while registry.inner.entries.try_read().is_some() {
            std::thread::yield_now();
        }
        *registry.inner.timeout.lock() = (limit, TimeoutAction::Log);
        drop(entries);
        adding.join().expect("it is added")
    });
    let has = bdev.entry.timeout_ticks.load(Ordering::Relaxed);
    assert_eq!(has, Clock::get().ticks(limit));
}
