#![no_main]

#[allow(dead_code, reason = "each target uses one body")]
#[path = "../../tests/common/hostile.rs"]
mod hostile;

libfuzzer_sys::fuzz_target!(|data: &[u8]| hostile::journal(data));
