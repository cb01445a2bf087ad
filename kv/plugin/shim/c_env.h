// The environment of RocksDB's C API.

#pragma once

#include <memory>

#include "rocksdb/env.h"
#include "version.h"

// The struct that the C API, and so the `rocksdb` crate, takes for an environment. No header has
// it: this repeats the definition in db/c.cc of RocksDB 7.8 to 11.8. rocksdb_env_destroy deletes both.
struct rocksdb_env_t {
  ROCKSDB_NAMESPACE::Env* rep;
  bool is_default;
};

namespace pumice {

// Makes an rocksdb_env_t, which owns `env`.
inline rocksdb_env_t* WrapEnv(std::unique_ptr<rocksdb::Env> env) {
  auto* wrapped = new rocksdb_env_t{env.get(), false};
  env.release();
  return wrapped;
}

}  // namespace pumice
