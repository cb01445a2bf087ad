//! The keeper: one thread for each controller, which handles asynchronous events, aborts, resets
//! and removal, and sleeps in between. No I/O passes through it.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use pumice_io::sys::wait_readable;

use super::state::{self, Phase};
use super::{ControllerEvent, Core};
use crate::error::NvmeError;
use crate::spec::{AsyncEvent, AsyncEventType, Csts, LogPage, Reg};
use crate::transport::{TransportError, TransportEvent};

/// Time between two looks at the status register.
const TICK: Duration = Duration::from_secs(1);
/// Most aborts that wait to be sent. A command that is not aborted leads to a reset.
const ABORTS_MAX: usize = 4096;

/// Requests of queue pairs and callers to the keeper.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pub stop: bool,
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

impl Core {
    /// Asks for a reset of the controller in its current state. Does not block.
    pub(crate) fn request_reset(&self, reason: &str) {
        let word = self.state.load(Ordering::Acquire);
        if state::phase(word) != Phase::Live {
            return;
        }
        let mut requests = self.requests.lock();
        if !matches!(&requests.reset, Some((w, _)) if *w == word) {
            requests.reset = Some((word, reason.to_owned()));
            self.wake.signal();
        }
    }

    /// Asks for an Abort of a command. Does not block.
    pub(crate) fn request_abort(&self, sqid: u16, cid: u16) {
        self.requests.lock().aborts.ask(sqid, cid);
        self.wake.signal();
    }

    fn keep(&self) {
        loop {
            self.wake.drain();
            let (stop, reset) = {
                let mut r = self.requests.lock();
                (r.stop, r.reset.take())
            };
            if stop {
                return;
            }
            if let Some((word, reason)) = reset {
                self.reset(word, &reason);
            }
            while let Some(event) = self.link.transport.take_event() {
                self.transport_event(event);
            }
            if self.phase() == Phase::Live {
                self.send_aborts();
                self.async_events();
                self.look_at_status();
                self.list_what_was_missed();
            }
            self.rest();
        }
    }

    /// Sends the aborts that were asked for, as many as the controller takes at a time.
    fn send_aborts(&self) {
        loop {
            let Some(abort) = self.requests.lock().aborts.next() else {
                return;
            };
            if !self.send_abort(abort.sqid, abort.cid) {
                return;
            }
            self.requests.lock().aborts.sent(abort);
        }
    }

    /// Forgets the aborts for a submission queue that is gone.
    pub(super) fn forget_aborts_of(&self, qid: u16) {
        self.requests.lock().aborts.forget(qid);
    }

    /// Forgets the aborts that were not sent: a reset has ended every command.
    pub(super) fn forget_aborts(&self) {
        self.requests.lock().aborts.waiting.clear();
    }

    fn rest(&self) {
        let admin_interrupt = self.interrupts.read().first().cloned();
        let mut fds: Vec<BorrowedFd<'_>> = vec![self.wake.as_fd()];
        let live = self.phase() == Phase::Live;
        if live {
            fds.extend(admin_interrupt.as_ref().map(|i| i.as_fd()));
            fds.extend(self.link.transport.events());
        }
        if let Err(error) = wait_readable(&fds, Some(TICK)) {
            tracing::warn!(device = self.name(), %error, "ppoll");
            std::thread::sleep(TICK);
        }
        if let Some(interrupt) = &admin_interrupt {
            interrupt.drain();
        }
    }

    fn transport_event(&self, event: TransportEvent) {
        match event {
            TransportEvent::RemovalRequested => self.release(),
            TransportEvent::Removed => self.removed(),
            TransportEvent::Error(text) => {
                tracing::warn!(device = self.name(), error = text, "transport error");
                self.event(ControllerEvent::TransportError(text.clone()));
                self.request_reset(&format!("transport error: {text}"));
            }
        }
    }

    fn look_at_status(&self) {
        let word = self.state.load(Ordering::Acquire);
        match self.link.transport.read32(Reg::CSTS) {
            _ if self.link.transport.is_gone() => self.removed(),
            Ok(u32::MAX) => self.removed(),
            Ok(raw) if Csts::from(raw).cfs() => {
                self.reset(word, &format!("fatal controller status (CSTS {raw:#x})"));
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(device = self.name(), %error, "status register not readable");
            }
        }
    }

    /// Lists the namespaces again: one that could not be identified may be ready by now.
    fn list_what_was_missed(&self) {
        if !self.list_again.load(Ordering::Relaxed) || self.phase() != Phase::Live {
            return;
        }
        match self.list_namespaces() {
            Ok(()) => self.event(ControllerEvent::NamespacesChanged),
            Err(error) => {
                tracing::warn!(device = self.name(), %error, "namespaces not listed; trying again");
            }
        }
    }

