//! Reading a ring that a crash left: the batches that count, and whether it is damaged. Nothing is
//! written.
//!
//! Rule 12: the walk begins at the tail of the header with the greater turn, and goes on by the
//! epoch, the exact sequence and the checksum of the batch before. One batch is on its way at a
//! time, so a power cut leaves at its end a batch that is not whole, or nothing. Damage is what no
//! power cut leaves: a header that cannot be used, a block that cannot be read, a later batch of
//! this epoch behind the end, a record that is none.
//!
//! The ring is untrusted. The walk ends after as many units as the ring has, and keeps at most its
//! bytes.

use std::collections::BTreeMap;
use std::sync::Arc;

use pumice_bdev::DmaBuf;

use super::super::carried::Carried;
use super::super::error::Error;
use super::super::format::{BlobId, Page};
use super::super::mdio::MdIo;
use super::format::{
    BATCH_LEN, BatchHead, HEADER_LEN, Header, MOST_OF_RING, RING_AT, Records, SECOND_HEADER_AT,
    Spot, batch_crc, decode_records,
};

/// The ring's file.
pub(crate) trait RingFile {
    /// Reads bytes of the file.
    ///
    /// # Errors
    /// Fails when they cannot be read.
    fn read(&mut self, at: u64, out: &mut [u8]) -> Result<(), Error>;
}

/// A batch that the walk has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundBatch {
    /// The unit of the ring where it begins.
    pub at: u64,
    /// The length in units.
    pub units: u64,
    /// The sequence number.
    pub sequence: u64,
    /// The metadata pages that it changes.
    pub pages: Vec<u32>,
    /// The bytes of blobs that it carries: the blob, the offset and the number of bytes.
    pub carried: Vec<(BlobId, u64, u64)>,
}

/// The content of a ring.
#[derive(Debug, Default)]
pub(crate) struct Walked {
    /// The header that counts, and its number, if there is one.
    pub header: Option<(Header, usize)>,
    /// Whether both headers can be used.
    pub both: bool,
    /// The batches that count, in order.
    pub batches: Vec<FoundBatch>,
    /// The unit behind them.
    pub end: u64,
    /// The units that they take.
    pub used: u64,
    /// The new contents of the pages.
    pub pages: BTreeMap<u32, Arc<Page>>,
    /// The bytes of blobs, in order.
    pub carried: Vec<Carried>,
    /// The reason why there may have been more than what was found.
    pub damage: Option<String>,
}

/// Both headers, or the reasons why they cannot be used.
pub(crate) type Headers = [Result<Header, String>; 2];

/// Reads both headers.
pub(crate) fn read_headers(file: &mut dyn RingFile, blob: BlobId, len: u64) -> Headers {
    [0, SECOND_HEADER_AT].map(|at| {
        let mut bytes = [0; HEADER_LEN];
        let read = file.read(at, &mut bytes);
        read.map_err(|error| error.to_string())?;
        let header = Header::decode(&bytes, blob, len);
        header.ok_or_else(|| "it is not a header of this journal".to_owned())
    })
}

/// Returns the header that counts, with its number.
pub(crate) fn newer(headers: &Headers) -> Option<(Header, usize)> {
    let used = headers.iter().zip(0..);
    used.filter_map(|(header, slot)| Some((header.clone().ok()?, slot)))
        .max_by_key(|(header, _)| header.turn)
}

/// Reads a ring.
pub(crate) fn walk(file: &mut dyn RingFile, blob: BlobId, len: u64) -> Walked {
    let headers = read_headers(file, blob, len);
    let mut walked = Walked {
        header: newer(&headers),
        both: headers.iter().all(Result::is_ok),
        ..Walked::default()
    };
    walked.damage = headers.iter().zip(0..).find_map(|(header, number)| {
        let why = header.as_ref().err()?;
        Some(format!("header {number} cannot be used: {why}"))
    });
    let Some((header, _)) = walked.header.clone() else {
        return walked;
    };
    let mut ring = Ring { file, header };
    let mut spot = ring.header.tail;
    let mut left = ring.header.units;
    loop {
        (walked.end, walked.used) = (spot.at, ring.header.units - left);
        match ring.next(spot, left) {
            Ok(Some(found)) => {
                left -= found.taken;
                spot = found.next;
                let Records { pages, carried } = found.records;
                let range = |carried: &Carried| {
                    let len = carried.bytes.len() as u64;
                    (carried.blob, carried.offset, len)
                };
                walked.batches.push(FoundBatch {
                    pages: pages.iter().map(|(index, _)| *index).collect(),
                    carried: carried.iter().map(range).collect(),
                    ..found.batch
                });
                walked.pages.extend(pages);
                walked.carried.extend(carried);
            }
            Ok(None) => break,
            Err(reason) => {
                walked.damage.get_or_insert(reason);
                return walked;
            }
        }
    }
    if let Some(later) = ring.later(spot, left) {
        walked.damage.get_or_insert(format!(
            "batch {} is not whole, and there is batch {later}",
            spot.sequence
        ));
    }
    walked
}

struct Ring<'a> {
    file: &'a mut dyn RingFile,
    header: Header,
}

struct Next {
    batch: FoundBatch,
    records: Records,
    /// Units that it takes, with those before the ring's end that it does not fit into.
    taken: u64,
    next: Spot,
}

