//! System calls of VFIO (Linux `include/uapi/linux/vfio.h`).
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use vfio_bindings::bindings::vfio as api;
use vfio_ioctls::{VfioContainer, VfioError};

use super::info::{IommuInfo, RegionInfo, iommu_info_len, region_info_len, u32_at};
use crate::dma::Region;

/// Returns the ioctl number `_IO(VFIO_TYPE, VFIO_BASE + n)`.
const fn request(n: u32) -> libc::c_ulong {
    ((api::VFIO_TYPE as u32) << 8 | (api::VFIO_BASE + n)) as libc::c_ulong
}

const SET_IOMMU: libc::c_ulong = request(2);
const GROUP_GET_STATUS: libc::c_ulong = request(3);
const GROUP_SET_CONTAINER: libc::c_ulong = request(4);
const GROUP_GET_DEVICE_FD: libc::c_ulong = request(6);
const DEVICE_GET_INFO: libc::c_ulong = request(7);
const DEVICE_GET_REGION_INFO: libc::c_ulong = request(8);
const DEVICE_GET_IRQ_INFO: libc::c_ulong = request(9);
const DEVICE_SET_IRQS: libc::c_ulong = request(10);
const DEVICE_RESET: libc::c_ulong = request(11);
const IOMMU_GET_INFO: libc::c_ulong = request(12);

/// Longest structure to accept. No structure of these calls comes near it.
const MAX_INFO: usize = 64 << 10;

