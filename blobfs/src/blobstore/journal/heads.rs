//! The two headers of the ring, which are written in turn.
//!
//! Rule 13: each use of the ring begins with a header of a new epoch, durable before the guard, so
//! that nothing that an earlier use has left counts. Rule 7: the tail moves on only when everything
//! before it is in place and durable.

use std::hash::{BuildHasher, RandomState};

use pumice_bdev::Op;

use super::super::error::Error;
use super::super::format::{BlobId, PAGE_SIZE};
use super::super::geometry::Geometry;
use super::super::mdio::{MdIo, dma};
use super::super::retry::{may_land, repeat};
use super::format::{Header, RING_AT, RingPlace, SECOND_HEADER_AT, Spot};

/// The headers. Only the thread that has them locked writes them, or writes pages in place.
#[derive(Debug)]
pub(crate) struct Heads {
    /// First block of the ring's file.
    lba: u64,
    block: u64,
    /// The one that counts.
    current: Header,
    /// The number of the current one.
    slot: usize,
    /// The last turn that was given to a header, also to one that could not be written.
    turn: u64,
    /// Whether the other one can be used too.
    both: bool,
}

impl Heads {
    /// The headers of the ring in this place, of which `found` counts, if one does.
    pub fn new(
        geo: &Geometry,
        place: &RingPlace,
        found: Option<(Header, usize)>,
        both: bool,
    ) -> Heads {
        let block = geo.block_size;
        let unit = u32::try_from(block).expect("at most a page");
        let units = (place.len - RING_AT) / block;
        let (mut current, slot) = found.unwrap_or((
            Header {
                epoch: 0,
                salt: 0,
                turn: 0,
                tail: Spot::first(0),
                unit,
                units,
                blob: BlobId(0),
            },
            1,
        ));
        // The device may have other blocks than when they were written.
        (current.unit, current.units, current.blob) = (unit, units, place.blob);
        Heads {
            lba: geo.cluster_lba(place.cluster),
            block,
            turn: current.turn,
            current,
            slot,
            both,
        }
    }

    /// The mark of the current epoch's batches.
    pub fn mark(&self) -> u64 {
        self.current.mark()
    }

    /// Makes an epoch with an empty ring durable, whose first batch is this one.
    pub fn begin(&mut self, io: &mut MdIo, tail: Spot) -> Result<(), Error> {
        let next = self.next();
        self.begin_as(io, next, tail)
    }

    /// Returns the header of the next epoch, without its tail.
    pub fn next(&self) -> Header {
        Header {
            epoch: self.current.epoch.wrapping_add(1),
            salt: RandomState::new().hash_one(self.current.epoch),
            ..self.current.clone()
        }
    }

    /// Makes an epoch durable whose header is [`next`](Heads::next), and whose first batch is this one.
    pub fn begin_as(&mut self, io: &mut MdIo, mut next: Header, tail: Spot) -> Result<(), Error> {
        next.tail = tail;
        self.write(io, next)?;
        if !self.both {
            let again = self.current.clone();
            self.write(io, again)?;
            self.both = true;
        }
        Ok(())
    }

    /// Makes the current header durable in both places, since those that could not be written may be damaged.
    pub fn confirm(&mut self, io: &mut MdIo) -> Result<(), Error> {
        for _ in 0..2 {
            let again = self.current.clone();
            self.write(io, again)?;
        }
        self.both = true;
        Ok(())
    }

    /// Makes a new tail durable.
    pub fn move_tail(&mut self, io: &mut MdIo, tail: Spot) -> Result<(), Error> {
        let next = Header {
            tail,
            ..self.current.clone()
        };
        self.write(io, next)
    }

    /// Writes a header in place of the one that does not count, or of the one that does if that cannot be written: it has one
    /// sector, which is written as a whole, and what is before the new tail is in place.
    fn write(&mut self, io: &mut MdIo, mut next: Header) -> Result<(), Error> {
        // A write that has failed may be on the device, so that no turn is given twice.
        self.turn += 1;
        next.turn = self.turn;
        let other = 1 - self.slot;
        let slot = match self.write_at(io, other, &next) {
            Ok(()) => other,
            Err(error) if may_land(&error) => return Err(error),
            Err(error) => {
                // The first error tells more.
                self.write_at(io, self.slot, &next).map_err(|_| error)?;
                self.slot
            }
        };
        (self.current, self.slot) = (next, slot);
        Ok(())
    }

    fn write_at(&self, io: &mut MdIo, slot: usize, header: &Header) -> Result<(), Error> {
        let at = [0, SECOND_HEADER_AT][slot];
        let mut page = [0; PAGE_SIZE];
        let bytes = header.encode();
        page[..bytes.len()].copy_from_slice(&bytes);
        let len = usize::try_from(self.block).expect("at most a page");
        let data = dma(&page[..len])?;
        let lba = self.lba + at / self.block;
        repeat(|| {
            let data = data.clone();
            io.run_durable(vec![Op::Write {
                lba,
                data,
                fua: false,
            }])
        })
    }
}
