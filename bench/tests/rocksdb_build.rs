//! Tests of RocksDB as the scripts compile it: its instructions, an older processor, and the
//! ordinary build as a fallback.
#![cfg(target_arch = "x86_64")]

use std::process::Command;

#[test]
fn rocksdb_has_its_fast_checksum() {
    if !pumice_io::cpu::has_fast_crc32c() {
        println!(
            "skipped: rocksdb_has_its_fast_checksum: built without SSE4.2 and PCLMULQDQ; scripts/test builds with them"
        );
        return;
    }
    // 66 0F 3A 44 is PCLMULQDQ (Intel 64 and IA-32 Architectures Software Developer's Manual,
    // volume 2B). Nothing else in this program has a reason to use it. The register operands and
    // the selectors are those of RocksDB's two multiplications, of the low and of the high halves.
    let program = std::fs::read(env!("CARGO_BIN_EXE_db_bench")).unwrap();
    let selectors: Vec<u8> = program
        .windows(6)
        .filter(|w| w[..4] == [0x66, 0x0f, 0x3a, 0x44] && w[4] >= 0xc0)
        .map(|w| w[5])
        .collect();
    assert!(
        selectors.contains(&0x00) && selectors.contains(&0x10),
        "PCLMULQDQ in db_bench has the selectors {selectors:x?}"
    );
}

#[test]
fn an_older_processor_gets_one_line() {
    pumice_confine::assert_refused_by_older_processor(
        "an_older_processor_gets_one_line",
        pumice_io::cpu::has_fast_crc32c(),
        &[
            env!("CARGO_BIN_EXE_db_bench"),
            env!("CARGO_BIN_EXE_fscompare"),
            env!("CARGO_BIN_EXE_bdevperf"),
            env!("CARGO_BIN_EXE_nvmeperf"),
        ],
    );
}

/// Runs `scripts/rocksdb` with a target directory of its own, so that it finds no archive.
fn compile_rocksdb(environment: &[(&str, &str)]) -> (String, String) {
    let target = tempfile::tempdir().unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/rocksdb");
    let run = Command::new(script)
        .env("CARGO_TARGET_DIR", target.path())
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    assert!(run.status.success(), "{run:?}");
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(run.stdout), text(run.stderr))
}

#[test]
fn where_unity_files_cannot_be_compiled_one_line_says_why() {
    let broken_compiler = tempfile::tempdir().unwrap();
    let broken = broken_compiler.path().join("cxx");
    std::fs::write(
        &broken,
        "#!/bin/sh\n[ \"$1\" = --version ] && exec echo broken 1.0\necho 'x.cc:1: error: no' >&2; exit 1\n",
    )
    .unwrap();
    std::process::Command::new("chmod")
        .arg("+x")
        .arg(&broken)
        .status()
        .unwrap();
    for (environment, reason) in [
        (
            [("CXX", "/nonexistent/g++"), ("ROCKSDB_JOBS", "2")],
            "there is no /nonexistent/g++",
        ),
        ([("ROCKSDB_JOBS", "0"), ("CXX", "g++")], "memory"),
        (
            [("CXX", broken.to_str().unwrap()), ("ROCKSDB_JOBS", "2")],
            "did not compile (x.cc:1: error: no",
        ),
    ] {
        let (folder, said) = compile_rocksdb(&environment);
        assert_eq!(folder, "", "{said}");
        let line = said.lines().last().unwrap();
        assert!(
            line.starts_with("rocksdb: the ordinary build is used") && line.contains(reason),
            "{said}"
        );
    }
}
