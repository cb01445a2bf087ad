// The registration of `blobfs://…` with RocksDB's object registry.

#pragma once

#include <cstdint>
#include <string>

#include "pumice_fs.h"
#include "rocksdb/utilities/object_registry.h"
#include "version.h"

namespace pumice {

// What the shim needs of the library.
inline constexpr uint32_t kAbilities =
    PUMICE_CAN_ASYNC | PUMICE_CAN_PIN | PUMICE_CAN_PREFETCH | PUMICE_CAN_REREAD;

// What it offers to RocksDB when nobody has asked for something else. RocksDB copies a lent block into its own cache
// unless it is compressed, and one copy straight to that place is faster.
inline constexpr uint32_t kOffers = kAbilities & ~uint32_t{PUMICE_CAN_PIN};

// Returns why the shim, the library below it and RocksDB do not belong together. The text is empty if
// they do.
std::string Misfit();

}  // namespace pumice

// The function that RocksDB's build calls for the plugin. It returns how many factories it has
// registered.
extern "C" int register_pumice(ROCKSDB_NAMESPACE::ObjectLibrary& library, const std::string& arg);
