//! Writing a blob's metadata to a chain of pages.

use super::page::{
    DESCRIPTOR_HEADER_LEN, DESCRIPTORS_AT, NEXT_AT, TYPE_EXTENT_RLE, TYPE_EXTENT_TABLE, TYPE_FLAGS,
    TYPE_XATTR, TYPE_XATTR_INTERNAL,
};
use super::{
    BlobId, BlobRecord, DESCRIPTORS_LEN, INVALID_PAGE, MAX_XATTR_LEN, MapRecord, PAGE_SIZE, Page,
    PageHeader, Xattr, seal,
};

/// Fills pages one after another. The last one is always the open one.
pub(super) struct ChainWriter {
    id: BlobId,
    pub pages: Vec<Box<Page>>,
    used: usize,
}

impl ChainWriter {
    pub fn new(id: BlobId) -> ChainWriter {
        let mut writer = ChainWriter {
            id,
            pages: Vec::with_capacity(1),
            used: 0,
        };
        writer.new_page();
        writer
    }

    fn new_page(&mut self) {
        let mut page = Box::new([0; PAGE_SIZE]);
        let sequence = u32::try_from(self.pages.len()).expect("fewer pages than a region can have");
        PageHeader {
            id: self.id,
            sequence,
            next: INVALID_PAGE,
        }
        .write(&mut page);
        self.pages.push(page);
        self.used = 0;
    }

    fn room(&self) -> usize {
        DESCRIPTORS_LEN - self.used
    }

    /// Returns the body of a new descriptor in the open page, which must have room for it.
    pub fn descriptor(&mut self, kind: u8, len: usize) -> &mut [u8] {
        let page = self.pages.last_mut().expect("there is always an open page");
        let area = &mut page[DESCRIPTORS_AT..NEXT_AT][self.used..][..DESCRIPTOR_HEADER_LEN + len];
        self.used += area.len();
        area[0] = kind;
        area[1..5].copy_from_slice(
            &u32::try_from(len)
                .expect("shorter than a page")
                .to_le_bytes(),
        );
        &mut area[DESCRIPTOR_HEADER_LEN..]
    }

    fn xattr(&mut self, kind: u8, xattr: &Xattr) {
        let len = 4 + xattr.name.len() + xattr.value.len();
        assert!(
            xattr.name.len() + xattr.value.len() <= MAX_XATTR_LEN,
            "checked when the xattr was set"
        );
        if self.room() < DESCRIPTOR_HEADER_LEN + len {
            self.new_page();
        }
        let body = self.descriptor(kind, len);
        let (name_len, value_len) = (xattr.name.len() as u64, xattr.value.len() as u64);
        body[..2].copy_from_slice(&name_len.to_le_bytes()[..2]);
        body[2..4].copy_from_slice(&value_len.to_le_bytes()[..2]);
        body[4..4 + xattr.name.len()].copy_from_slice(&xattr.name);
        body[4 + xattr.name.len()..].copy_from_slice(&xattr.value);
    }

    /// Writes pairs of words in as many descriptors as necessary, each after `head` and each but
    /// the first in a page of its own.
    fn pairs(&mut self, kind: u8, head: &[u8], mut pairs: &[(u32, u32)], even_if_empty: bool) {
        let mut first = even_if_empty;
        while first || !pairs.is_empty() {
            first = false;
            let overhead = DESCRIPTOR_HEADER_LEN + head.len();
            let fit = self.room().saturating_sub(overhead) / 8;
            if self.room() < overhead || (fit == 0 && !pairs.is_empty()) {
                self.new_page();
                first = even_if_empty && pairs.is_empty();
                continue;
            }
            let (now, later) = pairs.split_at(fit.min(pairs.len()));
            pairs = later;
            let body = self.descriptor(kind, head.len() + 8 * now.len());
            body[..head.len()].copy_from_slice(head);
            for (place, (a, b)) in body[head.len()..].chunks_exact_mut(8).zip(now) {
                place[..4].copy_from_slice(&a.to_le_bytes());
                place[4..].copy_from_slice(&b.to_le_bytes());
            }
        }
    }
}

/// Encodes a blob's chain: flags, xattrs, internal xattrs and clusters, in SPDK's order. The pages
/// still need [`seal_chain`], which sets their places.
#[must_use]
pub fn encode_blob(record: &BlobRecord) -> Vec<Box<Page>> {
    let mut writer = ChainWriter::new(record.id);
    let flags = writer.descriptor(TYPE_FLAGS, 24);
    flags[..8].copy_from_slice(&record.flags.invalid.to_le_bytes());
    flags[8..16].copy_from_slice(&record.flags.data_ro.to_le_bytes());
    flags[16..].copy_from_slice(&record.flags.md_ro.to_le_bytes());
    for xattr in &record.xattrs {
        writer.xattr(TYPE_XATTR, xattr);
    }
    for xattr in &record.internal {
        writer.xattr(TYPE_XATTR_INTERNAL, xattr);
    }
    match &record.map {
        MapRecord::Rle(runs) => {
            let runs: Vec<_> = runs.iter().map(|run| (run.cluster, run.len)).collect();
            writer.pairs(TYPE_EXTENT_RLE, &[], &runs, false);
        }
        MapRecord::Table {
            num_clusters,
            entries,
        } => {
            let entries: Vec<_> = entries
                .iter()
                .map(|entry| (entry.page, entry.count))
                .collect();
            writer.pairs(
                TYPE_EXTENT_TABLE,
                &num_clusters.to_le_bytes(),
                &entries,
                true,
            );
        }
    }
    writer.pages
}

/// Links the pages of a chain (`chain`: the indices of the second page, the third …) and seals
/// them.
pub fn seal_chain(pages: &mut [Box<Page>], chain: &[u32]) {
    assert_eq!(
        pages.len(),
        chain.len() + 1,
        "each page but the root needs an index"
    );
    for (number, page) in pages.iter_mut().enumerate() {
        let next = chain.get(number).copied().unwrap_or(INVALID_PAGE);
        page[NEXT_AT..NEXT_AT + 4].copy_from_slice(&next.to_le_bytes());
        seal(page);
    }
}
