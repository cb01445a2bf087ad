#![doc = include_str!("../README.md")]

pub mod blobstore;
pub mod fs;
