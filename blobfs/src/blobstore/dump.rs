//! The content of a device, page by page, for people who inspect a store. It trusts nothing and
//! writes nothing.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use pumice_bdev::{BlockDevice, DmaBuf, Op};
use zerocopy::FromBytes;

use super::alloc::iter_words;
use super::error::Error;
use super::format::{
    BlobId, MaskKind, PAGE_SIZE, PAGE_SIZE_U64, Page, RawSuperBlock, SuperBlock, decode_mask,
    mask_pages, seal,
};
use super::geometry::Geometry;
use super::journal::format::RingPlace;
use super::journal::recovery::fits;
pub use super::journal::walk::FoundBatch;
use super::journal::walk::{OnDevice, Walked, walk};
use super::mdio::MdIo;
use super::super_page;

/// Number of pages read at once.
const READ_PAGES: u32 = 256;

/// A reader of a device's content.
#[derive(Debug)]
pub struct Dump {
    io: MdIo,
    raw: Box<RawSuperBlock>,
    geo: Option<Geometry>,
    problem: Option<String>,
    place: Option<RingPlace>,
    guarded: bool,
    /// Pages that are read as the journal has them.
    replayed: BTreeMap<u32, Arc<Page>>,
}

/// Bytes that the journal has for a blob, and that are not in the blob's own clusters.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CarriedBytes {
    /// The blob.
    pub blob: BlobId,
    /// The byte of the blob where they begin.
    pub offset: u64,
    /// The bytes.
    pub bytes: Arc<[u8]>,
}

/// The journal as it is on disk.
#[derive(Debug)]
#[non_exhaustive]
pub struct JournalDump {
    /// The blob that holds it.
    pub blob: BlobId,
    /// Bytes of its file.
    pub len: u64,
    /// Whether a load puts in place what it holds. Otherwise everything is there.
    pub counts: bool,
    /// The epoch of the header that counts, or `None` if no header can be used.
    pub epoch: Option<u64>,
    /// The batches of that epoch from the header's tail on.
    pub batches: Vec<FoundBatch>,
    /// The damage, if there is some.
    pub damage: Option<String>,
}

/// A mask as it is on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MaskDump {
    /// "metadata pages", "clusters" or "blob ids".
    pub name: &'static str,
    /// First page on the device.
    pub start: u32,
    /// Number of pages.
    pub len: u32,
    /// The bits that are set, as ranges, or the reason why this is not a mask.
    pub used: Result<Vec<Range<u32>>, String>,
}

impl Dump {
    /// Reads the super block.
    ///
    /// # Errors
    /// Fails when the device cannot be read, or has not even one page.
    pub fn open(dev: &Arc<dyn BlockDevice>) -> Result<Dump, Error> {
        let info = dev.info();
        let mut io = MdIo::new(dev, Arc::default())?;
        super_page::check_size(info)?;
        let buf = io.read(0, PAGE_SIZE.max(info.block_size as usize))?;
        let page: &Page = buf[..PAGE_SIZE].try_into().expect("a page");
        let raw = Box::new(RawSuperBlock::read_from_bytes(page).expect("sizes are equal"));
        let (sb, mut problem) = match SuperBlock::decode(page) {
            Ok(sb) => (Some(sb), None),
            Err(error) => {
                // If only the checksum is wrong, the positions may still lead to the content.
                let mut sealed = *page;
                seal(&mut sealed);
                (SuperBlock::decode(&sealed).ok(), Some(error.to_string()))
            }
        };
        let geo = sb.as_ref().and_then(|sb| {
            let geo = Geometry::new(sb, info).map_err(|error| error.to_string());
            match geo {
                Ok(geo) => Some(geo),
                Err(error) => {
                    problem.get_or_insert(error);
                    None
                }
            }
        });
        let place = sb.as_ref().map_or(Ok(None), RingPlace::read);
        let place = place.unwrap_or_else(|reason| {
            problem.get_or_insert(format!("the place of the journal: {reason}"));
            None
        });
        Ok(Dump {
            io,
            raw,
            guarded: sb.as_ref().is_some_and(SuperBlock::is_guarded),
            place,
            geo,
            problem,
            replayed: BTreeMap::new(),
        })
    }

    /// The super block, whether it is valid or not.
    #[must_use]
    pub fn super_block(&self) -> &RawSuperBlock {
        &self.raw
    }

    /// The reason why the super block cannot be used. If only its checksum is wrong, masks and
    /// pages can still be read.
    #[must_use]
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Reads the journal; `None` if the super block does not have its place.
    pub fn journal(&mut self) -> Option<JournalDump> {
        let (blob, len, walked) = self.walked()?;
        Some(JournalDump {
            blob,
            len,
            counts: self.guarded,
            epoch: walked.header.map(|(header, _)| header.epoch),
            batches: walked.batches,
            damage: walked.damage,
        })
    }

