//! Opening and creating: options, locks, refusals.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU8;
use std::thread;
use std::time::{Duration, Instant};

use super::probe::{self, Backing, Discard};
use super::{Shared, Zeroing, sys};
use crate::device::{BlockDevice, DeviceInfo};
use crate::error::BdevError;
use crate::malloc::check_geometry;
use crate::op::{OpKind, OpSet};
use crate::uri::Uri;
use crate::uuid;

/// A living owner is given this long: udev holds a lock for a moment when a device changes.
const BUSY_PATIENCE: Duration = Duration::from_millis(300);
/// The writes of a killed process may land for this long.
const GONE_PATIENCE: Duration = Duration::from_secs(10);
/// Longest read or write in bytes; Linux takes a little less than 2 GiB.
const MAX_IO: u32 = 1 << 30;

/// Whether the blocks of a new image are there before they are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Prealloc {
    /// Sparse: takes space as it is written; writes may fail for want of space.
    #[default]
    Off,
    /// Reserved with `fallocate`.
    Falloc,
    /// Written with zeroes: each later write is an overwrite, with no metadata of the file system.
    Full,
}

/// What to open and how.
#[derive(Debug, Clone, Default)]
pub struct FileOptions {
    /// The image file or block device.
    pub path: PathBuf,
    /// Name of the device; `None`: the path.
    pub name: Option<String>,
    /// Bytes per block: 512 or 4096. `None`: the sector size of a block device, 512 for a file.
    pub block_size: Option<u32>,
    /// Bytes that the device shall have. A shorter file is extended, a longer one is used in part;
    /// `None`: all there is.
    pub size: Option<u64>,
    /// Create the file (with `size`) if it does not exist.
    pub create: bool,
    /// Refuse writes; take a shared lock.
    pub read_only: bool,
    /// Use the kernel's page cache instead of `O_DIRECT`.
    pub buffered: bool,
    /// Use threads instead of io_uring.
    pub no_io_uring: bool,
    /// How a new or extended image gets its blocks.
    pub prealloc: Prealloc,
    /// Identity; `None`: derived from the device and inode numbers.
    pub uuid: Option<[u8; 16]>,
}

pub(crate) fn open_uri(uri: &mut Uri<'_>) -> Result<Arc<dyn BlockDevice>, BdevError> {
    let size = uri.size("size")?;
    let options = FileOptions {
        path: PathBuf::from(&uri.rest),
        name: uri.option("name"),
        block_size: uri.number("block_size")?,
        size,
        create: uri.flag("create")?,
        read_only: uri.flag("read_only")?,
        buffered: uri.flag("buffered")?,
        no_io_uring: uri.flag("no_io_uring")?,
        prealloc: match uri.option("prealloc").as_deref() {
            None | Some("off") => Prealloc::Off,
            Some("falloc") => Prealloc::Falloc,
            Some("full") => Prealloc::Full,
            Some(other) => {
                return Err(uri.invalid(format!("prealloc={other}: use off, falloc or full")));
            }
        },
        uuid: None,
    };
    uri.finish()?;
    if options.path.as_os_str().is_empty() {
        return Err(uri.invalid("no path; write file:///path/to/image"));
    }
    Ok(Arc::new(super::File::open(&options)?))
}

pub(super) fn open(options: &FileOptions) -> Result<Shared, BdevError> {
    let path = &options.path;
    let shown = path.display().to_string();
    let os = |what: &str, e: io::Error| BdevError::os(&shown, what, e);

    let is_block_device = match path.metadata() {
        Ok(meta) if meta.is_file() => false,
        Ok(meta) if probe::is_block_device(&meta) => true,
        Ok(meta) => {
            let what = if meta.is_dir() {
                "a directory"
            } else {
                "neither file nor block device"
            };
            return Err(BdevError::Unsupported {
                device: shown,
                reason: format!("is {what}; give an image file or a block device"),
            });
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if !options.create || options.size.is_none() {
                return Err(BdevError::NoSuchFile { path: path.clone() });
            }
            false
        }
        Err(e) => return Err(os("stat", e)),
    };
    let (file, direct) = open_file(options, is_block_device, &shown)?;
    lock(&file, &shown, !options.read_only)?;
    let meta = file.metadata().map_err(|e| os("stat", e))?;
    // Between the look and the open the path may have become another inode.
    if probe::is_block_device(&meta) != is_block_device {
        return Err(os(
            "open",
            io::Error::other("the path changed while it was opened"),
        ));
    }
    refuse_shared(&meta, &shown, is_block_device)?;

    let mut backing = probe::backing(&file, &meta).map_err(|e| os("size", e))?;
    let block_size =
        options
            .block_size
            .unwrap_or(if is_block_device { backing.sector } else { 512 });
    let len = settle_len(options, &file, &mut backing, block_size, &shown)?;
    check_geometry(&shown, block_size, len / u64::from(block_size))?;
    let (direct, mem_align) = direct_io(&file, &backing, direct, block_size, &shown)?;
    allocate(options, &file, &mut backing, len, &shown)?;

    let identity = format!("{}:{}:{}", meta.dev(), meta.ino(), meta.rdev());
    let info = describe(options, &backing, block_size, len, mem_align, &identity);
    let device = &info.name;
    tracing::info!(device, path = %shown, len, block_size, direct, "opened");
    Ok(Shared {
        info,
        file,
        path: path.clone(),
        direct,
        mem_align: usize::try_from(mem_align).unwrap_or(4096),
        is_block_device,
        discard: backing.discard,
        use_io_uring: !options.no_io_uring,
        zeroing: AtomicU8::new(Zeroing::ZeroRange as u8),
        zeroes: OnceLock::new(),
    })
}

