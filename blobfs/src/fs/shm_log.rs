//! What was written and not synced, in memory that is left when the process is killed.
//!
//! Appended bytes are in this process's memory until they are written behind, and their file's length is on the device only
//! after a sync. So every write is also an entry in a log in shared memory (`/dev/shm`), and the next mount on the same
//! boot of the machine puts in place what the device does not have ([`super::shm_replay`]). A power cut loses the log, and
//! with it what was not synced.
//!
//! - An entry follows its write, with the append lock held, before the write returns.
//! - A write inside a file that went through to the device needs no entry, unless the file has earlier ones that could be
//!   put in place over it.
//! - A sync takes the log's head first. When the file is durable, `Recorded` says that the entries below that head are on the
//!   device, and frees them.
//! - When room is needed, the bytes of a file are written to its clusters, and `Placed` takes the place of their entries. That
//!   costs no flush and no length on the device: a kill takes nothing from a device's cache.
//! - The end of a name that was the file's last frees its entries too, before the blob's number can belong to another file.
//! - The log belongs to a session, a random number in the super block, which is durable before the first entry. Every mount
//!   that does not find the log of its session changes or clears the number, so no log outlives a change that it does not
//!   know.
//!
//! The log is made by a mount's first write. Its room is bounded: when half of it is in use, whoever writes long data
//! places the file with the oldest entry; at three quarters, everybody does ([`super::recorder`]). Where there is no shared memory, or it
//! fails, the mount goes on without the log, and says so.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use crossbeam::atomic::AtomicCell;
use parking_lot::Mutex;

use super::inode::{Inode, Life};
use super::shm_ring::{ShmRing, What, entry_bytes};
use super::tail::{Logged, Tail};
use super::volume::Volume;

/// The directory of the logs.
const DIRECTORY: &str = "/dev/shm";
/// The length of a log, where there is memory enough.
const MOST_BYTES: usize = 16 << 20;

/// Most bytes of an entry. A longer one would hold the log for too long: others append short records meanwhile.
const PIECE: usize = 64 << 10;

/// Whether a mount has a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Presence {
    /// It has none.
    Off,
    /// It has none yet: its first write makes one.
    Unmade,
    On,
}

/// Returns the name of the log of a device and a session.
pub(super) fn place_of(host_name: &str, session: u64) -> PathBuf {
    Path::new(DIRECTORY).join(format!("pumice-{host_name}-{session:016x}"))
}

#[derive(Default)]
struct LogState {
    ring: Option<ShmRing>,
    /// The files by the position of their first entry that is not recorded, and their blob.
    oldest: BTreeMap<(u64, u64), Weak<Inode>>,
}

/// The log of a mount; see the module.
pub(crate) struct ShmLog {
    vol: Arc<Volume>,
    presence: AtomicCell<Presence>,
    host_name: Option<String>,
    /// Bytes of the ring.
    bytes: usize,
    /// Bytes of entries that are there, or for which a writer has taken room.
    used: AtomicU64,
    state: Mutex<LogState>,
    making: Mutex<()>,
}

/// Returns the length of a log, a power of two, where this much memory may be used for it.
fn ring_bytes(memory: usize) -> usize {
    1 << MOST_BYTES.min(memory).max(4096).ilog2()
}

/// Returns the bytes that the entries of a write of `data` bytes take at most, with `marks` entries without data.
pub(super) fn room_for(data: usize, marks: u64) -> u64 {
    entry_bytes(data) + (marks + (data / PIECE) as u64) * entry_bytes(0)
}

/// Room for the entries of one write. Dropping it gives back what was not used.
pub(crate) struct Room<'a> {
    log: &'a ShmLog,
    bytes: u64,
    /// Whether the data is too long for the log, so that it has to be synced instead.
    pub too_long: bool,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.log.used.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

impl ShmLog {
    /// The log of a mount of this device. Without a name that others know it by, and in a mount that does not want one, there
    /// is none.
    pub fn new(vol: &Arc<Volume>, host_name: Option<&str>) -> ShmLog {
        let wanted = !vol.opts.read_only && !vol.opts.volatile;
        ShmLog {
            vol: Arc::clone(vol),
            presence: AtomicCell::new(Presence::Off),
            host_name: host_name.filter(|_| wanted).map(str::to_owned),
            bytes: ring_bytes(super::memory::default_behind_bytes()),
            used: AtomicU64::new(0),
            state: Mutex::default(),
            making: Mutex::default(),
        }
    }

    /// Lets the next write make the log.
    pub fn arm(&self) {
        if self.host_name.is_some() {
            self.presence.store(Presence::Unmade);
        }
    }

    /// Whether there is none, and none will be made.
    #[inline]
    pub fn is_off(&self) -> bool {
        self.presence.load() == Presence::Off
    }

    /// Bytes in use.
    #[inline]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    #[inline]
    pub fn is_on(&self) -> bool {
        self.presence.load() == Presence::On
    }

    /// Bytes that entries may use. The rest is for those that end others.
    pub fn limit(&self) -> u64 {
        self.bytes as u64 / 8 * 7
    }

