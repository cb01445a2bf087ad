//! Programs on a processor that is older than what they were built for.

use std::process::Command;

/// Runs each program with `--help` on an emulated processor of 2003, which has neither SSE4.2 nor PCLMULQDQ, and asserts that it
/// ends with one line that says so. Prints a line that says that `test` is skipped if the programs `need` no more, or if there
/// is no emulator here.
///
/// # Panics
/// Panics if a program does anything else.
pub fn assert_refused_by_older_processor(test: &str, need: bool, programs: &[&str]) {
    if !need {
        println!("skipped: {test}: built for any x86-64");
        return;
    }
    for program in programs {
        let run = Command::new("qemu-x86_64")
            .args(["-cpu", "qemu64", program, "--help"])
            .output();
        let Ok(run) = run else {
            println!("skipped: {test}: no qemu-x86_64 (Debian's qemu-user)");
            return;
        };
        let said = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(2), "{program}: {said}");
        let is_told = |line: &str| line.contains("SSE4.2") && line.contains("PUMICE_CPU=generic");
        assert!(said.lines().any(is_told), "{program}: {said}");
    }
}
