//! The end of an environment's use before its last handle is dropped.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use pumice_blobfs::fs::FileLock;

use super::fault::{Fault, Result};

/// State that an environment and the files opened through it share. While it is open, calls work.
/// Once it is closed they fail, and the locks taken through it are free.
#[derive(Debug, Default)]
pub struct Binding {
    closed: AtomicBool,
    locks: Mutex<Locks>,
}

#[derive(Debug, Default)]
struct Locks {
    next: usize,
    held: HashMap<usize, FileLock>,
}

impl Binding {
    /// Checks that calls work.
    ///
    /// # Errors
    /// Fails when it was closed.
    #[inline]
    pub(crate) fn check(&self) -> Result<()> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(closed());
        }
        Ok(())
    }

    /// Ends the use: later calls fail, and the locks are free on return.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let held = std::mem::take(&mut self.locks().held);
        drop(held);
    }

    /// Keeps a lock until [`Binding::unlock`] or [`Binding::close`].
    pub(crate) fn hold(&self, lock: FileLock) -> Result<usize> {
        let mut locks = self.locks();
        // The mutex is held, so that a concurrent close does not leave a lock behind.
        self.check()?;
        locks.next += 1;
        let id = locks.next;
        locks.held.insert(id, lock);
        Ok(id)
    }

    /// Frees a lock, unless closing did.
    pub(crate) fn unlock(&self, id: usize) {
        let lock = self.locks().held.remove(&id);
        drop(lock);
    }

    fn locks(&self) -> std::sync::MutexGuard<'_, Locks> {
        self.locks
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cold]
fn closed() -> Fault {
    Fault::new(libc::EBADF, crate::CLOSED)
}
