// The RocksDB that the shim is compiled for: that of the headers, from 7.8 on.
//
// RocksDB has no stable C++ ABI, and its FileSystem grows. What a version lacks is left out by
// PUMICE_ROCKSDB_SINCE. scripts/plugin-syntax names the versions whose headers have been tried.

#pragma once

#include "rocksdb/rocksdb_namespace.h"
#include "rocksdb/version.h"

// Whether the headers are of this version or a later one.
#define PUMICE_ROCKSDB_SINCE(major, minor) \
  (ROCKSDB_MAJOR > (major) || (ROCKSDB_MAJOR == (major) && ROCKSDB_MINOR >= (minor)))

#if !PUMICE_ROCKSDB_SINCE(7, 8)
#error "the Pumice plugin needs RocksDB 7.8 or later"
#endif

// FSSupportedOps tells RocksDB what the file system can. Before, async reads were taken for granted.
#define PUMICE_HAS_SUPPORTED_OPS PUMICE_ROCKSDB_SINCE(8, 4)
// A read that found damage is repeated past the cache. The version is the first one that was tried.
#define PUMICE_HAS_REREADING PUMICE_ROCKSDB_SINCE(9, 9)
#define PUMICE_HAS_SIZE_OF_OPEN_FILE PUMICE_ROCKSDB_SINCE(10, 5)
#define PUMICE_HAS_SYNC_FILE PUMICE_ROCKSDB_SINCE(10, 6)
#define PUMICE_HAS_PREFETCH_OP PUMICE_ROCKSDB_SINCE(10, 8)

namespace pumice {

// RocksDB can be compiled under another name.
namespace rocksdb = ::ROCKSDB_NAMESPACE;

}  // namespace pumice
