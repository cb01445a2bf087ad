//! `db_bench` in parts: its flags, a run, and a look at every key.
//!
//! The flags are RocksDB's own static variables: one set for the process, and one run.

use crate::{Files, ffi};

/// What a flag's value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A switch: `--sync`, `--nosync`, `--sync=true`.
    Bool,
    /// A number or a text, named as gflags names its type.
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

    /// The name that gflags gives the type.
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
    /// Its present value: the default one, unless it was set.
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
/// [`Refused`] if there is no such flag or it cannot have this value; where the value is of the right type, RocksDB has
/// told the reason on standard error.
pub fn set(name: &str, value: &str) -> Result<(), Refused> {
    if ffi::set(name, value) {
        Ok(())
    } else {
        Err(Refused)
    }
}

/// Runs `db_bench` with the flags that were set; its exit code. `said` gets what it prints on standard output, in pieces.
/// A fatal error of the benchmark ends the process with exit code 1, after what is mounted has been unmounted.
///
/// # Errors
/// The environment could not be made.
pub fn run(files: &Files, said: impl FnMut(&[u8]) + Send) -> Result<i32, pumice::Error> {
    ffi::run(files, said)
}

/// Opens the databases of the [`run`] for reading, reads each key by a scan and by `Get`, with checksums verified, and
/// compares the two; the number of keys.
///
/// # Errors
/// RocksDB's text, with the key where the two differ.
pub fn verify() -> Result<u64, String> {
    ffi::verify()
}
