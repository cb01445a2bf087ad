//! RocksDB's `ldb` on a file system of Pumice: what `pumice ldb` runs.

use std::ffi::OsString;
use std::process::ExitCode;

use pumice_rocksdb_tools::command::{Access, run};
use pumice_rocksdb_tools::ldb;

/// The commands of ldb that write nothing.
const READERS: [&str; 17] = [
    "checkconsistency",
    "dump",
    "dump_live_files",
    "dump_wal",
    "file_checksum_dump",
    "get",
    "get_entity",
    "get_property",
    "idump",
    "list_column_families",
    "list_file_range_deletes",
    "list_live_files_metadata",
    "manifest_dump",
    "multi_get",
    "multi_get_entity",
    "scan",
    "--help",
];

fn access(args: &[OsString]) -> Access {
    let reads = |arg: &OsString| READERS.iter().any(|reader| arg == reader);
    if args.iter().any(reads) {
        Access::Read
    } else {
        Access::Write
    }
}

fn main() -> ExitCode {
    run("ldb", access, ldb)
}
