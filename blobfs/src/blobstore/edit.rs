//! Changes of metadata, from their turn in the order to their end.
//!
//! 1. An [`Edit`] is a turn in the [`order`](super::order): nobody else changes the blobs of its
//!    scope.
//! 2. With the state locked, a change is staged, which makes a [`Batch`](super::commit::Batch).
//! 3. The batch is appended without that lock, beside those of other threads.
//! 4. With the lock again, the change is published, or what it has taken is given back.
//!
//! After a change whose outcome is open, the store accepts no others until that one is taken back.
//! Each later change tries that first.

use std::sync::Arc;

use parking_lot::MutexGuard;

use super::Blobstore;
use super::change::Change;
use super::commit::{Cleared, Failure};
use super::error::Error;
use super::format::BlobId;
use super::gate::DRAIN_TIMEOUT;
use super::geometry::Geometry;
use super::lay_out;
use super::lifecycle::{Doubt, Stop};
use super::order::{Scope, Turn};
use super::shared::{Frozen, Shared};
use super::snapshot::undo_half_snapshot;
use super::state::State;

/// The right to change what its scope names.
#[derive(Debug)]
pub(crate) struct Edit<'a> {
    pub store: &'a Blobstore,
    turn: Turn<'a>,
}

/// The blobs that an operation changes, and the open ones that must have no I/O in flight meanwhile.
pub(crate) type Plan = (Scope, Vec<Arc<Shared>>);

impl Blobstore {
    /// Waits until nobody else changes what the scope names. The state must not be locked, and the
    /// thread must not have another edit.
    ///
    /// # Errors
    /// Fails if the store accepts no changes, and if the turn does not come.
    pub(crate) fn edit(&self, scope: &Scope) -> Result<Edit<'_>, Error> {
        loop {
            let turn = self.turn(self.widened(scope))?;
            if let Some(edit) = self.entered(turn)? {
                return Ok(edit);
            }
        }
    }

    /// Begins an edit of everything that neither moves nor copies clusters of blobs. What they are owed may stay in the journal,
    /// since a block that cannot be written must not keep the metadata from growing.
    ///
    /// # Errors
    /// Fails as [`Blobstore::edit`] does.
    pub(crate) fn edit_around_blobs(&self) -> Result<Edit<'_>, Error> {
        let edit = self.edit_to_the_end()?;
        edit.take_back_doubts();
        edit.state().lifecycle.check_takes_changes()?;
        Ok(edit)
    }

    /// Waits until nobody changes anything, in order to unload the store.
    ///
    /// # Errors
    /// Fails if the turn does not come.
    pub(crate) fn edit_to_the_end(&self) -> Result<Edit<'_>, Error> {
        Ok(Edit {
            store: self,
            turn: self.turn(Scope::All)?,
        })
    }

    /// Whether it is not known what the device holds of an earlier change. Tries to take that one
    /// back, and writes nothing else.
    pub(crate) fn is_stopped(&self) -> bool {
        if self.inner.state.lock().lifecycle.wants_all() {
            // The edit ends at once. What it finds is in the state.
            let _ = self.edit(&Scope::All);
        }
        self.inner.state.lock().lifecycle.wants_all()
    }

    /// Waits for a turn in the order of changes.
    ///
    /// # Errors
    /// Fails if it does not come.
    pub(crate) fn turn(&self, scope: Scope) -> Result<Turn<'_>, Error> {
        let turn = self.inner.order.enter(scope, DRAIN_TIMEOUT);
        turn.ok_or_else(turn_never_comes)
    }

    /// Begins an edit as [`Blobstore::edit`] does, for asynchronous code: this thread's own I/O
    /// goes on while it waits.
    ///
    /// # Errors
    /// Fails as [`Blobstore::edit`] does.
    pub(crate) async fn edit_async(&self, scope: &Scope) -> Result<Edit<'_>, Error> {
        loop {
            let turn = self
                .inner
                .order
                .enter_async(self.widened(scope), DRAIN_TIMEOUT);
            let turn = turn.await.ok_or_else(turn_never_comes)?;
            if let Some(edit) = self.entered(turn)? {
                return Ok(edit);
            }
        }
    }

    /// Waits until nobody else changes what the plan names, while no I/O is in flight on its open
    /// blobs and none begins. Their gates are closed before the turn comes, since I/O that has
    /// entered may need a turn. The plan is made again when the turn has come, because more blobs
    /// may have been opened meanwhile.
    pub(crate) fn edit_frozen(
        &self,
        mut plan: impl FnMut(&State) -> Result<Plan, Error>,
    ) -> Result<(Frozen, Edit<'_>), Error> {
        let mut frozen = Frozen::default();
        loop {
            let (scope, wanted) = plan(&self.inner.state.lock())?;
            frozen
                .close(wanted, &|| self.drive_shared())
                .map_err(never_ends)?;
            let edit = self.edit(&scope)?;
            let (scope, wanted) = plan(&edit.state())?;
            if frozen.covers(&wanted) && edit.turn.scope().covers(&scope) {
                return Ok((frozen, edit));
            }
        }
    }

    /// Returns the scope of a change, which is everything if something has to be taken back first.
    fn widened(&self, scope: &Scope) -> Scope {
        if self.inner.state.lock().lifecycle.wants_all() {
            Scope::All
        } else {
            scope.clone()
        }
    }

    /// Begins the edit. Returns `None` if the turn's scope is no longer large enough.
    fn entered<'a>(&'a self, turn: Turn<'a>) -> Result<Option<Edit<'a>>, Error> {
        let edit = Edit { store: self, turn };
        if edit.turn.scope() == &Scope::All {
            edit.take_back_doubts();
        } else if edit.state().lifecycle.wants_all() {
            return Ok(None);
        }
        edit.state().lifecycle.check_takes_changes()?;
        if edit.turn.scope() == &Scope::All {
            // It may move clusters, or copy them.
            self.inner.commit.put_owed(None)?;
        }
        Ok(Some(edit))
    }
}

