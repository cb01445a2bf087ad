//! Small runs of every benchmark, each followed by a look at every key.
#![cfg(feature = "db")]

use std::process::Command;

use pumice_bench::db_bench::flags::Flags;
use pumice_bench::db_bench::plan::BENCHMARKS;
use pumice_bench::db_bench::report::{BenchResult, Report};
use pumice_bench::db_bench::runner;

fn small(env: &str, benchmarks: &str) -> Flags {
    Flags {
        benchmarks: benchmarks.to_owned(),
        env: env.to_owned(),
        num: 2000,
        seed: 11,
        progress_reports: false,
        // Small tables and memtables: flushes and compactions happen in a small run too.
        write_buffer_size: 64 << 10,
        target_file_size_base: 64 << 10,
        max_bytes_for_level_base: 256 << 10,
        ..Flags::default()
    }
}

fn run(f: &Flags) -> Result<(Report, String), String> {
    let mut text = String::new();
    let report = runner::run(f, &mut |line| {
        text.push_str(line);
        text.push('\n');
    })?;
    Ok((report, text))
}

fn one<'a>(r: &'a Report, name: &str) -> &'a BenchResult {
    r.results
        .iter()
        .find(|b| b.name == name)
        .unwrap_or_else(|| panic!("no result for {name}"))
}

#[test]
fn every_benchmark_runs_and_every_key_is_as_written() {
    for (name, _) in BENCHMARKS {
        let f = Flags {
            reads: 500,
            num: 3000,
            seek_nexts: 3,
            ..small("mem", &format!("fillrandom,{name},verify"))
        };
        let (report, text) = run(&f).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(
            one(&report, "verify")
                .message
                .contains("every key as written"),
            "{name}:\n{text}"
        );
    }
}

#[test]
fn every_benchmark_runs_on_our_file_system() {
    let names: Vec<&str> = BENCHMARKS.iter().map(|(n, _)| *n).collect();
    // All in one run: each benchmark finds what the ones before have left.
    let f = Flags {
        reads: 500,
        num: 3000,
        device: "malloc://512M".into(),
        ..small("pumice", &names.join(",verify,"))
    };
    let (report, text) = run(&f).unwrap();
    let verified = report.results.iter().filter(|r| r.name == "verify");
    for v in verified {
        assert!(v.message.contains("every key as written"), "{text}");
    }
    let sync = one(&report, "fillsync");
    let io = sync.io.unwrap();
    // Three puts; each has to reach the device before it is acknowledged.
    assert!(io.writes >= sync.operations, "{io:?}");
}

#[test]
fn the_image_file_made_for_a_run_is_gone_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let f = Flags {
        image_dir: dir.path().display().to_string(),
        ..small(
            "pumice",
            "fillrandom,compact,fillsync,overwrite,verify,readrandom",
        )
    };
    let (report, text) = run(&f).unwrap();
    assert!(
        text.contains("File system: Pumice's BlobFS on an image file in "),
        "{text}"
    );
    assert!(report.info.durability.sync_is_durable);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_database_on_a_device_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    let device = format!("file://{}", image.display());
    let on = |benchmarks: &str, size: &str| Flags {
        device: device.clone() + size,
        ..small("pumice", benchmarks)
    };
    run(&on("fillseq", "?size=512M&create=1")).unwrap();
    let again = Flags {
        use_existing_db: true,
        ..on("readrandom,overwrite,verify", "")
    };
    let (report, _) = run(&again).unwrap();
    assert_eq!(one(&report, "readrandom").found, Some((2000, 2000)));
    let other = Flags {
        db: "/elsewhere".into(),
        ..again.clone()
    };
    let e = run(&other).unwrap_err();
    assert!(e.contains("does not exist"), "{e}");
    let read_only = Flags {
        readonly: true,
        ..again
    };
    let read_only = Flags {
        benchmarks: "readseq,verify".into(),
        ..read_only
    };
    let (report, _) = run(&read_only).unwrap();
    assert_eq!(one(&report, "readseq").operations, 2000);
    // A fresh run finds the file system and only replaces the database.
    run(&on("fillrandom,verify", "")).unwrap();
}

