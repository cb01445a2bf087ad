//! Compiles the C++ shim against the headers of the RocksDB that librocksdb-sys builds.

fn main() {
    println!("cargo::rerun-if-changed=shim");
    println!("cargo::rerun-if-env-changed=DOCS_RS");
    // docs.rs has no RocksDB and links nothing.
    if std::env::var_os("DOCS_RS").is_none() {
        shim::compile();
    }
}

mod shim {
    use std::env;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// The shim's translation units, in `shim/`.
    const UNITS: [&str; 6] = [
        "status.cc",
        "readers.cc",
        "async.cc",
        "writers.cc",
        "blob_file_system.cc",
        "env.cc",
    ];

    pub fn compile() {
        let sys = env::var_os("DEP_ROCKSDB_CARGO_MANIFEST_DIR")
            .map(PathBuf::from)
            .expect("librocksdb-sys tells its dependents' build scripts where its sources are");
        let include = sys.join("rocksdb").join("include");
        let mut build = cc::Build::new();
        build
            .cpp(true)
            .std("c++20")
            .define("NDEBUG", None)
            .flag("-isystem")
            .flag(&include)
            .flag_if_supported("-Woverloaded-virtual")
            .flag_if_supported("-Wno-unused-parameter")
            // A put crosses the shim five times, in whatever profile the application is built.
            .opt_level(3);
        for unit in UNITS {
            build.file(PathBuf::from("shim").join(unit));
        }
        build.compile("pumice_shim");
        check_version(&build, &include);
    }

    /// A library from elsewhere (`ROCKSDB_LIB_DIR`) must be the RocksDB that these headers describe: with another one the
    /// shim's classes would not have the layout that the library expects. A program is linked with the library and asked.
    fn check_version(build: &cc::Build, include: &Path) {
        println!("cargo::rerun-if-env-changed=ROCKSDB_LIB_DIR");
        let Some(library) = env::var_os("ROCKSDB_LIB_DIR") else {
            return;
        };
        let out = env::var_os("OUT_DIR")
            .map(PathBuf::from)
            .expect("cargo names a directory for the output");
        let (source, program) = (out.join("version.cc"), out.join("version"));
        let text = "#include <cstdio>\n#include <rocksdb/version.h>\nint main() {\n  std::printf(\"%d.%d.%d %s\", \
                    ROCKSDB_MAJOR, ROCKSDB_MINOR, ROCKSDB_PATCH, \
                    rocksdb::GetRocksVersionAsString(true).c_str());\n}\n";
        std::fs::write(&source, text).expect("the output directory can be written");
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
}
