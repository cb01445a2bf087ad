//! The parts that the benchmark programs share.

#[cfg(feature = "db")]
pub mod db_bench;
#[cfg(feature = "db")]
pub mod fscompare;
pub mod nvmeperf;
