// Makes `blobfs://…` known before main() of a RocksDB test or tool.

extern "C" void pumice_register_blobfs();

namespace {
const bool registered = [] {
  pumice_register_blobfs();
  return true;
}();
}  // namespace
