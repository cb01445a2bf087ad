//! Space: how much can be written, the reserve, freeing, and growing.
//!
//! A file system has space of three kinds: clusters, metadata pages and, below a sparse image,
//! space on the kernel's file system. Whatever ran out, files can be deleted and truncated, and the
//! file system mounted and unmounted: those changes may use the reserve, and a failure to free
//! space is never an error.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::MutexGuard;

use super::error::{FsError, Result, SpaceKind};
use super::inode::Inode;
use super::names::Names;
use super::tail::Tail;
use super::volume::Volume;
use super::writeback::Writeback;
use crate::blobstore::{ClusterInit, SpacePolicy, Spend};

/// Smallest step of allocation ahead after a file's first cluster.
const GROW_MIN: u64 = 1 << 20;
/// Largest step of allocation ahead of an appending writer.
const GROW_MAX: u64 = 64 << 20;
/// Longest part of an essential file that may use the reserve.
const ESSENTIAL_MAX: u64 = 1 << 20;
/// The reserve of a mounted file system, and that its metadata grows.
pub(crate) const POLICY: SpacePolicy = SpacePolicy {
    reserve: true,
    grow_metadata: true,
};

/// Number of syncs after which the room on the host is looked at again.
const LOOK_AT_HOST: u64 = 32;
/// Bytes of room on the host without which nothing is carried: much more than what that many syncs are.
const CARRY_ROOM: u64 = 16 << 20;

/// Allocates clusters for files and frees them.
pub(crate) struct Space {
    pub vol: Arc<Volume>,
    pub writeback: Arc<Writeback>,
    pub names: Arc<Names>,
    /// Number of syncs that asked whether they may be carried.
    pub carried: AtomicU64,
    /// The answer.
    pub may_carry: AtomicBool,
}

impl Space {
    /// Returns the bytes that the file system below a sparse image has room for, beyond what files
    /// have been promised. `None` if nothing can run out there.
    pub fn host_room(&self) -> Option<u64> {
        let host = self.vol.dev.host_space()?;
        let unused = self.vol.store.free_clusters() * self.vol.cluster;
        let used = self.vol.dev.info().len_bytes().saturating_sub(unused);
        Some((host.free_bytes + host.allocated_bytes).saturating_sub(used))
    }

    /// Whether the file system below a sparse image is likely to have the blocks of what the journal carries when that is put
    /// in place. Otherwise a sync writes its bytes there first, and fails before anything was promised.
    pub fn host_has_room_to_carry(&self) -> bool {
        if self
            .carried
            .fetch_add(1, Ordering::Relaxed)
            .is_multiple_of(LOOK_AT_HOST)
        {
            let has_room = self.host_room().is_none_or(|bytes| bytes >= CARRY_ROOM);
            self.may_carry.store(has_room, Ordering::Relaxed);
        }
        self.may_carry.load(Ordering::Relaxed)
    }

    /// Refuses to promise a file more than the file system below has room for.
    pub fn check_host(&self, ino: &Inode, bytes: u64) -> Result<()> {
        match self.host_room() {
            Some(free_bytes) if free_bytes < bytes => Err(FsError::NoSpace {
                what: format!("{}: {bytes} bytes more", ino.path()),
                kind: SpaceKind::Host,
                free_bytes,
            }),
            _ => Ok(()),
        }
    }

    /// Number of bytes that files can still use.
    pub fn free_bytes(&self) -> u64 {
        if !self.vol.store.can_take_md_page() {
            return 0;
        }
        let free = self.vol.store.available_clusters() * self.vol.cluster;
        self.host_room().map_or(free, |host| free.min(host))
    }

