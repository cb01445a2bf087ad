//! Changes through a journal: the pages of a change are one append to a ring, and reach their
//! places later.
//!
//! A batch holds the new content of every page that its changes write, so it is the commit point of
//! all of them, and a page that a power cut tears in its place is written again from it.
//!
//! - Rule 2: one batch is on its way. The next is composed when it is durable, of all that has
//!   arrived meanwhile, which is how changes of different threads share a write.
//! - Rule 4: a batch whose flush fails is written and flushed again.
//! - Rule 5: changes are acknowledged in the order of their batches. Any waiting thread composes
//!   and writes the next one, so none depends on another thread that runs. After a write that fails
//!   for good, an epoch without that batch is begun: then none of its changes was made.
//! - Rule 6: a batch takes at most a quarter of the ring. The pages of a larger change that nothing
//!   names yet go in place, behind a checkpoint, so that the ring has nothing that a recovery could
//!   write over them; its commit points are one batch. Only if these are too many for one is each
//!   written in place, in the order of [`in_place`](super::commit::in_place).
//! - Rules 7 and 8: a checkpoint fixes the newest durable batch, writes the pages as of that batch in
//!   place, flushes, and moves the tail behind it. Each batch has whole pages.
//! - Rule 9: the pages and clusters that a change frees belong to nobody until its batch is durable.
//! - Rule 14: before the first batch the super block gets the guard, a version that SPDK and earlier
//!   versions of Pumice refuse. It stays until an orderly unload, which empties the ring first.
//!
//! - Rules 20 to 22: bytes of a blob that a batch carries are owed until a checkpoint has put them in
//!   the blob's own clusters; see [`carry`](super::carry). They count as one more reason to wait: a
//!   carried append stops while half of the ring is in use.
//! - Rule 23: what cannot be put in place is carried again, see [`again`], so that it keeps nothing else in the ring.
//!
//! [`heads`] keeps rule 13, [`walk`] rule 12, [`recovery`] rules 12 and 24.

mod again;
mod fault;
pub(crate) mod format;
mod group;
pub(crate) mod heads;
mod log;
mod owed;
pub(crate) mod place;
pub(crate) mod recovery;
mod ring;
pub(crate) mod walk;

use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use pumice_bdev::process::Birth;

use super::commit::in_place::{InPlace, clear_all};
use super::commit::{Batch, BeginCarry, Cleared, Commit, Failure, Restore};
use super::error::Error;
use super::format::{BlobId, PAGE_SIZE, Page};
use super::geometry::Geometry;
use super::mdio::MdChannels;
use again::Left;
use format::{Image, batch_bytes, carried_bytes};
use recovery::FoundJournal;
use ring::Ring;

/// See the module.
#[derive(Debug)]
pub(crate) struct Journal {
    ring: Arc<Ring>,
    in_place: InPlace,
    /// The latest checkpoint in the background.
    background: Mutex<Option<JoinHandle<()>>>,
    /// The process that has its thread.
    born: Birth,
}

