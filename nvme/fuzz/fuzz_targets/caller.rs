#![no_main]
//! See `pumice_nvme::conformance::fuzz::caller`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| pumice_nvme::conformance::fuzz::caller(data));
