//! RocksDB on Pumice: the Env plugin, the embedding API.
