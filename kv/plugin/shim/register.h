// The registration of `blobfs://…` with RocksDB's object registry.

#pragma once

#include <string>

#include "rocksdb/utilities/object_registry.h"
#include "version.h"

namespace pumice {

// Returns why the shim, the library below it and RocksDB do not belong together. The text is empty if
// they do.
std::string Misfit();

}  // namespace pumice

// The function that RocksDB's build calls for the plugin. It returns how many factories it has
// registered.
extern "C" int register_pumice(ROCKSDB_NAMESPACE::ObjectLibrary& library, const std::string& arg);
