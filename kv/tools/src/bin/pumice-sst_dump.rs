//! RocksDB's `sst_dump` on a file system of Pumice: what `pumice sst_dump` runs.

use std::process::ExitCode;

use pumice_rocksdb_tools::command::{Access, run};
use pumice_rocksdb_tools::sst_dump;

fn main() -> ExitCode {
    run("sst_dump", |_| Access::Read, sst_dump)
}
