//! The parts of `db_bench`: its flags, a run, and a check of every key.
//!
//! The flags are RocksDB's static variables, so there is one set for the process, and one run.

use crate::Files;
use crate::ffi::db_bench as ffi;

/// The kind of a flag's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A switch: `--sync`, `--nosync`, `--sync=true`.
    Bool,
    /// A number or a text, with gflags' name of its type.
    Value(&'static str),
}

impl Kind {
    fn named(name: &str) -> Kind {
        match name {
            "bool" => Kind::Bool,
            "int32" => Kind::Value("int32"),
            "uint32" => Kind::Value("uint32"),
            "int64" => Kind::Value("int64"),
            "uint64" => Kind::Value("uint64"),
            "double" => Kind::Value("double"),
            _ => Kind::Value("string"),
        }
    }

    /// Returns gflags' name of the type.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Bool => "bool",
            Kind::Value(name) => name,
        }
    }
}

/// A flag of RocksDB's tool.
#[derive(Clone, Debug)]
pub struct Flag {
    /// The name, without dashes.
    pub name: String,
    /// The type of its value.
    pub kind: Kind,
    /// The current value, which is the default unless it was set.
    pub value: String,
    /// RocksDB's description.
    pub help: String,
}

/// Every flag, in the order of their names.
#[must_use]
pub fn flags() -> Vec<Flag> {
    let mut flags: Vec<Flag> = ffi::flags()
        .into_iter()
        .map(|[name, kind, value, help]| Flag {
            name,
            kind: Kind::named(&kind),
            value,
            help,
        })
        .collect();
    flags.sort_by(|a, b| a.name.cmp(&b.name));
    flags
}

/// A flag's value was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused;

/// Sets a flag.
///
/// # Errors
/// Returns [`Refused`] if there is no such flag or it cannot have this value. If the value has the
/// right type, RocksDB has printed the reason on standard error.
pub fn set(name: &str, value: &str) -> Result<(), Refused> {
    if ffi::set(name, value) {
        Ok(())
    } else {
        Err(Refused)
    }
}

/// Runs `db_bench` with the flags that were set, and returns its exit code. `said` gets its
/// standard output in parts. A fatal error of the benchmark ends the process with exit code 1,
/// in some cases without an unmount.
///
/// # Errors
/// Fails when the environment could not be made.
pub fn run(files: &Files, said: impl FnMut(&[u8]) + Send) -> Result<i32, pumice::Error> {
    ffi::run(files, said)
}

/// Opens the databases of the [`run`] for reading, reads each key by a scan and by `Get`, with
/// checksums verified, and compares the two. Returns the number of keys.
///
/// # Errors
/// Returns RocksDB's text, with the key for which the two differ.
pub fn verify() -> Result<u64, String> {
    ffi::verify()
}
