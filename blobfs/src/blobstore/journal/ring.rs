//! The ring in memory: who waits for a batch, what is in it, and its checkpoints. The rules that
//! this keeps (2, 4 to 9 and 14) are at the [module](super) that it belongs to.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use pumice_bdev::{DmaSlice, Op};

use super::super::carried::{Carried, Patch};
use super::super::commit::{BeginCarry, Failure};
use super::super::error::Error;
use super::super::format::{BlobId, Page};
use super::super::geometry::Geometry;
use super::super::mdio::{MdChannels, MdIo, dma};
use super::super::retry::{may_land, repeat};
use super::again::{Left, Room, begin_with, full};
use super::fault::BatchFault;
use super::format::{
    BATCH_LEN, Image, MOST_OF_RING, RING_AT, Spot, carried_bytes, encode_batch, record_bytes,
};
use super::group::{Waiting, take_group};
use super::heads::Heads;
use super::log::{Durable, Halt, Log, OWED_BYTES, most_owed};
use super::place::put_all;
use super::recovery::FoundJournal;

/// Number of places of the ring at which a batch is tried.
const BATCH_TRIES: u32 = 3;
/// Time until a checkpoint in the background is tried again after one that failed.
const CHECKPOINT_PAUSE: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub(super) struct Ring {
    pub channels: Arc<MdChannels>,
    /// First block of the ring.
    lba: u64,
    /// Bytes of a unit of the ring: of a block.
    unit: u64,
    /// Number of its units.
    units: u64,
    log: Mutex<Log>,
    /// The number of blobs in [`Log::owed`], so that a write of data takes no lock for nothing.
    owing: AtomicUsize,
    /// A batch has ended, or an append that was to be carried.
    ended: Condvar,
    /// Held by the thread that writes headers, or pages in place. It is locked with a channel in hand, and
    /// before the log.
    heads: Mutex<Heads>,
}

impl Ring {
    pub fn new(channels: Arc<MdChannels>, geo: &Geometry, found: FoundJournal) -> Ring {
        let FoundJournal {
            place,
            heads,
            begun,
            left,
        } = found;
        let ring = Ring {
            channels,
            lba: geo.cluster_lba(place.cluster) + RING_AT / geo.block_size,
            unit: geo.block_size,
            units: (place.len - RING_AT) / geo.block_size,
            log: Mutex::new(Log::new(begun, heads.mark(), geo.clone())),
            owing: AtomicUsize::new(0),
            ended: Condvar::new(),
            heads: Mutex::new(heads),
        };
        if let Some(kept) = left {
            let mark = ring.heads.lock().mark();
            let mut log = ring.log.lock();
            let debts = kept.debts.values().flatten();
            debts.for_each(|(carried, patches)| log.owed.add(carried, 0, patches));
            log.reset_with(mark, kept.begun, &kept.pages, &kept.debts);
            ring.owing.store(log.owed.len(), Ordering::Release);
        }
        ring
    }

    /// Returns the most bytes of a batch.
    pub fn most(&self) -> u64 {
        self.units / MOST_OF_RING * self.unit
    }

    /// Whether a checkpoint in the background is due. It has begun then. That is at half of what
    /// carried appends wait at, so that they go on while it runs.
    pub fn begin_background(&self) -> bool {
        let mut log = self.log.lock();
        let owed = OWED_BYTES.min(most_owed(self.most()));
        let due = !log.checkpointing
            && log.broken.is_none()
            && (log.used > self.units / 4 || log.owed.bytes() > owed / 2)
            && log.paused_until.is_none_or(|until| Instant::now() >= until);
        log.checkpointing |= due;
        due
    }

    /// Whether a write that has timed out may still land, so that nothing else is written.
    pub fn is_halted(&self) -> bool {
        self.log.lock().broken == Some(Halt::ForGood)
    }

    pub fn end_background(&self, succeeded: bool) {
        let mut log = self.log.lock();
        log.checkpointing = false;
        log.paused_until = (!succeeded).then(|| Instant::now() + CHECKPOINT_PAUSE);
    }

