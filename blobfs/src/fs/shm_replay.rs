//! After a killed process: puts in place what its log in shared memory has and the device does not.
//!
//! The log is used if it has the session of the super block, and the store was not unloaded since. What it says of a file is
//! done again in its order; what is done already changes nothing. The log stays until all of it is durable, so a second kill
//! in between is harmless.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;

use super::core::Core;
use super::error::Result;
use super::inode::Inode;
use super::shm_log::place_of;
use super::shm_ring::{LogEntry, ShmRing, What};
use super::shm_show::{Budget, lengthen, show};
use super::volume::Phase;
use crate::blobstore::Blobstore;

/// A change at its position.
type Placed = (u64, What<Vec<u8>>);

/// A file as the device has it.
#[derive(Clone, Copy)]
pub(super) struct OnDevice {
    pub len: u64,
    /// Number of bytes that have clusters.
    pub allocated: u64,
}

/// The log that a killed process has left.
#[derive(Default)]
pub(super) struct Left {
    ring: Option<ShmRing>,
    /// The place of the log of the device's session, if it is there.
    place: Option<PathBuf>,
    /// The changes of each blob, in their order.
    changes: BTreeMap<u64, Vec<What<Vec<u8>>>>,
    /// A line for each reason why the log cannot be used.
    pub damage: Vec<String>,
}

/// Looks for the log of the store's session, and reads it. Changes nothing. `files` has the files by their blobs.
pub(super) fn find(
    host_name: Option<&str>,
    store: &Blobstore,
    files: &HashMap<u64, OnDevice>,
) -> Left {
    let super_block = store.super_block();
    let session = super_block.session();
    let mut left = Left::default();
    let Some(place) = host_name
        .filter(|_| session != 0)
        .map(|name| place_of(name, session))
    else {
        return left;
    };
    // After an orderly end, which another program may have made, the log says nothing of the store.
    if !super_block.is_clean() {
        let shown = place.display();
        let found = ShmRing::open(&place, session).map_err(|error| error.to_string());
        let found = found.and_then(|ring| match ring {
            Some(ring) => ring.entries().map(|entries| Some((ring, entries))),
            None => Ok(None),
        });
        match found {
            Ok(None) => {}
            Ok(Some((ring, entries))) => {
                left.order(entries, files);
                left.ring = Some(ring);
            }
            Err(why) => left.damage.push(format!(
                "the log in shared memory, {shown}, that a killed process has left: {why}"
            )),
        }
    }
    left.place = Some(place);
    left
}

impl Left {
    /// Sorts entries by blob, without those that the device has or that later ones undo.
    fn order(&mut self, entries: Vec<LogEntry>, files: &HashMap<u64, OnDevice>) {
        let mut changes: BTreeMap<u64, Vec<Placed>> = BTreeMap::new();
        let mut recorded: HashMap<u64, u64> = HashMap::new();
        for LogEntry { at, blob, what } in entries {
            let all = changes.entry(blob).or_default();
            match what {
                What::Gone => {
                    all.clear();
                    recorded.remove(&blob);
                }
                What::Recorded { len, upto } => {
                    all.retain(|(at, _)| *at >= upto);
                    recorded.insert(blob, len);
                }
                What::Placed { len, upto } => {
                    all.retain(|(at, _)| *at >= upto);
                    // It comes before what was written while it was made.
                    all.insert(0, (upto, What::Placed { len, upto }));
                }
                What::Cut { len } => {
                    all.retain_mut(|(_, what)| clip(what, len));
                    all.push((at, What::Cut { len }));
                }
                what => {
                    // The cut may have been made.
                    if matches!(what, What::Cutting { .. }) {
                        recorded.remove(&blob);
                    }
                    all.push((at, what));
                }
            }
        }
        for (blob, file) in files {
            let Some(all) = changes.get_mut(blob) else {
                continue;
            };
            let needs = fit(all, *file).max(recorded.get(blob).copied());
            if let Some(needs) = needs.filter(|needs| file.len < *needs) {
                self.damage.push(format!(
                    "blob {blob:#x}: {} bytes, where a killed process had {needs}: the device was set back, and what its log in \
                     shared memory has does not belong to it",
                    file.len
                ));
            }
        }
        let kept = changes
            .into_iter()
            .filter(|(blob, all)| !all.is_empty() && files.contains_key(blob));
        self.changes = kept
            .map(|(blob, all)| (blob, all.into_iter().map(|(_, what)| what).collect()))
            .collect();
    }

    /// Shows the changes in a mount that only reads. Returns whether some of them are not shown.
    pub fn show(&self, core: &Core) -> bool {
        let mut hides = !self.damage.is_empty();
        let mut room = Budget::default();
        if self.damage.is_empty() {
            for ino in core.names.inodes() {
                if let Some(changes) = self.changes.get(&ino.id.0)
                    && let Err(error) = show(core, &ino, changes, &mut room)
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
    pub fn put_in_place(self, core: &Core) -> Result<()> {
        let accept = core.vol.opts.accept_damage;
        if self.damage.is_empty() {
            let files: Vec<_> = core
                .names
                .inodes()
                .into_iter()
                .filter_map(|ino| Some((self.changes.get(&ino.id.0)?, ino)))
                .collect();
            // Bytes beyond a file's length are safe from other files only once it has its length.
            for (changes, ino) in &files {
                if let Some(What::Placed { len, .. }) = changes.first() {
                    lengthen(ino, *len);
                }
            }
            for (changes, ino) in files {
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
        self.remove();
        Ok(())
    }

    /// Removes the log.
    fn remove(self) {
        if let Some(ring) = self.ring {
            ring.remove();
        } else if let Some(place) = self.place
            && let Err(error) = std::fs::remove_file(&place)
            && error.kind() != io::ErrorKind::NotFound
        {
            let place = place.display();
            tracing::warn!(%place, %error, "a log in shared memory that counts for nothing cannot be removed");
        }
    }
}

/// Takes from a change what a later cut to `len` has undone. Returns whether something is left of it.
fn clip(what: &mut What<Vec<u8>>, len: u64) -> bool {
    match what {
        What::Bytes { off, data } => {
            let left = usize::try_from(len.saturating_sub(*off)).unwrap_or(usize::MAX);
            data.truncate(left);
            !data.is_empty()
        }
        What::Zeroes { old_len, new_len } => {
            *new_len = len.min(*new_len);
            *old_len < *new_len
        }
        What::Placed { len: placed, .. } => {
            *placed = len.min(*placed);
            true
        }
        _ => true,
    }
}

/// Makes a file's changes fit the clusters that it has, where a cut may have taken some, and returns the length that the file needs
/// for them, if it has less and no cut or write that may be missing explains it.
fn fit(changes: &mut [Placed], file: OnDevice) -> Option<u64> {
    let cutting = changes.iter().find_map(|(_, what)| match what {
        What::Cutting { len } => Some(*len),
        _ => None,
    });
    if let Some((_, What::Placed { len, .. })) = changes.first_mut()
        && *len > file.allocated
    {
        *len = cutting
            .filter(|cut| *cut <= file.allocated)
            .map_or(*len, |cut| cut.min(*len));
        if *len > file.allocated {
            return Some(*len);
        }
    }
    needed(changes, file.len)
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
        What::Placed { .. } => {
            // Its length is in memory already, and must not be durable before the bytes that it covers.
            let flushed = core.vol.store.flush();
            flushed.map_err(|e| core.vol.store_error(ino.path(), e))
        }
        _ => Ok(()),
    }
}
