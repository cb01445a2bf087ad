//! What the kernel asks of a mounted tree, as operations of BlobFS.
//!
//! BlobFS knows files by their paths and the kernel by numbers. A thread that turns one into the other holds `order`, and a
//! thread that changes names holds it alone, while the change is made durable. Reading, writing and syncing an open file does not need it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use fuser::{Errno, FileAttr, FileType, RenameFlags};
use parking_lot::{Mutex, MutexGuard, RwLock};
use pumice_blobfs::fs::{
    Attributes, File, FileSystem, FsError, NAME_MAX, OpenOptions, Stat, StatFs, UNFINISHED,
    UNFINISHED_BEFORE,
};

use super::errno::{OrErrno, Result, failed};
use super::owner::{DIR_MODE, FILE_MODE, Ownership, kind};
use super::table::{ROOT, Resolved, Table};
use super::unsynced::Unsynced;

/// A mounted tree; see the module.
pub struct Tree {
    fs: FileSystem,
    order: RwLock<()>,
    table: Mutex<Table<File>>,
    files: RwLock<HashMap<u64, Open>>,
    dirs: Mutex<HashMap<u64, OpenDir>>,
    next: AtomicU64,
    unsynced: Unsynced,
    owner: Ownership,
}

#[derive(Clone)]
struct Open {
    number: u64,
    file: File,
}

struct OpenDir {
    number: u64,
    entries: Arc<Vec<Listed>>,
}

/// An entry of a directory that is being read.
pub struct Listed {
    pub name: String,
    pub number: u64,
    pub kind: FileType,
}

/// The properties that `setattr` is to change.
#[derive(Default)]
pub struct Changes {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub modified: Option<SystemTime>,
}

impl Tree {
    /// Makes the tree of a file system whose files belong to `uid` and `gid`.
    pub fn new(fs: FileSystem, uid: u32, gid: u32) -> Tree {
        Tree {
            fs,
            order: RwLock::new(()),
            table: Mutex::new(Table::new()),
            files: RwLock::default(),
            dirs: Mutex::default(),
            next: AtomicU64::new(1),
            unsynced: Unsynced::default(),
            owner: Ownership {
                uid,
                gid,
                since: SystemTime::now(),
            },
        }
    }

