#include "writers.h"

#include "status.h"

namespace pumice {

using rocksdb::DataVerificationInfo;
using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;
using rocksdb::Slice;

WritableFile::WritableFile(Opened opened, const rocksdb::FileOptions& options)
    : FSWritableFile(options),
      at_(std::move(opened)),
      size_(pumice_file_len(at_.file.get())),
      prepared_end_(UINT64_MAX) {}

IOStatus WritableFile::Append(const Slice& data, const IOOptions& /*options*/,
                              IODebugContext* dbg) {
  if (PUMICE_LIKELY(pumice_append(at_.file.get(), data.data(), data.size()) >= 0)) {
    size_ += data.size();
    return IOStatus::OK();
  }
  return LastFault({"appending to", at_.name}, dbg);
}

IOStatus WritableFile::Append(const Slice& data, const IOOptions& options,
                              const DataVerificationInfo& /*info*/, IODebugContext* dbg) {
  return Append(data, options, dbg);
}

IOStatus WritableFile::PositionedAppend(const Slice& data, uint64_t offset,
                                        const IOOptions& /*options*/, IODebugContext* dbg) {
  if (PUMICE_LIKELY(pumice_write_at(at_.file.get(), offset, data.data(), data.size()) >= 0)) {
    size_ = offset + data.size();
    return IOStatus::OK();
  }
  return LastFault({"writing", at_.name}, dbg);
}

IOStatus WritableFile::PositionedAppend(const Slice& data, uint64_t offset,
                                        const IOOptions& options,
                                        const DataVerificationInfo& /*info*/,
                                        IODebugContext* dbg) {
  return PositionedAppend(data, offset, options, dbg);
}

IOStatus WritableFile::Truncate(uint64_t size, const IOOptions& /*options*/,
                                IODebugContext* dbg) {
  if (pumice_truncate(at_.file.get(), size) < 0) {
    return LastFault({"truncating", at_.name}, dbg);
  }
  size_ = size;
  return IOStatus::OK();
}

IOStatus WritableFile::Close(const IOOptions& /*options*/, IODebugContext* dbg) {
  if (pumice_finish(at_.file.get()) < 0) {
    return LastFault({"closing", at_.name}, dbg);
  }
  return IOStatus::OK();
}

IOStatus WritableFile::Flush(const IOOptions& /*options*/, IODebugContext* /*dbg*/) {
  return IOStatus::OK();
}

IOStatus WritableFile::Sync(const IOOptions& /*options*/, IODebugContext* dbg) {
  if (PUMICE_LIKELY(pumice_sync(at_.file.get()) >= 0)) {
    return IOStatus::OK();
  }
  return LastFault({"syncing", at_.name}, dbg);
}

IOStatus WritableFile::Fsync(const IOOptions& options, IODebugContext* dbg) {
  return Sync(options, dbg);
}

IOStatus WritableFile::RangeSync(uint64_t offset, uint64_t nbytes, const IOOptions& options,
                                 IODebugContext* dbg) {
  if (strict_bytes_per_sync_) {
    return Sync(options, dbg);
  }
  if (pumice_range_sync(at_.file.get(), offset, nbytes) < 0) {
    return LastFault({"writing back", at_.name}, dbg);
  }
  return IOStatus::OK();
}

IOStatus WritableFile::Allocate(uint64_t offset, uint64_t len, const IOOptions& /*options*/,
                                IODebugContext* dbg) {
  if (pumice_allocate(at_.file.get(), offset, len) < 0) {
    return LastFault({"allocating for", at_.name}, dbg);
  }
  return IOStatus::OK();
}

IOStatus WritableFile::InvalidateCache(size_t offset, size_t length) {
  const uint64_t len = length == 0 ? UINT64_MAX - offset : length;
  if (pumice_invalidate(at_.file.get(), offset, len) < 0) {
    return LastFault({"dropping the cache of", at_.name}, nullptr);
  }
  return IOStatus::OK();
}

void WritableFile::SetPreallocationBlockSize(size_t size) {
  block_size_ = size;
  prepared_end_ = size == 0 ? UINT64_MAX : uint64_t{size} * blocks_;
}

void WritableFile::GetPreallocationStatus(size_t* block_size, size_t* last_allocated_block) {
  *block_size = block_size_;
  *last_allocated_block = blocks_;
}

void WritableFile::PrepareWrite(size_t offset, size_t len, const IOOptions& options,
                                IODebugContext* dbg) {
  if (PUMICE_LIKELY(uint64_t{offset} + len <= prepared_end_)) {
    return;
  }
  const size_t needed = (offset + len + block_size_ - 1) / block_size_;
  // That there is no room for future writes is not a failure of this write, which reports its own.
  Allocate(uint64_t{block_size_} * blocks_, uint64_t{block_size_} * (needed - blocks_), options,
           dbg)
      .PermitUncheckedError();
  blocks_ = needed;
  prepared_end_ = uint64_t{block_size_} * needed;
}

uint64_t WritableFile::GetFileSize(const IOOptions& /*options*/, IODebugContext* /*dbg*/) {
  return size_;
}

size_t WritableFile::GetUniqueId(char* id, size_t max_size) const {
  return UniqueId(pumice_file_id(at_.file.get()), at_.mount, id, max_size);
}

IOStatus RandomRWFile::Write(uint64_t offset, const Slice& data, const IOOptions& /*options*/,
                             IODebugContext* dbg) {
  if (pumice_write_at(at_.file.get(), offset, data.data(), data.size()) < 0) {
    return LastFault({"writing", at_.name}, dbg);
  }
  return IOStatus::OK();
}

IOStatus RandomRWFile::Read(uint64_t offset, size_t n, const IOOptions& /*options*/, Slice* result,
                            char* scratch, IODebugContext* dbg) const {
  const int64_t got = pumice_read_at(at_.file.get(), offset, scratch, n);
  if (got < 0) {
    *result = Slice(scratch, 0);
    return LastFault({"reading", at_.name}, dbg);
  }
  *result = Slice(scratch, static_cast<size_t>(got));
  return IOStatus::OK();
}

IOStatus RandomRWFile::Flush(const IOOptions& /*options*/, IODebugContext* /*dbg*/) {
  return IOStatus::OK();
}

IOStatus RandomRWFile::Sync(const IOOptions& /*options*/, IODebugContext* dbg) {
  if (pumice_sync(at_.file.get()) < 0) {
    return LastFault({"syncing", at_.name}, dbg);
  }
  return IOStatus::OK();
}

IOStatus RandomRWFile::Close(const IOOptions& /*options*/, IODebugContext* dbg) {
  if (pumice_finish(at_.file.get()) < 0) {
    return LastFault({"closing", at_.name}, dbg);
  }
  return IOStatus::OK();
}

IOStatus Directory::Fsync(const IOOptions& /*options*/, IODebugContext* dbg) {
  if (pumice_sync_dir(fs_, name_.data(), name_.size()) < 0) {
    return LastFault({"syncing directory", name_}, dbg);
  }
  return IOStatus::OK();
}

IOStatus Directory::Close(const IOOptions& /*options*/, IODebugContext* /*dbg*/) {
  return IOStatus::OK();
}

size_t Directory::GetUniqueId(char* id, size_t max_size) const {
  return UniqueId(file_id_, fs_, id, max_size);
}

}  // namespace pumice
