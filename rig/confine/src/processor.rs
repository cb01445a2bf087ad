//! Programs on a processor that is older than what they were built for.

use std::process::{Command, Output};

/// Runs `program --help` on an emulated processor of 2003, which has neither SSE4.2 nor PCLMULQDQ. Returns `None`, and prints a
/// line that says that `test` is skipped, if there is no emulator here.
#[must_use]
pub fn on_older_processor(test: &str, program: &str) -> Option<Output> {
    let run = Command::new("qemu-x86_64")
        .args(["-cpu", "qemu64", program, "--help"])
        .output();
    if run.is_err() {
        println!("skipped: {test}: no qemu-x86_64 (Debian's qemu-user)");
    }
    run.ok()
}
