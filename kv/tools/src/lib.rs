//! RocksDB's own command-line tools, compiled from the sources that the `librocksdb-sys` crate brings, on the kernel's file
//! system, in memory, or on Pumice's.
//!
//! [`ldb`] and [`sst_dump`] take the arguments that RocksDB's documentation gives them; paths in them are paths of the file
//! system that is passed. [`db_bench`] has the benchmark tool in parts, for the program `db_bench` of `pumice-bench`.
//! The programs `pumice-ldb` and `pumice-sst_dump` are what `pumice ldb` and `pumice sst_dump` run.

#[allow(unsafe_code)]
mod ffi;

pub mod command;
pub mod db_bench;

use std::ffi::OsString;

use pumice::{Error, FileSystem};

/// The file system that a tool works on.
#[derive(Clone, Debug)]
pub enum Files {
    /// The kernel's, or what the tool's own `--fs_uri` or `--env_uri` names.
    Kernel,
    /// RocksDB's environment in memory, new and empty.
    Memory,
    /// A mounted file system of Pumice.
    Pumice(FileSystem),
}

/// The version of RocksDB that is linked, such as `11.8.1`.
#[must_use]
pub fn rocksdb_version() -> String {
    ffi::version()
}

/// Runs `ldb`; its exit code.
///
/// # Errors
/// The environment could not be made.
pub fn ldb(files: &Files, args: &[OsString]) -> Result<i32, Error> {
    ffi::tool(ffi::Tool::Ldb, files, args)
}

/// Runs `sst_dump`; its exit code. It ends the process itself when an argument is wrong.
///
/// # Errors
/// The environment could not be made.
pub fn sst_dump(files: &Files, args: &[OsString]) -> Result<i32, Error> {
    ffi::tool(ffi::Tool::SstDump, files, args)
}
