//! A test that runs RocksDB's own `tools/benchmark.sh`, unmodified, on an image.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Returns the script, in the sources that librocksdb-sys brings.
fn script() -> PathBuf {
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&metadata.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let sys = packages
        .iter()
        .find(|p| p["name"] == "librocksdb-sys")
        .unwrap();
    let manifest = Path::new(sys["manifest_path"].as_str().unwrap());
    manifest
        .parent()
        .unwrap()
        .join("rocksdb/tools/benchmark.sh")
}

#[test]
fn its_tests_run_on_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let program = env!("CARGO_BIN_EXE_db_bench");
    std::os::unix::fs::symlink(program, dir.path().join("db_bench")).unwrap();
    let image = dir.path().join("disk.img");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(2 << 30)
        .unwrap();
    let out_dir = dir.path().join("out");
    for test in [
        "bulkload",
        "overwrite",
        "readrandom",
        "readwhilewriting",
        "fwdrange",
        "multireadrandom",
        // The last one: RocksDB's MultiGet crashes, on the kernel's file system too, where tables have merge operands and no merge
        // operator is given.
        "mergerandom",
    ] {
        let run = Command::new("bash")
            .arg(script())
            .args([test, &format!("--device={}", image.display())])
            .current_dir(dir.path())
            .env("DB_DIR", "/bench/db")
            .env("WAL_DIR", "/bench/wal")
            .env("OUTPUT_DIR", &out_dir)
            .env("NUM_KEYS", "10000")
            .env("NUM_THREADS", "2")
            .env("CACHE_SIZE", "8388608")
            .env("WRITE_BUFFER_SIZE_MB", "1")
            .env("TARGET_FILE_SIZE_BASE_MB", "1")
            .env("MAX_BYTES_FOR_LEVEL_BASE_MB", "4")
            .env("MAX_BACKGROUND_JOBS", "2")
            .env("COMPRESSION_TYPE", "lz4")
            // The durations of its tests are those of a benchmark. Here the number of writes ends
            // them.
            .env("DURATION", if test == "bulkload" { "0" } else { "1" })
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&run.stdout).into_owned()
            + &String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success(), "{test}: {said}");
        assert!(!said.contains("unknown flag"), "{test}: {said}");
        let report = std::fs::read_to_string(out_dir.join("report.tsv")).unwrap();
        let last = report.lines().last().unwrap_or_default();
        assert!(last.contains(test), "{test}: {report}\n{said}");
        let ops_per_second: f64 = last.split('\t').next().unwrap().parse().unwrap_or(0.0);
        assert!(ops_per_second > 0.0, "{test}: {report}\n{said}");
    }
}
