//! Huge pages for the page cache.
//!
//! The cache's memory comes to it in pages of 4 KiB. A read that hits copies from a place that the processor's
//! address cache rarely has, and waits for the page table first. So whenever 16 MiB have come into the cache, a
//! thread makes huge pages of what is in use ([`dma::join_pages`]), and ends when there is nothing left to do. That takes
//! about a millisecond of a processor for each, so it makes one at a time while the cache fills, and eight otherwise.
//! It leaves memory alone that is short, since a huge page needs 2 MiB before it frees the pages that it replaces.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use std::{fs, io};

use pumice_bdev::dma;

use super::memory::Memory;

/// The administrator's setting of transparent huge pages.
const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
/// Number of bytes that come into the cache between two looks, at its memory and at its bound.
const STEP: u64 = 16 << 20;
/// Most huge pages that are made at a time, while the cache fills and otherwise.
const FEW: usize = 1;
const MANY: usize = 8;
/// Number of bytes that come into a cache between two batches if it fills.
const FILLS: u64 = 1 << 20;
/// The time between two batches.
const PAUSE: Duration = Duration::from_millis(50);
/// Number of batches without a huge page after which the thread ends. What was pinned by I/O may be free at the next.
const PATIENCE: u32 = 4;

/// A cache's wish for huge pages.
#[derive(Debug, Default)]
pub(crate) struct HugePages {
    state: Arc<HugeThread>,
}

/// The thread that makes them.
#[derive(Debug, Default)]
struct HugeThread {
    /// Whether the thread runs.
    runs: AtomicBool,
    /// Whether the kernel makes none, or none are wanted.
    never: AtomicBool,
    /// Number of bytes that have come into the cache.
    admitted: AtomicU64,
}

impl HugePages {
    /// Makes them for a cache that wants some, or none.
    pub fn of(wanted: bool) -> HugePages {
        let huge = HugePages::default();
        huge.state.never.store(!wanted, Ordering::Relaxed);
        huge
    }

    /// Counts bytes that come into the cache. Returns whether they have been many since the last time that it did.
    #[inline]
    pub fn count(&self, bytes: usize) -> bool {
        let bytes = bytes as u64;
        let before = self.state.admitted.fetch_add(bytes, Ordering::Relaxed);
        before / STEP != (before + bytes) / STEP
    }

    /// Starts the thread, unless it runs or the cache has only small pages.
    pub fn start(&self) {
        let state = &self.state;
        if state.never.load(Ordering::Relaxed) || state.runs.swap(true, Ordering::SeqCst) {
            return;
        }
        let weak = Arc::downgrade(state);
        let thread = std::thread::Builder::new().name("pumice-huge".to_owned());
        let join = |most| match is_forbidden(&fs::read_to_string(SETTING).unwrap_or_default()) {
            true => Err(io::Error::from_raw_os_error(libc::EINVAL)),
            false => dma::join_pages(most),
        };
        if let Err(error) = thread.spawn(move || run(&weak, join, PAUSE)) {
            tracing::debug!(%error, "the page cache keeps its small pages");
            state.runs.store(false, Ordering::SeqCst);
        }
    }
}

/// Whether the administrator wants no huge pages. The kernel makes them all the same for a program that asks as this one does.
fn is_forbidden(setting: &str) -> bool {
    setting.contains("[never]")
}

/// Makes huge pages until there are none to make, or the cache is gone.
fn run(
    state: &Weak<HugeThread>,
    mut join: impl FnMut(usize) -> io::Result<usize>,
    pause: Duration,
) {
    let mut idle = 0;
    let mut seen = 0;
    while let Some(state) = state.upgrade() {
        let admitted = state.admitted.load(Ordering::Relaxed);
        let most = match admitted - seen > FILLS {
            true => FEW,
            false => MANY,
        };
        seen = admitted;
        match join_some(&mut join, most, Memory::now()) {
            Ok(made) if made > 0 => idle = 0,
            Ok(_) => idle += 1,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tracing::debug!("the page cache's memory becomes no huge pages on this system");
                state.never.store(true, Ordering::Relaxed);
                idle = PATIENCE;
            }
            Err(error) => {
                tracing::trace!(%error, "no huge page for the page cache now");
                idle += 1;
            }
        }
        if idle >= PATIENCE {
            state.runs.store(false, Ordering::SeqCst);
            return;
        }
        drop(state);
        std::thread::sleep(pause);
    }
}

