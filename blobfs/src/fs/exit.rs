//! The end of the process, and its forks.
//!
//! What was appended and not synced is in this process's memory. A process that ends in order
//! (`exit`, `main` returns) does not drop what is in a `static` or was forgotten, so one handler
//! unmounts every file system that is still mounted then. It works from a thread of its own, since
//! the exiting one has lost its thread-local channels.
//!
//! A forked child has copies of the parent's mounts, whose buffers and rings are the parent's. The
//! child forgets them: every call answers [`FsError::Forked`], nothing is unmounted, and the
//! child's own mounts are its own.
#![allow(unsafe_code)]

use std::io::Write as _;
use std::sync::{Arc, Once, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use parking_lot::{Condvar, Mutex};

use super::core::Core;

/// How long the end of the process waits for another thread that is dropping a mount already.
const DROPPING: Duration = Duration::from_secs(60);

/// Told when a mount has come to its end, by an unmount or a drop.
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

/// A mount as the registry knows it; it does not keep it.
#[derive(Clone)]
struct Known {
    core: Weak<Core>,
    ended: Arc<Ended>,
    device: Arc<str>,
}

/// The mounts of this process. Without a lock, so that a forked child never finds one taken.
static MOUNTS: ArcSwapOption<Vec<Known>> = ArcSwapOption::const_empty();

/// Takes note of a new mount.
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
        // No thread to be had: this one does what it can without its channels.
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
            // Nobody is left who could be told otherwise, and bytes may be lost.
            let _ = writeln!(
                std::io::stderr(),
                "pumice: {device}: unmounting at exit failed, what was not synced may be lost: {error}"
            );
        }
    }
}

/// In the only thread of a forked child: the parent's mounts are not this process's.
extern "C" fn in_child() {
    let mounts = MOUNTS.swap(None);
    for known in mounts.iter().flat_map(|mounts| mounts.iter()) {
        if let Some(core) = known.core.upgrade() {
            // Never dropped here: its rings and buffers are shared with the parent.
            std::mem::forget(core);
        }
    }
    // Its memory was the parent's, too; a copy of it is no use to anybody.
    std::mem::forget(mounts);
}
