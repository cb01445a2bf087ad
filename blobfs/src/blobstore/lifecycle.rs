//! The part of its life that a store is in, and whether it takes changes.

use std::sync::Arc;

use super::commit::Restore;
use super::error::Error;
use super::format::BlobId;
use super::meta::BlobMeta;
use super::space::Taken;

/// The reason why no changes are accepted.
#[derive(Debug)]
pub(crate) struct Stop {
    pub reason: String,
    /// Whether only the next load can find out what the device holds.
    pub for_good: bool,
}

/// A change of which a part may be on the device, and what takes it back.
#[derive(Debug)]
pub(crate) struct Doubt {
    /// Pages and clusters that the change has taken.
    pub taken: Taken,
    pub restore: Restore,
}

/// A snapshot whose creation has failed and that could not be undone.
#[derive(Debug)]
pub(crate) struct HalfSnapshot {
    pub snapshot: BlobId,
    /// The blob as it was, if it is the snapshot's clone already.
    pub origin: Option<Arc<BlobMeta>>,
}

/// The mark of an orderly unload (clean = 1) in the super block on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CleanMark {
    /// It is there.
    Set,
    /// A write that sets or removes it has not succeeded, so that it may be there.
    InDoubt,
    /// It is not there.
    Removed,
}

/// The part of its life that the store is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StorePhase {
    Loaded,
    /// No blob is opened.
    Unloading,
    Unloaded,
}

/// The part of its life that a store is in, and whether it takes changes.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    pub phase: StorePhase,
    /// Whether no change is accepted.
    pub read_only: bool,
    pub clean_mark: CleanMark,
    /// The reason why no more changes are accepted, if there is one.
    pub stopped: Option<Stop>,
    /// Changes that must be taken back before others are accepted.
    pub doubts: Vec<Doubt>,
    /// A snapshot that must be undone before changes are accepted.
    pub half_snapshot: Option<HalfSnapshot>,
}

impl Lifecycle {
    /// Makes that of a store that has just been loaded.
    pub fn new(clean_mark: CleanMark, read_only: bool) -> Lifecycle {
        Lifecycle {
            phase: StorePhase::Loaded,
            read_only,
            clean_mark,
            stopped: None,
            doubts: Vec::new(),
            half_snapshot: None,
        }
    }

    /// Fails if the store is unloaded, or is about to be.
    pub fn check_loaded(&self) -> Result<(), Error> {
        match self.phase {
            StorePhase::Loaded => Ok(()),
            StorePhase::Unloading => Err(Error::Busy("the store is being unloaded".to_owned())),
            StorePhase::Unloaded => Err(Error::Unloaded),
        }
    }

    /// Whether the next change must be the only one, since it has something to take back first.
    pub fn wants_all(&self) -> bool {
        self.stopped.is_some()
    }

    /// Fails if the store accepts no changes.
    pub fn check_takes_changes(&self) -> Result<(), Error> {
        if self.phase == StorePhase::Unloaded {
            return Err(Error::Unloaded);
        }
        if self.read_only {
            return Err(Error::ReadOnlyStore);
        }
        self.check_not_stopped()
    }

    /// Fails if it is not known what the device holds.
    pub fn check_not_stopped(&self) -> Result<(), Error> {
        match &self.stopped {
            Some(stop) => Err(Error::Stopped(stop.reason.clone())),
            None => Ok(()),
        }
    }

    /// Stops changes from now on.
    pub fn stop(&mut self, error: &Error, for_good: bool) {
        let stop = self.stopped.get_or_insert_with(|| Stop {
            reason: error.to_string(),
            for_good: false,
        });
        stop.for_good |= for_good;
    }

    /// Records that a change has failed. If it was the one that marks the store as not unloaded in
    /// order, the device may or may not have that mark.
    pub fn note_mark_in_doubt(&mut self) {
        if self.clean_mark == CleanMark::Set {
            self.clean_mark = CleanMark::InDoubt;
        }
    }
}