    /// Makes sure that the first `end` bytes have clusters: exactly those, or some ahead.
    ///
    /// # Errors
    /// Nothing has changed if there is no space.
    pub fn reserve(&self, ino: &Arc<Inode>, tail: &mut Tail, end: u64, exact: bool) -> Result<()> {
        if end <= tail.allocated {
            return Ok(());
        }
        let needed = end.div_ceil(self.vol.cluster);
        // A blob has no more clusters than that, however large the store is.
        if needed > u64::from(u32::MAX) {
            return Err(FsError::NoSpace {
                what: format!("{}: {end} bytes", ino.path()),
                kind: SpaceKind::Clusters,
                free_bytes: self.free_bytes(),
            });
        }
        let have = tail.allocated / self.vol.cluster;
        let bytes = |clusters: u64| (clusters - have) * self.vol.cluster;
        let ahead = if exact {
            needed
        } else {
            let step = match have {
                0 => 0,
                have => (have * 3)
                    .max(GROW_MIN / self.vol.cluster)
                    .min(GROW_MAX / self.vol.cluster),
            };
            needed.max(have + step)
        };
        // The last clusters are not worth holding ahead.
        let spare = self.vol.store.available_clusters();
        let host = self.host_room().unwrap_or(u64::MAX);
        let want = if ahead - have > spare / 4 || bytes(ahead) > host / 4 {
            needed
        } else {
            ahead
        };
        match self.extend(ino, tail, want) {
            Err(FsError::NoSpace { .. }) => {
                self.trim_others(ino);
                self.extend(ino, tail, needed)
            }
            result => result,
        }
    }

    /// Gives a file more clusters, if there is also room for their bytes below the device.
    pub fn extend(&self, ino: &Inode, tail: &mut Tail, clusters: u64) -> Result<()> {
        let end = clusters * self.vol.cluster;
        self.check_host(ino, end - tail.allocated)?;
        let essential = ino.essential.load(Ordering::Relaxed) && end <= ESSENTIAL_MAX;
        let spend = if essential {
            Spend::Opening
        } else {
            Spend::Ordinary
        };
        self.set_clusters(ino, tail, clusters, spend)
    }

    /// Changes the number of clusters, usually to fewer. Durable on return.
    pub fn resize(&self, ino: &Inode, tail: &mut Tail, clusters: u64) -> Result<()> {
        self.set_clusters(ino, tail, clusters, Spend::Releasing)
    }

    fn set_clusters(
        &self,
        ino: &Inode,
        tail: &mut Tail,
        clusters: u64,
        spend: Spend,
    ) -> Result<()> {
        // Freed clusters may belong to another file at once, so no write to them may be in flight.
        self.writeback
            .wait_overlapping(tail, clusters * self.vol.cluster, u64::MAX);
        let mut tx = self.vol.store.transaction();
        tx.spend(spend);
        tx.resize_with(ino.id, clusters, ClusterInit::CallerWrites);
        tx.commit().map_err(|e| {
            self.vol
                .store_error(format!("{}: {clusters} clusters", ino.path()), e)
        })?;
        tail.grown |= clusters * self.vol.cluster > tail.allocated;
        self.resized(ino, tail, clusters);
        Ok(())
    }

    /// Records a new number of clusters.
    pub fn resized(&self, ino: &Inode, tail: &mut Tail, clusters: u64) {
        tail.allocated = clusters * self.vol.cluster;
        ino.allocated.store(tail.allocated, Ordering::Release);
        tail.stop_fast_path();
    }

    /// Frees clusters that files hold ahead, but not those of `not`.
    pub fn trim_others(&self, not: &Inode) {
        for ino in self.names.inodes() {
            if ino.id == not.id || ino.is_thin() || ino.is_frozen() {
                continue;
            }
            // A file that is being appended to needs what it holds.
            if let Some(tail) = ino.tail.try_lock() {
                self.trim(&ino, tail);
            }
        }
    }

    /// Frees the clusters past the end of the file.
    pub fn trim(&self, ino: &Inode, mut tail: MutexGuard<'_, Tail>) {
        let needed = ino.len().div_ceil(self.vol.cluster);
        // A thread that deletes a file must have the last reference to its blob.
        if ino.is_going()
            || tail.reserved
            || !tail.grown
            || tail.allocated / self.vol.cluster <= needed
            || self.vol.check_writable(String::new).is_err()
        {
            return;
        }
        if let Err(error) = self.resize(ino, &mut tail, needed) {
            tracing::warn!(file = ino.path(), %error, "space allocated ahead was not freed");
        }
    }

    /// Frees what was allocated past the end of a file that nobody will append to. A failure is not
    /// an error.
    pub fn finish_writing(&self, ino: &Arc<Inode>) {
        let mut tail = ino.tail.lock();
        tail.reserved = false;
        self.trim(ino, tail);
    }
}
