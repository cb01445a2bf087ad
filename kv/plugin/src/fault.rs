//! Failures in the form in which they cross into RocksDB.

use std::any::Any;

use pumice_blobfs::fs::FsError;

use crate::{MountError, chain};

/// The result of everything that can fail here.
pub(crate) type Result<T> = std::result::Result<T, Fault>;

/// A failure: an errno, the bits by which RocksDB decides what to do, and a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The positive errno, from which RocksDB's status follows (`shim/status.cc`).
    pub errno: i32,
    /// Whether the same call may succeed later, so that RocksDB resumes by itself.
    pub retryable: bool,
    /// Whether durable bytes are lost or damaged.
    pub data_loss: bool,
    /// The text: device, offset, cause.
    pub text: String,
}

impl Fault {
    /// Makes a failure that is final and loses nothing.
    #[must_use]
    pub fn new(errno: i32, text: impl Into<String>) -> Fault {
        Fault {
            errno,
            retryable: false,
            data_loss: false,
            text: text.into(),
        }
    }

    /// Makes an error of a panic below the plugin, which would otherwise abort.
    #[must_use]
    pub fn from_panic(payload: &(dyn Any + Send)) -> Fault {
        let text = payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no message");
        Fault::new(
            libc::EIO,
            format!("a bug: the file system panicked: {text}"),
        )
    }
}

impl From<MountError> for Fault {
    fn from(e: MountError) -> Fault {
        match e {
            MountError::FileSystem(e) => Fault::from(e),
            MountError::Device { ref source, .. } => Fault::new(source.errno(), chain(&e)),
            MountError::NotEmpty { .. } | MountError::Uri { .. } => {
                Fault::new(libc::EINVAL, chain(&e))
            }
        }
    }
}

impl From<FsError> for Fault {
    fn from(e: FsError) -> Fault {
        Fault {
            errno: e.errno(),
            retryable: e.is_retryable(),
            data_loss: e.is_data_loss(),
            text: chain(&e),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pumice_bdev::{DmaBuf, IoError, IoErrorKind, Op};

    use super::*;

    /// A program tells a missing image from one that another process has.
    #[test]
    fn errors_of_opening_keep_their_errno() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("kv.img");
        let errno = |query: &str| {
            let uri = format!("blobfs://{}{query}", image.display());
            let options = crate::MountOptions::new();
            Fault::from(crate::mount_uri_with(&uri, options).unwrap_err()).errno
        };
        assert_eq!(errno(""), libc::ENOENT);
        assert_eq!(errno("?cache:lots"), libc::EINVAL);
        std::fs::write(&image, vec![b'x'; 1 << 20]).unwrap();
        assert_eq!(errno(""), libc::EINVAL);
    }

    /// The errno and the retry bit, by which RocksDB decides, are kept.
    #[test]
    fn faults_keep_what_rocksdb_decides_by() {
        let fs = crate::mount("malloc://16M", &crate::MountOptions::new()).unwrap();
        let file = fs
            .open("/f", pumice_blobfs::fs::OpenOptions::CREATE)
            .unwrap();
        let full = Fault::from(file.allocate(0, 1 << 30).unwrap_err());
        assert_eq!((full.errno, full.retryable), (libc::ENOSPC, true));
        let missing = Fault::from(fs.unlink("/missing").unwrap_err());
        assert_eq!((missing.errno, missing.retryable), (libc::ENOENT, false));
        let block = Op::Read {
            lba: 99,
            buf: DmaBuf::new(4096).unwrap(),
        };
        let media = Fault::from(FsError::Io {
            context: "/f".to_owned(),
            source: Arc::from(IoError::new("disk", 4096, &block, IoErrorKind::Media, "")),
            data_loss: true,
        });
        assert_eq!(
            (media.errno, media.retryable, media.data_loss),
            (libc::EIO, false, true)
        );
        assert!(media.text.contains("LBA 99"), "{}", media.text);
    }
}
