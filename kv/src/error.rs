//! Errors above the file system.

use pumice_bdev::{BdevError, IoErrorKind};
use pumice_blobfs::fs::FsError;
use pumice_rocksdb_fs::{CLOSED, MountError, text};

/// An error of mounting, opening or using a database.
///
/// [`Error::kind`] returns the kind of failure. The text names what failed. The causes are its
/// [sources](std::error::Error::source), and [`chain`](crate::chain) writes all of them in one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device could not be opened or examined.
    #[error("{}", text::not_opened(uri))]
    Device {
        /// The URI as it was given.
        uri: String,
        /// The reason.
        source: BdevError,
    },
    /// A socket or an address could not be listened on.
    #[error("{address} could not be listened on")]
    Listen {
        /// The path of the socket, or the address.
        address: String,
        /// The reason.
        source: BdevError,
    },
    /// The device has no file system, and is not empty either.
    #[error("{}", text::not_empty(device, found))]
    NotEmpty {
        /// Name of the device.
        device: String,
        /// The content of the device.
        found: String,
    },
    /// RocksDB's environment over the file system could not be made.
    #[error("the environment could not be made: {0}")]
    Environment(String),
    /// An error of the file system.
    #[error(transparent)]
    FileSystem(#[from] FsError),
    /// An error of RocksDB, with the file system's cause in its text.
    #[error(transparent)]
    RocksDb(#[from] rocksdb::Error),
    /// A `blobfs://` URI could not be opened.
    #[error("{uri}: {reason}")]
    Uri {
        /// The URI as it was given.
        uri: String,
        /// RocksDB's text, or the error in the URI.
        reason: String,
    },
    /// A directory cannot be used as requested.
    #[error("{path}: {reason}")]
    Directory {
        /// Path of the directory in the file system.
        path: String,
        /// The reason, and what to do.
        reason: String,
    },
    /// A path of the kernel's file system could not be written.
    #[error("{path} could not be written")]
    Outside {
        /// The path.
        path: String,
        /// The kernel's error.
        source: std::io::Error,
    },
    /// The database could not be opened for lack of space.
    #[error(
        "the database could not be opened because the file system is full: `DbOptions::read_only` \
         still reads it, `pumice rm` deletes files that are not the database's, `pumice grow` makes \
         it larger"
    )]
    Full {
        /// RocksDB's error.
        source: rocksdb::Error,
    },
    /// RocksDB's options cannot be used as they were given.
    #[error("the options cannot be used: {reason}")]
    Options {
        /// RocksDB's text, or the reason, with the name of the option.
        reason: String,
    },
    /// RocksDB or the `rocksdb` crate does not offer it.
    #[error("not supported: {what}")]
    Unsupported {
        /// The call that was refused, and what to do.
        what: String,
    },
    /// The database is being closed, or is closed.
    #[error("{path}: the database is closed, or is being closed")]
    Closed {
        /// Path of the database's directory.
        path: String,
    },
    /// No thread could be started for operations of futures.
    #[error("no thread could be started for operations of futures")]
    Threads {
        /// The system's error.
        source: std::io::Error,
    },
    /// Closing made everything durable that a log has, but RocksDB could not write puts with
    /// `disable_wal` to a table. The database is still open.
    #[error(
        "{path}: what was put without a log (`disable_wal`) could not be written to a table; the \
         rest is durable; the database is still open, so read what is in memory alone, or `close` \
         again when there is room; dropping the database loses it"
    )]
    Unlogged {
        /// Path of the database's directory.
        path: String,
        /// RocksDB's error.
        source: rocksdb::Error,
    },
}

