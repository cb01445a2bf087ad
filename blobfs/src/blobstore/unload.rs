//! Unloading a store: in order if the device allows it, otherwise as it is.

use super::Blobstore;
use super::edit::Edit;
use super::error::Error;
use super::lifecycle::{CleanMark, StorePhase};
use super::masks;
use super::retry::may_land;
use super::state::State;

impl Blobstore {
    /// Unloads the store in order: waits for I/O in flight on the channels of all threads, writes
    /// the masks, then marks the store clean. Writes nothing if nothing has changed since a clean
    /// load. Blocks; the metadata can be used while it waits for I/O.
    ///
    /// # Errors
    /// Fails if blobs are open, if I/O does not end ([`Error::Busy`]), and when the device fails;
    /// the store then stays loaded. With [`Error::Stopped`] the store is unloaded, but not in
    /// order, since it is not known what the device holds of the change that failed. The next load
    /// finds out.
    pub fn unload(&self) -> Result<(), Error> {
        end(self, false)
    }

    /// Unloads the store as [`Blobstore::unload`] does, and not in order if the device fails: what
    /// is durable stays so, in the journal if it cannot be put in place. The next load recovers.
    ///
    /// # Errors
    /// As [`Blobstore::unload`]. When the device has failed, the store is unloaded nevertheless.
    pub(crate) fn unload_anyway(&self) -> Result<(), Error> {
        end(self, true)
    }
}

fn end(store: &Blobstore, anyway: bool) -> Result<(), Error> {
    let inner = &store.inner;
    {
        let mut state = inner.state.lock();
        check_unloadable(&state)?;
        state.lifecycle.phase = StorePhase::Unloading;
    }
    if let Some(shared) = inner.shared.get() {
        shared.drain();
    }
    let quiet = inner.channels.quiesce();
    // Nobody else changes anything until it is unloaded.
    let (_edit, ended) = match store.edit_to_the_end() {
        Ok(edit) if quiet => {
            let ended = unload_in_order(&edit);
            (Some(edit), ended)
        }
        Ok(edit) => {
            let error = Error::Busy(
                "I/O on a channel of the store does not come to an end; drive or await it before unloading"
                    .to_owned(),
            );
            (Some(edit), Err(error))
        }
        Err(error) => (None, Err(error)),
    };
    let mut state = inner.state.lock();
    state.lifecycle.phase = StorePhase::Loaded;
    if let Err(error) = &ended
        && inner.commit.is_halted()
    {
        state.lifecycle.stop(error, true);
    }
    if let Err(error) = &ended
        && !matches!(error, Error::Stopped(_))
        && !(anyway && quiet && error.is_of_device())
    {
        inner.channels.reopen();
        return ended;
    }
    state.lifecycle.phase = StorePhase::Unloaded;
    let in_order = state.lifecycle.check_not_stopped().and(ended);
    drop(state);
    inner.channels.close();
    inner.commit.end();
    inner.md_channels.close();
    if let Some(shared) = inner.shared.get() {
        shared.close(inner.dev.info());
    }
    *inner.claim.lock() = None;
    in_order
}

/// Fails if the store cannot be unloaded.
fn check_unloadable(state: &State) -> Result<(), Error> {
    state.lifecycle.check_loaded()?;
    check_none_open(state)
}

/// Fails if a blob is open.
fn check_none_open(state: &State) -> Result<(), Error> {
    let open = state
        .blobs
        .by_root
        .values()
        .find(|slot| slot.handle.strong_count() > 0);
    match open {
        Some(slot) => Err(Error::Busy(format!(
            "blob {} is open, or a write to it has not ended; close all blobs before unloading",
            slot.meta.id
        ))),
        None => Ok(()),
    }
}

/// Leaves the device as an orderly unload leaves it.
fn unload_in_order(edit: &Edit<'_>) -> Result<(), Error> {
    {
        let state = edit.state();
        check_none_open(&state)?;
        if state.lifecycle.read_only {
            return Ok(());
        }
    }
    edit.take_back_doubts();
    let (held, mark) = {
        let state = edit.state();
        state.lifecycle.check_not_stopped()?;
        (state.space.held(), state.lifecycle.clean_mark)
    };
    if let Some(id) = held {
        // Masks would let others allocate what the damaged blob holds.
        tracing::warn!(blob = %id, "the store stays marked as not unloaded in order: a blob is damaged");
        edit.store.inner.commit.settle().map_err(Error::owed)?;
        return edit.store.inner.md_channels.get()?.flush();
    }
    if mark != CleanMark::Set {
        write_masks(edit)?;
    }
    Ok(())
}

/// Writes the masks and marks the store clean.
fn write_masks(edit: &Edit<'_>) -> Result<(), Error> {
    let commit = &edit.store.inner.commit;
    commit.settle().map_err(Error::owed)?;
    // Whatever fails from here on: the next change begins another use of the journal, and
    // removes the mark of an orderly unload.
    edit.state().lifecycle.clean_mark = CleanMark::InDoubt;
    // Before a channel is taken, since this may wait for a thread that needs one.
    commit.end();
    let mut io = edit.store.inner.md_channels.get()?;
    // Data and metadata that are in a volatile cache become durable before the mark.
    io.flush()?;
    let (masks, geo, mut sb) = {
        let state = edit.state();
        (masks::of(&state), state.space.geo.clone(), state.sb.clone())
    };
    let mut ops = Vec::new();
    for (start, mask) in masks {
        ops.extend(io.can().writes(geo.page_lba(start.into()), &mask)?);
    }
    io.run_durable(ops)?;
    sb.clean = 1.into();
    if sb.is_guarded() {
        sb.set_guard(false);
    }
    let mark = io.can().writes(0, &sb.encode())?;
    let marked = io.run_durable(mark);
    let mut state = edit.state();
    if let Err(error) = marked {
        if may_land(&error) {
            // It could land behind the change that removes it.
            state.lifecycle.stop(&error, true);
        }
        return Err(error);
    }
    state.lifecycle.clean_mark = CleanMark::Set;
    state.sb = sb;
    Ok(())
}
