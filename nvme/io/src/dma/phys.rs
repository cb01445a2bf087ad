//! Physical addresses, for devices without an IOMMU.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::error::DmaError;
use super::region::{CHUNK_LEN, Region};

/// Returns the physical address of each 2 MiB chunk of a huge-page region, in order, from
/// `/proc/self/pagemap` (Linux `Documentation/admin-guide/mm/pagemap.rst`).
///
/// The caller makes sure that the pages are present (a first access populates huge pages of a
/// memfd, see [`Region`]). Needs CAP_SYS_ADMIN, without which the kernel shows zeroes. Blocks for a
/// few file reads.
pub fn physical_chunks(region: &Region) -> Result<Vec<u64>, DmaError> {
    const PAGE: u64 = 4096;
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    if !region.is_huge() {
        return Err(DmaError::Physical(
            "the DMA memory is ordinary pages, which the kernel may move; reserve huge pages \
             (echo 64 > /proc/sys/vm/nr_hugepages) and set ArenaOptions::huge = Always"
                .into(),
        ));
    }
    region.touch();
    let map = File::open("/proc/self/pagemap")
        .map_err(|e| DmaError::Physical(format!("/proc/self/pagemap: {e}")))?;
    let mut chunks = Vec::with_capacity(region.len() / CHUNK_LEN);
    for n in 0..region.len() / CHUNK_LEN {
        let virt = (region.address() + n * CHUNK_LEN) as u64;
        let mut entry = [0u8; 8];
        map.read_exact_at(&mut entry, virt / PAGE * 8)
            .map_err(|e| DmaError::Physical(format!("/proc/self/pagemap: {e}")))?;
        let entry = u64::from_le_bytes(entry);
        if entry & PRESENT == 0 {
            return Err(DmaError::Physical(format!(
                "page at {virt:#x} is not in memory"
            )));
        }
        let frame = entry & FRAME;
        if frame == 0 {
            return Err(DmaError::Physical(
                "the kernel hides page frame numbers from this process; run it as root or with \
                 CAP_SYS_ADMIN"
                    .into(),
            ));
        }
        chunks.push(frame * PAGE);
    }
    Ok(chunks)
}
