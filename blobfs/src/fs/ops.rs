//! Operations on names: open, create, unlink, rename, link, directories.
//!
//! Each is one commit of metadata and durable on return. All hold [`Namespace::ops`] throughout;
//! looking up and opening existing files does not.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::core::{Core, Phase};
use super::error::{FsError, Result};
use super::inode::{Inode, Life, now_ns, xattr};
use super::names::{Dir, Entry, Opened, Ops, encode_name, encode_names};
use super::options::OpenOptions;
use super::path;
use crate::blobstore::{ClearMethod, CreateOptions, Spend, Transaction};

/// Longest list of further names of a file, in bytes.
const LINKS_MAX: usize = 3000;

/// What happens to a file that loses a name.
enum Loss {
    /// It has others.
    Name,
    /// It is open: marked, and deleted at the last close.
    Orphan,
    /// It is deleted.
    Gone,
}

impl Core {
    /// Opens or makes the file at the normalised `path`.
    pub fn open(&self, path: &str, how: OpenOptions) -> Result<Arc<Inode>> {
        self.check_mounted(|| path.to_owned())?;
        loop {
            match self.names.open_file(path)? {
                Some(Opened::Dying) => drop(self.names.ops.lock()),
                Some(Opened::File(ino)) => {
                    if !how.exclusive && !how.fresh {
                        return Ok(ino);
                    }
                    self.close(&ino);
                    if how.exclusive {
                        return Err(FsError::Exists {
                            path: path.to_owned(),
                        });
                    }
                    return self.create(path, how);
                }
                None if how.create || how.exclusive || how.fresh => return self.create(path, how),
                None => {
                    self.names.check_dir(path::parent(path))?;
                    return Err(FsError::not_found(path));
                }
            }
        }
    }

    fn create(&self, path: &str, how: OpenOptions) -> Result<Arc<Inode>> {
        let mut ops = self.names.ops.lock();
        self.check_writable(|| path.to_owned())?;
        self.names.check_dir(path::parent(path))?;
        let old = match self.names.get(path) {
            None => None,
            Some(Entry::Dir(_)) => {
                return Err(FsError::IsDir {
                    path: path.to_owned(),
                });
            }
            // Somebody else was first.
            Some(Entry::File(_)) if how.exclusive => {
                return Err(FsError::Exists {
                    path: path.to_owned(),
                });
            }
            Some(Entry::File(ino)) if !how.fresh => {
                ino.opens.fetch_add(1, Ordering::SeqCst);
                return Ok(ino);
            }
            Some(Entry::File(ino)) => Some(ino),
        };
        let mtime = now_ns();
        let mut xattrs = vec![
            (xattr::NAME.to_owned(), encode_name(path)),
            (xattr::LENGTH.to_owned(), 0u64.to_le_bytes().to_vec()),
            (xattr::MTIME.to_owned(), mtime.to_le_bytes().to_vec()),
            (
                xattr::SEQ.to_owned(),
                next_seq(&mut ops).to_le_bytes().to_vec(),
            ),
        ];
        if let Some(old) = &old {
            xattrs.push((xattr::REPLACES.to_owned(), old.id.0.to_le_bytes().to_vec()));
        }
        let mut tx = self.store.transaction();
        if how.essential {
            tx.spend(Spend::Opening);
        }
        let new = tx.create(CreateOptions {
            xattrs,
            ..self.create_options()
        });
        let loss = old
            .as_ref()
            .map(|old| self.lose_name(&mut tx, old, path))
            .transpose()?;
        let committed = match tx.commit() {
            Ok(committed) => committed,
            Err(e) => {
                self.undo_loss(old.as_ref(), loss);
                return Err(self.commit_error(format!("{path}: create"), e));
            }
        };
        let id = committed.id(new);
        let blob = self
            .store
            .open(id)
            .map_err(|e| self.store_error(format!("{path}: create"), e))?;
        let ino = Inode::new(blob, 0, vec![path.to_owned()], mtime, &self.cache);
        ino.essential.store(how.essential, Ordering::Relaxed);
        ino.opens.fetch_add(1, Ordering::SeqCst);
        self.names
            .map
            .write()
            .insert(path.to_owned(), Entry::File(Arc::clone(&ino)));
        self.settle_loss(old, loss, path);
        Ok(ino)
    }

