//! Reads and rewrites the super block so that a power cut leaves the old one or the new one, also
//! on a device that writes only 512 bytes atomically.
//!
//! All fields are in the first 512 bytes of the page and its checksum is in the last four, so a
//! torn rewrite has the fields of one state and the checksum of the other. A rewrite of `clean`
//! alone is recognised as such ([`SuperBlock::decode`]). Any other is written twice: first as a
//! copy where the page mask begins, whose content means nothing in a store that is not clean, then
//! in place. A load that finds the super block torn takes the copy if one of its ends fits.

use pumice_bdev::{DeviceInfo, DmaSlice, Op};
use zerocopy::FromBytes;

use super::commit::{Failure, Restore};
use super::error::Error;
use super::format::{
    PAGE_SIZE, PAGE_SIZE_U64, Page, RawSuperBlock, SuperBlock, page_crc, stored_crc,
};
use super::geometry::Geometry;
use super::mdio::{MdIo, dma};
use super::retry::{may_land, repeat};

/// Least number of bytes that a device writes atomically.
const SECTOR: usize = 512;
/// The page where the page mask begins in every store that Pumice or SPDK makes.
const FIRST_MASK_PAGE: u32 = 1;

/// The super block that a load found.
pub(crate) struct Found {
    pub sb: SuperBlock,
    /// Whether it is torn on the device, and this is the copy.
    pub torn: bool,
}

/// Fails if the device is too small for a super block.
pub(crate) fn check_size(info: &DeviceInfo) -> Result<(), Error> {
    if info.len_bytes() < PAGE_SIZE_U64 {
        let reason = format!(
            "a device of {} bytes is too small for a blobstore",
            info.len_bytes()
        );
        return Err(Error::Geometry {
            device: info.name.clone(),
            reason,
        });
    }
    Ok(())
}

/// Reads the super block. Writes nothing.
///
/// # Errors
/// Fails if there is none that can be used, and when the device fails.
pub(crate) fn read(io: &mut MdIo, info: &DeviceInfo) -> Result<Found, Error> {
    let page = read_page(io, info, 0)?;
    let source = match SuperBlock::decode(&page) {
        Ok(sb) => return Ok(Found { sb, torn: false }),
        Err(source) => source,
    };
    for at in copy_places(&page) {
        let inside = (u64::from(at) + 1) * PAGE_SIZE_U64 <= info.len_bytes();
        let Some(copy) = inside.then(|| read_page(io, info, at)).transpose()? else {
            continue;
        };
        let end = PAGE_SIZE - SECTOR;
        let fits = page[..SECTOR] == copy[..SECTOR] || page[end..] == copy[end..];
        // A mask, or anything else, does not have the checksum of a page.
        if fits
            && stored_crc(&copy) == page_crc(&copy)
            && let Ok(mut sb) = SuperBlock::decode(&copy)
        {
            tracing::warn!(
                device = info.name,
                "super block: torn while it was changed; its copy is used"
            );
            sb.clean = 0.into();
            return Ok(Found { sb, torn: true });
        }
    }
    Err(Error::SuperBlock {
        device: info.name.clone(),
        source,
    })
}

/// Returns the pages where the copy of a torn super block may be.
fn copy_places(page: &Page) -> impl Iterator<Item = u32> + use<> {
    let named = RawSuperBlock::read_from_bytes(page).map(|raw| raw.used_page_mask_start.get());
    let named = named.ok().filter(|at| *at > FIRST_MASK_PAGE);
    named.into_iter().chain([FIRST_MASK_PAGE])
}

fn read_page(io: &mut MdIo, info: &DeviceInfo, at: u32) -> Result<Page, Error> {
    let block = u64::from(info.block_size);
    let len = PAGE_SIZE.max(info.block_size as usize);
    let buf = io.read(u64::from(at) * PAGE_SIZE_U64 / block, len)?;
    Ok(buf[..PAGE_SIZE].try_into().expect("a page"))
}

/// Writes `new` as the super block, marked as not unloaded in order.
///
/// # Errors
/// [`Failure::TakenBack`] means that the device has the old one, but perhaps with that mark.
pub(crate) fn write(io: &mut MdIo, geo: &Geometry, new: &SuperBlock) -> Result<(), Failure> {
    let mut sb = new.clone();
    sb.clean = 0.into();
    let new = sb.encode();
    let buf = io.read(0, PAGE_SIZE)?;
    let mut old: Page = buf[..].try_into().expect("a page");
    if old == new {
        return Ok(());
    }
    let mut places = vec![sb.used_page_mask_start.get()];
    if let Ok(mut before) = SuperBlock::decode(&old) {
        if before.is_clean() {
            // The masks mean nothing from here on. This write may be torn: see the module.
            before.clean = 0.into();
            old = before.encode();
            put(io, geo, 0, &dma(&old)?)?;
        }
        places.push(before.used_page_mask_start.get());
        places.dedup();
    }
    let (old, new, blank) = (dma(&old)?, dma(&new)?, dma(&[0; PAGE_SIZE])?);
    for at in &places {
        put(io, geo, *at, &new)?;
    }
    let Err(error) = put(io, geo, 0, &new) else {
        return Ok(());
    };
    let restore = if may_land(&error) {
        None
    } else if restore(io, geo, &old).is_err() {
        Some(Restore::SuperBlock(old))
    } else {
        // A copy is only used beside a torn super block that it fits, but it is better to have
        // none.
        for at in places {
            if let Err(error) = put(io, geo, at, &blank) {
                tracing::warn!(%error, "the copy of a super block that was not written stays");
            }
        }
        return Err(Failure::TakenBack(error));
    };
    tracing::error!(%error, "the super block could not be written");
    Err(Failure::Open { error, restore })
}

/// Writes this page as the super block.
///
/// # Errors
/// Fails when the device does.
pub(crate) fn restore(io: &mut MdIo, geo: &Geometry, old: &DmaSlice) -> Result<(), Error> {
    let found = io.read(0, PAGE_SIZE);
    if found.is_ok_and(|found| found[..] == old[..]) {
        return Ok(());
    }
    put(io, geo, 0, old)
}

/// Writes a super block or its copy durably, several times if necessary.
fn put(io: &mut MdIo, geo: &Geometry, at: u32, page: &DmaSlice) -> Result<(), Error> {
    repeat(|| {
        let write = Op::Write {
            lba: geo.page_lba(at.into()),
            data: page.clone(),
            fua: false,
        };
        io.run_durable(vec![write])
    })
}