/// Makes at most so many, unless memory is short.
fn join_some(
    join: &mut impl FnMut(usize) -> io::Result<usize>,
    most: usize,
    memory: Option<Memory>,
) -> io::Result<usize> {
    match memory {
        Some(now) if now.free_bytes >= 2 * now.reserve_bytes() => join(most),
        _ => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn memory(limit_mib: u64, free_mib: u64) -> Option<Memory> {
        Some(Memory {
            limit_bytes: limit_mib << 20,
            free_bytes: free_mib << 20,
        })
    }

    #[test]
    fn short_memory_is_left_alone() {
        let mut asked = 0;
        let mut join = |most: usize| {
            asked += 1;
            Ok(most)
        };
        // A reserve is an eighth, 40 MiB.
        assert_eq!(join_some(&mut join, 3, memory(320, 79)).unwrap(), 0);
        assert_eq!(join_some(&mut join, 3, None).unwrap(), 0, "nobody knows");
        assert_eq!(join_some(&mut join, 3, memory(320, 80)).unwrap(), 3);
        assert_eq!(asked, 1);
    }

    #[test]
    fn it_ends_when_nothing_is_left_or_the_kernel_makes_none_or_the_cache_is_gone() {
        let state = Arc::new(HugeThread::default());
        let run_with = |results: &mut Vec<io::Result<usize>>| {
            state.runs.store(true, Ordering::SeqCst);
            let next = |_| results.pop().expect("it has ended");
            run(&Arc::downgrade(&state), next, Duration::ZERO);
            assert!(!state.runs.load(Ordering::SeqCst), "it can start again");
            assert!(results.is_empty());
        };
        let busy = || Err(io::Error::from_raw_os_error(libc::EAGAIN));
        // From the last to the first: pages that were pinned are tried again.
        let mut results = vec![Ok(0), busy(), busy(), Ok(0), Ok(3), busy(), Ok(8)];
        run_with(&mut results);
        assert!(!state.never.load(Ordering::Relaxed));
        run_with(&mut vec![Err(io::Error::from_raw_os_error(libc::EINVAL))]);
        assert!(state.never.load(Ordering::Relaxed));
        let gone = Arc::downgrade(&state);
        drop(state);
        run(&gone, |_| panic!("the cache is gone"), Duration::ZERO);
    }

    #[test]
    fn sixteen_mebibytes_start_a_thread_that_makes_them_and_ends() {
        let Some(now) = Memory::now().filter(|now| now.free_bytes >= 3 * now.reserve_bytes())
        else {
            println!("skipped: memory is short, or nobody knows");
            return;
        };
        let mut buf = dma::DmaBuf::new(8 << 20).unwrap();
        buf.fill(1);
        let huge = HugePages::of(true);
        assert!(!huge.count(usize::try_from(STEP).unwrap() - 1));
        assert!(huge.count(1), "the last byte was missing");
        huge.start();
        let started = Instant::now();
        while huge.state.runs.load(Ordering::SeqCst) {
            assert!(started.elapsed() < Duration::from_secs(60), "{now:?}");
            std::thread::sleep(PAUSE);
        }
        if huge.state.never.load(Ordering::Relaxed) {
            println!("skipped: this system makes no huge pages of such memory");
            return;
        }
        let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap_or_default();
        let made = rollup.lines().any(|line| {
            let kb = line.strip_prefix("ShmemPmdMapped:");
            kb.is_some_and(|kb| kb.trim() != "0 kB")
        });
        assert!(
            made || dma::join_pages(1).is_err(),
            "the thread made none, and could have"
        );
        assert!(buf.iter().all(|byte| *byte == 1));
    }

    #[test]
    fn one_at_a_time_while_the_cache_fills() {
        let state = Arc::new(HugeThread::default());
        let add = |bytes| state.admitted.fetch_add(bytes, Ordering::Relaxed);
        let mut asked = Vec::new();
        let join = |most: usize| {
            asked.push(most);
            match asked.len() {
                1 => add(FILLS),
                2 => add(FILLS + 1),
                _ => 0,
            };
            Ok(usize::from(asked.len() < 4))
        };
        add(STEP);
        run(&Arc::downgrade(&state), join, Duration::ZERO);
        assert_eq!(asked[..5], [FEW, MANY, FEW, MANY, MANY]);
    }

    #[test]
    fn the_administrator_may_forbid_them() {
        assert!(is_forbidden("always madvise [never]\n"));
        for allowed in ["always [madvise] never\n", "[always] madvise never\n", ""] {
            assert!(!is_forbidden(allowed), "{allowed}");
        }
    }

    #[test]
    fn a_cache_that_wants_none_starts_no_thread() {
        let huge = HugePages::of(false);
        huge.start();
        assert!(!huge.state.runs.load(Ordering::SeqCst));
    }
}