/// Returns the error of a turn that does not come.
fn turn_never_comes() -> Error {
    Error::Busy(
        "another change of the same blobs does not come to an end; poll or drop its future before this operation"
            .to_owned(),
    )
}

/// Returns the error of a gate that does not become empty.
pub(crate) fn never_ends(id: BlobId) -> Error {
    Error::Busy(format!(
        "I/O to blob {id} does not come to an end; drive or await it before this operation"
    ))
}

impl Edit<'_> {
    /// Locks the state, which must be held only briefly.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.store.inner.state.lock()
    }

    /// Returns the geometry. It does not change while this edit covers everything.
    pub fn geometry(&self) -> Geometry {
        self.state().space.geo.clone()
    }

    /// Stages a change and commits it. If an operation of several commits has failed at one of them
    /// and undoes those before it, this first takes back what that one has left.
    pub fn change(
        &self,
        stage: impl FnOnce(&mut State, &mut Change) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let stopped = self.state().lifecycle.stopped.is_some();
        if stopped && self.turn.scope() == &Scope::All {
            self.take_back_doubts();
        }
        let mut state = self.state();
        state.lifecycle.check_not_stopped()?;
        let mut change = Change::default();
        match stage(&mut state, &mut change) {
            Ok(()) => self.commit(state, change),
            Err(error) => {
                state.space.give_back(&change.taken);
                Err(error)
            }
        }
    }

    /// Makes a change durable, then visible. After an error everything is as it was, unless it is
    /// [`Error::Undecided`]: then the store accepts no changes until it can take this one back.
    pub fn commit(
        &self,
        mut state: MutexGuard<'_, State>,
        mut change: Change,
    ) -> Result<(), Error> {
        let batch = match lay_out::batch(&mut state, &mut change) {
            Ok(batch) => batch,
            Err(error) => {
                state.space.give_back(&change.taken);
                return Err(error);
            }
        };
        drop(state);
        let appended = self.store.inner.commit.append(batch);
        let mut state = self.state();
        match appended {
            Ok(cleared) => {
                if cleared == Cleared::MayLand {
                    let late = change.keep_freed();
                    state.space.late.push(late);
                }
                state.publish(change);
                Ok(())
            }
            Err(Failure::TakenBack(error)) => {
                state.lifecycle.note_mark_in_doubt();
                if self.store.inner.commit.is_halted() {
                    state.lifecycle.stop(&error, true);
                }
                state.space.give_back_after(&error, change.taken);
                Err(error)
            }
            Err(Failure::Open { error, restore }) => {
                tracing::error!(%error, "a metadata write failed, and what the device holds is not known; the store takes no changes");
                state.lifecycle.note_mark_in_doubt();
                state.lifecycle.stop(&error, restore.is_none());
                let taken = change.taken;
                state
                    .lifecycle
                    .doubts
                    .extend(restore.map(|restore| Doubt { taken, restore }));
                Err(Error::Undecided(Box::new(error)))
            }
        }
    }

    /// Tries to take back what was left open. The edit covers everything. On success the store
    /// accepts changes again.
    pub fn take_back_doubts(&self) {
        let doubts = std::mem::take(&mut self.state().lifecycle.doubts);
        for mut doubt in doubts {
            let geo = self.geometry();
            let restored = self.store.inner.commit.restore(&geo, &mut doubt.restore);
            let mut state = self.state();
            match restored {
                Ok(()) => {
                    tracing::warn!("a change whose outcome was open was taken back");
                    state.space.give_back(&doubt.taken);
                }
                Err(_) => state.lifecycle.doubts.push(doubt),
            }
        }
        let (half, stop) = {
            let lifecycle = &mut self.state().lifecycle;
            let stays = |stop: &Stop| stop.for_good;
            if !lifecycle.doubts.is_empty() || lifecycle.stopped.as_ref().is_some_and(stays) {
                return;
            }
            (lifecycle.half_snapshot.take(), lifecycle.stopped.take())
        };
        let Some(half) = half else { return };
        match undo_half_snapshot(self, half) {
            Ok(()) => tracing::warn!("a snapshot that was half made was taken back"),
            Err(half) => {
                let lifecycle = &mut self.state().lifecycle;
                lifecycle.half_snapshot = Some(half);
                if lifecycle.stopped.is_none() {
                    lifecycle.stopped = stop;
                }
            }
        }
    }
}
