// Files opened for reading.

#pragma once

#include <functional>
#include <string>

#include "pumice_fs.h"
#include "rocksdb/file_system.h"
#include "version.h"

namespace pumice {

// The callback of an async read, whose request is const in older versions.
template <typename Method>
struct CallbackOf;
template <typename Class, typename Signature>
struct CallbackOf<rocksdb::IOStatus (Class::*)(
    rocksdb::FSReadRequest&, const rocksdb::IOOptions&, std::function<Signature>, void*, void**,
    rocksdb::IOHandleDeleter*, rocksdb::IODebugContext*)> {
  using type = std::function<Signature>;
};
using ReadCallback = CallbackOf<decltype(&rocksdb::FSRandomAccessFile::ReadAsync)>::type;

// A handle on a file of the Rust file system. Its destructor releases it.
class FileHandle {
 public:
  explicit FileHandle(const void* file) : file_(file) {}
  FileHandle(FileHandle&& from) noexcept : file_(from.file_) { from.file_ = nullptr; }
  FileHandle(const FileHandle&) = delete;
  FileHandle& operator=(const FileHandle&) = delete;
  FileHandle& operator=(FileHandle&&) = delete;
  ~FileHandle() { Release(); }

  void Release() {
    if (file_ != nullptr) {
      pumice_file_release(file_);
      file_ = nullptr;
    }
  }
  const void* get() const { return file_; }

 private:
  const void* file_;
};

// How a file was opened: what the open functions of the file system pass to its files.
struct Opened {
  FileHandle file;
  const void* mount;  // identifies the mount; compared, never dereferenced
  std::string name;
  bool direct;
};

class SequentialFile final : public rocksdb::FSSequentialFile {
 public:
  explicit SequentialFile(Opened opened) : at_(std::move(opened)) {}

  rocksdb::IOStatus Read(size_t n, const rocksdb::IOOptions& options, rocksdb::Slice* result,
                         char* scratch, rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus Skip(uint64_t n) override;
  rocksdb::IOStatus PositionedRead(uint64_t offset, size_t n, const rocksdb::IOOptions& options,
                                   rocksdb::Slice* result, char* scratch,
                                   rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus InvalidateCache(size_t offset, size_t length) override;
  bool use_direct_io() const override { return at_.direct; }
  size_t GetRequiredBufferAlignment() const override { return PUMICE_ALIGNMENT; }

 private:
  Opened at_;
  uint64_t position_ = 0;
};

class RandomAccessFile final : public rocksdb::FSRandomAccessFile {
 public:
  explicit RandomAccessFile(Opened opened) : at_(std::move(opened)) {}

  rocksdb::IOStatus Read(uint64_t offset, size_t n, const rocksdb::IOOptions& options,
                         rocksdb::Slice* result, char* scratch,
                         rocksdb::IODebugContext* dbg) const override;
  rocksdb::IOStatus Prefetch(uint64_t offset, size_t n, const rocksdb::IOOptions& options,
                             rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus MultiRead(rocksdb::FSReadRequest* reqs, size_t count,
                              const rocksdb::IOOptions& options,
                              rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus ReadAsync(rocksdb::FSReadRequest& req, const rocksdb::IOOptions& options,
                              ReadCallback cb, void* cb_arg, void** io_handle,
                              rocksdb::IOHandleDeleter* del_fn,
                              rocksdb::IODebugContext* dbg) override;
#if PUMICE_HAS_SIZE_OF_OPEN_FILE
  rocksdb::IOStatus GetFileSize(uint64_t* result) override;
#endif
  rocksdb::IOStatus InvalidateCache(size_t offset, size_t length) override;
  size_t GetUniqueId(char* id, size_t max_size) const override;
  void Hint(AccessPattern pattern) override;
  bool use_direct_io() const override { return at_.direct; }
  size_t GetRequiredBufferAlignment() const override { return PUMICE_ALIGNMENT; }

 private:
  // Makes the read bypass the cache when RocksDB has found the first answer damaged.
  void DropIfAsked(const rocksdb::IOOptions& options, uint64_t offset, size_t n) const;

  Opened at_;
};

// Makes a file identifier as RocksDB wants it: unique on this mount, never the prefix of another.
size_t UniqueId(uint64_t file_id, const void* mount, char* id, size_t max_size);

}  // namespace pumice
