//! Block devices: one trait, a channel per thread, modules, configuration, RPC.