    /// Reads the journal of a store that was not unloaded in order. From then on [`Dump::pages`] shows the pages that it has in
    /// place of those on the device, as a load would. Returns the bytes of blobs that it has, in their order, and the blob that
    /// holds it. Damage ends it.
    pub fn replay(&mut self) -> (Vec<CarriedBytes>, Option<BlobId>) {
        let Some((blob, _, walked)) = self.walked() else {
            return (Vec::new(), None);
        };
        if !self.guarded {
            return (Vec::new(), Some(blob));
        }
        self.replayed = walked.pages;
        let carried = walked.carried.into_iter().map(|carried| CarriedBytes {
            blob: carried.blob,
            offset: carried.offset,
            bytes: carried.bytes,
        });
        (carried.collect(), Some(blob))
    }

    /// Reads the ring, if the super block has its place. Returns the blob that holds it too, and the bytes of its file.
    fn walked(&mut self) -> Option<(BlobId, u64, Walked)> {
        let (geo, place) = (self.geo.as_ref()?, self.place.as_ref()?);
        if !fits(place, geo) {
            return None;
        }
        let mut file = OnDevice::new(&mut self.io, geo.cluster_lba(place.cluster), place.len);
        let walked = walk(&mut file, place.blob, place.len);
        Some((place.blob, place.len, walked))
    }

    /// Reads the masks; none if the super block does not have their positions.
    ///
    /// # Errors
    /// Fails when the device cannot be read.
    pub fn masks(&mut self) -> Result<Vec<MaskDump>, Error> {
        let Some(geo) = self.geo.clone() else {
            return Ok(Vec::new());
        };
        let raw = &self.raw;
        let places = [
            (
                "metadata pages",
                MaskKind::Pages,
                raw.used_page_mask_start.get(),
                raw.used_page_mask_len.get(),
            ),
            (
                "clusters",
                MaskKind::Clusters,
                raw.used_cluster_mask_start.get(),
                raw.used_cluster_mask_len.get(),
            ),
            (
                "blob ids",
                MaskKind::BlobIds,
                raw.used_blobid_mask_start.get(),
                raw.used_blobid_mask_len.get(),
            ),
        ];
        let mut masks = Vec::new();
        for (name, kind, start, len) in places {
            let bits = if kind == MaskKind::Clusters {
                geo.total_clusters
            } else {
                geo.md_len
            };
            let mut bytes = Vec::new();
            let needed = mask_pages(bits.into()).min(len.into());
            for page in 0..needed {
                bytes.extend_from_slice(
                    &self
                        .io
                        .read(geo.page_lba(u64::from(start) + page), PAGE_SIZE)?,
                );
            }
            let used = if len == 0 {
                Err("absent".to_owned())
            } else {
                Ok(())
            };
            let used = used
                .and_then(|()| decode_mask(&bytes, kind, bits).map_err(|error| error.to_string()));
            masks.push(MaskDump {
                name,
                start,
                len,
                used: used.map(|words| to_ranges(iter_words(&words))),
            });
        }
        Ok(masks)
    }

    /// Calls `page` with every metadata page that is not all zero, and its index.
    ///
    /// # Errors
    /// Fails when the device cannot be read.
    pub fn pages(&mut self, mut page: impl FnMut(u32, &Page)) -> Result<(), Error> {
        let Some(geo) = self.geo.clone() else {
            return Ok(());
        };
        let per_read =
            u32::try_from(self.io.can().max_io_blocks() * geo.block_size / PAGE_SIZE_U64)
                .unwrap_or(READ_PAGES);
        let step = per_read.clamp(1, READ_PAGES);
        let mut first = 0;
        while first < geo.md_len {
            let count = step.min(geo.md_len - first);
            let buf = DmaBuf::new(count as usize * PAGE_SIZE)?;
            let replayed = &self.replayed;
            self.io.stream(
                [Ok(Op::Read {
                    lba: geo.md_lba(first),
                    buf,
                })],
                |op, result| {
                    result?;
                    if let Op::Read { buf, .. } = op {
                        for (bytes, index) in buf.chunks_exact(PAGE_SIZE).zip(first..) {
                            let raw = bytes.try_into().expect("a page");
                            let shown: &Page = replayed.get(&index).map_or(raw, |page| page);
                            if shown.iter().any(|byte| *byte != 0) {
                                page(index, shown);
                            }
                        }
                    }
                    Ok(())
                },
            )?;
            first += count;
        }
        Ok(())
    }
}

/// Converts sorted numbers to ranges.
fn to_ranges(numbers: impl Iterator<Item = u32>) -> Vec<Range<u32>> {
    let mut ranges: Vec<Range<u32>> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some(range) if range.end == number => range.end += 1,
            _ => ranges.push(number..number + 1),
        }
    }
    ranges
}
