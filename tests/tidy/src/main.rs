//! Checks the house rules that no compiler checks, each with a list of what is allowed for now.
//!
//! `tidy` compares what it finds in the sources with the lists in `tests/tidy/allow/`, one per
//! rule. A line of a list is a file and how often it breaks the rule. More than that is an error,
//! and so is less: `tidy --bless` writes the smaller number, so that a list only gets shorter. It
//! refuses to write a longer one.

#![forbid(unsafe_code)]

mod allow;
mod circles;
mod rust;
mod text;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// How often each file breaks a rule, with the places, for the message.
type Findings = BTreeMap<String, Vec<String>>;

/// A file of the sources.
struct Source {
    /// The path from the top of the clone, with `/` between its parts.
    path: String,
    text: String,
}

fn main() -> ExitCode {
    let bless = match std::env::args().nth(1).as_deref() {
        None => false,
        Some("--bless") => true,
        Some(other) => {
            eprintln!(
                "tidy: {other} is unknown: run it without arguments, or with --bless to shorten the lists"
            );
            return ExitCode::from(2);
        }
    };
    let top = match top() {
        Ok(top) => top,
        Err(why) => {
            eprintln!("tidy: {why}");
            return ExitCode::from(2);
        }
    };
    let sources = match read(&top) {
        Ok(sources) => sources,
        Err(why) => {
            eprintln!("tidy: {why}");
            return ExitCode::from(2);
        }
    };

    let mut rules: Vec<(&str, &str, Findings)> = vec![(
        "circles",
        "is part of a circle of imports",
        circles::find(&sources),
    )];
    rules.extend(rust::find(&sources));
    rules.extend(text::find(&sources));

    let mut broken = 0;
    for (rule, what, findings) in &rules {
        broken += allow::check(&top, rule, what, findings, bless);
    }
    if broken > 0 {
        eprintln!("tidy: {broken} files differ from their lists in tests/tidy/allow");
        return ExitCode::FAILURE;
    }
    let counts: Vec<String> = rules
        .iter()
        .map(|(rule, _, findings)| {
            format!("{rule} {}", findings.values().map(Vec::len).sum::<usize>())
        })
        .collect();
    println!("tidy: allowed for now: {}", counts.join(", "));
    ExitCode::SUCCESS
}

/// The top of the clone.
fn top() -> Result<PathBuf, String> {
    let output = git(Path::new("."), &["rev-parse", "--show-toplevel"])?;
    Ok(PathBuf::from(output.trim()))
}

/// What a `git` command prints.
fn git(at: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("git")
        .current_dir(at)
        .args(arguments)
        .output()
        .map_err(|e| format!("git cannot be run: {e}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    String::from_utf8(output.stdout).map_err(|e| format!("git's answer is not UTF-8: {e}"))
}

/// The text files of the sources, tracked or new.
fn read(top: &Path) -> Result<Vec<Source>, String> {
    let listed = git(
        top,
        &[
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ],
    )?;
    let mut sources = Vec::new();
    for path in listed.split('\0').filter(|path| wanted(path)) {
        match std::fs::read_to_string(top.join(path)) {
            Ok(text) => sources.push(Source {
                path: path.to_owned(),
                text,
            }),
            // A file that was removed and is not committed yet.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(format!("{path} cannot be read: {e}")),
        }
    }
    Ok(sources)
}

/// Whether the rules are about this file. The rules' own words stand in `tests/tidy`.
fn wanted(path: &str) -> bool {
    let known = [".rs", ".md", ".h", ".cc", ".sh"]
        .iter()
        .any(|end| path.ends_with(end));
    let script = path.starts_with("scripts/") || path == ".ci/run";
    (known || script) && !path.starts_with("tests/")
}
