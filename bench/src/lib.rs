//! The parts that the benchmark programs share.

#[cfg(feature = "db")]
pub mod db_bench;
#[cfg(feature = "compare")]
pub mod fscompare;
#[cfg(feature = "perf")]
pub mod nvmeperf;