    fn table(&self) -> MutexGuard<'_, Table<File>> {
        self.table.lock()
    }

    /// Returns the path of a directory that has a name.
    fn dir(&self, number: u64) -> Result<String> {
        match self.table().find(number) {
            Some(Resolved::Dir { path: Some(path) }) => Ok(path),
            Some(Resolved::Dir { path: None }) => Err(Errno::ENOENT),
            Some(Resolved::File { .. }) => Err(Errno::ENOTDIR),
            None => Err(Errno::ESTALE),
        }
    }

    /// Returns the path of `name` in a directory.
    fn child(&self, parent: u64, name: &OsStr) -> Result<String> {
        let dir = self.dir(parent)?;
        let name = name.to_str().ok_or(Errno::EILSEQ)?;
        let path = format!("{}/{name}", dir.trim_end_matches('/'));
        if path.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        if name.bytes().any(|b| b < 0x20 || b == 0x7f) {
            return Err(Errno::EINVAL);
        }
        Ok(path)
    }

    /// Returns the path of a name that is to be made.
    fn new_child(&self, parent: u64, name: &OsStr) -> Result<String> {
        let path = self.child(parent, name)?;
        // The next mount would remove it.
        if [UNFINISHED, UNFINISHED_BEFORE].contains(&&path[..]) {
            return Err(Errno::EPERM);
        }
        Ok(path)
    }

    /// Counts a reference of the kernel to what is at `path`.
    fn enter(&self, path: &str, stat: &Stat) -> FileAttr {
        let blob = stat.blob_id.map(|id| id.0);
        let number = match (path, stat.is_dir, blob) {
            ("/", ..) => ROOT,
            (_, false, Some(blob)) => self.table().enter_file(path, blob),
            _ => self.table().enter_dir(path, blob),
        };
        self.owner.attributes(number, stat)
    }

    /// Looks a name up. `None`: there is none.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<Option<FileAttr>> {
        let _order = self.order.read();
        let path = match self.child(parent, name) {
            Ok(path) => path,
            // There cannot be a file of such a name.
            Err(Errno::EILSEQ | Errno::EINVAL) => return Ok(None),
            Err(e) => return Err(e),
        };
        match self.fs.stat(&path) {
            Ok(stat) => Ok(Some(self.enter(&path, &stat))),
            Err(FsError::NotFound { .. }) => Ok(None),
            Err(e) => Err(failed(&e)),
        }
    }

    /// Takes back references of the kernel.
    pub fn forget(&self, number: u64, count: u64) {
        self.table().forget(number, count);
    }

    /// Returns the attributes of an inode.
    pub fn attributes(&self, number: u64) -> Result<FileAttr> {
        let _order = self.order.read();
        self.attributes_now(number)
    }

    fn attributes_now(&self, number: u64) -> Result<FileAttr> {
        let found = self.table().find(number);
        let stat = match found.ok_or(Errno::ESTALE)? {
            Resolved::File {
                open: Some(file), ..
            } => file.stat(),
            Resolved::File { path, open: None } => {
                self.fs.stat(&path.ok_or(Errno::ESTALE)?).or_errno()?
            }
            Resolved::Dir { path: Some(path) } => self.fs.stat(&path).or_errno()?,
            Resolved::Dir { path: None } => {
                // It was removed, and is somebody's working directory.
                let mut root = self.fs.stat("/").or_errno()?;
                root.links = 0;
                root
            }
        };
        Ok(self.owner.attributes(number, &stat))
    }

    /// Returns a handle of a file, which need not have a name if it is open.
    fn file(&self, number: u64) -> Result<File> {
        match self.table().find(number) {
            Some(Resolved::Dir { .. }) => Err(Errno::EISDIR),
            Some(Resolved::File {
                path: Some(path), ..
            }) => self.fs.open(&path, OpenOptions::READ).or_errno(),
            Some(Resolved::File {
                open: Some(file), ..
            }) => Ok(file),
            _ => Err(Errno::ESTALE),
        }
    }

    /// Changes attributes, and returns all of them.
    pub fn change(&self, number: u64, change: &Changes) -> Result<FileAttr> {
        let other = |new: Option<u32>, own: u32| new.is_some_and(|new| new != own);
        if other(change.uid, self.owner.uid) || other(change.gid, self.owner.gid) {
            return Err(Errno::EPERM);
        }
        let mut attributes = Attributes::default()
            .mode(change.mode)
            .modified(change.modified);
        let file = {
            let _order = self.order.read();
            let found = self.table().find(number).ok_or(Errno::ESTALE)?;
            if let Resolved::Dir { path } = found {
                if change.size.is_some() {
                    return Err(Errno::EISDIR);
                }
                if attributes != Attributes::default() {
                    let path = path.ok_or(Errno::ENOENT)?;
                    self.fs.set_attributes(&path, &attributes).or_errno()?;
                }
                return self.attributes_now(number);
            }
            self.file(number)?
        };
        // Nobody else waits while a sync of this file holds the truncation up.
        self.unsynced.after(|| {
            if let Some(size) = change.size {
                file.truncate(size).or_errno()?;
                attributes.modified.get_or_insert_with(SystemTime::now);
            }
            if attributes != Attributes::default() {
                file.set_attributes(&attributes).or_errno()?;
            }
            Ok::<_, Errno>(())
        })?;
        Ok(self.owner.attributes(number, &file.stat()))
    }

    /// Makes a regular file, which is not opened.
    pub fn make_file(&self, parent: u64, name: &OsStr, mode: u32) -> Result<FileAttr> {
        let _order = self.order.write();
        let path = self.new_child(parent, name)?;
        let how = OpenOptions::CREATE.exclusive(true);
        let file = self.fs.open(&path, how).or_errno()?;
        self.set_first_mode(&file, mode)?;
        Ok(self.enter(&path, &file.stat()))
    }

    /// Opens a file, or makes it. Returns the handle with the attributes.
    pub fn create(
        &self,
        parent: u64,
        name: &OsStr,
        mode: u32,
        flags: i32,
    ) -> Result<(FileAttr, u64)> {
        let _order = self.order.write();
        let path = self.new_child(parent, name)?;
        let existed = self.fs.exists(&path).or_errno()?;
        let how = OpenOptions::CREATE
            .exclusive(flags & libc::O_EXCL != 0)
            .truncate(flags & libc::O_TRUNC != 0);
        let file = self.fs.open(&path, how).or_errno()?;
        if !existed {
            self.set_first_mode(&file, mode)?;
        }
        let attr = self.enter(&path, &file.stat());
        Ok((attr, self.opened(attr.ino.0, file)))
    }

    fn set_first_mode(&self, file: &File, mode: u32) -> Result<()> {
        let mode = mode & 0o7777;
        if mode == FILE_MODE {
            return Ok(());
        }
        let attributes = Attributes::default()
            .mode(Some(mode))
            .modified(Some(SystemTime::now()));
        self.unsynced
            .after(|| file.set_attributes(&attributes).or_errno())
    }

    fn opened(&self, number: u64, file: File) -> u64 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.table().opened(number, id, file.clone());
        self.files.write().insert(id, Open { number, file });
        id
    }

    /// Opens a file, and returns the handle.
    pub fn open(&self, number: u64) -> Result<u64> {
        let _order = self.order.read();
        let file = self.file(number)?;
        Ok(self.opened(number, file))
    }

    /// Closes a handle. The last one of a file without a name deletes the file.
    pub fn close(&self, id: u64) {
        let Some(open) = self.files.write().remove(&id) else {
            return;
        };
        let other = self.table().closed(open.number, id);
        drop((open, other));
    }

    fn handle(&self, id: u64) -> Result<File> {
        let files = self.files.read();
        Ok(files.get(&id).ok_or(Errno::EBADF)?.file.clone())
    }

    /// Reads from an open file. The answer is shorter at the end of the file.
    pub fn read(&self, id: u64, at: u64, size: u32) -> Result<Vec<u8>> {
        let file = self.handle(id)?;
        let rest = usize::try_from(file.len().saturating_sub(at)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; rest.min(size as usize)];
        let n = file.read_at(at, &mut bytes).or_errno()?;
        bytes.truncate(n);
        Ok(bytes)
    }

    /// Writes to an open file, all or nothing.
    pub fn write(&self, id: u64, at: u64, bytes: &[u8]) -> Result<()> {
        let file = self.handle(id)?;
        self.unsynced.after(|| {
            file.write_at(at, bytes).or_errno()?;
            modified_now(&file)
        })
    }

    /// Allocates space, and makes the file as long as that unless `keep_size`.
    pub fn allocate(&self, id: u64, at: u64, len: u64, mode: i32) -> Result<()> {
        let keep_size = match mode {
            0 => false,
            libc::FALLOC_FL_KEEP_SIZE => true,
            _ => return Err(Errno::EOPNOTSUPP),
        };
        let file = self.handle(id)?;
        let end = at.checked_add(len).ok_or(Errno::EFBIG)?;
        self.unsynced.after(|| {
            file.allocate(at, len).or_errno()?;
            if !keep_size && end > file.len() {
                file.truncate(end).or_errno()?;
            }
            modified_now(&file)
        })
    }

    /// Makes a file durable: `data_only` without attributes that its length does not need.
    pub fn sync_file(&self, id: u64, data_only: bool) -> Result<()> {
        let file = self.handle(id)?;
        if data_only {
            file.sync_data().or_errno()
        } else {
            file.sync().or_errno()
        }
    }

    /// Makes everything durable that was changed since the last call.
    pub fn sync_changed(&self) -> std::result::Result<(), FsError> {
        if !self.unsynced.take() {
            return Ok(());
        }
        let synced = self.fs.sync();
        match synced {
            Ok(()) => Ok(()),
            Err(_) => self.unsynced.after(|| synced),
        }
    }

    /// Makes a directory.
    pub fn make_dir(&self, parent: u64, name: &OsStr, mode: u32) -> Result<FileAttr> {
        let _order = self.order.write();
        let path = self.new_child(parent, name)?;
        self.fs.mkdir(&path).or_errno()?;
        let mode = mode & 0o7777;
        if mode != DIR_MODE {
            let attributes = Attributes::default().mode(Some(mode)).modified(None);
            if let Err(e) = self.fs.set_attributes(&path, &attributes) {
                self.fs.rmdir(&path).or_errno()?;
                return Err(failed(&e));
            }
        }
        let stat = self.fs.stat(&path).or_errno()?;
        Ok(self.enter(&path, &stat))
    }

    /// Removes an empty directory.
    pub fn remove_dir(&self, parent: u64, name: &OsStr) -> Result<()> {
        let _order = self.order.write();
        let path = self.child(parent, name)?;
        self.fs.rmdir(&path).or_errno()?;
        self.table().dir_removed(&path);
        Ok(())
    }

    /// Removes a name of a file, which stays as long as it is open.
    pub fn remove_file(&self, parent: u64, name: &OsStr) -> Result<()> {
        let _order = self.order.write();
        let path = self.child(parent, name)?;
        let file = self.names_of(&path)?;
        self.fs.unlink(&path).or_errno()?;
        self.lost(file, &path);
        Ok(())
    }

    /// Returns the blob and all names of the file at `path`.
    fn names_of(&self, path: &str) -> Result<Option<(u64, Vec<String>)>> {
        let stat = match self.fs.stat(path) {
            Ok(stat) if !stat.is_dir => stat,
            Ok(_) | Err(FsError::NotFound { .. }) => return Ok(None),
            Err(e) => return Err(failed(&e)),
        };
        let Some(blob) = stat.blob_id else {
            return Ok(None);
        };
        Ok(Some((blob.0, self.fs.names(path).or_errno()?)))
    }

    /// Records that a file, which had the names that are given, lost the name `path`.
    fn lost(&self, file: Option<(u64, Vec<String>)>, path: &str) {
        let Some((blob, names)) = file else {
            return;
        };
        let other = names.iter().find(|name| *name != path);
        self.table()
            .file_lost(blob, path, other.map(String::as_str));
    }

    /// Returns the file that a rename would give the name of another one. Its bytes have to be durable before the name is,
    /// as a program expects that replaces a file in one step. The kernel changes no name of the two directories meanwhile.
    pub fn replacement(
        &self,
        (parent, name): (u64, &OsStr),
        (new_parent, new_name): (u64, &OsStr),
    ) -> Option<File> {
        let _order = self.order.read();
        let to = self.child(new_parent, new_name).ok()?;
        if self.fs.stat(&to).ok()?.is_dir {
            return None;
        }
        let from = self.child(parent, name).ok()?;
        self.fs.open(&from, OpenOptions::READ).ok()
    }

    /// Renames a file or directory.
    pub fn rename(
        &self,
        (parent, name): (u64, &OsStr),
        (new_parent, new_name): (u64, &OsStr),
        flags: RenameFlags,
    ) -> Result<()> {
        if !RenameFlags::RENAME_NOREPLACE.contains(flags) {
            return Err(Errno::EINVAL);
        }
        let _order = self.order.write();
        let from = self.child(parent, name)?;
        let to = self.new_child(new_parent, new_name)?;
        if flags.contains(RenameFlags::RENAME_NOREPLACE) && self.fs.exists(&to).or_errno()? {
            return Err(Errno::EEXIST);
        }
        let source = self.fs.stat(&from).or_errno()?;
        let replaced = self.names_of(&to)?;
        self.fs.rename(&from, &to).or_errno()?;
        if source.is_dir {
            if from != to {
                self.table().dir_moved(&from, &to);
            }
            return Ok(());
        }
        let blob = source.blob_id.map_or(0, |id| id.0);
        if replaced.as_ref().is_some_and(|(other, _)| *other == blob) {
            // Both are names of this file, and stay.
            return Ok(());
        }
        self.lost(replaced, &to);
        self.table().file_moved(blob, &from, &to);
        Ok(())
    }

    /// Gives a file another name.
    pub fn link(&self, number: u64, parent: u64, name: &OsStr) -> Result<FileAttr> {
        let _order = self.order.write();
        let to = self.new_child(parent, name)?;
        let from = match self.table().find(number) {
            Some(Resolved::File {
                path: Some(path), ..
            }) => path,
            Some(Resolved::Dir { .. }) => return Err(Errno::EPERM),
            _ => return Err(Errno::ENOENT),
        };
        self.fs.link(&from, &to).or_errno()?;
        let stat = self.fs.stat(&to).or_errno()?;
        Ok(self.enter(&to, &stat))
    }

    /// Opens a directory to read it.
    pub fn open_dir(&self, number: u64) -> Result<u64> {
        let entries = self.entries(number)?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.dirs.lock().insert(id, OpenDir { number, entries });
        Ok(id)
    }

    /// Closes the handle of a directory.
    pub fn close_dir(&self, id: u64) {
        self.dirs.lock().remove(&id);
    }

    /// Returns the entries of an open directory, read again if it is read from the beginning.
    pub fn listed(&self, id: u64, at: u64) -> Result<Arc<Vec<Listed>>> {
        let (number, entries) = {
            let dirs = self.dirs.lock();
            let dir = dirs.get(&id).ok_or(Errno::EBADF)?;
            (dir.number, Arc::clone(&dir.entries))
        };
        if at > 0 {
            return Ok(entries);
        }
        let entries = self.entries(number)?;
        if let Some(dir) = self.dirs.lock().get_mut(&id) {
            dir.entries = Arc::clone(&entries);
        }
        Ok(entries)
    }

    fn entries(&self, number: u64) -> Result<Arc<Vec<Listed>>> {
        let _order = self.order.read();
        let path = match self.dir(number) {
            Ok(path) => path,
            // It was removed while somebody works in it.
            Err(Errno::ENOENT) => return Ok(Arc::default()),
            Err(e) => return Err(e),
        };
        let above = path.rfind('/').map_or("/", |end| &path[..end.max(1)]);
        let above_blob = self.fs.stat(above).or_errno()?.blob_id.map(|id| id.0);
        let listed = self.fs.list(&path).or_errno()?;
        let mut entries = Vec::with_capacity(listed.len() + 2);
        let table = self.table();
        for (name, number) in [(".", number), ("..", table.dir_number(above, above_blob))] {
            entries.push(Listed {
                name: name.to_owned(),
                number,
                kind: FileType::Directory,
            });
        }
        for entry in listed {
            let path = format!("{}/{}", path.trim_end_matches('/'), entry.name);
            let Ok(stat) = self.fs.stat(&path) else {
                continue;
            };
            let blob = stat.blob_id.map(|id| id.0);
            let number = match blob {
                Some(blob) if !stat.is_dir => table.file_number(blob),
                blob => table.dir_number(&path, blob),
            };
            entries.push(Listed {
                name: entry.name,
                number,
                kind: kind(stat.is_dir),
            });
        }
        Ok(Arc::new(entries))
    }

    /// Space and counts.
    pub fn space(&self) -> StatFs {
        self.fs.statfs()
    }
}

fn modified_now(file: &File) -> Result<()> {
    let attributes = Attributes::default()
        .mode(None)
        .modified(Some(SystemTime::now()));
    file.set_attributes(&attributes).or_errno()
}
