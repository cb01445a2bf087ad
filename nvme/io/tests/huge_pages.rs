//! The arena's memory becomes huge pages while it is in use.

use std::fs;

use pumice_io::dma::{DmaBuf, join_pages, release_free, stats};

/// Bytes of shared memory that this process has mapped as huge pages.
fn huge_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/smaps").unwrap();
    let lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("ShmemPmdMapped:"));
    lines
        .map(|kb| kb.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10)
        .sum()
}

fn filled(n: usize, len: usize) -> Vec<DmaBuf> {
    let mut bufs: Vec<DmaBuf> = (0..n).map(|_| DmaBuf::new(len).unwrap()).collect();
    for (n, buf) in bufs.iter_mut().enumerate() {
        buf.fill(u8::try_from(n % 251).unwrap());
    }
    bufs
}

fn unchanged(bufs: &[DmaBuf]) -> bool {
    let as_filled =
        |(n, buf): (usize, &DmaBuf)| buf.iter().all(|byte| usize::from(*byte) == n % 251);
    bufs.iter().enumerate().all(as_filled)
}

#[test]
fn what_is_in_use_becomes_huge_pages_and_keeps_its_bytes() {
    assert_eq!(join_pages(64).unwrap(), 0, "nothing is in use");
    let mut bufs = filled(4096, 4096);
    bufs.extend(filled(16, 1 << 20));
    bufs.truncate(4096 + 16);
    let (small, large) = bufs.split_at(4096);
    let first = match join_pages(3) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            println!("skipped: the kernel makes no huge pages of shared memory");
            return;
        }
        result => result.unwrap(),
    };
    assert_eq!(first, 3);
    let rest = join_pages(64).unwrap();
    // 32 MiB are in use, of which two chunks at each end of a region may be in part.
    assert!((10..=20).contains(&rest), "{rest}");
    assert_eq!(join_pages(64).unwrap(), 0, "each of them once");
    let huge = huge_bytes();
    assert_eq!(huge, (first + rest) as u64 * (2 << 20));
    assert!(unchanged(small) && unchanged(large));

    // A page of each is released: the others stay, and the chunks are not made whole again.
    let present = stats().present_bytes;
    let kept: Vec<DmaBuf> = bufs.into_iter().step_by(2).collect();
    let released = release_free();
    assert!(released >= 13 << 20, "{released}");
    assert_eq!(stats().present_bytes, present - released);
    assert!(huge_bytes() < huge);
    let whole = join_pages(64).unwrap();
    assert_eq!(
        stats().present_bytes,
        present - released,
        "{whole} were made"
    );
    assert!(
        kept[..2048]
            .iter()
            .enumerate()
            .all(|(n, buf)| buf.iter().all(|byte| usize::from(*byte) == 2 * n % 251))
    );
    // What is used again becomes huge pages again.
    let again = filled(12, 1 << 20);
    assert!(join_pages(64).unwrap() >= 3);
    assert!(unchanged(&again));
}