    fn async_events(&self) {
        let events = {
            let mut queue = self.admin.lock();
            self.admin_reap(&mut queue);
            std::mem::take(&mut queue.events)
        };
        if events.is_empty() {
            return;
        }
        for event in events {
            self.async_event(event);
        }
        self.arm_events();
    }

    fn async_event(&self, event: AsyncEvent) {
        tracing::warn!(device = self.name(), %event, "asynchronous event");
        self.event(ControllerEvent::Async(event));
        // The controller reports the next event when the page that this one names has been read.
        let len = match LogPage(event.log_page()) {
            LogPage::ERROR => 64,
            LogPage::SMART | LogPage::FIRMWARE_SLOTS => 512,
            LogPage::CHANGED_NAMESPACES => 4096,
            _ => 0,
        };
        if len > 0
            && let Err(error) = self.log_page(LogPage(event.log_page()), u32::MAX, len, false)
        {
            tracing::warn!(device = self.name(), %error, "log page of the event not read");
        }
        if event.kind() == AsyncEventType::NOTICE && event.info() == 0 {
            match self.list_namespaces() {
                Ok(()) => self.event(ControllerEvent::NamespacesChanged),
                Err(error) => {
                    tracing::warn!(device = self.name(), %error, "namespaces not listed");
                }
            }
        }
    }
}

/// The keeper's thread, which waits for its controller.
pub(super) struct KeeperThread {
    thread: JoinHandle<()>,
    controller: Sender<Arc<Core>>,
}

/// Makes the thread of the keeper of the controller of this name, before anything is done to the
/// controller: without it no time-out is watched and no wait for a reset ends.
pub(super) fn prepare(device: &str) -> Result<KeeperThread, NvmeError> {
    let (controller, given) = channel::<Arc<Core>>();
    let keep = move || {
        // There is none if the controller could not be brought up.
        if let Ok(core) = given.recv() {
            core.keep();
        }
    };
    let name = format!("nvme {device}").chars().take(15).collect();
    match std::thread::Builder::new().name(name).spawn(keep) {
        Ok(thread) => Ok(KeeperThread { thread, controller }),
        Err(source) => Err(NvmeError::Transport(TransportError::Io {
            device: device.to_owned(),
            what: "making the thread that watches the controller (raise the limit of threads: \
                   ulimit -u, pids.max of the control group)"
                .into(),
            source,
        })),
    }
}

impl KeeperThread {
    /// Lets the keeper watch its controller.
    pub fn watch(self, core: &Arc<Core>) -> Keeper {
        // The thread is there to receive it.
        let _ = self.controller.send(Arc::clone(core));
        Keeper::Watching(self.thread)
    }
}

/// The keeper of a controller's handle.
#[derive(Debug)]
pub(super) enum Keeper {
    Watching(JoinHandle<()>),
    /// The controller was shut down, with this error if that failed.
    Stopped(Option<String>),
}

impl Keeper {
    /// Ends the keeper and shuts its controller down. Returns the first result if that was done
    /// before.
    pub fn stop(&mut self, core: &Core) -> Result<(), NvmeError> {
        self.stop_by(core.link.name(), |thread| {
            core.requests.lock().stop = true;
            core.wake.signal();
            if thread.join().is_err() {
                tracing::error!(device = core.link.name(), "the keeper thread panicked");
            }
            core.shut_down()
        })
    }

    fn stop_by(
        &mut self,
        device: &str,
        stop: impl FnOnce(JoinHandle<()>) -> Result<(), NvmeError>,
    ) -> Result<(), NvmeError> {
        match std::mem::replace(self, Keeper::Stopped(None)) {
            Keeper::Watching(thread) => {
                let result = stop(thread);
                *self = Keeper::Stopped(result.as_ref().err().map(ToString::to_string));
                result
            }
            Keeper::Stopped(None) => Ok(()),
            Keeper::Stopped(Some(error)) => {
                let reason = format!("its shutdown failed: {error}");
                *self = Keeper::Stopped(Some(error));
                Err(NvmeError::Failed {
                    device: device.to_owned(),
                    reason,
                })
            }
        }
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

    /// The caches may not be on the medium, whoever asks.
    #[test]
    fn a_failed_shutdown_stays_failed() {
        let mut keeper = Keeper::Watching(std::thread::spawn(|| ()));
        let removed = || NvmeError::Removed {
            device: "d".to_owned(),
        };
        let first = keeper.stop_by("d", |thread| {
            thread.join().unwrap();
            Err(removed())
        });
        assert!(matches!(first, Err(NvmeError::Removed { .. })));
        for _ in 0..2 {
            let later = keeper.stop_by("d", |_| panic!("there is no thread to stop"));
            let later = later.unwrap_err().to_string();
            assert!(later.contains(&removed().to_string()), "{later}");
        }
    }
}