#[test]
fn several_threads_with_batches_and_overwrites() {
    let list = "fillseq,overwrite,deleterandom,updaterandom,readrandomwriterandom,readwhilewriting,multireadwhilewriting,seekrandomwhilewriting,verify,compact,verify";
    for (env, batch_size) in [("mem", 1_u64), ("mem", 7), ("pumice", 1)] {
        let f = Flags {
            threads: 3,
            batch_size: i64::try_from(batch_size).unwrap(),
            ..small(env, list)
        };
        let (report, _) = run(&f).unwrap();
        let per_thread = 2000 / batch_size * batch_size;
        assert_eq!(one(&report, "overwrite").operations, 3 * per_thread);
        assert_eq!(
            one(&report, "verify").found.map(|(_, asked)| asked),
            Some(2000)
        );
    }
}

#[test]
fn readrandom_finds_what_fillseq_wrote() {
    let f = small(
        "mem",
        "fillseq,readrandom,multireadrandom,readseq,readmissing",
    );
    for multiread_batched in [false, true] {
        let f = Flags {
            multiread_batched,
            ..f.clone()
        };
        let (report, text) = run(&f).unwrap();
        for name in ["readrandom", "multireadrandom"] {
            assert_eq!(one(&report, name).found, Some((2000, 2000)), "{name}");
        }
        assert_eq!(one(&report, "readseq").operations, 2000);
        assert_eq!(one(&report, "readmissing").found, Some((0, 2000)));
        assert!(text.contains("(2000 of 2000 found)"), "{text}");
    }
}

#[test]
fn shapes_of_keys_and_values() {
    let base = small(
        "mem",
        "fillrandom,readrandom,deleteseq,filluniquerandom,verify",
    );
    for f in [
        Flags {
            key_size: 2,
            ..base.clone()
        },
        Flags {
            key_size: 24,
            prefix_size: 12,
            keys_per_prefix: 10,
            ..base.clone()
        },
        Flags {
            value_size: 0,
            ..base.clone()
        },
        Flags {
            value_size_distribution_type: "uniform".into(),
            value_size_max: 5000,
            ..base.clone()
        },
        Flags {
            value_size_distribution_type: "normal".into(),
            value_size_max: 900,
            ..base.clone()
        },
        Flags {
            compression_type: "zstd".into(),
            same_value_percentage: 50,
            ..base.clone()
        },
        Flags {
            enable_blob_files: true,
            min_blob_size: 10,
            ..base.clone()
        },
        Flags {
            disable_wal: true,
            bloom_bits: 10,
            cache_size: -1,
            ..base.clone()
        },
    ] {
        let (report, text) = run(&f).unwrap_or_else(|e| panic!("{f:?}: {e}"));
        assert_eq!(one(&report, "verify").found, Some((2000, 2000)), "{text}");
    }
    let tiny = Flags {
        key_size: 1,
        ..base
    };
    assert!(run(&tiny).unwrap_err().contains("not distinct"));
}

