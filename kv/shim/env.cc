// What Rust calls: environments over a file system, and the URI for RocksDB's own tools.

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "blob_file_system.h"
#include "pumice_fs.h"
#include "rocksdb/convenience.h"
#include "rocksdb/env.h"
#include "rocksdb/utilities/object_registry.h"

// As db/c.cc of RocksDB 11.8 defines it, and nowhere in a header: what the C API, and so the
// `rocksdb` crate, takes for an environment. rocksdb_env_destroy deletes both.
struct rocksdb_env_t {
  rocksdb::Env* rep;
  bool is_default;
};

namespace {

pumice_mount_fn mount_uri = nullptr;

rocksdb_env_t* Wrap(std::unique_ptr<rocksdb::Env> env) {
  auto* wrapped = new rocksdb_env_t{env.get(), false};
  env.release();
  return wrapped;
}

rocksdb::FileSystem* Make(const std::string& uri, std::unique_ptr<rocksdb::FileSystem>* guard,
                          std::string* error) {
  const pumice_fs_ops* ops = nullptr;
  const void* fs = nullptr;
  void (*last_fault)(pumice_fault*) = nullptr;
  if (mount_uri(uri.data(), uri.size(), &ops, &fs, &last_fault) < 0) {
    pumice_fault fault{};
    last_fault(&fault);
    error->assign(fault.text, fault.text_len);
    return nullptr;
  }
  guard->reset(new pumice::BlobFileSystem(ops, fs, 0));
  return guard->get();
}

}  // namespace

extern "C" void* pumice_env_new(const pumice_fs_ops* ops, const void* fs, uint32_t forbid) {
  try {
    auto owned = std::make_shared<pumice::BlobFileSystem>(ops, fs, forbid);
    return rocksdb::NewCompositeEnv(owned).release();
  } catch (...) {
    return nullptr;
  }
}

extern "C" void* pumice_env_wrap(void* env) {
  try {
    return Wrap(std::unique_ptr<rocksdb::Env>(static_cast<rocksdb::Env*>(env)));
  } catch (...) {
    return nullptr;
  }
}

extern "C" void pumice_register_uri(pumice_mount_fn mount) {
  if (mount_uri != nullptr) {
    return;
  }
  mount_uri = mount;
  // The registry is RocksDB's own and never destroyed before its users.
  rocksdb::ObjectLibrary::Default()->AddFactory<rocksdb::FileSystem>(
      rocksdb::ObjectLibrary::PatternEntry("blobfs", false).AddSeparator("://"), Make);
}

extern "C" void* pumice_env_from_uri(const char* uri, size_t len, char* error, size_t error_len) {
  try {
    std::shared_ptr<rocksdb::FileSystem> fs;
    rocksdb::Status s = rocksdb::FileSystem::CreateFromString(rocksdb::ConfigOptions(),
                                                              std::string(uri, len), &fs);
    if (s.ok()) {
      return Wrap(rocksdb::NewCompositeEnv(fs));
    }
    const std::string text = s.ToString();
    const size_t n = std::min(text.size(), error_len - 1);
    std::memcpy(error, text.data(), n);
    error[n] = '\0';
    return nullptr;
  } catch (...) {
    error[0] = '\0';
    return nullptr;
  }
}
