//! The bytes of the journal: its place in the super block, the headers of the ring, batches and
//! their records. `docs/format.md` has the tables.
//!
//! This is encoding and decoding without I/O. Decoding is total: any bytes give a value or `None`.

use std::sync::Arc;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::super::carried::Carried;
use super::super::format::{BlobId, PAGE_SIZE, Page, SuperBlock};

/// Bytes of the ring's file before the ring: two headers, a page each.
pub(crate) const RING_AT: u64 = 8192;
/// The byte where the second header begins; the first is at 0.
pub(crate) const SECOND_HEADER_AT: u64 = 4096;
/// Bytes of a header.
pub(crate) const HEADER_LEN: usize = 128;
/// Bytes of a batch before its records.
pub(crate) const BATCH_LEN: usize = 64;
/// A batch takes at most this part of the ring.
pub(crate) const MOST_OF_RING: u64 = 4;

const PLACE_SIGNATURE: [u8; 8] = *b"PUMJRNL1";
const HEADER_SIGNATURE: [u8; 8] = *b"PUMJHEAD";
const BATCH_SIGNATURE: [u8; 4] = *b"PJB1";
const VERSION: u32 = 1;
/// A metadata page's new content.
const PAGE: u16 = 1;
/// Bytes of a blob.
const CARRY: u16 = 3;
/// The flag of bytes with which the content of the blob ends.
const ENDS: u32 = 1;
/// A metadata page that becomes zero.
const ERASE: u16 = 8;
/// Bytes of a record before its body.
const RECORD_LEN: usize = 8;
/// Bytes of the body of a record before a page.
const INDEX_LEN: usize = 8;
/// Bytes of the body of a record before those of a blob.
const CARRY_LEN: usize = 24;

/// The place of the journal, in the reserved bytes of the super block.
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawRingPlace {
    signature: [u8; 8],
    blob: U64,
    len: U64,
    extents: U32,
    crc: U32,
    cluster: U32,
    count: U32,
}

/// The place of the ring's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RingPlace {
    /// The blob that holds it.
    pub blob: BlobId,
    /// The length in bytes.
    pub len: u64,
    /// The first cluster.
    pub cluster: u32,
    /// The number of clusters, which follow one another.
    pub count: u32,
}

impl RingPlace {
    /// Reads the place. Returns `None` if the super block has none, and the reason if what it has
    /// cannot be used.
    pub fn read(sb: &SuperBlock) -> Result<Option<RingPlace>, String> {
        let (raw, _) =
            RawRingPlace::read_from_prefix(&sb.reserved).expect("the reserved bytes are longer");
        if raw.signature != PLACE_SIGNATURE {
            return Ok(None);
        }
        if raw.crc.get() != raw.sum() {
            return Err("its place in the super block has a wrong checksum".to_owned());
        }
        if raw.extents.get() != 1 {
            return Err(format!(
                "it is in {} pieces; a journal in one piece is supported",
                raw.extents.get()
            ));
        }
        Ok(Some(RingPlace {
            blob: BlobId(raw.blob.get()),
            len: raw.len.get(),
            cluster: raw.cluster.get(),
            count: raw.count.get(),
        }))
    }

    /// Writes the place into a super block.
    pub fn write(&self, sb: &mut SuperBlock) {
        let mut raw = RawRingPlace {
            signature: PLACE_SIGNATURE,
            blob: self.blob.0.into(),
            len: self.len.into(),
            extents: 1.into(),
            crc: 0.into(),
            cluster: self.cluster.into(),
            count: self.count.into(),
        };
        raw.crc = raw.sum().into();
        let bytes = raw.as_bytes();
        sb.reserved[..bytes.len()].copy_from_slice(bytes);
    }

    /// Removes the place from a super block, and the guard.
    pub fn remove(sb: &mut SuperBlock) {
        sb.set_guard(false);
        sb.reserved[..size_of::<RawRingPlace>()].fill(0);
    }
}

impl RawRingPlace {
    fn sum(&self) -> u32 {
        let bytes = self.as_bytes();
        // The checksum itself lies between the two parts.
        crc32c::crc32c_append(crc32c::crc32c(&bytes[..28]), &bytes[32..])
    }
}

#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    signature: [u8; 8],
    version: U32,
    length: U32,
    epoch: U64,
    salt: U64,
    turn: U64,
    tail: U64,
    sequence: U64,
    before: U32,
    unit: U32,
    units: U64,
    blob: U64,
    zero: [u8; 44],
    crc: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);
const _: () = assert!(std::mem::offset_of!(RawHeader, units) == 64);

/// A place in the sequence of batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spot {
    /// The unit of the ring where the batch begins, unless it does not fit before the ring's end:
    /// then it begins at unit 0.
    pub at: u64,
    /// The sequence number of the batch.
    pub sequence: u64,
    /// The checksum of the batch before it; 0 if there is none in its epoch.
    pub before: u32,
}

