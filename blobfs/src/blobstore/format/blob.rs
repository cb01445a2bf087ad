//! A blob in its chain of metadata pages: flags, xattrs and the map of its clusters.

use std::cell::RefCell;
use std::sync::Arc;

use super::content::{Content, Words, XattrBody};
use super::page::{
    TYPE_EXTENT_PAGE, TYPE_EXTENT_RLE, TYPE_EXTENT_TABLE, TYPE_FLAGS, TYPE_XATTR, check_crc,
};
use super::{
    BlobId, Descriptor, Descriptors, EXTENTS_PER_PAGE, INVALID_PAGE, Page, PageHeader, PageProblem,
};

/// The three flag words of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags {
    /// With an unknown bit the blob must not be opened.
    pub invalid: u64,
    /// With an unknown bit the blob is read-only.
    pub data_ro: u64,
    /// With an unknown bit the blob's metadata is read-only. Bits 0 and 1 hold the clear method.
    pub md_ro: u64,
}

impl Flags {
    /// `invalid`: clusters may be unallocated.
    pub const THIN: u64 = 1;
    /// `invalid`: the blob has internal xattrs.
    pub const INTERNAL_XATTRS: u64 = 2;
    /// `invalid`: extent table and extent pages instead of run-length extents.
    pub const EXTENT_TABLE: u64 = 4;
    /// `invalid`: clone of an external snapshot.
    pub const EXTERNAL_CLONE: u64 = 8;
    /// `data_ro`: nothing of the blob may be changed.
    pub const READ_ONLY: u64 = 1;
    /// `md_ro`: the bits of the clear method.
    pub const CLEAR_METHOD: u64 = 3;

    const KNOWN_INVALID: u64 =
        Self::THIN | Self::INTERNAL_XATTRS | Self::EXTENT_TABLE | Self::EXTERNAL_CLONE;

    /// Returns the unknown bits of `invalid`. With any of them the blob must not be opened.
    #[must_use]
    pub fn unknown_invalid(&self) -> u64 {
        self.invalid & !Self::KNOWN_INVALID
    }

    /// Whether the blob is thin-provisioned.
    #[must_use]
    pub fn thin(&self) -> bool {
        self.invalid & Self::THIN != 0
    }

    /// Whether the blob's data must not be written.
    #[must_use]
    pub fn data_read_only(&self) -> bool {
        self.data_ro != 0
    }

    /// Whether the blob's metadata must not be changed.
    #[must_use]
    pub fn md_read_only(&self) -> bool {
        self.data_ro != 0 || self.md_ro & !Self::CLEAR_METHOD != 0
    }
}

/// A name and a value, both bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// Name, without a NUL.
    pub name: Arc<[u8]>,
    /// Value, which may be empty.
    pub value: Arc<[u8]>,
}

/// A run of consecutive clusters of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First cluster of the store, 0 for an unallocated run.
    pub cluster: u32,
    /// Number of clusters.
    pub len: u32,
}

/// An entry of an extent table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableEntry {
    /// The metadata page of an extent page, or 0 for a run of unallocated ones.
    pub page: u32,
    /// Number of extent pages that the entry stands for; 1 if `page` is not 0.
    pub count: u32,
}

/// The map of a blob's clusters in its chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MapRecord {
    /// Run-length extents.
    Rle(Vec<Run>),
    /// An extent table. The clusters are in the extent pages.
    Table {
        /// Number of clusters of the blob in the table. After a crash it may differ from the number
        /// in the pages.
        num_clusters: u64,
        /// The extent pages, in order.
        entries: Vec<TableEntry>,
    },
}

/// The content of a blob's chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobRecord {
    /// Id of the blob.
    pub id: BlobId,
    /// Flags of the blob.
    pub flags: Flags,
    /// The user's xattrs.
    pub xattrs: Vec<Xattr>,
    /// The store's own xattrs.
    pub internal: Vec<Xattr>,
    /// Clusters of the blob.
    pub map: MapRecord,
}

