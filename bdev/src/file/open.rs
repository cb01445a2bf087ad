//! Opening a file: options, locks, refusals.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pumice_io::sys::file as sys;
use pumice_io::uri::Uri;
use pumice_io::{Limits, OpKind, OpSet};
use serde_json::json;

use super::lock::{self, BUSY_PATIENCE, GONE_PATIENCE};
use super::probe::{self, Backing, Discard};
use super::{SharedFile, make};
use crate::contents::{self, Contents};
use crate::device::{BlockDevice, DeviceInfo};
use crate::error::BdevError;
use crate::malloc::check_geometry;
use crate::module::{Call, Module};
use crate::uuid;

/// Longest read or write in bytes; Linux accepts a little less than 2 GiB.
const MAX_IO: u32 = 1 << 30;

/// Whether the blocks of a new image are allocated before they are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Prealloc {
    /// Not allocated (sparse): the file takes space when it is written, and writes may fail for
    /// lack of space.
    #[default]
    Off,
    /// Allocated with `fallocate`.
    Falloc,
    /// Written with zeroes: each later write is an overwrite that changes no metadata of the file
    /// system.
    Full,
}

/// The file to open, and options.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FileOptions {
    /// Path of the image file or block device.
    pub path: PathBuf,
    /// Name of the device; `None`: the path.
    pub name: Option<String>,
    /// Bytes per block: 512 or 4096. `None`: the sector size of a block device, 512 for a file.
    pub block_size: Option<u32>,
    /// Size in bytes of a new file. An existing file must have this size, if one is given. It is
    /// never made longer or shorter.
    pub size: Option<u64>,
    /// Whether to create the file (with `size`) if it does not exist. A failed opening leaves no
    /// file behind.
    pub create: bool,
    /// Whether to refuse writes, take a shared lock and create nothing.
    pub read_only: bool,
    /// Whether to use the kernel's page cache instead of `O_DIRECT`.
    pub buffered: bool,
    /// Whether to use threads instead of io_uring.
    pub no_io_uring: bool,
    /// Whether the image's blocks are allocated. Missing blocks of an existing image are allocated
    /// too.
    pub prealloc: Prealloc,
    /// UUID; `None`: derived from the device and inode numbers.
    pub uuid: Option<[u8; 16]>,
}

pumice_io::setters!(FileOptions: name: Option<String>, block_size: Option<u32>, size: Option<u64>, create: bool, read_only: bool,
    buffered: bool, no_io_uring: bool, prealloc: Prealloc, uuid: Option<[u8; 16]>);

impl FileOptions {
    /// Returns the options for the file or block device `path`: it exists, and is read and written
    /// without the page cache.
    pub fn new(path: impl Into<PathBuf>) -> FileOptions {
        FileOptions {
            path: path.into(),
            name: None,
            block_size: None,
            size: None,
            create: false,
            read_only: false,
            buffered: false,
            no_io_uring: false,
            prealloc: Prealloc::Off,
            uuid: None,
        }
    }
}

/// Opens devices by URI.
pub(crate) static MODULE: Module = Module {
    examples: &["file:///path?size=4G"],
    open: open_uri,
    call,
};

/// The call of a configuration that makes the device again.
fn call(uri: &mut Uri, info: &DeviceInfo) -> Option<Call> {
    // The reader may have another working directory.
    let path = uri.path();
    let path = std::path::absolute(&path).unwrap_or(path);
    let mut params = json!({
        "name": info.name,
        "filename": path.display().to_string(),
        "block_size": info.block_size,
    });
    if !info.ops.has(OpKind::Write) {
        params["readonly"] = json!(true);
    }
    // Parameters of our own stand for options that SPDK's method does not have.
    if uri.flag("buffered").ok()? {
        params["direct"] = json!(false);
    }
    if uri.flag("no_io_uring").ok()? {
        params["io_uring"] = json!(false);
    }
    match uri.option("prealloc").as_deref() {
        None | Some("off") => {}
        Some(how) => params["prealloc"] = json!(how),
    }
    Some(("bdev_aio_create", params))
}

