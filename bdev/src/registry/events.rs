//! Events of a registry, told in the order in which they happened.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::{Mutex, RwLockWriteGuard};

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

    /// Notes an event, and only then gives up the lock under which it has happened, so that events are
    /// noted in their order.
    pub fn note<T>(&self, held: RwLockWriteGuard<'_, T>, event: Event) {
        self.queue.lock().waiting.push_back(event);
        drop(held);
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use parking_lot::RwLock;

    use super::*;

    #[test]
    fn the_lock_is_held_until_the_event_is_noted() {
        let (lock, events) = (RwLock::new(()), Events::default());
        let queue = events.queue.lock();
        let (begun, begins) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let held = lock.write();
                begun.send(()).unwrap();
                events.note(held, Event::Added("A".to_owned()));
            });
            begins.recv().unwrap();
            assert!(lock.try_write_for(Duration::from_millis(200)).is_none());
            drop(queue);
        });
        assert_eq!(events.queue.lock().waiting.len(), 1);
    }
}
