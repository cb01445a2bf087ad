//! Creation of an image file, completely or not at all.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use pumice_io::sys::file as sys;

use super::lock::lock;
use super::open::{FileOptions, Found, Prealloc, direct_io};
use super::{SharedFile, probe};
use crate::error::BdevError;
use crate::malloc::check_geometry;

/// Creates the image file of `size` bytes that `options` describe. The file gets its name when it
/// is complete and durable, so that neither an error nor the end of the process leaves a part of
/// one. Returns `None` when another file has got the name meanwhile.
pub(super) fn make(options: &FileOptions, size: u64) -> Result<Option<SharedFile>, BdevError> {
    let path = &options.path;
    let shown = path.display().to_string();
    let block_size = options.block_size.unwrap_or(512);
    if size == 0 || !size.is_multiple_of(u64::from(block_size.max(1))) {
        return Err(BdevError::InvalidOption {
            name: format!("{shown}: size"),
            reason: format!("{size} is not a multiple of {block_size}"),
        });
    }
    check_geometry(&shown, block_size, size / u64::from(block_size))?;
    if let Ok(meta) = path.symlink_metadata() {
        if !meta.is_symlink() {
            return Ok(None);
        }
        return Err(BdevError::Unsafe {
            device: shown,
            reason: "is a symbolic link to nothing; give the path of the file itself".to_owned(),
        });
    }
    let os = |what: String, e: io::Error| BdevError::os(&shown, what, e);
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let Some((draft, direct)) =
        Draft::new(parent, path, options.buffered).map_err(|e| os(cannot_make(parent, &e), e))?
    else {
        return Ok(None);
    };
    let file = draft.file();
    lock(file, &shown, true)?;
    file.set_len(size)
        .map_err(|e| os(format!("make it {size} bytes long"), e))?;
    // Direct I/O here may need larger pieces than the last one, so that is settled first.
    let (direct, mem_align) = direct_io(file, 512, direct, block_size, &shown)?;
    if options.prealloc != Prealloc::Off {
        sys::fallocate(file, 0, 0, size).map_err(|e| os(format!("reserve {size} bytes"), e))?;
    }
    if options.prealloc == Prealloc::Full {
        write_zeroes(file, size).map_err(|e| os(format!("write {size} bytes of zeroes"), e))?;
    }
    sys::sync_all(file).map_err(|e| os("sync".to_owned(), e))?;
    let meta = file.metadata().map_err(|e| os("stat".to_owned(), e))?;
    let backing = probe::backing(file, &meta).map_err(|e| os("size".to_owned(), e))?;
    let Some(draft) = draft
        .publish(path)
        .map_err(|e| os("name the new file".to_owned(), e))?
    else {
        return Ok(None);
    };
    File::open(parent)
        .and_then(|dir| sys::sync_all(&dir))
        .map_err(|e| os("sync the directory".to_owned(), e))?;
    let found = Found {
        file: draft.keep(),
        meta,
        backing,
        block_size,
        len: size,
        direct,
        mem_align,
        made: true,
    };
    Ok(Some(found.into_shared(options)))
}

/// Describes why a file could not be made, and what to do.
fn cannot_make(parent: &Path, error: &io::Error) -> String {
    let parent = parent.display();
    match error.raw_os_error() {
        Some(libc::ENOENT) => format!("make the file (make its directory {parent} first)"),
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => {
            format!(
                "make the file (choose a directory other than {parent} that this user may write in)"
            )
        }
        _ => "make the file".to_owned(),
    }
}

/// A file that is not complete. Dropping it removes the file.
struct Draft {
    /// The open file, or `None` once it is complete.
    file: Option<File>,
    /// A name that the file has.
    named: Option<PathBuf>,
}

impl Draft {
    fn of(file: File, named: Option<PathBuf>) -> Draft {
        Draft {
            file: Some(file),
            named,
        }
    }

    fn file(&self) -> &File {
        self.file
            .as_ref()
            .expect("only `keep` takes it, with the draft")
    }

    /// Creates a file in `parent`, without a name where the file system supports that, otherwise
    /// with its own. Also returns whether its I/O is direct. Returns `None` when there is a file of
    /// that name.
    fn new(parent: &Path, path: &Path, buffered: bool) -> io::Result<Option<(Draft, bool)>> {
        let mut how = OpenOptions::new();
        how.read(true).write(true).mode(0o600);
        match open_direct(&how, parent, libc::O_TMPFILE, buffered) {
            Ok((file, direct)) if sys::can_be_named(&file) => {
                return Ok(Some((Draft::of(file, None), direct)));
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSPC | libc::EACCES)) => {
                return Err(e);
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        how.create_new(true);
        match open_direct(&how, path, 0, buffered) {
            Ok((file, direct)) => Ok(Some((Draft::of(file, Some(path.to_owned())), direct))),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Gives the file its name. Returns `None` when another file has the name.
    fn publish(mut self, path: &Path) -> io::Result<Option<Draft>> {
        if self.named.is_none() {
            match sys::link(self.file(), path) {
                Ok(()) => self.named = Some(path.to_owned()),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
                Err(e) => return Err(e),
            }
        }
        Ok(Some(self))
    }

    /// Keeps the file.
    fn keep(mut self) -> File {
        self.file.take().expect("nobody else takes it")
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let (Some(file), Some(path)) = (&self.file, &self.named) {
            remove(file, path);
        }
    }
}

/// Removes the name `path` of the open file, if it is still a name of that file.
pub(super) fn remove(file: &File, path: &Path) {
    let inode = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
    let (ours, there) = (file.metadata(), path.symlink_metadata());
    if let (Ok(ours), Ok(there)) = (ours, there)
        && inode(ours) == inode(there)
        && let Err(error) = std::fs::remove_file(path)
    {
        tracing::warn!(path = %path.display(), %error, "removing an image that was not completed");
    }
}

/// Opens with `O_DIRECT` if the file system supports it and `buffered` is not set.
fn open_direct(
    how: &OpenOptions,
    path: &Path,
    flags: i32,
    buffered: bool,
) -> io::Result<(File, bool)> {
    let open = |direct: i32| {
        let mut how = how.clone();
        how.custom_flags(flags | direct | libc::O_CLOEXEC)
            .open(path)
    };
    if !buffered {
        match open(libc::O_DIRECT) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            other => return other.map(|file| (file, true)),
        }
    }
    open(0).map(|file| (file, false))
}

fn write_zeroes(file: &File, len: u64) -> io::Result<()> {
    let zeroes = crate::DmaBuf::zeroed(1 << 20).map_err(io::Error::other)?;
    let mut at = 0;
    while at < len {
        let n = usize::try_from(len - at)
            .unwrap_or(usize::MAX)
            .min(zeroes.len());
        file.write_all_at(&zeroes[..n], at)?;
        at += n as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The second of two processes that make one image opens what the first has made.
    #[test]
    fn a_file_that_has_come_meanwhile_is_no_link_to_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let options = FileOptions::new(dir.path().join("image"));
        std::fs::write(&options.path, "another's").unwrap();
        assert!(make(&options, 4096).unwrap().is_none());
        assert_eq!(std::fs::read(&options.path).unwrap(), b"another's");
        std::fs::remove_file(&options.path).unwrap();
        std::os::unix::fs::symlink("nothing", &options.path).unwrap();
        let refused = make(&options, 4096).map(|_| ()).unwrap_err();
        assert!(refused.to_string().contains("symbolic link"), "{refused}");
    }
}
