//! The parts of `db_bench` beside RocksDB's own tool: the choice of the file system, and its
//! counts.

pub mod flags;
pub mod gflags;
pub mod listen;
pub mod ours;
pub mod report;
pub mod target;
pub mod workload;
