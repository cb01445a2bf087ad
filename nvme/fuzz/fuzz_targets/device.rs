#![no_main]
//! See `pumice_nvme::conformance::fuzz::device`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| pumice_nvme::conformance::fuzz::device(data));
