//! What queue pairs and callers ask of the keeper.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pumice_io::sys::EventFd;

use super::link::Link;
use super::state::{self, Lifecycle, Phase};
use crate::error::NvmeError;
use crate::transport::TransportError;

/// Most aborts that wait to be sent. A command that is not aborted leads to a reset.
const ABORTS_MAX: usize = 4096;

/// Requests to the keeper, which wake it.
#[derive(Debug)]
pub(crate) struct Requests {
    link: Arc<Link>,
    life: Arc<Lifecycle>,
    asked: Mutex<Inbox>,
    wake: EventFd,
}

#[derive(Debug, Default)]
struct Inbox {
    stop: bool,
    /// State word at the time of the request, and its reason.
    reset: Option<(u64, String)>,
    aborts: Aborts,
}

/// A request to abort a command. Identifiers are used again, so two requests may have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Abort {
    /// Number of the request.
    number: u64,
    sqid: u16,
    cid: u16,
}

/// Commands to abort, in the order in which they were asked for.
#[derive(Debug, Default)]
struct Aborts {
    waiting: VecDeque<Abort>,
    /// Number of requests so far.
    asked: u64,
}

impl Aborts {
    /// Adds one, unless too many wait.
    fn ask(&mut self, sqid: u16, cid: u16) {
        if self.waiting.len() < ABORTS_MAX {
            self.waiting.push_back(Abort {
                number: self.asked,
                sqid,
                cid,
            });
            self.asked += 1;
        }
    }

    /// Returns the next one. It stays until it was sent, so that it can be forgotten meanwhile.
    fn next(&self) -> Option<Abort> {
        self.waiting.front().copied()
    }

    /// Removes the next one, which was sent, unless it was forgotten meanwhile.
    fn sent(&mut self, abort: Abort) {
        if self.next() == Some(abort) {
            self.waiting.pop_front();
        }
    }

    /// Forgets those for a submission queue.
    fn forget(&mut self, qid: u16) {
        self.waiting.retain(|abort| abort.sqid != qid);
    }
}

impl Requests {
    pub fn new(link: &Arc<Link>, life: &Arc<Lifecycle>) -> Result<Requests, NvmeError> {
        let wake = EventFd::new().map_err(|source| TransportError::Io {
            device: link.name().to_owned(),
            what: "eventfd".into(),
            source,
        })?;
        Ok(Requests {
            link: Arc::clone(link),
            life: Arc::clone(life),
            asked: Mutex::default(),
            wake,
        })
    }

    /// Asks for a reset of the controller in its current state. Does not block.
    pub fn reset(&self, reason: &str) {
        let word = self.life.word();
        if state::phase(word) != Phase::Live {
            return;
        }
        let mut asked = self.asked.lock();
        if !matches!(&asked.reset, Some((w, _)) if *w == word) {
            asked.reset = Some((word, reason.to_owned()));
            self.wake.signal();
        }
    }

    /// Asks for a reset and blocks until it has ended.
    pub fn reset_and_wait(&self) -> Result<(), NvmeError> {
        let before = self.life.wait_live()?;
        self.reset("asked for");
        let start = Instant::now();
        while self.life.wait_live()? == before {
            if start.elapsed() > Duration::from_secs(60) {
                return Err(NvmeError::NotReady {
                    device: self.link.name().to_owned(),
                    what: "reset",
                    timeout_ms: 60_000,
                    limit: "the longest wait for a reset".into(),
                    csts: 0,
                });
            }
            self.life.wait_changed(before, Duration::from_millis(20));
        }
        Ok(())
    }

    /// Asks for an Abort of a command. Does not block.
    pub fn abort(&self, sqid: u16, cid: u16) {
        self.asked.lock().aborts.ask(sqid, cid);
        self.wake.signal();
    }

    /// Asks the keeper to end.
    pub fn stop(&self) {
        self.asked.lock().stop = true;
        self.wake.signal();
    }

    /// Wakes the keeper, which finds something to do.
    pub fn wake(&self) {
        self.wake.signal();
    }

    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Returns whether the keeper has to end, and takes the reset that was asked for.
    pub fn take(&self) -> (bool, Option<(u64, String)>) {
        self.wake.drain();
        let mut asked = self.asked.lock();
        (asked.stop, asked.reset.take())
    }

    /// Sends the aborts that were asked for by `send`, until that returns false.
    pub fn send_aborts(&self, send: impl Fn(u16, u16) -> bool) {
        loop {
            let Some(abort) = self.asked.lock().aborts.next() else {
                return;
            };
            if !send(abort.sqid, abort.cid) {
                return;
            }
            self.asked.lock().aborts.sent(abort);
        }
    }

    /// Forgets the aborts for a submission queue that is gone.
    pub fn forget_aborts_of(&self, qid: u16) {
        self.asked.lock().aborts.forget(qid);
    }

    /// Forgets the aborts that were not sent: a reset has ended every command.
    pub fn forget_aborts(&self) {
        self.asked.lock().aborts.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keeper has one in hand while its queue pair ends, and the controller takes no more.
    #[test]
    fn an_abort_that_is_forgotten_while_it_is_sent_does_not_come_back() {
        let mut aborts = Aborts::default();
        for (sqid, cid) in [(1, 7), (2, 8), (1, 9)] {
            aborts.ask(sqid, cid);
        }
        let in_hand = aborts.next().unwrap();
        assert_eq!((in_hand.sqid, in_hand.cid), (1, 7));
        aborts.forget(1);
        // Whether it was sent or not.
        let second = aborts.next().unwrap();
        assert_eq!((second.sqid, second.cid), (2, 8));
        aborts.sent(in_hand);
        assert_eq!(aborts.next(), Some(second));
        aborts.sent(second);
        assert_eq!(aborts.next(), None);
        // A command that got the same identifiers is another one.
        aborts.ask(1, 7);
        let first = aborts.next().unwrap();
        aborts.waiting.clear();
        aborts.ask(1, 7);
        let second = aborts.next();
        aborts.sent(first);
        assert_eq!(aborts.next(), second);
    }
}
