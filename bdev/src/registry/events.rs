//! Events of a registry, told in the order in which they happened.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

/// An addition or removal of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A device was added.
    Added(String),
    /// A device was removed.
    Removed(String),
}

type Listener = Arc<dyn Fn(&Event) + Send + Sync>;

/// Events that were not told yet, and those who listen.
#[derive(Default)]
pub(super) struct Events {
    queue: Mutex<Untold>,
    listeners: Mutex<Vec<Listener>>,
}

#[derive(Default)]
struct Untold {
    waiting: VecDeque<Event>,
    /// Whether a thread is telling one.
    telling: bool,
}

/// Ends the telling of an event, also when a listener panics.
struct Telling<'a>(&'a Mutex<Untold>);

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        self.0.lock().telling = false;
    }
}

impl Events {
    pub fn listen(&self, listener: Listener) {
        self.listeners.lock().push(listener);
    }

    /// Notes an event. The lock under which it happens is held, so that the order is right.
    pub fn note(&self, event: Event) {
        self.queue.lock().waiting.push_back(event);
    }

    /// Tells what was noted, one event after the other. If another thread does so, or a listener of
    /// this one, that goes on with these. No lock is held meanwhile.
    pub fn tell(&self) {
        while let Some((event, _telling)) = self.next() {
            // A listener may add one.
            let listeners = self.listeners.lock().clone();
            for listener in listeners {
                listener(&event);
            }
        }
    }

    fn next(&self) -> Option<(Event, Telling<'_>)> {
        let mut queue = self.queue.lock();
        if queue.telling {
            return None;
        }
        let event = queue.waiting.pop_front()?;
        queue.telling = true;
        Some((event, Telling(&self.queue)))
    }
}