    /// Makes the log, if there is to be one. The session is durable before its first entry.
    #[cold]
    pub fn make(&self) {
        let _one = self.making.lock();
        if self.presence.load() != Presence::Unmade {
            return;
        }
        let device = &self.vol.dev.info().name;
        let session = RandomState::new().hash_one(device.as_str()).max(1);
        let Some(host_name) = &self.host_name else {
            return;
        };
        let place = place_of(host_name, session);
        let made = ShmRing::create(&place, session, self.bytes);
        let presence = match made.map(|ring| (ring, self.vol.store.set_session(session))) {
            Ok((ring, Ok(()))) => {
                self.state.lock().ring = Some(ring);
                Presence::On
            }
            Ok((ring, Err(error))) => {
                tracing::warn!(device, %error, "what is not synced is lost when the process is killed: the device does not name the log");
                ring.remove();
                Presence::Off
            }
            Err(error) => {
                let place = place.display();
                tracing::warn!(device, %place, %error, "what is not synced is lost when the process is killed: no log in shared memory");
                Presence::Off
            }
        };
        self.presence.store(presence);
    }

    /// Goes on without the log.
    #[cold]
    pub fn give_up(&self, why: &str) {
        self.presence.store(Presence::Off);
        let mut state = self.state.lock();
        state.oldest.clear();
        if let Some(ring) = state.ring.take() {
            let device = &self.vol.dev.info().name;
            tracing::warn!(
                device,
                why,
                "what is not synced, of any file, is lost from here on when the process is killed"
            );
            ring.remove();
        }
    }

    /// Takes room, if there is.
    #[inline]
    pub fn try_take(&self, bytes: u64) -> Option<Room<'_>> {
        let before = self.used.fetch_add(bytes, Ordering::Relaxed);
        let room = Room {
            log: self,
            bytes,
            too_long: false,
        };
        (before + bytes <= self.limit()).then_some(room)
    }

    pub fn no_room(&self) -> Room<'_> {
        Room {
            log: self,
            bytes: 0,
            too_long: false,
        }
    }

    /// Returns the position of the next entry. A sync that begins after this covers the entries below it.
    pub fn mark(&self) -> u64 {
        if !self.is_on() {
            return 0;
        }
        self.state.lock().ring.as_ref().map_or(0, ShmRing::head)
    }

    /// Adds an entry about a file that has a name.
    fn push(&self, ino: &Arc<Inode>, tail: &mut Tail, what: &What<&[u8]>) {
        let mut state = self.state.lock();
        let Some(at) = state.ring.as_mut().map(|ring| ring.push(ino.id.0, what)) else {
            return;
        };
        let Some(at) = at else {
            drop(state);
            self.give_up("it is full");
            return;
        };
        tail.logged.last = Some(at);
        tail.logged.is_placed = false;
        if tail.logged.from.is_none() {
            tail.logged.from = Some(at);
            state.oldest.insert((at, ino.id.0), Arc::downgrade(ino));
        }
    }

    /// Records that the file on the device has all that its entries below `mark` say.
    pub fn recorded(&self, ino: &Arc<Inode>, mark: u64) {
        let what = What::Recorded {
            len: ino.durable_len.load(Ordering::Acquire),
            upto: mark,
        };
        self.replace(ino, mark, &what);
    }

    /// Records that the file's clusters have all that its entries below `mark` say, up to `len`. No truncation is under way.
    pub fn placed(&self, ino: &Arc<Inode>, mark: u64, len: u64) {
        self.replace(ino, mark, &What::Placed { len, upto: mark });
    }

    /// Adds an entry that takes the place of those of the file below `mark`, and frees them.
    fn replace(&self, ino: &Arc<Inode>, mark: u64, what: &What<&[u8]>) {
        if !self.is_on() {
            return;
        }
        let mut tail = ino.tail.lock();
        let Some(from) = tail.logged.from.filter(|from| *from < mark) else {
            return;
        };
        let more = tail.logged.last.is_some_and(|last| last >= mark);
        let stays = matches!(what, What::Placed { .. });
        let mut state = self.state.lock();
        let Some(ring) = &mut state.ring else { return };
        // Without room for it the entries stay, which costs room and nothing else.
        let Some(at) = ring.push(ino.id.0, what) else {
            return;
        };
        self.used.fetch_add(entry_bytes(0), Ordering::Relaxed);
        let oldest = stays.then_some(at);
        let oldest = if more { Some(mark) } else { oldest };
        tail.logged = Logged {
            from: oldest,
            last: Some(at),
            is_placed: stays && !more,
        };
        state.oldest.remove(&(from, ino.id.0));
        if let Some(oldest) = oldest {
            let key = (oldest, ino.id.0);
            state.oldest.insert(key, Arc::downgrade(ino));
        }
        self.free(&mut state);
    }

    /// Records that the file has lost its last name, so that its entries count for nothing. Called before another file can
    /// have its blob.
    pub fn gone(&self, ino: &Arc<Inode>) {
        if !self.is_on() {
            return;
        }
        let mut tail = ino.tail.lock();
        let logged = std::mem::take(&mut tail.logged);
        let mut state = self.state.lock();
        let Some(ring) = &mut state.ring else { return };
        if logged.last.is_none_or(|last| last < ring.tail()) {
            return;
        }
        if ring.push(ino.id.0, &What::Gone).is_none() {
            drop(state);
            drop(tail);
            self.give_up("it is full");
            return;
        }
        self.used.fetch_add(entry_bytes(0), Ordering::Relaxed);
        if let Some(from) = logged.from {
            state.oldest.remove(&(from, ino.id.0));
        }
        self.free(&mut state);
    }

    /// Frees what comes before the oldest entry that is not recorded.
    fn free(&self, state: &mut LogState) {
        let oldest = state.oldest.first_key_value().map(|((at, _), _)| *at);
        let Some(ring) = &mut state.ring else { return };
        let tail = oldest.unwrap_or(ring.head());
        let freed = tail - ring.tail();
        if freed > 0 {
            ring.set_tail(tail);
            self.used.fetch_sub(freed, Ordering::Relaxed);
        }
    }

    /// Returns the file with the oldest entry that is not recorded, and the entry's position.
    pub fn oldest(&self) -> Option<(u64, Arc<Inode>)> {
        let mut state = self.state.lock();
        loop {
            let entry = state.oldest.first_entry()?;
            if let Some(ino) = entry.get().upgrade() {
                return Some((entry.key().0, ino));
            }
            entry.remove();
            self.free(&mut state);
        }
    }

    /// Removes the log at the end of the mount, when everything is durable or given up. The device may keep the session if it
    /// fails: nothing is left that belongs to it.
    pub fn end(&self) {
        let _one = self.making.lock();
        self.presence.store(Presence::Off);
        let ring = {
            let mut state = self.state.lock();
            state.oldest.clear();
            state.ring.take()
        };
        if let Some(ring) = ring {
            ring.remove();
            if let Err(error) = self.vol.store.set_session(0) {
                tracing::warn!(%error, "the device still names a log in shared memory, which is gone");
            }
        }
    }
}

