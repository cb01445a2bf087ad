//! Failures as they cross into RocksDB.

use std::any::Any;
use std::fmt;

/// A failure of a plugin file system: an errno, what RocksDB wants to know beyond it, and a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Positive errno; RocksDB's status follows from it (`kv/shim/status.cc`).
    pub errno: i32,
    /// The same call may succeed later: RocksDB resumes by itself.
    pub retryable: bool,
    /// Bytes that were durable are gone or damaged.
    pub data_loss: bool,
    /// For people: device, offset, cause.
    pub text: String,
}

impl Fault {
    /// A failure that is final and loses nothing.
    pub fn new(errno: i32, text: impl Into<String>) -> Fault {
        Fault {
            errno,
            retryable: false,
            data_loss: false,
            text: text.into(),
        }
    }

    /// No such file or directory.
    #[must_use]
    pub fn not_found(path: &str) -> Fault {
        Fault::new(libc::ENOENT, format!("no such file or directory: {path}"))
    }

    /// No space; RocksDB may retry when some was freed.
    pub fn no_space(text: impl Into<String>) -> Fault {
        Fault {
            retryable: true,
            ..Fault::new(libc::ENOSPC, text)
        }
    }

    /// A panic below the plugin, as an error instead of an abort.
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

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Fault {}
