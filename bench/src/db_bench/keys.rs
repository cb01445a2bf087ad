//! Keys from numbers, as RocksDB's tool makes them.

/// How a number becomes a key: an optional prefix of its own, the number's low bytes with the most
/// significant first (eight at most), and `'0'` up to the length.
#[derive(Debug, Clone, Copy)]
pub struct KeyFormat {
    key_len: usize,
    prefix_len: usize,
    prefixes: u64,
}

impl KeyFormat {
    /// Keys of `key_len` bytes for numbers up to `num`. With `keys_per_prefix` above 0 the first
    /// `prefix_len` bytes tell one of `num / keys_per_prefix` prefixes.
    #[must_use]
    pub fn new(key_len: usize, prefix_len: usize, keys_per_prefix: u64, num: u64) -> Self {
        let prefixes = num.checked_div(keys_per_prefix).unwrap_or(0);
        let prefix_len = if keys_per_prefix > 0 {
            prefix_len.min(key_len)
        } else {
            0
        };
        Self {
            key_len,
            prefix_len,
            prefixes,
        }
    }

    /// A buffer for [`KeyFormat::fill`].
    #[must_use]
    pub fn buffer(&self) -> Vec<u8> {
        vec![b'0'; self.key_len]
    }

    /// Bytes of a key.
    #[must_use]
    pub fn len(&self) -> usize {
        self.key_len
    }

    /// Never: a key has at least one byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.key_len == 0
    }

    /// Writes the key of `v` into a buffer of [`KeyFormat::buffer`] (its padding is already there).
    #[inline]
    pub fn fill(&self, v: u64, key: &mut [u8]) {
        let mut at = 0;
        if self.prefix_len > 0 {
            put_low_bytes(v % self.prefixes.max(1), &mut key[..self.prefix_len.min(8)]);
            at = self.prefix_len;
        }
        let end = self.key_len.min(at + 8);
        put_low_bytes(v, &mut key[at..end]);
    }

    /// The number that a key was made from, or `None` when it was not made by this format.
    #[must_use]
    pub fn parse(&self, key: &[u8]) -> Option<u64> {
        if key.len() != self.key_len {
            return None;
        }
        let number = key.get(self.prefix_len..self.key_len.min(self.prefix_len + 8))?;
        let v = number.iter().fold(0_u64, |v, b| (v << 8) | u64::from(*b));
        let mut made = self.buffer();
        self.fill(v, &mut made);
        (made == key).then_some(v)
    }

    /// Whether the keys of all numbers below `num` differ.
    #[must_use]
    pub fn distinct_below(&self, num: u64) -> bool {
        let bytes = self.key_len.saturating_sub(self.prefix_len).min(8);
        bytes == 8 || num <= 1_u64 << (8 * bytes)
    }
}

/// The low bytes of `v`, most significant first.
#[inline]
fn put_low_bytes(v: u64, out: &mut [u8]) {
    let bytes = v.to_be_bytes();
    if let Some(skip) = bytes.len().checked_sub(out.len()) {
        out.copy_from_slice(&bytes[skip..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(f: KeyFormat, v: u64) -> Vec<u8> {
        let mut k = f.buffer();
        f.fill(v, &mut k);
        k
    }

    #[test]
    fn sixteen_bytes_are_a_number_and_padding() {
        let f = KeyFormat::new(16, 0, 0, 1000);
        assert_eq!(key(f, 0x0102), b"\0\0\0\0\0\0\x01\x0200000000");
        assert_eq!(f.parse(&key(f, 999)), Some(999));
        assert_eq!(f.parse(b"\0\0\0\0\0\0\x01\x0200000001"), None);
        assert_eq!(f.parse(b"short"), None);
    }

    #[test]
    fn a_short_key_keeps_the_low_bytes() {
        let f = KeyFormat::new(4, 0, 0, 1000);
        assert_eq!(key(f, 0x0001_0203), b"\0\x01\x02\x03");
        assert!(f.distinct_below(1 << 32) && !f.distinct_below((1 << 32) + 1));
    }

    #[test]
    fn prefixes_come_first() {
        // 100 numbers, 10 to a prefix: ten prefixes of 4 bytes.
        let f = KeyFormat::new(16, 4, 10, 100);
        assert_eq!(key(f, 37), b"\0\0\0\x07\0\0\0\0\0\0\0\x250000");
        assert_eq!(f.parse(&key(f, 37)), Some(37));
        let long = KeyFormat::new(24, 12, 10, 100);
        assert_eq!(
            key(long, 37),
            b"\0\0\0\0\0\0\0\x070000\0\0\0\0\0\0\0\x250000"
        );
        assert_eq!(long.parse(&key(long, 37)), Some(37));
        let all_prefix = KeyFormat::new(8, 8, 10, 100);
        assert!(!all_prefix.distinct_below(100));
        assert_eq!(key(all_prefix, 37).len(), 8);
    }

    #[test]
    fn order_of_numbers_is_order_of_keys() {
        let f = KeyFormat::new(16, 0, 0, 0);
        let keys: Vec<_> = [0, 1, 255, 256, 70_000, u64::MAX].map(|v| key(f, v)).into();
        assert!(keys.windows(2).all(|w| w[0] < w[1]));
    }
}
