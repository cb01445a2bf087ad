//! Data pointers: PRP entries and SGL descriptors, written into a command's list area.
//!
//! Base sections 4.1.1 (PRP) and 4.1.2 (SGL). Nothing is allocated: every command slot has an area
//! of its own in DMA memory, which also holds the data of Dataset Management and Copy.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::dma::{AddressTable, DmaBuf, DmaSlice, RegionId};
use crate::spec::{Command, SglDescriptor};

/// A contiguous part of an I/O's memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segment {
    pub region: RegionId,
    pub offset: usize,
    pub len: usize,
}

impl From<&DmaBuf> for Segment {
    #[inline]
    fn from(buf: &DmaBuf) -> Segment {
        Segment {
            region: buf.region(),
            offset: buf.region_offset(),
            len: buf.len(),
        }
    }
}

impl From<&DmaSlice> for Segment {
    #[inline]
    fn from(data: &DmaSlice) -> Segment {
        Segment {
            region: data.region(),
            offset: data.region_offset(),
            len: data.len(),
        }
    }
}

/// A command's list area.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ListArea<'a> {
    pub words: &'a [AtomicU64],
    pub address: u64,
}

impl ListArea<'_> {
    #[inline]
    fn put(&self, at: usize, value: u64) -> bool {
        match self.words.get(at) {
            Some(word) => {
                word.store(value.to_le(), Ordering::Relaxed);
                true
            }
            None => false,
        }
    }

    /// Stores the words of the list's `n`th descriptor of this size.
    #[inline]
    pub fn put_descriptor<const WORDS: usize>(&self, n: usize, words: [u64; WORDS]) {
        for (place, word) in self.words[n * WORDS..].iter().zip(words) {
            place.store(word.to_le(), Ordering::Relaxed);
        }
    }
}

/// The form of a controller's data pointers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PointerStyle {
    /// The controller's page (CC.MPS), a power of two.
    pub page_len: usize,
    pub sgl: bool,
}

/// The device cannot access the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotMapped;

/// Number of bytes from an address to the end of its page.
#[inline]
fn to_page_end(address: u64, page: usize) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "only bits below the page size matter"
    )]
    let low = address as usize;
    page - (low & (page - 1))
}

/// A command's data pointer: the two words and the flags byte.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pointer {
    pub words: [u64; 2],
    pub flags: u8,
}

/// Makes the data pointer for one segment that needs no list: one or two pages, or one SGL
/// descriptor. Returns `None` when it needs a list or when the memory is not mapped. The segment is
/// not empty.
#[inline]
pub(super) fn point_directly(
    table: &AddressTable,
    segment: Segment,
    style: PointerStyle,
) -> Option<Pointer> {
    debug_assert!(segment.len > 0, "no data to point at");
    let (address, contiguous) = table.translate(segment.region, segment.offset)?;
    let prp = |prp2| Pointer {
        words: [address, prp2],
        flags: 0,
    };
    let last = address.wrapping_add(segment.len.wrapping_sub(1) as u64);
    let page = style.page_len;
    if (address ^ last) < page as u64 {
        return Some(prp(0));
    }
    let first = to_page_end(address, page);
    if segment.len > contiguous {
        return None;
    }
    if segment.len <= first + page {
        return Some(prp(address + first as u64));
    }
    let len = u32::try_from(segment.len).ok().filter(|_| style.sgl)?;
    Some(Pointer {
        words: SglDescriptor::data(address, len).words(),
        flags: Command::SGL,
    })
}

/// Sets a command's data pointer for one segment that is small enough for the list area.
pub(super) fn point_at(
    command: &mut Command,
    table: &AddressTable,
    segment: Segment,
    style: PointerStyle,
    area: &ListArea<'_>,
) -> Result<(), NotMapped> {
    if let Some(pointer) = point_directly(table, segment, style) {
        [command.prp1, command.prp2] = pointer.words;
        command.flags = command.flags & !Command::SGL | pointer.flags;
        return Ok(());
    }
    match point_at_many(
        command,
        table,
        std::iter::once(segment),
        0,
        segment.len,
        style,
        area,
    )? {
        covered if covered == segment.len => Ok(()),
        _ => Err(NotMapped),
    }
}

/// Sets the data pointer for `want` bytes of the segments, from byte `skip` on. Returns how many
/// bytes the pointer covers. It covers fewer when the list area is full, or when the next segment
/// cannot follow in a PRP list because it does not start at a page or the one before does not end
/// at one.
pub(super) fn point_at_many(
    command: &mut Command,
    table: &AddressTable,
    segments: impl Iterator<Item = Segment>,
    skip: usize,
    want: usize,
    style: PointerStyle,
    area: &ListArea<'_>,
) -> Result<usize, NotMapped> {
    let pieces = Pieces {
        table,
        segments,
        skip,
        left: want,
        current: None,
    };
    command.flags &= !Command::SGL;
    if style.sgl {
        sgl(command, pieces, area)
    } else {
        prp(command, pieces, style.page_len, area)
    }
}

