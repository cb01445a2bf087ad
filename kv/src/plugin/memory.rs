//! A file system in memory: what the shim costs by itself, and its tests.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use super::{
    Abilities, Access, Entry, Fault, How, PendingRead, PluginFile, PluginFs, Read, Result, Started,
    Stat,
};

const CHUNK_BYTES: usize = 64 * 1024;

/// Says for a call (`"append"`, `"open"`, …) and a path whether it fails.
type FaultPlan = Box<dyn Fn(&str, &str) -> Option<Fault> + Send + Sync>;

#[derive(Default)]
struct Inode {
    id: u64,
    path_at_open: String,
    chunks: RwLock<Vec<Box<[u8]>>>,
    len: AtomicU64,
    /// Milliseconds since the file system was made.
    modified_ms: AtomicU64,
    links: AtomicU64,
}

enum Node {
    Dir,
    File(Arc<Inode>),
}

struct Shared {
    tree: Mutex<BTreeMap<String, Node>>,
    locked: Mutex<HashSet<String>>,
    next_id: AtomicU64,
    capacity: u64,
    used: AtomicU64,
    born: SystemTime,
    faults_on: AtomicBool,
    faults: Mutex<Option<FaultPlan>>,
}

/// Files in ordinary memory, with a limit; gone with the last handle.
#[derive(Clone)]
pub struct MemoryFs(Arc<Shared>);

/// A file of [`MemoryFs`].
pub struct MemoryFile {
    fs: Arc<Shared>,
    inode: Arc<Inode>,
}

/// A read that happens when it is finished.
#[derive(Debug)]
pub struct Later {
    file: MemoryFile,
    offset: u64,
}

/// The lock of a path.
#[derive(Debug)]
pub struct MemoryLock {
    fs: MemoryFs,
    path: String,
}

impl fmt::Debug for MemoryFs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryFs")
            .field("capacity", &self.0.capacity)
            .field("used", &self.0.used)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for MemoryFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryFile")
            .field("path", &self.inode.path_at_open)
            .finish_non_exhaustive()
    }
}

fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `offset` as a chunk and a place in it.
fn place(offset: u64) -> (usize, usize) {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    (offset / CHUNK_BYTES, offset % CHUNK_BYTES)
}

impl MemoryFs {
    /// An empty file system that holds at most `capacity` bytes, counted in 64 KiB.
    #[must_use]
    pub fn new(capacity: u64) -> MemoryFs {
        let mut tree = BTreeMap::new();
        tree.insert("/".to_owned(), Node::Dir);
        MemoryFs(Arc::new(Shared {
            tree: Mutex::new(tree),
            locked: Mutex::default(),
            next_id: AtomicU64::new(1),
            capacity,
            used: AtomicU64::new(0),
            born: SystemTime::now(),
            faults_on: AtomicBool::new(false),
            faults: Mutex::default(),
        }))
    }

    /// Lets calls fail: `plan` is asked with the name of the call and the path. `None` ends it.
    pub fn set_faults(&self, plan: Option<FaultPlan>) {
        self.0.faults_on.store(plan.is_some(), Ordering::Release);
        *held(&self.0.faults) = plan;
    }
}

impl Shared {
    fn check(&self, call: &str, path: &str) -> Result<()> {
        if self.faults_on.load(Ordering::Relaxed)
            && let Some(fault) = held(&self.faults)
                .as_ref()
                .and_then(|plan| plan(call, path))
        {
            return Err(fault);
        }
        Ok(())
    }

    fn now_ms(&self) -> u64 {
        let ms = self.born.elapsed().unwrap_or_default().as_millis();
        u64::try_from(ms).unwrap_or(u64::MAX)
    }

    fn grow(&self, chunks: &mut Vec<Box<[u8]>>, count: usize) -> Result<()> {
        while chunks.len() < count {
            let more = CHUNK_BYTES as u64;
            if self.used.fetch_add(more, Ordering::Relaxed) + more > self.capacity {
                self.used.fetch_sub(more, Ordering::Relaxed);
                return Err(Fault::no_space(format!(
                    "the memory file system is full at {} bytes",
                    self.capacity
                )));
            }
            chunks.push(vec![0; CHUNK_BYTES].into_boxed_slice());
        }
        Ok(())
    }

    fn drop_name(&self, inode: &Arc<Inode>) {
        inode.links.fetch_sub(1, Ordering::Relaxed);
        // Its space is counted while somebody has it open: MemoryFile::drop gives it back.
        if Arc::strong_count(inode) == 1 {
            self.give_back(inode);
        }
    }

