// Failures of the Rust file system as RocksDB's IOStatus.

#pragma once

#include <string>

#include "pumice_fs.h"
#include "rocksdb/file_system.h"
#include "rocksdb/io_status.h"

namespace pumice {

using rocksdb::IODebugContext;
using rocksdb::IOStatus;

// What failed, for the message; built only when something did.
struct Where {
  const char* doing;
  const std::string& name;
};

// The IOStatus of this thread's last fault. `dbg` gets the file and the text when there is one.
IOStatus LastFault(Where where, IODebugContext* dbg);

// The same for FileExists and GetChildren, which answer NotFound where others answer PathNotFound.
IOStatus LastFaultOfLookup(Where where, IODebugContext* dbg);

// A memory-mapped mode was asked for.
IOStatus RefuseMmap(const char* option, const std::string& name);

#define PUMICE_LIKELY(x) __builtin_expect(static_cast<bool>(x), 1)

}  // namespace pumice