    /// How blobs of files and directories are made.
    fn create_options(&self) -> CreateOptions {
        let clear_method = if self.opts.discard {
            ClearMethod::Unmap
        } else {
            ClearMethod::None
        };
        CreateOptions {
            clear_method,
            // A small file takes one page so; a long one gets a table when its runs fill the page.
            extent_table: false,
            ..CreateOptions::default()
        }
    }

    /// The last handle of `ino` may be gone.
    pub fn close(&self, ino: &Arc<Inode>) {
        if self.check_fork().is_err() {
            return;
        }
        if ino.opens.fetch_sub(1, Ordering::SeqCst) > 1 {
            return;
        }
        if matches!(ino.life.load(), Life::Orphan | Life::Gone) {
            self.reap(ino);
        } else if let Err(error) = self.seal(ino) {
            tracing::warn!(file = ino.path(), %error, "closing: data stays in memory until the next sync");
        }
    }

    /// Deletes a file without a name that nobody has open any more.
    fn reap(&self, ino: &Arc<Inode>) {
        let first = ino.life.compare_exchange(Life::Orphan, Life::Gone);
        if first.is_err() {
            return;
        }
        self.quiesce(ino);
        self.forget_bytes(ino);
        if ino.blob.swap(None).is_none() {
            return;
        }
        let id = ino.id;
        let mut tx = self.releasing();
        tx.delete(id);
        if let Err(error) = tx.commit() {
            // It stays marked: the next mount deletes it.
            tracing::warn!(blob = %id, %error, "a deleted file could not be removed; the next mount will");
        }
        self.names.orphans.lock().remove(&id.0);
    }

    /// Waits until nothing of the file is on its way to the device or from it. What has not been
    /// written stays: the file may keep its name.
    fn quiesce(&self, ino: &Arc<Inode>) {
        let mut tail = ino.tail.lock();
        self.wait_overlapping(&tail, 0, u64::MAX);
        if let Ok(blob) = ino.blob()
            && let Err(error) = blob.quiesce()
        {
            tracing::warn!(file = ino.path(), %error, "the file is given up all the same");
        }
        tail.prune(ino);
    }

    /// The file is gone: so is what of it is in memory.
    fn forget_bytes(&self, ino: &Arc<Inode>) {
        let mut tail = ino.tail.lock();
        self.drop_buffer(&mut tail);
        tail.pending.clear();
        tail.submitted = ino.len();
        ino.frames.remove_from(0);
    }

    /// A change that gives space back, or takes none for good: it may use the reserve.
    fn releasing(&self) -> Transaction {
        let mut tx = self.store.transaction();
        tx.spend(Spend::Releasing);
        tx
    }

    /// Adds to `tx` what `ino` losing the name `path` means on disk.
    fn lose_name(&self, tx: &mut Transaction, ino: &Arc<Inode>, path: &str) -> Result<Loss> {
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
            // Who opens holds the map: either it is counted here, or it sees that the file is dying.
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
        // The store deletes no blob that is open.
        ino.close_blob();
        tx.delete(ino.id);
        Ok(Loss::Gone)
    }

    /// The commit failed: the file keeps its name.
    fn undo_loss(&self, ino: Option<&Arc<Inode>>, loss: Option<Loss>) {
        let (Some(ino), Some(Loss::Gone)) = (ino, loss) else {
            return;
        };
        match self.store.open(ino.id) {
            Ok(blob) => ino.blob.store(Some(Arc::new(blob))),
            Err(error) => {
                tracing::error!(file = ino.path(), %error, "a file that could not be deleted cannot be used until the next mount");
            }
        }
        ino.life.store(Life::Named);
    }