#[test]
fn the_kernels_file_system_keeps_a_database() {
    let dir = tempfile::tempdir().unwrap();
    let db = dir.path().join("db").display().to_string();
    let list = "fillseq,fillsync,fillseq,verify,levelstats";
    let f = Flags {
        db: db.clone(),
        ..small("kernel", list)
    };
    let (report, text) = run(&f).unwrap();
    assert!(one(&report, "fillsync").synced && !one(&report, "fillseq").synced);
    assert!(text.contains("Level Files Size(MB)"), "{text}");
    let log = std::fs::read_to_string(dir.path().join("db/LOG")).unwrap();
    let version = format!("RocksDB version: {}\n", runner::ROCKSDB_VERSION);
    assert!(log.contains(&version), "another RocksDB is linked");

    let again = Flags {
        db: db.clone(),
        use_existing_db: true,
        ..small("kernel", "fillseq,readrandom,verify")
    };
    let (report, text) = run(&again).unwrap();
    assert!(text.contains("fillseq      : skipped (--use_existing_db is true)"));
    assert_eq!(one(&report, "readrandom").found, Some((2000, 2000)));
    assert!(one(&report, "verify").message.contains("scan: 2000 keys"));

    let read_only = Flags {
        readonly: true,
        ..again.clone()
    };
    assert!(run(&read_only).is_ok());
    let missing = Flags {
        db: db + "-none",
        ..again
    };
    assert!(run(&missing).unwrap_err().contains("does not exist"));
}

#[test]
fn a_stranger_in_the_database_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let db = dir.path().join("db").display().to_string();
    run(&Flags {
        db: db.clone(),
        ..small("kernel", "fillseq")
    })
    .unwrap();
    rocksdb::DB::open_default(&db)
        .unwrap()
        .put(b"stranger", b"")
        .unwrap();
    let f = Flags {
        db,
        use_existing_db: true,
        ..small("kernel", "verify")
    };
    assert!(run(&f).unwrap_err().contains("none that db_bench writes"));
}

#[test]
fn repeats_histograms_statistics_and_durations() {
    let f = Flags {
        histogram: true,
        statistics: true,
        ..small("mem", "fillrandom,readrandom[W1-X3]")
    };
    let (report, text) = run(&f).unwrap();
    assert_eq!(report.results.len(), 4);
    assert!(text.contains("readrandom [MEDIAN 3 runs] : "), "{text}");
    assert!(
        text.contains("Microseconds per read:\nCount: 2000 "),
        "{text}"
    );
    assert!(text.contains("rocksdb.number.keys.read"), "{text}");
    assert_eq!(one(&report, "fillrandom").latency["write"].count, 2000);

    let f = Flags {
        duration: 1,
        ..small("mem", "fillseq,readrandom")
    };
    let (report, _) = run(&f).unwrap();
    assert_eq!(one(&report, "fillseq").operations, 2000);
    let timed = one(&report, "readrandom");
    assert!(timed.seconds >= 1.0 && timed.operations > 2000);
}

#[test]
fn a_rate_limit_is_kept() {
    let f = Flags {
        benchmark_write_rate_limit: 2_000_000,
        ..small("mem", "fillseq")
    };
    let (report, _) = run(&f).unwrap();
    // 232 000 bytes at 2 MB a second.
    assert!(one(&report, "fillseq").seconds >= 0.1);
}

#[test]
fn the_program_speaks_json_and_explains_itself() {
    let program = env!("CARGO_BIN_EXE_db_bench");
    let out = Command::new(program)
        .args([
            "--env=mem",
            "--benchmarks=fillseq,verify",
            "-num",
            "1000",
            "--json",
            "--seed=3",
        ])
        .output()
        .unwrap();
    assert!(out.status.success());
    let v: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(v["results"][0]["name"], "fillseq");
    assert_eq!(v["results"][0]["operations"], 1000);
    assert_eq!(v["results"][1]["found"][0], 1000);
    assert_eq!(v["durability"]["sync_is_durable"], false);
    assert_eq!(v["flags"]["num"], "1000");
    assert!(String::from_utf8_lossy(&out.stderr).contains("fillseq      : "));

    let wrong = Command::new(program).arg("--treads=3").output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("did you mean --"));
    let wrong = Command::new(program)
        .args(["--env=mem", "--benchmarks=fillsec"])
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("did you mean fillseq?"));
    let help = Command::new(program).arg("--help").output().unwrap();
    let help = String::from_utf8_lossy(&help.stdout);
    assert!(help.contains("--write_buffer_size") && help.contains("readwhilewriting"));
}
