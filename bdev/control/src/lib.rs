#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod config;
pub mod logging;
pub mod metrics;
pub mod rpc;
mod send;
pub mod terminal;
