// The functions of pumice.h for RocksDB's C API: a store as an rocksdb_env_t.

#include <cerrno>
#include <cstring>
#include <exception>
#include <memory>
#include <string>

#include "blob_file_system.h"
#include "c_env.h"
#include "pumice.h"
#include "register.h"
#include "rocksdb/env.h"

// Of kv/c/src/env.rs: mounts as pumice_mount_uri does, with options and an error.
extern "C" int32_t pumice_env_mount(const char* uri, const pumice_options* options, const void** fs,
                                    pumice_error* error);

// Also where everything else is hidden.
#define PUMICE_EXPORTED __attribute__((visibility("default")))

namespace pumice {

namespace {

void Fail(pumice_error* error, int code, const char* text) {
  if (error == nullptr) {
    return;
  }
  error->code = code;
  error->flags = 0;
  std::strncpy(error->text, text, sizeof(error->text) - 1);
  error->text[sizeof(error->text) - 1] = '\0';
}

rocksdb_env_t* Open(const char* uri, const pumice_options* options, pumice_error* error) {
  const std::string wrong = Misfit();
  if (!wrong.empty()) {
    Fail(error, EINVAL, wrong.c_str());
    return nullptr;
  }
  const void* fs = nullptr;
  if (pumice_env_mount(uri, options, &fs, error) < 0) {
    return nullptr;
  }
  return WrapEnv(rocksdb::NewCompositeEnv(std::make_shared<BlobFileSystem>(fs, kOffers)));
}

}  // namespace

extern "C" PUMICE_EXPORTED rocksdb_env_t* pumice_env_open(const char* uri,
                                                          const pumice_options* options,
                                                          pumice_error* error) {
  try {
    return Open(uri, options, error);
  } catch (const std::exception& e) {
    Fail(error, ENOMEM, e.what());
  } catch (...) {
    Fail(error, ENOMEM, "RocksDB could not make an environment");
  }
  return nullptr;
}

extern "C" PUMICE_EXPORTED void pumice_env_close(rocksdb_env_t* env) {
  if (env == nullptr) {
    return;
  }
  try {
    delete env->rep;
  } catch (...) {
    // RocksDB's destructors do not throw; a caller in C could not catch it.
  }
  delete env;
}

}  // namespace pumice
