//! Blob ids.

use std::fmt;
use std::str::FromStr;

/// Bit 32 is set in every id. The low half is the index of the blob's root page.
const ID_BASE: u64 = 1 << 32;

/// Identifies a blob: bit 32 is set, and the low half is the index of its root metadata page. An id
/// is used again after its blob was deleted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobId(pub u64);

impl BlobId {
    /// The value on disk for "no blob".
    pub const INVALID: BlobId = BlobId(u64::MAX);

    /// Returns the id of the blob whose root is metadata page `page`.
    #[must_use]
    pub fn from_page(page: u32) -> BlobId {
        BlobId(ID_BASE | u64::from(page))
    }

    /// Returns the root page that the id names, or `None` if it is not an id of a blob.
    #[must_use]
    pub fn page(self) -> Option<u32> {
        if self.0 >> 32 != 1 {
            return None;
        }
        u32::try_from(self.0 & 0xffff_ffff).ok()
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobId({:#x})", self.0)
    }
}

/// The text is not a blob id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a blob id; write it as 0x100000000 (see `pumice blob list`)")]
pub struct ParseBlobIdError(String);

impl FromStr for BlobId {
    type Err = ParseBlobIdError;

    fn from_str(text: &str) -> Result<BlobId, ParseBlobIdError> {
        let value = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => text.parse().ok(),
        };
        let id = value.map(BlobId).filter(|id| id.page().is_some());
        id.ok_or_else(|| ParseBlobIdError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_page() {
        let id: BlobId = "0x10000001b".parse().unwrap();
        assert_eq!(id.page(), Some(0x1b));
        assert_eq!(id.to_string(), "0x10000001b");
        assert_eq!("4294967296".parse(), Ok(BlobId(1 << 32)));
        for bad in [
            "",
            "0x",
            "1",
            "0x200000000",
            "0xffffffffffffffff",
            "blob",
            "-1",
        ] {
            assert!(bad.parse::<BlobId>().is_err(), "{bad}");
        }
        assert_eq!(BlobId::INVALID.page(), None);
    }
}
