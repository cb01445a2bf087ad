// Files opened for writing, and directories.

#pragma once

#include <string>

#include "readers.h"
#include "rocksdb/file_system.h"
#include "version.h"

namespace pumice {

// A log, a table or a manifest, which one thread at a time writes from its start to its end.
//
// What a put costs is decided here: RocksDB calls GetFileSize, Append, Flush and PrepareWrite for
// every record. The size is kept here, and Flush does nothing, since what was appended is in the
// file system's memory and every reader sees it at once.
class WritableFile final : public rocksdb::FSWritableFile {
 public:
  // Writing starts at the current end of the file.
  WritableFile(Opened opened, const rocksdb::FileOptions& options);

  rocksdb::IOStatus Append(const rocksdb::Slice& data, const rocksdb::IOOptions& options,
                           rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus Append(const rocksdb::Slice& data, const rocksdb::IOOptions& options,
                           const rocksdb::DataVerificationInfo& info,
                           rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus PositionedAppend(const rocksdb::Slice& data, uint64_t offset,
                                     const rocksdb::IOOptions& options,
                                     rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus PositionedAppend(const rocksdb::Slice& data, uint64_t offset,
                                     const rocksdb::IOOptions& options,
                                     const rocksdb::DataVerificationInfo& info,
                                     rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus Truncate(uint64_t size, const rocksdb::IOOptions& options,
                             rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus Close(const rocksdb::IOOptions& options,
                          rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus Flush(const rocksdb::IOOptions& options,
                          rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus Sync(const rocksdb::IOOptions& options,
                         rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus Fsync(const rocksdb::IOOptions& options,
                          rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus RangeSync(uint64_t offset, uint64_t nbytes, const rocksdb::IOOptions& options,
                              rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus Allocate(uint64_t offset, uint64_t len, const rocksdb::IOOptions& options,
                             rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus InvalidateCache(size_t offset, size_t length) override;
  void PrepareWrite(size_t offset, size_t len, const rocksdb::IOOptions& options,
                    rocksdb::IODebugContext* dbg) override;
  void SetPreallocationBlockSize(size_t size) override;
  void GetPreallocationStatus(size_t* block_size, size_t* last_allocated_block) override;
  uint64_t GetFileSize(const rocksdb::IOOptions& options, rocksdb::IODebugContext* dbg) override;
  size_t GetUniqueId(char* id, size_t max_size) const override;
  bool IsSyncThreadSafe() const override { return true; }
  bool use_direct_io() const override { return at_.direct; }
  size_t GetRequiredBufferAlignment() const override { return PUMICE_ALIGNMENT; }

 private:
  Opened at_;
  uint64_t size_;
  uint64_t prepared_end_;  // PrepareWrite does nothing below this
  size_t block_size_ = 0;  // of preallocation
  size_t blocks_ = 0;      // preallocated so far
};

// A file that external-file ingestion patches.
class RandomRWFile final : public rocksdb::FSRandomRWFile {
 public:
  explicit RandomRWFile(Opened opened) : at_(std::move(opened)) {}

  rocksdb::IOStatus Write(uint64_t offset, const rocksdb::Slice& data,
                          const rocksdb::IOOptions& options,
                          rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus Read(uint64_t offset, size_t n, const rocksdb::IOOptions& options,
                         rocksdb::Slice* result, char* scratch,
                         rocksdb::IODebugContext* dbg) const override;
  rocksdb::IOStatus Flush(const rocksdb::IOOptions& options,
                          rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus Sync(const rocksdb::IOOptions& options,
                         rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus Close(const rocksdb::IOOptions& options,
                          rocksdb::IODebugContext* dbg) override;
  bool use_direct_io() const override { return at_.direct; }
  size_t GetRequiredBufferAlignment() const override { return PUMICE_ALIGNMENT; }

 private:
  Opened at_;
};

class Directory final : public rocksdb::FSDirectory {
 public:
  Directory(const void* fs, std::string name, uint64_t file_id)
      : fs_(fs), name_(std::move(name)), file_id_(file_id) {}

  rocksdb::IOStatus Fsync(const rocksdb::IOOptions& options,
                          rocksdb::IODebugContext* dbg) override;
  rocksdb::IOStatus Close(const rocksdb::IOOptions& options,
                          rocksdb::IODebugContext* dbg) override;
  size_t GetUniqueId(char* id, size_t max_size) const override;

 private:
  const void* fs_;  // of the file system, which outlives its directories
  const std::string name_;
  const uint64_t file_id_;
};

}  // namespace pumice
