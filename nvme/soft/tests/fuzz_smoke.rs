//! Runs the fuzzers' bodies on seeded input for a few seconds. `PUMICE_FUZZ_SECONDS` sets another
//! time and `PUMICE_FUZZ_SEED` another seed. A failure names its seed.

use std::time::{Duration, Instant};

use pumice_nvme_soft::conformance::fuzz;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

fn run(name: &str, body: fn(&[u8])) {
    let time = Duration::from_secs(number("PUMICE_FUZZ_SECONDS", 2));
    let start = Instant::now();
    let mut seed = number("PUMICE_FUZZ_SEED", 1);
    while start.elapsed() < time {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            state.wrapping_mul(0x2545_f491_4f6c_dd1d)
        };
        let len = usize::try_from(next() % 600).unwrap();
        let input: Vec<u8> = (0..len).map(|_| next().to_be_bytes()[0]).collect();
        let result = std::panic::catch_unwind(|| body(&input));
        assert!(result.is_ok(), "{name}: PUMICE_FUZZ_SEED={seed}");
        seed += 1;
    }
    println!("{name}: seeds up to {}", seed - 1);
}

#[test]
fn a_device_that_says_anything() {
    run("device", fuzz::device);
}

#[test]
fn a_caller_that_asks_for_anything() {
    run("caller", fuzz::caller);
}
