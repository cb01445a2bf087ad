#![doc = include_str!("../README.md")]
#![warn(missing_docs)]

mod env;

pub use env::BlobFsEnv;
pub use rusty_leveldb;