    /// The commit is durable: memory follows.
    fn settle_loss(&self, ino: Option<Arc<Inode>>, loss: Option<Loss>, path: &str) {
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
                ino.life.store(Life::Orphan);
                if ino.opens.load(Ordering::SeqCst) == 0 {
                    self.reap(&ino);
                }
            }
            Loss::Gone => {
                ino.life.store(Life::Gone);
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

    /// Removes a file's name; the file goes with the last one and the last handle.
    pub fn unlink(&self, path: &str) -> Result<()> {
        self.check_fork()?;
        let _ops = self.names.ops.lock();
        self.check_writable(|| path.to_owned())?;
        let ino = self.file(path)?;
        let mut tx = self.releasing();
        let loss = self.lose_name(&mut tx, &ino, path)?;
        if let Err(e) = tx.commit() {
            self.undo_loss(Some(&ino), Some(loss));
            return Err(self.commit_error(format!("{path}: unlink"), e));
        }
        self.names.map.write().remove(path);
        self.settle_loss(Some(ino), Some(loss), path);
        Ok(())
    }

    /// The file at `path`.
    fn file(&self, path: &str) -> Result<Arc<Inode>> {
        if path == "/" {
            return Err(FsError::IsDir {
                path: path.to_owned(),
            });
        }
        match self.names.get(path) {
            Some(Entry::File(ino)) => Ok(ino),
            Some(Entry::Dir(_)) => Err(FsError::IsDir {
                path: path.to_owned(),
            }),
            None => {
                self.names.check_dir(path::parent(path))?;
                Err(FsError::not_found(path))
            }
        }
    }

    /// Renames a file or a directory. What has the new name is replaced in one step.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.check_fork()?;
        let mut ops = self.names.ops.lock();
        self.check_writable(|| from.to_owned())?;
        let source = match self.names.get(from) {
            Some(Entry::File(ino)) => ino,
            Some(Entry::Dir(dir)) => return self.rename_dir(&mut ops, &dir, from, to),
            None if from == "/" => {
                return Err(FsError::invalid(from, "the root cannot be renamed"));
            }
            None => return Err(FsError::not_found(from)),
        };
        self.names.check_dir(path::parent(to))?;
        let target = match self.names.get(to) {
            None if to == "/" => {
                return Err(FsError::IsDir {
                    path: to.to_owned(),
                });
            }
            None => None,
            Some(Entry::Dir(_)) => {
                return Err(FsError::IsDir {
                    path: to.to_owned(),
                });
            }
            // The same name, or two names of one file: nothing happens (POSIX rename).
            Some(Entry::File(ino)) if Arc::ptr_eq(&ino, &source) => return Ok(()),
            Some(Entry::File(ino)) => Some(ino),
        };
        let rename_one = |n: &String| if n == from { to.to_owned() } else { n.clone() };
        let names: Vec<String> = source.names.lock().iter().map(rename_one).collect();
        let mut tx = self.releasing();
        self.stage_names(&mut tx, &source, &names)?;
        if let Some(target) = &target {
            tx.set_xattr(source.id, xattr::SEQ, &next_seq(&mut ops).to_le_bytes());
            tx.set_xattr(source.id, xattr::REPLACES, &target.id.0.to_le_bytes());
        }
        let loss = target
            .as_ref()
            .map(|t| self.lose_name(&mut tx, t, to))
            .transpose()?;
        if let Err(e) = tx.commit() {
            self.undo_loss(target.as_ref(), loss);
            return Err(self.commit_error(format!("{from}: rename to {to}"), e));
        }
        *source.names.lock() = names;
        {
            let mut map = self.names.map.write();
            map.remove(from);
            map.insert(to.to_owned(), Entry::File(source));
        }
        self.settle_loss(target, loss, to);
        Ok(())
    }