impl Commit for Journal {
    fn append(&self, mut batch: Batch) -> Result<Cleared, Failure> {
        if batch.super_block.is_some() {
            // The guard is there before it, as before any change: the next one may be in the ring.
            let guard = batch.unmark.take();
            let left = self.ring.begin_and_empty(guard.as_deref(), &batch.geo)?;
            if !batch.names_log {
                left.check_all_pages()?;
            }
            return self.in_place.append(batch);
        }
        let carried = std::mem::take(&mut batch.carried);
        let fresh = batch.fresh.iter().map(|(index, page)| (*index, &**page));
        let points = batch.points.iter().map(|point| (point.index, &*point.page));
        let named: Vec<Image> = fresh.chain(points).map(image).collect();
        let blank = Arc::new([0; PAGE_SIZE]);
        let erased = batch.erase.iter().map(|index| (*index, Arc::clone(&blank)));
        let pages: Vec<Image> = named.into_iter().chain(erased).collect();
        let more = carried
            .iter()
            .map(|(carried, _)| carried_bytes(carried.bytes.len() as u64));
        let bytes = batch_bytes(&pages) + more.sum::<u64>();
        if bytes > self.ring.most() {
            if !carried.is_empty() {
                return Err(Error::invalid("the bytes do not fit a batch of the journal").into());
            }
            return self.append_large(batch);
        }
        let prepare = std::mem::take(&mut batch.prepare);
        if !prepare.is_empty() {
            self.ring.channels.get()?.run_durable(prepare)?;
        }
        if !pages.is_empty() || batch.unmark.is_some() {
            self.ring.submit(pages, carried, batch.unmark, batch.geo)?;
        }
        // From here on the change is made. Whether anything can be put in place or cleared does not matter to it.
        let given_up = self.give_up_deleted(&batch.given_up);
        self.empty_in_background();
        if batch.clear.is_empty() {
            return Ok(given_up);
        }
        let io = self.ring.channels.get();
        let cleared = io.map_or(Cleared::Ended, |mut io| clear_all(&mut io, batch.clear));
        Ok(if given_up == Cleared::Ended {
            cleared
        } else {
            given_up
        })
    }

    fn restore(&self, geo: &Geometry, restore: &mut Restore) -> Result<(), Error> {
        match restore {
            Restore::Ring => self.ring.make_void(&mut *self.ring.channels.get()?),
            Restore::Pages(_) | Restore::SuperBlock(_) => self.in_place.restore(geo, restore),
        }
    }

    fn settle(&self) -> Result<(), Error> {
        self.ring.empty()?.check()
    }

    fn put_pages(&self) -> Result<(), Error> {
        self.ring.empty()?.check_all_pages()
    }

    fn end(&self) {
        self.join();
        self.ring.end();
    }

    fn is_halted(&self) -> bool {
        self.ring.is_halted()
    }

    fn carries(&self) -> bool {
        true
    }

    fn make_carry_room(&self, len: u64) -> Result<(), Error> {
        if self.ring.has_carry_room(len) {
            return Ok(());
        }
        self.ring.empty().map(drop)
    }

    fn begin_carry(&self, blob: BlobId, len: u64) -> BeginCarry<()> {
        self.ring.begin_carry(blob, len)
    }

    fn end_carry(&self, blob: BlobId) {
        self.ring.end_carry(blob);
    }

    fn settle_blob(&self, blob: BlobId) -> Result<(), Error> {
        while self.ring.waits_for(blob) {
            // After a batch that failed, the next change may not come before this.
            let voided = self.ring.make_void(&mut *self.ring.channels.get()?);
            let left = voided.and_then(|()| self.ring.empty());
            let settled = left.and_then(|left| left.check_blobs(Some(&[blob])));
            settled.map_err(Error::owed)?;
        }
        Ok(())
    }

    fn put_owed(&self, blobs: Option<&[BlobId]>) -> Result<(), Error> {
        if !self.ring.owes(blobs) {
            return Ok(());
        }
        let left = self.ring.empty();
        left.and_then(|left| left.check_blobs(blobs))
            .map_err(Error::owed)
    }

    fn owed_bytes(&self) -> u64 {
        self.ring.owed_bytes()
    }

    fn owed_from(&self, blob: BlobId) -> Option<u64> {
        self.ring.owed_from(blob)
    }

    fn owes(&self, blobs: &[BlobId]) -> bool {
        self.ring.owes(Some(blobs))
    }

    fn give_up_owed(&self, blobs: &[BlobId]) -> Result<(), Error> {
        let left = self.ring.empty_without(blobs);
        left.map(drop).map_err(Error::owed)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // Nothing is written after the claim of the device has been given up.
        self.join();
    }
}

