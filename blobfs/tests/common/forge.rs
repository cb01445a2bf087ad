//! Journals with batches that nobody has written, whose checksums are right.

use std::sync::Arc;

use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf};
use pumice_blobfs::blobstore::format::{Page, SuperBlock};

/// Bytes of the ring's file before the ring.
const RING_AT: usize = 8192;
/// Types of records: a page, bytes of a blob, a page that becomes zero.
pub const PAGE: u16 = 1;
pub const CARRY: u16 = 3;
pub const ERASE: u16 = 8;

/// A record of a batch: its type, and its body.
pub type Record = (u16, Vec<u8>);

/// A record with bytes of a blob.
pub fn carry(blob: u64, offset: u64, bytes: &[u8]) -> Record {
    let len = u32::try_from(bytes.len()).unwrap();
    let mut body = [blob.to_le_bytes(), offset.to_le_bytes()].concat();
    body.extend(len.to_le_bytes());
    body.extend([0; 4]);
    body.extend(bytes);
    body.resize(body.len().next_multiple_of(8), 0);
    (CARRY, body)
}

/// A record with a metadata page.
pub fn page(index: u32, page: &Page) -> Record {
    (PAGE, [&index.to_le_bytes()[..], &[0; 4], page].concat())
}

/// A record of a metadata page that becomes zero.
pub fn erase(index: u32) -> Record {
    (ERASE, [index.to_le_bytes(), [0; 4]].concat())
}

/// Replaces everything in the ring of a store, which was not unloaded, by one batch of these records.
pub fn forge(dev: &Arc<dyn BlockDevice>, records: &[Record]) {
    let block = u64::from(dev.info().block_size);
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    let read = |at: u64, len: u64| {
        let buf = DmaBuf::new(usize::try_from(len).unwrap()).unwrap();
        ch.block_on(ch.read(at / block, buf)).unwrap().to_vec()
    };
    let page: Page = read(0, 4096).try_into().unwrap();
    let sb = SuperBlock::decode(&page).unwrap();
    let u32_in =
        |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let u64_in =
        |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!(page[96..104], *b"PUMJRNL1");
    let len = u64_in(&page, 112);
    assert!(len <= 1 << 20, "a longer ring is read in pieces");
    let at = u64::from(u32_in(&page, 128)) * u64::from(sb.cluster_size.get());
    let mut ring = read(at, len);
    let header = [0, 4096].map(|at| ring[at..at + 128].to_vec());
    let header = header
        .iter()
        .max_by_key(|header| u64_in(header, 32))
        .unwrap();
    let unit = u32_in(header, 60) as usize;
    let mut batch = vec![0; 64];
    for (kind, body) in records {
        batch.extend(kind.to_le_bytes());
        batch.extend([0; 2]);
        batch.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
        batch.extend(body);
    }
    let used = u32::try_from(batch.len()).unwrap();
    let mark = u64_in(header, 16) ^ u64_in(header, 24);
    batch[..4].copy_from_slice(b"PJB1");
    batch[8..16].copy_from_slice(&mark.to_le_bytes());
    batch[16..24].copy_from_slice(&header[48..56]);
    batch[24..28].copy_from_slice(&header[56..60]);
    batch[28..32].copy_from_slice(&used.div_ceil(u32_in(header, 60)).to_le_bytes());
    batch[32..36].copy_from_slice(&used.to_le_bytes());
    batch[36..40].copy_from_slice(&u32::try_from(records.len()).unwrap().to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&batch[..60]), &batch[64..]);
    batch[60..64].copy_from_slice(&crc.to_le_bytes());
    let first = RING_AT + usize::try_from(u64_in(header, 40)).unwrap() * unit;
    ring[RING_AT..].fill(0);
    ring[first..first + batch.len()].copy_from_slice(&batch);
    let mut buf = DmaBuf::new(ring.len()).unwrap();
    buf.copy_from_slice(&ring);
    ch.block_on(ch.write(at / block, buf.freeze(), false))
        .unwrap();
}
