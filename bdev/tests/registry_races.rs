//! Tests of a registry that several threads change at the same time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pumice_bdev::passthru::Passthru;
use pumice_bdev::registry::{Bdev, Event, Registry};
use pumice_bdev::{BdevError, BlockDevice};

/// Enough for a race to be met, on one processor as well.
const ROUNDS: usize = 5_000;

fn null(registry: &Registry, name: &str) -> Result<Bdev, BdevError> {
    let dev = pumice_bdev::open(&format!("null://1M?name={name}"))?;
    registry.register(dev, Vec::new())
}

/// Lets `other` run again and again in a thread of its own while `this` runs. Then `over` is set.
fn beside(over: &AtomicBool, mut other: impl FnMut() + Send, this: impl FnOnce()) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                other();
            }
        });
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(this));
        over.store(true, Ordering::Release);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
}

/// A device that is added while the one below it is being removed is refused, or removed with it.
#[test]
fn no_device_stays_on_one_that_was_removed() {
    let registry = Registry::new();
    let (over, mut built) = (AtomicBool::new(false), 0);
    let come_and_go = || {
        let bdev = null(&registry, "M").unwrap();
        while bdev.claimed_by().is_none() && !over.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
        registry.remove("M").unwrap();
    };
    beside(&over, come_and_go, || {
        let start = Instant::now();
        while built < 2 * ROUNDS && start.elapsed() < Duration::from_secs(30) {
            let Ok(claim) = registry.claim("M", "P") else {
                continue;
            };
            let top = Arc::new(Passthru::new("P", Arc::new(claim)));
            match registry.register(top, vec!["M".to_owned()]) {
                Ok(_) => built += 1,
                Err(BdevError::Removed { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            let all = registry.list();
            for bdev in &all {
                for below in bdev.below() {
                    let there = all.iter().any(|b| b.info().name == *below);
                    assert!(there, "{} is without {below}", bdev.info().name);
                }
            }
            // It may have been removed already.
            let _ = registry.remove("P");
        }
    });
    assert!(built > 0, "no round met the device");
}

/// A claim of a device that was removed says nothing about another one that has got its name.
#[test]
fn a_claim_is_not_of_the_next_device_of_the_name() {
    let registry = Registry::new();
    null(&registry, "M").unwrap();
    let stale = Arc::new(registry.claim("M", "P").unwrap());
    registry.remove("M").unwrap();
    null(&registry, "M").unwrap();
    let on_it = Arc::new(Passthru::new("P", stale));
    let refused = registry.register(on_it, vec!["M".to_owned()]);
    assert!(
        matches!(&refused, Err(BdevError::Removed { name }) if name == "M"),
        "{refused:?}"
    );
    assert!(registry.claim("M", "Q").is_ok());
}

/// Listeners hear of additions and removals in the order in which they happened.
#[test]
fn events_are_told_in_order() {
    let registry = Registry::new();
    let there = Arc::new(Mutex::new((false, 0, 0)));
    let heard = Arc::clone(&there);
    registry.listen(move |event| {
        let mut heard = heard.lock().unwrap();
        let added = matches!(event, Event::Added(_));
        if heard.0 == added {
            heard.1 += 1;
        }
        heard.0 = added;
        heard.2 += 1;
    });
    let remove = || {
        let _ = registry.remove("M");
    };
    beside(&AtomicBool::new(false), remove, || {
        let mut added = 0;
        while added < ROUNDS {
            added += usize::from(null(&registry, "M").is_ok());
        }
    });
    let _ = registry.remove("M");
    let heard = there.lock().unwrap();
    assert_eq!(heard.2, 2 * ROUNDS, "each event once");
    assert_eq!(heard.1, 0, "out of order");
}

/// A listener that fails does not keep the others from later events.
#[test]
fn events_go_on_after_a_listener_that_panics() {
    let registry = Registry::new();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&heard);
    registry.listen(move |event| {
        told.lock().unwrap().push(event.clone());
        assert_ne!(*event, Event::Added("A".to_owned()), "a made-up failure");
    });
    let add = std::panic::AssertUnwindSafe(|| null(&registry, "A"));
    assert!(std::panic::catch_unwind(add).is_err());
    null(&registry, "B").unwrap();
    let names = ["A", "B"].map(|name| Event::Added(name.to_owned()));
    assert_eq!(*heard.lock().unwrap(), names);
}
