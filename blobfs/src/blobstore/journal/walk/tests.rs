use proptest::prelude::*;

use super::super::super::format::PAGE_SIZE;
use super::super::format::{Image, encode_batch};
use super::*;

const UNIT: u32 = 512;
const UNITS: u64 = 200;
const LEN: u64 = RING_AT + UNITS * UNIT as u64;
const BLOB: BlobId = BlobId(1 << 32);

/// A ring's file in memory, with a range that cannot be read. It counts the reads.
struct MemoryRing {
    bytes: Vec<u8>,
    unreadable: std::ops::Range<u64>,
    reads: u64,
}

impl RingFile for MemoryRing {
    fn read(&mut self, at: u64, out: &mut [u8]) -> Result<(), Error> {
        self.reads += 1;
        let end = at + out.len() as u64;
        if at < self.unreadable.end && self.unreadable.start < end {
            return Err(Error::invalid("unreadable"));
        }
        let at = usize::try_from(at).unwrap();
        out.copy_from_slice(&self.bytes[at..at + out.len()]);
        Ok(())
    }
}

impl MemoryRing {
    /// A ring that begins at this unit, with a batch for each list of pages, and where each begins.
    fn new(first: u64, batches: &[Vec<u32>]) -> (MemoryRing, Vec<u64>) {
        let header = Header {
            epoch: 5,
            salt: 0x1234_5678_9abc_def0,
            turn: 8,
            tail: Spot {
                at: first,
                sequence: 70,
                before: 9,
            },
            unit: UNIT,
            units: UNITS,
            blob: BLOB,
        };
        let mut bytes = vec![0; usize::try_from(LEN).unwrap()];
        for (at, turn) in [(0, 8), (4096, 7)] {
            let header = Header {
                turn,
                ..header.clone()
            };
            bytes[at..at + HEADER_LEN].copy_from_slice(&header.encode());
        }
        let mut spot = header.tail;
        let mut places = Vec::new();
        for pages in batches {
            let images: Vec<Image> = pages.iter().map(|index| image(*index)).collect();
            let carried: Vec<Carried> = pages.iter().map(|index| carried(*index)).collect();
            let (batch, crc) = encode_batch(header.mark(), spot, UNIT as usize, &images, &carried);
            let units = batch.len() as u64 / u64::from(UNIT);
            let place = if spot.at + units > UNITS { 0 } else { spot.at };
            let at = usize::try_from(RING_AT + place * u64::from(UNIT)).unwrap();
            bytes[at..at + batch.len()].copy_from_slice(&batch);
            places.push(place);
            spot = Spot {
                at: (place + units) % UNITS,
                sequence: spot.sequence + 1,
                before: crc,
            };
        }
        let memory = MemoryRing {
            bytes,
            unreadable: 0..0,
            reads: 0,
        };
        (memory, places)
    }

    fn walk(&mut self) -> Walked {
        walk(self, BLOB, LEN)
    }
}

/// A page that is blank for one index in three.
fn image(index: u32) -> Image {
    let byte = if index.is_multiple_of(3) { 0 } else { 7 };
    (index, Arc::new([byte; PAGE_SIZE]))
}

/// Bytes of a blob, of every length that a record rounds up.
fn carried(index: u32) -> Carried {
    Carried {
        blob: BlobId::from_page(index),
        offset: u64::from(index) * 1000,
        bytes: vec![9; index as usize % 50].into(),
        ends: index.is_multiple_of(2),
    }
}

fn batches() -> impl Strategy<Value = (u64, Vec<Vec<u32>>)> {
    let pages = proptest::collection::vec(0u32..1000, 0..4);
    (0..UNITS, proptest::collection::vec(pages, 0..5))
}

