//! Options of formatting, mounting and opening.

use crate::blobstore::LEAST_JOURNAL_BYTES as LEAST_BYTES;

pumice_bdev::setters!(FormatOptions: cluster_size: u32, md_pages: Option<u32>, journal: Journal, force: bool);
pumice_bdev::setters!(MountOptions: cache_bytes: u64, cache_most_bytes: Option<u64>, huge_pages: bool, read_only: bool,
    accept_damage: bool, volatile: bool, write_behind_bytes: usize, shared_channels: usize, read_ahead_bytes: usize, discard: bool);
pumice_bdev::setters!(const OpenOptions: create: bool, truncate: bool, exclusive: bool, fresh: bool, essential: bool);

/// Options of a new file system.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FormatOptions {
    /// Bytes of a cluster, the unit of allocation: a multiple of 4096. The default is 64 KiB.
    /// Larger ones need less memory and metadata for very long files, and more space for small
    /// ones.
    pub cluster_size: u32,
    /// Number of metadata pages to begin with, at least [`FormatOptions::MIN_MD_PAGES`]; a file
    /// needs one or more. The default is two per MiB, at most 16384. The region grows when three
    /// quarters are used.
    pub md_pages: Option<u32>,
    /// The journal for changes of metadata and for small syncs; `docs/journal.md` has its rules.
    pub journal: Journal,
    /// Whether to overwrite any content of the device.
    pub force: bool,
}

impl FormatOptions {
    /// The smallest number of metadata pages of a new file system.
    pub const MIN_MD_PAGES: u32 = 16;
}

impl Default for FormatOptions {
    fn default() -> FormatOptions {
        FormatOptions {
            cluster_size: 64 << 10,
            md_pages: None,
            journal: Journal::Auto,
            force: false,
        }
    }
}

/// The journal of a new file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Journal {
    /// A sixty-fourth of the device, at most 32 MiB, rounded up to clusters. There is none on a device of which that is less than
    /// 128 KiB, or a cluster more than a thirty-second.
    #[default]
    Auto,
    /// None: the metadata is changed in place, as SPDK does, and a power cut must not tear its pages of 4 KiB.
    None,
    /// This number of bytes, rounded up to clusters, 128 KiB to 256 MiB; see
    /// [`InitOptions::journal`](crate::blobstore::InitOptions::journal).
    Bytes(u64),
}

impl Journal {
    /// Returns the number of bytes on a device of `device_bytes`, if there is one.
    pub(super) fn bytes(self, device_bytes: u64, cluster_size: u32) -> Option<u64> {
        match self {
            Journal::Auto => {
                let bytes = (device_bytes / 64).min(32 << 20);
                let fits = u64::from(cluster_size) <= device_bytes / 32;
                (fits && bytes >= LEAST_BYTES).then_some(bytes)
            }
            Journal::None => None,
            Journal::Bytes(bytes) => Some(bytes),
        }
    }
}

