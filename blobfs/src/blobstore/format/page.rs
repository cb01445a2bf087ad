//! Metadata pages: header, descriptors, extent pages.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    BlobId, DESCRIPTORS_LEN, EXTENTS_PER_PAGE, INVALID_PAGE, PAGE_SIZE, Page, page_crc, seal,
    stored_crc,
};

/// Descriptor type of padding, which ends the page if its length is 0.
pub const TYPE_PADDING: u8 = 0;
/// Descriptor type of run-length extents.
pub const TYPE_EXTENT_RLE: u8 = 1;
/// Descriptor type of an xattr.
pub const TYPE_XATTR: u8 = 2;
/// Descriptor type of the flags.
pub const TYPE_FLAGS: u8 = 3;
/// Descriptor type of an internal xattr.
pub const TYPE_XATTR_INTERNAL: u8 = 4;
/// Descriptor type of an extent table.
pub const TYPE_EXTENT_TABLE: u8 = 5;
/// Descriptor type of the clusters of an extent page.
pub const TYPE_EXTENT_PAGE: u8 = 6;

/// Offset of the descriptors in a page.
pub(super) const DESCRIPTORS_AT: usize = 16;
/// Offset of `next`.
pub(super) const NEXT_AT: usize = DESCRIPTORS_AT + DESCRIPTORS_LEN;
/// Number of bytes of a descriptor's type and length.
pub(super) const DESCRIPTOR_HEADER_LEN: usize = 5;

/// The first 16 bytes of a metadata page.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawPageHeader {
    id: U64,
    sequence_num: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<RawPageHeader>() == DESCRIPTORS_AT);
const _: () = assert!(NEXT_AT + 8 == PAGE_SIZE);

/// The header of a metadata page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// The blob that wrote the page.
    pub id: BlobId,
    /// 0 for a root or an extent page, then 1, 2 … along the chain.
    pub sequence: u32,
    /// The next page of the chain, or [`INVALID_PAGE`].
    pub next: u32,
}

impl PageHeader {
    /// Reads the header without checking the CRC.
    #[must_use]
    pub fn read(page: &Page) -> PageHeader {
        let (raw, _) =
            RawPageHeader::ref_from_prefix(page).expect("a page is longer than its header");
        let (next, _) = U32::ref_from_prefix(&page[NEXT_AT..]).expect("next lies within the page");
        PageHeader {
            id: BlobId(raw.id.get()),
            sequence: raw.sequence_num.get(),
            next: next.get(),
        }
    }

    /// Writes the header into a page without changing the CRC.
    pub fn write(self, page: &mut Page) {
        let raw = RawPageHeader {
            id: self.id.0.into(),
            sequence_num: self.sequence.into(),
            reserved: 0.into(),
        };
        page[..DESCRIPTORS_AT].copy_from_slice(raw.as_bytes());
        page[NEXT_AT..NEXT_AT + 4].copy_from_slice(&self.next.to_le_bytes());
    }
}

/// The reason why a metadata page is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the texts say it")]
pub enum PageProblem {
    #[error("its checksum is {stored:#010x}, but its bytes have {computed:#010x}")]
    Crc { stored: u32, computed: u32 },
    #[error("it belongs to blob {found}, not to blob {expected}")]
    Id { expected: BlobId, found: BlobId },
    #[error("its sequence number is {found}, not {expected}")]
    Sequence { expected: u32, found: u32 },
    #[error(
        "the descriptor at byte {offset} (type {kind}, {len} bytes) runs past the end of the page"
    )]
    Overrun { offset: usize, kind: u8, len: u32 },
    #[error(
        "the descriptor at byte {offset} (type {kind}) has an impossible length of {len} bytes"
    )]
    BodyLength { offset: usize, kind: u8, len: usize },
    #[error(
        "the xattr at byte {offset} has {len} bytes, but names {name_len} bytes of name and {value_len} of value"
    )]
    Xattr {
        offset: usize,
        name_len: u16,
        value_len: u16,
        len: usize,
    },
    #[error("it has both an extent table and run-length extents")]
    RleAndTable,
    #[error("the extent tables disagree on the number of clusters: {first} and {second}")]
    TableSizes { first: u64, second: u64 },
    #[error("the extent table's entry for page {page} has the count {count}, and must have 1")]
    TableCount { page: u32, count: u32 },
    #[error("it describes more than {} clusters", u32::MAX)]
    TooManyClusters,
    #[error("it is an extent page, where a page of a chain should be")]
    UnexpectedExtentPage,
    #[error("it is not an extent page: its first descriptor has type {0}")]
    NotExtentPage(u8),
    #[error("it is an extent page, but names the next page {0}")]
    ExtentPageNext(u32),
    #[error("its extents start at cluster {found}, not at cluster {expected}")]
    ExtentPageStart { expected: u64, found: u32 },
    #[error("it describes {found} clusters, and {expected} are needed")]
    ExtentPageLength { expected: usize, found: usize },
    #[error("page index {index} is outside the metadata region of {md_len} pages")]
    PageIndex { index: u32, md_len: u32 },
    #[error("it is reached twice")]
    Loop,
    #[error("it names cluster {cluster}, but data clusters are {first}..{end}")]
    Cluster { cluster: u64, first: u32, end: u32 },
    #[error("cluster {0} is claimed by too many blobs")]
    Claimed(u32),
    #[error("it leaves clusters unallocated, but the blob is not thin-provisioned")]
    HoleInThick,
    #[error("it cannot be read: {0}")]
    Unreadable(String),
}

