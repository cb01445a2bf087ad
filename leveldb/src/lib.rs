#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod env;

pub use env::BlobFsEnv;
pub use rusty_leveldb;
