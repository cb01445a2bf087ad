//! Helpers of the integration tests.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod between;
pub mod faults;
pub mod journal;
pub mod random;
pub mod strict;
pub mod watchdog;

use std::io::Read as _;
use std::path::PathBuf;
use std::sync::Arc;

use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf};
use pumice_blobfs::blobstore::{Blob, BlobId, Blobstore};
use sha2::{Digest, Sha256};

/// Returns the path of a file in tests/images.
pub fn image_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/images")
        .join(name)
}

/// Returns the bytes of an image.
pub fn image(name: &str) -> Vec<u8> {
    let packed = std::fs::read(image_path(&format!("{name}.zst"))).unwrap();
    let mut decoder = ruzstd::decoding::StreamingDecoder::new(&packed[..]).unwrap();
    let mut bytes = Vec::new();
    decoder.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Makes an empty device in memory.
pub fn memory(len: u64, block_size: u32) -> Arc<dyn BlockDevice> {
    pumice_bdev::open(&format!("malloc://{len}?block_size={block_size}")).unwrap()
}

/// Makes a device in memory with these bytes.
pub fn memory_with(bytes: &[u8], block_size: u32) -> Arc<dyn BlockDevice> {
    let dev = memory(bytes.len() as u64, block_size);
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let zeroes = vec![0; 1 << 20];
    for (chunk, i) in bytes.chunks(1 << 20).zip(0u64..) {
        if *chunk != zeroes[..chunk.len()] {
            let mut buf = DmaBuf::new(chunk.len()).unwrap();
            buf.copy_from_slice(chunk);
            let lba = (i << 20) / u64::from(block_size);
            ch.block_on(ch.write(lba, buf.freeze(), false)).unwrap();
        }
    }
    dev
}

/// Returns all bytes of a device.
pub fn content(dev: &Arc<dyn BlockDevice>) -> Vec<u8> {
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let info = dev.info();
    let mut bytes = Vec::new();
    while bytes.len() as u64 != info.len_bytes() {
        let len = (info.len_bytes() - bytes.len() as u64).min(1 << 20);
        let lba = bytes.len() as u64 / u64::from(info.block_size);
        let buf = DmaBuf::new(usize::try_from(len).unwrap()).unwrap();
        bytes.extend_from_slice(&ch.block_on(ch.read(lba, buf)).unwrap());
    }
    bytes
}

/// Reads a range of a blob.
pub fn read(blob: &Blob, offset: u64, len: usize) -> Vec<u8> {
    blob.read_at(offset, DmaBuf::new(len).unwrap())
        .unwrap()
        .to_vec()
}

/// Writes to a blob.
pub fn write(blob: &Blob, offset: u64, bytes: &[u8]) {
    let mut buf = DmaBuf::new(bytes.len()).unwrap();
    buf.copy_from_slice(bytes);
    blob.write_at(offset, buf.freeze(), false).unwrap();
}

/// Returns the whole content of a blob.
pub fn whole(blob: &Blob) -> Vec<u8> {
    let mut bytes = Vec::new();
    // It is read in parts of odd length, so that reads begin and end inside of clusters.
    let step = 3 * 1024 * 1024 - 4096;
    while (bytes.len() as u64) < blob.len_bytes() {
        let len = (blob.len_bytes() - bytes.len() as u64).min(step);
        bytes.extend(read(
            blob,
            bytes.len() as u64,
            usize::try_from(len).unwrap(),
        ));
    }
    bytes
}

/// Returns the SHA-256 of bytes, as text.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Returns one image's part of IMAGES.txt.
pub fn facts(name: &str) -> String {
    let all = std::fs::read_to_string(image_path("IMAGES.txt")).unwrap();
    let mut parts = all.split("################ ");
    parts
        .find(|part| part.starts_with(&format!("{name} ")))
        .unwrap()
        .to_owned()
}

/// Returns the checksums of blobs in a part of IMAGES.txt.
pub fn blob_sums(facts: &str) -> Vec<(BlobId, String)> {
    let lines = facts.lines().filter_map(|line| {
        line.split_once("  ")
            .filter(|(_, name)| name.ends_with(".bin"))
    });
    let lines = lines.filter(|(_, name)| name.starts_with("0x"));
    lines
        .map(|(sum, name)| {
            (
                name.trim_end_matches(".bin").parse().unwrap(),
                sum.to_owned(),
            )
        })
        .collect()
}

/// Describes the blobs of a store in the form in which IMAGES.txt has SPDK's report.
pub fn listing(store: &Blobstore) -> Vec<String> {
    let mut lines = Vec::new();
    let ids = store.blobs();
    let blobs: Vec<Blob> = ids.iter().map(|id| store.open(*id).unwrap()).collect();
    let has_child = |id: BlobId| {
        blobs
            .iter()
            .any(|blob| blob.parent() == pumice_blobfs::blobstore::Parent::Snapshot(id))
    };
    for blob in &blobs {
        let parent = match blob.parent() {
            pumice_blobfs::blobstore::Parent::Snapshot(id) => Some(id.to_string()),
            _ => None,
        };
        lines.push(format!(
            "blob {} clusters={} allocated={} thin={} ro={} snapshot={} clone={} parent={}",
            blob.id(),
            blob.num_clusters(),
            blob.num_allocated(),
            u8::from(blob.is_thin()),
            u8::from(blob.is_read_only()),
            u8::from(has_child(blob.id())),
            u8::from(parent.is_some()),
            parent.as_deref().unwrap_or("none"),
        ));
        for (name, value) in blob.xattrs() {
            let hex: String = value
                .iter()
                .take(48)
                .map(|byte| format!("{byte:02x}"))
                .collect();
            let more = if value.len() > 48 { "..." } else { "" };
            lines.push(format!(
                "  xattr '{}' len={} hex={hex}{more}",
                String::from_utf8_lossy(&name),
                value.len()
            ));
        }
    }
    lines
}
