//! After a commit point could not be written: finding out what the device holds, and taking the change back.
//!
//! The page of a commit point is the old one or the new one, or it is torn. It is read back. The new one, where
//! it is durable, means that the change was made after all. Else the old pages are restored, in the opposite
//! order, so that a power cut on the way leaves a state that a cut of the change itself could have left. Only
//! if that fails, too, does the store stop; and each later change first tries to restore them.

use super::change::{Change, patched_page};
use super::error::Error;
use super::format::{
    BlobId, PAGE_SIZE, Page, PageHeader, encode_blob, page_crc, seal_chain, stored_crc,
};
use super::meta::BlobMeta;
use super::records::{Commits, Torn, may_land, write_page};
use super::state::State;

/// A change that was cut and could not be taken back.
#[derive(Debug)]
pub(crate) struct Doubt {
    change: Change,
    /// Pages to restore, in this order.
    restore: Vec<(u32, Box<Page>)>,
}

/// What a page was found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// As it was to be written.
    New,
    /// As it was before.
    Old,
    /// Neither, or it cannot be read.
    Unknown,
}

impl State {
    /// Brings a change that was cut at a commit point to an end: made, or taken back (the error), or open
    /// ([`Error::Undecided`]).
    pub(super) fn settle(&mut self, change: Change, torn: Torn) -> Result<(), Error> {
        let Torn {
            commits,
            failed,
            error,
        } = torn;
        if may_land(&error) {
            // Whatever is read or written now, the device may still write the new page over it.
            return Err(self.stop(
                Doubt {
                    change,
                    restore: Vec::new(),
                },
                error,
                false,
            ));
        }
        let found = self.read_back(&commits, failed, &change);
        if found == Found::New && !self.io.has_cache() {
            tracing::warn!(%error, "a metadata write was reported as failed, but the page is there");
            return match commits.apply(&mut self.io, &self.geo, failed + 1) {
                Ok(()) => {
                    self.publish(change);
                    Ok(())
                }
                Err(torn) => self.settle(change, *torn),
            };
        }
        let first = if found == Found::Old {
            failed
        } else {
            failed + 1
        };
        let restore = commits.points[..first]
            .iter()
            .rev()
            .map(|point| (point.index, old_page(&change, point.index)))
            .collect();
        let mut doubt = Doubt { change, restore };
        match self.restore(&mut doubt) {
            Ok(()) => {
                tracing::warn!(%error, "a metadata write failed; the change was taken back");
                self.rollback(doubt.change);
                Err(error)
            }
            Err(_) => Err(self.stop(doubt, error, true)),
        }
    }

    fn stop(&mut self, doubt: Doubt, error: Error, can_restore: bool) -> Error {
        tracing::error!(%error, "a metadata write failed, and what the device holds is not known; the store takes no changes");
        self.stopped.get_or_insert_with(|| error.to_string());
        if can_restore {
            self.doubt = Some(Box::new(doubt));
        }
        Error::Undecided(Box::new(error))
    }

    /// Tries to take back what was left open. On success the store takes changes again.
    pub(super) fn resolve_doubt(&mut self) {
        if let Some(old) = self.super_restore.take() {
            if !self.try_restore_super(&old) {
                self.super_restore = Some(old);
                return;
            }
            tracing::warn!("a change of the super block whose outcome was open was taken back");
            self.stopped = None;
        }
        if let Some(mut doubt) = self.doubt.take() {
            if self.restore(&mut doubt).is_err() {
                self.doubt = Some(doubt);
                return;
            }
            tracing::warn!("a change whose outcome was open was taken back");
            self.rollback(doubt.change);
            if self.half_snapshot.is_none() {
                self.stopped = None;
            }
        }
        if let Some(half) = self.half_snapshot.take() {
            let reason = self.stopped.take();
            match self.undo(half) {
                Ok(()) => tracing::warn!("a snapshot that was half made was taken back"),
                Err(half) => {
                    self.stopped = self.stopped.take().or(reason);
                    self.half_snapshot = Some(half);
                }
            }
        }
    }

    fn restore(&mut self, doubt: &mut Doubt) -> Result<(), Error> {
        while let Some((index, page)) = doubt.restore.first() {
            if let Err(error) = write_page(&mut self.io, &self.geo, *index, page) {
                tracing::error!(%error, page = index, "a metadata page could not be restored");
                return Err(error);
            }
            doubt.restore.remove(0);
        }
        Ok(())
    }

    /// Reads the page of a commit point whose write has failed.
    fn read_back(&mut self, commits: &Commits, number: usize, change: &Change) -> Found {
        let point = &commits.points[number];
        let read = self.io.read(self.geo.md_lba(point.index), PAGE_SIZE);
        let Ok(found) = read else {
            return Found::Unknown;
        };
        let Ok(found) = <&Page>::try_from(&found[..]) else {
            return Found::Unknown;
        };
        if *found == *point.page {
            return Found::New;
        }
        let old = old_page(change, point.index);
        let header = PageHeader::read(found);
        let is_whole = stored_crc(found) == page_crc(found);
        if *found == *old
            // Another writer of the format may have encoded the same otherwise.
            || (is_whole && old.iter().any(|byte| *byte != 0) && header.id == PageHeader::read(&old).id)
        {
            Found::Old
        } else {
            Found::Unknown
        }
    }
}

/// The page as it was before the change, to the reader of the format.
fn old_page(change: &Change, index: u32) -> Box<Page> {
    let gone = change.deleted.iter().find(|meta| meta.root() == index);
    if let Some(meta) = gone {
        return old_root(meta);
    }
    for staged in &change.staged {
        let Some(old) = &staged.old else { continue };
        if old.root() == index {
            return old_root(old);
        }
        // Rewritten in place: the one extent page of a small change.
        let number = old.extent_pages.iter().find(|(_, page)| **page == index);
        if let Some((number, _)) = number {
            return patched_page(old, *number, &[]);
        }
    }
    // A new blob: there was no root.
    Box::new([0; PAGE_SIZE])
}

fn old_root(meta: &BlobMeta) -> Box<Page> {
    debug_assert_ne!(meta.id, BlobId::INVALID);
    let mut pages = encode_blob(&meta.record(&[]));
    seal_chain(&mut pages, &meta.chain);
    pages.swap_remove(0)
}
