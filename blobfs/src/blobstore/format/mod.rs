//! The on-disk format: super block, masks, metadata pages and their descriptors.
//!
//! This is pure encoding and decoding without I/O. Decoding is total: any bytes give a value or a
//! typed error that names the place, in memory bounded by the size of the input. The format is that
//! of SPDK's blobstore, versions 1 to 3; `docs/format.md` describes it.

mod blob;
mod chain;
mod content;
mod id;
mod mask;
mod page;
mod super_block;

pub use blob::{BlobReader, BlobRecord, Flags, MapRecord, Run, TableEntry, Xattr};
pub use chain::{encode_blob, seal_chain};
pub use content::{Content, Words, XattrBody};
pub use id::{BlobId, ParseBlobIdError};
pub use mask::{MASK_HEADER_LEN, MaskError, MaskKind, decode_mask, encode_mask, mask_pages};
pub use page::{
    Descriptor, Descriptors, ExtentPage, PageError, PageHeader, PageProblem, TYPE_EXTENT_PAGE,
    TYPE_EXTENT_RLE, TYPE_EXTENT_TABLE, TYPE_FLAGS, TYPE_PADDING, TYPE_XATTR, TYPE_XATTR_INTERNAL,
    decode_extent_page, encode_extent_page,
};
pub use super_block::{BsType, RawSuperBlock, SuperBlock, SuperBlockError};

/// Number of bytes of a metadata page and of the super block, and the unit of positions in the
/// super block.
pub const PAGE_SIZE: usize = 4096;
/// [`PAGE_SIZE`] for arithmetic on device offsets.
pub const PAGE_SIZE_U64: u64 = 4096;
/// The value of `next` in the last page of a chain.
pub const INVALID_PAGE: u32 = u32::MAX;
/// Number of clusters that a full extent page describes.
pub const EXTENTS_PER_PAGE: usize = 512;
/// Number of bytes of a metadata page that hold descriptors.
pub const DESCRIPTORS_LEN: usize = 4072;
/// Length of the largest descriptor body: it has to fit a page with its own header.
pub const MAX_DESCRIPTOR_BODY: usize = DESCRIPTORS_LEN - 5;
/// Largest sum of the lengths of an xattr's name and value.
pub const MAX_XATTR_LEN: usize = MAX_DESCRIPTOR_BODY - 4;

/// A metadata page in memory.
pub type Page = [u8; PAGE_SIZE];

/// Computes the CRC-32C of a page without its last four bytes, which store it.
#[must_use]
pub fn page_crc(page: &Page) -> u32 {
    crc32c::crc32c(&page[..PAGE_SIZE - 4])
}

/// Returns the CRC that a page stores.
#[must_use]
pub fn stored_crc(page: &Page) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&page[PAGE_SIZE - 4..]);
    u32::from_le_bytes(bytes)
}

/// Writes the CRC of the page into its last four bytes.
pub fn seal(page: &mut Page) {
    let crc = page_crc(page);
    page[PAGE_SIZE - 4..].copy_from_slice(&crc.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_is_castagnoli() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xE306_9283);
        let mut page = [7; PAGE_SIZE];
        seal(&mut page);
        assert_eq!(stored_crc(&page), page_crc(&page));
    }

    #[test]
    fn what_is_read_only_has_no_metadata_to_change() {
        let flags = |data_ro, md_ro| Flags {
            invalid: 0,
            data_ro,
            md_ro,
        };
        for (data_ro, md_ro, data, md) in [
            (0, 0, false, false),
            (0, Flags::CLEAR_METHOD, false, false),
            (0, 4, false, true),
            (Flags::READ_ONLY, 0, true, true),
            (1 << 63, 0, true, true),
        ] {
            let flags = flags(data_ro, md_ro);
            assert_eq!(flags.data_read_only(), data, "{flags:?}");
            assert_eq!(flags.md_read_only(), md, "{flags:?}");
        }
    }
}