    /// Whether an append of `len` bytes can be carried without a checkpoint before it.
    pub fn has_carry_room(&self, len: u64) -> bool {
        let most = most_owed(self.most());
        self.log.lock().has_carry_room(self.units, len, most)
    }

    /// Records that a batch is going to carry `len` bytes of a blob, if it may.
    pub fn begin_carry(&self, blob: BlobId, len: u64) -> BeginCarry<()> {
        let mut log = self.log.lock();
        // The other half of a batch is for the blob's pages.
        let half = self.most() / 2;
        let is_left = log.owed.is_left(blob, len, half.min(OWED_BYTES / 2));
        if log.broken.is_some() || len > half || is_left {
            return BeginCarry::Refused;
        }
        if !log.has_carry_room(self.units, len, most_owed(self.most())) {
            return BeginCarry::NoRoom;
        }
        log.owed.begin(blob);
        self.owing.store(log.owed.len(), Ordering::Release);
        BeginCarry::Begun(())
    }

    /// Ends what [`Ring::begin_carry`] has begun.
    pub fn end_carry(&self, blob: BlobId) {
        let mut log = self.log.lock();
        log.owed.end(blob);
        self.owing.store(log.owed.len(), Ordering::Release);
        self.ended.notify_all();
    }

    /// Whether bytes are owed to a blob, after those have ended that are being carried.
    #[inline]
    pub fn waits_for(&self, blob: BlobId) -> bool {
        self.owing.load(Ordering::Acquire) > 0 && self.waits_for_slow(blob)
    }

    #[cold]
    fn waits_for_slow(&self, blob: BlobId) -> bool {
        let mut log = self.log.lock();
        while log.owed.is_carrying(blob) {
            self.ended.wait(&mut log);
        }
        log.owed.has(blob)
    }

    /// Whether bytes are owed to one of these blobs, or to any.
    pub fn owes(&self, blobs: Option<&[BlobId]>) -> bool {
        let log = self.log.lock();
        match blobs {
            Some(blobs) => blobs.iter().any(|blob| log.owed.has(*blob)),
            None => log.owed.bytes() > 0,
        }
    }

    pub fn owed_bytes(&self) -> u64 {
        self.log.lock().owed.bytes()
    }

    /// Returns a byte of the blob behind which everything is that it is owed.
    pub fn owed_from(&self, blob: BlobId) -> Option<u64> {
        self.log.lock().owed.from(blob)
    }

    /// Ends this use of the ring, which is empty. The next change begins another.
    pub fn end(&self) {
        self.log.lock().begun = false;
    }

    /// Makes a change durable, together with those that arrive at the same time.
    ///
    /// # Errors
    /// Returns [`Failure`], which says what is on the device.
    pub fn submit(
        &self,
        pages: Vec<Image>,
        carried: Vec<(Carried, Vec<Patch>)>,
        guard: Option<Box<Page>>,
        geo: Geometry,
    ) -> Result<(), Failure> {
        let mut log = self.log.lock();
        let ticket = log.next_ticket;
        log.next_ticket += 1;
        let bytes = pages
            .iter()
            .map(|(_, page)| record_bytes(page))
            .sum::<u64>()
            + carried
                .iter()
                .map(|(carried, _)| carried_bytes(carried.bytes.len() as u64))
                .sum::<u64>();
        log.waiting.push_back(Waiting {
            ticket,
            pages,
            carried,
            bytes,
            guard,
            geo,
        });
        loop {
            if let Some(result) = log.results.remove(&ticket) {
                return result;
            }
            if log.writing {
                self.ended.wait(&mut log);
                continue;
            }
            log.writing = true;
            let group = take_group(&mut log.waiting, self.most());
            let written = MutexGuard::unlocked(&mut log, || self.write(&group));
            log.writing = false;
            for waiting in group {
                let result = written.as_ref().map_err(BatchFault::failure).copied();
                log.results.insert(waiting.ticket, result);
            }
            self.ended.notify_all();
        }
    }

