#![no_main]
//! See `pumice_nvme_soft::conformance::fuzz::device`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| pumice_nvme_soft::conformance::fuzz::device(data));
