//! Helpers to run the `pumice` command.

use std::process::{Command, Output};

pub fn pumice(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pumice"))
        .args(args)
        .output()
        .unwrap()
}

/// Returns the standard output of a command that has to succeed.
pub fn ok(args: &[&str]) -> String {
    let output = pumice(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}