impl Spot {
    /// The beginning of an epoch.
    pub fn first(at: u64) -> Spot {
        Spot {
            at,
            sequence: 1,
            before: 0,
        }
    }
}

/// A header of the ring. Of two, the one with the greater turn counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub epoch: u64,
    /// Random in each epoch.
    pub salt: u64,
    pub turn: u64,
    /// The oldest batch that is not in place.
    pub tail: Spot,
    /// Bytes of a unit of the ring: of a block of the device.
    pub unit: u32,
    /// Number of units of the ring.
    pub units: u64,
    pub blob: BlobId,
}

impl Header {
    /// Returns the header in its form on disk.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut raw = RawHeader {
            signature: HEADER_SIGNATURE,
            version: VERSION.into(),
            length: 128.into(),
            epoch: self.epoch.into(),
            salt: self.salt.into(),
            turn: self.turn.into(),
            tail: self.tail.at.into(),
            sequence: self.tail.sequence.into(),
            before: self.tail.before.into(),
            unit: self.unit.into(),
            units: self.units.into(),
            blob: self.blob.0.into(),
            zero: [0; 44],
            crc: 0.into(),
        };
        raw.crc = crc32c::crc32c(&raw.as_bytes()[..HEADER_LEN - 4]).into();
        let mut bytes = [0; HEADER_LEN];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// Reads the header of a ring in this blob's file of `len` bytes.
    pub fn decode(bytes: &[u8; HEADER_LEN], blob: BlobId, len: u64) -> Option<Header> {
        let raw = RawHeader::ref_from_bytes(bytes).expect("sizes are equal");
        if raw.signature != HEADER_SIGNATURE
            || raw.version.get() != VERSION
            || raw.crc.get() != crc32c::crc32c(&bytes[..HEADER_LEN - 4])
            || raw.blob.get() != blob.0
        {
            return None;
        }
        let header = Header {
            epoch: raw.epoch.get(),
            salt: raw.salt.get(),
            turn: raw.turn.get(),
            tail: Spot {
                at: raw.tail.get(),
                sequence: raw.sequence.get(),
                before: raw.before.get(),
            },
            unit: raw.unit.get(),
            units: raw.units.get(),
            blob,
        };
        let fits = header.unit.is_power_of_two()
            && (512..=4096).contains(&header.unit)
            && len.saturating_sub(RING_AT) / u64::from(header.unit) == header.units
            && header.tail.at < header.units
            && header.turn.max(header.tail.sequence) < u64::MAX / 2;
        fits.then_some(header)
    }

    /// The mark of this epoch's batches.
    pub fn mark(&self) -> u64 {
        self.epoch ^ self.salt
    }
}

#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawBatch {
    signature: [u8; 4],
    flags: U16,
    zero: U16,
    mark: U64,
    sequence: U64,
    before: U32,
    units: U32,
    used: U32,
    records: U32,
    zeroes: [u8; 20],
    crc: U32,
}

const _: () = assert!(size_of::<RawBatch>() == BATCH_LEN);

/// The beginning of a batch. Nothing in it has been compared with a checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchHead {
    /// None is defined. A batch with one is of a newer version.
    pub flags: u16,
    /// [`Header::mark`] of its epoch.
    pub mark: u64,
    pub sequence: u64,
    /// The checksum of the batch before it.
    pub before: u32,
    /// The length in units.
    pub units: u64,
    /// The number of bytes without those that fill the last unit.
    pub used: usize,
    pub records: u32,
    pub crc: u32,
}

impl BatchHead {
    /// Reads the beginning of a batch, if this is one.
    pub fn decode(bytes: &[u8; BATCH_LEN]) -> Option<BatchHead> {
        let raw = RawBatch::ref_from_bytes(bytes).expect("sizes are equal");
        (raw.signature == BATCH_SIGNATURE).then(|| BatchHead {
            flags: raw.flags.get(),
            mark: raw.mark.get(),
            sequence: raw.sequence.get(),
            before: raw.before.get(),
            units: raw.units.get().into(),
            used: raw.used.get() as usize,
            records: raw.records.get(),
            crc: raw.crc.get(),
        })
    }
}

/// A page's new content. Only its index says which page it is.
pub(crate) type Image = (u32, Arc<Page>);

/// Returns the number of bytes of a batch of these pages.
pub(crate) fn batch_bytes(pages: &[Image]) -> u64 {
    BATCH_LEN as u64
        + pages
            .iter()
            .map(|(_, page)| record_bytes(page))
            .sum::<u64>()
}

/// Returns the number of bytes of a page's record.
pub(crate) fn record_bytes(page: &Page) -> u64 {
    let body = if is_blank(page) { 0 } else { PAGE_SIZE };
    (RECORD_LEN + INDEX_LEN + body) as u64
}

/// Returns the number of bytes of a record that carries `len` bytes.
pub(crate) fn carried_bytes(len: u64) -> u64 {
    (RECORD_LEN + CARRY_LEN) as u64 + len.next_multiple_of(8)
}

fn is_blank(page: &Page) -> bool {
    page.iter().all(|byte| *byte == 0)
}

