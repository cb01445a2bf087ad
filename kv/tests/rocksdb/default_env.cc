// Part of each program of RocksDB's tests that scripts/rocksdb-tests links. Makes `blobfs://…` known before main(), and gives
// the file system that TEST_FS_URI names wherever the program asks for the default one: some of RocksDB's tests read
// TEST_FS_URI, others use Env::Default() or FileSystem::Default(), and some do both. Without TEST_FS_URI the default
// stays the kernel's file system.
//
// The linker replaces the calls of three functions (`--wrap`).

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "env/composite_env_wrapper.h"
#include "rocksdb/env.h"
#include "rocksdb/file_system.h"
#include "rocksdb/utilities/object_registry.h"

extern "C" {
void pumice_register_blobfs();
rocksdb::Env* __real__ZN7rocksdb3Env7DefaultEv();
std::shared_ptr<rocksdb::FileSystem> __real__ZN7rocksdb10FileSystem7DefaultEv();
char* __real_realpath(const char* path, char* resolved);
}

namespace {

using rocksdb::FileSystem;
using rocksdb::ObjectLibrary;

// What asks for a default while a file system is being mounted gets the kernel's.
thread_local bool mounting = false;

// The file system that a URI names, mounted once for the process and never released: it is unmounted at exit.
std::shared_ptr<FileSystem> Mounted(const std::string& uri, std::string* error) {
  static std::mutex lock;
  static auto* const mounts = new std::map<std::string, std::shared_ptr<FileSystem>>;
  const std::lock_guard<std::mutex> guard(lock);
  std::shared_ptr<FileSystem>& fs = (*mounts)[uri];
  if (fs == nullptr) {
    mounting = true;
    pumice_register_blobfs();
    std::unique_ptr<FileSystem> made;
    ObjectLibrary::Default()->FindFactory<FileSystem>(uri)(uri, &made, error);
    fs = std::move(made);
    mounting = false;
  }
  return fs;
}

// The file system that takes the place of the kernel's, or null.
std::shared_ptr<FileSystem> Replacement() {
  const char* uri = mounting ? nullptr : std::getenv("TEST_FS_URI");
  if (uri == nullptr) {
    return nullptr;
  }
  std::string error;
  auto fs = Mounted(uri, &error);
  if (fs == nullptr) {
    std::fprintf(stderr, "TEST_FS_URI=%s: %s\n", uri, error.c_str());
    std::_Exit(1);
  }
  return fs;
}

// What the registry gives: the one mount, under an owner of its own.
class Share final : public rocksdb::FileSystemWrapper {
 public:
  using FileSystemWrapper::FileSystemWrapper;
  const char* Name() const override { return "Share"; }
};

FileSystem* MakeShare(const std::string& uri, std::unique_ptr<FileSystem>* guard, std::string* error) {
  auto fs = Mounted(uri, error);
  if (fs != nullptr) {
    guard->reset(new Share(fs));
  }
  return guard->get();
}

// The registry asks the library that was added last first.
const bool registered = [] {
  rocksdb::ObjectRegistry::Default()->AddLibrary("rocksdb-tests")->AddFactory<FileSystem>(
      ObjectLibrary::PatternEntry("blobfs", false).AddSeparator("://"), MakeShare);
  return true;
}();

}  // namespace

extern "C" rocksdb::Env* __wrap__ZN7rocksdb3Env7DefaultEv() {
  rocksdb::Env* const kernel = __real__ZN7rocksdb3Env7DefaultEv();
  const auto fs = Replacement();
  if (fs == nullptr) {
    return kernel;
  }
  static auto* const replaced = new rocksdb::CompositeEnvWrapper(kernel, fs);
  return replaced;
}

extern "C" std::shared_ptr<FileSystem> __wrap__ZN7rocksdb10FileSystem7DefaultEv() {
  auto fs = Replacement();
  return fs != nullptr ? fs : __real__ZN7rocksdb10FileSystem7DefaultEv();
}

// ChrootFileSystem asks the kernel for the real path of files in the file system below it.
extern "C" char* __wrap_realpath(const char* path, char* resolved) {
  char* const real = __real_realpath(path, resolved);
  const auto fs = real == nullptr && resolved == nullptr ? Replacement() : nullptr;
  if (fs == nullptr) {
    return real;
  }
  std::string clean;
  std::string rest = path;
  while (!rest.empty()) {
    const size_t end = rest.find('/');
    const std::string part = rest.substr(0, end);
    rest = end == std::string::npos ? "" : rest.substr(end + 1);
    if (part == "..") {
      clean.resize(clean.empty() ? 0 : clean.rfind('/'));
    } else if (!part.empty() && part != ".") {
      clean += "/" + part;
    }
  }
  if (clean.empty()) {
    clean = "/";
  }
  if (!fs->FileExists(clean, rocksdb::IOOptions(), nullptr).ok()) {
    errno = ENOENT;
    return nullptr;
  }
  return strdup(clean.c_str());
}

// DBTestBase::IsMemoryMappedAccessSupported(), which RocksDB's own is weakened for: no file here is in the kernel's memory.
extern "C" bool _ZNK7rocksdb10DBTestBase29IsMemoryMappedAccessSupportedEv(const void* /*test*/) {
  return std::getenv("TEST_FS_URI") == nullptr;
}
