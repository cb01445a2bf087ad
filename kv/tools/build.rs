//! Compiles RocksDB's command-line tools from librocksdb-sys's sources.
//!
//! That takes a minute, so the archive is kept beside the RocksDB library that `scripts/rocksdb`
//! has compiled, under a name made from everything that it is compiled from. Every profile and
//! target directory uses it. Without that library it is compiled into cargo's own directory.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};

/// The translation units, in RocksDB's sources; `db_bench_tool.cc` is in `cc/db_bench.cc`.
const UNITS: [&str; 8] = [
    "tools/ldb_cmd.cc",
    "tools/sst_dump_tool.cc",
    "test_util/testutil.cc",
    "tools/simulated_hybrid_file_system.cc",
    "tools/ldb_tool.cc",
    "tools/tool_hooks.cc",
    "utilities/blob_db/blob_dump_tool.cc",
    "db_stress_tool/db_stress_compression_manager.cc",
];

/// The sources of this crate.
const OWN: [&str; 4] = [
    "cc/db_bench.cc",
    "cc/tools.cc",
    "cc/tools.h",
    "cc/gflags/gflags.h",
];

/// The definitions of librocksdb-sys's build script on Linux: RocksDB's headers have to be the same
/// in both.
const DEFINES: [(&str, Option<&str>); 16] = [
    ("SNAPPY", Some("1")),
    ("LZ4", Some("1")),
    ("ZSTD", Some("1")),
    ("ZLIB", Some("1")),
    ("BZIP2", Some("1")),
    ("NDEBUG", Some("1")),
    ("HAVE_ALIGNED_NEW", None),
    ("HAVE_UINT128_EXTENSION", None),
    ("OS_LINUX", None),
    ("ROCKSDB_PLATFORM_POSIX", None),
    ("ROCKSDB_LIB_IO_POSIX", None),
    ("ROCKSDB_SCHED_GETCPU_PRESENT", None),
    ("ROCKSDB_AUXV_GETAUXVAL_PRESENT", None),
    ("ROCKSDB_FALLOCATE_PRESENT", None),
    ("ROCKSDB_RANGESYNC_PRESENT", None),
    // Without it the tools consist of a message.
    ("GFLAGS", Some("1")),
];

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cc");
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    println!("cargo::rerun-if-env-changed=ROCKSDB_LIB_DIR");
    // docs.rs has no RocksDB and links nothing.
    if env::var_os("DOCS_RS").is_some() {
        return Ok(());
    }
    let sources = dependency("ROCKSDB_CARGO_MANIFEST_DIR", "librocksdb-sys");
    let zstd = dependency("ZSTD_INCLUDE", "zstd-sys");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));

    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        // The same in every profile, so that one archive serves all.
        .opt_level(1)
        .debug(false)
        .warnings(false)
        .flag("-include")
        .flag("cstdint")
        .include(sources.join("rocksdb/include"))
        .include(sources.join("rocksdb"))
        .include(zstd)
        .include("cc/gflags")
        .include("cc");
    for (name, value) in DEFINES {
        build.define(name, value);
    }
    processor_flags(&mut build);
    let rocksdb = sources.join("rocksdb");
    build.cargo_metadata(false);

    let kept = kept_archive(&build, &sources)?;
    let archive = out.join("libpumice_rocksdb_tools.a");
    if let Some(kept) = &kept
        && kept.exists()
    {
        fs::copy(kept, &archive)?;
    } else {
        // What runs beside what is measured, in the optimisation of RocksDB's own release build.
        let mut measured = build.clone();
        measured.opt_level(2).file("cc/db_bench.cc");
        build
            .file("cc/tools.cc")
            .files(UNITS.iter().map(|unit| rocksdb.join(unit)))
            .objects(measured.compile_intermediates())
            .compile("pumice_rocksdb_tools");
        if let Some(kept) = &kept {
            keep(&archive, kept)?;
        }
    }
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-lib=static=pumice_rocksdb_tools");
    println!("cargo::rustc-link-lib=dylib=stdc++");
    Ok(())
}

/// Returns a value that the build script of a direct dependency has set.
fn dependency(what: &str, of: &str) -> PathBuf {
    match env::var_os(format!("DEP_{what}")) {
        Some(told) => PathBuf::from(told),
        None => panic!("{of} did not tell its {what}"),
    }
}

/// Sets the processor that Rust builds for, as it is set for RocksDB.
fn processor_flags(build: &mut cc::Build) {
    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    let cpu = flags
        .split('\x1f')
        .find_map(|flag| flag.trim_start_matches("-C").strip_prefix("target-cpu="));
    let option = match env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
        Ok("aarch64") => "-mcpu",
        _ => "-march",
    };
    if let Some(cpu) = cpu {
        build.flag_if_supported(format!("{option}={cpu}"));
    }
}

/// Returns the place where the archive is kept, if there is a library from `scripts/rocksdb`.
fn kept_archive(build: &cc::Build, sources: &Path) -> io::Result<Option<PathBuf>> {
    let Some(folder) = env::var_os("ROCKSDB_LIB_DIR").map(PathBuf::from) else {
        return Ok(None);
    };
    // The folder of another library is not touched.
    if !folder.join("lock").exists() || !folder.join("librocksdb.a").exists() {
        return Ok(None);
    }
    let mut key = DefaultHasher::new();
    let compiler = build.get_compiler();
    sources.file_name().hash(&mut key);
    compiler.path().hash(&mut key);
    let version = compiler.to_command().arg("--version").output()?;
    version.stdout.hash(&mut key);
    for file in OWN.iter().chain(&["build.rs"]) {
        fs::read(file)?.hash(&mut key);
    }
    env::var("CARGO_ENCODED_RUSTFLAGS")
        .unwrap_or_default()
        .hash(&mut key);
    Ok(Some(folder.join(format!("tools-{:016x}.a", key.finish()))))
}

/// Copies in one step, since two builds may do it at once.
fn keep(archive: &Path, kept: &Path) -> io::Result<()> {
    let part = kept.with_extension(format!("part-{}", std::process::id()));
    let done = fs::copy(archive, &part).and_then(|_| fs::rename(&part, kept));
    if let Err(error) = done {
        let _ = fs::remove_file(&part);
        if error.kind() != io::ErrorKind::PermissionDenied {
            return Err(error);
        }
    }
    Ok(())
}
