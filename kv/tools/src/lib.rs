//! RocksDB's own command-line tools, compiled from the sources of the `librocksdb-sys` crate, on
//! the kernel's file system, in memory, or on Pumice's file system.
//!
//! [`ldb`] and [`sst_dump`] take the arguments of RocksDB's documentation. Paths in them are paths
//! of the passed file system. [`db_bench`] has the parts of the benchmark tool, for the program
//! `db_bench` of `pumice-bench`. `pumice ldb` and `pumice sst_dump` run the programs `pumice-ldb`
//! and `pumice-sst_dump`.

#[allow(unsafe_code)]
mod ffi;

pub mod command;
pub mod db_bench;

use std::ffi::OsString;

use pumice::{Error, FileSystem};

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
pub fn ldb(files: &Files, args: &[OsString]) -> Result<i32, Error> {
    ffi::tool(ffi::Tool::Ldb, files, args)
}

/// Runs `sst_dump` and returns its exit code. It ends the process itself when an argument is wrong.
///
/// # Errors
/// Fails when the environment could not be made.
pub fn sst_dump(files: &Files, args: &[OsString]) -> Result<i32, Error> {
    ffi::tool(ffi::Tool::SstDump, files, args)
}
