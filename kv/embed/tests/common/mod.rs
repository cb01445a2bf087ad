//! Compiles programs in C and C++ against this package's library, as `scripts/embed` installs it.
#![allow(dead_code, reason = "each test uses a part of it")]

pub mod redis;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::SystemTime;

/// Returns a path of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

/// Returns the static library, which cargo has built for this test.
pub fn library() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let made = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with("libpumice_db") && name.ends_with(".a")
    };
    let deps = std::fs::read_dir(test.parent().unwrap()).unwrap();
    let found = deps.map(|entry| entry.unwrap().path()).filter(made);
    let age = |path: &PathBuf| path.metadata().and_then(|meta| meta.modified());
    let newest = found.max_by_key(|path| age(path).unwrap_or(SystemTime::UNIX_EPOCH));
    newest.expect("cargo has built libpumice_db.a for this test")
}

/// A compiler and what it is told.
pub struct Compiler {
    pub program: &'static str,
    pub flags: &'static [&'static str],
}

pub const C: Compiler = Compiler {
    program: "cc",
    flags: &[
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-O1",
        "-g",
        "-D_GNU_SOURCE",
    ],
};

pub const CPP: Compiler = Compiler {
    program: "c++",
    flags: &["-std=c++20", "-Wall", "-Wextra", "-Werror", "-O1", "-g"],
};

/// Libraries of the system: those that `rustc --print native-static-libs` names.
const NATIVE: [&str; 5] = ["-lstdc++", "-lpthread", "-ldl", "-lm", "-lgcc_s"];

/// Compiles `sources` and links them with the library. `None` if the machine has no such compiler.
pub fn compile(compiler: &Compiler, sources: &[PathBuf], program: &Path) -> Option<()> {
    let mut command = Command::new(compiler.program);
    command
        .args(compiler.flags)
        .arg("-o")
        .arg(program)
        .arg("-I")
        .arg(repository("kv/c/include"))
        .arg("-isystem")
        .arg(env!("PUMICE_ROCKSDB_INCLUDE"))
        .args(sources)
        // The function by which C++ programs register `blobfs://`.
        .arg("-Wl,-u,pumice_register_blobfs")
        .arg(library())
        .args(NATIVE);
    let output = match command.output() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
        output => output.unwrap(),
    };
    assert!(output.status.success(), "{command:?}: {}", said(&output));
    Some(())
}

/// Returns what a program has printed.
pub fn said(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}