    fn give_back(&self, inode: &Inode) {
        let chunks =
            std::mem::take(&mut *inode.chunks.write().unwrap_or_else(PoisonError::into_inner));
        self.used
            .fetch_sub((chunks.len() * CHUNK_BYTES) as u64, Ordering::Relaxed);
    }
}

fn parent(path: &str) -> &str {
    match path.rfind('/') {
        Some(0) | None => "/",
        Some(at) => &path[..at],
    }
}

fn check_parent(tree: &BTreeMap<String, Node>, path: &str) -> Result<()> {
    match tree.get(parent(path)) {
        Some(Node::Dir) => Ok(()),
        Some(Node::File(_)) => Err(Fault::new(
            libc::ENOTDIR,
            format!("not a directory: {path}"),
        )),
        None => Err(Fault::not_found(parent(path))),
    }
}

fn find<'t>(tree: &'t BTreeMap<String, Node>, path: &str) -> Result<&'t Node> {
    tree.get(path).ok_or_else(|| Fault::not_found(path))
}

fn find_file<'t>(tree: &'t BTreeMap<String, Node>, path: &str) -> Result<&'t Arc<Inode>> {
    match find(tree, path)? {
        Node::File(inode) => Ok(inode),
        Node::Dir => Err(Fault::new(libc::EISDIR, format!("is a directory: {path}"))),
    }
}

/// The paths below `dir`, without its own.
fn below<'t>(
    tree: &'t BTreeMap<String, Node>,
    dir: &str,
) -> impl Iterator<Item = (&'t String, &'t Node)> {
    let prefix = if dir == "/" {
        "/".to_owned()
    } else {
        format!("{dir}/")
    };
    tree.range::<String, _>((Bound::Excluded(prefix.clone()), Bound::Unbounded))
        .take_while(move |(path, _)| path.starts_with(&prefix))
}

impl PluginFs for MemoryFs {
    type File = MemoryFile;
    type Lock = MemoryLock;

    fn abilities(&self) -> Abilities {
        Abilities {
            async_reads: true,
            pins: true,
            prefetch: false,
            rereads: true,
        }
    }

    fn alignment(&self) -> usize {
        512
    }

    fn open(&self, path: &str, how: How) -> Result<MemoryFile> {
        self.0.check("open", path)?;
        let mut tree = held(&self.0.tree);
        let existing = match tree.get(path) {
            Some(Node::File(inode)) => Some(Arc::clone(inode)),
            Some(Node::Dir) => {
                return Err(Fault::new(libc::EISDIR, format!("is a directory: {path}")));
            }
            None => None,
        };
        let inode = match existing {
            Some(inode) if !how.fresh => inode,
            None if !how.create => return Err(Fault::not_found(path)),
            old => {
                check_parent(&tree, path)?;
                let inode = Arc::new(Inode {
                    id: self.0.next_id.fetch_add(1, Ordering::Relaxed),
                    path_at_open: path.to_owned(),
                    modified_ms: AtomicU64::new(self.0.now_ms()),
                    links: AtomicU64::new(1),
                    ..Inode::default()
                });
                tree.insert(path.to_owned(), Node::File(Arc::clone(&inode)));
                if let Some(old) = old {
                    self.0.drop_name(&old);
                }
                inode
            }
        };
        Ok(MemoryFile {
            fs: Arc::clone(&self.0),
            inode,
        })
    }

    fn remove(&self, path: &str) -> Result<()> {
        self.0.check("remove", path)?;
        let mut tree = held(&self.0.tree);
        let inode = Arc::clone(find_file(&tree, path)?);
        tree.remove(path);
        self.0.drop_name(&inode);
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.0.check("rename", from)?;
        let mut tree = held(&self.0.tree);
        check_parent(&tree, to)?;
        let is_dir = matches!(find(&tree, from)?, Node::Dir);
        match (is_dir, tree.get(to)) {
            _ if from == to => return Ok(()),
            (true, Some(Node::File(_))) => {
                return Err(Fault::new(libc::ENOTDIR, format!("not a directory: {to}")));
            }
            (false, Some(Node::Dir)) => {
                return Err(Fault::new(libc::EISDIR, format!("is a directory: {to}")));
            }
            (true, _) if below(&tree, to).next().is_some() => {
                return Err(Fault::new(
                    libc::ENOTEMPTY,
                    format!("directory not empty: {to}"),
                ));
            }
            _ => {}
        }
        let mut moved: Vec<String> = vec![from.to_owned()];
        if is_dir {
            if to.starts_with(&format!("{from}/")) {
                return Err(Fault::new(libc::EINVAL, format!("{to} is inside {from}")));
            }
            moved.extend(below(&tree, from).map(|(path, _)| path.clone()));
        }
        for path in moved {
            let target = format!("{to}{}", &path[from.len()..]);
            if let Some(node) = tree.remove(&path)
                && let Some(Node::File(old)) = tree.insert(target, node)
            {
                self.0.drop_name(&old);
            }
        }
        Ok(())
    }

