//! Options of formatting, mounting and opening.

/// How a file system is made.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FormatOptions {
    /// Bytes of a cluster, the unit of allocation: a multiple of 4096. 64 KiB by default; larger ones take
    /// less memory and metadata for very long files, and more space for small ones.
    pub cluster_size: u32,
    /// Pages of the metadata region to begin with, at least [`FormatOptions::MIN_MD_PAGES`]; a file needs
    /// one or more. By default two per MiB, at most 16384. The region grows when three quarters are used.
    pub md_pages: Option<u32>,
    /// Format over whatever the device holds.
    pub force: bool,
}

impl FormatOptions {
    /// The fewest metadata pages that a file system is made with.
    pub const MIN_MD_PAGES: u32 = 16;
}

impl Default for FormatOptions {
    fn default() -> FormatOptions {
        FormatOptions {
            cluster_size: 64 << 10,
            md_pages: None,
            force: false,
        }
    }
}

/// How a file system is mounted.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MountOptions {
    /// Bound of the page cache in bytes. Unwritten data does not count. By default an eighth of the
    /// machine's memory, or of the control group's limit where that is lower, at most 256 MiB.
    pub cache_bytes: u64,
    /// Nothing is ever written.
    pub read_only: bool,
    /// Mounts for writing although blobs are damaged, without the files that they were: what was in them
    /// counts as lost. Without it such a mount fails with [`FsError::Damaged`](super::FsError::Damaged).
    pub accept_damage: bool,
    /// Bytes on their way to the device at which an appending thread waits.
    pub write_behind_bytes: usize,
    /// Channels that threads share for writes and read-ahead.
    pub shared_channels: usize,
    /// Longest read-ahead in bytes; 0: none.
    pub read_ahead_bytes: usize,
    /// Files made by this mount tell the device (TRIM, hole punching) when they give clusters
    /// back. Off by default, as with the kernel's file systems: it makes deletion slower, and in
    /// an image file the next write into the hole as well.
    pub discard: bool,
}

impl Default for MountOptions {
    fn default() -> MountOptions {
        MountOptions {
            cache_bytes: super::memory::default_cache_bytes(),
            read_only: false,
            accept_damage: false,
            write_behind_bytes: 32 << 20,
            shared_channels: 4,
            read_ahead_bytes: 1 << 20,
            discard: false,
        }
    }
}

/// How a file is opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Make the file if there is none.
    pub create: bool,
    /// Cut it to length 0.
    pub truncate: bool,
    /// Make the file; an error if there is one.
    pub exclusive: bool,
    /// Make a new file; one of that name is replaced, in one step, and lives on for those who
    /// have it open.
    pub fresh: bool,
    /// One of the few small files without which an application cannot open its data: on a full file system
    /// it, and its first MiB, may come from what is kept back for that.
    pub essential: bool,
}

impl OpenOptions {
    /// An existing file.
    pub const READ: OpenOptions = OpenOptions {
        create: false,
        truncate: false,
        exclusive: false,
        fresh: false,
        essential: false,
    };
    /// An existing file, or a new one.
    pub const CREATE: OpenOptions = OpenOptions {
        create: true,
        ..OpenOptions::READ
    };
    /// A new file in place of whatever has the name.
    pub const FRESH: OpenOptions = OpenOptions {
        create: true,
        fresh: true,
        ..OpenOptions::READ
    };
}

/// What a handle is going to be used for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Access {
    /// Read-ahead when reads turn out to be sequential.
    #[default]
    Normal,
    /// No read-ahead.
    Random,
    /// Read-ahead from the first read on.
    Sequential,
    /// As `Normal`; what is read should stay in memory.
    WillNeed,
    /// The contents need not stay in memory: drops clean cached pages.
    DontNeed,
    /// For a writer: what is appended is not read soon (a write-ahead log), so its buffers are used
    /// again as soon as they are on the device instead of becoming cache.
    NoReuse,
}