/// # Safety
/// `argument` must be what `request` wants: a pointer to a structure that is valid for what the
/// kernel reads and writes, or a number.
unsafe fn ioctl(
    fd: RawFd,
    request: libc::c_ulong,
    argument: libc::c_ulong,
) -> io::Result<libc::c_int> {
    // SAFETY: the caller vouches for the argument; a descriptor of the wrong kind is an error.
    let result = unsafe { libc::ioctl(fd, request, argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Makes a call with a structure that begins with its own length (`argsz`), to which the kernel
/// writes the length that it needs.
fn sized_info(fd: RawFd, nr: libc::c_ulong, head: &[u32], fixed_len: usize) -> io::Result<Vec<u8>> {
    let mut len = fixed_len;
    loop {
        let mut words = vec![0u64; len.div_ceil(8)];
        let mut start = vec![u32::try_from(len).map_err(|_| io::ErrorKind::InvalidData)?];
        start.extend_from_slice(head);
        for (n, pair) in start.chunks(2).enumerate() {
            let low = u64::from(pair[0]);
            let high = u64::from(pair.get(1).copied().unwrap_or(0));
            words[n] = if cfg!(target_endian = "little") {
                low | high << 32
            } else {
                low << 32 | high
            };
        }
        // SAFETY: `words` is 8-aligned and holds `len` bytes, which is what argsz says; the
        // kernel reads and writes no further.
        unsafe { ioctl(fd, nr, words.as_mut_ptr().addr() as libc::c_ulong) }?;
        let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        bytes.truncate(len);
        let wanted = u32_at(&bytes, 0)
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(0);
        if wanted <= len {
            return Ok(bytes);
        }
        if wanted > MAX_INFO {
            return Err(io::ErrorKind::InvalidData.into());
        }
        len = wanted;
    }
}

fn malformed() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's answer is malformed",
    )
}

/// Returns the abilities of the container's IOMMU.
pub(super) fn iommu_info(container: &impl AsRawFd) -> io::Result<IommuInfo> {
    let bytes = sized_info(
        container.as_raw_fd(),
        IOMMU_GET_INFO,
        &[0],
        iommu_info_len(),
    )?;
    IommuInfo::parse(&bytes).ok_or_else(malformed)
}

/// Whether the function has a reset.
pub(super) fn can_reset(device: BorrowedFd<'_>) -> io::Result<bool> {
    let bytes = sized_info(device.as_raw_fd(), DEVICE_GET_INFO, &[0], 16)?;
    let flags = u32_at(&bytes, 4).ok_or_else(malformed)?;
    Ok(flags & api::VFIO_DEVICE_FLAGS_RESET != 0)
}

/// Returns the description of one region.
pub(super) fn region_info(device: BorrowedFd<'_>, index: u32) -> io::Result<RegionInfo> {
    let bytes = sized_info(
        device.as_raw_fd(),
        DEVICE_GET_REGION_INFO,
        &[0, index],
        region_info_len(),
    )?;
    RegionInfo::parse(&bytes).ok_or_else(malformed)
}

/// Returns the number of interrupts of a kind.
pub(super) fn irq_count(device: BorrowedFd<'_>, index: u32) -> io::Result<u32> {
    let bytes = sized_info(device.as_raw_fd(), DEVICE_GET_IRQ_INFO, &[0, index], 16)?;
    u32_at(&bytes, 12).ok_or_else(malformed)
}

/// Connects interrupts of a kind, from `start` on, to these eventfds, or to none where there is
/// `None`. Without any entry, the kind is switched off.
pub(super) fn set_irqs(
    device: BorrowedFd<'_>,
    index: u32,
    start: u32,
    events: &[Option<BorrowedFd<'_>>],
) -> io::Result<()> {
    let count = u32::try_from(events.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let data = if events.is_empty() {
        api::VFIO_IRQ_SET_DATA_NONE
    } else {
        api::VFIO_IRQ_SET_DATA_EVENTFD
    };
    let argsz = 20 + 4 * count;
    // The words are argsz, flags, index, start and count; then come the descriptors.
    let mut words = vec![
        argsz,
        data | api::VFIO_IRQ_SET_ACTION_TRIGGER,
        index,
        start,
        count,
    ];
    let fd = |event: &Option<BorrowedFd<'_>>| event.map_or(-1, |e| e.as_raw_fd());
    words.extend(events.iter().map(|event| fd(event).cast_unsigned()));
    // SAFETY: `words` holds the argsz bytes that the kernel reads; descriptors are borrowed for
    // the call and the kernel takes references of its own.
    let missing = unsafe {
        ioctl(
            device.as_raw_fd(),
            DEVICE_SET_IRQS,
            words.as_ptr().addr() as libc::c_ulong,
        )
    }?;
    // A positive answer is the number of vectors that would be available; none is enabled (Linux
    // vfio_msi_enable).
    if missing > 0 {
        return Err(io::Error::from_raw_os_error(libc::ENOSPC));
    }
    Ok(())
}

/// Resets the function.
pub(super) fn reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the call has no argument.
    unsafe { ioctl(device.as_raw_fd(), DEVICE_RESET, 0) }?;
    Ok(())
}

/// The container type `VFIO_TYPE1v2_IOMMU`.
pub(super) const TYPE1V2: u32 = api::VFIO_TYPE1v2_IOMMU;
/// The container type `VFIO_NOIOMMU_IOMMU`.
pub(super) const NO_IOMMU: u32 = api::VFIO_NOIOMMU_IOMMU;

/// The step from a group to a device that failed.
#[derive(Debug)]
pub(super) enum OpenError {
    /// A function of the group is bound to another driver.
    NotViable,
    /// The named call failed.
    Step(&'static str, io::Error),
}

/// Puts the group into the container and lets an IOMMU of this kind translate for it. Called once
/// for each opening of the group.
pub(super) fn join_container(
    container: &impl AsRawFd,
    iommu: u32,
    group: &File,
) -> Result<(), OpenError> {
    let step = |name| move |e| OpenError::Step(name, e);
    let (container, group) = (container.as_raw_fd(), group.as_raw_fd());
    let status =
        sized_info(group, GROUP_GET_STATUS, &[0], 8).map_err(step("VFIO_GROUP_GET_STATUS"))?;
    if u32_at(&status, 4).unwrap_or(0) & api::VFIO_GROUP_FLAGS_VIABLE == 0 {
        return Err(OpenError::NotViable);
    }
    // SAFETY: the argument points to a descriptor's number.
    unsafe {
        ioctl(
            group,
            GROUP_SET_CONTAINER,
            std::ptr::from_ref(&container).addr() as libc::c_ulong,
        )
    }
    .map_err(step("VFIO_GROUP_SET_CONTAINER"))?;
    // SAFETY: a number as the argument.
    unsafe { ioctl(container, SET_IOMMU, libc::c_ulong::from(iommu)) }
        .map_err(step("VFIO_SET_IOMMU"))?;
    Ok(())
}

/// Opens a function of a group that is in a container.
pub(super) fn open_device(group: &File, address: &str) -> Result<OwnedFd, OpenError> {
    let name = CString::new(address).map_err(|e| OpenError::Step("address", e.into()))?;
    // SAFETY: the argument points to a NUL-terminated string.
    let device = unsafe {
        ioctl(
            group.as_raw_fd(),
            GROUP_GET_DEVICE_FD,
            name.as_ptr().addr() as libc::c_ulong,
        )
    }
    .map_err(|e| OpenError::Step("VFIO_GROUP_GET_DEVICE_FD", e))?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(device) })
}

/// Maps a region of the arena at `iova`.
pub(super) fn map(container: &VfioContainer, region: &Region, iova: u64) -> Result<(), VfioError> {
    let base = region.ptr(0).as_ptr();
    // SAFETY: the region's memory is mapped for the life of the process, and what is in it is
    // accessed by its buffers' owners only while no command of a device names it, or as atomics.
    unsafe { container.vfio_dma_map(iova, region.len(), base) }
}
