//! The super block: page 0 of the device.

use std::fmt;
use std::str::FromStr;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{BlobId, PAGE_SIZE, Page, page_crc, seal};

const SIGNATURE: [u8; 8] = *b"SPDKBLOB";
/// The version that Pumice writes.
const VERSION: u32 = 3;
/// The version of a store whose journal may hold changes that are not in place. Readers that do not
/// know the journal refuse it.
const GUARDED: u32 = 0x8000_0003;
/// Offset of the session in the reserved bytes: behind the place of a journal, in the first 512 bytes of the page.
const SESSION_AT: usize = 400 - 96;
/// The first reserved bytes of a store with a journal.
const JOURNAL_SIGNATURE: [u8; 8] = *b"PUMJRNL1";

/// The super block in its form on disk. Positions and lengths are in pages of 4096 bytes.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[expect(
    missing_docs,
    reason = "the fields carry the names of the format's description, docs/format.md"
)]
pub struct RawSuperBlock {
    pub signature: [u8; 8],
    pub version: U32,
    pub length: U32,
    pub clean: U32,
    pub super_blob: U64,
    pub cluster_size: U32,
    pub used_page_mask_start: U32,
    pub used_page_mask_len: U32,
    pub used_cluster_mask_start: U32,
    pub used_cluster_mask_len: U32,
    pub md_start: U32,
    pub md_len: U32,
    pub bstype: [u8; 16],
    pub used_blobid_mask_start: U32,
    pub used_blobid_mask_len: U32,
    pub size: U64,
    pub io_unit_size: U32,
    pub md_page_size: U32,
    pub reserved: [u8; 3996],
    pub crc: U32,
}

const _: () = assert!(size_of::<RawSuperBlock>() == PAGE_SIZE);
const _: () = assert!(std::mem::offset_of!(RawSuperBlock, super_blob) == 20);
const _: () = assert!(std::mem::offset_of!(RawSuperBlock, bstype) == 56);
const _: () = assert!(std::mem::offset_of!(RawSuperBlock, size) == 80);
const _: () = assert!(std::mem::offset_of!(RawSuperBlock, reserved) == 96);

/// The type of a store: sixteen bytes of zero-padded text. All zeroes stand for any type.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct BsType(pub [u8; 16]);

impl BsType {
    /// No type.
    pub const NONE: BsType = BsType([0; 16]);
    /// The type of a BlobFS file system.
    pub const BLOBFS: BsType = BsType(*b"BLOBFS\0\0\0\0\0\0\0\0\0\0");
    /// The type of a store of logical volumes.
    pub const LVOLSTORE: BsType = BsType(*b"LVOLSTORE\0\0\0\0\0\0\0");
}

impl fmt::Display for BsType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self
            .0
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        write!(f, "{}", self.0[..end].escape_ascii())
    }
}

impl fmt::Debug for BsType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BsType({self})")
    }
}

impl FromStr for BsType {
    type Err = String;

    fn from_str(text: &str) -> Result<BsType, String> {
        let mut bytes = [0; 16];
        let place = bytes.get_mut(..text.len());
        let place = place.ok_or_else(|| {
            format!(
                "a blobstore type has at most 16 bytes, `{text}` has {}",
                text.len()
            )
        })?;
        place.copy_from_slice(text.as_bytes());
        Ok(BsType(bytes))
    }
}

/// The reason why bytes are not a super block that can be loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SuperBlockError {
    /// The signature is missing: most likely there is no blobstore.
    #[error("there is no blobstore signature at byte 0, but \"{}\"", .0.escape_ascii())]
    Signature([u8; 8]),
    /// The version is outside of 1 to 3.
    #[error("the blobstore has version {0:#x}, and versions 1 to 3 can be loaded")]
    Version(u32),
    /// The checksum does not match the bytes.
    #[error("the super block's checksum is {stored:#010x}, but its bytes have {computed:#010x}")]
    Crc {
        /// The checksum in the last four bytes.
        stored: u32,
        /// The checksum of the other bytes.
        computed: u32,
    },
    /// The length field is wrong.
    #[error("the super block says that it has {0} bytes, and must say 4096")]
    Length(u32),
}

/// A super block whose signature, version, length and CRC are right. Its values are not checked
/// against a device yet.
#[derive(Clone)]
pub struct SuperBlock {
    raw: Box<RawSuperBlock>,
}