/// A damaged metadata page.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("metadata page {page}: {problem}")]
pub struct PageError {
    /// Index of the page in the metadata region.
    pub page: u32,
    /// The damage.
    pub problem: PageProblem,
}

/// Checks the CRC of a page.
pub(super) fn check_crc(page: &Page) -> Result<(), PageProblem> {
    let (stored, computed) = (stored_crc(page), page_crc(page));
    if stored == computed {
        Ok(())
    } else {
        Err(PageProblem::Crc { stored, computed })
    }
}

/// A descriptor of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor<'a> {
    /// Offset of the descriptor in the page.
    pub offset: usize,
    /// Type byte of the descriptor.
    pub kind: u8,
    /// The bytes after its header.
    pub body: &'a [u8],
}

/// Iterates over the descriptors of a page, in order, up to the terminating one. Stops after an
/// error.
#[derive(Debug)]
pub struct Descriptors<'a> {
    area: &'a [u8],
    at: usize,
}

impl<'a> Descriptors<'a> {
    /// Iterates over the descriptors of `page`.
    #[must_use]
    pub fn new(page: &'a Page) -> Descriptors<'a> {
        Descriptors {
            area: &page[DESCRIPTORS_AT..NEXT_AT],
            at: 0,
        }
    }
}

impl<'a> Iterator for Descriptors<'a> {
    type Item = Result<Descriptor<'a>, PageProblem>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.area.get(self.at..)?;
        let (head, rest) = rest.split_at_checked(DESCRIPTOR_HEADER_LEN)?;
        let kind = head[0];
        let len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
        if kind == TYPE_PADDING && len == 0 {
            self.at = self.area.len();
            return None;
        }
        let offset = DESCRIPTORS_AT + self.at;
        let Some(body) = rest.get(..len as usize) else {
            self.at = self.area.len();
            return Some(Err(PageProblem::Overrun { offset, kind, len }));
        };
        self.at += DESCRIPTOR_HEADER_LEN + body.len();
        Some(Ok(Descriptor { offset, kind, body }))
    }
}

/// Returns the little-endian u32s of a body whose length is a multiple of four.
pub(super) fn words(body: &[u8]) -> impl Iterator<Item = u32> + '_ {
    body.chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
}

/// The content of an extent page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentPage {
    /// The blob that wrote it. After a snapshot it is not the blob that the page belongs to.
    pub written_by: BlobId,
    /// The first cluster of the blob that it describes.
    pub start: u32,
    /// Clusters of the store, 0 for unallocated ones; 1 to 512.
    pub clusters: Vec<u32>,
}

/// Decodes an extent page. Checks the CRC, sequence, next and type, but not the id.
pub fn decode_extent_page(page: &Page) -> Result<ExtentPage, PageProblem> {
    check_crc(page)?;
    let header = PageHeader::read(page);
    if header.sequence != 0 {
        return Err(PageProblem::Sequence {
            expected: 0,
            found: header.sequence,
        });
    }
    if header.next != INVALID_PAGE {
        return Err(PageProblem::ExtentPageNext(header.next));
    }
    let descriptor = Descriptors::new(page)
        .next()
        .ok_or(PageProblem::NotExtentPage(TYPE_PADDING))??;
    if descriptor.kind != TYPE_EXTENT_PAGE {
        return Err(PageProblem::NotExtentPage(descriptor.kind));
    }
    let len = descriptor.body.len();
    if len <= 4 || len % 4 != 0 || len > 4 + 4 * EXTENTS_PER_PAGE {
        return Err(PageProblem::BodyLength {
            offset: descriptor.offset,
            kind: descriptor.kind,
            len,
        });
    }
    let mut fields = words(descriptor.body);
    let start = fields.next().expect("at least two words");
    Ok(ExtentPage {
        written_by: header.id,
        start,
        clusters: fields.collect(),
    })
}