    /// Gives a file another name.
    pub fn link(&self, from: &str, to: &str) -> Result<()> {
        self.check_fork()?;
        let _ops = self.names.ops.lock();
        self.check_writable(|| to.to_owned())?;
        let ino = self.file(from)?;
        self.names.check_dir(path::parent(to))?;
        if to == "/" || self.names.get(to).is_some() {
            return Err(FsError::Exists {
                path: to.to_owned(),
            });
        }
        let mut names = ino.names.lock().clone();
        names.push(to.to_owned());
        let mut tx = self.store.transaction();
        self.stage_names(&mut tx, &ino, &names)?;
        tx.commit()
            .map_err(|e| self.commit_error(format!("{from}: link to {to}"), e))?;
        *ino.names.lock() = names;
        self.names
            .map
            .write()
            .insert(to.to_owned(), Entry::File(ino));
        Ok(())
    }

    /// Makes a directory.
    pub fn mkdir(&self, path: &str) -> Result<()> {
        self.check_fork()?;
        let _ops = self.names.ops.lock();
        self.check_writable(|| path.to_owned())?;
        if path == "/" || self.names.get(path).is_some() {
            return Err(FsError::Exists {
                path: path.to_owned(),
            });
        }
        self.names.check_dir(path::parent(path))?;
        let mtime = now_ns();
        let mut tx = self.store.transaction();
        let new = tx.create(CreateOptions {
            xattrs: marker_xattrs(path, mtime),
            ..self.create_options()
        });
        let committed = tx
            .commit()
            .map_err(|e| self.commit_error(format!("{path}: mkdir"), e))?;
        let dir = Dir {
            marker: parking_lot::Mutex::new(Some(committed.id(new))),
            mtime_ns: mtime,
        };
        self.names
            .map
            .write()
            .insert(path.to_owned(), Entry::Dir(Arc::new(dir)));
        Ok(())
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, path: &str) -> Result<()> {
        self.check_fork()?;
        let _ops = self.names.ops.lock();
        self.check_writable(|| path.to_owned())?;
        let dir = match self.names.get(path) {
            Some(Entry::Dir(dir)) => dir,
            Some(Entry::File(_)) => {
                return Err(FsError::NotDir {
                    path: path.to_owned(),
                });
            }
            None if path == "/" => {
                return Err(FsError::invalid(path, "the root cannot be removed"));
            }
            None => return Err(FsError::not_found(path)),
        };
        if !self.names.is_empty_dir(path) {
            return Err(FsError::NotEmpty {
                path: path.to_owned(),
            });
        }
        let marker = *dir.marker.lock();
        if let Some(id) = marker {
            let mut tx = self.releasing();
            tx.delete(id);
            tx.commit()
                .map_err(|e| self.commit_error(format!("{path}: rmdir"), e))?;
        }
        self.names.map.write().remove(path);
        Ok(())
    }

