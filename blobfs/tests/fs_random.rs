//! Runs the file system on a device that fails and takes time, against a model. A failure prints
//! its seed: `PUMICE_SEED=n` runs that one alone, and `PUMICE_ROUNDS=n` runs more of them.

mod common;

use common::random::{Faults, rounds};

#[test]
fn without_faults() {
    rounds("without faults", 2, Faults::default(), 1, 160);
}

#[test]
fn failing_writes_and_reads() {
    let faults = Faults {
        io: true,
        ..Faults::default()
    };
    rounds("failing writes and reads", 4, faults, 1, 160);
}

#[test]
fn failing_writes_of_metadata() {
    let faults = Faults {
        metadata: true,
        ..Faults::default()
    };
    rounds("failing writes of metadata", 4, faults, 1, 160);
    let faults = Faults { io: true, ..faults };
    rounds("failing writes of data and metadata", 4, faults, 1, 160);
}

#[test]
fn failing_flushes_too() {
    let faults = Faults {
        io: true,
        flushes: true,
        ..Faults::default()
    };
    rounds("failing flushes", 4, faults, 1, 160);
}

#[test]
fn three_threads_on_a_slow_device() {
    let faults = Faults {
        slow: true,
        ..Faults::default()
    };
    rounds("a slow device", 2, faults, 3, 100);
}

#[test]
fn three_threads_and_everything() {
    let faults = Faults {
        io: true,
        flushes: true,
        slow: true,
        ..Faults::default()
    };
    rounds("everything", 3, faults, 3, 100);
}