/// Encodes and seals an extent page.
#[must_use]
pub fn encode_extent_page(id: BlobId, start: u32, clusters: &[u32]) -> Box<Page> {
    assert!(
        (1..=EXTENTS_PER_PAGE).contains(&clusters.len()),
        "an extent page holds 1 to 512 clusters"
    );
    let mut page = Box::new([0; PAGE_SIZE]);
    PageHeader {
        id,
        sequence: 0,
        next: INVALID_PAGE,
    }
    .write(&mut page);
    let area = &mut page[DESCRIPTORS_AT..NEXT_AT];
    let len = u32::try_from(4 + 4 * clusters.len()).expect("bounded above");
    area[0] = TYPE_EXTENT_PAGE;
    area[1..5].copy_from_slice(&len.to_le_bytes());
    area[5..9].copy_from_slice(&start.to_le_bytes());
    for (place, cluster) in area[9..].chunks_exact_mut(4).zip(clusters) {
        place.copy_from_slice(&cluster.to_le_bytes());
    }
    seal(&mut page);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extent_page_round_trip() {
        for n in [1, 8, 511, 512] {
            let clusters: Vec<u32> = (0..n).map(|i| if i % 3 == 0 { 0 } else { i }).collect();
            let page = encode_extent_page(BlobId::from_page(5), 512, &clusters);
            let read = decode_extent_page(&page).unwrap();
            assert_eq!(
                read,
                ExtentPage {
                    written_by: BlobId::from_page(5),
                    start: 512,
                    clusters
                }
            );
            // The descriptor has exactly the clusters, without padding to 512.
            assert_eq!(
                u32::from_le_bytes(page[17..21].try_into().unwrap()),
                4 + 4 * n
            );
        }
    }

    #[test]
    fn extent_page_refusals() {
        let good = encode_extent_page(BlobId::from_page(5), 0, &[7]);
        let damaged = |at: usize, value: u8| {
            let mut page = *good;
            page[at] = value;
            seal(&mut page);
            decode_extent_page(&page)
        };
        assert!(matches!(damaged(8, 1), Err(PageProblem::Sequence { .. })));
        assert!(matches!(
            damaged(NEXT_AT, 1),
            Err(PageProblem::ExtentPageNext(_))
        ));
        assert!(matches!(
            damaged(16, TYPE_FLAGS),
            Err(PageProblem::NotExtentPage(TYPE_FLAGS))
        ));
        assert!(matches!(
            damaged(16, 0),
            Err(PageProblem::Overrun { .. } | PageProblem::NotExtentPage(0))
        ));
        assert!(matches!(
            damaged(17, 4),
            Err(PageProblem::BodyLength { .. })
        ));
        assert!(matches!(
            damaged(17, 7),
            Err(PageProblem::BodyLength { .. })
        ));
        assert!(matches!(
            damaged(18, 0xff),
            Err(PageProblem::Overrun { .. })
        ));
        let mut page = *good;
        page[30] ^= 1;
        assert!(matches!(
            decode_extent_page(&page),
            Err(PageProblem::Crc { .. })
        ));
        assert!(matches!(
            decode_extent_page(&[0; PAGE_SIZE]),
            Err(PageProblem::Crc { .. })
        ));
    }

    #[test]
    fn an_extent_page_of_too_many_clusters_is_refused() {
        let of = |clusters: u16| {
            let mut page = *encode_extent_page(BlobId::from_page(5), 0, &[7]);
            page[17..19].copy_from_slice(&(4 + 4 * clusters).to_le_bytes());
            seal(&mut page);
            decode_extent_page(&page)
        };
        assert_eq!(of(512).unwrap().clusters.len(), 512);
        assert!(matches!(of(0), Err(PageProblem::BodyLength { len: 4, .. })));
        assert!(matches!(of(513), Err(PageProblem::BodyLength { .. })));
    }

    #[test]
    fn padding_is_passed_and_an_overrun_ends_the_page() {
        let mut page: Page = [0; PAGE_SIZE];
        // Three bytes of padding, then flags that say more bytes than there are.
        page[DESCRIPTORS_AT + 1] = 3;
        page[DESCRIPTORS_AT + 8] = TYPE_FLAGS;
        page[DESCRIPTORS_AT + 11] = 0xff;
        let found: Vec<_> = Descriptors::new(&page).take(3).collect();
        assert!(
            matches!(
                found[..],
                [
                    Ok(Descriptor {
                        kind: TYPE_PADDING,
                        ..
                    }),
                    Err(PageProblem::Overrun {
                        kind: TYPE_FLAGS,
                        ..
                    })
                ]
            ),
            "{found:?}"
        );
    }
}
