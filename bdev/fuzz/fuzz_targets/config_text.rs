//! Configurations as text of any kind.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pumice_bdev::config;

fuzz_target!(|text: &str| {
    let _ = config::check_form("fuzz", text);
});
