#include "register.h"

#include <memory>

#include "blob_file_system.h"
#include "pumice_fs.h"
#include "rocksdb/convenience.h"
#include "rocksdb/file_system.h"

namespace pumice {

std::string Misfit() {
  const pumice_abi needed{sizeof(pumice_abi),  PUMICE_ABI_VERSION,
                          kAbilities,          sizeof(pumice_fault),
                          sizeof(pumice_read), sizeof(pumice_stat),
                          0};
  char error[1024] = "";
  if (pumice_abi_check(&needed, error, sizeof(error)) != 0) {
    return error;
  }
  const std::string headers = std::to_string(ROCKSDB_MAJOR) + "." +
                              std::to_string(ROCKSDB_MINOR) + "." +
                              std::to_string(ROCKSDB_PATCH);
  const std::string linked = rocksdb::GetRocksVersionAsString(true);
  if (linked != headers) {
    return "RocksDB " + linked + " is linked, but the plugin was compiled for RocksDB " + headers +
           "; use a library of that version, or compile the plugin against its headers "
           "(programs in Rust: ROCKSDB_LIB_DIR names the library)";
  }
  return "";
}

namespace {

// Called by RocksDB for each URI that it is given, also for one that it has been given before.
rocksdb::FileSystem* Mount(const std::string& uri, std::unique_ptr<rocksdb::FileSystem>* guard,
                           std::string* error) {
  *error = Misfit();
  if (!error->empty()) {
    return nullptr;
  }
  const void* fs = nullptr;
  if (pumice_mount_uri(uri.data(), uri.size(), &fs) < 0) {
    pumice_fault fault{};
    pumice_last_fault(&fault);
    error->assign(fault.text, fault.text_len);
    return nullptr;
  }
  guard->reset(new BlobFileSystem(fs, kOffers));
  return guard->get();
}

}  // namespace

}  // namespace pumice

extern "C" int register_pumice(ROCKSDB_NAMESPACE::ObjectLibrary& library,
                               const std::string& /*arg*/) {
  using pumice::rocksdb::ObjectLibrary;
  library.AddFactory<pumice::rocksdb::FileSystem>(
      ObjectLibrary::PatternEntry("blobfs", false).AddSeparator("://"), pumice::Mount);
  return 1;
}
