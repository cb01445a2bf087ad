//! The programs that link RocksDB on a processor that lacks what it was compiled for.
#![cfg(target_arch = "x86_64")]

#[test]
fn an_older_processor_gets_one_line() {
    pumice_confine::assert_refused_by_older_processor(
        "an_older_processor_gets_one_line",
        pumice_io::cpu::has_fast_crc32c(),
        &[
            env!("CARGO_BIN_EXE_pumice-ldb"),
            env!("CARGO_BIN_EXE_pumice-sst_dump"),
            env!("CARGO_BIN_EXE_pumice-db"),
        ],
    );
}