    fn link(&self, from: &str, to: &str) -> Result<()> {
        self.0.check("link", from)?;
        let mut tree = held(&self.0.tree);
        check_parent(&tree, to)?;
        let inode = Arc::clone(find_file(&tree, from)?);
        if tree.contains_key(to) {
            return Err(Fault::new(libc::EEXIST, format!("already exists: {to}")));
        }
        inode.links.fetch_add(1, Ordering::Relaxed);
        tree.insert(to.to_owned(), Node::File(inode));
        Ok(())
    }

    fn stat(&self, path: &str) -> Result<Stat> {
        self.0.check("stat", path)?;
        let tree = held(&self.0.tree);
        Ok(match find(&tree, path)? {
            Node::Dir => Stat {
                len: 0,
                modified: self.0.born,
                file_id: 0,
                links: 1,
                is_dir: true,
            },
            Node::File(inode) => Stat {
                len: inode.len.load(Ordering::Acquire),
                modified: self.0.born
                    + Duration::from_millis(inode.modified_ms.load(Ordering::Relaxed)),
                file_id: inode.id,
                links: u32::try_from(inode.links.load(Ordering::Relaxed)).unwrap_or(u32::MAX),
                is_dir: false,
            },
        })
    }

    fn mkdir(&self, path: &str) -> Result<()> {
        self.0.check("mkdir", path)?;
        let mut tree = held(&self.0.tree);
        if tree.contains_key(path) {
            return Err(Fault::new(libc::EEXIST, format!("already exists: {path}")));
        }
        check_parent(&tree, path)?;
        tree.insert(path.to_owned(), Node::Dir);
        Ok(())
    }

    fn rmdir(&self, path: &str) -> Result<()> {
        self.0.check("rmdir", path)?;
        let mut tree = held(&self.0.tree);
        match find(&tree, path)? {
            Node::File(_) => {
                return Err(Fault::new(
                    libc::ENOTDIR,
                    format!("not a directory: {path}"),
                ));
            }
            Node::Dir if path == "/" => {
                return Err(Fault::new(libc::EBUSY, "the root cannot be removed"));
            }
            Node::Dir if below(&tree, path).next().is_some() => {
                return Err(Fault::new(
                    libc::ENOTEMPTY,
                    format!("directory not empty: {path}"),
                ));
            }
            Node::Dir => {}
        }
        tree.remove(path);
        Ok(())
    }

    fn list(&self, dir: &str) -> Result<Vec<Entry>> {
        self.0.check("list", dir)?;
        let tree = held(&self.0.tree);
        if let Node::File(_) = find(&tree, dir)? {
            return Err(Fault::new(libc::ENOTDIR, format!("not a directory: {dir}")));
        }
        let own = if dir == "/" { 1 } else { dir.len() + 1 };
        Ok(below(&tree, dir)
            .filter(|(path, _)| !path[own..].contains('/'))
            .map(|(path, node)| Entry {
                name: path[own..].to_owned(),
                len: match node {
                    Node::Dir => 0,
                    Node::File(inode) => inode.len.load(Ordering::Acquire),
                },
                is_dir: matches!(node, Node::Dir),
            })
            .collect())
    }

    fn sync_dir(&self, dir: &str) -> Result<()> {
        self.0.check("sync_dir", dir)?;
        find(&held(&self.0.tree), dir).map(|_| ())
    }

    fn lock(&self, path: &str) -> Result<MemoryLock> {
        self.open(
            path,
            How {
                create: true,
                ..How::default()
            },
        )?;
        if !held(&self.0.locked).insert(path.to_owned()) {
            return Err(Fault::new(
                libc::ENOLCK,
                format!("{path} is locked by this process"),
            ));
        }
        Ok(MemoryLock {
            fs: self.clone(),
            path: path.to_owned(),
        })
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(self
            .0
            .capacity
            .saturating_sub(self.0.used.load(Ordering::Relaxed)))
    }
}

impl Drop for MemoryLock {
    fn drop(&mut self) {
        held(&self.fs.0.locked).remove(&self.path);
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        if self.inode.links.load(Ordering::Relaxed) == 0 && Arc::strong_count(&self.inode) == 1 {
            self.fs.give_back(&self.inode);
        }
    }
}

