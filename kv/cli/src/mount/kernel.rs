//! The kernel's requests, answered by a [`Tree`].
//!
//! A fixed number of threads read requests and answer each before they read the next. A sync may take as long as the device
//! likes, so syncs, and renames that need one, have threads of their own, and reads and writes of other files go on.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use pumice_blobfs::fs::NAME_MAX;

use super::errno::OrErrno as _;
use super::owner::BLOCK;
use super::tree::{Changes, Tree};

/// Time for which the kernel may use what it was told. Nothing changes but by the kernel's own requests.
const VALID: Duration = Duration::from_secs(3600);
/// Numbers of inodes are not used twice while the kernel knows them.
const GENERATION: Generation = Generation(0);
/// Most bytes of one write, and of what the kernel reads ahead.
const IO_MAX: u32 = 1 << 20;
/// Most requests in flight that no process waits for, such as those for pages read ahead.
const BACKGROUND_MAX: u16 = 64;
/// Number of threads that sync files.
const SYNC_THREADS: usize = 4;

/// The kernel's side of a mount.
pub struct Kernel {
    tree: Arc<Tree>,
    syncs: Sender<SyncJob>,
    /// Called when the last request is answered.
    ended: Box<dyn Fn() + Send + Sync>,
}

/// A request that syncs a file, for a process that waits.
type SyncJob = Box<dyn FnOnce(&Tree) + Send>;

impl Kernel {
    /// Makes the kernel's side of `tree`, and starts the threads for syncs. They end with it. `ended` is called when the mount
    /// is gone and the last request is answered.
    pub fn new(tree: Arc<Tree>, ended: impl Fn() + Send + Sync + 'static) -> io::Result<Kernel> {
        let (syncs, queue) = channel();
        let queue = Arc::new(Mutex::new(queue));
        for i in 0..SYNC_THREADS {
            let (tree, queue) = (Arc::clone(&tree), Arc::clone(&queue));
            std::thread::Builder::new()
                .name(format!("sync-{i}"))
                .spawn(move || {
                    while let Some(sync) = next(&queue) {
                        sync(&tree);
                    }
                })?;
        }
        let ended = Box::new(ended);
        Ok(Kernel { tree, syncs, ended })
    }

    /// Has a thread for syncs carry out a request.
    fn sync(&self, sync: impl FnOnce(&Tree) + Send + 'static) {
        if let Err(unsent) = self.syncs.send(Box::new(sync)) {
            (unsent.0)(&self.tree);
        }
    }
}

fn next(queue: &Mutex<Receiver<SyncJob>>) -> Option<SyncJob> {
    queue
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .recv()
        .ok()
}

