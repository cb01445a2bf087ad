//! Tests of the real `db_bench` on our file system: small runs by its own flags, each followed by a
//! check of every key.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Small tables and memtables, so that flushes and compactions happen in a small run too.
const SMALL: [&str; 6] = [
    "--num=3000",
    "--seed=11",
    "--write_buffer_size=65536",
    "--target_file_size_base=65536",
    "--max_bytes_for_level_base=262144",
    "--progress_reports=false",
];

fn db_bench() -> Command {
    Command::new(env!("CARGO_BIN_EXE_db_bench"))
}

fn text(out: &Output) -> String {
    let (stdout, stderr) = (&out.stdout, &out.stderr);
    String::from_utf8_lossy(stdout).into_owned() + &String::from_utf8_lossy(stderr)
}

/// Runs with the small sizes and these flags. Returns the report.
fn run(flags: &[&str]) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("report.json");
    let out = db_bench()
        .args(SMALL)
        .args(flags)
        .arg(format!("--json={}", json.display()))
        .output()
        .unwrap();
    assert!(out.status.success(), "{flags:?}: {}", text(&out));
    serde_json::from_slice(&std::fs::read(&json).unwrap())
        .unwrap_or_else(|e| panic!("{flags:?}: {e}\n{}", text(&out)))
}

fn result<'a>(report: &'a Value, name: &str) -> &'a Value {
    let results = report["results"].as_array().unwrap();
    results
        .iter()
        .find(|r| r["name"] == name)
        .unwrap_or_else(|| panic!("no result for {name}: {report:#}"))
}

fn image(dir: &Path) -> String {
    format!(
        "--device=file://{}?size=512M&create=1",
        dir.join("disk.img").display()
    )
}

#[test]
fn without_flags_it_fills_reads_and_looks_at_every_key() {
    let dir = tempfile::tempdir().unwrap();
    let out = db_bench()
        .args(["--num=5000", "--compression_type=none"])
        .arg(format!("--image_dir={}", dir.path().display()))
        .output()
        .unwrap();
    let said = text(&out);
    assert!(out.status.success(), "{said}");
    for part in [
        "Built for:  ",
        "File system: Pumice's BlobFS on an image file in ",
        "Durability: a synced write when the device says so",
        "fillrandom   : ",
        "readrandom   : ",
        "per operation",
        "device writes/reads/flushes",
        "each the same by a scan and by Get",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_database_on_an_image_is_found_again_with_every_key() {
    let dir = tempfile::tempdir().unwrap();
    let device = image(dir.path());
    let filled = run(&[&device, "--benchmarks=fillseq", "--verify"]);
    assert_eq!(filled["verified_keys"], 3000);
    let again = run(&[
        &device,
        "--use_existing_db",
        "--benchmarks=readrandom,overwrite,compact,readseq",
        "--verify",
    ]);
    assert_eq!(again["verified_keys"], 3000);
    let found = &result(&again, "readrandom")["message"];
    assert!(
        found.as_str().unwrap().contains("(3000 of 3000 found)"),
        "{found}"
    );
    assert_eq!(result(&again, "readseq")["operations"], 3000);
    // Another directory of the same device holds another database.
    let other = run(&[
        &device,
        "--db=/x/y/other",
        "--benchmarks=fillseq",
        "--verify",
    ]);
    assert_eq!(other["verified_keys"], 3000);
}

#[test]
fn a_key_that_is_damaged_on_the_device_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let device = image(dir.path());
    // The tables contain 'value' alone, so that they can be found on the device.
    run(&[
        &device,
        "--benchmarks=fillseq,compact,flush",
        "--compression_type=none",
        "--value_size=1000",
    ]);
    let path = dir.path().join("disk.img");
    let mut bytes = std::fs::read(&path).unwrap();
    // This is the key of number 1500 as db_bench writes it, in every copy.
    let mut key = 1500_u64.to_be_bytes().to_vec();
    key.extend_from_slice(b"00000000");
    let places: Vec<usize> = bytes
        .windows(key.len())
        .enumerate()
        .filter(|(_, w)| *w == &key[..])
        .map(|(at, _)| at)
        .collect();
    assert!(!places.is_empty(), "the key is not on the device");
    for at in places {
        bytes[at + key.len() + 100] ^= 1;
    }
    std::fs::write(&path, bytes).unwrap();
    let (json, csv) = (dir.path().join("json"), dir.path().join("csv"));
    let out = db_bench()
        .args(SMALL)
        .args([
            &device,
            "--use_existing_db",
            "--benchmarks=readrandom",
            "--reads=10",
            "--report_interval_seconds=1",
            "--verify",
        ])
        .arg(format!("--json={}", json.display()))
        .arg(format!("--report_file={}", csv.display()))
        .output()
        .unwrap();
    let said = text(&out);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains("--verify: Corruption"), "{said}");
    // What was measured is there nevertheless.
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(result(&report, "readrandom")["operations"], 10);
    let found = report["verify_error"].as_str().unwrap();
    assert!(found.starts_with("Corruption"), "{found}");
    assert!(csv.exists());
}

