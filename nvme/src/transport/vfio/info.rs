//! The kernel's descriptions of an IOMMU, a region and an interrupt: structures with chained
//! capabilities (Linux `include/uapi/linux/vfio.h`, `struct vfio_info_cap_header`), read as bytes.

use std::ops::RangeInclusive;

use vfio_bindings::bindings::vfio as api;

/// Length of `struct vfio_iommu_type1_info`: argsz, flags, iova_pgsizes, cap_offset, pad.
const IOMMU_INFO_LEN: usize = 24;
const IOMMU_CAP_OFFSET: usize = 16;
/// Length of `struct vfio_region_info`: argsz, flags, index, cap_offset, size, offset.
const REGION_INFO_LEN: usize = 32;
const REGION_CAP_OFFSET: usize = 12;
/// The flag `VFIO_IOMMU_INFO_CAPS`.
const IOMMU_INFO_CAPS: u32 = 1 << 1;

/// Returns the 32-bit field at a byte of a structure, or `None` behind its end.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let part = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(part.try_into().ok()?))
}

/// Returns the 64-bit field at a byte of a structure, or `None` behind its end.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let part = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_ne_bytes(part.try_into().ok()?))
}

/// A capability: its identifier and its bytes from the header on.
struct Cap<'a> {
    id: u32,
    bytes: &'a [u8],
}

/// Walks the chain from `first`, whose offsets count from the start of the structure. A chain that
/// leaves the structure or loops ends there.
fn capabilities(info: &[u8], first: u32) -> impl Iterator<Item = Cap<'_>> {
    let mut next = first;
    let mut left = info.len() / 8;
    std::iter::from_fn(move || {
        if next == 0 || left == 0 {
            return None;
        }
        left -= 1;
        let bytes = info.get(usize::try_from(next).ok()?..)?;
        let id = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
        next = u32_at(bytes, 4)?;
        Some(Cap {
            id: u32::from(id),
            bytes,
        })
    })
}

/// The abilities of a TYPE1 IOMMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IommuInfo {
    /// The I/O addresses that may be used.
    pub windows: Vec<RangeInclusive<u64>>,
    /// Number of mappings that are still available, where the kernel reports it (from 5.10).
    pub mappings_left: Option<u32>,
}

impl IommuInfo {
    /// Reads the answer of `VFIO_IOMMU_GET_INFO`.
    pub(crate) fn parse(info: &[u8]) -> Option<IommuInfo> {
        let flags = u32_at(info, 4)?;
        let mut windows = Vec::new();
        let mut mappings_left = None;
        if flags & IOMMU_INFO_CAPS != 0 {
            for cap in capabilities(info, u32_at(info, IOMMU_CAP_OFFSET)?) {
                match cap.id {
                    api::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => windows = ranges(cap.bytes)?,
                    api::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => mappings_left = u32_at(cap.bytes, 8),
                    _ => {}
                }
            }
        }
        if windows.is_empty() {
            // Kernels before 5.4 do not report them. Every IOMMU has 39 bits. The MSI window may be
            // below 4 GiB, so the addresses above are used.
            windows.push((4 << 30)..=((1 << 39) - 1));
        }
        Some(IommuInfo {
            windows,
            mappings_left,
        })
    }
}

/// Reads `struct vfio_iommu_type1_info_cap_iova_range`: header, count, reserved, (start, end)…
fn ranges(cap: &[u8]) -> Option<Vec<RangeInclusive<u64>>> {
    let count = usize::try_from(u32_at(cap, 8)?).ok()?;
    let entries = cap.get(16..)?.chunks_exact(16).take(count);
    let mut found = Vec::new();
    for entry in entries {
        let (start, end) = (u64_at(entry, 0)?, u64_at(entry, 8)?);
        if start <= end {
            found.push(start..=end);
        }
    }
    Some(found)
}

/// One region of a device: a BAR or configuration space.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RegionInfo {
    pub flags: u32,
    /// Size in bytes; zero where the region does not exist.
    pub size: u64,
    /// Offset of the region in the device's descriptor.
    pub offset: u64,
    /// The parts that may be mapped: offset inside the region and length.
    pub mappable: Vec<(u64, u64)>,
}

impl RegionInfo {
    /// Reads the answer of `VFIO_DEVICE_GET_REGION_INFO` (or of vfio-user, which is the same).
    pub(crate) fn parse(info: &[u8]) -> Option<RegionInfo> {
        let flags = u32_at(info, 4)?;
        let size = u64_at(info, 16)?;
        let mut region = RegionInfo {
            flags,
            size,
            offset: u64_at(info, 24)?,
            mappable: Vec::new(),
        };
        if flags & api::VFIO_REGION_INFO_FLAG_MMAP == 0 {
            return Some(region);
        }
        let mut sparse = None;
        if flags & api::VFIO_REGION_INFO_FLAG_CAPS != 0 {
            sparse = capabilities(info, u32_at(info, REGION_CAP_OFFSET)?)
                .find(|cap| cap.id == api::VFIO_REGION_INFO_CAP_SPARSE_MMAP)
                .map(|cap| cap.bytes);
        }
        match sparse {
            None => region.mappable.push((0, size)),
            // Header, count, reserved, then (offset, size)….
            Some(cap) => {
                let count = usize::try_from(u32_at(cap, 8)?).ok()?;
                for area in cap.get(16..)?.chunks_exact(16).take(count) {
                    let (at, len) = (u64_at(area, 0)?, u64_at(area, 8)?);
                    if len > 0 && at.checked_add(len).is_some_and(|end| end <= size) {
                        region.mappable.push((at, len));
                    }
                }
            }
        }
        Some(region)
    }

