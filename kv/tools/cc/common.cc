// What all tools need.

#include "tools.h"

#include <string>

#include "rocksdb/env.h"
#include "rocksdb/version.h"

extern "C" const char* pumice_rocksdb_version() {
  static const std::string version = rocksdb::GetRocksVersionAsString(true);
  return version.c_str();
}

extern "C" void* pumice_memory_env() {
  // The files of RocksDB's memory environment, whose own clock stands still, with the clock of the system.
  rocksdb::Env* memory = rocksdb::NewMemEnv(rocksdb::Env::Default());
  return rocksdb::NewCompositeEnv(memory->GetFileSystem()).release();
}