fn describe(
    options: &FileOptions,
    backing: &Backing,
    block_size: u32,
    len: u64,
    mem_align: u32,
    identity: &str,
) -> DeviceInfo {
    let name = options
        .name
        .clone()
        .unwrap_or_else(|| options.path.display().to_string());
    let mut info = DeviceInfo::new(&name, "file", block_size, len / u64::from(block_size));
    info.product.clone_from(&backing.product);
    info.uuid = options
        .uuid
        .unwrap_or_else(|| uuid::derived(identity.as_bytes()));
    info.write_cache = backing.write_cache;
    info.max_io_blocks = MAX_IO / block_size;
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

/// Opens with `O_DIRECT` if it can be had; the lock and all else come afterwards.
fn open_file(
    options: &FileOptions,
    is_block_device: bool,
    shown: &str,
) -> Result<(File, bool), BdevError> {
    let open = |flags: i32| {
        let mut how = OpenOptions::new();
        how.read(true).write(!options.read_only).mode(0o600);
        how.create(options.create && !is_block_device && !options.read_only);
        // O_EXCL without O_CREAT: the kernel's own exclusive claim of a block device.
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
            return Err(BdevError::os(shown, "open", error));
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

/// Takes the lock on the very open file that will do the I/O.
fn lock(file: &File, shown: &str, exclusive: bool) -> Result<(), BdevError> {
    let start = Instant::now();
    loop {
        match sys::try_flock(file, exclusive) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(BdevError::os(shown, "flock", e)),
        }
        let meta = file
            .metadata()
            .map_err(|e| BdevError::os(shown, "stat", e))?;
        let owner = probe::lock_owner(&meta);
        let gone = owner.is_some_and(probe::is_gone);
        if start.elapsed() > if gone { GONE_PATIENCE } else { BUSY_PATIENCE } {
            let pid = owner.filter(|p| *p != 0);
            return Err(BdevError::InUse {
                device: shown.to_owned(),
                pid,
            });
        }
        thread::sleep(Duration::from_millis(if gone { 20 } else { 5 }));
    }
}

/// A loop device and the file behind it are different inodes: a lock on one does not keep
/// anybody from the other.
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

/// The length in bytes that the device shall have; extends a file that is too short.
fn settle_len(
    options: &FileOptions,
    file: &File,
    backing: &mut Backing,
    block_size: u32,
    shown: &str,
) -> Result<u64, BdevError> {
    let bs = u64::from(block_size.max(1));
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
    let Some(size) = options.size else {
        let len = backing.len - backing.len % bs;
        if len == 0 {
            let reason = format!("{} bytes long; give size=… to extend it", backing.len);
            return invalid("size", reason);
        }
        return Ok(len);
    };
    if size == 0 || !size.is_multiple_of(bs) {
        return invalid("size", format!("{size} is not a multiple of {block_size}"));
    }
    if size <= backing.len {
        return Ok(size);
    }
    if backing.is_block_device {
        return invalid(
            "size",
            format!("{size} is more than the device has: {}", backing.len),
        );
    }
    if options.read_only {
        return invalid(
            "size",
            format!("{size}: the file has {}, read-only", backing.len),
        );
    }
    file.set_len(size)
        .map_err(|e| BdevError::os(shown, format!("extend to {size} bytes"), e))?;
    Ok(size)
}

/// Gives a new or extended image its blocks, then makes its length durable.
fn allocate(
    options: &FileOptions,
    file: &File,
    backing: &mut Backing,
    len: u64,
    shown: &str,
) -> Result<(), BdevError> {
    if len <= backing.len {
        return Ok(());
    }
    let old = std::mem::replace(&mut backing.len, len);
    let os = |what: String, e: io::Error| BdevError::os(shown, what, e);
    if options.prealloc != Prealloc::Off {
        sys::fallocate(file, 0, old, len - old)
            .map_err(|e| os(format!("reserve {} bytes", len - old), e))?;
    }
    if options.prealloc == Prealloc::Full {
        write_zeroes(file, old, len)
            .map_err(|e| os(format!("write {} bytes of zeroes", len - old), e))?;
    }
    file.sync_all().map_err(|e| os("sync".to_owned(), e))?;
    if let Some(parent) = options.path.parent() {
        let parent = if parent.as_os_str().is_empty() {
            Path::new(".")
        } else {
            parent
        };
        let synced = File::open(parent).and_then(|dir| dir.sync_all());
        synced.map_err(|e| os("sync the directory".to_owned(), e))?;
    }
    Ok(())
}

fn write_zeroes(file: &File, from: u64, to: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let zeroes = crate::DmaBuf::zeroed(1 << 20).map_err(io::Error::other)?;
    // Direct I/O needs aligned offsets; what lies before was the end of the old file.
    let mut at = from.next_multiple_of(4096).min(to);
    while at < to {
        let n = usize::try_from(to - at)
            .unwrap_or(usize::MAX)
            .min(zeroes.len());
        file.write_all_at(&zeroes[..n], at)?;
        at += n as u64;
    }
    Ok(())
}

/// Whether direct I/O fits the block size, and the alignment that memory needs.
fn direct_io(
    file: &File,
    backing: &Backing,
    direct: bool,
    block_size: u32,
    shown: &str,
) -> Result<(bool, u32), BdevError> {
    if !direct {
        return Ok((false, 1));
    }
    let (mem, offset) = sys::direct_alignment(file).unwrap_or((512, backing.sector));
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
    // Opening it again would lose the lock.
    sys::clear_direct(file).map_err(|e| BdevError::os(shown, "clear O_DIRECT", e))?;
    Ok((false, 1))
}