    /// Writes the batch of these changes. The caller is the only one who does. Where a block of the ring cannot be written,
    /// the batch goes behind it, once it is void there: none of its changes was made.
    fn write(&self, group: &[Waiting]) -> Result<(), BatchFault> {
        let mut tries = BATCH_TRIES;
        loop {
            tries -= 1;
            match self.write_once(group) {
                Err(fault) if fault.void && !fault.open && tries > 0 => {}
                result => return result,
            }
        }
    }

    fn write_once(&self, group: &[Waiting]) -> Result<(), BatchFault> {
        let io = &mut *self.channels.get()?;
        let first = &group[0];
        let guard = group.iter().find_map(|waiting| waiting.guard.as_deref());
        self.begin(io, guard, &first.geo)?;
        if self.log.lock().unconfirmed {
            self.confirm(io, &mut self.heads.lock())?;
        }
        let bytes = BATCH_LEN as u64 + group.iter().map(|waiting| waiting.bytes).sum::<u64>();
        let units = bytes.div_ceil(self.unit);
        let (at, taken, head, mark) = self.room(io, units)?;
        let pages = || group.iter().flat_map(|waiting| &waiting.pages);
        let unit = usize::try_from(self.unit).expect("at most a page");
        let carried = || group.iter().flat_map(|waiting| &waiting.carried);
        let bytes_of = carried().map(|(carried, _)| carried);
        let (batch, crc) = encode_batch(mark, head, unit, pages(), bytes_of);
        let data = self.pieces(io, at, &batch)?;
        let written = repeat(|| {
            let op = |(lba, data): &(u64, DmaSlice)| Op::Write {
                lba: *lba,
                data: data.clone(),
                fua: false,
            };
            io.run_durable(data.iter().map(op).collect())
        });
        let behind = (at + units) % self.units;
        if let Err(error) = written {
            return Err(self.failed_batch(io, error, behind));
        }
        let mut log = self.log.lock();
        let number = head.sequence;
        log.head = Spot {
            at: behind,
            sequence: number + 1,
            before: crc,
        };
        log.used += taken;
        log.pages
            .extend(pages().map(|(index, page)| (*index, (number, Arc::clone(page)))));
        log.geo = first.geo.clone();
        for (carried, patches) in carried() {
            log.owed.add(carried, number, patches);
        }
        self.owing.store(log.owed.len(), Ordering::Release);
        Ok(())
    }

    /// Begins this use of the ring, if it has not begun: an epoch, then the guard.
    fn begin(&self, io: &mut MdIo, guard: Option<&Page>, geo: &Geometry) -> Result<(), Error> {
        self.log.lock().check()?;
        if self.log.lock().begun {
            return Ok(());
        }
        let guard = guard.ok_or_else(|| {
            Error::Stopped("the journal would be used without its guard".to_owned())
        })?;
        let mut heads = self.heads.lock();
        // Another thread may have done it.
        if self.log.lock().begun {
            return Ok(());
        }
        let (first, data) = (Spot::first(0), dma(guard)?);
        heads.begin(io, first).map_err(|error| self.noted(error))?;
        let guarded = repeat(|| {
            let data = data.clone();
            io.run_durable(vec![Op::Write {
                lba: 0,
                data,
                fua: false,
            }])
        });
        guarded.map_err(|error| self.noted(error))?;
        let mut log = self.log.lock();
        log.reset(heads.mark(), first);
        log.geo = geo.clone();
        log.begun = true;
        Ok(())
    }

    /// Makes sure that a load finds the header that counts, before anything relies on it.
    fn confirm(&self, io: &mut MdIo, heads: &mut Heads) -> Result<(), Error> {
        if self.log.lock().unconfirmed {
            heads.confirm(io).map_err(|error| self.noted(error))?;
            self.log.lock().unconfirmed = false;
        }
        Ok(())
    }

    /// Begins this use of the ring and empties it, before a change that goes in place. Returns what is not in place.
    pub fn begin_and_empty(&self, guard: Option<&Page>, geo: &Geometry) -> Result<Left, Error> {
        self.begin(&mut *self.channels.get()?, guard, geo)?;
        self.empty()
    }

