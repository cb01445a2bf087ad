//! The keeper: one thread for each controller, which handles asynchronous events, aborts, resets
//! and removal, and sleeps in between. No I/O passes through it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use pumice_io::sys::wait_readable;

use super::core::Core;
use super::events::ControllerEvent;
use super::namespaces::ALL;
use super::state::Phase;
use crate::error::NvmeError;
use crate::spec::{AsyncEvent, AsyncEventType, Csts, LogPage, Reg};
use crate::transport::{TransportError, TransportEvent};

/// Time between two looks at the status register.
const TICK: Duration = Duration::from_secs(1);

/// Watches the controller until it is told to stop.
fn keep(core: &Core) {
    loop {
        let (stop, reset) = core.requests.take();
        if stop {
            return;
        }
        if let Some((word, reason)) = reset {
            core.reset(word, &reason);
        }
        while let Some(event) = core.link.transport.take_event() {
            transport_event(core, event);
        }
        if core.life.phase() == Phase::Live {
            core.requests
                .send_aborts(|sqid, cid| core.admin.abort(sqid, cid));
            async_events(core);
            look_at_status(core);
            list_what_was_missed(core);
        }
        rest(core);
    }
}

fn rest(core: &Core) {
    let admin_interrupt = core.interrupts.of(0);
    let mut fds: Vec<BorrowedFd<'_>> = vec![core.requests.wake_fd()];
    let live = core.life.phase() == Phase::Live;
    if live {
        fds.extend(admin_interrupt.as_ref().map(|i| i.as_fd()));
        fds.extend(core.link.transport.events());
    }
    if let Err(error) = wait_readable(&fds, Some(TICK)) {
        tracing::warn!(device = core.link.name(), %error, "ppoll");
        std::thread::sleep(TICK);
    }
    if let Some(interrupt) = &admin_interrupt {
        interrupt.drain();
    }
}

fn transport_event(core: &Core, event: TransportEvent) {
    match event {
        TransportEvent::RemovalRequested => core.release(),
        TransportEvent::Removed => core.removed(),
        TransportEvent::Error(text) => {
            tracing::warn!(device = core.link.name(), error = text, "transport error");
            core.events
                .push(ControllerEvent::TransportError(text.clone()));
            core.requests.reset(&format!("transport error: {text}"));
        }
    }
}

fn look_at_status(core: &Core) {
    let word = core.life.word();
    match core.link.transport.read32(Reg::CSTS) {
        _ if core.link.transport.is_gone() => core.removed(),
        Ok(u32::MAX) => core.removed(),
        Ok(raw) if Csts::from(raw).cfs() => {
            core.reset(word, &format!("fatal controller status (CSTS {raw:#x})"));
        }
        Ok(_) => {}
        Err(error) => {
            tracing::warn!(device = core.link.name(), %error, "status register not readable");
        }
    }
}

/// Lists the namespaces again: one that could not be identified may be ready by now.
fn list_what_was_missed(core: &Core) {
    if !core.namespaces.are_incomplete() || core.life.phase() != Phase::Live {
        return;
    }
    match core.namespaces.list() {
        Ok(()) => core.events.push(ControllerEvent::NamespacesChanged),
        Err(error) => {
            tracing::warn!(device = core.link.name(), %error, "namespaces not listed; trying again");
        }
    }
}

fn async_events(core: &Core) {
    let events = core.admin.take_events();
    if events.is_empty() {
        return;
    }
    for event in events {
        async_event(core, event);
    }
    core.admin.arm_events();
}

fn async_event(core: &Core, event: AsyncEvent) {
    tracing::warn!(device = core.link.name(), %event, "asynchronous event");
    core.events.push(ControllerEvent::Async(event));
    // The controller reports the next event when the page that this one names has been read.
    let len = match LogPage(event.log_page()) {
        LogPage::ERROR => 64,
        LogPage::SMART | LogPage::FIRMWARE_SLOTS => 512,
        LogPage::CHANGED_NAMESPACES => 4096,
        _ => 0,
    };
    if len > 0
        && let Err(error) = core
            .admin
            .log_page(LogPage(event.log_page()), ALL, len, false)
    {
        tracing::warn!(device = core.link.name(), %error, "log page of the event not read");
    }
    if event.kind() == AsyncEventType::NOTICE && event.info() == 0 {
        match core.namespaces.list() {
            Ok(()) => core.events.push(ControllerEvent::NamespacesChanged),
            Err(error) => {
                tracing::warn!(device = core.link.name(), %error, "namespaces not listed");
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
            keep(&core);
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
            core.requests.stop();
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
