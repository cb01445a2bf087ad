#![doc = include_str!("../README.md")]

pub mod blobstore;
mod closed;
pub mod fs;
