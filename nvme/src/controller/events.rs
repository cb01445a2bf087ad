//! Events of a controller, kept for its user.

use std::collections::VecDeque;

use parking_lot::Mutex;

use crate::spec::AsyncEvent;

/// Most events kept. Older ones are dropped.
const EVENTS_MAX: usize = 64;

/// An event of a controller; see [`Controller::take_events`](super::Controller::take_events).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ControllerEvent {
    /// The controller completed an asynchronous event request.
    Async(AsyncEvent),
    /// The controller was reset, for this reason.
    Reset(String),
    /// The namespaces were listed again.
    NamespacesChanged,
    /// The bus or transport reported an error.
    TransportError(String),
    /// The controller was removed.
    Removed,
    /// The controller could not be reset and has failed, for this reason.
    Failed(String),
}

/// The events that nobody has taken yet.
#[derive(Debug, Default)]
pub(super) struct EventLog(Mutex<VecDeque<ControllerEvent>>);

impl EventLog {
    pub fn push(&self, event: ControllerEvent) {
        let mut events = self.0.lock();
        if events.len() >= EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(event);
    }

    pub fn take(&self) -> Vec<ControllerEvent> {
        self.0.lock().drain(..).collect()
    }
}
