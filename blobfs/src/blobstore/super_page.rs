//! Reading and rewriting the super block so that a power cut leaves the old one or the new one, also on a device
//! that writes no more than 512 bytes whole.
//!
//! All its fields lie in the first 512 bytes and its checksum in the last four of the page: a torn rewrite has the
//! fields of one state and the checksum of the other. A rewrite of `clean` alone is recognised as such
//! ([`SuperBlock::decode`]). Any other is written twice: first as a copy where the page mask begins, whose
//! contents mean nothing in a store that is not clean, then in its place. A load that finds the super block torn
//! takes the copy, if one of its ends fits.

use pumice_bdev::{DeviceInfo, Op};
use zerocopy::FromBytes;

use super::commit::in_place::{may_land, repeat};
use super::commit::{Failure, Restore};
use super::error::Error;
use super::format::{
    PAGE_SIZE, PAGE_SIZE_U64, Page, RawSuperBlock, SuperBlock, page_crc, stored_crc,
};
use super::geometry::Geometry;
use super::mdio::{MdIo, dma};

/// What the device writes whole at least.
const SECTOR: usize = 512;
/// Where the page mask begins in every store that Pumice or SPDK makes.
const FIRST_MASK_PAGE: u32 = 1;

/// A super block as a load finds it.
pub(crate) struct Found {
    pub sb: SuperBlock,
    /// It is torn on the device, and this is the copy.
    pub torn: bool,
}

/// Reads the super block. Writes nothing.
///
/// # Errors
/// There is none, or none that can be used; the device fails.
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
        // A mask, or anything else, has not the checksum of a page.
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

/// Where the copy of a torn super block may be.
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

/// Makes `new` the super block on the device, marked as not unloaded in order.
///
/// # Errors
/// [`Failure::TakenBack`]: the device has the old one, but perhaps with that mark.
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
            // From here on the masks mean nothing. This may be torn: see the module.
            before.clean = 0.into();
            old = before.encode();
            put(io, geo, 0, &old)?;
        }
        places.push(before.used_page_mask_start.get());
        places.dedup();
    }
    for at in &places {
        put(io, geo, *at, &new)?;
    }
    let Err(error) = put(io, geo, 0, &new) else {
        return Ok(());
    };
    let restore = if may_land(&error) {
        None
    } else if restore(io, geo, &old).is_err() {
        Some(Restore::SuperBlock(Box::new(old)))
    } else {
        // A copy is looked at only beside a torn super block that it fits; better without.
        let blank = [0; PAGE_SIZE];
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

/// Makes the super block on the device this one.
///
/// # Errors
/// The device fails.
pub(crate) fn restore(io: &mut MdIo, geo: &Geometry, old: &Page) -> Result<(), Error> {
    let found = io.read(0, PAGE_SIZE);
    if found.is_ok_and(|found| found[..] == old[..]) {
        return Ok(());
    }
    put(io, geo, 0, old)
}

/// Writes a page of this module's durably, some times if need be.
fn put(io: &mut MdIo, geo: &Geometry, at: u32, page: &Page) -> Result<(), Error> {
    repeat(|| {
        let write = Op::Write {
            lba: geo.page_lba(at.into()),
            data: dma(page)?,
            fua: false,
        };
        io.run_durable(vec![write])
    })
}
