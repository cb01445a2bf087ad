#include "status.h"

#include <cerrno>
#include <cstring>

namespace pumice {

namespace {

IOStatus Make(const pumice_fault& fault, const std::string& what, const std::string& text) {
  switch (fault.err) {
    case ENOSPC:
      return IOStatus::NoSpace(what, text);
    case ENOENT:
      // A user who is used to the kernel's files gives such paths: ingestion, backups, options.
      return IOStatus::PathNotFound(
          what, text + " (paths are inside the Pumice file system; `pumice cp` copies files of the "
                       "kernel's into it)");
    case EUCLEAN:
      return IOStatus::Corruption(what, text);
    case EINVAL:
      return IOStatus::InvalidArgument(what, text);
    case EBUSY:
      return IOStatus::Busy(what, text);
    case ECANCELED:
      return IOStatus::Aborted(what, text);
    case ETIMEDOUT:
      return IOStatus::TimedOut(what, text);
    // The file has as many links as it can have. This status makes RocksDB copy the file instead.
    case EMLINK:
    case EOPNOTSUPP:
      return IOStatus::NotSupported(what, text);
    default:
      return IOStatus::IOError(what, text);
  }
}

}  // namespace

IOStatus LastFault(Where where, IODebugContext* dbg) {
  pumice_fault fault{};
  pumice_last_fault(&fault);
  const std::string text(fault.text, fault.text_len);
  std::string what(where.doing);
  what += ' ';
  what += where.name;
  if (dbg != nullptr) {
    dbg->file_path = where.name;
    dbg->msg = text;
  }
  IOStatus s = Make(fault, what, text);
  s.SetRetryable((fault.flags & PUMICE_RETRYABLE) != 0);
  s.SetDataLoss((fault.flags & PUMICE_DATA_LOSS) != 0);
  s.SetScope(fault.err == EIO || fault.err == EUCLEAN ? IOStatus::kIOErrorScopeFile
                                                      : IOStatus::kIOErrorScopeFileSystem);
  return s;
}

IOStatus LastFaultOfLookup(Where where, IODebugContext* dbg) {
  pumice_fault fault{};
  pumice_last_fault(&fault);
  switch (fault.err) {
    case ENOENT:
    case ENOTDIR:
    case ENAMETOOLONG:
      return IOStatus::NotFound();
    default:
      return LastFault(where, dbg);
  }
}

IOStatus RefuseMmap(const char* option, const std::string& name) {
  return IOStatus::NotSupported(
      std::string(option) + " cannot be used on BlobFS, whose files are not in the kernel; clear it",
      name);
}

}  // namespace pumice