/// The kinds of failures, what each stops, and how to go on.
///
/// | kind | what it stops | how to go on |
/// | --- | --- | --- |
/// | [`NotFound`](ErrorKind::NotFound) | this call | name a file, device or database that is there, or let it be made |
/// | [`AlreadyExists`](ErrorKind::AlreadyExists) | this call | choose another name |
/// | [`InvalidInput`](ErrorKind::InvalidInput) | this call | change the argument that the text names |
/// | [`InUse`](ErrorKind::InUse) | opening | end the process or drop the database that has it, and try again |
/// | [`NoSpace`](ErrorKind::NoSpace) | writes; reads go on | delete files or `pumice grow`; RocksDB then resumes by itself, or `put` again |
/// | [`ReadOnly`](ErrorKind::ReadOnly) | writes; reads go on | mount for writing |
/// | [`PermissionDenied`](ErrorKind::PermissionDenied) | opening | run as a user who may open the device, or open it for reading only |
/// | [`Corrupt`](ErrorKind::Corrupt) | what is damaged, and mounting for writing | mount read-only and copy what can be read, `pumice fsck --repair`, `pumice rescue` |
/// | [`Foreign`](ErrorKind::Foreign) | formatting | choose another device, or `pumice mkfs --force` |
/// | [`DeviceGone`](ErrorKind::DeviceGone) | everything on the device | attach it again, drop the database, and open it again |
/// | [`Device`](ErrorKind::Device) | this call; a failed sync stays failed | the text names the device and the place; `close` may be called again when the fault has passed |
/// | [`TryAgain`](ErrorKind::TryAgain) | this call | call again |
/// | [`Conflict`](ErrorKind::Conflict) | this transaction | roll it back, or drop it, and begin it again |
/// | [`OutOfMemory`](ErrorKind::OutOfMemory) | this call | free memory, or give the page cache less |
/// | [`Unsupported`](ErrorKind::Unsupported) | this call | do without the option that the text names |
/// | [`Closed`](ErrorKind::Closed) | every call with this handle | open the database or mount the file system again |
/// | [`Other`](ErrorKind::Other) | this call | read the text |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// There is no such file, directory, device or database.
    NotFound,
    /// There is one of that name already.
    AlreadyExists,
    /// An argument, a path, a URI or an option is invalid.
    InvalidInput,
    /// Another process or another handle has it.
    InUse,
    /// There is no space.
    NoSpace,
    /// It was opened for reading only.
    ReadOnly,
    /// The operating system does not permit it.
    PermissionDenied,
    /// The content of the device is inconsistent or does not match a checksum.
    Corrupt,
    /// The device has content that is not a file system of Pumice.
    Foreign,
    /// The device was removed.
    DeviceGone,
    /// The device failed.
    Device,
    /// The call failed temporarily.
    TryAgain,
    /// Another transaction has locked or changed a key of this one, or this one has expired.
    Conflict,
    /// There is no memory for it.
    OutOfMemory,
    /// It is not supported.
    Unsupported,
    /// The file system was unmounted, the database was closed, or they belong to another process.
    Closed,
    /// Another error.
    Other,
}

impl From<MountError> for Error {
    fn from(e: MountError) -> Error {
        match e {
            MountError::Device { uri, source } => Error::Device { uri, source },
            MountError::NotEmpty { device, found } => Error::NotEmpty { device, found },
            MountError::FileSystem(e) => Error::FileSystem(e),
            MountError::Uri { uri, reason } => Error::Uri { uri, reason },
        }
    }
}

impl Error {
    /// Returns the kind of the failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Device { source, .. } | Error::Listen { source, .. } => of_errno(source.errno()),
            Error::NotEmpty { .. } => ErrorKind::Foreign,
            Error::Environment(_) => ErrorKind::OutOfMemory,
            Error::FileSystem(e) => of_fs(e),
            Error::RocksDb(source) | Error::Unlogged { source, .. } => of_rocksdb(source),
            Error::Uri { .. } | Error::Directory { .. } => ErrorKind::InvalidInput,
            Error::Outside { source, .. } => of_errno(source.raw_os_error().unwrap_or(libc::EIO)),
            Error::Full { .. } => ErrorKind::NoSpace,
            Error::Options { .. } => ErrorKind::InvalidInput,
            Error::Unsupported { .. } => ErrorKind::Unsupported,
            Error::Closed { .. } => ErrorKind::Closed,
            Error::Threads { .. } => ErrorKind::TryAgain,
        }
    }
}

fn of_fs(e: &FsError) -> ErrorKind {
    match e {
        FsError::Foreign { .. } => ErrorKind::Foreign,
        FsError::Io { source, .. } if source.kind == IoErrorKind::Removed => ErrorKind::DeviceGone,
        e => match of_errno(e.errno()) {
            ErrorKind::Device if e.is_retryable() => ErrorKind::TryAgain,
            kind => kind,
        },
    }
}