    /// Whether `[offset, offset + len)` may be mapped in one call.
    pub(crate) fn can_map(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| {
            self.mappable
                .iter()
                .any(|(at, n)| *at <= offset && end <= at + n)
        })
    }
}

/// Length of the fixed part of a region's structure.
pub(crate) const fn region_info_len() -> usize {
    REGION_INFO_LEN
}

/// Length of the fixed part of an IOMMU's structure.
pub(crate) const fn iommu_info_len() -> usize {
    IOMMU_INFO_LEN
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn put32(bytes: &mut Vec<u8>, values: &[u32]) {
        for v in values {
            bytes.extend_from_slice(&v.to_ne_bytes());
        }
    }

    fn put64(bytes: &mut Vec<u8>, values: &[u64]) {
        for v in values {
            bytes.extend_from_slice(&v.to_ne_bytes());
        }
    }

    #[test]
    fn windows_and_limit() {
        let mut info = Vec::new();
        put32(&mut info, &[88, 3]);
        put64(&mut info, &[0x1000]);
        put32(&mut info, &[24, 0]);
        // DMA_AVAIL, then IOVA_RANGE with two entries.
        put32(&mut info, &[(1 << 16) | 3, 40, 65535, 0]);
        put32(&mut info, &[(1 << 16) | 1, 0, 2, 0]);
        put64(&mut info, &[0, 0xfedf_ffff, 0xfef0_0000, 0x7f_ffff_ffff]);
        let parsed = IommuInfo::parse(&info).expect("whole");
        assert_eq!(
            parsed.windows,
            [0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff]
        );
        assert_eq!(parsed.mappings_left, Some(65535));
        assert_eq!(IommuInfo::parse(&info[..10]), None);
    }

    #[test]
    fn an_old_kernel_tells_nothing() {
        let mut info = Vec::new();
        put32(&mut info, &[24, 1]);
        put64(&mut info, &[0x1000, 0]);
        let parsed = IommuInfo::parse(&info).expect("whole");
        assert_eq!(parsed.windows, [0x1_0000_0000..=0x7f_ffff_ffff]);
    }

    fn region(flags: u32) -> Vec<u8> {
        let mut info = Vec::new();
        put32(&mut info, &[64, flags, 0, 32]);
        put64(&mut info, &[0x2000, 1 << 40]);
        info
    }

    #[test]
    fn sparse_areas() {
        let mut info = region(0xf);
        // Another capability comes before the wanted one.
        put32(&mut info, &[(1 << 16) | 3, 40]);
        put32(&mut info, &[(1 << 16) | 1, 0, 2, 0]);
        put64(&mut info, &[0x1000, 0x1000, 0x1800, u64::MAX]);
        let parsed = RegionInfo::parse(&info).expect("whole");
        assert_eq!(parsed.mappable, [(0x1000, 0x1000)]);
        assert!(parsed.can_map(0x1000, 0x1000) && !parsed.can_map(0, 0x1000));
        // An access behind the end of a mapped part is a bus error.
        assert!(parsed.can_map(0x1800, 0x800) && !parsed.can_map(0x1800, 0x801));
        assert!(!parsed.can_map(u64::MAX, 2));
        assert_eq!(
            RegionInfo::parse(&region(0x7)).expect("whole").mappable,
            [(0, 0x2000)]
        );
        assert!(
            RegionInfo::parse(&region(0x3))
                .expect("whole")
                .mappable
                .is_empty()
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200), cap in 0u32..220) {
            let mut bytes = bytes;
            for at in [REGION_CAP_OFFSET, IOMMU_CAP_OFFSET] {
                if bytes.len() >= at + 4 {
                    bytes[at..at + 4].copy_from_slice(&cap.to_ne_bytes());
                    bytes[4] |= 0xf;
                }
            }
            if let Some(info) = IommuInfo::parse(&bytes) {
                prop_assert!(info.windows.iter().all(|w| w.start() <= w.end()));
            }
            if let Some(region) = RegionInfo::parse(&bytes) {
                let inside = |(at, len): &(u64, u64)| at.checked_add(*len).is_some_and(|e| e <= region.size);
                prop_assert!(region.mappable.iter().all(inside));
            }
        }
    }
}
