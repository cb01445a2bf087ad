//! The tools that write test patterns do not overwrite other content.

use std::path::Path;
use std::process::{Command, Output};

fn bdevperf(workload: &str, uri: &str, force: bool) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bdevperf"));
    command.args(["-q", "1", "-o", "4K", "-t", "1", "-w", workload, uri]);
    command.args(force.then_some("--force"));
    command.output().unwrap()
}

fn nvmeperf(workload: &str, uri: &str, force: bool) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nvmeperf"));
    command.args(["-q", "1", "-t", "0.2", "-w", workload, uri]);
    command.args(force.then_some("--force"));
    command.output().unwrap()
}

/// Makes 8 MiB of zeroes with unknown content in the middle.
fn foreign(path: &Path) -> Vec<u8> {
    let mut bytes = vec![0; 8 << 20];
    bytes[5_000_000..5_000_100].fill(7);
    std::fs::write(path, &bytes).unwrap();
    bytes
}

type Tool = fn(&str, &str, bool) -> Output;

fn refuses_unless_forced(tool: Tool, uri: &str, path: &Path, workloads: &[&str]) {
    let bytes = foreign(path);
    for workload in workloads {
        let refused = tool(workload, uri, false);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{workload}: {said}");
        assert!(said.contains("force"), "{workload}: {said}");
        assert!(std::fs::read(path).unwrap() == bytes, "{workload} wrote");
    }
    // Reading needs no permission and changes nothing.
    let read = tool("randread", uri, false);
    assert!(read.status.success(), "{read:?}");
    assert!(std::fs::read(path).unwrap() == bytes, "a reader wrote");
    // With permission, and on a device that holds nothing, it writes.
    let forced = tool("randwrite", uri, true);
    assert!(forced.status.success(), "{forced:?}");
    std::fs::write(path, vec![0; 8 << 20]).unwrap();
    let blank = tool("randwrite", uri, false);
    assert!(blank.status.success(), "{blank:?}");
}

#[test]
fn bdevperf_writes_over_nothing_unless_forced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let uri = format!("file://{}", path.display());
    let workloads = [
        "write",
        "randwrite",
        "rw",
        "randrw",
        "verify",
        "unmap",
        "write_zeroes",
        "copy",
    ];
    refuses_unless_forced(bdevperf, &uri, &path, &workloads);
    // A device that exists only in this process needs no permission.
    let memory = bdevperf("randwrite", "malloc://16M", false);
    assert!(memory.status.success(), "{memory:?}");
}

#[test]
fn nvmeperf_writes_over_nothing_unless_forced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let uri = format!("soft://{}", path.display());
    let workloads = ["write", "randwrite", "rw", "randrw"];
    refuses_unless_forced(nvmeperf, &uri, &path, &workloads);
}
