// The part of libpumice_rocksdb.so that programs need which were not compiled with the plugin: what is
// loaded with LD_PRELOAD registers itself before main.

#include <string>

#include "register.h"

namespace {

const int registered = register_pumice(*ROCKSDB_NAMESPACE::ObjectLibrary::Default(), std::string());

}  // namespace
