//! `db_bench`: RocksDB's benchmark tool, on the kernel's file system, in memory, or on ours.

pub mod flags;
pub mod gflags;
pub mod histogram;
pub mod keys;
pub mod ledger;
pub mod meter;
pub mod options;
pub mod ours;
pub mod plan;
pub mod progress;
pub mod random;
pub mod report;
pub mod runner;
pub mod script;
pub mod target;
pub mod values;
pub mod work;