/// Sets the data pointer of an admin command, which is always a PRP of one segment.
pub(crate) fn admin_prp(
    command: &mut Command,
    table: &AddressTable,
    segment: Segment,
    page_shift: u32,
    area: &ListArea<'_>,
) -> Result<(), NotMapped> {
    let style = PointerStyle {
        page_len: 1 << page_shift,
        sgl: false,
    };
    point_at(command, table, segment, style, area)
}

/// The parts of an I/O's memory that are contiguous for the device.
struct Pieces<'a, I> {
    table: &'a AddressTable,
    segments: I,
    skip: usize,
    left: usize,
    current: Option<Segment>,
}

impl<I: Iterator<Item = Segment>> Iterator for Pieces<'_, I> {
    type Item = Result<(u64, usize), NotMapped>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let mut segment = match self.current.take() {
            Some(s) => s,
            None => loop {
                let s = self.segments.next()?;
                if s.len > self.skip {
                    let skip = std::mem::take(&mut self.skip);
                    break Segment {
                        offset: s.offset + skip,
                        len: s.len - skip,
                        ..s
                    };
                }
                self.skip -= s.len;
            },
        };
        let Some((address, contiguous)) = self.table.translate(segment.region, segment.offset)
        else {
            return Some(Err(NotMapped));
        };
        let len = segment.len.min(contiguous).min(self.left);
        self.left -= len;
        segment.offset += len;
        segment.len -= len;
        if segment.len > 0 {
            self.current = Some(segment);
        }
        Some(Ok((address, len)))
    }
}

fn prp(
    command: &mut Command,
    pieces: impl Iterator<Item = Result<(u64, usize), NotMapped>>,
    page: usize,
    area: &ListArea<'_>,
) -> Result<usize, NotMapped> {
    let mut covered = 0usize;
    let mut entries = 0usize;
    // The previous part ends at the end of a page, so that another entry may follow.
    let mut open = true;
    'pieces: for piece in pieces {
        let (mut address, mut len) = piece?;
        while len > 0 {
            if entries > 0 && (!open || to_page_end(address, page) != page) {
                break 'pieces;
            }
            match entries {
                0 => command.prp1 = address,
                1 => command.prp2 = address,
                _ => {
                    if entries == 2 {
                        area.put(0, command.prp2);
                    }
                    if !area.put(entries - 1, address) {
                        break 'pieces;
                    }
                }
            }
            entries += 1;
            let here = len.min(to_page_end(address, page));
            covered += here;
            len -= here;
            address += here as u64;
            open = to_page_end(address, page) == page;
        }
    }
    if entries > 2 {
        command.prp2 = area.address;
    }
    Ok(covered)
}

