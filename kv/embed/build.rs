//! Compiles what `pumice.h` declares for RocksDB's C API, and tells the tests where RocksDB's headers
//! are: `PUMICE_ROCKSDB_INCLUDE`.

use std::env;
use std::path::{Path, PathBuf};

/// Returns a value that the build script of a direct dependency has set.
fn told(variable: &str) -> PathBuf {
    let told = env::var_os(variable);
    PathBuf::from(told.unwrap_or_else(|| panic!("no dependency has told {variable}")))
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let include = told("DEP_ROCKSDB_CARGO_MANIFEST_DIR")
        .join("rocksdb")
        .join("include");
    println!(
        "cargo::rustc-env=PUMICE_ROCKSDB_INCLUDE={}",
        include.display()
    );
    let (shim, header) = (Path::new("../plugin/shim"), Path::new("../c/include"));
    println!("cargo::rerun-if-changed={}", shim.display());
    println!("cargo::rerun-if-changed={}", header.display());
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .define("NDEBUG", None)
        .include(told("DEP_PUMICE_FS_INCLUDE"))
        .include(header)
        .flag("-isystem")
        .flag(&include)
        .flag_if_supported("-Wno-unused-parameter")
        .file(shim.join("c_api.cc"))
        .compile("pumice_c_api");
}
