//! RocksDB's `ldb` on a file system of Pumice: what `pumice ldb` runs.

use std::ffi::OsString;
use std::process::ExitCode;

use pumice_rocksdb_tools::command::{Access, run};
use pumice_rocksdb_tools::ldb;

/// The commands of ldb that write nothing.
const READERS: [&str; 17] = [
    "approxsize",
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
];

/// The command is the first word that is not an option; what follows it may be a key or a value.
fn access(args: &[OsString]) -> Access {
    let is_option = |arg: &&OsString| arg.as_encoded_bytes().starts_with(b"-");
    let command = args.iter().find(|arg| !is_option(arg));
    if command.is_none_or(|command| READERS.iter().any(|reader| command == reader)) {
        Access::Read
    } else {
        Access::Write
    }
}

fn main() -> ExitCode {
    run("ldb", access, ldb)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_says_whether_anything_is_written() {
        let of = |line: &str| {
            let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            access(&args)
        };
        for line in [
            "--db=/ scan",
            "scan --db=/",
            "approxsize --from=a",
            "--help",
        ] {
            assert!(matches!(of(line), Access::Read), "{line}");
        }
        for line in [
            "put get scan",
            "--db=/ delete scan",
            "batchput a dump",
            "compact",
        ] {
            assert!(matches!(of(line), Access::Write), "{line}");
        }
    }
}