impl MemoryFile {
    fn write(&self, call: &str, offset: Option<u64>, data: &[u8]) -> Result<()> {
        self.fs.check(call, &self.inode.path_at_open)?;
        let mut chunks = self
            .inode
            .chunks
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let len = self.inode.len.load(Ordering::Relaxed);
        let mut at = offset.unwrap_or(len);
        let end = at + data.len() as u64;
        let (last, rest) = place(end);
        self.fs.grow(&mut chunks, last + usize::from(rest > 0))?;
        let mut left = data;
        while !left.is_empty() {
            let (chunk, from) = place(at);
            let n = left.len().min(CHUNK_BYTES - from);
            chunks[chunk][from..from + n].copy_from_slice(&left[..n]);
            left = &left[n..];
            at += n as u64;
        }
        if end > len {
            self.inode.len.store(end, Ordering::Release);
        }
        Ok(())
    }
}

impl PluginFile for MemoryFile {
    type Pin = Vec<u8>;
    type Pending = Later;

    fn size(&self) -> u64 {
        self.inode.len.load(Ordering::Acquire)
    }

    fn file_id(&self) -> u64 {
        self.inode.id
    }

    fn append(&self, data: &[u8]) -> Result<()> {
        self.write("append", None, data)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.write("write_at", Some(offset), data)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        self.fs.check("read", &self.inode.path_at_open)?;
        let chunks = self
            .inode
            .chunks
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let len = self.inode.len.load(Ordering::Acquire);
        let left = usize::try_from(len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let total = buf.len().min(left);
        let mut done = 0;
        while done < total {
            let (chunk, from) = place(offset + done as u64);
            let n = (total - done).min(CHUNK_BYTES - from);
            match chunks.get(chunk) {
                Some(bytes) => buf[done..done + n].copy_from_slice(&bytes[from..from + n]),
                None => buf[done..done + n].fill(0),
            }
            done += n;
        }
        Ok(total)
    }

    fn read_many(&self, reads: &mut [Read<'_>]) {
        for read in reads {
            read.result = self.read_at(read.offset, read.buf);
        }
    }

    fn pin(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        let got = self.read_at(offset, &mut bytes).ok()?;
        bytes.truncate(got);
        Some(bytes)
    }

    fn read_start(&self, offset: u64, _len: usize) -> Result<Started<Later>> {
        self.fs.check("read_start", &self.inode.path_at_open)?;
        let file = MemoryFile {
            fs: Arc::clone(&self.fs),
            inode: Arc::clone(&self.inode),
        };
        Ok(Started::Pending(Later { file, offset }))
    }

    fn truncate(&self, len: u64) -> Result<()> {
        self.fs.check("truncate", &self.inode.path_at_open)?;
        let mut chunks = self
            .inode
            .chunks
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let (last, rest) = place(len);
        let keep = last + usize::from(rest > 0);
        let gone = chunks.len().saturating_sub(keep);
        chunks.truncate(keep);
        self.fs
            .used
            .fetch_sub((gone * CHUNK_BYTES) as u64, Ordering::Relaxed);
        self.fs.grow(&mut chunks, keep)?;
        if let (true, Some(tail)) = (rest > 0, chunks.get_mut(last)) {
            tail[rest..].fill(0);
        }
        self.inode.len.store(len, Ordering::Release);
        self.inode
            .modified_ms
            .store(self.fs.now_ms(), Ordering::Relaxed);
        Ok(())
    }

    fn allocate(&self, _offset: u64, _len: u64) -> Result<()> {
        self.fs.check("allocate", &self.inode.path_at_open)
    }

    fn finish(&self) -> Result<()> {
        self.fs.check("finish", &self.inode.path_at_open)
    }

    fn sync(&self) -> Result<()> {
        self.inode
            .modified_ms
            .store(self.fs.now_ms(), Ordering::Relaxed);
        self.fs.check("sync", &self.inode.path_at_open)
    }

    fn range_sync(&self, _offset: u64, _len: u64) -> Result<()> {
        self.fs.check("range_sync", &self.inode.path_at_open)
    }

    fn prefetch(&self, _offset: u64, _len: u64) -> Result<()> {
        self.fs.check("prefetch", &self.inode.path_at_open)
    }

    fn invalidate(&self, _offset: u64, _len: u64) -> Result<()> {
        self.fs.check("invalidate", &self.inode.path_at_open)
    }

    fn advise(&self, _access: Access) {}
}

impl PendingRead for Later {
    fn finish(self, buf: &mut [u8]) -> Result<usize> {
        self.file.read_at(self.offset, buf)
    }
}
