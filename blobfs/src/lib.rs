//! Blobstore in SPDK's format, and the file system on it.

pub mod blobstore;
mod closed;
pub mod fs;
