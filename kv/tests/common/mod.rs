//! Helpers of the integration tests.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::Read as _;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use pumice::rocksdb::DBCompressionType;
use pumice::{Db, DbOptions};
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf};

/// Returns the unpacked bytes of a test image of the file system's crate.
pub fn image(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../blobfs/tests/images")
        .join(format!("{name}.zst"));
    let packed = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut decoder = ruzstd::decoding::StreamingDecoder::new(&packed[..]).unwrap();
    let mut bytes = Vec::new();
    decoder.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Makes a device in memory with these bytes.
pub fn memory_with(bytes: &[u8], block_size: u32) -> Arc<dyn BlockDevice> {
    let uri = format!("malloc://{}?block_size={block_size}", bytes.len());
    let device = pumice_bdev::open(&uri).unwrap();
    let channel = AsyncChannel::new(device.open_channel().unwrap());
    for (chunk, i) in bytes.chunks(1 << 20).zip(0_u64..) {
        if chunk.iter().any(|byte| *byte != 0) {
            let mut buf = DmaBuf::new(chunk.len()).unwrap();
            buf.copy_from_slice(chunk);
            let lba = (i << 20) / u64::from(block_size);
            channel
                .block_on(channel.write(lba, buf.freeze(), false))
                .unwrap();
        }
    }
    device
}

pub fn key(n: u64) -> Vec<u8> {
    format!("key{n:012}").into_bytes()
}

/// Returns a value of about 100 bytes that depends on `n`.
pub fn value(n: u64) -> Vec<u8> {
    let mut x = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(104);
    while bytes.len() < 100 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes
}

/// Options without compression, so that tables have the size of what is in them.
pub fn uncompressed() -> DbOptions {
    DbOptions::new().configure(|options| options.set_compression_type(DBCompressionType::None))
}

pub fn fill(db: &Db, keys: std::ops::Range<u64>) {
    for n in keys {
        db.put(key(n), value(n)).unwrap();
    }
}

pub fn check(db: &Db, keys: std::ops::Range<u64>) {
    for n in keys {
        assert_eq!(
            db.get(key(n)).unwrap().as_deref(),
            Some(&value(n)[..]),
            "key {n}"
        );
    }
}

/// Returns the names of everything below a directory.
pub fn tree(fs: &pumice::FileSystem, dir: &str) -> Vec<String> {
    let mut all = Vec::new();
    for entry in fs.list(dir).unwrap() {
        let path = format!("{}/{}", dir.trim_end_matches('/'), entry.name);
        all.push(path.clone());
        if entry.is_dir {
            all.extend(tree(fs, &path));
        }
    }
    all
}

/// Longest time of a test on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(300);

/// Turns a hang into a failure: the process ends with the test's name if this is not dropped within
/// [`LIMIT`].
#[must_use]
pub fn watchdog() -> mpsc::Sender<()> {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let (alive, dropped) = mpsc::channel();
    std::thread::spawn(move || {
        if dropped.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{name}: hangs: not done after {LIMIT:?}");
            std::process::abort();
        }
    });
    alive
}
