//! How files end: they lose their names, are closed for the last time, and are deleted.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::buffers::Buffers;
use super::error::{FsError, Result};
use super::inode::{Inode, Life, xattr};
use super::names::{Names, encode_name, encode_names};
use super::shm_log::ShmLog;
use super::volume::Volume;
use super::writeback::Writeback;
use crate::blobstore::Transaction;

/// Most bytes of the list of a file's further names.
const LINKS_MAX: usize = 3000;

/// The effect on a file that loses a name.
pub(crate) enum Loss {
    /// It has other names.
    Name,
    /// It is open: it is marked, and deleted at the last close.
    Orphan,
    /// It is deleted.
    Gone,
}

/// Deletes files when nothing uses them.
pub(crate) struct Lives {
    pub vol: Arc<Volume>,
    pub names: Arc<Names>,
    pub writeback: Arc<Writeback>,
    pub buffers: Arc<Buffers>,
    pub log: Arc<ShmLog>,
}

impl Lives {
    /// Handles the drop of a handle of `ino`, possibly the last one.
    pub fn close(&self, ino: &Arc<Inode>) {
        if self.vol.check_fork().is_err() {
            return;
        }
        if ino.opens.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        if matches!(ino.life.load(), Life::Orphan | Life::Gone) {
            self.reap(ino);
        } else if let Err(error) = self.buffers.seal(ino) {
            tracing::warn!(file = ino.path(), %error, "closing: data stays in memory until the next sync");
        }
    }

    /// Deletes a file without a name that nobody has open.
    pub fn reap(&self, ino: &Arc<Inode>) {
        let first = ino.life.compare_exchange(Life::Orphan, Life::Gone);
        if first.is_err() {
            return;
        }
        self.quiesce(ino);
        self.forget_bytes(ino);
        if !ino.close_blob() {
            return;
        }
        let id = ino.id;
        let mut tx = self.vol.releasing();
        tx.delete(id);
        if let Err(error) = tx.commit() {
            // It stays marked, so the next mount deletes it.
            tracing::warn!(blob = %id, %error, "a deleted file could not be removed; the next mount will");
        }
        self.names.orphans.lock().remove(&id.0);
    }

    /// Waits until no I/O of the file is in flight. Bytes that were not written stay, since the
    /// file may keep its name.
    pub fn quiesce(&self, ino: &Arc<Inode>) {
        let mut tail = ino.tail.lock();
        self.writeback.wait_overlapping(&tail, 0, u64::MAX);
        if let Ok(blob) = ino.blob()
            && let Err(error) = blob.quiesce()
        {
            tracing::warn!(file = ino.path(), %error, "the file is dropped nevertheless");
        }
        tail.prune(ino);
    }

    /// Drops the memory of a deleted file.
    pub fn forget_bytes(&self, ino: &Arc<Inode>) {
        let mut tail = ino.tail.lock();
        tail.drop_buffer();
        tail.pending.clear();
        tail.submitted = ino.len();
        ino.frames.remove_from(0);
    }

    /// Adds to `tx` the changes on disk when `ino` loses the name `path`.
    pub fn lose_name(&self, tx: &mut Transaction, ino: &Arc<Inode>, path: &str) -> Result<Loss> {
        let names: Vec<String> = ino
            .names
            .lock()
            .iter()
            .filter(|n| *n != path)
            .cloned()
            .collect();
        if !names.is_empty() {
            self.stage_names(tx, ino, &names)?;
            return Ok(Loss::Name);
        }
        let open = {
            // A thread that opens a file holds the map: it is either counted here, or sees that the
            // file is dying.
            let _map = self.names.map.write();
            let open = ino.opens.load(Ordering::SeqCst) > 0;
            if !open {
                ino.life.store(Life::Dying);
            }
            open
        };
        if open {
            tx.set_xattr(ino.id, xattr::IS_DELETED, &[1]);
            return Ok(Loss::Orphan);
        }
        self.quiesce(ino);
        ino.close_blob();
        tx.delete(ino.id);
        Ok(Loss::Gone)
    }

    /// Undoes the loss of a name after a failed commit: the file keeps its name.
    pub fn undo_loss(&self, ino: Option<&Arc<Inode>>, loss: Option<Loss>) {
        let (Some(ino), Some(Loss::Gone)) = (ino, loss) else {
            return;
        };
        match self.vol.store.open(ino.id) {
            Ok(blob) => ino.blob.store(Some(Arc::new(blob))),
            Err(error) => {
                tracing::error!(file = ino.path(), %error, "a file that could not be deleted cannot be used until the next mount");
            }
        }
        ino.life.store(Life::Named);
    }

    /// Updates memory after the commit is durable.
    pub fn settle_loss(&self, ino: Option<Arc<Inode>>, loss: Option<Loss>, path: &str) {
        let (Some(ino), Some(loss)) = (ino, loss) else {
            return;
        };
        ino.names.lock().retain(|n| n != path);
        match loss {
            Loss::Name => {}
            Loss::Orphan => {
                self.names
                    .orphans
                    .lock()
                    .insert(ino.id.0, Arc::downgrade(&ino));
                {
                    // A thread that holds a file holds the map: it is either counted below, or sees the orphan.
                    let _map = self.names.map.write();
                    ino.life.store(Life::Orphan);
                }
                self.log.gone(&ino);
                if ino.opens.load(Ordering::SeqCst) == 0 {
                    self.reap(&ino);
                }
            }
            Loss::Gone => {
                ino.life.store(Life::Gone);
                self.log.gone(&ino);
                self.forget_bytes(&ino);
            }
        }
    }

    /// Adds a change of a file's names to `tx`.
    pub fn stage_names(&self, tx: &mut Transaction, ino: &Inode, names: &[String]) -> Result<()> {
        let Some((first, rest)) = names.split_first() else {
            return Err(FsError::invalid(&ino.path(), "a file needs a name"));
        };
        let links = encode_names(rest);
        if links.len() > LINKS_MAX {
            return Err(FsError::TooManyLinks {
                path: first.clone(),
            });
        }
        tx.set_xattr(ino.id, xattr::NAME, &encode_name(first));
        if !links.is_empty() {
            tx.set_xattr(ino.id, xattr::LINKS, &links);
        } else if ino.blob()?.xattr(xattr::LINKS).is_some() {
            tx.remove_xattr(ino.id, xattr::LINKS);
        }
        Ok(())
    }
}
