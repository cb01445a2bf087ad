// RocksDB's ldb and sst_dump as functions.

#include "tools.h"

#include <cstdio>
#include <exception>

#include "rocksdb/ldb_tool.h"
#include "rocksdb/options.h"
#include "rocksdb/sst_dump_tool.h"

namespace {

template <typename Run>
int Guarded(const char* name, void* env, Run run) {
  try {
    rocksdb::Options options;
    if (env != nullptr) {
      options.env = static_cast<rocksdb::Env*>(env);
    }
    return run(options);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s: %s\n", name, e.what());
    return 1;
  }
}

}  // namespace

extern "C" int pumice_ldb(void* env, int argc, char** argv) {
  return Guarded("ldb", env, [&](const rocksdb::Options& options) {
    rocksdb::LDBTool tool;
    return tool.RunAndReturn(argc, argv, options);
  });
}

extern "C" int pumice_sst_dump(void* env, int argc, char** argv) {
  return Guarded("sst_dump", env, [&](const rocksdb::Options& options) {
    rocksdb::SSTDumpTool tool;
    return tool.Run(argc, argv, options);
  });
}
