//! The channel that is used where io_uring is refused: a few threads that call `pread` and
//! `pwrite`.
//!
//! A single operation that a thread waits for runs on that thread, which saves passing it on.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use pumice_io::{Completion, Op, SubmitError};

use super::SharedFile;
use super::call::{CALL_MIN, run};
use super::slot::Slot;
use crate::device::IoChannel;
use crate::error::BdevError;
use crate::queue::refuse;

/// Number of threads per channel: the depth at the device.
const THREADS: usize = 4;
/// Most operations in flight on a channel.
const DEPTH: usize = 256;

pub(super) struct ThreadChannel {
    pool: Arc<Pool>,
    /// Operations that were submitted and not passed to the threads yet.
    queued: VecDeque<Slot>,
    resets: Vec<(u64, Op)>,
    threads: Vec<JoinHandle<()>>,
    /// Number of operations that the threads have, or that have ended and were not taken yet.
    running: usize,
}

struct Pool {
    shared: Arc<SharedFile>,
    work: Mutex<Work>,
    start: Condvar,
    finish: Condvar,
}

#[derive(Default)]
struct Work {
    todo: VecDeque<Slot>,
    done: Vec<Completion>,
    stop: bool,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut work = self.lock();
        loop {
            if let Some(slot) = work.todo.pop_front() {
                drop(work);
                let completion = run(&self.shared, slot);
                work = self.lock();
                work.done.push(completion);
                self.finish.notify_one();
            } else if work.stop {
                return;
            } else {
                work = self
                    .start
                    .wait(work)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl ThreadChannel {
    pub(super) fn new(shared: Arc<SharedFile>) -> io::Result<ThreadChannel> {
        let pool = Arc::new(Pool {
            shared,
            work: Mutex::default(),
            start: Condvar::new(),
            finish: Condvar::new(),
        });
        let mut channel = ThreadChannel {
            pool: Arc::clone(&pool),
            queued: VecDeque::new(),
            resets: Vec::new(),
            threads: Vec::new(),
            running: 0,
        };
        for _ in 0..THREADS {
            let pool = Arc::clone(&pool);
            let builder = thread::Builder::new().name("bdev-file".to_owned());
            channel.threads.push(builder.spawn(move || pool.serve())?);
        }
        Ok(channel)
    }
}

impl ThreadChannel {
    /// Accepts an operation that another channel has checked and begun.
    pub(super) fn adopt(&mut self, slot: Slot) {
        self.queued.push_back(slot);
    }
}

impl IoChannel for ThreadChannel {
    fn submit(&mut self, tag: u64, op: Op) -> Result<(), SubmitError> {
        if let Err(e) = self.pool.shared.check(&op) {
            return refuse(op, e);
        }
        if self.in_flight() >= DEPTH || !self.resets.is_empty() {
            return Err(SubmitError::Busy(op));
        }
        match op {
            Op::Reset => self.resets.push((tag, op)),
            // An operation that a thread has begun cannot be aborted.
            Op::Abort { .. } => {
                self.running += 1;
                self.pool.lock().done.push(Completion {
                    tag,
                    op,
                    result: Ok(()),
                });
            }
            op => self
                .queued
                .push_back(Slot::new(tag, op, &self.pool.shared, false)),
        }
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> usize {
        if !self.pool.shared.info.is_here() {
            return 0;
        }
        let mut work = self.pool.lock();
        if !self.queued.is_empty() {
            self.running += self.queued.len();
            work.todo.extend(self.queued.drain(..));
            self.pool.start.notify_all();
        }
        let mut n = work.done.len();
        out.append(&mut work.done);
        drop(work);
        self.running -= n;
        if self.running == 0 {
            n += self.resets.len();
            let ended = self.resets.drain(..);
            out.extend(ended.map(|(tag, op)| Completion {
                tag,
                op,
                result: Ok(()),
            }));
        }
        n
    }

    fn wait(&mut self, timeout: Duration) -> Result<(), BdevError> {
        self.pool.shared.info.still_here()?;
        // The call has no time-out, so a thread that may wait for a short time only leaves it.
        if self.running == 0 && self.queued.len() == 1 && timeout >= CALL_MIN {
            let slot = self.queued.pop_front();
            if let Some(slot) = slot {
                let completion = run(&self.pool.shared, slot);
                self.running += 1;
                self.pool.lock().done.push(completion);
            }
            return Ok(());
        }
        let mut work = self.pool.lock();
        if !self.queued.is_empty() {
            self.running += self.queued.len();
            work.todo.extend(self.queued.drain(..));
            self.pool.start.notify_all();
        }
        if work.done.is_empty() && self.running > 0 {
            let woken = self.pool.finish.wait_timeout(work, timeout);
            drop(woken.unwrap_or_else(PoisonError::into_inner));
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        if !self.pool.shared.info.is_here() {
            return 0;
        }
        self.queued.len() + self.running + self.resets.len()
    }
}

impl Drop for ThreadChannel {
    fn drop(&mut self) {
        // A forked child does not have the threads, one of which may hold the lock.
        if !self.pool.shared.info.is_here() {
            return;
        }
        // Operations submitted earlier come first.
        let mut work = self.pool.lock();
        work.todo.extend(self.queued.drain(..));
        work.stop = true;
        drop(work);
        self.pool.start.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DmaBuf;
    use crate::file::slot::tests::shared;
    use crate::file::{File, FileOptions};

    /// A channel whose threads have ended, so that only the thread that waits can make a call.
    fn without_threads() -> (tempfile::TempDir, ThreadChannel) {
        let (dir, shared) = shared();
        let mut channel = ThreadChannel::new(shared).unwrap();
        channel.pool.lock().stop = true;
        channel.pool.start.notify_all();
        for thread in channel.threads.drain(..) {
            thread.join().unwrap();
        }
        (dir, channel)
    }

    /// Shared channels are waited for in slices of a millisecond, under a lock that others need.
    #[test]
    fn who_waits_for_a_short_time_is_not_blocked_by_a_call() {
        let (_dir, mut channel) = without_threads();
        let read = Op::Read {
            lba: 0,
            buf: DmaBuf::new(512).unwrap(),
        };
        let mut out = Vec::new();
        for (tag, op) in [(1, Op::Flush), (2, read)] {
            channel.submit(tag, op).unwrap();
            channel.wait(CALL_MIN).unwrap();
            assert_eq!(channel.poll(&mut out), 1, "whoever may wait makes the call");
        }
        channel.submit(3, Op::Flush).unwrap();
        channel.wait(CALL_MIN / 2).unwrap();
        assert_eq!(channel.poll(&mut out), 0);
        assert_eq!(channel.pool.lock().todo.len(), 1, "it is left to a thread");
    }

    #[test]
    fn nothing_is_accepted_beside_a_reset() {
        let (_dir, mut channel) = without_threads();
        channel.submit(1, Op::Flush).unwrap();
        channel.submit(2, Op::Reset).unwrap();
        let busy = channel.submit(3, Op::Flush);
        assert!(matches!(busy, Err(SubmitError::Busy(Op::Flush))));
        channel.wait(CALL_MIN).unwrap();
        let mut out = Vec::new();
        assert_eq!(channel.poll(&mut out), 2);
        assert_eq!([out[0].tag, out[1].tag], [1, 2]);
        channel.submit(3, Op::Flush).unwrap();
    }

    #[test]
    fn what_was_accepted_is_done_though_the_channel_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let file = File::open(
            &FileOptions::new(path.clone())
                .size(Some(1 << 20))
                .create(true),
        );
        let mut channel = ThreadChannel::new(Arc::clone(&file.unwrap().shared)).unwrap();
        let write = Op::Write {
            lba: 1,
            data: DmaBuf::copy_from(&[7; 512]).unwrap().freeze(),
            fua: false,
        };
        channel.submit(1, write).unwrap();
        drop(channel);
        let image = std::fs::read(path).unwrap();
        assert!(image[512..1024].iter().all(|b| *b == 7));
    }
}
