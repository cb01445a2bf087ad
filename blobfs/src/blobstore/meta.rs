//! The metadata of a blob in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::extents::ExtentMap;
use super::format::{
    BlobId, BlobRecord, EXTENTS_PER_PAGE, Flags, MapRecord, Page, TableEntry, Xattr,
    encode_extent_page,
};

/// Internal xattr with the id of the parent snapshot.
pub(crate) const SNAP: &[u8] = b"SNAP";
/// Internal xattr of an incomplete snapshot, with the id of its blob.
pub(crate) const SNAPTMP: &[u8] = b"SNAPTMP";
/// Internal xattr of a snapshot that is being deleted, with the id of the clone that takes its
/// clusters.
pub(crate) const SNAPRM: &[u8] = b"SNAPRM";
/// Internal xattr with the id of the external snapshot.
pub(crate) const EXTSNAP: &[u8] = b"EXTSNAP";

/// The treatment of clusters that a blob frees. It is stored with the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClearMethod {
    /// They are unmapped, if the device supports it.
    #[default]
    Default,
    /// They are left as they are.
    None,
    /// They are unmapped, if the device supports it.
    Unmap,
    /// They are overwritten with zeroes.
    WriteZeroes,
}

impl ClearMethod {
    pub(crate) fn from_flags(md_ro: u64) -> ClearMethod {
        match md_ro & Flags::CLEAR_METHOD {
            1 => ClearMethod::None,
            2 => ClearMethod::Unmap,
            3 => ClearMethod::WriteZeroes,
            _ => ClearMethod::Default,
        }
    }

    pub(crate) fn to_flags(self) -> u64 {
        match self {
            ClearMethod::Default => 0,
            ClearMethod::None => 1,
            ClearMethod::Unmap => 2,
            ClearMethod::WriteZeroes => 3,
        }
    }
}

/// The source of a blob's unallocated clusters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Parent {
    /// No source: they read as zeroes.
    None,
    /// A snapshot in the same store.
    Snapshot(BlobId),
    /// A device outside of the store, by the id with which the application finds it.
    External(Arc<[u8]>),
}

/// The state of a blob on disk. It is never changed in place (except for [`ExtentMap`]): a change
/// makes a new one.
#[derive(Debug, Clone)]
pub(crate) struct BlobMeta {
    pub id: BlobId,
    pub flags: Flags,
    pub xattrs: Vec<Xattr>,
    pub internal: Vec<Xattr>,
    /// Whether the blob has an extent table instead of run-length extents.
    pub table: bool,
    /// Metadata pages of the chain after the root.
    pub chain: Vec<u32>,
    /// Metadata page of each extent page, by its number in the blob.
    pub extent_pages: BTreeMap<u32, u32>,
    pub map: Arc<ExtentMap>,
    /// Extent pages and clusters behind the end of the blob that the table still names (an
    /// interrupted shrink). They are freed when the blob is written next.
    pub trailing: Trailing,
}

/// The pages and clusters of [`BlobMeta::trailing`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Trailing {
    pub pages: Vec<u32>,
    pub clusters: Vec<u32>,
}

impl BlobMeta {
    /// All clusters that it holds.
    pub fn clusters(&self) -> impl Iterator<Item = u32> {
        let allocated = self.map.allocated().map(|(_, cluster)| cluster);
        allocated.chain(self.trailing.clusters.iter().copied())
    }

    /// All of its extent pages.
    pub fn pages_of_extents(&self) -> impl Iterator<Item = u32> {
        let pages = self.extent_pages.values().chain(&self.trailing.pages);
        pages.copied()
    }

    /// The root page.
    pub fn root(&self) -> u32 {
        self.id.page().expect("the id of a blob in the store")
    }

    pub fn clear_method(&self) -> ClearMethod {
        ClearMethod::from_flags(self.flags.md_ro)
    }

    pub fn xattr(&self, name: &[u8]) -> Option<&Arc<[u8]>> {
        self.xattrs
            .iter()
            .find(|xattr| *xattr.name == *name)
            .map(|xattr| &xattr.value)
    }

    pub fn internal(&self, name: &[u8]) -> Option<&Arc<[u8]>> {
        self.internal
            .iter()
            .find(|xattr| *xattr.name == *name)
            .map(|xattr| &xattr.value)
    }

    /// Returns a blob id in an internal xattr.
    pub fn internal_id(&self, name: &[u8]) -> Option<BlobId> {
        let value = self.internal(name)?;
        Some(BlobId(u64::from_le_bytes((**value).try_into().ok()?)))
    }

    pub fn set_internal(&mut self, name: &[u8], value: &[u8]) {
        set(&mut self.internal, name, value);
        self.flags.invalid |= Flags::INTERNAL_XATTRS;
    }

    pub fn remove_internal(&mut self, name: &[u8]) {
        self.internal.retain(|xattr| *xattr.name != *name);
        if self.internal.is_empty() {
            self.flags.invalid &= !Flags::INTERNAL_XATTRS;
        }
    }

    /// Returns the source of unallocated clusters. Only thin blobs have a parent.
    pub fn parent(&self) -> Parent {
        if !self.flags.thin() {
            return Parent::None;
        }
        if self.flags.invalid & Flags::EXTERNAL_CLONE != 0 {
            return Parent::External(
                self.internal(EXTSNAP)
                    .cloned()
                    .unwrap_or_else(|| Arc::from([])),
            );
        }
        match self.internal(SNAP) {
            None => Parent::None,
            Some(_) => Parent::Snapshot(self.internal_id(SNAP).unwrap_or(BlobId::INVALID)),
        }
    }