/// Reads a blob page by page, from the root on.
#[derive(Debug)]
pub struct BlobReader {
    id: BlobId,
    flags: Flags,
    xattrs: Vec<Xattr>,
    internal: Vec<Xattr>,
    runs: Vec<Run>,
    table: Option<(u64, Vec<TableEntry>)>,
    clusters: u64,
    sequence: u32,
}

impl BlobReader {
    /// Returns the value of an xattr that has been read so far.
    pub(crate) fn xattr(&self, name: &[u8]) -> Option<&[u8]> {
        self.xattrs
            .iter()
            .find(|xattr| *xattr.name == *name)
            .map(|xattr| &*xattr.value)
    }

    /// Makes a reader for blob `id`, before its root.
    #[must_use]
    pub fn new(id: BlobId) -> BlobReader {
        let (xattrs, internal, runs) = (Vec::new(), Vec::new(), Vec::new());
        BlobReader {
            id,
            flags: Flags::default(),
            xattrs,
            internal,
            runs,
            table: None,
            clusters: 0,
            sequence: 0,
        }
    }

    /// Number of pages that were read.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.sequence
    }

    /// Reads the next page of the chain. Checks the CRC, the id, the sequence number and the
    /// descriptors. Returns the index of the page after it, if there is one.
    pub fn page(&mut self, page: &Page) -> Result<Option<u32>, PageProblem> {
        check_crc(page)?;
        let header = PageHeader::read(page);
        if header.id != self.id {
            return Err(PageProblem::Id {
                expected: self.id,
                found: header.id,
            });
        }
        if header.sequence != self.sequence {
            return Err(PageProblem::Sequence {
                expected: self.sequence,
                found: header.sequence,
            });
        }
        for descriptor in Descriptors::new(page) {
            self.descriptor(descriptor?)?;
        }
        self.sequence += 1;
        Ok((header.next != INVALID_PAGE).then_some(header.next))
    }

    /// Returns what was read, at the end of the chain.
    #[must_use]
    pub fn finish(self) -> BlobRecord {
        let map = match self.table {
            Some((num_clusters, entries)) => MapRecord::Table {
                num_clusters,
                entries,
            },
            None => MapRecord::Rle(self.runs),
        };
        BlobRecord {
            id: self.id,
            flags: self.flags,
            xattrs: self.xattrs,
            internal: self.internal,
            map,
        }
    }

    fn descriptor(&mut self, descriptor: Descriptor<'_>) -> Result<(), PageProblem> {
        let Descriptor { offset, kind, body } = descriptor;
        let bad_length = || PageProblem::BodyLength {
            offset,
            kind,
            len: body.len(),
        };
        if kind == TYPE_EXTENT_PAGE {
            return Err(PageProblem::UnexpectedExtentPage);
        }
        let whole = match kind {
            TYPE_FLAGS => body.len() == 24,
            TYPE_EXTENT_RLE => !body.is_empty() && body.len().is_multiple_of(8),
            TYPE_EXTENT_TABLE => body.len().is_multiple_of(8),
            _ => true,
        };
        let content = descriptor.content().filter(|_| whole);
        match content.ok_or_else(bad_length)? {
            Content::Flags {
                invalid,
                data_ro,
                md_ro,
            } => {
                self.flags = Flags {
                    invalid,
                    data_ro,
                    md_ro,
                };
            }
            Content::Xattr(xattr) => {
                let xattr = read_xattr(&descriptor, xattr)?;
                match kind {
                    TYPE_XATTR => self.xattrs.push(xattr),
                    _ => self.internal.push(xattr),
                }
            }
            Content::Runs(runs) => {
                if self.table.is_some() {
                    return Err(PageProblem::RleAndTable);
                }
                for (cluster, len) in runs.pairs() {
                    self.count(len)?;
                    if len != 0 {
                        self.runs.push(Run { cluster, len });
                    }
                }
            }
            Content::Table {
                num_clusters,
                entries,
            } => self.part_of_table(num_clusters, entries)?,
            // A feature that forbids opening the blob would have set a flag.
            Content::ExtentPage { .. } | Content::Padding | Content::Unknown => {}
        }
        Ok(())
    }

    fn part_of_table(&mut self, num_clusters: u64, listed: Words<'_>) -> Result<(), PageProblem> {
        if !self.runs.is_empty() {
            return Err(PageProblem::RleAndTable);
        }
        if num_clusters > u64::from(u32::MAX) {
            return Err(PageProblem::TooManyClusters);
        }
        let (first, entries) = self.table.get_or_insert_with(|| (num_clusters, Vec::new()));
        if *first != num_clusters {
            return Err(PageProblem::TableSizes {
                first: *first,
                second: num_clusters,
            });
        }
        for (page, count) in listed.pairs() {
            if page != 0 && count != 1 {
                return Err(PageProblem::TableCount { page, count });
            }
            entries.push(TableEntry { page, count });
            self.clusters += u64::from(count) * EXTENTS_PER_PAGE as u64;
            // The last page may be a short one.
            if self.clusters >= u64::from(u32::MAX) + EXTENTS_PER_PAGE as u64 {
                return Err(PageProblem::TooManyClusters);
            }
        }
        Ok(())
    }

    fn count(&mut self, clusters: u32) -> Result<(), PageProblem> {
        self.clusters += u64::from(clusters);
        if self.clusters > u64::from(u32::MAX) {
            Err(PageProblem::TooManyClusters)
        } else {
            Ok(())
        }
    }
}

