//! Small comparisons, and the cleanup after one that was interrupted.
#![cfg(feature = "db")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn fscompare(args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_fscompare"));
    c.args(["--db-bench", env!("CARGO_BIN_EXE_db_bench")])
        .args(args);
    c
}

/// Whether loop devices and mounting work, which need root and a kernel that allows them.
fn can_mount() -> bool {
    let root = std::fs::read_to_string("/proc/self/status")
        .is_ok_and(|s| s.lines().any(|l| l.starts_with("Uid:\t0\t0")));
    root && Path::new("/dev/loop-control").exists() && Path::new("/sbin/mkfs.ext4").exists()
}

#[test]
fn host_and_memory_without_root() {
    let dir = tempfile::tempdir().unwrap();
    let (json, page) = (dir.path().join("r.json"), dir.path().join("r.html"));
    let out = fscompare(&[
        "--sides=host,mem",
        "--rounds=2",
        "--benchmarks=fillseq,compact;readrandom",
    ])
    .arg("--kernel-dir")
    .arg(dir.path())
    .arg("--json")
    .arg(&json)
    .arg("--html")
    .arg(&page)
    .args(["--", "--num=3000", "--seed=5"])
    .output()
    .unwrap();
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{err}");
    let table = String::from_utf8_lossy(&out.stdout);
    assert!(
        table.contains("fillseq  (2 rounds; writes not synced)"),
        "{table}"
    );
    assert!(
        table.contains("mem: RocksDB's memory env. Durability: nothing survives"),
        "{table}"
    );
    let v: serde_json::Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let lines = v["summary"].as_array().unwrap();
    // Three benchmarks on two sides.
    assert_eq!(lines.len(), 6, "{v:#}");
    // A compaction of so few keys may take less than is shown.
    assert!(
        lines
            .iter()
            .filter(|l| l["benchmark"] != "compact")
            .all(|l| l["micros_per_op"].as_f64().unwrap() > 0.0)
    );
    for l in lines {
        for name in [
            "cpu_us_per_op",
            "system_us_per_op",
            "voluntary_switches_per_op",
        ] {
            assert!(l[name].as_f64().unwrap() >= 0.0, "{name}: {l}");
        }
        // Two rounds are too few, and the baseline has no interval.
        let few = l["rate_interval"]["too_few_rounds"].as_u64();
        assert_eq!(few, (l["side"] == "mem").then_some(2), "{l}");
    }
    assert!(table.contains("too few rounds"), "{table}");
    assert!(
        v["machine"]["cores"].as_u64().unwrap() > 0 && v["machine"]["kernel"].is_string(),
        "{v:#}"
    );
    assert!(v["command"].as_str().unwrap().contains("--rounds=2"));
    let page = std::fs::read_to_string(page).unwrap();
    for word in [
        "<dt>host</dt>",
        "<dt>mem</dt>",
        ">readrandom</h2>",
        "</html>",
    ] {
        assert!(page.contains(word), "{word}");
    }
    assert!(!page.contains("http://") && !page.contains("https://"));
    // The second process found the first one's keys.
    assert!(table.contains("(3000 of 3000 found)"), "{table}");
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().flatten().collect();
    assert_eq!(left.len(), 2, "only the reports are left: {left:?}");
}

