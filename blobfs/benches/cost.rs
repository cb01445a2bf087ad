//! Does one kind of operation so many times, for `scripts/fs-cost`, which counts their instructions.
//!
//! `cost KIND COUNT`, on a disk that is memory, with a journal. Without arguments it does a few of each.

use std::hint::black_box;
use std::sync::Arc;

use pumice_blobfs::fs::{Access, File, FileSystem, FormatOptions, MountOptions, OpenOptions};

/// The length of the file that is read in bytes.
const LEN: u64 = 4 << 20;

fn main() {
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| arg != "--bench")
        .collect();
    match &args[..] {
        [kind, count] => repeat(kind, count.parse().expect("COUNT is a number")),
        [] => ["append", "hit", "pinned", "miss", "sync"]
            .into_iter()
            .for_each(|kind| repeat(kind, 10)),
        _ => panic!("cost KIND COUNT"),
    }
}

fn repeat(kind: &str, count: u64) {
    let device = pumice_bdev::open("malloc://256M").unwrap();
    FileSystem::format(Arc::clone(&device), &FormatOptions::default()).unwrap();
    // No thread whose instructions would depend on time. What was written is in the cache, or the cache has room for nothing.
    let cache_bytes = if kind == "miss" { 0 } else { 64 << 20 };
    let options = MountOptions::default()
        .huge_pages(false)
        .cache_bytes(cache_bytes);
    let fs = FileSystem::mount(device, &options).unwrap();
    let file = fs.open("/file", OpenOptions::FRESH).unwrap();
    file.append(&vec![7; usize::try_from(LEN).unwrap()])
        .unwrap();
    file.sync().unwrap();
    file.advise(Access::Random);
    let log = fs.open("/log", OpenOptions::FRESH).unwrap();
    log.append(&[1; 138]).unwrap();
    log.sync().unwrap();
    let mut page = [0; 4096];
    for n in 0..count {
        once(kind, &file, &log, n * 37 % (LEN / 4096) * 4096, &mut page);
    }
    black_box(&page);
    drop((file, log));
    fs.unmount().unwrap();
}

/// Does it once, at this offset if it reads.
fn once(kind: &str, file: &File, log: &File, off: u64, page: &mut [u8]) {
    match kind {
        "append" => log.append(&[2; 138]).unwrap(),
        "sync" => {
            log.append(&[2; 138]).unwrap();
            log.sync().unwrap();
        }
        "hit" | "miss" => assert_eq!(file.read_at(off, page).unwrap(), 4096),
        "pinned" => drop(black_box(
            file.read_pinned(off, 4096).expect("it is cached"),
        )),
        _ => panic!("{kind}: there are append, hit, pinned, miss and sync"),
    }
}
