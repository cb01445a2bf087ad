//! Forked processes, and what a process has used of the processor.
//!
//! A child cannot use what its parent opened.
//! A child of `fork` has copies of its parent's handles and shares the objects behind them: memory
//! that devices write, queues, sockets, file locks. It may use none of them. So every handle of
//! such an object records the process that made it ([`Birth`]) and refuses to work in another one.
//! State of which a process has only one (the arena of buffers, the table of open controllers) is
//! [`PerProcess`]: a child starts with its own. Objects that a child opens itself work as usual.
//!
//! The check loads one number, which `fork` increments (pthread_atfork(3)). A child made by a bare
//! `clone` system call does not increment it, and dies of a segmentation fault at its first access
//! to memory of the parent's arena, which is not mapped there (MADV_DONTFORK).
#![allow(unsafe_code)]

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};
use std::time::Duration;

static GENERATION: AtomicU32 = AtomicU32::new(1);
static WATCHED: AtomicBool = AtomicBool::new(false);

/// Returns a number that differs between a process and its forked children: how many forks lie
/// between the first process that used the library and this one, plus 1. Costs one load.
#[inline]
pub fn generation() -> u32 {
    GENERATION.load(Ordering::Relaxed)
}

extern "C" fn in_the_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
}

/// Counts forks from now on.
fn watch_forks() {
    if cfg!(miri) || WATCHED.load(Ordering::Relaxed) || WATCHED.swap(true, Ordering::Relaxed) {
        return;
    }
    // SAFETY: the handler is a function of the program, which is never unloaded before the process
    // ends, and does nothing but an atomic addition, which is allowed in a new child.
    let failed = unsafe { libc::pthread_atfork(None, None, Some(in_the_child)) };
    if failed != 0 {
        tracing::error!(
            errno = failed,
            "pthread_atfork: a forked child will not notice that it is one"
        );
    }
}

/// The process in which an object was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Birth(u32);

impl Birth {
    /// Returns the current process.
    pub fn now() -> Birth {
        watch_forks();
        Birth(generation())
    }

    /// Whether the current process is this one, and not a child of it.
    #[inline]
    pub fn is_here(self) -> bool {
        self.0 == generation()
    }
}

/// A static that each process has its own copy of. It is made at its first use, and again at the
/// first use in a forked child, which never sees the parent's copy (a thread that the child does
/// not have may hold a lock in it). No copy is ever freed.
pub struct PerProcess<T: 'static> {
    made: AtomicPtr<Made<T>>,
    make: fn() -> T,
}

struct Made<T> {
    birth: Birth,
    value: T,
}

impl<T: Send + Sync + 'static> PerProcess<T> {
    /// Declares a value that `make` makes at its first use.
    pub const fn new(make: fn() -> T) -> PerProcess<T> {
        PerProcess {
            made: AtomicPtr::new(std::ptr::null_mut()),
            make,
        }
    }

    /// Returns the current process's copy, and makes it if there is none.
    #[inline]
    pub fn get(&self) -> &'static T {
        // SAFETY: the pointer is null or a leaked box, see `renew`.
        match unsafe { self.made.load(Ordering::Acquire).as_ref() } {
            Some(made) if made.birth.is_here() => &made.value,
            _ => self.renew(),
        }
    }

    #[cold]
    fn renew(&self) -> &'static T {
        let old = self.made.load(Ordering::Acquire);
        // SAFETY: the pointer is null or a leaked box, see below.
        if let Some(made) = unsafe { old.as_ref() }
            && made.birth.is_here()
        {
            // Another thread has made it since this one looked.
            return &made.value;
        }
        let fresh = Box::into_raw(Box::new(Made {
            birth: Birth::now(),
            value: (self.make)(),
        }));
        // The old value belongs to the parent process and stays as it is.
        let won = self
            .made
            .compare_exchange(old, fresh, Ordering::AcqRel, Ordering::Acquire);
        if won.is_err() {
            // SAFETY: `Box::into_raw` made the pointer above, and nobody else has seen it.
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

/// Processor time and context switches of this process so far, with the threads that have ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rusage {
    /// Processor time in the program and its libraries.
    pub user: Duration,
    /// Processor time in the kernel on behalf of the process.
    pub system: Duration,
    /// Number of times that a thread waited and gave up its processor.
    pub voluntary_switches: u64,
    /// Number of times that a thread lost its processor although it could go on.
    pub involuntary_switches: u64,
}

/// Returns the resources that this process has used (getrusage(2)).
///
/// # Errors
/// Returns the error of the system call.
pub fn rusage() -> std::io::Result<Rusage> {
    let mut raw = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the pointer is to writable memory for one `rusage`.
    if unsafe { libc::getrusage(libc::RUSAGE_SELF, raw.as_mut_ptr()) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: it was zeroed, which is a value of this type, and the call has filled it.
    let raw = unsafe { raw.assume_init() };
    let time = |t: libc::timeval| {
        Duration::from_secs(u64::try_from(t.tv_sec).unwrap_or(0))
            + Duration::from_micros(u64::try_from(t.tv_usec).unwrap_or(0))
    };
    let count = |n: libc::c_long| u64::try_from(n).unwrap_or(0);
    Ok(Rusage {
        user: time(raw.ru_utime),
        system: time(raw.ru_stime),
        voluntary_switches: count(raw.ru_nvcsw),
        involuntary_switches: count(raw.ru_nivcsw),
    })
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use parking_lot::Mutex;

    #[test]
    fn waits_of_a_thread_that_has_ended_are_counted() {
        let before = rusage().unwrap();
        let waits = || {
            for _ in 0..20 {
                std::thread::sleep(Duration::from_micros(100));
            }
        };
        std::thread::spawn(waits).join().unwrap();
        let after = rusage().unwrap();
        assert!(after.voluntary_switches >= before.voluntary_switches + 20);
        assert!(after.user + after.system >= before.user + before.system);
    }

    #[test]
    fn two_threads_at_once_get_one_value() {
        static LIST: PerProcess<Mutex<Vec<u32>>> = PerProcess::new(Mutex::default);
        let first = LIST.get();
        // So it is for a thread that looked before the value was there, and comes here afterwards.
        assert!(std::ptr::eq(first, LIST.renew()));
        assert!(std::ptr::eq(first, LIST.get()));
    }

    #[test]
    fn a_child_has_its_own_and_knows_it() {
        static LIST: PerProcess<Mutex<Vec<u32>>> = PerProcess::new(Mutex::default);
        let birth = Birth::now();
        LIST.get().lock().push(1);
        // A lock that the parent holds at the fork does not affect the child.
        let held = LIST.get().lock();
        // SAFETY: the child does nothing but what is below, and ends without unwinding.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let fresh = LIST.get().try_lock().is_some_and(|list| list.is_empty());
            let good = !birth.is_here() && Birth::now().is_here() && fresh;
            // SAFETY: the call ends the child.
            unsafe { libc::_exit(i32::from(!good)) }
        }
        drop(held);
        let mut status = -1;
        // SAFETY: the call waits for the child made above.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        assert_eq!(status, 0);
        assert!(birth.is_here());
        assert_eq!(*LIST.get().lock(), [1]);
    }
}