fn done(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

fn entry(reply: ReplyEntry, result: Result<FileAttr, Errno>) {
    match result {
        Ok(attr) => reply.entry(&VALID, &attr, GENERATION),
        Err(e) => reply.error(e),
    }
}

/// The attributes of nothing, which let the kernel remember that there is no file of a name.
fn nothing() -> FileAttr {
    let time = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

impl Filesystem for Kernel {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for wanted in [
            InitFlags::FUSE_DO_READDIRPLUS | InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
        ] {
            // An old kernel does without.
            let _ = config.add_capabilities(wanted);
        }
        if let Err(nearest) = config.set_max_write(IO_MAX) {
            let _ = config.set_max_write(nearest);
        }
        if let Err(nearest) = config.set_max_readahead(IO_MAX) {
            let _ = config.set_max_readahead(nearest);
        }
        let _ = config.set_max_background(BACKGROUND_MAX);
        Ok(())
    }

    fn destroy(&mut self) {
        (self.ended)();
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.tree.lookup(parent.0, name) {
            Ok(found) => reply.entry(&VALID, &found.unwrap_or_else(nothing), GENERATION),
            Err(e) => reply.error(e),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.tree.forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.tree.attributes(ino.0) {
            Ok(attr) => reply.attr(&VALID, &attr),
            Err(e) => reply.error(e),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = Changes {
            mode,
            uid,
            gid,
            size,
            modified: mtime.map(|time| match time {
                TimeOrNow::SpecificTime(time) => time,
                TimeOrNow::Now => SystemTime::now(),
            }),
        };
        match self.tree.change(ino.0, &change) {
            Ok(attr) => reply.attr(&VALID, &attr),
            Err(e) => reply.error(e),
        }
    }

    fn mknod(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        if mode & libc::S_IFMT != libc::S_IFREG {
            reply.error(Errno::EPERM);
            return;
        }
        entry(reply, self.tree.make_file(parent.0, name, mode));
    }

    fn mkdir(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        entry(reply, self.tree.make_dir(parent.0, name, mode));
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(reply, self.tree.remove_file(parent.0, name));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(reply, self.tree.remove_dir(parent.0, name));
    }

    fn symlink(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _target: &Path,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (from, to) = ((parent.0, name), (newparent.0, newname));
        let file = if flags.is_empty() {
            self.tree.replacement(from, to)
        } else {
            None
        };
        let Some(file) = file else {
            return done(reply, self.tree.rename(from, to, flags));
        };
        let (name, newname) = (name.to_owned(), newname.to_owned());
        self.sync(move |tree| {
            let synced = file.sync().or_errno();
            drop(file);
            let renamed = synced
                .and_then(|()| tree.rename((parent.0, &name), (newparent.0, &newname), flags));
            done(reply, renamed);
        });
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        entry(reply, self.tree.link(ino.0, newparent.0, newname));
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.tree.open(ino.0) {
            // The pages that the kernel has are right: nobody else writes.
            Ok(id) => reply.opened(FileHandle(id), FopenFlags::FOPEN_KEEP_CACHE),
            Err(e) => reply.error(e),
        }
    }

    fn create(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        match self.tree.create(parent.0, name, mode, flags) {
            Ok((attr, id)) => reply.created(
                &VALID,
                &attr,
                GENERATION,
                FileHandle(id),
                FopenFlags::FOPEN_KEEP_CACHE,
            ),
            Err(e) => reply.error(e),
        }
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.tree.read(fh.0, offset, size) {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(e),
        }
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.tree.write(fh.0, offset, data) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(u32::MAX)),
            Err(e) => reply.error(e),
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // The kernel then stops asking: a write was answered when BlobFS had it.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.tree.close(fh.0);
        reply.ok();
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.sync(move |tree| done(reply, tree.sync_file(fh.0, datasync)));
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.tree.open_dir(ino.0) {
            Ok(id) => reply.opened(FileHandle(id), FopenFlags::empty()),
            Err(e) => reply.error(e),
        }
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = match self.tree.listed(fh.0, offset) {
            Ok(entries) => entries,
            Err(e) => return reply.error(e),
        };
        for (entry, next) in entries.iter().zip(1..).skip(position(offset)) {
            if reply.add(INodeNo(entry.number), next, entry.kind, &entry.name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let entries = match self.tree.listed(fh.0, offset) {
            Ok(entries) => entries,
            Err(e) => return reply.error(e),
        };
        for (entry, next) in entries.iter().zip(1..).skip(position(offset)) {
            // The kernel takes no reference to these two.
            let own = matches!(entry.name.as_str(), "." | "..");
            let attr = if own {
                FileAttr {
                    ino: INodeNo(entry.number),
                    kind: FileType::Directory,
                    ..nothing()
                }
            } else {
                match self.tree.lookup(ino.0, OsStr::new(&entry.name)) {
                    Ok(Some(attr)) => attr,
                    // It is gone.
                    Ok(None) | Err(_) => continue,
                }
            };
            if reply.add(attr.ino, next, &entry.name, &VALID, &attr, GENERATION) {
                if !own {
                    self.tree.forget(attr.ino.0, 1);
                }
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.tree.close_dir(fh.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        // Every change of names was durable when it was answered.
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let space = self.tree.space();
        let block = u64::from(BLOCK);
        let free = space.free / block;
        let name_max = u32::try_from(NAME_MAX).unwrap_or(u32::MAX) - 1;
        reply.statfs(
            space.total / block,
            free,
            free,
            space.md_pages,
            space.md_pages.saturating_sub(space.md_pages_used),
            BLOCK,
            name_max,
            BLOCK,
        );
    }

    fn setxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        // The kernel answers EOPNOTSUPP from now on, without asking.
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _size: u32,
        reply: ReplyXattr,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        done(reply, self.tree.allocate(fh.0, offset, length, mode));
    }
}

/// Number of entries before the one at `offset`.
fn position(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
