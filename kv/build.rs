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
    use std::path::PathBuf;

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
    }
}