proptest! {
    #[test]
    fn what_was_written_is_found((first, batches) in batches()) {
        let (mut memory, places) = MemoryRing::new(first, &batches);
        let walked = memory.walk();
        prop_assert_eq!(&walked.damage, &None);
        prop_assert!(walked.both);
        let found: Vec<_> = walked.batches.iter().map(|batch| batch.pages.clone()).collect();
        prop_assert_eq!(found, batches.clone());
        let found: Vec<_> = walked.batches.iter().map(|batch| batch.at).collect();
        prop_assert_eq!(found, places);
        for (index, page) in walked.pages {
            prop_assert_eq!(page, image(index).1);
        }
        let expected: Vec<_> = batches.iter().flatten().map(|index| carried(*index)).collect();
        prop_assert_eq!(walked.carried, expected);
    }

    /// A change of any bytes is found, is behind the end, or loses the last batch, as a power cut
    /// does.
    #[test]
    fn damage_never_passes((first, batches) in batches(), at in 0..LEN, mask in 1..255u8) {
        let (mut memory, _) = MemoryRing::new(first, &batches);
        memory.bytes[usize::try_from(at).unwrap()] ^= mask;
        let walked = memory.walk();
        let found: Vec<_> = walked.batches.iter().map(|batch| batch.pages.clone()).collect();
        let without_last = &batches[..batches.len().saturating_sub(1)];
        prop_assert!(
            walked.damage.is_some() || found == batches || found == without_last,
            "{:?}", walked
        );
        prop_assert!(batches.starts_with(&found));
    }

    #[test]
    fn hostile_bytes_take_bounded_work(
        (first, batches) in batches(),
        changes in proptest::collection::vec((0..LEN, any::<u64>()), 0..40),
        fix in any::<bool>(),
    ) {
        let (mut memory, _) = MemoryRing::new(first, &batches);
        for (at, word) in changes {
            let at = usize::try_from(at).unwrap().min(memory.bytes.len() - 8);
            memory.bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        if fix {
            // A header whose checksum is right and whose fields are not.
            let crc = crc32c::crc32c(&memory.bytes[..HEADER_LEN - 4]).to_le_bytes();
            memory.bytes[HEADER_LEN - 4..HEADER_LEN].copy_from_slice(&crc);
        }
        memory.walk();
        prop_assert!(memory.reads <= 2 + 5 * UNITS, "{} reads", memory.reads);
    }
}

#[test]
fn damage_and_the_end_are_told_apart() {
    let batches = vec![vec![1, 2], vec![4], vec![5, 6, 7], vec![8]];
    let whole = |memory: &mut MemoryRing| memory.walk().damage;
    let (mut memory, places) = MemoryRing::new(180, &batches);
    let at = |number: usize| RING_AT + places[number] * u64::from(UNIT);
    assert_eq!(whole(&mut memory), None);
    // The last one is torn: that is the end.
    let last = usize::try_from(at(3)).unwrap();
    memory.bytes[last + 600] ^= 1;
    assert_eq!(whole(&mut memory), None);
    assert_eq!(memory.walk().batches.len(), 3);
    // Another one is.
    let second = usize::try_from(at(1)).unwrap();
    memory.bytes[second + 600] ^= 1;
    let reason = "batch 71 is not whole, and there is batch 72";
    assert_eq!(whole(&mut memory).as_deref(), Some(reason));
    assert_eq!(memory.walk().batches.len(), 1);
    // It is of an earlier epoch.
    for number in [1, 2, 3] {
        let mark = usize::try_from(at(number)).unwrap() + 8;
        memory.bytes[mark] ^= 1;
    }
    assert_eq!(whole(&mut memory), None);

    let (mut memory, _) = MemoryRing::new(180, &batches);
    memory.unreadable = at(3)..at(3) + 1;
    let damage = whole(&mut memory).unwrap();
    assert!(damage.starts_with("batch 73 cannot be read"), "{damage}");

    // A batch is at the beginning only if it does not fit before the end.
    for (first, is_read) in [(20, false), (120, true)] {
        let (mut memory, _) = MemoryRing::new(first, &batches);
        memory.unreadable = RING_AT..RING_AT + 1;
        assert_eq!(whole(&mut memory).is_some(), is_read, "{first}");
        assert_eq!(memory.walk().batches.len(), 4);
    }

    let (mut memory, _) = MemoryRing::new(180, &batches);
    memory.bytes[4096 + 20] ^= 1;
    let reason = "header 1 cannot be used: it is not a header of this journal";
    assert_eq!(whole(&mut memory).as_deref(), Some(reason));
    assert_eq!(memory.walk().batches.len(), 4);
    memory.bytes[20] ^= 1;
    assert!(whole(&mut memory).is_some());
    assert_eq!(memory.walk().batches.len(), 0);
}

/// A record of a type that this version does not know is not passed over.
#[test]
fn a_record_of_a_newer_version_is_damage() {
    let (mut memory, places) = MemoryRing::new(0, &[vec![1], vec![2]]);
    let at = usize::try_from(RING_AT + places[1] * u64::from(UNIT)).unwrap();
    memory.bytes[at + BATCH_LEN] = 77;
    // A page, and two bytes of a blob.
    let used = BATCH_LEN + 16 + PAGE_SIZE + 40;
    let crc = batch_crc(&memory.bytes[at..at + used]);
    memory.bytes[at + 60..at + 64].copy_from_slice(&crc.to_le_bytes());
    let damage = memory.walk().damage.unwrap();
    assert!(damage.contains("type 77"), "{damage}");
}

#[test]
fn a_batch_with_flags_of_a_newer_version_is_damage() {
    let (mut memory, places) = MemoryRing::new(0, &[vec![1], vec![2]]);
    let at = usize::try_from(RING_AT + places[1] * u64::from(UNIT)).unwrap();
    memory.bytes[at + 4] = 4;
    let used = BATCH_LEN + 16 + PAGE_SIZE + 40;
    let crc = batch_crc(&memory.bytes[at..at + used]);
    memory.bytes[at + 60..at + 64].copy_from_slice(&crc.to_le_bytes());
    let walked = memory.walk();
    let damage = walked.damage.unwrap();
    assert!(damage.contains("the flags 0x0004"), "{damage}");
    assert_eq!(walked.batches.len(), 1);
}
