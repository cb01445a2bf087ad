//! Configurations of arbitrary text.
#![no_main]

use pumice_bdev_control::config;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = config::check_form("fuzz", text);
});
