//! Operations on names: open, create, unlink, rename, link, directories.
//!
//! Each of them is one commit of metadata and durable on return. All hold [`Names::ops`]
//! throughout; looking up and opening existing files does not.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;

use super::attributes::{Attributes, MODE_BITS};
use super::cache::Cache;
use super::error::{FsError, Result};
use super::inode::{Inode, now_ns, ns, xattr};
use super::life::Lives;
use super::names::{Dir, Entry, Names, Opened, Ops, encode_name, encode_names};
use super::options::OpenOptions;
use super::path;
use super::volume::Volume;
use crate::blobstore::{BlobId, ClearMethod, CreateOptions, Error as StoreError, Spend};

/// Performs the operations on names.
pub(crate) struct Namespace {
    pub vol: Arc<Volume>,
    pub names: Arc<Names>,
    pub lives: Arc<Lives>,
    pub cache: Arc<Cache>,
}

impl Namespace {
    /// Opens or creates the file at the normalised `path`.
    pub fn open(&self, path: &str, how: OpenOptions) -> Result<Arc<Inode>> {
        self.vol.check_mounted(|| path.to_owned())?;
        loop {
            match self.names.open_file(path)? {
                Some(Opened::Dying) => drop(self.names.ops.lock()),
                Some(Opened::File(ino)) => {
                    if !how.exclusive && !how.fresh {
                        return Ok(ino);
                    }
                    self.lives.close(&ino);
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

    /// Begins a change of names. The intent of a rename that has failed is removed first, since the next mount would carry
    /// it out on what is done from now on.
    ///
    /// # Errors
    /// Fails when there is such an intent and the device fails: then nothing may change.
    fn begin(&self, path: &str) -> Result<MutexGuard<'_, Ops>> {
        self.vol.check_fork()?;
        let mut ops = self.names.ops.lock();
        self.vol.check_writable(|| path.to_owned())?;
        while let Some(marker) = ops.intents.last() {
            self.remove_intent(*marker).map_err(|e| {
                let what = format!("{path}: the intent of a rename that has failed");
                self.vol.store_error(what, e)
            })?;
            ops.intents.pop();
        }
        Ok(ops)
    }

    /// Removes the intent of a rename from a directory, whose name stays.
    fn remove_intent(&self, marker: BlobId) -> std::result::Result<(), StoreError> {
        let mut tx = self.vol.releasing();
        tx.remove_xattr(marker, xattr::RENAME);
        tx.commit().map(drop)
    }

    fn create(&self, path: &str, how: OpenOptions) -> Result<Arc<Inode>> {
        let mut ops = self.begin(path)?;
        self.names.check_dir(path::parent(path))?;
        let old = match self.names.get(path) {
            None => None,
            Some(Entry::Dir(_)) => {
                return Err(FsError::IsDir {
                    path: path.to_owned(),
                });
            }
            // Another thread was first.
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
        let mut tx = self.vol.store.transaction();
        if how.essential {
            tx.spend(Spend::Opening);
        }
        let new = tx.create(self.create_options().xattrs(xattrs));
        let loss = old
            .as_ref()
            .map(|old| self.lives.lose_name(&mut tx, old, path))
            .transpose()?;
        let blob = match tx.commit_and_open(new) {
            Ok(blob) => blob,
            Err(e) => {
                self.lives.undo_loss(old.as_ref(), loss);
                return Err(self.vol.commit_error(format!("{path}: create"), e));
            }
        };
        let ino = Inode::new(blob, 0, vec![path.to_owned()], mtime, None, &self.cache);
        ino.essential.store(how.essential, Ordering::Relaxed);
        ino.opens.fetch_add(1, Ordering::SeqCst);
        self.names
            .map
            .write()
            .insert(path.to_owned(), Entry::File(Arc::clone(&ino)));
        self.names.touch(path::parent(path));
        self.lives.settle_loss(old, loss, path);
        Ok(ino)
    }

    /// Returns the options of blobs for files and directories.
    fn create_options(&self) -> CreateOptions {
        let clear_method = if self.vol.opts.discard {
            ClearMethod::Unmap
        } else {
            ClearMethod::None
        };
        // Without a table a small file takes one page, and a long one gets a table when its runs fill
        // the page.
        CreateOptions::default()
            .clear_method(clear_method)
            .extent_table(false)
    }

    /// Removes a name of a file. The file is deleted with its last name and its last handle.
    pub fn unlink(&self, path: &str) -> Result<()> {
        let _ops = self.begin(path)?;
        let ino = self.file(path)?;
        let mut tx = self.vol.releasing();
        let loss = self.lives.lose_name(&mut tx, &ino, path)?;
        if let Err(e) = tx.commit() {
            self.lives.undo_loss(Some(&ino), Some(loss));
            return Err(self.vol.commit_error(format!("{path}: unlink"), e));
        }
        self.names.map.write().remove(path);
        self.names.touch(path::parent(path));
        self.lives.settle_loss(Some(ino), Some(loss), path);
        Ok(())
    }

    /// Returns the file at `path`.
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

    /// Renames a file or a directory. A file of the new name is replaced in one step.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        let mut ops = self.begin(from)?;
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
            // It is the same name, or two names of one file: nothing happens (POSIX rename).
            Some(Entry::File(ino)) if Arc::ptr_eq(&ino, &source) => return Ok(()),
            Some(Entry::File(ino)) => Some(ino),
        };
        let rename_one = |n: &String| if n == from { to.to_owned() } else { n.clone() };
        let names: Vec<String> = source.names.lock().iter().map(rename_one).collect();
        let mut tx = self.vol.releasing();
        self.lives.stage_names(&mut tx, &source, &names)?;
        if let Some(target) = &target {
            tx.set_xattr(source.id, xattr::SEQ, &next_seq(&mut ops).to_le_bytes());
            tx.set_xattr(source.id, xattr::REPLACES, &target.id.0.to_le_bytes());
        }
        let loss = target
            .as_ref()
            .map(|t| self.lives.lose_name(&mut tx, t, to))
            .transpose()?;
        if let Err(e) = tx.commit() {
            self.lives.undo_loss(target.as_ref(), loss);
            return Err(self.vol.commit_error(format!("{from}: rename to {to}"), e));
        }
        *source.names.lock() = names;
        {
            let mut map = self.names.map.write();
            map.remove(from);
            map.insert(to.to_owned(), Entry::File(source));
        }
        self.touch_both(from, to);
        self.lives.settle_loss(target, loss, to);
        Ok(())
    }

    /// Gives a file another name.
    pub fn link(&self, from: &str, to: &str) -> Result<()> {
        let _ops = self.begin(to)?;
        let ino = self.file(from)?;
        self.names.check_dir(path::parent(to))?;
        if to == "/" || self.names.get(to).is_some() {
            return Err(FsError::Exists {
                path: to.to_owned(),
            });
        }
        let mut names = ino.names.lock().clone();
        names.push(to.to_owned());
        let mut tx = self.vol.store.transaction();
        self.lives.stage_names(&mut tx, &ino, &names)?;
        tx.commit()
            .map_err(|e| self.vol.commit_error(format!("{from}: link to {to}"), e))?;
        *ino.names.lock() = names;
        self.names
            .map
            .write()
            .insert(to.to_owned(), Entry::File(ino));
        self.names.touch(path::parent(to));
        Ok(())
    }

    /// Creates a directory.
    pub fn mkdir(&self, path: &str) -> Result<()> {
        let _ops = self.begin(path)?;
        if path == "/" || self.names.get(path).is_some() {
            return Err(FsError::Exists {
                path: path.to_owned(),
            });
        }
        self.names.check_dir(path::parent(path))?;
        let mtime = now_ns();
        let mut tx = self.vol.store.transaction();
        let new = tx.create(self.create_options().xattrs(marker_xattrs(path, mtime)));
        let committed = tx
            .commit()
            .map_err(|e| self.vol.commit_error(format!("{path}: mkdir"), e))?;
        let dir = Dir::new(Some(committed.id(new)), mtime, None);
        self.names
            .map
            .write()
            .insert(path.to_owned(), Entry::Dir(Arc::new(dir)));
        self.names.touch(path::parent(path));
        Ok(())
    }

    /// Sets attributes of a directory. They are durable on return; the root's last until the unmount.
    pub fn set_dir_attributes(&self, path: &str, attributes: &Attributes) -> Result<()> {
        let _ops = self.begin(path)?;
        let dir = match self.names.get(path) {
            Some(Entry::Dir(dir)) => dir,
            Some(Entry::File(_)) => {
                return Err(FsError::NotDir {
                    path: path.to_owned(),
                });
            }
            None if path == "/" => Arc::clone(&self.names.root),
            None => return Err(FsError::not_found(path)),
        };
        let mtime = attributes
            .modified
            .map_or_else(|| dir.mtime_ns.load(Ordering::Relaxed), ns);
        let mode = attributes.mode.map(|mode| mode & MODE_BITS);
        let mode = mode.or(dir.mode.load());
        if path != "/" {
            let mut xattrs = marker_xattrs(path, mtime);
            xattrs.extend(mode.map(|mode| (xattr::MODE.to_owned(), mode.to_le_bytes().to_vec())));
            let mut tx = self.vol.store.transaction();
            let known = *dir.marker.lock();
            let new = match known {
                Some(id) => {
                    for (name, value) in &xattrs {
                        tx.set_xattr(id, name, value);
                    }
                    None
                }
                None => Some(tx.create(self.create_options().xattrs(xattrs))),
            };
            let committed = tx
                .commit()
                .map_err(|e| self.vol.commit_error(format!("{path}: attributes"), e))?;
            if let Some(new) = new {
                *dir.marker.lock() = Some(committed.id(new));
            }
        }
        dir.mtime_ns.store(mtime, Ordering::Relaxed);
        dir.mode.store(mode);
        Ok(())
    }

    fn touch_both(&self, from: &str, to: &str) {
        self.names.touch(path::parent(from));
        self.names.touch(path::parent(to));
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, path: &str) -> Result<()> {
        let _ops = self.begin(path)?;
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
            let mut tx = self.vol.releasing();
            tx.delete(id);
            tx.commit()
                .map_err(|e| self.vol.commit_error(format!("{path}: rmdir"), e))?;
        }
        self.names.map.write().remove(path);
        self.names.touch(path::parent(path));
        Ok(())
    }

    /// Renames a directory with its content: the intent, every name, and the directory's own name,
    /// in this order. A mount after a crash in between continues from the intent.
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
        // Everything that can be refused is refused here, before there is an intent that a mount
        // would carry out.
        let mut tx = self.vol.releasing();
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
                    self.lives.stage_names(&mut tx, ino, &names)?;
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
        let fail = |e| self.vol.commit_error(format!("{from}: rename to {to}"), e);
        // First the intent, in a marker that the directory may not have yet.
        let intent = encode_names(&[from.to_owned(), to.to_owned()]);
        let known = *dir.marker.lock();
        let marker = match known {
            Some(id) => {
                let mut tx = self.vol.releasing();
                tx.set_xattr(id, xattr::RENAME, &intent);
                tx.commit().map_err(fail)?;
                id
            }
            None => {
                let mut xattrs = marker_xattrs(from, now_ns());
                xattrs.push((xattr::RENAME.to_owned(), intent));
                let mut tx = self.vol.releasing();
                let new = tx.create(self.create_options().xattrs(xattrs));
                let id = tx.commit().map_err(fail)?.id(new);
                *dir.marker.lock() = Some(id);
                id
            }
        };
        // Then everything in it, and finally the directory itself.
        tx.set_xattr(marker, xattr::NAME, &encode_name(to));
        tx.remove_xattr(marker, xattr::RENAME);
        if let Some(old) = replaced {
            tx.set_xattr(marker, xattr::SEQ, &next_seq(ops).to_le_bytes());
            tx.set_xattr(marker, xattr::REPLACES, &old.0.to_le_bytes());
            tx.delete(old);
        }
        if let Err(e) = tx.commit() {
            // Nothing was renamed, and the next mount must not rename it either.
            if let Err(error) = self.remove_intent(marker) {
                tracing::error!(from, to, %error, "the intent of a failed rename stays until the next change of names");
                ops.intents.push(marker);
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
        drop(map);
        self.touch_both(from, to);
        Ok(())
    }
}

/// Returns the xattrs of a directory's marker.
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
