//! Each restriction restricts: a program under it cannot do what it can do without it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pumice_confine::Confinement;

/// Runs a line of shell under a confinement. Returns whether it succeeded and what it printed, or `None`, with a line that says
/// why, if this machine cannot confine a program so.
fn shell(name: &str, confinement: &Confinement, line: &str) -> Option<(bool, String)> {
    let mut command = Command::new("/bin/sh");
    match confinement.run(command.args(["-c", line]), Duration::from_secs(60)) {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            Some((output.status.success(), said))
        }
        Err(reason) => {
            println!("skipped: {name}: {reason}");
            None
        }
    }
}

/// Asserts that a line succeeds without the confinement, and fails under it.
fn stops(name: &str, confinement: &Confinement, line: &str) {
    let Some((without, _)) = shell(name, &Confinement::new(), line) else {
        return;
    };
    if !without {
        println!("skipped: {name}: `{line}` fails on this machine in any case");
        return;
    }
    if let Some((within, said)) = shell(name, confinement, line) {
        assert!(!within, "{name}: `{line}` succeeded: {said}");
    }
}

/// Asserts that a line prints this under the confinement, and something else without it.
fn shows(name: &str, confinement: &Confinement, line: &str, want: &str) {
    let Some((_, without)) = shell(name, &Confinement::new(), line) else {
        return;
    };
    assert_ne!(without, want, "{name}: without the confinement");
    if let Some((_, within)) = shell(name, confinement, line) {
        assert_eq!(within, want, "{name}");
    }
}

#[test]
fn capabilities_are_dropped() {
    let line = "sed -n 's/^Cap\\(Eff\\|Bnd\\):[^0-9a-f]*//p' /proc/self/status | sort -u";
    let dropped = Confinement::new().without_capabilities();
    shows("no capabilities", &dropped, line, "0000000000000000");
}

#[test]
fn limits_hold() {
    let files = Confinement::new().open_files(64);
    shows("ulimit -n", &files, "ulimit -n", "64");
    let memory = Confinement::new().without_locked_memory();
    shows("ulimit -l", &memory, "ulimit -l", "0");
}

#[test]
fn only_one_directory_can_be_written() {
    let (writable, other) = (tempdir("writable"), tempdir("other"));
    let confinement = Confinement::new().read_only_root(&writable);
    let touch = |dir: &Path| format!("touch {}/file", dir.display());
    stops("a read-only root", &confinement, &touch(&other));
    stops(
        "a read-only root",
        &confinement,
        "touch /pumice-test && rm /pumice-test",
    );
    if let Some((done, _)) = shell("a read-only root", &confinement, &touch(&writable)) {
        assert!(done, "the writable directory");
    }
    for dir in [writable, other] {
        std::fs::remove_dir_all(dir).unwrap();
    }
}

#[test]
fn nothing_is_made_in_shared_memory() {
    let confinement = Confinement::new().without_shared_memory();
    let line = "touch /dev/shm/pumice-test && rm /dev/shm/pumice-test";
    stops("no /dev/shm", &confinement, line);
}

#[test]
fn system_calls_are_refused() {
    let docker = Confinement::new().docker_seccomp();
    stops("Docker's profile", &docker, "unshare -m true");
    let line = "sed -n 's/^Seccomp:[^0-9]*//p' /proc/self/status";
    shows("Docker's profile", &docker, line, "2");
    let huge = Confinement::new().without_huge_pages();
    let line = "python3 -c 'import os; os.memfd_create(\"x\", os.MFD_HUGETLB)'";
    stops("no huge pages", &huge, line);
    let renames = Confinement::new().deny(&[libc::SYS_getcwd], libc::EPERM);
    stops(
        "one call",
        &renames,
        "/bin/pwd -P >/dev/null && cd . && stat . >/dev/null && python3 -c 'import os; os.getcwd()'",
    );
}

#[test]
fn memory_is_bounded() {
    let confinement = Confinement::new().memory(64 << 20);
    let line = "head -c 200m /dev/zero | tail -c 200m | wc -c | grep 209715200";
    stops("64 MiB of memory", &confinement, line);
}

#[test]
fn another_user_has_no_rights() {
    let confinement = Confinement::new().other_user();
    shows("another user", &confinement, "id -u", "65534");
}

/// Makes a directory of this test's own.
fn tempdir(name: &str) -> std::path::PathBuf {
    let dir = std::env::temp_dir().join(format!("pumice-confine-{}-{name}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    dir
}