#[test]
fn ext4_and_ours_on_the_same_image() {
    if !can_mount() {
        println!("skipped: ext4_and_ours_on_the_same_image: needs root and loop devices");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    let out = fscompare(&[
        "--sides=ext4,pumice,pumice-dev,mem",
        "--rounds=1",
        "--size=256M",
        "--benchmarks=fillsync;readseq",
    ])
    .arg("--image")
    .arg(&image)
    .args([
        "--",
        "--num=20000",
        "--writes=20",
        "--write_buffer_size=1000000",
    ])
    .output()
    .unwrap();
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{err}");
    let table = String::from_utf8_lossy(&out.stdout);
    assert!(
        table.contains("ext4: kernel's ext4 on /dev/loop"),
        "{table}"
    );
    assert!(table.contains("every write synced"), "{table}");
    for side in ["ext4", "pumice", "pumice-dev"] {
        assert!(
            table.contains(&format!("  {side}: per operation ")),
            "{table}"
        );
    }
    assert!(!image.exists());
}

#[test]
fn tuned_ext4_beside_the_plain_one() {
    if !can_mount() {
        println!("skipped: tuned_ext4_beside_the_plain_one: needs root and loop devices");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    let out = fscompare(&[
        "--sides=ext4-tuned,ext4",
        "--rounds=1",
        "--size=256M",
        "--benchmarks=fillsync;readseq",
        "--json=-",
    ])
    .arg("--image")
    .arg(&image)
    // Logs are retired after a hundred writes, so that some are used again.
    .args(["--", "--writes=1000", "--write_buffer_size=65536"])
    .output()
    .unwrap();
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{err}");
    let v: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(v["baseline"], "ext4");
    let settings = |side: &str| v["about"][side]["settings"].clone();
    let tuned = settings("ext4-tuned");
    let in_effect = tuned["mounted_with"].as_str().unwrap();
    for option in ["noatime", "lazytime"] {
        assert!(in_effect.contains(option), "{tuned}");
    }
    assert_eq!(tuned["db_bench_flags"][0], "--recycle_log_file_num=4");
    let plain = settings("ext4")["mounted_with"].to_string();
    assert!(!plain.contains("noatime"), "{plain}");
    assert!(
        err.contains("ext4-tuned: kernel's ext4 on /dev/loop"),
        "{err}"
    );
    assert!(err.contains("mounted with -o noatime,lazytime"), "{err}");
    assert!(!image.exists());
}

#[test]
fn an_interrupt_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    let sides = if can_mount() {
        "--sides=ext4"
    } else {
        "--sides=host"
    };
    let mut running = fscompare(&[sides, "--size=96M", "--benchmarks=fillsync"])
        .arg("--image")
        .arg(&image)
        .arg("--kernel-dir")
        .arg(dir.path())
        // The directory of the mount point is made here.
        .env("TMPDIR", dir.path())
        .args(["--", "--duration=600"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Wait until db_bench itself runs, on the mounted file system if there is one.
    let pid = running.id().to_string();
    let children = format!("/proc/{pid}/task/{pid}/children");
    let started = Instant::now();
    let benching = || {
        let ids = std::fs::read_to_string(&children).unwrap_or_default();
        ids.split_whitespace().any(|id| {
            std::fs::read_to_string(format!("/proc/{id}/comm"))
                .is_ok_and(|c| c.trim() == "db_bench")
        })
    };
    while !benching() {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "db_bench never ran"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(200));
    let killed = Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(killed.success());
    let status = running.wait().unwrap();
    assert_eq!(status.code(), Some(1));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let here = dir.path().display().to_string();
    assert!(!mounts.contains(&here), "{mounts}");
    let loops = Command::new("/sbin/losetup").arg("--all").output();
    let loops = loops.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    let name = image.display().to_string();
    assert!(!loops.unwrap_or_default().contains(&name));
}

#[test]
fn mistakes_are_explained() {
    let say = |args: &[&str]| {
        let out = fscompare(args).output().unwrap();
        assert!(!out.status.success(), "{args:?}");
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    let dir = tempfile::tempdir().unwrap();
    let mine = dir.path().join("mine");
    std::fs::write(&mine, "mine").unwrap();
    let mine = mine.display().to_string();
    if can_mount() {
        let e = say(&["--image", &mine, "--sides=ext4"]);
        assert!(e.contains("--force"), "{e}");
        let e = say(&["--device", &mine, "--force", "--sides=ext4"]);
        assert!(e.contains("not a block device"), "{e}");
    }
    let e = say(&["--sides=mem", "--rounds=1", "--", "--nmu=5"]);
    assert!(e.contains("did you mean --num?"), "{e}");
    let e = say(&[
        "--sides=host",
        "--rounds=1",
        "--kernel-dir",
        "/nowhere/at/all",
    ]);
    assert!(e.contains("/nowhere/at/all"), "{e}");
}