fn of_errno(errno: i32) -> ErrorKind {
    match errno {
        libc::ENOENT => ErrorKind::NotFound,
        libc::EEXIST => ErrorKind::AlreadyExists,
        libc::EINVAL | libc::ENAMETOOLONG | libc::ENOTDIR | libc::EISDIR | libc::ENOTEMPTY => {
            ErrorKind::InvalidInput
        }
        libc::EBUSY | libc::EAGAIN => ErrorKind::InUse,
        libc::ENOSPC | libc::EDQUOT => ErrorKind::NoSpace,
        libc::EROFS => ErrorKind::ReadOnly,
        libc::EACCES | libc::EPERM => ErrorKind::PermissionDenied,
        libc::EUCLEAN => ErrorKind::Corrupt,
        libc::ENODEV | libc::ENXIO => ErrorKind::DeviceGone,
        libc::EIO | libc::ETIMEDOUT | libc::EILSEQ | libc::ENODATA => ErrorKind::Device,
        libc::ENOMEM => ErrorKind::OutOfMemory,
        libc::EOPNOTSUPP | libc::ENOSYS | libc::EMLINK => ErrorKind::Unsupported,
        libc::EBADF => ErrorKind::Closed,
        _ => ErrorKind::Other,
    }
}

/// Returns the kind of RocksDB's error, which is a code and a text; the code of every I/O error is
/// the same.
fn of_rocksdb(e: &rocksdb::Error) -> ErrorKind {
    use rocksdb::ErrorKind as Rocks;
    match e.kind() {
        Rocks::NotFound | Rocks::ColumnFamilyDropped => ErrorKind::NotFound,
        Rocks::Corruption => ErrorKind::Corrupt,
        Rocks::NotSupported => ErrorKind::Unsupported,
        Rocks::InvalidArgument if e.as_ref().contains("(create_if_missing is false)") => {
            ErrorKind::NotFound
        }
        Rocks::InvalidArgument if e.as_ref().contains("(error_if_exists is true)") => {
            ErrorKind::AlreadyExists
        }
        Rocks::InvalidArgument => ErrorKind::InvalidInput,
        Rocks::IOError => of_io_text(e.as_ref()),
        Rocks::ShutdownInProgress => ErrorKind::Closed,
        Rocks::Busy | Rocks::TimedOut | Rocks::Expired => ErrorKind::Conflict,
        Rocks::TryAgain | Rocks::Aborted => ErrorKind::TryAgain,
        _ => ErrorKind::Other,
    }
}

/// Returns the kind of an I/O error of RocksDB by its text: the file system's, or the one that RocksDB has for a subcode.
fn of_io_text(text: &str) -> ErrorKind {
    let kinds = [
        (NO_SPACE, ErrorKind::NoSpace),
        (CLOSED, ErrorKind::Closed),
        ("file system has been unmounted", ErrorKind::Closed),
        ("mounted by the parent of this process", ErrorKind::Closed),
        ("device removed", ErrorKind::DeviceGone),
        (
            "is locked by another database of this process",
            ErrorKind::InUse,
        ),
        ("mounted read-only", ErrorKind::ReadOnly),
        ("device is read-only", ErrorKind::ReadOnly),
        ("no memory for buffers", ErrorKind::OutOfMemory),
        ("Memory limit reached", ErrorKind::OutOfMemory),
        ("No such file or directory", ErrorKind::NotFound),
        ("exists already", ErrorKind::AlreadyExists),
        ("not a directory", ErrorKind::InvalidInput),
        ("is a directory", ErrorKind::InvalidInput),
        ("directory not empty", ErrorKind::InvalidInput),
        ("with its directories", ErrorKind::InvalidInput),
    ];
    let found = kinds.iter().find(|(part, _)| text.contains(part));
    found.map_or(ErrorKind::Device, |(_, kind)| *kind)
}

/// RocksDB's text for the subcode of a full device.
const NO_SPACE: &str = "No space left";

