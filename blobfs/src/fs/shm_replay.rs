//! After a killed process: puts in place what its log in shared memory has and the device does not.
//!
//! The log is used if it has the session of the super block, and the store was not unloaded since. What it says of a file is
//! done again in its order; what is done already changes nothing. The log stays until all of it is durable, so a second kill
//! in between is harmless.

use std::collections::{BTreeMap, HashMap};
use std::io;

use super::core::Core;
use super::error::Result;
use super::inode::Inode;
use super::shm_log::place_of;
use super::shm_ring::{LogEntry, ShmRing, What};
use super::shm_show::{lengthen, show};
use super::volume::Phase;
use crate::blobstore::Blobstore;

/// A change at its position.
type Placed = (u64, What<Vec<u8>>);

/// The log that a killed process has left.
#[derive(Default)]
pub(super) struct Left {
    ring: Option<ShmRing>,
    /// The changes of each blob, in their order.
    changes: BTreeMap<u64, Vec<What<Vec<u8>>>>,
    /// A line for each reason why the log cannot be used.
    pub damage: Vec<String>,
    /// Whether there is a log that cannot be opened.
    unreadable: bool,
}

/// Looks for the log of the store's session, and reads it. Changes nothing. `lens` has the lengths of the files, by their blobs.
pub(super) fn find(host_name: Option<&str>, store: &Blobstore, lens: &HashMap<u64, u64>) -> Left {
    let super_block = store.super_block();
    let mut left = Left::default();
    let Some(place) = host_name.map(place_of).filter(|_| !super_block.is_clean()) else {
        return left;
    };
    match ShmRing::open(&place, super_block.session()) {
        Ok(Some(ring)) => {
            match ring.entries() {
                Ok(entries) => left.order(entries, lens),
                Err(why) => left.damage.push(format!(
                    "the log in shared memory, {}, that a killed process has left: {why}",
                    place.display()
                )),
            }
            left.ring = Some(ring);
        }
        Ok(None) => {}
        Err(error) => {
            let place = place.display();
            tracing::warn!(%place, %error, "a log in shared memory cannot be read");
            left.unreadable = true;
        }
    }
    left
}

impl Left {
    /// Sorts entries by blob, without those that the device has.
    fn order(&mut self, entries: Vec<LogEntry>, lens: &HashMap<u64, u64>) {
        let mut changes: BTreeMap<u64, Vec<Placed>> = BTreeMap::new();
        let mut recorded: HashMap<u64, u64> = HashMap::new();
        for LogEntry { at, blob, what } in entries {
            match what {
                What::Gone => {
                    changes.remove(&blob);
                    recorded.remove(&blob);
                }
                What::Recorded { len, upto } => {
                    changes
                        .entry(blob)
                        .or_default()
                        .retain(|(at, _)| *at >= upto);
                    recorded.insert(blob, len);
                }
                What::Placed { len, upto } => {
                    let all = changes.entry(blob).or_default();
                    all.retain(|(at, _)| *at >= upto);
                    // It comes before what was written while it was made.
                    all.insert(0, (upto, What::Placed { len, upto }));
                }
                what => {
                    // The cut may have been made.
                    if matches!(what, What::Cutting { .. }) {
                        recorded.remove(&blob);
                    }
                    changes.entry(blob).or_default().push((at, what));
                }
            }
        }
        for (blob, len) in lens {
            let expected = recorded.get(blob).copied();
            let begins = changes.get(blob).and_then(|all| needed(all, *len));
            if let Some(expected) = expected.max(begins).filter(|expected| len < expected) {
                self.damage.push(format!(
                    "blob {blob:#x}: {len} bytes, where a killed process had synced {expected}: the device was set back, and \
                     what its log in shared memory has does not belong to it"
                ));
            }
        }
        let files = changes
            .into_iter()
            .filter(|(blob, all)| !all.is_empty() && lens.contains_key(blob));
        self.changes = files
            .map(|(blob, all)| (blob, all.into_iter().map(|(_, what)| what).collect()))
            .collect();
    }

