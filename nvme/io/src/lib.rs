#![doc = include_str!("../README.md")]

pub mod cpu;
pub mod dma;
pub mod process;
pub mod sys;
pub mod uri;