    pub fn set_parent(&mut self, parent: &Parent) {
        self.remove_internal(SNAP);
        self.remove_internal(EXTSNAP);
        self.flags.invalid &= !Flags::EXTERNAL_CLONE;
        match parent {
            Parent::None => {}
            Parent::Snapshot(id) => {
                self.set_internal(SNAP, &id.0.to_le_bytes());
                self.flags.invalid |= Flags::THIN;
            }
            Parent::External(id) => {
                self.set_internal(EXTSNAP, id);
                self.flags.invalid |= Flags::THIN | Flags::EXTERNAL_CLONE;
            }
        }
    }

    /// Returns the record to write to disk, with `patches` applied to the map.
    pub fn record(&self, patches: &[(u64, u32)]) -> BlobRecord {
        let map = if self.table {
            let mut entries = Vec::with_capacity(self.extent_pages.len());
            let mut at = 0;
            let gap = |entries: &mut Vec<TableEntry>, count: u32| {
                if count != 0 {
                    entries.push(TableEntry { page: 0, count });
                }
            };
            for (number, page) in &self.extent_pages {
                gap(&mut entries, number - at);
                entries.push(TableEntry {
                    page: *page,
                    count: 1,
                });
                at = number + 1;
            }
            gap(&mut entries, self.map.num_pages() - at);
            MapRecord::Table {
                num_clusters: self.map.num_clusters(),
                entries,
            }
        } else {
            MapRecord::Rle(self.map.runs(patches))
        };
        BlobRecord {
            id: self.id,
            flags: self.flags,
            xattrs: self.xattrs.clone(),
            internal: self.internal.clone(),
            map,
        }
    }
}

/// Sets or replaces an xattr.
pub(crate) fn set(xattrs: &mut Vec<Xattr>, name: &[u8], value: &[u8]) {
    match xattrs.iter_mut().find(|xattr| *xattr.name == *name) {
        Some(xattr) => xattr.value = value.into(),
        None => xattrs.push(Xattr {
            name: name.into(),
            value: value.into(),
        }),
    }
}

/// Returns an extent page with some entries changed.
pub(crate) fn patched_page(meta: &BlobMeta, number: u32, patches: &[(u64, u32)]) -> Box<Page> {
    let start = u64::from(number) * EXTENTS_PER_PAGE as u64;
    let mut entries = meta.map.page(number);
    for (index, cluster) in patches {
        let at = usize::try_from(index - start).expect("within the page");
        entries[at] = *cluster;
    }
    encode_extent_page(
        meta.id,
        u32::try_from(start).expect("at most 2^32 clusters"),
        &entries,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob() -> BlobMeta {
        BlobMeta {
            id: BlobId::from_page(7),
            flags: Flags::default(),
            xattrs: Vec::new(),
            internal: Vec::new(),
            table: true,
            chain: Vec::new(),
            extent_pages: BTreeMap::new(),
            map: Arc::new(ExtentMap::new(0, 0, 1)),
            trailing: Trailing::default(),
        }
    }

    #[test]
    fn clear_methods_have_the_numbers_of_the_format() {
        use ClearMethod::{Default, None, Unmap, WriteZeroes};
        for (number, method) in (0..).zip([Default, None, Unmap, WriteZeroes]) {
            assert_eq!(method.to_flags(), number);
            assert_eq!(ClearMethod::from_flags(number), method);
        }
    }

    /// Nothing of the parent from before is left, and the flags tell of what there is.
    #[test]
    fn a_parent_takes_the_place_of_another() {
        let with_xattrs = Flags::INTERNAL_XATTRS;
        let cases = [
            (Parent::None, 0, None),
            (
                Parent::Snapshot(BlobId::from_page(3)),
                with_xattrs,
                Some(SNAP),
            ),
            (
                Parent::External(b"base"[..].into()),
                with_xattrs | Flags::EXTERNAL_CLONE,
                Some(EXTSNAP),
            ),
        ];
        for (before, ..) in &cases {
            for (after, flags, name) in &cases {
                let what = format!("{before:?}, then {after:?}");
                let mut meta = blob();
                meta.set_parent(before);
                meta.set_parent(after);
                assert_eq!(&meta.parent(), after, "{what}");
                assert_eq!(meta.flags.invalid & !Flags::THIN, *flags, "{what}");
                assert!(meta.flags.thin() || after == &Parent::None, "{what}");
                let names = meta.internal.iter().map(|xattr| &*xattr.name);
                assert!(names.eq(*name), "{what}: {:?}", meta.internal);
                // Only thin blobs have a parent.
                meta.flags.invalid &= !Flags::THIN;
                assert_eq!(meta.parent(), Parent::None, "{what}");
            }
        }
    }

    #[test]
    fn the_flag_of_internal_xattrs_stays_with_the_last_one() {
        let mut meta = blob();
        meta.set_parent(&Parent::Snapshot(BlobId::from_page(3)));
        meta.set_internal(SNAPRM, &[1; 8]);
        meta.set_parent(&Parent::None);
        assert_eq!(
            meta.flags.invalid & Flags::INTERNAL_XATTRS,
            Flags::INTERNAL_XATTRS
        );
        meta.remove_internal(SNAPRM);
        assert_eq!(meta.flags.invalid & Flags::INTERNAL_XATTRS, 0);
    }
}