fn read_xattr(descriptor: &Descriptor<'_>, xattr: XattrBody<'_>) -> Result<Xattr, PageProblem> {
    let bad = || PageProblem::Xattr {
        offset: descriptor.offset,
        name_len: xattr.name_len,
        value_len: xattr.value_len,
        len: descriptor.body.len(),
    };
    let (name, value) = xattr.name_and_value().ok_or_else(bad)?;
    if name.contains(&0) || value.len() != usize::from(xattr.value_len) {
        return Err(bad());
    }
    Ok(Xattr {
        name: shared_name(name),
        value: value.into(),
    })
}

/// Returns a name, as the same memory as before where this thread has met it: the blobs of a file system
/// have the same few names.
fn shared_name(name: &[u8]) -> Arc<[u8]> {
    const MOST: usize = 16;
    thread_local! {
        static KNOWN: RefCell<Vec<Arc<[u8]>>> = const { RefCell::new(Vec::new()) };
    }
    KNOWN.with_borrow_mut(|known| {
        if let Some(same) = known.iter().find(|k| ***k == *name) {
            return Arc::clone(same);
        }
        let name: Arc<[u8]> = name.into();
        if known.len() < MOST {
            known.push(Arc::clone(&name));
        }
        name
    })
}

#[cfg(test)]
mod tests {
    use super::super::MAX_XATTR_LEN;
    use super::super::TYPE_XATTR_INTERNAL;
    use super::super::chain::{ChainWriter, encode_blob, seal_chain};
    use super::*;

    fn xattr(name: &str, len: usize) -> Xattr {
        Xattr {
            name: name.as_bytes().into(),
            value: vec![len.to_le_bytes()[0]; len].into(),
        }
    }

    fn round_trip(record: &BlobRecord) -> Vec<Box<Page>> {
        let mut pages = encode_blob(record);
        let chain: Vec<u32> = (100..).take(pages.len() - 1).collect();
        seal_chain(&mut pages, &chain);
        let mut reader = BlobReader::new(record.id);
        for (number, page) in pages.iter().enumerate() {
            assert_eq!(reader.page(page).unwrap(), chain.get(number).copied());
        }
        assert_eq!(&reader.finish(), record);
        pages
    }

