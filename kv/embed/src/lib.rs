//! `libpumice_db.a`: RocksDB with its C and C++ APIs, the plugin that puts it on Pumice, and the
//! functions of `pumice.h`. `scripts/embed` builds and installs it.
#![forbid(unsafe_code)]

extern crate pumice as _;
extern crate pumice_c as _;
