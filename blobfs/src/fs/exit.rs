//! The end of a process, and its forks.
//!
//! Appended bytes that were not synced are in this process's memory. A process that ends in order
//! (`exit`, `main` returns) does not drop what is in a `static` or was forgotten, so a handler
//! unmounts every file system that is still mounted then. It works in a thread of its own, since
//! the exiting thread has lost its thread-local channels.
//!
//! A forked child has copies of the parent's mounts, whose buffers and rings belong to the parent.
//! The child ignores them: every call returns [`FsError::Forked`], and nothing is unmounted. The
//! child's own mounts work.
#![allow(unsafe_code)]

use std::io::Write as _;
use std::sync::{Arc, Once, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use parking_lot::{Condvar, Mutex};

use super::core::Core;

/// Longest wait at the end of the process for another thread that is dropping a mount.
const DROPPING: Duration = Duration::from_secs(60);

/// Notified when a mount has ended, by an unmount or a drop.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    ended: Mutex<bool>,
    changed: Condvar,
}

impl Ended {
    pub fn set(&self) {
        *self.ended.lock() = true;
        self.changed.notify_all();
    }

    fn wait(&self, at_most: Duration) -> bool {
        let mut ended = self.ended.lock();
        self.changed
            .wait_while_for(&mut ended, |ended| !*ended, at_most);
        *ended
    }
}

/// A weak reference to a mount in the registry.
#[derive(Clone)]
struct Known {
    core: Weak<Core>,
    ended: Arc<Ended>,
    device: Arc<str>,
}

/// The mounts of this process. There is no lock, so a forked child never finds one locked.
static MOUNTS: ArcSwapOption<Vec<Known>> = ArcSwapOption::const_empty();

/// Registers a new mount.
pub(crate) fn register(core: &Arc<Core>) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: both are plain functions for as long as the process lives; they do not unwind.
        let (exit, fork) = unsafe {
            (
                libc::atexit(at_exit),
                libc::pthread_atfork(None, None, Some(in_child)),
            )
        };
        if exit != 0 || fork != 0 {
            tracing::warn!("no handler for the end of the process: unmount before it ends");
        }
    });
    let known = Known {
        core: Arc::downgrade(core),
        ended: Arc::clone(&core.ended),
        device: core.vol.dev.info().name.as_str().into(),
    };
    MOUNTS.rcu(|mounts| {
        let live = mounts.iter().flat_map(|mounts| mounts.iter());
        let mut mounts: Vec<Known> = live
            .filter(|known| known.core.strong_count() > 0 || !*known.ended.ended.lock())
            .cloned()
            .collect();
        mounts.push(known.clone());
        Some(Arc::new(mounts))
    });
}

extern "C" fn at_exit() {
    if MOUNTS.load().is_none() {
        return;
    }
    let unmounting = std::thread::Builder::new()
        .name("pumice-exit".to_owned())
        .spawn(unmount_all);
    match unmounting {
        Ok(thread) => drop(thread.join()),
        // No thread can be started: this one does what is possible without its channels.
        Err(_) => drop(std::panic::catch_unwind(unmount_all)),
    }
}

fn unmount_all() {
    let mounts = MOUNTS.swap(None);
    for known in mounts.iter().flat_map(|mounts| mounts.iter()) {
        let error = match known.core.upgrade() {
            Some(core) => core.unmount().err().map(|e| e.to_string()),
            None if known.ended.wait(DROPPING) => None,
            None => Some("another thread has not ended its unmount".to_owned()),
        };
        if let Some(error) = error
            && !*known.ended.ended.lock()
        {
            let device = &known.device;
            tracing::error!(%device, %error, "the file system could not be unmounted at exit");
            // There is nobody else to tell, and bytes may be lost.
            let _ = writeln!(
                std::io::stderr(),
                "pumice: {device}: unmounting at exit failed, what was not synced may be lost: {error}"
            );
        }
    }
}

/// Runs in the only thread of a forked child, and makes it ignore the parent's mounts.
extern "C" fn in_child() {
    let mounts = MOUNTS.swap(None);
    for known in mounts.iter().flat_map(|mounts| mounts.iter()) {
        if let Some(core) = known.core.upgrade() {
            // It is never dropped here, since its rings and buffers are shared with the parent.
            std::mem::forget(core);
        }
    }
    // Its memory belonged to the parent too, and a copy is useless.
    std::mem::forget(mounts);
}
