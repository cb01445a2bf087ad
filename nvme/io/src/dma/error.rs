//! Errors of DMA memory.

use std::io;

use super::limits::Memlock;

/// The reason why DMA memory was not available or could not be made accessible to a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DmaError {
    /// A buffer of this length cannot exist.
    #[error("a DMA buffer has 1 to {max} bytes, {len} were asked for")]
    Length {
        /// The requested length, in bytes.
        len: usize,
        /// The largest possible length, in bytes.
        max: usize,
    },
    /// The arena's own limit is reached.
    #[error(
        "DMA memory limit reached: {asked} more bytes wanted, {total} of at most {limit} bytes are \
         taken; raise ArenaOptions::max_bytes or use smaller caches"
    )]
    Limit {
        /// Bytes that the arena had to grow by.
        asked: usize,
        /// Current size of the arena in bytes.
        total: usize,
        /// The limit, in bytes.
        limit: usize,
    },
    /// Huge pages were required and there are none left.
    #[error(
        "{len} bytes of huge pages wanted, none free ({source}); reserve some: \
         echo {pages} > /proc/sys/vm/nr_hugepages"
    )]
    NoHugePages {
        /// Requested number of bytes.
        len: usize,
        /// Number of 2 MiB pages that would suffice.
        pages: usize,
        /// The kernel's error.
        source: io::Error,
    },
    /// A system call failed.
    #[error("{call} for {len} bytes of DMA memory: {source}")]
    Os {
        /// The call.
        call: &'static str,
        /// Number of bytes.
        len: usize,
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel does not let this process pin more memory for a device.
    #[error(
        "{device}: cannot pin {len} bytes for DMA ({source}); {mapped} bytes are pinned already and \
         the memlock limit is {memlock}. Raise it (ulimit -l unlimited, LimitMEMLOCK=infinity in the \
         service, or `memlock` in /etc/security/limits.conf)"
    )]
    Pin {
        /// Name of the device.
        device: String,
        /// Number of bytes to pin.
        len: usize,
        /// Number of bytes that are pinned already.
        mapped: usize,
        /// The process's limit.
        memlock: Memlock,
        /// The kernel's error.
        source: io::Error,
    },
    /// The device's transport has no room for another mapping.
    #[error(
        "{device}: no more DMA mappings ({used} used, at most {limit}); set vfio_iommu_type1's \
         dma_entry_limit higher, or let the arena use larger regions (ArenaOptions::region_min)"
    )]
    NoMappings {
        /// Name of the device.
        device: String,
        /// Number of mappings in use.
        used: usize,
        /// Most mappings.
        limit: usize,
    },
    /// No gap of the device's address windows is large enough.
    #[error("{device}: no free I/O address range of {len} bytes in its windows {windows}")]
    NoIova {
        /// Name of the device.
        device: String,
        /// Requested number of bytes.
        len: usize,
        /// The windows as text.
        windows: String,
    },
    /// The transport could not map the region.
    #[error("{device}: mapping {len} bytes for DMA: {reason}")]
    Map {
        /// Name of the device.
        device: String,
        /// Length of the region in bytes.
        len: usize,
        /// The transport's reason and remedy.
        reason: String,
    },
    /// Physical addresses are not available.
    #[error("physical addresses for DMA without an IOMMU: {0}")]
    Physical(String),
    /// The arena is in use already, so its options are fixed.
    #[error("DMA memory is in use already; configure it before the first buffer or device")]
    AlreadyInUse,
}