fn sgl(
    command: &mut Command,
    pieces: impl Iterator<Item = Result<(u64, usize), NotMapped>>,
    area: &ListArea<'_>,
) -> Result<usize, NotMapped> {
    let mut covered = 0usize;
    let mut count = 0usize;
    let mut last: Option<(u64, u32)> = None;
    let put = |n: usize, (address, len): (u64, u32)| {
        let words = SglDescriptor::data(address, len).words();
        area.put(2 * n, words[0]) && area.put(2 * n + 1, words[1])
    };
    for piece in pieces {
        let (address, len) = piece?;
        let Ok(len32) = u32::try_from(len) else { break };
        match &mut last {
            // Parts that are adjacent in device addresses become one descriptor.
            Some((a, l)) if *a + u64::from(*l) == address && l.checked_add(len32).is_some() => {
                *l += len32;
            }
            Some(done) => {
                // There is room for this descriptor and the one that begins now.
                if 2 * (count + 2) > area.words.len() || !put(count, *done) {
                    break;
                }
                count += 1;
                last = Some((address, len32));
            }
            None => last = Some((address, len32)),
        }
        covered += len;
    }
    if let Some((address, len)) = last {
        if count == 0 {
            command.set_sgl(&SglDescriptor::data(address, len));
        } else {
            put(count, (address, len));
            count += 1;
            let bytes = u32::try_from(count * 16).unwrap_or(0);
            command.set_sgl(&SglDescriptor::last_segment(area.address, bytes));
        }
    }
    Ok(covered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dma::{DmaError, DmaMapper, Region, register_mapper};
    use std::sync::Arc;

    /// A device that sees each chunk at a scattered address, so that nothing is contiguous by
    /// chance.
    struct Scatter(AddressTable);

    // SAFETY: no device reads the table.
    #[allow(unsafe_code, reason = "the contract of DmaMapper")]
    unsafe impl DmaMapper for Scatter {
        fn map(&self, region: &Region) -> Result<(), DmaError> {
            for n in 0..region.len() >> 21 {
                let chunk = (region.id().index() + n) as u64;
                self.0.set_chunk(region.id(), n, (1 << 40) - (chunk << 22));
            }
            Ok(())
        }
        fn unmap(&self, region: &Region) {
            self.0.clear_region(region);
        }
    }

    const PRP: PointerStyle = PointerStyle {
        page_len: 4096,
        sgl: false,
    };
    const SGL: PointerStyle = PointerStyle {
        page_len: 4096,
        sgl: true,
    };

    fn area(words: &[AtomicU64]) -> ListArea<'_> {
        ListArea {
            words,
            address: 0xabc000,
        }
    }

    /// Returns the (address, length) of each entry that a device reads through the pointer.
    fn follow(c: &Command, words: &[AtomicU64], mut len: usize) -> Vec<(u64, usize)> {
        let mut out = Vec::new();
        if c.flags & Command::SGL != 0 {
            let d = c.sgl();
            if d.kind == SglDescriptor::DATA_BLOCK {
                return vec![(d.address, d.len as usize)];
            }
            assert_eq!((d.kind, d.address), (SglDescriptor::LAST_SEGMENT, 0xabc000));
            for n in 0..d.len as usize / 16 {
                let a = words[2 * n].load(Ordering::Relaxed);
                let l = words[2 * n + 1].load(Ordering::Relaxed);
                assert_eq!(l >> 32, 0);
                out.push((a, usize::try_from(l).unwrap()));
            }
            return out;
        }
        let mut n = 0;
        let first = (4096 - (c.prp1 & 4095) as usize).min(len);
        out.push((c.prp1, first));
        len -= first;
        if len > 4096 {
            assert_eq!(c.prp2, 0xabc000);
        }
        let list = len > 4096;
        while len > 0 {
            let a = if list {
                words[n].load(Ordering::Relaxed)
            } else {
                c.prp2
            };
            assert_eq!(a & 4095, 0);
            out.push((a, len.min(4096)));
            len -= len.min(4096);
            n += 1;
        }
        out
    }

    fn bytes_of(table: &AddressTable, s: Segment, skip: usize, len: usize) -> Vec<u64> {
        (0..len)
            .step_by(512)
            .map(|n| table.translate(s.region, s.offset + skip + n).unwrap().0)
            .collect()
    }

    fn sampled(list: &[(u64, usize)]) -> Vec<u64> {
        list.iter()
            .flat_map(|&(a, l)| (0..l).step_by(512).map(move |n| a + n as u64))
            .collect()
    }

    #[test]
    #[cfg_attr(miri, ignore = "megabytes, word by word")]
    fn one_buffer_of_any_size_and_offset() {
        let device = Arc::new(Scatter(AddressTable::new()));
        let _guard = register_mapper(device.clone()).unwrap();
        let data = DmaBuf::new(5 << 20).unwrap().freeze();
        let words: Vec<AtomicU64> = (0..512).map(|_| AtomicU64::new(0xdead)).collect();
        for style in [PRP, SGL] {
            for (start, len) in [
                (0, 512),
                (0, 4096),
                (512, 4096),
                (3584, 8192),
                (0, 8192),
                (4096, 131_072),
                (512, 131_072),
                ((2 << 20) - 8192, 65_536),
                (512, 1 << 20),
            ] {
                let piece = data.slice(start..start + len);
                let segment = Segment::from(&piece);
                let mut c = Command::default();
                point_at(&mut c, &device.0, segment, style, &area(&words)).unwrap();
                let list = follow(&c, &words, len);
                assert_eq!(list.iter().map(|l| l.1).sum::<usize>(), len);
                assert_eq!(
                    sampled(&list),
                    bytes_of(&device.0, segment, 0, len),
                    "{start}+{len}"
                );
            }
        }
    }

    #[test]
    fn many_buffers_stop_where_a_prp_list_must() {
        let device = Arc::new(Scatter(AddressTable::new()));
        let _guard = register_mapper(device.clone()).unwrap();
        let lens = [4096, 8192, 512, 4096];
        let bufs: Vec<DmaBuf> = lens.iter().map(|_| DmaBuf::new(8192).unwrap()).collect();
        let segments: Vec<Segment> = bufs
            .iter()
            .zip(lens)
            .map(|(b, len)| Segment {
                len,
                ..Segment::from(b)
            })
            .collect();
        let words: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
        let total: usize = 4096 + 8192 + 512 + 4096;
        let mut c = Command::default();
        let n = point_at_many(
            &mut c,
            &device.0,
            segments.iter().copied(),
            0,
            total,
            PRP,
            &area(&words),
        );
        assert_eq!(n, Ok(4096 + 8192 + 512));
        assert_eq!(follow(&c, &words, 4096 + 8192 + 512).len(), 4);
        let mut c = Command::default();
        let n = point_at_many(
            &mut c,
            &device.0,
            segments.iter().copied(),
            512,
            total - 512,
            SGL,
            &area(&words),
        );
        assert_eq!(n, Ok(total - 512));
        let list = follow(&c, &words, total - 512);
        let want: Vec<u64> = [
            bytes_of(&device.0, segments[0], 512, 3584),
            bytes_of(&device.0, segments[1], 0, 8192),
            bytes_of(&device.0, segments[2], 0, 512),
            bytes_of(&device.0, segments[3], 0, 4096),
        ]
        .concat();
        assert_eq!(sampled(&list), want);
    }

    /// A segment that ends where the data begins adds nothing to the list.
    #[test]
    fn what_is_skipped_as_a_whole_has_no_descriptor() {
        let device = Arc::new(Scatter(AddressTable::new()));
        let _guard = register_mapper(device.clone()).unwrap();
        let bufs: Vec<DmaBuf> = (0..3).map(|_| DmaBuf::new(8192).unwrap()).collect();
        let segments: Vec<Segment> = bufs
            .iter()
            .map(|b| Segment {
                len: 4096,
                ..Segment::from(b)
            })
            .collect();
        let words: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
        for (style, skip) in [(SGL, 4096), (SGL, 8192), (PRP, 4096), (PRP, 8192)] {
            let mut c = Command::default();
            let want = 3 * 4096 - skip;
            let parts = segments.iter().copied();
            let n = point_at_many(&mut c, &device.0, parts, skip, want, style, &area(&words));
            assert_eq!(n, Ok(want));
            let expected: Vec<(u64, usize)> = segments[skip / 4096..]
                .iter()
                .map(|s| (device.0.translate(s.region, s.offset).unwrap().0, 4096))
                .collect();
            assert_eq!(follow(&c, &words, want), expected);
        }
    }

    /// The device would go on behind the end of the list.
    #[test]
    fn a_command_whose_list_is_too_short_is_not_sent() {
        let device = Arc::new(Scatter(AddressTable::new()));
        let _guard = register_mapper(device.clone()).unwrap();
        let buf = DmaBuf::new(1 << 20).unwrap();
        let words: Vec<AtomicU64> = (0..16).map(|_| AtomicU64::new(0)).collect();
        for (pages, fits) in [(17, true), (18, false), (256, false)] {
            let segment = Segment {
                len: pages * 4096,
                ..Segment::from(&buf)
            };
            let mut c = Command::default();
            let pointed = point_at(&mut c, &device.0, segment, PRP, &area(&words));
            assert_eq!(pointed.is_ok(), fits, "{pages} pages");
        }
    }

    #[test]
    fn a_full_list_area_covers_less() {
        let device = Arc::new(Scatter(AddressTable::new()));
        let _guard = register_mapper(device.clone()).unwrap();
        // The 512-byte buffers have gaps between them, so that nothing merges.
        let bufs: Vec<DmaBuf> = (0..64).map(|_| DmaBuf::new(1024).unwrap()).collect();
        let segments = bufs.iter().map(|b| Segment {
            len: 512,
            ..Segment::from(b)
        });
        let words: Vec<AtomicU64> = (0..16).map(|_| AtomicU64::new(0)).collect();
        let mut c = Command::default();
        let n =
            point_at_many(&mut c, &device.0, segments, 0, 64 * 512, SGL, &area(&words)).unwrap();
        assert!(n > 0 && n <= 8 * 512, "{n}");
        assert_eq!(follow(&c, &words, n).iter().map(|l| l.1).sum::<usize>(), n);
        let buf = DmaBuf::new(1 << 20).unwrap();
        let mut c = Command::default();
        let n = point_at_many(
            &mut c,
            &device.0,
            std::iter::once(Segment::from(&buf)),
            0,
            1 << 20,
            PRP,
            &area(&words),
        );
        assert_eq!(n, Ok(17 * 4096));
        let gone = AddressTable::new();
        let mut c = Command::default();
        let r = point_at(&mut c, &gone, Segment::from(&buf), PRP, &area(&words));
        assert_eq!(r, Err(NotMapped));
    }
}
