//! The fields in the body of a descriptor: the one place that knows their order.

use super::page::{
    Descriptor, TYPE_EXTENT_PAGE, TYPE_EXTENT_RLE, TYPE_EXTENT_TABLE, TYPE_FLAGS, TYPE_PADDING,
    TYPE_XATTR, TYPE_XATTR_INTERNAL, words,
};

/// The fields of a descriptor, as they stand there: no value is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Content<'a> {
    /// The flags of a blob.
    Flags {
        /// Features without which the blob cannot be used.
        invalid: u64,
        /// Features without which its data can only be read.
        data_ro: u64,
        /// Features without which its metadata can only be read.
        md_ro: u64,
    },
    /// An xattr, of the user or of the blobstore.
    Xattr(XattrBody<'a>),
    /// Runs of clusters: first cluster and number of clusters, in pairs.
    Runs(Words<'a>),
    /// A part of the table of extent pages.
    Table {
        /// Number of clusters of the whole blob.
        num_clusters: u64,
        /// Page and count of each entry, in pairs.
        entries: Words<'a>,
    },
    /// The clusters of an extent page.
    ExtentPage {
        /// The first cluster of the blob that it describes.
        start: u32,
        /// The clusters of the store.
        clusters: Words<'a>,
    },
    /// Bytes without a meaning.
    Padding,
    /// A type that this version does not know.
    Unknown,
}

/// An xattr as it stands in a descriptor: two lengths, and the bytes behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct XattrBody<'a> {
    /// Length of the name, as the descriptor has it.
    pub name_len: u16,
    /// Length of the value, as the descriptor has it.
    pub value_len: u16,
    bytes: &'a [u8],
}

impl<'a> XattrBody<'a> {
    /// Returns the name, and everything behind it as the value, unless the name ends behind the bytes.
    #[must_use]
    pub fn name_and_value(&self) -> Option<(&'a [u8], &'a [u8])> {
        self.bytes.split_at_checked(usize::from(self.name_len))
    }
}

/// Little-endian numbers of 32 bits. An incomplete last one is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    /// The numbers one by one.
    pub fn iter(self) -> impl Iterator<Item = u32> + 'a {
        words(self.0)
    }

    /// The numbers two by two. A last one without a second is left out.
    pub fn pairs(self) -> impl Iterator<Item = (u32, u32)> + 'a {
        let pairs = self.0.chunks_exact(8).map(Words);
        pairs.filter_map(|pair| {
            let mut words = pair.iter();
            Some((words.next()?, words.next()?))
        })
    }
}

impl<'a> Descriptor<'a> {
    /// Returns the fields of the body, unless it is too short for them.
    #[must_use]
    pub fn content(&self) -> Option<Content<'a>> {
        let body = self.body;
        Some(match self.kind {
            TYPE_FLAGS => Content::Flags {
                invalid: long(body, 0)?,
                data_ro: long(body, 8)?,
                md_ro: long(body, 16)?,
            },
            TYPE_XATTR | TYPE_XATTR_INTERNAL => {
                let (head, bytes) = body.split_first_chunk::<4>()?;
                Content::Xattr(XattrBody {
                    name_len: u16::from_le_bytes([head[0], head[1]]),
                    value_len: u16::from_le_bytes([head[2], head[3]]),
                    bytes,
                })
            }
            TYPE_EXTENT_RLE => Content::Runs(Words(body)),
            TYPE_EXTENT_TABLE => Content::Table {
                num_clusters: long(body, 0)?,
                entries: Words(&body[8..]),
            },
            TYPE_EXTENT_PAGE => Content::ExtentPage {
                start: words(body).next()?,
                clusters: Words(&body[4..]),
            },
            TYPE_PADDING => Content::Padding,
            _ => Content::Unknown,
        })
    }
}

fn long(body: &[u8], at: usize) -> Option<u64> {
    let bytes = body.get(at..)?.first_chunk::<8>()?;
    Some(u64::from_le_bytes(*bytes))
}