/// Options of a mount.
///
/// ```
/// use pumice_blobfs::fs::MountOptions;
///
/// let options = MountOptions::default().read_only(true).cache_bytes(64 << 20);
/// assert!(options.read_only && options.cache_bytes == 64 << 20);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MountOptions {
    /// Bound of the page cache in bytes, without unwritten data. The default is an eighth of the
    /// machine's memory, or of the control group's limit where that is lower, at most a quarter of
    /// what is free, between 8 and 256 MiB.
    pub cache_bytes: u64,
    /// Size in bytes up to which the page cache grows beyond `cache_bytes` while memory is free: half of what is free
    /// beyond an eighth of the memory that this process may use, ten times a second. It gives memory
    /// back when less than that eighth is free. It does not grow while an NVMe device has the memory
    /// mapped, since then none goes back to the system. `None`, the default: `cache_bytes` is the
    /// bound. [`cache_most_bytes`](super::cache_most_bytes) is three quarters of the memory.
    pub cache_most_bytes: Option<u64>,
    /// Whether the page cache's memory becomes huge pages while it is in use, as far as memory is free and the kernel does so (Linux
    /// 6.1 and later; not while an NVMe device has the memory mapped, and not where transparent huge pages are set to
    /// `never`). A thread makes them, for about a millisecond each. On by default.
    pub huge_pages: bool,
    /// Whether nothing is ever written.
    pub read_only: bool,
    /// Whether to mount for writing although blobs are damaged, without their files, or the journal
    /// is, without the changes that it may have lost: what is missing counts as lost. Otherwise such
    /// a mount fails with [`FsError::Damaged`](super::FsError::Damaged).
    pub accept_damage: bool,
    /// Whether what is not synced may be lost when the process is killed, as it is by a power cut. Otherwise, on a device that is
    /// there without this process, it is kept in shared memory (`/dev/shm`, 16 MiB, or a sixteenth of the memory that this
    /// process may use), and the next mount until the machine restarts puts it in place.
    pub volatile: bool,
    /// Number of bytes in flight at which an appending thread waits. The default is a sixteenth of
    /// the memory that this process may use, between 4 and 32 MiB.
    pub write_behind_bytes: usize,
    /// Most channels that threads share for writes and readahead. There is one at first; others are
    /// opened when threads need them at the same time, as far as the device has them.
    pub shared_channels: usize,
    /// Longest readahead in bytes; 0 for none.
    pub read_ahead_bytes: usize,
    /// Whether files made by this mount tell the device (TRIM, hole punching) when they free
    /// clusters. Off by default, as with the kernel's file systems: it slows deletion and, in an
    /// image file, the next write into the hole.
    pub discard: bool,
}

impl Default for MountOptions {
    fn default() -> MountOptions {
        MountOptions {
            cache_bytes: super::memory::default_cache_bytes(),
            cache_most_bytes: None,
            huge_pages: true,
            read_only: false,
            accept_damage: false,
            volatile: false,
            write_behind_bytes: super::memory::default_behind_bytes(),
            shared_channels: 16,
            read_ahead_bytes: 1 << 20,
            discard: false,
        }
    }
}

/// Options for opening a file.
///
/// ```
/// use pumice_blobfs::fs::OpenOptions;
///
/// let options = OpenOptions::CREATE.exclusive(true);
/// assert!(options.create && options.exclusive);
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Creates the file if it does not exist.
    pub create: bool,
    /// Truncates it to length 0.
    pub truncate: bool,
    /// Creates the file, and fails if it exists.
    pub exclusive: bool,
    /// Creates a new file. One of that name is replaced in one step, and stays usable for those who
    /// have it open.
    pub fresh: bool,
    /// Whether it is one of the small files that an application needs to open its data. On a full
    /// file system it, and its first MiB, may use the reserve.
    pub essential: bool,
}

impl OpenOptions {
    /// Opens an existing file.
    pub const READ: OpenOptions = OpenOptions {
        create: false,
        truncate: false,
        exclusive: false,
        fresh: false,
        essential: false,
    };
    /// Opens an existing file, or creates it.
    pub const CREATE: OpenOptions = OpenOptions::READ.create(true);
    /// Creates a new file in place of one that has the name.
    pub const FRESH: OpenOptions = OpenOptions::READ.create(true).fresh(true);
}

/// The expected use of a handle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Access {
    /// Readahead when reads turn out to be sequential.
    #[default]
    Normal,
    /// No readahead.
    Random,
    /// Readahead from the first read on.
    Sequential,
    /// As `Normal`; read data should stay in memory.
    WillNeed,
    /// The contents need not stay in memory: clean cached pages are dropped.
    DontNeed,
    /// For a writer: appended data is not read soon (a write-ahead log), so its buffers are used
    /// again once they are on the device, instead of becoming cache.
    NoReuse,
}
