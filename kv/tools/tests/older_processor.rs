//! The programs that link RocksDB on a processor that lacks what it was compiled for.
#![cfg(target_arch = "x86_64")]

#[test]
fn an_older_processor_gets_one_line() {
    let test = "an_older_processor_gets_one_line";
    if !pumice_io::cpu::has_fast_crc32c() {
        println!("skipped: {test}: built for any x86-64");
        return;
    }
    for program in [
        env!("CARGO_BIN_EXE_pumice-ldb"),
        env!("CARGO_BIN_EXE_pumice-sst_dump"),
        env!("CARGO_BIN_EXE_pumice-db"),
    ] {
        let Some(run) = pumice_confine::on_older_processor(test, program) else {
            return;
        };
        let said = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(2), "{program}: {said}");
        assert!(said.contains("PUMICE_CPU=generic"), "{program}: {said}");
    }
}
