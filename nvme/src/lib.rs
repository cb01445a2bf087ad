//! NVMe driver: spec types, DMA memory, transports, controller, queue pairs.

pub mod dma;
pub mod pci;
pub mod spec;
pub mod transport;
