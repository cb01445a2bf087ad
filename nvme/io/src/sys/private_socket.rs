//! Sockets that only their owner can connect to, from the first moment on.

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Binds in a directory that nobody else can enter, sets the permissions and moves the socket to
/// `path`.
///
/// # Errors
/// Returns the system call's error.
pub fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let parent = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let dir = private_dir(parent)?;
    let inside = dir.join("s");
    let bound = UnixListener::bind(&inside).and_then(|listener| {
        std::fs::set_permissions(&inside, std::fs::Permissions::from_mode(0o600))?;
        // Unlike a rename, a link does not replace a file that another process created in the
        // meantime.
        std::fs::hard_link(&inside, path)?;
        Ok(listener)
    });
    let _ = std::fs::remove_file(&inside);
    let _ = std::fs::remove_dir(&dir);
    bound
}

/// Makes a directory of our own in `parent`, whatever earlier processes and other threads have left
/// there.
fn private_dir(parent: &Path) -> io::Result<PathBuf> {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    const TRIES: usize = 64;
    let mut builder = std::fs::DirBuilder::new();
    builder.mode(0o700);
    for _ in 0..TRIES {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        // The name is short because a socket's path has at most 107 bytes.
        let dir = parent.join(format!(".{}.{n}", std::process::id()));
        match builder.create(&dir) {
            Ok(()) => return Ok(dir),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The socket has its permissions only after it was bound; until then its directory keeps others
    /// out.
    #[test]
    fn nobody_else_enters_the_directory_of_a_new_socket() {
        let parent = tempfile::tempdir().unwrap();
        let dir = private_dir(parent.path()).unwrap();
        let mode = std::fs::metadata(&dir).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{mode:o}");
        let path = parent.path().join("socket");
        let listener = bind_private(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{mode:o}");
        drop(listener);
    }
}