    /// Returns where a batch of so many units goes, how many it takes with those before the ring's
    /// end that it does not fit into, its spot, and its mark. Empties the ring if it is full.
    fn room(&self, io: &mut MdIo, units: u64) -> Result<(u64, u64, Spot, u64), Error> {
        let mut tries = 2;
        loop {
            {
                let log = self.log.lock();
                let behind = self.units - log.head.at;
                let (at, taken) = if units <= behind {
                    (log.head.at, units)
                } else {
                    (0, behind + units)
                };
                if log.has_room(taken, self.units) {
                    return Ok((at, taken, log.head, log.mark));
                }
            }
            tries -= 1;
            if tries == 0 {
                return Err(Error::invalid("a change does not fit the journal"));
            }
            self.empty_as_writer(io, &[])?;
        }
    }

    /// Returns the writes of a batch.
    fn pieces(&self, io: &MdIo, at: u64, batch: &[u8]) -> Result<Vec<(u64, DmaSlice)>, Error> {
        let step = usize::try_from(io.can().max_io_blocks() * self.unit).expect("at most 1 MiB");
        let mut lba = self.lba + at;
        let mut pieces = Vec::new();
        for piece in batch.chunks(step) {
            pieces.push((lba, dma(piece)?));
            lba += piece.len() as u64 / self.unit;
        }
        Ok(pieces)
    }

    /// Makes a batch void that could not be written, and of which a part may be on the device. The
    /// next one begins at `behind`.
    fn failed_batch(&self, io: &mut MdIo, error: Error, behind: u64) -> BatchFault {
        if may_land(&error) {
            return BatchFault::lasting(self.noted(error));
        }
        {
            let mut log = self.log.lock();
            if log.broken == Some(Halt::ForGood) {
                return BatchFault::lasting(error);
            }
            log.broken = Some(Halt::Batch(behind));
        }
        let open = match self.make_void(io) {
            Ok(()) => {
                tracing::warn!(%error, "a write to the journal failed; its changes were taken back");
                false
            }
            Err(again) => {
                tracing::error!(%error, %again, "a write to the journal failed, and could not be taken back");
                true
            }
        };
        BatchFault {
            error: Arc::new(error),
            open,
            void: true,
        }
    }

    /// Notes that nothing may be written any longer, if a write that ended with this error may
    /// still land.
    fn noted(&self, error: Error) -> Error {
        if may_land(&error) {
            self.log.lock().broken = Some(Halt::ForGood);
        }
        error
    }

    /// Puts everything in place that was durable when this began, and frees its part of the ring. Returns what cannot be put in
    /// place. It is carried again. The caller has no channel.
    ///
    /// # Errors
    /// Fails when the device does, and if there is no room to carry again what is left. What was in the ring is still there.
    pub fn empty(&self) -> Result<Left, Error> {
        self.empty_without(&[])
    }

    /// Empties the ring as [`Ring::empty`] does, and gives up what it owes to these blobs.
    pub fn empty_without(&self, given_up: &[BlobId]) -> Result<Left, Error> {
        {
            let io = &mut *self.channels.get()?;
            let mut heads = self.heads.lock();
            let Some(durable) = self.durable(given_up)? else {
                return Ok(Left::default());
            };
            let left = self.put(io, &durable)?;
            if left.is_none() {
                return self.move_tail(io, &mut heads, &durable).map(|()| left);
            }
        }
        // The next epoch begins when no batch is on its way.
        let mut log = self.log.lock();
        while log.writing {
            self.ended.wait(&mut log);
        }
        log.writing = true;
        drop(log);
        let io = self.channels.get();
        let emptied = io.and_then(|mut io| self.empty_as_writer(&mut io, given_up));
        self.log.lock().writing = false;
        self.ended.notify_all();
        emptied
    }

    /// Empties the ring as [`Ring::empty_without`] does. No batch is on its way until this returns.
    fn empty_as_writer(&self, io: &mut MdIo, given_up: &[BlobId]) -> Result<Left, Error> {
        let mut heads = self.heads.lock();
        let Some(durable) = self.durable(given_up)? else {
            return Ok(Left::default());
        };
        let left = self.put(io, &durable)?;
        if left.is_none() {
            return self.move_tail(io, &mut heads, &durable).map(|()| left);
        }
        self.carry_again(io, &mut heads, &durable, durable.head.at, left)
    }

