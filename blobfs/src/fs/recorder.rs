//! Room in the log in shared memory: the files whose entries are the oldest are written to their clusters.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::inode::Inode;
use super::life::Lives;
use super::names::Names;
use super::shm_log::{Room, ShmLog, room_for};
use super::sync::Syncer;

/// From this length on, data is long.
const LONG: u64 = 64 << 10;
/// Number of entries without data that a write makes at most.
const MARKS: u64 = 2;

/// Keeps room in the log.
pub(crate) struct Recorder {
    pub log: Arc<ShmLog>,
    pub syncer: Arc<Syncer>,
    pub names: Arc<Names>,
    pub lives: Arc<Lives>,
    /// Held by a thread that makes room for the others.
    pub turn: Mutex<()>,
}

impl Recorder {
    /// Takes room for a write of `data` bytes at any place, or a truncation, with no lock held. May write other files for it.
    /// Blocks.
    pub fn room(&self, data: usize) -> Room<'_> {
        self.room_with(data, MARKS)
    }

    /// Takes room for an append of `data` bytes, as [`Recorder::room`] does.
    #[inline]
    pub fn room_to_append(&self, data: usize) -> Room<'_> {
        self.room_with(data, 0)
    }

    #[inline]
    fn room_with(&self, data: usize, marks: u64) -> Room<'_> {
        let log = &*self.log;
        if log.is_off() {
            return log.no_room();
        }
        let bytes = room_for(data, marks);
        if log.is_on()
            && bytes < LONG
            && log.used() < log.limit() / 4 * 3
            && let Some(room) = log.try_take(bytes)
        {
            return room;
        }
        self.make_room(bytes)
    }

    #[cold]
    fn make_room(&self, bytes: u64) -> Room<'_> {
        let log = &*self.log;
        log.make();
        let too_long = bytes > log.limit() / 2;
        let bytes = if too_long { room_for(0, MARKS) } else { bytes };
        let wanted = if bytes >= LONG { 2 } else { 3 };
        if log.used() > log.limit() / 4 * wanted
            && let Some(turn) = self.turn.try_lock()
        {
            self.record_oldest();
            drop(turn);
        }
        loop {
            if !log.is_on() {
                return log.no_room();
            }
            if let Some(mut room) = log.try_take(bytes) {
                room.too_long = too_long;
                return room;
            }
            // The turns come one after the other, and each frees something or ends the log.
            let _turn = self.turn.lock();
            if log.used() + bytes > log.limit() && !self.record_oldest() {
                return log.no_room();
            }
        }
    }

    /// Places the file with the oldest entry, or syncs it if nothing was written to it since it was placed. If that frees nothing,
    /// there is no log from then on. Returns false if the mount is ending: it makes everything durable itself.
    fn record_oldest(&self) -> bool {
        let log = &*self.log;
        let Some((at, ino)) = log.oldest() else {
            // Others have taken the room, and have not written yet.
            std::thread::sleep(Duration::from_millis(1));
            return true;
        };
        if !self.names.hold(&ino) {
            // It is being deleted, which needs no room here.
            std::thread::sleep(Duration::from_millis(1));
            return true;
        }
        let is_placed = ino.tail.lock().logged.is_placed;
        let done = if is_placed {
            self.syncer.sync(&ino)
        } else {
            self.syncer.place(&ino)
        };
        let stuck = log.oldest().is_some_and(|(first, _)| first == at);
        self.lives.close(&ino);
        match done {
            Err(_) if self.syncer.vol.check_mounted(String::new).is_err() => return false,
            Err(error) => log.give_up(&format!("{}: {error}", ino.path())),
            Ok(()) if stuck => log.give_up("nothing of it could be freed"),
            Ok(()) => {}
        }
        true
    }

    /// Places data that is too long for the log. The data is accepted in any case, so a failure is told by the next sync.
    #[cold]
    pub fn place_instead(&self, ino: &Arc<Inode>) {
        if let Err(error) = self.syncer.place(ino) {
            tracing::warn!(file = ino.path(), %error, "long data could not be written, and is lost if the process is killed");
        }
    }
}
