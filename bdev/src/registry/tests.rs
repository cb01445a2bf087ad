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

/// Once a time limit is set, every device has it: also one that is being added.
#[test]
fn a_time_limit_is_that_of_a_device_added_meanwhile() {
    let registry = Registry::new();
    // Setting the limit of many takes a while.
    for n in 0..200 {
        null(&registry, &format!("N{n}"));
    }
    let over = AtomicBool::new(false);
    let mut failure = None;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                null(&registry, "M");
                registry.remove("M").expect("it is there");
            }
        });
        for us in 1..2_000 {
            let limit = Duration::from_micros(us);
            registry.set_timeout(limit, TimeoutAction::Log);
            let ticks = Clock::get().ticks(limit).max(1);
            if let Some(bdev) = registry.get("M") {
                let has = bdev.entry.timeout_ticks.load(Ordering::Relaxed);
                if has != ticks {
                    failure = Some((us, has, ticks));
                }
            }
        }
        over.store(true, Ordering::Release);
    });
    assert_eq!(failure, None, "round, ticks of the device, ticks as set");
}
