//! Counts the durable states that tests have checked.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;

use super::CrashImage;

/// Records that this state was checked and found right, if `PUMICE_STATES` names a directory: the number
/// of its contents is appended to the file `kind` there, as eight bytes. Equal contents have equal
/// numbers, so that the distinct states can be counted over threads, processes and runs.
///
/// # Panics
/// Panics when the file cannot be written: the count would be wrong.
pub fn checked(kind: &str, image: &CrashImage) {
    let Some(dir) = std::env::var_os("PUMICE_STATES") else {
        return;
    };
    let file = PathBuf::from(dir).join(kind);
    let append = |mut file: File| file.write_all(&image.number().to_le_bytes());
    let file = OpenOptions::new().create(true).append(true).open(file);
    file.and_then(append)
        .expect("a directory that can be written, in PUMICE_STATES");
}

impl CrashImage {
    /// A number of the contents, which with overwhelming probability no others have.
    fn number(&self) -> u64 {
        let mut number = mix(self.len_bytes());
        for (at, chunk) in self.written_chunks() {
            // A chunk of zeroes counts as one that was never written.
            if chunk.iter().any(|byte| *byte != 0) {
                number = mix(number ^ at as u64);
                for word in chunk.chunks_exact(8) {
                    let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
                    number = mix(number ^ word);
                }
            }
        }
        number
    }
}

/// A bijection that spreads each bit over all.
fn mix(word: u64) -> u64 {
    let product = u128::from(word ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
    #[expect(clippy::cast_possible_truncation, reason = "both halves are used")]
    let folded = (product as u64) ^ ((product >> 64) as u64);
    folded.rotate_left(29)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_contents_have_equal_numbers_and_others_have_others() {
        let mut numbers = std::collections::HashSet::new();
        let zeroes = CrashImage::zeroed(1 << 20);
        numbers.insert(zeroes.number());
        for at in [0, 7, 8, 65_535, 65_536, (1 << 20) - 1] {
            for byte in [1, 2, 128] {
                let mut image = zeroes.clone();
                image.write(at, &[byte]);
                assert!(numbers.insert(image.number()), "{at} {byte}");
                assert_eq!(
                    CrashImage::from_bytes(&image.to_vec()).number(),
                    image.number()
                );
                image.write(at, &[0]);
                assert_eq!(image.number(), zeroes.number(), "written back");
            }
        }
        // Two words that change places.
        let mut image = zeroes.clone();
        image.write(0, &[1]);
        image.write(8, &[2]);
        let mut other = zeroes.clone();
        other.write(0, &[2]);
        other.write(8, &[1]);
        assert_ne!(image.number(), other.number());
        assert!(numbers.insert(CrashImage::zeroed(2 << 20).number()));
    }
}
