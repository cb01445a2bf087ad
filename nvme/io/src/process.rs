//! Forked processes: what a process has made is not its children's.
//!
//! A child of `fork` has copies of its parent's handles, and shares with it what those stand for:
//! memory that devices write, queues, sockets, file locks. It may use none of them. So everything
//! that stands for such a thing remembers the [`Birth`] of its maker's process and refuses in
//! another one, and what a process has only once (the arena of buffers, the table of open
//! controllers) is [`PerProcess`]: a child begins with a new one. Whatever a child opens itself
//! works as anywhere.
//!
//! The check is one load. It is a number that `fork` counts up (pthread_atfork(3)); a child made
//! by a bare `clone` system call does not count, and dies of a segmentation fault at the first
//! access to memory of the parent's arena, which is not mapped there (MADV_DONTFORK).
#![allow(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

static GENERATION: AtomicU32 = AtomicU32::new(1);
static WATCHED: AtomicBool = AtomicBool::new(false);

/// Tells a process from its forked children, and them from theirs: how many forks lie between the
/// first process that used the library and this one, plus 1. A load.
#[inline]
pub fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

extern "C" fn in_the_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
}

/// Makes forks count from here on.
fn watch_forks() {
    if cfg!(miri) || WATCHED.load(Ordering::Relaxed) || WATCHED.swap(true, Ordering::Relaxed) {
        return;
    }
    // SAFETY: the handler is a function of the program, which is never unloaded before the
    // process ends, and does nothing but an atomic addition, which is allowed in a new child.
    let failed = unsafe { libc::pthread_atfork(None, None, Some(in_the_child)) };
    if failed != 0 {
        tracing::error!(
            errno = failed,
            "pthread_atfork: a forked child will not notice that it is one"
        );
    }
}

/// In which process something was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Birth(u32);

impl Birth {
    /// In this one.
    pub fn now() -> Birth {
        watch_forks();
        Birth(generation())
    }

    /// Whether this is still that process, and not a child of it.
    #[inline]
    pub fn is_here(self) -> bool {
        self.0 == generation()
    }
}

/// A static that each process has its own of: made at the first use, and again at the first use in
/// a forked child, which never sees the parent's (a lock in it may be held by a thread that the
/// child does not have). Neither is ever freed.
pub struct PerProcess<T: 'static> {
    made: AtomicPtr<Made<T>>,
    make: fn() -> T,
}

struct Made<T> {
    birth: Birth,
    value: T,
}

impl<T: Send + Sync + 'static> PerProcess<T> {
    /// Made by `make` when it is first asked for.
    pub const fn new(make: fn() -> T) -> PerProcess<T> {
        PerProcess {
            made: AtomicPtr::new(std::ptr::null_mut()),
            make,
        }
    }

    /// This process's.
    #[inline]
    pub fn get(&self) -> &'static T {
        // SAFETY: null, or a leaked box, see `renew`.
        match unsafe { self.made.load(Ordering::Acquire).as_ref() } {
            Some(made) if made.birth.is_here() => &made.value,
            _ => self.renew(),
        }
    }

    #[cold]
    fn renew(&self) -> &'static T {
        let old = self.made.load(Ordering::Acquire);
        let fresh = Box::into_raw(Box::new(Made {
            birth: Birth::now(),
            value: (self.make)(),
        }));
        // What there was is the parent's, and stays as it is.
        let won = self
            .made
            .compare_exchange(old, fresh, Ordering::AcqRel, Ordering::Acquire);
        if won.is_err() {
            // SAFETY: made above by `Box::into_raw`, and nobody else has seen it.
            drop(unsafe { Box::from_raw(fresh) });
        }
        self.get()
    }
}

impl<T> fmt::Debug for PerProcess<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PerProcess")
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    #[test]
    fn a_child_has_its_own_and_knows_it() {
        static LIST: PerProcess<Mutex<Vec<u32>>> = PerProcess::new(Mutex::default);
        let birth = Birth::now();
        LIST.get().lock().push(1);
        // A lock that is held at the fork is not the child's.
        let held = LIST.get().lock();
        // SAFETY: the child does nothing but what is below, and ends without unwinding.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let fresh = LIST.get().try_lock().is_some_and(|list| list.is_empty());
            let good = !birth.is_here() && Birth::now().is_here() && fresh;
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!good)) }
        }
        drop(held);
        let mut status = -1;
        // SAFETY: waits for the child made above.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        assert_eq!(status, 0);
        assert!(birth.is_here());
        assert_eq!(*LIST.get().lock(), [1]);
    }
}