impl SuperBlock {
    /// Makes an empty super block of version 3. The caller sets the other fields.
    #[must_use]
    pub fn new() -> SuperBlock {
        let mut raw =
            Box::new(RawSuperBlock::read_from_bytes(&[0; PAGE_SIZE]).expect("sizes are equal"));
        raw.signature = SIGNATURE;
        raw.version = VERSION.into();
        raw.length = 4096.into();
        raw.super_blob = BlobId::INVALID.0.into();
        SuperBlock { raw }
    }

    /// Checks signature, version, length and CRC, in this order.
    ///
    /// A rewrite that changed only `version`, for a journal, and `clean` may have been torn by a power
    /// cut, so that the CRC is that of the other state. Such a super block is accepted as not clean, so the masks are not
    /// trusted.
    pub fn decode(page: &Page) -> Result<SuperBlock, SuperBlockError> {
        let mut raw = Box::new(RawSuperBlock::read_from_bytes(page).expect("sizes are equal"));
        if raw.signature != SIGNATURE {
            return Err(SuperBlockError::Signature(raw.signature));
        }
        let version = raw.version.get();
        let has_journal = raw.reserved.starts_with(&JOURNAL_SIGNATURE);
        let is_known = (1..=VERSION).contains(&version) || (has_journal && version == GUARDED);
        if !is_known {
            return Err(SuperBlockError::Version(version));
        }
        let (stored, computed) = (raw.crc.get(), page_crc(page));
        if stored != computed {
            // `version` and `clean` are in the first sector and the CRC in the last: the states
            // differ in nothing else.
            let versions = [version, if version == GUARDED { VERSION } else { GUARDED }];
            let versions = &versions[..if has_journal { 2 } else { 1 }];
            let other = versions.iter().find(|other| {
                [0, 1].into_iter().any(|clean: u32| {
                    (raw.version, raw.clean) = ((**other).into(), clean.into());
                    let mut page: Page = [0; PAGE_SIZE];
                    page.copy_from_slice(raw.as_bytes());
                    stored == page_crc(&page)
                })
            });
            let Some(other) = other else {
                return Err(SuperBlockError::Crc { stored, computed });
            };
            tracing::warn!(
                "super block: torn while the store was loaded or unloaded; taken as not clean"
            );
            // The ring is empty when the guard comes and when it goes.
            raw.version = version.max(*other).into();
            raw.clean = 0.into();
        }
        if raw.length.get() != 4096 {
            return Err(SuperBlockError::Length(raw.length.get()));
        }
        if raw.version.get() == GUARDED {
            // The masks do not know what the ring has.
            raw.clean = 0.into();
        }
        Ok(SuperBlock { raw })
    }

    /// Returns the bytes with a new CRC. Reserved bytes are as they were read.
    #[must_use]
    pub fn encode(&self) -> Page {
        let mut page = [0; PAGE_SIZE];
        page.copy_from_slice(self.raw.as_bytes());
        seal(&mut page);
        page
    }

    /// Whether a journal may hold changes that are not in place.
    #[must_use]
    pub fn is_guarded(&self) -> bool {
        self.raw.version.get() == GUARDED
    }

    /// Sets or removes the guard of a store with a journal.
    pub(crate) fn set_guard(&mut self, guard: bool) {
        self.raw.version = if guard { GUARDED } else { VERSION }.into();
    }

    /// The number of the log in shared memory that belongs to the store while it is in use; 0 for none.
    #[must_use]
    pub fn session(&self) -> u64 {
        let bytes = &self.raw.reserved[SESSION_AT..SESSION_AT + 8];
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    }

    /// Sets the number of the log in shared memory.
    pub(crate) fn set_session(&mut self, session: u64) {
        self.raw.reserved[SESSION_AT..SESSION_AT + 8].copy_from_slice(&session.to_le_bytes());
    }

    /// Whether the store was unloaded in order. Only then are the masks valid.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.raw.clean.get() != 0
    }

    /// The type of the store.
    #[must_use]
    pub fn bstype(&self) -> BsType {
        BsType(self.raw.bstype)
    }

    /// The application's super blob, if set.
    #[must_use]
    pub fn super_blob(&self) -> Option<BlobId> {
        let id = BlobId(self.raw.super_blob.get());
        (id != BlobId::INVALID).then_some(id)
    }
}

impl Default for SuperBlock {
    fn default() -> Self {
        SuperBlock::new()
    }
}

impl std::ops::Deref for SuperBlock {
    type Target = RawSuperBlock;
    fn deref(&self) -> &RawSuperBlock {
        &self.raw
    }
}

