//! Compiles the C++ shim of `pumice-rocksdb-fs` against the headers of the RocksDB that librocksdb-sys
//! builds.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Returns a value that the build script of a direct dependency has set.
fn told(variable: &str) -> PathBuf {
    let told = env::var_os(variable);
    PathBuf::from(told.unwrap_or_else(|| panic!("no dependency has told {variable}")))
}

/// Returns the plugin's folder. In the workspace it is that of this clone: clones may share a target directory, and with it what
/// the build script of a dependency has told in another one, which may be gone.
fn plugin() -> PathBuf {
    let here = Path::new("plugin");
    if here.join("pumice.mk").is_file() {
        here.to_owned()
    } else {
        told("DEP_PUMICE_FS_ROOT")
    }
}

/// Returns the shim's sources: those of the plugin, and the one for programs in Rust.
fn units(root: &Path) -> Vec<PathBuf> {
    let list = root.join("pumice.mk");
    println!("cargo::rerun-if-changed={}", list.display());
    let text = fs::read_to_string(&list).expect("pumice-rocksdb-fs has it");
    let sources = text
        .lines()
        .find_map(|line| line.strip_prefix("pumice_SOURCES = "))
        .expect("it lists the sources in one line");
    let units = sources.split_whitespace().chain(["shim/embed.cc"]);
    units.map(|unit| root.join(unit)).collect()
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    // docs.rs has no RocksDB and links nothing.
    if env::var_os("DOCS_RS").is_some() {
        return;
    }
    let out = told("OUT_DIR");
    let root = plugin();
    let contract = told("DEP_PUMICE_FS_INCLUDE");
    for watched in [&root.join("shim"), &contract] {
        println!("cargo::rerun-if-changed={}", watched.display());
    }
    let include = told("DEP_ROCKSDB_CARGO_MANIFEST_DIR")
        .join("rocksdb")
        .join("include");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .define("NDEBUG", None)
        .include(&contract)
        .flag("-isystem")
        .flag(&include)
        .flag_if_supported("-Woverloaded-virtual")
        .flag_if_supported("-Wno-unused-parameter")
        // A put crosses the shim five times, in whatever profile the application is built.
        .opt_level(3)
        .files(units(&root));
    build.compile("pumice_shim");
    check_version(&build, &include, &out);
}

/// A library from elsewhere (`ROCKSDB_LIB_DIR`) must be the RocksDB that these headers describe: with another one the
/// shim's classes would not have the layout that the library expects. A program is linked with the library and asked.
fn check_version(build: &cc::Build, include: &Path, out: &Path) {
    println!("cargo::rerun-if-env-changed=ROCKSDB_LIB_DIR");
    let Some(library) = env::var_os("ROCKSDB_LIB_DIR") else {
        return;
    };
    let (source, program) = (out.join("version.cc"), out.join("version"));
    let text = "#include <cstdio>\n#include <rocksdb/version.h>\nint main() {\n  std::printf(\"%d.%d.%d %s\", \
                ROCKSDB_MAJOR, ROCKSDB_MINOR, ROCKSDB_PATCH, \
                rocksdb::GetRocksVersionAsString(true).c_str());\n}\n";
    fs::write(&source, text).expect("the output directory can be written");
    let mut compiler = build.get_compiler().to_command();
    compiler.arg(&source).arg("-o").arg(&program);
    compiler
        .arg("-I")
        .arg(include)
        .arg("-L")
        .arg(&library)
        .arg("-lrocksdb");
    // Where such a program cannot be linked or run (another machine's library), the check at start remains.
    if !compiler.output().is_ok_and(|made| made.status.success()) {
        return;
    }
    let Ok(said) = Command::new(&program)
        .env("LD_LIBRARY_PATH", &library)
        .output()
    else {
        return;
    };
    let said = String::from_utf8_lossy(&said.stdout);
    if let Some((headers, linked)) = said.split_once(' ')
        && headers != linked
    {
        let library = Path::new(&library).display();
        println!(
            "cargo::error=ROCKSDB_LIB_DIR={library} has RocksDB {linked}, but the headers of librocksdb-sys describe {headers}: \
             name a library of RocksDB {headers}, or unset ROCKSDB_LIB_DIR and let cargo compile it"
        );
    }
}