#[test]
fn a_synced_put_reaches_the_device_before_it_is_acknowledged() {
    let report = run(&[
        "--device=malloc://512M",
        "--benchmarks=fillsync",
        "--writes=50",
    ]);
    let sync = result(&report, "fillsync");
    assert_eq!(sync["synced"], true);
    assert_eq!(sync["operations"], 50);
    assert!(sync["io"]["writes"].as_u64().unwrap() >= 50, "{sync:#}");
    assert_eq!(report["durability"]["sync_is_durable"], false, "memory");
}

#[test]
fn rocksdbs_benchmarks_of_every_kind_run() {
    for (benchmarks, flags) in [
        (
            "fillrandom,mixgraph",
            &[
                "--key_size=48",
                "--mix_get_ratio=0.83",
                "--mix_put_ratio=0.14",
                "--mix_seek_ratio=0.03",
                "--keyrange_num=1",
                "--reads=2000",
            ][..],
        ),
        (
            "fillseq,mergerandom,readrandommergerandom",
            &["--merge_operator=stringappend", "--merge_keys=500"],
        ),
        (
            "fillrandom,readrandom,readwhilewriting",
            &["--num_column_families=4", "--reads=500"],
        ),
        ("fillseq,readrandom", &["--transaction_db", "--num=1000"]),
        (
            "fillseq,readrandom",
            &["--optimistic_transaction_db", "--num=500"],
        ),
        (
            "fillseq,readrandom",
            &["--num_multi_db=3", "--num=1000", "--wal_dir=/logs"],
        ),
        (
            "fillseq,multireadrandom,seekrandom,readreverse,updaterandom",
            &["--multiread_batched", "--seek_nexts=5", "--reads=500"],
        ),
        (
            "fillseq,readseq",
            &[
                "--use_direct_reads",
                "--use_direct_io_for_flush_and_compaction",
            ],
        ),
        ("fillseq,backup,restore", &[]),
        (
            "fillrandom,readrandom",
            &["--enable_blob_files", "--min_blob_size=10"],
        ),
        (
            "fillseq,multireadrandom",
            &["--async_io", "--use_direct_reads", "--cache_size=65536"],
        ),
    ] {
        let list = format!("--benchmarks={benchmarks}");
        let mut all = vec!["--device=malloc://768M", &list];
        all.extend_from_slice(flags);
        let report = run(&all);
        let ran = report["results"].as_array().unwrap();
        assert!(!ran.is_empty(), "{benchmarks}: {report:#}");
        if benchmarks.contains("readrandommergerandom") {
            assert!(
                result(&report, "readrandommergerandom")["operations"]
                    .as_u64()
                    .unwrap()
                    > 0
            );
        }
    }
}

#[test]
fn every_database_and_column_family_is_looked_at() {
    let families = run(&[
        "--device=malloc://512M",
        "--benchmarks=fillseq",
        "--num_column_families=4",
        "--verify",
    ]);
    assert_eq!(families["verified_keys"], 3000);
    let databases = run(&[
        "--device=malloc://512M",
        "--benchmarks=fillseq",
        "--num_multi_db=2",
        "--wal_dir=/logs",
        "--verify",
    ]);
    assert_eq!(databases["verified_keys"], 2 * 3000);
}

#[test]
fn the_other_file_systems_run_the_same_tool() {
    let dir = tempfile::tempdir().unwrap();
    let db = format!("--db={}", dir.path().join("db").display());
    let kernel = run(&["--env=kernel", &db, "--benchmarks=fillseq", "--verify"]);
    assert_eq!(kernel["verified_keys"], 3000);
    let log = std::fs::read_to_string(dir.path().join("db/LOG")).unwrap();
    let version = format!(
        "RocksDB version: {}\n",
        pumice_rocksdb_tools::rocksdb_version()
    );
    assert!(log.contains(&version), "another RocksDB is linked");
    let memory = run(&["--env=mem", "--benchmarks=fillseq,readrandom", "--verify"]);
    assert_eq!(memory["verified_keys"], 3000);
    assert_eq!(memory["file_system"], "RocksDB's memory env");
    // This is RocksDB's own way to name our file system.
    let uri = run(&[
        "--fs_uri=blobfs://malloc://512M",
        "--benchmarks=fillseq",
        "--verify",
    ]);
    assert_eq!(uri["verified_keys"], 3000);
    assert_eq!(uri["env"], "uri");
}