    fn record(map: MapRecord, xattrs: Vec<Xattr>) -> BlobRecord {
        let flags = Flags {
            invalid: Flags::EXTENT_TABLE | Flags::THIN,
            data_ro: 0,
            md_ro: 2,
        };
        BlobRecord {
            id: BlobId::from_page(7),
            flags,
            xattrs,
            internal: vec![xattr("SNAP", 8)],
            map,
        }
    }

    fn table(n: u32) -> MapRecord {
        let entry = |page: u32| TableEntry {
            page,
            count: if page == 0 { 3 } else { 1 },
        };
        let entries = (0..n)
            .map(|i| entry(if i % 5 == 4 { 0 } else { i + 1 }))
            .collect();
        MapRecord::Table {
            num_clusters: 12345,
            entries,
        }
    }

    #[test]
    fn blobs_round_trip() {
        assert_eq!(round_trip(&record(table(0), vec![])).len(), 1);
        assert_eq!(
            round_trip(&record(table(400), vec![xattr("name", 6)])).len(),
            1
        );
        assert_eq!(round_trip(&record(table(2000), vec![])).len(), 4);
        let big = vec![
            xattr("big0", 3500),
            xattr("big1", 3500),
            xattr("empty", 0),
            xattr("max", MAX_XATTR_LEN - 3),
        ];
        assert_eq!(round_trip(&record(table(1), big.clone())).len(), 4);
        let runs = (1..1000).map(|i| Run { cluster: i, len: 1 }).collect();
        assert_eq!(round_trip(&record(MapRecord::Rle(runs), big)).len(), 5);
        assert_eq!(round_trip(&record(MapRecord::Rle(vec![]), vec![])).len(), 1);
    }

    #[test]
    fn table_in_a_nearly_full_page() {
        // Whatever room is left in the page, the table starts here or in the next one.
        for len in 3960..=MAX_XATTR_LEN - 2 {
            for n in [0, 1, 2, 600] {
                let mut r = record(table(n), vec![xattr("xx", len)]);
                r.internal.clear();
                round_trip(&r);
            }
        }
    }

    #[test]
    fn an_empty_table_is_written_and_an_empty_rle_is_not() {
        let kinds = |map| {
            let pages = round_trip(&record(map, vec![]));
            Descriptors::new(&pages[0])
                .map(|d| d.unwrap().kind)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            kinds(table(0)),
            [TYPE_FLAGS, TYPE_XATTR_INTERNAL, TYPE_EXTENT_TABLE]
        );
        assert_eq!(
            kinds(MapRecord::Rle(vec![])),
            [TYPE_FLAGS, TYPE_XATTR_INTERNAL]
        );
    }

    /// Makes a root page with these descriptors.
    fn page_of(descriptors: &[(u8, &[u8])]) -> Box<Page> {
        let mut writer = ChainWriter::new(BlobId::from_page(7));
        for (kind, body) in descriptors {
            writer.descriptor(*kind, body.len()).copy_from_slice(body);
        }
        seal_chain(&mut writer.pages, &[]);
        writer.pages.remove(0)
    }