impl std::ops::DerefMut for SuperBlock {
    fn deref_mut(&mut self) -> &mut RawSuperBlock {
        &mut self.raw
    }
}

impl fmt::Debug for SuperBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SuperBlock")
            .field("version", &self.version.get())
            .field("clean", &self.clean.get())
            .field("super_blob", &self.super_blob())
            .field("cluster_size", &self.cluster_size.get())
            .field(
                "used_page_mask",
                &(
                    self.used_page_mask_start.get(),
                    self.used_page_mask_len.get(),
                ),
            )
            .field(
                "used_cluster_mask",
                &(
                    self.used_cluster_mask_start.get(),
                    self.used_cluster_mask_len.get(),
                ),
            )
            .field(
                "used_blobid_mask",
                &(
                    self.used_blobid_mask_start.get(),
                    self.used_blobid_mask_len.get(),
                ),
            )
            .field("md", &(self.md_start.get(), self.md_len.get()))
            .field("bstype", &self.bstype())
            .field("size", &self.size.get())
            .field("io_unit_size", &self.io_unit_size.get())
            .field("md_page_size", &self.md_page_size.get())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_keeps_reserved_bytes() {
        let mut sb = SuperBlock::new();
        sb.cluster_size = (1 << 20).into();
        sb.bstype = BsType::BLOBFS.0;
        sb.reserved[100] = 0x5a;
        let again = SuperBlock::decode(&sb.encode()).unwrap();
        assert_eq!(again.encode(), sb.encode());
        assert_eq!(again.reserved[100], 0x5a);
        assert_eq!(again.bstype().to_string(), "BLOBFS");
        assert_eq!(again.super_blob(), None);
    }

    #[test]
    fn a_torn_change_of_clean_is_not_clean() {
        let mut dirty = SuperBlock::new();
        dirty.reserved[7] = 9;
        let mut clean = dirty.clone();
        clean.clean = 1.into();
        for (first, last) in [(&dirty, &clean), (&clean, &dirty)] {
            let mut page = last.encode();
            page[..512].copy_from_slice(&first.encode()[..512]);
            assert!(!SuperBlock::decode(&page).unwrap().is_clean());
            assert_eq!(SuperBlock::decode(&page).unwrap().encode(), dirty.encode());
            page[200] ^= 1;
            assert!(SuperBlock::decode(&page).is_err());
        }
        assert!(SuperBlock::decode(&clean.encode()).unwrap().is_clean());
    }

    #[test]
    fn a_store_with_a_guard_is_not_clean() {
        let mut sb = SuperBlock::new();
        sb.reserved[..8].copy_from_slice(&JOURNAL_SIGNATURE);
        sb.set_guard(true);
        sb.clean = 1.into();
        assert!(!SuperBlock::decode(&sb.encode()).unwrap().is_clean());
    }

    #[test]
    fn refusals() {
        let mut page = SuperBlock::new().encode();
        page[100] ^= 1;
        assert!(matches!(
            SuperBlock::decode(&page),
            Err(SuperBlockError::Crc { .. })
        ));
        for version in [0, 4, 0x8000_0003] {
            let mut sb = SuperBlock::new();
            sb.version = version.into();
            assert_eq!(
                SuperBlock::decode(&sb.encode()).unwrap_err(),
                SuperBlockError::Version(version)
            );
        }
        assert!(matches!(
            SuperBlock::decode(&[0; PAGE_SIZE]),
            Err(SuperBlockError::Signature(_))
        ));
        let mut sb = SuperBlock::new();
        sb.length = 512.into();
        assert_eq!(
            SuperBlock::decode(&sb.encode()).unwrap_err(),
            SuperBlockError::Length(512)
        );
    }

    #[test]
    fn a_torn_change_of_the_guard_is_guarded_and_not_clean() {
        let mut before = SuperBlock::new();
        before.reserved[..8].copy_from_slice(&JOURNAL_SIGNATURE);
        before.clean = 1.into();
        let mut after = before.clone();
        after.set_guard(true);
        after.clean = 0.into();
        for (first, last) in [(&before, &after), (&after, &before)] {
            let mut page = last.encode();
            page[..512].copy_from_slice(&first.encode()[..512]);
            let found = SuperBlock::decode(&page).unwrap();
            assert!(found.is_guarded() && !found.is_clean());
            assert_eq!(found.encode(), after.encode());
        }
    }
}
