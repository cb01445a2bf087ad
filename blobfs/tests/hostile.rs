//! Runs the fuzz targets' bodies on seeded random input. Nothing may panic, and no I/O may go
//! outside of the device.

#[path = "common/hostile.rs"]
mod hostile;

use std::time::{Duration, Instant};

use rand::prelude::*;

/// Runs `target` on random bytes, at least `least` inputs, for at most about a second more.
fn run(target: fn(&[u8]), max_len: usize, least: u64) {
    let start = Instant::now();
    let mut seed = 0;
    while seed < least || (start.elapsed() < Duration::from_secs(1) && seed < 20 * least) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut data = vec![0; rng.random_range(0..=max_len)];
        rng.fill_bytes(&mut data);
        // Many bytes are zero, so that values are nearly right.
        let keep: f64 = rng.random();
        for byte in &mut data {
            if rng.random_bool(keep) {
                *byte = 0;
            }
        }
        println!("seed {seed}");
        target(&data);
        seed += 1;
    }
}

#[test]
fn super_blocks() {
    run(hostile::super_block, 100, 60);
}

#[test]
fn masks() {
    run(hostile::masks, 60, 60);
}

#[test]
fn raw_pages() {
    run(hostile::pages, 8192, 60);
}

#[test]
fn structured_pages() {
    run(hostile::structured, 400, 200);
}
