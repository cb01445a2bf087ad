// What a program in Rust calls which has the shim compiled in: environments over a file system, and
// the URI for RocksDB's own tools. The plugin of a C++ program does not need it.

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "blob_file_system.h"
#include "c_env.h"
#include "pumice_embed.h"
#include "register.h"
#include "rocksdb/convenience.h"
#include "rocksdb/env.h"

namespace pumice {

namespace {

// Copies as much of `text` as there is room for, and a NUL.
void Answer(const std::string& text, char* out, size_t room) {
  const size_t n = std::min(text.size(), room - 1);
  std::memcpy(out, text.data(), n);
  out[n] = '\0';
}

}  // namespace

extern "C" uint32_t pumice_shim_check(char* error, size_t error_len) {
  try {
    const std::string wrong = Misfit();
    if (wrong.empty()) {
      return 0;
    }
    Answer(wrong, error, error_len);
  } catch (...) {
    error[0] = '\0';
  }
  return 1;
}

extern "C" void* pumice_env_new(const void* fs, uint32_t offers) {
  try {
    auto owned = std::make_shared<BlobFileSystem>(fs, offers);
    return rocksdb::NewCompositeEnv(owned).release();
  } catch (...) {
    return nullptr;
  }
}

extern "C" void* pumice_env_wrap(void* env) {
  try {
    return WrapEnv(std::unique_ptr<rocksdb::Env>(static_cast<rocksdb::Env*>(env)));
  } catch (...) {
    return nullptr;
  }
}

extern "C" void pumice_register_uri() {
  try {
    // RocksDB owns the registry and never destroys it before its users.
    register_pumice(*rocksdb::ObjectLibrary::Default(), std::string());
  } catch (...) {
    // There is no memory for it: the scheme stays unknown, as the first use of a URI then says.
  }
}

extern "C" void* pumice_env_from_uri(const char* uri, size_t len, char* error, size_t error_len) {
  try {
    std::shared_ptr<rocksdb::FileSystem> fs;
    rocksdb::Status s = rocksdb::FileSystem::CreateFromString(rocksdb::ConfigOptions(),
                                                              std::string(uri, len), &fs);
    if (s.ok()) {
      return WrapEnv(rocksdb::NewCompositeEnv(fs));
    }
    Answer(s.ToString(), error, error_len);
    return nullptr;
  } catch (...) {
    error[0] = '\0';
    return nullptr;
  }
}

}  // namespace pumice
