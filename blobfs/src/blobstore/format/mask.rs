//! The masks of used metadata pages, clusters and blob ids.

use super::{PAGE_SIZE, PAGE_SIZE_U64};

/// Bytes of a mask before its bits.
pub const MASK_HEADER_LEN: usize = 5;

/// The kind of a mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaskKind {
    /// Metadata pages: roots, chain pages and extent pages.
    Pages = 0,
    /// Clusters.
    Clusters = 1,
    /// Root pages only.
    BlobIds = 2,
}

/// The reason why bytes are not the expected mask. The masks of a store that was never unloaded are
/// all zero and give this too.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MaskError {
    /// The first byte is wrong.
    #[error("the mask has type {found}, and must have {:?}", expected)]
    Kind {
        /// The expected kind.
        expected: MaskKind,
        /// The byte that was found.
        found: u8,
    },
    /// The number of bits is wrong.
    #[error("the mask has {found} bits, and must have {expected}")]
    Length {
        /// The number that the super block gives.
        expected: u32,
        /// The number in the mask.
        found: u32,
    },
    /// There are fewer bytes than the bits need.
    #[error("the mask has {bits} bits, but only {bytes} bytes for them")]
    Short {
        /// Number of bits.
        bits: u32,
        /// Number of bytes.
        bytes: usize,
    },
}

/// Returns the number of pages that a mask of `bits` bits takes on disk.
#[must_use]
pub fn mask_pages(bits: u64) -> u64 {
    (bits.div_ceil(8) + MASK_HEADER_LEN as u64).div_ceil(PAGE_SIZE_U64)
}

/// Decodes the bits of a mask to words: bit i of the mask is bit i % 64 of word i / 64. Bits past
/// the end are 0.
pub fn decode_mask(bytes: &[u8], kind: MaskKind, bits: u32) -> Result<Vec<u64>, MaskError> {
    let (head, body) = bytes
        .split_at_checked(MASK_HEADER_LEN)
        .ok_or(MaskError::Short {
            bits,
            bytes: bytes.len(),
        })?;
    if head[0] != kind as u8 {
        return Err(MaskError::Kind {
            expected: kind,
            found: head[0],
        });
    }
    let found = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
    if found != bits {
        return Err(MaskError::Length {
            expected: bits,
            found,
        });
    }
    let body = body
        .get(..(bits as usize).div_ceil(8))
        .ok_or(MaskError::Short {
            bits,
            bytes: bytes.len(),
        })?;
    let mut words = Vec::with_capacity((bits as usize).div_ceil(64));
    for chunk in body.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        words.push(u64::from_le_bytes(word));
    }
    if let Some(last) = words.last_mut()
        && !bits.is_multiple_of(64)
    {
        *last &= (1 << (bits % 64)) - 1;
    }
    Ok(words)
}

/// Encodes a mask as whole pages, padded with zeroes.
#[must_use]
pub fn encode_mask(kind: MaskKind, bits: u32, words: &[u64]) -> Vec<u8> {
    let pages = usize::try_from(mask_pages(u64::from(bits))).expect("at most 2^17 pages");
    let mut bytes = vec![0; pages * PAGE_SIZE];
    bytes[0] = kind as u8;
    bytes[1..MASK_HEADER_LEN].copy_from_slice(&bits.to_le_bytes());
    let body = &mut bytes[MASK_HEADER_LEN..][..(bits as usize).div_ceil(8)];
    for (chunk, word) in body.chunks_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        for bits in [1, 7, 8, 63, 64, 65, 191, 32_728, 32_729] {
            let mut words = vec![0xdead_beef_0bad_cafe_u64; (bits as usize).div_ceil(64)];
            if bits % 64 != 0 {
                *words.last_mut().unwrap() &= (1 << (bits % 64)) - 1;
            }
            let bytes = encode_mask(MaskKind::Clusters, bits, &words);
            assert_eq!(
                bytes.len() as u64,
                mask_pages(u64::from(bits)) * PAGE_SIZE_U64
            );
            assert_eq!(
                decode_mask(&bytes, MaskKind::Clusters, bits).unwrap(),
                words
            );
            assert!(decode_mask(&bytes, MaskKind::Pages, bits).is_err());
            assert!(decode_mask(&bytes, MaskKind::Clusters, bits + 1).is_err());
        }
    }

    #[test]
    fn length_in_pages() {
        assert_eq!(mask_pages(191), 1);
        assert_eq!(mask_pages(8 * 4091), 1);
        assert_eq!(mask_pages(8 * 4091 + 1), 2);
    }

    #[test]
    fn never_written_masks_are_refused() {
        assert!(decode_mask(&[0; 4096], MaskKind::Pages, 191).is_err());
        assert!(decode_mask(&[0; 3], MaskKind::Pages, 191).is_err());
        let short = encode_mask(MaskKind::Pages, 191, &[0; 3]);
        assert!(decode_mask(&short[..10], MaskKind::Pages, 191).is_err());
    }

    #[test]
    fn bits_past_the_end_do_not_count() {
        let mut bytes = encode_mask(MaskKind::Pages, 70, &[0, 0]);
        bytes[MASK_HEADER_LEN..].fill(0xff);
        let words = decode_mask(&bytes, MaskKind::Pages, 70).unwrap();
        assert_eq!(words, [u64::MAX, 0x3f]);
    }
}