fn open_uri(uri: &mut Uri, how: crate::OpenOptions) -> Result<Arc<dyn BlockDevice>, BdevError> {
    let growing = how.grow_bytes().is_some();
    let size = uri.size("size")?.filter(|_| !growing);
    let options = FileOptions::new(uri.path())
        .name(uri.option("name"))
        .block_size(uri.number("block_size", 0..=u64::MAX)?)
        .size(size)
        .create(uri.flag("create")? && !growing)
        .read_only(uri.flag("read_only")? || how.is_read_only())
        .buffered(uri.flag("buffered")?)
        .no_io_uring(uri.flag("no_io_uring")?)
        .prealloc(match uri.option("prealloc").as_deref() {
            None | Some("off") => Prealloc::Off,
            Some("falloc") => Prealloc::Falloc,
            Some("full") => Prealloc::Full,
            Some(other) => {
                let reason = format!("prealloc={other}: use off, falloc or full");
                return Err(uri.invalid(reason).into());
            }
        });
    uri.finish()?;
    if options.path.as_os_str().is_empty() {
        return Err(uri.invalid("no path; write file:///path/to/image").into());
    }
    match super::File::open(&options) {
        Err(BdevError::NoSuchFile { path, .. }) if uri.is_path_with_options() => {
            let shown = path.display();
            let reason = format!("no such file; a plain path has no options: write file://{shown}");
            Err(uri.invalid(reason).into())
        }
        Ok(file) => Ok(match how.grow_bytes() {
            Some(size) => Arc::new(grow(file, size, options.prealloc)?),
            None => Arc::new(file),
        }),
        Err(e) => Err(e),
    }
}

pub(super) fn open(options: &FileOptions) -> Result<SharedFile, BdevError> {
    // The answer changes if another process creates or removes the file at the same moment.
    for _ in 0..16 {
        match kind_of(&options.path)? {
            Some(is_block_device) => {
                if let Some(found) = open_existing(options, is_block_device)? {
                    return Ok(found);
                }
            }
            None => match options.size {
                Some(size) if options.create && !options.read_only => {
                    if let Some(made) = make::make(options, size)? {
                        return Ok(made);
                    }
                }
                _ => {
                    return Err(BdevError::NoSuchFile {
                        path: options.path.clone(),
                        hint: "no such file; add create=1 and size=… to make an image there"
                            .to_owned(),
                    });
                }
            },
        }
    }
    let reason = "comes and goes while it is opened".to_owned();
    Err(BdevError::Unsafe {
        device: options.path.display().to_string(),
        reason,
    })
}

