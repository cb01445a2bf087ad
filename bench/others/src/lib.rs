//! Compares Pumice with the other stores that a Rust program would embed: RocksDB on the kernel's file system, redb, fjall and
//! LMDB. Same keys, values and durability, one thread, in turn.

pub mod kind;
pub mod report;
pub mod store;
pub mod workloads;

mod fjall;
mod lmdb;
mod redb;
mod rocks;
