//! The lock of an open file, which says that it is in use as a device.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use pumice_io::sys::file as sys;

use super::probe;
use crate::error::BdevError;

/// Longest wait for a living owner's lock: udev holds a lock for a moment when a device changes.
pub(super) const BUSY_PATIENCE: Duration = Duration::from_millis(300);
/// Longest wait for a lock that nobody is seen to have: it may have been freed since it was refused.
const UNKNOWN_PATIENCE: Duration = Duration::from_secs(2);
/// Longest wait for the writes of a killed process.
pub(super) const GONE_PATIENCE: Duration = Duration::from_secs(10);

/// Locks the open file that will do the I/O.
pub(super) fn lock(file: &File, shown: &str, exclusive: bool) -> Result<(), BdevError> {
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
        if start.elapsed() > patience(owner, gone) {
            let pid = owner.filter(|p| *p != 0);
            return Err(BdevError::InUse {
                device: shown.to_owned(),
                pid,
            });
        }
        thread::sleep(Duration::from_millis(if gone { 20 } else { 5 }));
    }
}

/// Returns the longest wait for a lock that `owner` has, who may be gone.
fn patience(owner: Option<u32>, gone: bool) -> Duration {
    match owner {
        Some(_) if gone => GONE_PATIENCE,
        Some(_) => BUSY_PATIENCE,
        None => UNKNOWN_PATIENCE,
    }
}

/// Takes the lock that an image in use has, so that a file can be overwritten: not while anybody has it open as a device, and
/// nobody opens it meanwhile. The lock is held until `file` is closed. Where a file cannot be locked, none can be opened as a
/// device, and there is no lock.
///
/// # Errors
/// Fails with [`io::ErrorKind::ResourceBusy`] if the file is in use.
pub fn lock_unused(file: &File) -> io::Result<()> {
    match sys::try_flock(file, true) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            "it is in use as a device; choose another file, or end that first",
        )),
        _ => Ok(()),
    }
}

/// Whether the open file is still the one of that name. Its last owner may have removed it while
/// its lock was awaited, and what is written to a file without a name is lost.
pub(super) fn is_still(meta: &Metadata, path: &Path) -> bool {
    let there = path.metadata();
    there.is_ok_and(|there| (there.dev(), there.ino()) == (meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_writes_of_a_killed_process_are_awaited() {
        let me = std::process::id();
        assert_eq!(patience(Some(me), probe::is_gone(me)), BUSY_PATIENCE);
        assert_eq!(patience(Some(0), probe::is_gone(0)), GONE_PATIENCE);
        assert_eq!(patience(None, false), UNKNOWN_PATIENCE);
    }
}