    #[test]
    fn refusals() {
        let read = |descriptors: &[(u8, &[u8])]| {
            BlobReader::new(BlobId::from_page(7)).page(&page_of(descriptors))
        };
        let words = |words: &[u32]| {
            words
                .iter()
                .flat_map(|w| w.to_le_bytes())
                .collect::<Vec<u8>>()
        };
        assert!(
            read(&[(200, &[1, 2, 3])]).is_ok(),
            "unknown types are skipped"
        );
        assert!(matches!(
            read(&[(TYPE_FLAGS, &[0; 23])]),
            Err(PageProblem::BodyLength { .. })
        ));
        assert!(
            read(&[(TYPE_FLAGS, &[16; 24])]).is_ok(),
            "unknown flags forbid opening, not reading"
        );
        assert_eq!(
            Flags {
                invalid: 0x13,
                data_ro: 0,
                md_ro: 0
            }
            .unknown_invalid(),
            0x10
        );
        assert!(matches!(
            read(&[(TYPE_XATTR, &[1, 0, 1, 0, b'n'])]),
            Err(PageProblem::Xattr { .. })
        ));
        assert!(matches!(
            read(&[(TYPE_XATTR, &[1, 0])]),
            Err(PageProblem::BodyLength { .. })
        ));
        assert!(matches!(
            read(&[(TYPE_EXTENT_RLE, &words(&[1, 2, 3]))]),
            Err(PageProblem::BodyLength { .. })
        ));
        assert!(matches!(
            read(&[(TYPE_EXTENT_RLE, &words(&[0, u32::MAX, 0, u32::MAX]))]),
            Err(PageProblem::TooManyClusters)
        ));
        let table = words(&[600, 0, 4, 1, 5, 1]);
        assert!(read(&[(TYPE_EXTENT_TABLE, &table)]).is_ok());
        assert!(matches!(
            read(&[
                (TYPE_EXTENT_RLE, &words(&[1, 1])),
                (TYPE_EXTENT_TABLE, &table)
            ]),
            Err(PageProblem::RleAndTable)
        ));
        assert!(matches!(
            read(&[
                (TYPE_EXTENT_TABLE, &table),
                (TYPE_EXTENT_TABLE, &words(&[601, 0]))
            ]),
            Err(PageProblem::TableSizes {
                first: 600,
                second: 601
            })
        ));
        assert!(matches!(
            read(&[(TYPE_EXTENT_TABLE, &words(&[1024, 0, 4, 2]))]),
            Err(PageProblem::TableCount { page: 4, count: 2 })
        ));
        assert!(matches!(
            read(&[(TYPE_EXTENT_TABLE, &words(&[1024, 0, 0, u32::MAX]))]),
            Err(PageProblem::TooManyClusters)
        ));
        assert!(matches!(
            read(&[(TYPE_EXTENT_PAGE, &words(&[0, 1]))]),
            Err(PageProblem::UnexpectedExtentPage)
        ));
        let page = page_of(&[]);
        assert!(matches!(
            BlobReader::new(BlobId::from_page(8)).page(&page),
            Err(PageProblem::Id { .. })
        ));
        let mut reader = BlobReader::new(BlobId::from_page(7));
        reader.page(&page).unwrap();
        assert!(matches!(
            reader.page(&page),
            Err(PageProblem::Sequence {
                expected: 1,
                found: 0
            })
        ));
    }

    #[test]
    fn the_borders_of_descriptors_are_kept() {
        let read = |descriptors: &[(u8, &[u8])]| {
            BlobReader::new(BlobId::from_page(7))
                .page(&page_of(descriptors))
                .unwrap_err()
        };
        let run: Vec<u8> = [1u32, 1].iter().flat_map(|w| w.to_le_bytes()).collect();
        let table = |clusters: u64| clusters.to_le_bytes();
        assert!(matches!(
            read(&[(TYPE_EXTENT_TABLE, &table(600)), (TYPE_EXTENT_RLE, &run)]),
            PageProblem::RleAndTable
        ));
        assert!(matches!(
            read(&[(TYPE_EXTENT_TABLE, &table(1 << 32))]),
            PageProblem::TooManyClusters
        ));
        assert!(matches!(
            read(&[(TYPE_EXTENT_RLE, &[])]),
            PageProblem::BodyLength { len: 0, .. }
        ));
        for kind in [TYPE_XATTR, TYPE_XATTR_INTERNAL] {
            let longer = [1, 0, 1, 0, b'n', b'v', b'w'];
            let nul = [2, 0, 1, 0, b'n', 0, b'v'];
            for body in [longer, nul] {
                let problem = read(&[(kind, &body)]);
                assert!(matches!(problem, PageProblem::Xattr { .. }), "{body:?}");
            }
        }
    }
}
