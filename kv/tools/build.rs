//! Compiles RocksDB's command-line tools from librocksdb-sys's sources.
//!
//! That takes a minute, so the archive is kept beside the RocksDB library that `scripts/rocksdb`
//! has compiled, under a name made from everything that it is compiled from. Every profile and
//! target directory uses it. Without that library it is compiled into cargo's own directory.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::hash::{Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};

/// The sources of a library.
struct Library {
    /// The name of the library, and of the feature that needs it.
    name: &'static str,
    /// The source of this crate. It is optimised as RocksDB's own release build is where it runs
    /// beside what is measured.
    own: &'static str,
    measured: bool,
    /// The other translation units, in RocksDB's sources.
    units: &'static [&'static str],
}

const LIBRARIES: [Library; 3] = [
    Library {
        name: "common",
        own: "cc/common.cc",
        measured: false,
        units: &[],
    },
    Library {
        name: "db_bench",
        // It includes `tools/db_bench_tool.cc`.
        own: "cc/db_bench.cc",
        measured: true,
        units: &[
            "test_util/testutil.cc",
            "tools/simulated_hybrid_file_system.cc",
            "tools/tool_hooks.cc",
        ],
    },
    Library {
        name: "ldb",
        own: "cc/ldb.cc",
        measured: false,
        units: &[
            "tools/ldb_cmd.cc",
            "tools/sst_dump_tool.cc",
            "tools/ldb_tool.cc",
            "utilities/blob_db/blob_dump_tool.cc",
            "db_stress_tool/db_stress_compression_manager.cc",
        ],
    },
];

/// The headers of this crate.
const HEADERS: [&str; 2] = ["cc/tools.h", "cc/gflags/gflags.h"];

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
    for variable in ["CXX", "CXXFLAGS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
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
        .include("cc")
        .cargo_metadata(false);
    for (name, value) in DEFINES {
        build.define(name, value);
    }
    processor_flags(&mut build);

    println!("cargo::rustc-link-search=native={}", out.display());
    for library in &LIBRARIES {
        let feature = format!("CARGO_FEATURE_{}", library.name.to_uppercase());
        if library.name == "common" || env::var_os(feature).is_some() {
            provide(library, &build, &sources, &out)?;
            println!("cargo::rustc-link-lib=static=pumice_{}", library.name);
        }
    }
    println!("cargo::rustc-link-lib=dylib=stdc++");
    Ok(())
}

/// Puts a library into cargo's directory: the one that is kept, or a new one.
fn provide(library: &Library, build: &cc::Build, sources: &Path, out: &Path) -> io::Result<()> {
    let kept = kept_archive(library, build, sources)?;
    let archive = out.join(format!("libpumice_{}.a", library.name));
    if let Some(kept) = &kept
        && kept.exists()
    {
        fs::copy(kept, &archive)?;
        return Ok(());
    }
    let mut own = build.clone();
    if library.measured {
        own.opt_level(2);
    }
    let units = library.units.iter();
    build
        .clone()
        .objects(own.file(library.own).compile_intermediates())
        .files(units.map(|unit| sources.join("rocksdb").join(unit)))
        .compile(&format!("pumice_{}", library.name));
    match &kept {
        Some(kept) => keep(&archive, kept),
        None => Ok(()),
    }
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
fn kept_archive(
    library: &Library,
    build: &cc::Build,
    sources: &Path,
) -> io::Result<Option<PathBuf>> {
    let Some(folder) = env::var_os("ROCKSDB_LIB_DIR").map(PathBuf::from) else {
        return Ok(None);
    };
    // The folder of another library is not touched.
    if !folder.join("lock").exists() || !folder.join("librocksdb.a").exists() {
        return Ok(None);
    }
    let mut key = DefaultHasher::new();
    // The compiler with all of its flags: those from here, from CXXFLAGS, and for the target.
    // Not the folders: they differ between clones and target directories, their files do not.
    let compiler = build.get_compiler();
    compiler.path().hash(&mut key);
    let folder_of = [OsStr::new("-I"), OsStr::new("-isystem")];
    let mut arguments = compiler.args().iter();
    while let Some(argument) = arguments.next() {
        if folder_of.contains(&argument.as_os_str()) {
            arguments.next();
        } else {
            argument.hash(&mut key);
        }
    }
    let version = compiler.to_command().arg("--version").output()?;
    version.stdout.hash(&mut key);
    for variable in ["TARGET", "CARGO_ENCODED_RUSTFLAGS"] {
        env::var_os(variable).hash(&mut key);
    }
    sources.file_name().hash(&mut key);
    for file in [library.own, "build.rs"].iter().chain(&HEADERS) {
        fs::read(file)?.hash(&mut key);
    }
    let name = format!("{}-{:016x}.a", library.name, key.finish());
    Ok(Some(folder.join(name)))
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