/// The tables and keys of every kind can be looked at.
#[test]
fn retired_logs_are_used_again_where_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    for (name, count) in [("with", 4), ("without", 0)] {
        let db = dir.path().join(name);
        run(&[
            "--env=kernel",
            &format!("--db={}", db.display()),
            &format!("--recycle_log_file_num={count}"),
            "--benchmarks=fillrandom",
            "--verify",
        ]);
        let log = std::fs::read_to_string(db.join("LOG")).unwrap();
        assert_eq!(log.contains("reusing log "), count > 0, "{name}: {log}");
    }
    // Ours keeps every key with it, too.
    let report = run(&[
        &image(dir.path()),
        "--recycle_log_file_num=4",
        "--benchmarks=fillrandom",
        "--verify",
    ]);
    assert!(report["verified_keys"].as_u64().unwrap() > 0, "{report:#}");
}

#[test]
fn every_key_is_looked_at_as_the_database_was_written() {
    for flags in [
        &["--user_timestamp_size=8"][..],
        &["--merge_operator=stringappend"],
        &[
            "--prefix_size=8",
            "--memtablerep=prefix_hash",
            "--allow_concurrent_memtable_write=0",
        ],
    ] {
        let mut all = vec![
            "--device=malloc://512M",
            "--benchmarks=fillrandom",
            "--verify",
        ];
        all.extend_from_slice(flags);
        let report = run(&all);
        assert!(report["verified_keys"].as_u64() > Some(1500), "{flags:?}");
    }
}

#[test]
fn the_report_of_a_run_over_time_is_a_file_of_the_kernels() {
    let dir = tempfile::tempdir().unwrap();
    let csv = dir.path().join("report.csv");
    let file = format!("--report_file={}", csv.display());
    run(&[
        "--device=malloc://512M",
        "--benchmarks=fillseq,readrandom",
        "--duration=3",
        "--report_interval_seconds=1",
        &file,
    ]);
    let report = std::fs::read_to_string(&csv).unwrap();
    assert!(report.starts_with("secs_elapsed,interval_qps"), "{report}");
    assert!(report.lines().count() >= 2, "{report}");
}

#[test]
fn json_alone_is_on_standard_output() {
    let out = db_bench()
        .args(SMALL)
        .args(["--env=mem", "--benchmarks=fillseq", "--json"])
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", text(&out));
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(result(&report, "fillseq")["operations"], 3000);
    assert!(String::from_utf8_lossy(&out.stderr).contains("fillseq      : "));
}

#[test]
fn a_wrong_flag_names_the_nearest() {
    for (wrong, said) in [
        (
            &["--compresion_type=none"][..],
            "did you mean --compression_type?",
        ),
        (&["--fs_cache_sise=1"], "did you mean --fs_cache_size?"),
        (&["--num=many"], "--num=many: not a value"),
        (&["--readwritepercent=101"], "not a value"),
        (&["--env=floppy"], "one of pumice"),
    ] {
        let out = db_bench().args(wrong).output().unwrap();
        assert_eq!(out.status.code(), Some(2), "{wrong:?}: {}", text(&out));
        assert!(text(&out).contains(said), "{wrong:?}: {}", text(&out));
    }
    // A benchmark that does not exist ends the run with RocksDB's own message.
    let out = db_bench()
        .args(["--env=mem", "--benchmarks=fillsec"])
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1), "{}", text(&out));
    assert!(
        text(&out).contains("unknown benchmark 'fillsec'"),
        "{}",
        text(&out)
    );
    let help = db_bench().arg("--help").output().unwrap();
    let help = text(&help);
    for flag in ["--write_buffer_size", "--device", "readwhilewriting"] {
        assert!(help.contains(flag), "{flag}");
    }
}

/// While it runs, others see its figures, and `pumice top` gets an answer. The sockets go with it.
#[test]
fn a_run_can_be_looked_at() {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    let dir = tempfile::tempdir().unwrap();
    let (metrics, rpc) = (dir.path().join("metrics"), dir.path().join("rpc"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_db_bench"))
        .args([
            "--device=malloc://256M",
            "--benchmarks=fillrandom,readrandom",
            "--num=20000",
            "--reads=1000000000",
        ])
        .arg(format!("--metrics={}", metrics.display()))
        .arg(format!("--rpc_socket={}", rpc.display()))
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let connect = |path: &std::path::Path| {
        let began = std::time::Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return stream,
                Err(e) => assert!(began.elapsed().as_secs() < 60, "{}: {e}", path.display()),
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    };
    let mut stream = connect(&metrics);
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let mut stream = connect(&rpc);
    let ask = br#"{"jsonrpc":"2.0","id":1,"method":"pumice_get_stats"}"#;
    stream.write_all(ask).unwrap();
    let mut answer = vec![0; 1 << 16];
    let len = stream.read(&mut answer).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(text.contains("pumice_fs_dirty_bytes{device=\""), "{text}");
    let answer = String::from_utf8_lossy(&answer[..len]);
    assert!(answer.contains("\"dirty_bytes\":"), "{answer}");
    let wrong = Command::new(env!("CARGO_BIN_EXE_db_bench"))
        .args(["--env=mem", "--metrics=127.0.0.1:0", "--num=1"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&wrong.stderr);
    assert!(
        !wrong.status.success() && said.contains("--env=pumice"),
        "{said}"
    );
}
