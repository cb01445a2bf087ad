#![no_main]
//! See `pumice_nvme_soft::conformance::fuzz::caller`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| pumice_nvme_soft::conformance::fuzz::caller(data));
