//! What can go wrong with DMA memory.

use std::io;

use super::limits::Memlock;

/// Why memory for DMA could not be had or could not be made reachable for a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DmaError {
    /// A buffer of this length cannot exist.
    #[error("a DMA buffer has 1 to {max} bytes, {len} were asked for")]
    Length {
        /// The length asked for, in bytes.
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
        /// Bytes that the arena has.
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
        /// Bytes wanted.
        len: usize,
        /// 2 MiB pages that would do.
        pages: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// A system call failed.
    #[error("{call} for {len} bytes of DMA memory: {source}")]
    Os {
        /// The call.
        call: &'static str,
        /// Bytes concerned.
        len: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel does not let this process pin more memory for a device.
    #[error(
        "{device}: cannot pin {len} bytes for DMA ({source}); {mapped} bytes are pinned already and \
         the memlock limit is {memlock}. Raise it (ulimit -l unlimited, LimitMEMLOCK=infinity in the \
         service, or `memlock` in /etc/security/limits.conf)"
    )]
    Pin {
        /// The device.
        device: String,
        /// Bytes that were to be pinned.
        len: usize,
        /// Bytes pinned before.
        mapped: usize,
        /// The process's limit.
        memlock: Memlock,
        /// What the kernel said.
        source: io::Error,
    },
    /// The device's transport has no room for another mapping.
    #[error(
        "{device}: no more DMA mappings ({used} used, at most {limit}); set vfio_iommu_type1's \
         dma_entry_limit higher, or let the arena use larger regions (ArenaOptions::region_min)"
    )]
    NoMappings {
        /// The device.
        device: String,
        /// Mappings in use.
        used: usize,
        /// The limit.
        limit: usize,
    },
    /// No hole of the device's address windows is large enough.
    #[error("{device}: no free I/O address range of {len} bytes in its windows {windows}")]
    NoIova {
        /// The device.
        device: String,
        /// Bytes wanted.
        len: usize,
        /// The windows, for the reader.
        windows: String,
    },
    /// The transport could not map the region, for a reason of its own.
    #[error("{device}: mapping {len} bytes for DMA: {reason}")]
    Map {
        /// The device.
        device: String,
        /// Bytes concerned.
        len: usize,
        /// The transport's reason and remedy.
        reason: String,
    },
    /// Physical addresses are not to be had.
    #[error("physical addresses for DMA without an IOMMU: {0}")]
    Physical(String),
    /// The arena is in use already, so its options are fixed.
    #[error("DMA memory is in use already; configure it before the first buffer or device")]
    AlreadyInUse,
}
