//! Free memory of the arena goes back to the system.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use pumice_io::dma::{DmaBuf, can_release, release_free, stats};

/// The memory that the arena's regions take: what their files have.
fn present_bytes() -> u64 {
    let fds = fs::read_dir("/proc/self/fd").unwrap();
    let regions = fds.map(|fd| fd.unwrap().path()).filter(|fd| {
        let name = fs::read_link(fd);
        name.is_ok_and(|name| name.to_string_lossy().contains("pumice-dma"))
    });
    regions
        .map(|fd| fs::metadata(fd).unwrap().blocks() * 512)
        .sum()
}

fn filled(n: usize, len: usize) -> Vec<DmaBuf> {
    let mut bufs: Vec<DmaBuf> = (0..n).map(|_| DmaBuf::new(len).unwrap()).collect();
    bufs.iter_mut().for_each(|buf| buf.fill(7));
    bufs
}

#[test]
fn free_pages_go_back_and_used_ones_stay() {
    const MIB: u64 = 1 << 20;
    let mut bufs = filled(4096, 4096);
    bufs.extend(filled(16, 1 << 20));
    let before = present_bytes();
    assert!(before >= 32 * MIB, "{before}");
    // Every other one stays in use.
    let kept: Vec<DmaBuf> = bufs
        .into_iter()
        .enumerate()
        .filter_map(|(n, buf)| (n % 2 == 0).then_some(buf))
        .collect();
    assert!(can_release());
    let slack = stats().slack_bytes() as u64;
    assert!((13 * MIB..=20 * MIB).contains(&slack), "{slack}");
    let released = release_free() as u64;
    // The thread's cache keeps a few blocks.
    assert!(released >= 13 * MIB, "{released}");
    let left = present_bytes();
    assert!(left <= before - 13 * MIB, "{left} of {before}");
    assert!(kept.iter().all(|buf| buf.iter().all(|byte| *byte == 7)));
    assert_eq!(release_free(), 0, "once is enough");
    assert_eq!(stats().slack_bytes(), 0);
    // It is used again, and goes back again.
    drop(filled(8, 1 << 20));
    drop(kept);
    assert!(release_free() as u64 >= 13 * MIB);
    assert!(present_bytes() <= 5 * MIB, "{}", present_bytes());
}
