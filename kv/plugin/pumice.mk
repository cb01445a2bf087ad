# For RocksDB's Makefile and CMakeLists.txt, which read the list of sources only from one line: see README.md.
pumice_SOURCES = shim/status.cc shim/readers.cc shim/async.cc shim/writers.cc shim/blob_file_system.cc shim/register.cc
pumice_FUNC = register_pumice
pumice_PKGCONFIG_REQUIRES = pumice_fs