    /// Returns what is durable in the ring, if there is anything.
    fn durable(&self, given_up: &[BlobId]) -> Result<Option<Durable>, Error> {
        let log = self.log.lock();
        log.check()?;
        Ok((log.used > 0).then(|| log.durable(given_up)))
    }

    /// Frees the part of the ring that has what is in place now.
    fn move_tail(&self, io: &mut MdIo, heads: &mut Heads, durable: &Durable) -> Result<(), Error> {
        if let Err(error) = heads.move_tail(io, durable.head) {
            self.log.lock().unconfirmed = true;
            return Err(self.noted(error));
        }
        let mut log = self.log.lock();
        log.unconfirmed = false;
        log.used -= durable.used;
        // What later batches have changed is in the ring still.
        let number = durable.head.sequence;
        log.pages.retain(|_, (batch, _)| *batch >= number);
        log.owed.forget(number);
        self.owing.store(log.owed.len(), Ordering::Release);
        Ok(())
    }

    /// Begins an epoch with what could not be put in place, at this unit of the ring. Everything else is in place.
    fn carry_again(
        &self,
        io: &mut MdIo,
        heads: &mut Heads,
        durable: &Durable,
        from: u64,
        left: Left,
    ) -> Result<Left, Error> {
        let tail = durable.head.at + self.units - durable.used % self.units;
        let room = Room {
            lba: self.lba,
            unit: self.unit,
            units: self.units,
            from,
            free: (tail + self.units - from) % self.units,
        };
        let (pages, debts) = durable.part(&left);
        // A header that could not be written may count. What is carried again behind it is not written over.
        self.confirm(io, heads)?;
        let (begun, written) = match begin_with(io, heads, room, &pages, &debts) {
            Ok(begun) => begun,
            Err(error) => return Err(self.noted(full(left, error))),
        };
        let mut log = self.log.lock();
        log.unconfirmed = written.is_err();
        // A header that was written once counts, also if the other place cannot be written.
        if heads.mark() != log.mark {
            log.reset_with(heads.mark(), begun, &pages, &debts);
            log.broken = None;
            self.owing.store(log.owed.len(), Ordering::Release);
        }
        drop(log);
        written.map_err(|error| self.noted(error))?;
        tracing::warn!(
            pages = pages.len(),
            blobs = debts.len(),
            "the journal carries again what cannot be put in place"
        );
        Ok(left)
    }

    /// Begins an epoch without the batch that has failed, if there is one: what is durable goes in
    /// place first.
    ///
    /// # Errors
    /// Fails when the device does. Nothing is appended then.
    pub fn make_void(&self, io: &mut MdIo) -> Result<(), Error> {
        let mut heads = self.heads.lock();
        let (behind, durable) = {
            let log = self.log.lock();
            match log.broken {
                None => return Ok(()),
                Some(Halt::ForGood) => return log.check(),
                Some(Halt::Batch(behind)) => (behind, log.durable(&[])),
            }
        };
        let left = self.put(io, &durable)?;
        if !left.is_none() {
            return self
                .carry_again(io, &mut heads, &durable, behind, left)
                .map(drop);
        }
        let first = Spot::first(behind);
        if let Err(error) = heads.begin(io, first) {
            self.log.lock().unconfirmed = true;
            return Err(self.noted(error));
        }
        let mut log = self.log.lock();
        log.unconfirmed = false;
        log.reset(heads.mark(), first);
        log.broken = None;
        self.owing.store(log.owed.len(), Ordering::Release);
        Ok(())
    }

    /// Makes pages, and bytes of blobs, durable in their places. Returns what cannot be.
    fn put(&self, io: &mut MdIo, durable: &Durable) -> Result<Left, Error> {
        let pages = durable.pages.iter();
        let mut pages: Vec<(u32, &Page)> =
            pages.map(|(index, (_, page))| (*index, &**page)).collect();
        pages.sort_unstable_by_key(|(index, _)| *index);
        put_all(io, &durable.geo, pages, &durable.debts).map_err(|error| self.noted(error))
    }
}