    /// Shows the changes in a mount that only reads. Returns whether some of them are not shown.
    pub fn show(&self, core: &Core) -> bool {
        let mut hides = self.unreadable || !self.damage.is_empty();
        if self.damage.is_empty() {
            for ino in core.names.inodes() {
                if let Some(changes) = self.changes.get(&ino.id.0)
                    && let Err(error) = show(core, &ino, changes)
                {
                    tracing::warn!(file = ino.path(), %error, "what a killed process had not synced is not shown");
                    hides = true;
                }
            }
        }
        hides
    }

    /// Puts the changes in place, durably, and ends the session. The mount does not write to a log of its own yet.
    ///
    /// # Errors
    /// The mount has to end; the log is left for the next one. With `accept_damage` what cannot be put in place, or belongs to
    /// a damaged log, is lost.
    pub fn put_in_place(self, core: &Core, host_name: Option<&str>) -> Result<()> {
        let accept = core.vol.opts.accept_damage;
        if self.damage.is_empty() {
            for ino in core.names.inodes() {
                let Some(changes) = self.changes.get(&ino.id.0) else {
                    continue;
                };
                let done = changes
                    .iter()
                    .try_for_each(|what| redo(core, &ino, what))
                    .and_then(|()| core.syncer.sync(&ino));
                match done {
                    Ok(()) => {
                        tracing::info!(
                            file = ino.path(),
                            bytes = ino.len(),
                            "put in place what a killed process had not synced"
                        );
                    }
                    Err(error) if accept => {
                        tracing::error!(file = ino.path(), %error, "what a killed process had not synced is lost");
                    }
                    Err(error) => {
                        // The store is not unloaded in order, so that the log still counts.
                        core.vol.phase.store(Phase::Unmounted);
                        return Err(error);
                    }
                }
            }
        }
        if core.vol.store.super_block().session() != 0 {
            let ended = core.vol.store.set_session(0);
            ended.map_err(|e| {
                core.vol
                    .store_error("ending the session of a killed process", e)
            })?;
        }
        self.remove(host_name);
        Ok(())
    }

    /// Removes the log, or one that belongs to nothing.
    fn remove(self, host_name: Option<&str>) {
        if let Some(ring) = self.ring {
            ring.remove();
        } else if let Some(place) = host_name.map(place_of)
            && let Err(error) = std::fs::remove_file(&place)
            && error.kind() != io::ErrorKind::NotFound
        {
            let place = place.display();
            tracing::warn!(%place, %error, "a log in shared memory that belongs to nothing cannot be removed");
        }
    }
}

/// Returns the length that a file needs for its first change that begins past its end, if no later one explains that it has
/// less: one cuts the file, or one before has to be missing.
fn needed(changes: &[Placed], mut len: u64) -> Option<u64> {
    let is_cut = |what: &What<Vec<u8>>| matches!(what, What::Cutting { .. } | What::Cut { .. });
    let cut = changes.iter().rposition(|(_, what)| is_cut(what));
    for (index, (_, what)) in changes.iter().enumerate() {
        let (begins, ends) = match what {
            What::Bytes { off, data } => (*off, off.saturating_add(data.len() as u64)),
            What::Zeroes { old_len, new_len } => (*old_len, *new_len),
            What::Cut { len: cut } => (0, len.min(*cut)),
            What::Placed { len, .. } => (0, *len),
            What::Long => return None,
            _ => continue,
        };
        if begins > len && cut.is_none_or(|cut| cut < index) {
            return Some(begins);
        }
        len = match what {
            What::Cut { .. } => ends,
            _ if begins > len => len,
            _ => len.max(ends),
        };
    }
    None
}

/// Does a change again. One that begins past the end of the file was followed by a cut, which comes next.
fn redo(core: &Core, ino: &std::sync::Arc<Inode>, what: &What<Vec<u8>>) -> Result<()> {
    let len = ino.len();
    match what {
        What::Bytes { off, data } if *off <= len => core.overwriter.write_at(ino, *off, data),
        What::Zeroes { old_len, new_len } if *old_len <= len && *new_len > len => {
            core.truncater.truncate(ino, *new_len)
        }
        What::Cut { len: cut } if *cut < len => core.truncater.truncate(ino, *cut),
        What::Placed { len: placed, .. } => {
            lengthen(ino, *placed);
            // The length must not be durable before the bytes that it covers.
            let flushed = core.vol.store.flush();
            flushed.map_err(|e| core.vol.store_error(ino.path(), e))
        }
        _ => Ok(()),
    }
}
