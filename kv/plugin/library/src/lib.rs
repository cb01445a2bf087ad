//! `libpumice_fs.so` and `libpumice_fs.a`: the functions of `pumice_fs.h`, which `pumice-rocksdb-fs`
//! has, and those of `pumice.h` that need no RocksDB, which `pumice-c` has. `scripts/plugin` builds and installs them.
#![forbid(unsafe_code)]

extern crate pumice_c as _;
extern crate pumice_rocksdb_fs as _;
