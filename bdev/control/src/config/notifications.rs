//! Notifications of devices that came and went, as SPDK's tools ask for them.

use std::collections::VecDeque;

use pumice_bdev::registry::Event;

/// Number of notifications that are kept.
const KEPT: usize = 1024;

/// Added and removed devices, the newest last.
#[derive(Debug, Default)]
pub(crate) struct Notifications {
    /// The number of the oldest notification that is kept.
    first: u64,
    kept: VecDeque<(&'static str, String)>,
}

impl Notifications {
    pub(crate) fn note(&mut self, event: &Event) {
        let entry = match event {
            Event::Added(name) => ("bdev_register", name.clone()),
            Event::Removed(name) => ("bdev_unregister", name.clone()),
        };
        self.kept.push_back(entry);
        if self.kept.len() > KEPT {
            self.kept.pop_front();
            self.first += 1;
        }
    }

    /// Returns what is kept, with numbers, the oldest first.
    pub(crate) fn numbered(&self) -> impl Iterator<Item = (u64, &(&'static str, String))> {
        (self.first..).zip(&self.kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_has_the_numbers_that_it_had() {
        let mut notifications = Notifications::default();
        for i in 0..KEPT + 6 {
            notifications.note(&Event::Added(i.to_string()));
        }
        let numbers = notifications.numbered();
        let kept: Vec<(u64, &str)> = numbers.map(|(n, (_, name))| (n, &name[..])).collect();
        assert_eq!((kept.len(), kept[0]), (KEPT, (6, "6")));
        assert_eq!(kept[KEPT - 1], (1029, "1029"));
    }
}