/// Returns whether `path` is a block device (`Some(true)`), a file (`Some(false)`) or nothing.
fn kind_of(path: &Path) -> Result<Option<bool>, BdevError> {
    let shown = || path.display().to_string();
    match path.metadata() {
        Ok(meta) if meta.is_file() => Ok(Some(false)),
        Ok(meta) if probe::is_block_device(&meta) => Ok(Some(true)),
        Ok(meta) => {
            let what = if meta.is_dir() {
                "a directory"
            } else {
                "neither file nor block device"
            };
            Err(BdevError::Unsupported {
                device: shown(),
                reason: format!("is {what}; give an image file or a block device"),
            })
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(BdevError::os(shown(), "stat", e)),
    }
}

/// Opens the file that is there. Returns `None` if it was removed meanwhile.
fn open_existing(
    options: &FileOptions,
    is_block_device: bool,
) -> Result<Option<SharedFile>, BdevError> {
    let path = &options.path;
    let shown = path.display().to_string();
    let os = |what: &str, e: io::Error| BdevError::os(&shown, what, e);
    let (file, direct) = open_file(options, is_block_device, &shown)?;
    lock::lock(&file, &shown, !options.read_only)?;
    let meta = file.metadata().map_err(|e| os("stat", e))?;
    // Between the two calls the path may have become another inode.
    if probe::is_block_device(&meta) != is_block_device {
        return Err(os(
            "open",
            io::Error::other("the path changed while it was opened"),
        ));
    }
    if !is_block_device && !lock::is_still(&meta, path) {
        return Ok(None);
    }
    refuse_shared(&meta, &shown, is_block_device)?;
    if is_block_device && !options.read_only && sys::is_write_protected(&file).unwrap_or(false) {
        return Err(BdevError::Unsupported {
            device: shown,
            reason: "is write-protected; to read it, add read_only=1".to_owned(),
        });
    }
    let backing = probe::backing(&file, &meta).map_err(|e| os("size", e))?;
    let block_size =
        options
            .block_size
            .unwrap_or(if is_block_device { backing.sector } else { 512 });
    let len = settle_len(options, &backing, block_size, &shown)?;
    check_geometry(&shown, block_size, len / u64::from(block_size))?;
    let (direct, mem_align) = direct_io(&file, backing.sector, direct, block_size, &shown)?;
    if !options.read_only && !is_block_device && options.prealloc != Prealloc::Off {
        reserve_missing(&file, &meta, &shown)?;
    }
    let found = Found {
        file,
        meta,
        backing,
        block_size,
        len,
        direct,
        mem_align,
        made: false,
    };
    Ok(Some(found.into_shared(options)))
}

/// An open and locked file or block device that can be used as a device.
pub(super) struct Found {
    pub(super) file: File,
    pub(super) meta: std::fs::Metadata,
    pub(super) backing: Backing,
    pub(super) block_size: u32,
    pub(super) len: u64,
    pub(super) direct: bool,
    pub(super) mem_align: u32,
    /// Whether this opening has created the file.
    pub(super) made: bool,
}

impl Found {
    pub(super) fn into_shared(self, options: &FileOptions) -> SharedFile {
        let meta = &self.meta;
        let info = describe(
            options,
            &self.backing,
            self.block_size,
            self.len,
            self.mem_align,
            uuid_of(meta),
        );
        let (device, path) = (&info.name, options.path.display());
        let (len, block_size, direct) = (self.len, self.block_size, self.direct);
        tracing::info!(device, %path, len, block_size, direct, "opened");
        SharedFile::new(info, self, options)
    }
}

/// Makes an image file longer: the file, and nothing that is on it. Changes only a file that holds
/// one of our blobstores, or nothing. A file that has the size already is left as it is, so that
/// the step can be repeated after a crash. With `prealloc` the new blocks are allocated first.
fn grow(mut file: super::File, size: u64, prealloc: Prealloc) -> Result<super::File, BdevError> {
    let info = &file.shared.info;
    let (name, bs) = (info.name.clone(), u64::from(info.block_size));
    let invalid = |reason: String| {
        Err(BdevError::InvalidOption {
            name: format!("{name}: size"),
            reason,
        })
    };
    let old = info.len_bytes();
    if size == old {
        return Ok(file);
    }
    if size < old || !size.is_multiple_of(bs) {
        return invalid(format!(
            "{size} bytes; it has {old} and can only become longer, by whole blocks of {bs}"
        ));
    }
    if file.shared.is_block_device {
        return invalid(format!("{size} is more than the device has: {old}"));
    }
    match contents::examine(&file) {
        Contents::Ours(_) | Contents::Blank => {}
        contents => {
            return Err(BdevError::NotBlank {
                device: name,
                contents,
            });
        }
    }
    let Some(shared) = Arc::get_mut(&mut file.shared) else {
        return invalid("the device is in use".to_owned());
    };
    check_geometry(&name, shared.info.block_size, size / bs)?;
    if prealloc != Prealloc::Off {
        sys::fallocate(&shared.file, libc::FALLOC_FL_KEEP_SIZE, old, size - old)
            .map_err(|e| BdevError::os(&name, format!("prealloc: reserve {size} bytes"), e))?;
    }
    shared
        .file
        .set_len(size)
        .and_then(|()| sys::sync_all(&shared.file))
        .map_err(|e| BdevError::os(&name, format!("extend to {size} bytes"), e))?;
    shared.info.num_blocks = size / bs;
    Ok(file)
}

/// Allocates the missing blocks of an image. Its length and contents stay.
fn reserve_missing(file: &File, meta: &std::fs::Metadata, shown: &str) -> Result<(), BdevError> {
    let len = meta.len();
    if meta.blocks().saturating_mul(512) >= len {
        return Ok(());
    }
    sys::fallocate(file, libc::FALLOC_FL_KEEP_SIZE, 0, len)
        .map_err(|e| BdevError::os(shown, format!("prealloc: reserve {len} bytes"), e))
}

/// Returns the UUID that the device of a file has if the options give none. It depends on the file
/// alone, not on the path by which it is opened.
pub fn uuid_of(meta: &std::fs::Metadata) -> [u8; 16] {
    let identity = format!("{}:{}:{}", meta.dev(), meta.ino(), meta.rdev());
    uuid::derived(identity.as_bytes())
}

fn describe(
    options: &FileOptions,
    backing: &Backing,
    block_size: u32,
    len: u64,
    mem_align: u32,
    uuid: [u8; 16],
) -> DeviceInfo {
    let name = options
        .name
        .clone()
        .unwrap_or_else(|| options.path.display().to_string());
    let mut info = DeviceInfo::new(&name, "file", block_size, len / u64::from(block_size));
    info.product.clone_from(&backing.product);
    info.uuid = options.uuid.unwrap_or(uuid);
    info.write_cache = backing.write_cache;
    info.limits = Limits::new(MAX_IO / block_size, 0);
    info.buf_align = mem_align;
    info.unmap_zeroes = backing.discard == Discard::PunchHole;
    info.ops = OpSet::NONE
        .with(OpKind::Read)
        .with(OpKind::Reset)
        .with(OpKind::Abort);
    if !options.read_only {
        info.ops = OpSet::BASIC.with(OpKind::Abort);
        if backing.discard != Discard::None {
            info.ops = info.ops.with(OpKind::Unmap);
        }
    }
    info
}

/// Opens with `O_DIRECT` if possible. The lock and everything else come afterwards.
fn open_file(
    options: &FileOptions,
    is_block_device: bool,
    shown: &str,
) -> Result<(File, bool), BdevError> {
    let open = |flags: i32| {
        let mut how = OpenOptions::new();
        how.read(true).write(!options.read_only).mode(0o600);
        // O_EXCL without O_CREAT is the kernel's exclusive claim of a block device.
        let excl = if is_block_device && !options.read_only {
            libc::O_EXCL
        } else {
            0
        };
        how.custom_flags(flags | excl | libc::O_CLOEXEC)
            .open(&options.path)
    };
    let start = Instant::now();
    loop {
        let result = if options.buffered {
            open(0).map(|f| (f, false))
        } else {
            match open(libc::O_DIRECT) {
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                    tracing::warn!(
                        path = shown,
                        "no O_DIRECT on this file system: buffered I/O"
                    );
                    open(0).map(|f| (f, false))
                }
                other => other.map(|f| (f, true)),
            }
        };
        let error = match result {
            Ok(opened) => return Ok(opened),
            Err(e) => e,
        };
        if error.raw_os_error() != Some(libc::EBUSY) || !is_block_device {
            let refused = matches!(
                error.raw_os_error(),
                Some(libc::EACCES | libc::EPERM | libc::EROFS)
            );
            let what = if refused && !options.read_only {
                "open for writing (with read_only=1 it is enough that it can be read)"
            } else {
                "open"
            };
            return Err(BdevError::os(shown, what, error));
        }
        let meta = options
            .path
            .metadata()
            .map_err(|e| BdevError::os(shown, "stat", e))?;
        if let Some(reason) = probe::block_device_user(&meta) {
            return Err(BdevError::Unsafe {
                device: shown.to_owned(),
                reason,
            });
        }
        let pid = probe::lock_owner(&meta).filter(|p| *p != 0);
        let gone = pid.is_none_or(probe::is_gone);
        if start.elapsed() > if gone { GONE_PATIENCE } else { BUSY_PATIENCE } {
            return Err(BdevError::InUse {
                device: shown.to_owned(),
                pid,
            });
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// A loop device and its backing file are different inodes, so a lock on one does not exclude users
/// of the other.
fn refuse_shared(
    meta: &std::fs::Metadata,
    shown: &str,
    is_block_device: bool,
) -> Result<(), BdevError> {
    let device = shown.to_owned();
    if !is_block_device {
        let loops = probe::loop_devices_on(meta);
        if let Some(loop_device) = loops.first() {
            let l = loop_device.display();
            let reason = format!("is behind {l}: use {l}, or detach it first (losetup -d {l})");
            return Err(BdevError::Unsafe { device, reason });
        }
        return Ok(());
    }
    if let Some(reason) = probe::block_device_user(meta) {
        return Err(BdevError::Unsafe { device, reason });
    }
    if let Some((path, pid)) = probe::loop_backing_owner(meta)
        && !probe::is_gone(pid)
    {
        let device = format!("{shown} (on {})", path.display());
        return Err(BdevError::InUse {
            device,
            pid: Some(pid),
        });
    }
    Ok(())
}

/// Returns the device's length in bytes, in whole blocks. A requested size must be equal to it.
fn settle_len(
    options: &FileOptions,
    backing: &Backing,
    block_size: u32,
    shown: &str,
) -> Result<u64, BdevError> {
    let invalid = |name: &str, reason: String| {
        Err(BdevError::InvalidOption {
            name: format!("{shown}: {name}"),
            reason,
        })
    };
    if backing.is_block_device && !block_size.is_multiple_of(backing.sector) {
        return invalid(
            "block_size",
            format!(
                "{block_size} does not fit sectors of {0} bytes: use {0}",
                backing.sector
            ),
        );
    }
    match options.size {
        Some(size) if size != backing.len && backing.is_block_device => {
            let reason = format!("{size}, but the device has {}: leave it out", backing.len);
            return invalid("size", reason);
        }
        Some(size) if size != backing.len => {
            return Err(BdevError::WrongSize {
                path: options.path.clone(),
                found_bytes: backing.len,
                wanted_bytes: size,
            });
        }
        _ => {}
    }
    let len = backing.len - backing.len % u64::from(block_size.max(1));
    if len == 0 {
        let reason = format!(
            "the file has {} bytes, less than one block; size= with create=1 makes a file where \
             there is none",
            backing.len
        );
        return invalid("size", reason);
    }
    Ok(len)
}

/// Returns whether direct I/O is possible with the block size, and the alignment that memory needs.
pub(super) fn direct_io(
    file: &File,
    sector: u32,
    direct: bool,
    block_size: u32,
    shown: &str,
) -> Result<(bool, u32), BdevError> {
    if !direct {
        return Ok((false, 1));
    }
    let (mem, offset) = sys::direct_alignment(file).unwrap_or((512, sector));
    let reason = if mem == 0 || offset == 0 {
        "the file system has no direct I/O for this file".to_owned()
    } else if !block_size.is_multiple_of(offset) {
        format!("direct I/O here needs multiples of {offset} bytes, the block size is {block_size}")
    } else if mem > 4096 {
        format!("direct I/O here needs memory aligned to {mem} bytes")
    } else {
        return Ok((true, mem.next_power_of_two()));
    };
    tracing::warn!(path = shown, %reason, "buffered I/O");
    // Opening the file again would lose the lock.
    sys::clear_direct(file).map_err(|e| BdevError::os(shown, "clear O_DIRECT", e))?;
    Ok((false, 1))
}