/// Returns a batch, which fills whole units, and its checksum.
pub(crate) fn encode_batch<'a>(
    mark: u64,
    spot: Spot,
    unit: usize,
    pages: impl IntoIterator<Item = &'a Image>,
    carried: impl IntoIterator<Item = &'a Carried>,
) -> (Vec<u8>, u32) {
    let mut bytes = vec![0; BATCH_LEN];
    let mut records = 0;
    for (index, page) in pages {
        let (kind, body): (u16, &[u8]) = if is_blank(page) {
            (ERASE, &[])
        } else {
            (PAGE, &page[..])
        };
        let len = u32::try_from(INDEX_LEN + body.len()).expect("at most a page and its index");
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&index.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(body);
        records += 1;
    }
    for carried in carried {
        let n = u32::try_from(carried.bytes.len()).expect("a part of a batch");
        let len = u32::try_from(CARRY_LEN).expect("small") + n.next_multiple_of(8);
        bytes.extend_from_slice(&CARRY.to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&carried.blob.0.to_le_bytes());
        bytes.extend_from_slice(&carried.offset.to_le_bytes());
        bytes.extend_from_slice(&n.to_le_bytes());
        bytes.extend_from_slice(&(if carried.ends { ENDS } else { 0 }).to_le_bytes());
        bytes.extend_from_slice(&carried.bytes);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        records += 1;
    }
    let used = bytes.len();
    bytes.resize(used.next_multiple_of(unit), 0);
    let small = |n: usize| U32::new(u32::try_from(n).expect("a batch is a part of the ring"));
    let raw = RawBatch {
        signature: BATCH_SIGNATURE,
        flags: 0.into(),
        zero: 0.into(),
        mark: mark.into(),
        sequence: spot.sequence.into(),
        before: spot.before.into(),
        units: small(bytes.len() / unit),
        used: small(used),
        records: small(records),
        zeroes: [0; 20],
        crc: 0.into(),
    };
    bytes[..BATCH_LEN].copy_from_slice(raw.as_bytes());
    let crc = batch_crc(&bytes[..used]);
    bytes[BATCH_LEN - 4..BATCH_LEN].copy_from_slice(&crc.to_le_bytes());
    (bytes, crc)
}

/// Returns the checksum of a batch: of all its bytes but those of the checksum itself.
pub(crate) fn batch_crc(bytes: &[u8]) -> u32 {
    let head = crc32c::crc32c(&bytes[..BATCH_LEN - 4]);
    crc32c::crc32c_append(head, &bytes[BATCH_LEN..])
}

/// The records of a batch.
#[derive(Debug, Default)]
pub(crate) struct Records {
    pub pages: Vec<Image>,
    pub carried: Vec<Carried>,
}

/// Reads the records of a batch whose checksum is right. Returns the reason if they are of a newer
/// version, or not records.
pub(crate) fn decode_records(head: &BatchHead, bytes: &[u8]) -> Result<Records, String> {
    let mut rest = &bytes[BATCH_LEN..];
    let mut records = Records::default();
    let blank = Arc::new([0; PAGE_SIZE]);
    for number in 0..head.records {
        let record = || format!("record {number} of batch {}", head.sequence);
        let Some((start, behind)) = rest.split_at_checked(RECORD_LEN) else {
            return Err(format!("{} is cut short", record()));
        };
        let kind = u16::from_le_bytes([start[0], start[1]]);
        let len = u32::from_le_bytes([start[4], start[5], start[6], start[7]]);
        let Some((body, behind)) = behind.split_at_checked(len as usize) else {
            return Err(format!("{} is cut short", record()));
        };
        rest = behind;
        if kind == CARRY
            && let Some(carried) = decode_carried(body)
        {
            records.carried.push(carried);
            continue;
        }
        let page = match (kind, body.len()) {
            (ERASE, INDEX_LEN) => Arc::clone(&blank),
            (PAGE, n) if n == INDEX_LEN + PAGE_SIZE => {
                let page: Page = body[INDEX_LEN..].try_into().expect("a page");
                Arc::new(page)
            }
            _ => {
                return Err(format!(
                    "{} has type {kind} and {len} bytes, which this version does not know",
                    record()
                ));
            }
        };
        let index = u32::from_le_bytes([body[0], body[1], body[2], body[3]]);
        records.pages.push((index, page));
    }
    Ok(records)
}

/// Reads the body of a record that carries bytes, if it is one of this version.
fn decode_carried(body: &[u8]) -> Option<Carried> {
    let (head, bytes) = body.split_first_chunk::<CARRY_LEN>()?;
    let u64_at = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
    let u32_at = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes"));
    let (len, flags) = (u32_at(16) as usize, u32_at(20));
    if flags > ENDS || len.next_multiple_of(8) != bytes.len() {
        return None;
    }
    Some(Carried {
        blob: BlobId(u64_at(0)),
        offset: u64_at(8),
        bytes: bytes[..len].into(),
        ends: flags == ENDS,
    })
}
