//! The states of a database's close, and where its last puts may be.

use pumice_blobfs::fs::{FileSystem, FsError, OpenOptions};

/// The states that a database passes while it is closed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Closing {
    /// It is open.
    Open,
    /// Everything is in logs and tables, and RocksDB has stopped writing tables. The device has not
    /// been released.
    Stopped,
    /// The file system has written everything, and refuses puts. It could not be unmounted.
    Unmounting,
    /// It is closed.
    Closed,
}

/// Whether puts may be in a buffer of RocksDB's instead of the log's file (`manual_wal_flush`).
/// `root` is the database's directory. The options are RocksDB's own and cannot be read, but it
/// writes them to a file.
pub(crate) fn buffers_its_log(fs: &FileSystem, root: &str) -> bool {
    let read = || -> Result<String, FsError> {
        let files = fs.list(root)?;
        let names = files.into_iter().map(|file| file.name);
        let newest = names.filter(|name| name.starts_with("OPTIONS-")).max();
        let path = format!("{root}/{}", newest.unwrap_or_default());
        let file = fs.open(&path, OpenOptions::READ)?;
        let mut bytes = vec![0; usize::try_from(file.len()).unwrap_or(0)];
        file.read_at(0, &mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    !read().is_ok_and(|text| text.contains("manual_wal_flush=false"))
}