impl Journal {
    /// The journal that a load has found.
    pub fn new(channels: Arc<MdChannels>, geo: &Geometry, found: FoundJournal) -> Journal {
        Journal {
            ring: Arc::new(Ring::new(Arc::clone(&channels), geo, found)),
            in_place: InPlace::new(channels),
            background: Mutex::new(None),
            born: Birth::now(),
        }
    }

    /// Gives up what deleted blobs are owed. Until the ring is without it, a load may put it in their clusters, which nobody
    /// else gets.
    fn give_up_deleted(&self, blobs: &[BlobId]) -> Cleared {
        if blobs.is_empty() {
            return Cleared::Ended;
        }
        // What is owed to a blob that a batch has deleted does not go in place, and is forgotten with that batch.
        match self.ring.empty() {
            Ok(_) => Cleared::Ended,
            Err(error) => {
                tracing::warn!(%error, "the clusters of a deleted blob stay taken until the next load");
                Cleared::MayLand
            }
        }
    }

    /// Waits until no checkpoint runs in the background.
    fn join(&self) {
        let thread = self.background.lock().take();
        self.wait_for(thread);
    }

    fn wait_for(&self, thread: Option<JoinHandle<()>>) {
        let Some(thread) = thread else { return };
        if self.born.is_here() {
            // A panic in it has been reported where it happened.
            let _ = thread.join();
        } else {
            // A forked child has the handle of a thread that it does not have.
            std::mem::forget(thread);
        }
    }

    /// Makes a change whose pages do not fit a batch: those that nothing names yet go in place, then
    /// the commit points are one batch. If they do not fit one either, each is written in place.
    fn append_large(&self, mut batch: Batch) -> Result<Cleared, Failure> {
        let guard = batch.unmark.take();
        if !batch.given_up.is_empty() {
            // Here it comes before the change, whose first part goes in place.
            self.give_up_owed(&batch.given_up)?;
        }
        let left = self.ring.begin_and_empty(guard.as_deref(), &batch.geo)?;
        let points = batch.points.iter().map(|point| (point.index, &*point.page));
        let points: Vec<Image> = points.map(image).collect();
        let fits = batch_bytes(&points) <= self.ring.most();
        // A recovery would put in place again what the ring carries again.
        let fresh = batch.fresh.iter().map(|(index, _)| *index);
        let in_place = fresh.chain(batch.erase.iter().copied());
        let in_place = in_place.chain(points.iter().map(|(index, _)| *index).filter(|_| !fits));
        left.check_pages(in_place)?;
        if !fits {
            return self.in_place.append(batch);
        }
        batch.points.clear();
        let after = Batch {
            erase: std::mem::take(&mut batch.erase),
            clear: std::mem::take(&mut batch.clear),
            ..Batch::new(batch.geo.clone())
        };
        let geo = batch.geo.clone();
        self.in_place.append(batch)?;
        // The ring has begun, so that the guard is there.
        self.ring.submit(points, Vec::new(), None, geo)?;
        // The change is made. Whether anything can be cleared does not matter to it.
        Ok(self.in_place.append(after).unwrap_or(Cleared::Ended))
    }

    /// Begins a checkpoint on a thread of its own if one is due.
    fn empty_in_background(&self) {
        if !self.ring.begin_background() {
            return;
        }
        let ring = Arc::clone(&self.ring);
        let checkpoint = move || {
            let done = ring.empty().and_then(Left::check);
            if let Err(error) = &done {
                tracing::warn!(%error, "the journal could not be emptied; it is tried again before it is full");
            }
            ring.end_background(done.is_ok());
        };
        let name = "pumice-journal".to_owned();
        match std::thread::Builder::new().name(name).spawn(checkpoint) {
            Ok(thread) => {
                let before = self.background.lock().replace(thread);
                self.wait_for(before);
            }
            Err(error) => {
                tracing::warn!(%error, "no thread to empty the journal; a change does it when it is full");
                self.ring.end_background(false);
            }
        }
    }
}

fn image((index, page): (u32, &Page)) -> Image {
    (index, Arc::new(*page))
}
