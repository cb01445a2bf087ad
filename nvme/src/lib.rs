//! NVMe driver: spec types, DMA memory, transports, controller, queue pairs.

pub mod dma;
pub mod spec;
pub mod pci;
pub mod transport;
