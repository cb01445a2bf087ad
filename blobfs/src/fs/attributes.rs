//! What the users of a file or directory set on it: the time of its last change, and permission bits.
//!
//! On a file they are set in memory, and the next sync writes them, in the same page as the length if that changes too.

use std::time::SystemTime;

/// Properties to be set; `None` leaves one as it is. See
/// [`File::set_attributes`](super::File::set_attributes).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attributes {
    /// Permission bits, of which the lower twelve count. The file system keeps them and checks nothing.
    pub mode: Option<u32>,
    /// Time of the last change; the epoch stands for earlier ones.
    pub modified: Option<SystemTime>,
}

pumice_bdev::setters!(const Attributes: mode: Option<u32>, modified: Option<SystemTime>);

/// The bits of a mode.
pub(crate) const MODE_BITS: u32 = 0o7777;

/// The attributes of a file in memory, beside the time itself.
#[derive(Debug, Default)]
pub(crate) struct Own {
    pub mode: Option<u32>,
    /// Length of the file when its time was set. A sync of this length keeps that time.
    timed_at: Option<u64>,
    /// Number of changes.
    changed: u64,
    /// Number of changes that are on the device.
    written: u64,
}

/// The attributes at the moment when they are about to be written.
#[derive(Clone, Copy)]
pub(crate) struct Moment {
    pub mode: Option<u32>,
    /// Whether the time of the file was set, and the length that is written is not longer than the
    /// file was then.
    pub keeps_time: bool,
    changed: u64,
}

impl Own {
    pub fn new(mode: Option<u32>) -> Own {
        Own {
            mode,
            ..Own::default()
        }
    }

    /// Records a change. `timed_at` is the length of the file if its time was set.
    pub fn change(&mut self, mode: Option<u32>, timed_at: Option<u64>) {
        if let Some(mode) = mode {
            self.mode = Some(mode & MODE_BITS);
        }
        if timed_at.is_some() {
            self.timed_at = timed_at;
        }
        self.changed += 1;
    }

    /// Forgets that the time was set.
    pub fn untime(&mut self) {
        self.timed_at = None;
    }

    /// Returns what is to be written with the length `len`.
    pub fn moment(&self, len: u64) -> Moment {
        Moment {
            mode: self.mode,
            // The file may have grown since the sync began, and its time was set behind that.
            keeps_time: self.timed_at.is_some_and(|at| at >= len),
            changed: self.changed,
        }
    }

    /// Whether there are changes that were not written.
    pub fn is_unwritten(&self) -> bool {
        self.changed != self.written
    }

    /// Records that `moment` was written, the latest that was. Returns whether nothing has changed since.
    pub fn wrote(&mut self, moment: Moment) -> bool {
        self.written = moment.changed;
        moment.changed == self.changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_during_a_write_stays_unwritten() {
        let mut own = Own::new(None);
        assert!(!own.is_unwritten());
        own.change(Some(0o100_755), Some(7));
        assert_eq!(own.mode, Some(0o755));
        let moment = own.moment(7);
        assert!(moment.keeps_time && !own.moment(8).keeps_time);
        assert!(own.moment(6).keeps_time, "an earlier length of a sync");
        own.change(None, None);
        assert!(!own.wrote(moment) && own.is_unwritten());
        let moment = own.moment(7);
        assert!(own.wrote(moment) && !own.is_unwritten());
        own.untime();
        assert!(!own.moment(7).keeps_time);
    }

    #[test]
    fn a_mode_that_is_set_keeps_the_time() {
        let mut own = Own::new(None);
        own.change(None, Some(7));
        own.change(Some(0o600), None);
        let moment = own.moment(7);
        assert!(moment.keeps_time);
        assert_eq!(moment.mode, Some(0o600));
    }
}
