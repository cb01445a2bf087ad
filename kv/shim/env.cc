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
#include "rocksdb/version.h"

// The struct that the C API, and so the `rocksdb` crate, takes for an environment. No header has
// it: this repeats the definition in db/c.cc of RocksDB 11.8. rocksdb_env_destroy deletes both.
struct rocksdb_env_t {
  rocksdb::Env* rep;
  bool is_default;
};

namespace {

rocksdb_env_t* Wrap(std::unique_ptr<rocksdb::Env> env) {
  auto* wrapped = new rocksdb_env_t{env.get(), false};
  env.release();
  return wrapped;
}

// Copies as much of `text` as there is room for, and a NUL.
void Answer(const std::string& text, char* out, size_t room) {
  const size_t n = std::min(text.size(), room - 1);
  std::memcpy(out, text.data(), n);
  out[n] = '\0';
}

rocksdb::FileSystem* Make(const std::string& uri, std::unique_ptr<rocksdb::FileSystem>* guard,
                          std::string* error) {
  const void* fs = nullptr;
  if (pumice_mount_uri(uri.data(), uri.size(), &fs) < 0) {
    pumice_fault fault{};
    pumice_last_fault(&fault);
    error->assign(fault.text, fault.text_len);
    return nullptr;
  }
  guard->reset(new pumice::BlobFileSystem(
      fs, PUMICE_CAN_ASYNC | PUMICE_CAN_PIN | PUMICE_CAN_PREFETCH | PUMICE_CAN_REREAD));
  return guard->get();
}

}  // namespace

extern "C" uint32_t pumice_check(uint64_t contract, char* error, size_t error_len) {
  try {
    const std::string headers = std::to_string(ROCKSDB_MAJOR) + "." +
                                std::to_string(ROCKSDB_MINOR) + "." +
                                std::to_string(ROCKSDB_PATCH);
    const std::string linked = rocksdb::GetRocksVersionAsString(true);
    std::string wrong;
    if (contract != PUMICE_CONTRACT) {
      wrong = "the C++ part of the plugin was compiled from another list of functions than the Rust "
              "part; run `cargo clean -p pumice` and build again";
    } else if (linked != headers) {
      wrong = "RocksDB " + linked + " is linked, but the plugin was compiled for RocksDB " + headers +
              "; let ROCKSDB_LIB_DIR name a library of that version, or unset it";
    } else {
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
    auto owned = std::make_shared<pumice::BlobFileSystem>(fs, offers);
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

extern "C" void pumice_register_uri() {
  // RocksDB owns the registry and never destroys it before its users.
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
    Answer(s.ToString(), error, error_len);
    return nullptr;
  } catch (...) {
    error[0] = '\0';
    return nullptr;
  }
}
