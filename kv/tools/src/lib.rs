//! RocksDB's own command-line tools, compiled from the sources of the `librocksdb-sys` crate, on
//! the kernel's file system, in memory, or on Pumice's file system.
//!
//! [`ldb`] and [`sst_dump`] take the arguments of RocksDB's documentation. Paths in them are paths
//! of the passed file system. [`db_bench`] has the parts of the benchmark tool, for the program
//! `db_bench` of `pumice-bench`. `pumice ldb` and `pumice sst_dump` run the programs `pumice-ldb`
//! and `pumice-sst_dump`.
//!
//! The features `db_bench` and `ldb`, both on by default, choose what is compiled.

#[allow(unsafe_code)]
mod ffi;

#[cfg(feature = "ldb")]
pub mod command;
#[cfg(feature = "db_bench")]
pub mod db_bench;

#[cfg(feature = "ldb")]
use std::ffi::OsString;

#[cfg(feature = "ldb")]
use pumice::Error;
use pumice::FileSystem;

/// The file system for a tool.
#[derive(Clone, Debug)]
pub enum Files {
    /// The kernel's, or the one of the tool's own `--fs_uri` or `--env_uri`.
    Kernel,
    /// RocksDB's environment in memory, new and empty.
    Memory,
    /// A mounted file system of Pumice.
    Pumice(FileSystem),
}

/// Returns the version of the linked RocksDB, such as `11.8.1`.
#[must_use]
pub fn rocksdb_version() -> String {
    ffi::version()
}

/// Runs `ldb` and returns its exit code.
///
/// # Errors
/// Fails when the environment could not be made.
#[cfg(feature = "ldb")]
pub fn ldb(files: &Files, args: &[OsString]) -> Result<i32, Error> {
    ffi::ldb::tool(ffi::ldb::Tool::Ldb, files, args)
}

/// Runs `sst_dump` and returns its exit code. It ends the process itself when an argument is wrong.
///
/// # Errors
/// Fails when the environment could not be made.
#[cfg(feature = "ldb")]
pub fn sst_dump(files: &Files, args: &[OsString]) -> Result<i32, Error> {
    ffi::ldb::tool(ffi::ldb::Tool::SstDump, files, args)
}
