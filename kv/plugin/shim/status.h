// Converts failures of the Rust file system to RocksDB's IOStatus.

#pragma once

#include <string>

#include "pumice_fs.h"
#include "rocksdb/file_system.h"
#include "rocksdb/io_status.h"
#include "version.h"

namespace pumice {

using rocksdb::IODebugContext;
using rocksdb::IOStatus;

// What failed, for the message. It is built only after a failure.
struct Where {
  const char* doing;
  const std::string& name;
};

// Returns the IOStatus of this thread's last fault. `dbg` gets the file and the text of it.
IOStatus LastFault(Where where, IODebugContext* dbg);

// The same for FileExists and GetChildren, which answer NotFound where others answer PathNotFound.
IOStatus LastFaultOfLookup(Where where, IODebugContext* dbg);

// The answer to a request for a memory-mapped mode.
IOStatus RefuseMmap(const char* option, const std::string& name);

#define PUMICE_LIKELY(x) __builtin_expect(static_cast<bool>(x), 1)

}  // namespace pumice
