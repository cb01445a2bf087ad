//! UUIDs of devices: random, derived from properties, or given.

use std::fmt::Write as _;
use std::hash::{BuildHasher, RandomState};

/// Makes a random UUID (RFC 9562, version 4).
pub fn random() -> [u8; 16] {
    // The standard library seeds its hashers from the kernel's generator.
    let word = |n: u8| RandomState::new().hash_one(n).to_be_bytes();
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&word(0));
    bytes[8..].copy_from_slice(&word(1));
    stamp(bytes, 4)
}

/// Derives the same UUID from the same `what` (RFC 9562, version 8: our own derivation from two
/// FNV-1a hashes).
pub fn derived(what: &[u8]) -> [u8; 16] {
    let fnv = |seed: u64| {
        what.iter().fold(seed, |h, b| {
            (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
        })
    };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&fnv(0xcbf2_9ce4_8422_2325).to_be_bytes());
    bytes[8..].copy_from_slice(&fnv(0x8422_2325_cbf2_9ce4).to_be_bytes());
    stamp(bytes, 8)
}

fn stamp(mut bytes: [u8; 16], version: u8) -> [u8; 16] {
    bytes[6] = bytes[6] & 0x0f | version << 4;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

/// Returns a UUID as text, in lower case with dashes.
pub fn format(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (i, byte) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Parses a UUID: 32 hexadecimal digits, with dashes anywhere between bytes.
pub fn parse(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text.bytes().filter(|b| *b != b'-').collect();
    if digits.len() != 32 {
        return None;
    }
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).ok()?;
        if pair.starts_with('+') {
            return None;
        }
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let uuid = random();
        assert_eq!(parse(&format(&uuid)), Some(uuid));
        assert_eq!(derived(b"a"), derived(b"a"));
        assert_ne!(derived(b"a"), derived(b"b"));
        assert_eq!(parse("12"), None);
        assert_eq!(parse(&"+1".repeat(16)), None);
        assert_eq!(parse(&"é".repeat(16)), None);
    }
}