/// Whether RocksDB ran out of space.
pub(crate) fn is_no_space(e: &rocksdb::Error) -> bool {
    e.kind() == rocksdb::ErrorKind::IOError && e.as_ref().contains(NO_SPACE)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pumice_bdev::{DmaBuf, IoError, Op};

    use super::*;
    use crate::{Db, DbOptions, MountOptions, mount, mount_device};

    #[test]
    fn every_kind_of_failure_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| format!("file://{}", dir.path().join(name).display());
        let kind = |uri: &str| Db::open(uri).err().unwrap().kind();
        assert_eq!(kind(&at("missing.img")), ErrorKind::NotFound);
        assert_eq!(kind("floppy://a"), ErrorKind::InvalidInput);
        let mut bytes = vec![0_u8; 16 << 20];
        bytes[..4].copy_from_slice(b"XFSB");
        std::fs::write(dir.path().join("xfs.img"), &bytes).unwrap();
        assert_eq!(kind(&at("xfs.img")), ErrorKind::Foreign);

        let image = at("kv.img");
        let fs = mount(&format!("{image}?size=64M&create=1"), &MountOptions::new()).unwrap();
        assert_eq!(kind(&image), ErrorKind::InUse);
        let missing = Error::from(fs.unlink("/missing").unwrap_err());
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        fs.mkdir("/dir").unwrap();
        let taken = Error::from(fs.mkdir("/dir").unwrap_err());
        assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
        let bad = DbOptions::new().path("/a\0b").open_in(&fs).err().unwrap();
        assert_eq!(bad.kind(), ErrorKind::InvalidInput);
        let db = DbOptions::new().path("/db").open_in(&fs).unwrap();
        let twice = DbOptions::new().path("/db").open_in(&fs).err().unwrap();
        assert_eq!(twice.kind(), ErrorKind::InUse, "{twice}");
        db.close().unwrap();
        let closed = Error::from(db.put("a", "b").unwrap_err());
        assert_eq!(closed.kind(), ErrorKind::Closed, "{closed}");
        drop(db);
        fs.unmount().unwrap();
        let unmounted = Error::from(fs.mkdir("/x").unwrap_err());
        assert_eq!(unmounted.kind(), ErrorKind::Closed);
        let reading = DbOptions::new().path("/db").read_only(true);
        let db = reading.open(&image).unwrap();
        let refused = Error::from(db.put("a", "b").unwrap_err());
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
        let refused = Error::from(db.file_system().mkdir("/x").unwrap_err());
        assert_eq!(refused.kind(), ErrorKind::ReadOnly);
    }

    /// A failure of the file system has the same kind when RocksDB has passed it on.
    #[test]
    fn what_rocksdb_passes_on_keeps_its_kind() {
        let path = || "/f".to_owned();
        let device = path;
        let memory = DmaBuf::new(usize::MAX).unwrap_err();
        for error in [
            FsError::Exists { path: path() },
            FsError::NotDir { path: path() },
            FsError::IsDir { path: path() },
            FsError::NotEmpty { path: path() },
            FsError::NameTooLong {
                path: path(),
                len: 400,
                max: 200,
            },
            FsError::Locked { path: path() },
            FsError::ReadOnly { path: path() },
            FsError::Forked { device: device() },
            FsError::Unmounted { path: path() },
            FsError::NoMemory(Arc::new(memory)),
            failed_write(IoErrorKind::ReadOnly),
            failed_write(IoErrorKind::Removed),
            failed_write(IoErrorKind::Media),
        ] {
            let text = format!("IO error: doing something: {error}");
            assert_eq!(of_io_text(&text), of_fs(&error), "{text}");
        }
    }

    fn failed_write(kind: IoErrorKind) -> FsError {
        let write = Op::Flush;
        FsError::Io {
            context: "/f".to_owned(),
            source: Arc::from(IoError::new("disk", 4096, &write, kind, "")),
            data_loss: false,
        }
    }

    #[test]
    fn a_database_that_is_missing_or_there_is_told_apart() {
        let fs = mount("malloc://64M", &MountOptions::new()).unwrap();
        let db = DbOptions::new().path("/db").open_in(&fs).unwrap();
        let missing = Error::from(db.ingest_external_file(vec!["/none"]).unwrap_err());
        assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing}");
        db.close().unwrap();
        let kind = |options: DbOptions| options.open_in(&fs).err().unwrap().kind();
        let none = DbOptions::new().path("/none");
        assert_eq!(kind(none.clone().read_only(true)), ErrorKind::NotFound);
        let not_made = none.configure(|options| options.create_if_missing(false));
        assert_eq!(kind(not_made), ErrorKind::NotFound);
        let new = DbOptions::new().configure(|options| options.set_error_if_exists(true));
        assert_eq!(kind(new.path("/db")), ErrorKind::AlreadyExists);
    }

    #[test]
    fn a_database_on_what_cannot_be_written_says_so() {
        let device = pumice_bdev::open("malloc://64M").unwrap();
        let fs = mount_device(&device, &MountOptions::new()).unwrap();
        let db = DbOptions::new().path("/db").open_in(&fs).unwrap();
        fs.unmount().unwrap();
        let unmounted = Error::from(db.put("a", "b").unwrap_err());
        assert_eq!(unmounted.kind(), ErrorKind::Closed, "{unmounted}");
        drop((db, fs));
        let fs = mount_device(&device, &MountOptions::new().read_only(true)).unwrap();
        for path in ["/db", "/new"] {
            let refused = DbOptions::new().path(path).open_in(&fs).err().unwrap();
            assert_eq!(refused.kind(), ErrorKind::ReadOnly, "{refused}");
        }
    }
}