    /// Renames a directory with all that is in it: the intent, every name, the directory's own
    /// name, in this order. A mount after a crash in between goes on from the intent.
    fn rename_dir(&self, ops: &mut Ops, dir: &Arc<Dir>, from: &str, to: &str) -> Result<()> {
        if from == to {
            return Ok(());
        }
        let (old_prefix, new_prefix) = (path::dir_prefix(from), path::dir_prefix(to));
        if new_prefix.starts_with(&old_prefix) {
            return Err(FsError::invalid(
                to,
                format!("lies inside {from}, which was to be renamed"),
            ));
        }
        self.names.check_dir(path::parent(to))?;
        let replaced = match self.names.get(to) {
            None if to == "/" => {
                return Err(FsError::NotEmpty {
                    path: to.to_owned(),
                });
            }
            None => None,
            Some(Entry::File(_)) => {
                return Err(FsError::NotDir {
                    path: to.to_owned(),
                });
            }
            Some(Entry::Dir(_)) if !self.names.is_empty_dir(to) => {
                return Err(FsError::NotEmpty {
                    path: to.to_owned(),
                });
            }
            Some(Entry::Dir(d)) => *d.marker.lock(),
        };
        let below = self.names.below(&old_prefix);
        let moved = |p: &str| format!("{new_prefix}{}", &p[old_prefix.len()..]);
        for (p, _) in &below {
            let new = moved(p);
            if new.len() > path::NAME_MAX {
                return Err(FsError::NameTooLong {
                    len: new.len(),
                    path: new,
                    max: path::NAME_MAX,
                });
            }
        }
        // What is refused is refused here, before there is an intent that a mount would carry out.
        let mut tx = self.releasing();
        let mut renamed: Vec<(Arc<Inode>, Vec<String>)> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for (p, entry) in &below {
            match entry {
                Entry::File(ino) if seen.insert(ino.id.0) => {
                    let new_name = |n: &String| {
                        if n.starts_with(&old_prefix) {
                            moved(n)
                        } else {
                            n.clone()
                        }
                    };
                    let names: Vec<String> = ino.names.lock().iter().map(new_name).collect();
                    self.stage_names(&mut tx, ino, &names)?;
                    renamed.push((Arc::clone(ino), names));
                }
                Entry::Dir(d) => {
                    if let Some(id) = *d.marker.lock() {
                        tx.set_xattr(id, xattr::NAME, &encode_name(&moved(p)));
                    }
                }
                Entry::File(_) => {}
            }
        }
        let fail = |e| self.commit_error(format!("{from}: rename to {to}"), e);
        // One: the intent, on a marker that the directory may not have yet.
        let intent = encode_names(&[from.to_owned(), to.to_owned()]);
        let known = *dir.marker.lock();
        let marker = match known {
            Some(id) => {
                let mut tx = self.releasing();
                tx.set_xattr(id, xattr::RENAME, &intent);
                tx.commit().map_err(fail)?;
                id
            }
            None => {
                let mut xattrs = marker_xattrs(from, now_ns());
                xattrs.push((xattr::RENAME.to_owned(), intent));
                let mut tx = self.releasing();
                let new = tx.create(CreateOptions {
                    xattrs,
                    ..self.create_options()
                });
                let id = tx.commit().map_err(fail)?.id(new);
                *dir.marker.lock() = Some(id);
                id
            }
        };
        // Two: everything in it, then the directory itself.
        tx.set_xattr(marker, xattr::NAME, &encode_name(to));
        tx.remove_xattr(marker, xattr::RENAME);
        if let Some(old) = replaced {
            tx.set_xattr(marker, xattr::SEQ, &next_seq(ops).to_le_bytes());
            tx.set_xattr(marker, xattr::REPLACES, &old.0.to_le_bytes());
            tx.delete(old);
        }
        if let Err(e) = tx.commit() {
            // Nothing was renamed, and the next mount must not do it either.
            let mut tx = self.releasing();
            tx.remove_xattr(marker, xattr::RENAME);
            if let Err(error) = tx.commit() {
                tracing::error!(from, to, %error, "the intent of a failed rename stays");
                return Err(FsError::Undecided {
                    what: format!("{from}: rename to {to}"),
                    source: Arc::new(fail(e)),
                });
            }
            return Err(fail(e));
        }
        for (ino, names) in renamed {
            *ino.names.lock() = names;
        }
        let mut map = self.names.map.write();
        map.remove(from);
        for (p, _) in &below {
            map.remove(p);
        }
        map.insert(to.to_owned(), Entry::Dir(Arc::clone(dir)));
        for (p, entry) in below {
            map.insert(moved(&p), entry);
        }
        Ok(())
    }

    /// Ends the use of every file: data and lengths durable, spare clusters back, blobs closed.
    pub fn unmount(&self) -> Result<()> {
        self.end(false).map(|_| ())
    }

    /// As [`Core::unmount`]; what cannot be made durable is given up, and returned.
    pub fn unmount_anyway(&self) -> Result<Vec<FsError>> {
        self.end(true)
    }