impl Ring<'_> {
    fn read(&mut self, at: u64, out: &mut [u8]) -> Result<(), Error> {
        let unit = u64::from(self.header.unit);
        self.file.read(RING_AT + at * unit, out)
    }

    /// Returns the batch of this spot: at its place, or at the ring's beginning if it did not fit.
    /// `left` is the number of units that it may take. Returns the reason if the ring is damaged
    /// there.
    fn next(&mut self, spot: Spot, left: u64) -> Result<Option<Next>, String> {
        let skipped = self.header.units - spot.at;
        let places = [(spot.at, 0), (0, skipped)];
        // A batch that fits before the end is not at the beginning, so that nothing is read there.
        let may_not_fit = spot.at > 0 && skipped < self.header.units / MOST_OF_RING;
        for (at, skipped) in places.into_iter().take(if may_not_fit { 2 } else { 1 }) {
            if let Some(next) = self.batch(at, spot, left.saturating_sub(skipped))? {
                return Ok(Some(Next {
                    taken: next.taken + skipped,
                    ..next
                }));
            }
        }
        Ok(None)
    }

    fn batch(&mut self, at: u64, spot: Spot, left: u64) -> Result<Option<Next>, String> {
        let header = &self.header;
        let (unit, units) = (header.unit as usize, header.units);
        let (mark, most) = (header.mark(), left.min(units / MOST_OF_RING));
        let unreadable = |error: Error| format!("batch {} cannot be read: {error}", spot.sequence);
        let mut start = [0; BATCH_LEN];
        self.read(at, &mut start).map_err(unreadable)?;
        let Some(head) = BatchHead::decode(&start) else {
            return Ok(None);
        };
        let fits = (1..=most).contains(&head.units)
            && at + head.units <= units
            && head.used >= BATCH_LEN
            && head.used.div_ceil(unit) as u64 == head.units;
        if !fits
            || head.mark != mark
            || head.sequence != spot.sequence
            || head.before != spot.before
        {
            return Ok(None);
        }
        let mut bytes = vec![0; head.used];
        self.read(at, &mut bytes).map_err(unreadable)?;
        if batch_crc(&bytes) != head.crc {
            return Ok(None);
        }
        if head.flags != 0 {
            return Err(format!(
                "batch {} has the flags {:#06x}, which this version does not know",
                head.sequence, head.flags
            ));
        }
        let records = decode_records(&head, &bytes)?;
        Ok(Some(Next {
            batch: FoundBatch {
                at,
                units: head.units,
                sequence: head.sequence,
                pages: Vec::new(),
                carried: Vec::new(),
            },
            records,
            taken: head.units,
            next: Spot {
                at: (at + head.units) % units,
                sequence: spot.sequence.wrapping_add(1),
                before: head.crc,
            },
        }))
    }

    /// Returns the number of a batch of this epoch that comes later than the one that is missing at
    /// `spot`, if the units behind it have one. What cannot be read is passed over.
    fn later(&mut self, spot: Spot, left: u64) -> Option<u64> {
        let (units, mark) = (self.header.units, self.header.mark());
        for offset in 0..left {
            let mut start = [0; BATCH_LEN];
            if self.read((spot.at + offset) % units, &mut start).is_err() {
                continue;
            }
            let later = BatchHead::decode(&start)
                .filter(|head| head.mark == mark && head.sequence > spot.sequence);
            if let Some(head) = later {
                return Some(head.sequence);
            }
        }
        None
    }
}

/// Bytes that are read at once.
const WINDOW: u64 = 1 << 20;

/// A ring's file on a device, of which a window is in memory.
pub(crate) struct OnDevice<'a> {
    io: &'a mut MdIo,
    lba: u64,
    len: u64,
    block: u64,
    window: Option<(u64, DmaBuf)>,
    /// The latest window that could not be read. Its blocks are read one by one.
    unreadable: Option<u64>,
}

impl OnDevice<'_> {
    /// The file of `len` bytes that begins at block `lba`.
    pub fn new(io: &mut MdIo, lba: u64, len: u64) -> OnDevice<'_> {
        let block = io.can().block_size();
        OnDevice {
            io,
            lba,
            len,
            block,
            window: None,
            unreadable: None,
        }
    }

    /// Reads whole blocks that hold these bytes of the file.
    fn blocks(&mut self, from: u64, len: u64) -> Result<(u64, DmaBuf), Error> {
        let first = from / self.block;
        let end = (from + len).min(self.len).div_ceil(self.block);
        let bytes = usize::try_from((end - first) * self.block).expect("a part of the ring");
        Ok((first * self.block, self.io.read(self.lba + first, bytes)?))
    }
}

impl RingFile for OnDevice<'_> {
    fn read(&mut self, at: u64, out: &mut [u8]) -> Result<(), Error> {
        let len = out.len() as u64;
        let most = self.io.can().max_io_blocks() * self.block;
        let step = WINDOW.min(most);
        let mut done = 0;
        while done < len {
            let here = at + done;
            let window = here / step * step;
            let now = (window + step - here).min(len - done);
            let held = self.window.as_ref().map(|(at, _)| *at);
            if held != Some(window) {
                self.window = None;
            }
            if self.window.is_none() && self.unreadable != Some(window) {
                self.window = self.blocks(window, step).ok();
                if self.window.is_none() {
                    self.unreadable = Some(window);
                }
            }
            // A block that cannot be read must not hide those beside it.
            let exact;
            let (start, buf) = match &self.window {
                Some((start, buf)) => (*start, buf),
                None => {
                    exact = self.blocks(here, now)?;
                    (exact.0, &exact.1)
                }
            };
            let from = usize::try_from(here - start).expect("within the buffer");
            let (from_out, n) = (
                usize::try_from(done).expect("within the output"),
                usize::try_from(now).expect("within the output"),
            );
            out[from_out..from_out + n].copy_from_slice(&buf[from..from + n]);
            done += now;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
