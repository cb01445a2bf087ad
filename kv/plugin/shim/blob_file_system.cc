#include "blob_file_system.h"

#include <unistd.h>

#include <cstdlib>
#include <utility>

#include "async.h"
#include "status.h"
#include "writers.h"

namespace pumice {

using rocksdb::DBOptions;
using rocksdb::FileOptions;
using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;

namespace {

class Lock final : public rocksdb::FileLock {
 public:
  explicit Lock(void* held) : handle(held) {}
  void* const handle;
};

// Reads one entry of a listing from `dir`, for both forms of GetChildren.
struct Listing {
  bool files_only;
  std::vector<std::string>* names;
  std::vector<rocksdb::FileAttributes>* attributes;
};

// RocksDB reads CURRENT and IDENTITY whole into memory. Each has one line. If it is longer than this, the file system is
// damaged, and a file without blocks may be longer than any memory.
constexpr uint64_t kMostOfOneLine = 1 << 20;

bool HasOneLine(const std::string& name) {
  const std::string base = name.substr(name.find_last_of('/') + 1);
  return base == "CURRENT" || base == "IDENTITY";
}

// Called from Rust: an allocation that fails here ends the process, since nothing may be thrown.
void AddEntry(void* arg, const char* name, size_t len, uint64_t file_len,
              uint32_t is_dir) noexcept {
  auto* listing = static_cast<Listing*>(arg);
  if (listing->files_only && is_dir != 0) {
    return;
  }
  if (listing->names != nullptr) {
    listing->names->emplace_back(name, len);
  } else {
    listing->attributes->push_back({std::string(name, len), file_len});
  }
}

}  // namespace

BlobFileSystem::BlobFileSystem(const void* fs, uint32_t offers) : fs_(fs) {
#if PUMICE_HAS_SUPPORTED_OPS
  const auto claim = [&](uint32_t offer, rocksdb::FSSupportedOps op) {
    if ((offers & offer) != 0) {
      supported_ |= int64_t{1} << op;
    }
  };
  claim(PUMICE_CAN_ASYNC, rocksdb::FSSupportedOps::kAsyncIO);
  claim(PUMICE_CAN_PIN, rocksdb::FSSupportedOps::kFSBuffer);
#if PUMICE_HAS_REREADING
  claim(PUMICE_CAN_REREAD, rocksdb::FSSupportedOps::kVerifyAndReconstructRead);
#endif
#if PUMICE_HAS_PREFETCH_OP
  claim(PUMICE_CAN_PREFETCH, rocksdb::FSSupportedOps::kFSPrefetch);
#endif
#else
  (void)offers;
#endif
}

BlobFileSystem::~BlobFileSystem() { pumice_fs_release(fs_); }

IOStatus BlobFileSystem::Open(const std::string& name, uint32_t how, const char* doing,
                              IODebugContext* dbg, const void** file) {
  if (pumice_open(fs_, name.data(), name.size(), how, file) < 0) {
    return LastFault({doing, name}, dbg);
  }
  return IOStatus::OK();
}

Opened BlobFileSystem::Wrap(const void* file, const std::string& name, bool direct) const {
  return Opened{FileHandle(file), fs_, name, direct};
}

IOStatus BlobFileSystem::NewSequentialFile(const std::string& name, const FileOptions& options,
                                           std::unique_ptr<rocksdb::FSSequentialFile>* result,
                                           IODebugContext* dbg) {
  result->reset();
  const bool direct = options.use_direct_reads;
  const void* file = nullptr;
  IOStatus s = Open(name, direct ? PUMICE_OPEN_DIRECT : 0, "opening", dbg, &file);
  if (!s.ok()) {
    return s;
  }
  Opened opened = Wrap(file, name, direct);
  if (const uint64_t len = pumice_file_len(file); HasOneLine(name) && len > kMostOfOneLine) {
    return IOStatus::Corruption(
        "opening " + name, "it has " + std::to_string(len) + " bytes in place of one line: the file system is damaged");
  }
  pumice_advise(file, PUMICE_ACCESS_SEQUENTIAL);
  result->reset(new SequentialFile(std::move(opened)));
  return s;
}

IOStatus BlobFileSystem::NewRandomAccessFile(const std::string& name, const FileOptions& options,
                                             std::unique_ptr<rocksdb::FSRandomAccessFile>* result,
                                             IODebugContext* dbg) {
  result->reset();
  if (options.use_mmap_reads) {
    return RefuseMmap("allow_mmap_reads", name);
  }
  const bool direct = options.use_direct_reads;
  const void* file = nullptr;
  IOStatus s = Open(name, direct ? PUMICE_OPEN_DIRECT : 0, "opening", dbg, &file);
  if (s.ok()) {
    result->reset(new RandomAccessFile(Wrap(file, name, direct)));
  }
  return s;
}

IOStatus BlobFileSystem::NewWritableFile(const std::string& name, const FileOptions& options,
                                         std::unique_ptr<rocksdb::FSWritableFile>* result,
                                         IODebugContext* dbg) {
  result->reset();
  if (options.use_mmap_writes) {
    return RefuseMmap("allow_mmap_writes", name);
  }
  const bool direct = options.use_direct_writes;
  const uint32_t how =
      PUMICE_OPEN_CREATE | PUMICE_OPEN_FRESH | (direct ? PUMICE_OPEN_DIRECT : 0);
  const void* file = nullptr;
  IOStatus s = Open(name, how, "creating", dbg, &file);
  if (s.ok()) {
    result->reset(new WritableFile(Wrap(file, name, direct), options));
  }
  return s;
}

IOStatus BlobFileSystem::ReopenWritableFile(const std::string& name, const FileOptions& options,
                                            std::unique_ptr<rocksdb::FSWritableFile>* result,
                                            IODebugContext* dbg) {
  result->reset();
  if (options.use_mmap_writes) {
    return RefuseMmap("allow_mmap_writes", name);
  }
  const bool direct = options.use_direct_writes;
  const void* file = nullptr;
  IOStatus s = Open(name, PUMICE_OPEN_CREATE | (direct ? PUMICE_OPEN_DIRECT : 0), "reopening", dbg,
                    &file);
  if (s.ok()) {
    result->reset(new WritableFile(Wrap(file, name, direct), options));
  }
  return s;
}

IOStatus BlobFileSystem::NewRandomRWFile(const std::string& name, const FileOptions& options,
                                         std::unique_ptr<rocksdb::FSRandomRWFile>* result,
                                         IODebugContext* dbg) {
  result->reset();
  if (options.use_mmap_reads || options.use_mmap_writes) {
    return RefuseMmap("allow_mmap_writes", name);
  }
  const void* file = nullptr;
  IOStatus s = Open(name, 0, "opening for random writes", dbg, &file);
  if (s.ok()) {
    result->reset(new RandomRWFile(Wrap(file, name, false)));
  }
  return s;
}

IOStatus BlobFileSystem::NewMemoryMappedFileBuffer(
    const std::string& name, std::unique_ptr<rocksdb::MemoryMappedFileBuffer>* result) {
  result->reset();
  return RefuseMmap("a memory-mapped buffer", name);
}

IOStatus BlobFileSystem::NewDirectory(const std::string& name, const IOOptions& /*options*/,
                                      std::unique_ptr<rocksdb::FSDirectory>* result,
                                      IODebugContext* dbg) {
  result->reset();
  pumice_stat stat{};
  IOStatus s = Stat(name, "opening directory", &stat, dbg);
  if (!s.ok()) {
    return s;
  }
  if (stat.is_dir == 0) {
    return IOStatus::IOError("opening directory " + name, "it is a file");
  }
  result->reset(new Directory(fs_, name, stat.file_id));
  return s;
}

IOStatus BlobFileSystem::Stat(const std::string& name, const char* doing, pumice_stat* out,
                              IODebugContext* dbg) {
  if (pumice_stat_path(fs_, name.data(), name.size(), out) < 0) {
    return LastFault({doing, name}, dbg);
  }
  return IOStatus::OK();
}

IOStatus BlobFileSystem::FileExists(const std::string& name, const IOOptions& /*options*/,
                                    IODebugContext* dbg) {
  pumice_stat stat{};
  if (pumice_stat_path(fs_, name.data(), name.size(), &stat) < 0) {
    return LastFaultOfLookup({"looking up", name}, dbg);
  }
  return IOStatus::OK();
}

IOStatus BlobFileSystem::GetChildren(const std::string& dir, const IOOptions& options,
                                     std::vector<std::string>* result, IODebugContext* dbg) {
  result->clear();
  Listing listing{options.do_not_recurse, result, nullptr};
  if (pumice_list(fs_, dir.data(), dir.size(), AddEntry, &listing) < 0) {
    result->clear();
    return LastFaultOfLookup({"listing", dir}, dbg);
  }
  return IOStatus::OK();
}

IOStatus BlobFileSystem::GetChildrenFileAttributes(const std::string& dir,
                                                   const IOOptions& options,
                                                   std::vector<rocksdb::FileAttributes>* result,
                                                   IODebugContext* dbg) {
  result->clear();
  Listing listing{options.do_not_recurse, nullptr, result};
  if (pumice_list(fs_, dir.data(), dir.size(), AddEntry, &listing) < 0) {
    result->clear();
    return LastFaultOfLookup({"listing", dir}, dbg);
  }
  return IOStatus::OK();
}

IOStatus BlobFileSystem::DeleteFile(const std::string& name, const IOOptions& /*options*/,
                                    IODebugContext* dbg) {
  if (pumice_remove(fs_, name.data(), name.size()) < 0) {
    return LastFault({"deleting", name}, dbg);
  }
  return IOStatus::OK();
}

IOStatus BlobFileSystem::Truncate(const std::string& name, size_t size,
                                  const IOOptions& /*options*/, IODebugContext* dbg) {
  const void* file = nullptr;
  IOStatus s = Open(name, 0, "truncating", dbg, &file);
  if (!s.ok()) {
    return s;
  }
  const FileHandle handle(file);
  if (pumice_truncate(handle.get(), size) < 0) {
    return LastFault({"truncating", name}, dbg);
  }
  return s;
}

IOStatus BlobFileSystem::CreateDir(const std::string& name, const IOOptions& /*options*/,
                                   IODebugContext* dbg) {
  if (pumice_mkdir(fs_, name.data(), name.size()) < 0) {
    return LastFault({"creating directory", name}, dbg);
  }
  return IOStatus::OK();
}

IOStatus BlobFileSystem::CreateDirIfMissing(const std::string& name, const IOOptions& /*options*/,
                                            IODebugContext* dbg) {
  pumice_stat stat{};
  if (pumice_stat_path(fs_, name.data(), name.size(), &stat) >= 0) {
    return stat.is_dir != 0 ? IOStatus::OK()
                            : IOStatus::IOError("creating directory " + name, "it is a file");
  }
  // The parents are made too: a path that a user brings from a kernel file system has none here.
  if (pumice_make_dirs(fs_, name.data(), name.size()) < 0) {
    return LastFault({"creating directory", name}, dbg);
  }
  return IOStatus::OK();
}

IOStatus BlobFileSystem::DeleteDir(const std::string& name, const IOOptions& /*options*/,
                                   IODebugContext* dbg) {
  if (pumice_rmdir(fs_, name.data(), name.size()) < 0) {
    return LastFault({"deleting directory", name}, dbg);
  }
  return IOStatus::OK();
}

IOStatus BlobFileSystem::GetFileSize(const std::string& name, const IOOptions& /*options*/,
                                     uint64_t* size, IODebugContext* dbg) {
  pumice_stat stat{};
  IOStatus s = Stat(name, "asking the size of", &stat, dbg);
  *size = stat.len;
  return s;
}

IOStatus BlobFileSystem::GetFileModificationTime(const std::string& name,
                                                 const IOOptions& /*options*/, uint64_t* mtime,
                                                 IODebugContext* dbg) {
  pumice_stat stat{};
  IOStatus s = Stat(name, "asking the time of", &stat, dbg);
  *mtime = stat.mtime_s;
  return s;
}

IOStatus BlobFileSystem::RenameFile(const std::string& from, const std::string& to,
                                    const IOOptions& /*options*/, IODebugContext* dbg) {
  if (pumice_rename(fs_, from.data(), from.size(), to.data(), to.size()) < 0) {
    return LastFault({"renaming", from}, dbg);
  }
  return IOStatus::OK();
}

IOStatus BlobFileSystem::LinkFile(const std::string& from, const std::string& to,
                                  const IOOptions& /*options*/, IODebugContext* dbg) {
  if (pumice_link(fs_, from.data(), from.size(), to.data(), to.size()) < 0) {
    return LastFault({"linking", from}, dbg);
  }
  return IOStatus::OK();
}

#if PUMICE_HAS_SYNC_FILE
IOStatus BlobFileSystem::SyncFile(const std::string& name, const FileOptions& /*file_options*/,
                                  const IOOptions& /*options*/, bool /*use_fsync*/,
                                  IODebugContext* dbg) {
  const void* file = nullptr;
  IOStatus s = Open(name, 0, "syncing", dbg, &file);
  if (!s.ok()) {
    return s;
  }
  const FileHandle handle(file);
  if (pumice_sync(handle.get()) < 0) {
    return LastFault({"syncing", name}, dbg);
  }
  return s;
}
#endif

IOStatus BlobFileSystem::NumFileLinks(const std::string& name, const IOOptions& /*options*/,
                                      uint64_t* count, IODebugContext* dbg) {
  pumice_stat stat{};
  IOStatus s = Stat(name, "counting the links of", &stat, dbg);
  *count = stat.links;
  return s;
}

IOStatus BlobFileSystem::AreFilesSame(const std::string& first, const std::string& second,
                                      const IOOptions& /*options*/, bool* same,
                                      IODebugContext* dbg) {
  pumice_stat a{};
  pumice_stat b{};
  IOStatus s = Stat(first, "looking up", &a, dbg);
  if (s.ok()) {
    s = Stat(second, "looking up", &b, dbg);
  }
  if (s.ok() && a.file_id == 0 && b.file_id == 0) {
    // Directories that have no blob have no number either. RocksDB compares the paths then.
    return IOStatus::NotSupported("two directories without a number of their own");
  }
  if (s.ok()) {
    *same = a.file_id == b.file_id;
  }
  return s;
}

IOStatus BlobFileSystem::LockFile(const std::string& name, const IOOptions& /*options*/,
                                  rocksdb::FileLock** lock, IODebugContext* dbg) {
  *lock = nullptr;
  void* handle = nullptr;
  if (pumice_lock(fs_, name.data(), name.size(), &handle) < 0) {
    // RocksDB's own error has "lock " in it, and its tests look for that.
    return LastFault({"taking the lock", name}, dbg);
  }
  *lock = new Lock(handle);
  return IOStatus::OK();
}

IOStatus BlobFileSystem::UnlockFile(rocksdb::FileLock* lock, const IOOptions& /*options*/,
                                    IODebugContext* /*dbg*/) {
  auto* held = static_cast<Lock*>(lock);
  pumice_unlock(held->handle);
  delete held;
  return IOStatus::OK();
}

IOStatus BlobFileSystem::GetTestDirectory(const IOOptions& options, std::string* path,
                                          IODebugContext* dbg) {
  const char* chosen = std::getenv("TEST_TMPDIR");
  if (chosen != nullptr && chosen[0] != '\0') {
    *path = chosen;
  } else {
    *path = "/rocksdbtest-" + std::to_string(geteuid());
  }
  return CreateDirIfMissing(*path, options, dbg);
}

IOStatus BlobFileSystem::GetAbsolutePath(const std::string& path, const IOOptions& /*options*/,
                                         std::string* absolute, IODebugContext* /*dbg*/) {
  *absolute = !path.empty() && path[0] == '/' ? path : "/" + path;
  return IOStatus::OK();
}

IOStatus BlobFileSystem::GetFreeSpace(const std::string& path, const IOOptions& /*options*/,
                                      uint64_t* free, IODebugContext* dbg) {
  if (pumice_free_bytes(fs_, free) < 0) {
    return LastFault({"asking the free space of", path}, dbg);
  }
  return IOStatus::OK();
}

IOStatus BlobFileSystem::IsDirectory(const std::string& path, const IOOptions& /*options*/,
                                     bool* is_dir, IODebugContext* dbg) {
  pumice_stat stat{};
  IOStatus s = Stat(path, "looking up", &stat, dbg);
  if (s.ok() && is_dir != nullptr) {
    *is_dir = stat.is_dir != 0;
  }
  return s;
}

IOStatus BlobFileSystem::Poll(std::vector<void*>& io_handles, size_t /*min_completions*/) {
  PollReads(io_handles);
  return IOStatus::OK();
}

IOStatus BlobFileSystem::AbortIO(std::vector<void*>& io_handles) {
  AbortReads(io_handles);
  return IOStatus::OK();
}

FileOptions BlobFileSystem::OptimizeForLogWrite(const FileOptions& file_options,
                                                const DBOptions& options) const {
  // Logs and manifests are many small appends, and a direct write would write a whole block for
  // each.
  FileOptions best = FileSystem::OptimizeForLogWrite(file_options, options);
  best.use_mmap_writes = false;
  best.use_direct_writes = false;
  return best;
}

FileOptions BlobFileSystem::OptimizeForManifestWrite(const FileOptions& file_options) const {
  FileOptions best = FileSystem::OptimizeForManifestWrite(file_options);
  best.use_mmap_writes = false;
  best.use_direct_writes = false;
  return best;
}

}  // namespace pumice