    fn end(&self, give_up: bool) -> Result<Vec<FsError>> {
        self.check_fork()?;
        let _ops = self.names.ops.lock();
        if self.phase.load() == Phase::Unloading {
            return self.unload().map(|()| Vec::new());
        }
        self.check_mounted(|| self.dev.info().name.clone())?;
        let inodes = self.names.inodes();
        if !self.opts.read_only {
            // The others are durable all the same if one fails.
            let mut result = Ok(());
            for ino in &inodes {
                result = result.and(self.sync(ino));
            }
            if !give_up {
                result?;
            }
        }
        // From here on nothing new begins; what was appended meanwhile is written, too.
        self.phase.store(Phase::Ending);
        let lost = match self.finish(&inodes, give_up) {
            Ok(lost) => lost,
            Err(e) => {
                self.phase.store(Phase::Mounted);
                return Err(e);
            }
        };
        self.phase.store(Phase::Unloading);
        self.unload()?;
        Ok(lost)
    }

    /// The last step of an unmount, which can be repeated: the device is given up when it is done.
    fn unload(&self) -> Result<()> {
        match self.store.unload() {
            Ok(()) | Err(crate::blobstore::Error::Unloaded) => {}
            Err(e) => return Err(self.store_error("unmount", e)),
        }
        self.phase.store(Phase::Unmounted);
        self.metered.release();
        self.ended.set();
        Ok(())
    }

    /// Whether an unmount has still something to do.
    pub fn is_unfinished(&self) -> bool {
        self.born.is_here() && matches!(self.phase.load(), Phase::Mounted | Phase::Unloading)
    }

    fn finish(&self, inodes: &[Arc<Inode>], give_up: bool) -> Result<Vec<FsError>> {
        let mut lost = Vec::new();
        if !self.opts.read_only {
            for ino in inodes {
                ino.tail.lock().stop_fast_path();
                match self.sync_inner(ino) {
                    Ok(()) => {}
                    Err(e) if give_up => {
                        tracing::error!(error = %e, "bytes that could not be made durable are given up");
                        self.give_up_bytes(ino);
                        lost.push(e);
                    }
                    Err(e) => return Err(e),
                }
                let mut tail = ino.tail.lock();
                let needed = ino.len().div_ceil(self.cluster);
                if tail.grown
                    && tail.allocated / self.cluster > needed
                    && !ino.is_thin()
                    && let Err(error) = self.resize(ino, &mut tail, needed)
                {
                    tracing::warn!(file = ino.path(), %error, "space allocated ahead was not given back");
                }
            }
        }
        let orphans: Vec<Arc<Inode>> = self
            .names
            .orphans
            .lock()
            .values()
            .filter_map(std::sync::Weak::upgrade)
            .collect();
        for ino in &orphans {
            self.reap(ino);
        }
        self.shared().drain();
        for ino in inodes.iter().chain(&orphans) {
            self.drop_buffer(&mut ino.tail.lock());
            ino.close_blob();
            ino.frames.remove_from(0);
        }
        Ok(lost)
    }

    /// Cuts the file, in memory, to what is durable.
    fn give_up_bytes(&self, ino: &Arc<Inode>) {
        self.quiesce(ino);
        let durable = ino.durable_len.load(Ordering::Acquire);
        ino.len.store(durable, Ordering::Release);
        ino.epoch.fetch_add(1, Ordering::AcqRel);
        self.forget_bytes(ino);
    }
}

/// Xattrs of a directory's marker.
fn marker_xattrs(path: &str, mtime: u64) -> Vec<(String, Vec<u8>)> {
    vec![
        (xattr::NAME.to_owned(), encode_name(path)),
        (xattr::LENGTH.to_owned(), 0u64.to_le_bytes().to_vec()),
        (xattr::DIR.to_owned(), vec![1]),
        (xattr::MTIME.to_owned(), mtime.to_le_bytes().to_vec()),
    ]
}

fn next_seq(ops: &mut Ops) -> u64 {
    ops.seq += 1;
    ops.seq
}
