//! Gives the shared library its name, which has the version of its ABI.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let abi = std::env::var("DEP_PUMICE_FS_ABI").expect("pumice-rocksdb-fs tells it");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libpumice_fs.so.{abi}");
    // Handlers for forks and for the end of the process are in it, so that it is never unloaded.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