impl Room<'_> {
    /// Adds an entry for `data`, which was written at `off`. The file had `old_len` bytes; a gap became zeroes.
    #[inline]
    pub fn note(&mut self, ino: &Arc<Inode>, tail: &mut Tail, old_len: u64, off: u64, data: &[u8]) {
        if self.bytes == 0 || ino.life.load() != Life::Named {
            return;
        }
        if self.too_long {
            self.spend(ino, tail, &What::Long);
            return;
        }
        if off > old_len {
            let new_len = off;
            self.spend(ino, tail, &What::Zeroes { old_len, new_len });
        }
        for (data, piece) in data.chunks(PIECE).zip(0..) {
            let off = off + piece * PIECE as u64;
            self.spend(ino, tail, &What::Bytes { off, data });
        }
    }

    /// Adds an entry for `data`, which replaced bytes of the file at `off`. `kept` says that it is in this process's memory only.
    pub fn note_inside(
        &mut self,
        ino: &Arc<Inode>,
        tail: &mut Tail,
        off: u64,
        data: &[u8],
        kept: bool,
    ) {
        if kept || tail.logged.from.is_some() {
            let len = ino.len();
            self.note(ino, tail, len, off, data);
        }
    }

    /// Says that the file is about to be made shorter.
    pub fn note_cutting(&mut self, ino: &Arc<Inode>, tail: &mut Tail, len: u64) {
        if self.bytes > 0 && tail.logged.last.is_some() {
            self.spend(ino, tail, &What::Cutting { len });
        }
    }

    /// Says that it was made shorter.
    pub fn note_cut(&mut self, ino: &Arc<Inode>, tail: &mut Tail, len: u64) {
        if self.bytes > 0 && tail.logged.last.is_some() {
            self.spend(ino, tail, &What::Cut { len });
        }
    }

    #[inline]
    fn spend(&mut self, ino: &Arc<Inode>, tail: &mut Tail, what: &What<&[u8]>) {
        self.bytes -= what.entry_bytes();
        self.log.push(ino, tail, what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ring has as many bytes as the log counts with, whatever memory there is.
    #[test]
    fn a_log_is_as_long_as_its_ring() {
        for (memory, bytes) in [
            (4 << 20, 4 << 20),
            (6_700_000, 4 << 20),
            (33 << 20, 16 << 20),
        ] {
            assert_eq!(ring_bytes(memory), bytes);
            let dir = tempfile::tempdir().unwrap();
            let ring = ShmRing::create(&dir.path().join("log"), 1, bytes).unwrap();
            assert_eq!(ring.capacity(), bytes as u64);
        }
    }

    #[test]
    fn the_room_of_a_write_is_enough_for_its_pieces() {
        for data in [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 5 * PIECE + 7] {
            let bytes = vec![0; data];
            let pieces: u64 = bytes
                .chunks(PIECE)
                .map(|piece| entry_bytes(piece.len()))
                .sum();
            assert!(pieces <= room_for(data, 0), "{data}");
        }
    }
}
