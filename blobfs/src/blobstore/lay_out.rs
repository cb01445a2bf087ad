//! Turns a staged change into the [`Batch`] that writes it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::change::{Change, MapChange, Staged};
use super::commit::{Batch, CommitPoint, Old};
use super::error::Error;
use super::format::{
    BlobRecord, EXTENTS_PER_PAGE, PAGE_SIZE, Page, encode_blob, encode_extent_page, seal_chain,
};
use super::lifecycle::CleanMark;
use super::meta::{Trailing, patched_page};
use super::space::Allocator;
use super::state::State;

/// Lays out the pages of all staged blobs and returns what has to be written. After this the
/// change names everything that it takes.
pub(crate) fn batch(state: &mut State, change: &mut Change) -> Result<Batch, Error> {
    let mut batch = Batch::new(state.space.geo.clone());
    match &mut change.super_block {
        Some(new) => {
            if state.blobs.journal.is_some() {
                // It must not take away the guard of a ring that has begun.
                new.0.set_guard(true);
                batch.unmark = unmark(state);
            }
            batch.super_block = Some(Box::new(new.0.clone()));
            batch.names_log = change.names_log;
        }
        None => batch.unmark = unmark(state),
    }
    let mut staged = std::mem::take(&mut change.staged);
    let result = staged
        .iter_mut()
        .try_for_each(|staged| lay_out(&mut state.space, change, staged, &mut batch));
    change.staged = staged;
    result?;
    batch.prepare.append(&mut change.prepare);
    batch.carried.append(&mut change.carried);
    batch.given_up.append(&mut change.given_up);
    let erase_root = |index: u32, old: Old| CommitPoint {
        index,
        page: Box::new([0; PAGE_SIZE]),
        old,
    };
    for meta in &change.deleted {
        let old = Old::Root(Arc::clone(meta));
        batch.points.push(erase_root(meta.root(), old));
    }
    for index in &change.discarded {
        batch.points.push(erase_root(*index, Old::Blank));
    }
    batch.erase.extend(&change.freed_pages);
    for meta in &change.deleted {
        change.freed_pages.push(meta.root());
    }
    let space = &state.space;
    change
        .freed_clusters
        .retain(|(cluster, _)| !space.shared_clusters.contains(cluster));
    change
        .freed_clusters
        .sort_unstable_by_key(|(cluster, _)| *cluster);
    // A damaged blob may hold some of them too, as a snapshot does while it is made or removed.
    if space.held().is_none() {
        for run in change
            .freed_clusters
            .chunk_by(|a, b| a.0 + 1 == b.0 && a.1 == b.1)
        {
            let (first, method) = run[0];
            batch.clear.extend(space.clears(first, run.len(), method)?);
        }
    }
    Ok(batch)
}

/// Returns the super block without the mark of an orderly unload, and with the guard of a store
/// with a journal, unless the device has it so.
fn unmark(state: &State) -> Option<Box<Page>> {
    let wants_guard = state.blobs.journal.is_some() && !state.sb.is_guarded();
    if state.lifecycle.clean_mark == CleanMark::Removed && !wants_guard {
        return None;
    }
    let mut sb = state.sb.clone();
    sb.clean = 0.into();
    if state.blobs.journal.is_some() {
        sb.set_guard(true);
    }
    Some(Box::new(sb.encode()))
}

/// Adds the pages of one blob to the batch.
fn lay_out(
    space: &mut Allocator,
    change: &mut Change,
    staged: &mut Staged,
    batch: &mut Batch,
) -> Result<(), Error> {
    if let MapChange::Patch(patches) = &staged.map
        && let Some(point) = in_place(space, staged, patches)
    {
        batch.points.push(point);
        return Ok(());
    }
    if staged.meta.table {
        lay_out_extent_pages(space, change, staged, batch)?;
    }
    let trailing = std::mem::take(&mut staged.meta.trailing);
    let Trailing { pages, clusters } = trailing;
    change.freed_pages.extend(
        pages
            .into_iter()
            .filter(|page| !space.shared_pages.contains(page)),
    );
    let method = staged.meta.clear_method();
    change
        .freed_clusters
        .extend(clusters.into_iter().map(|cluster| (cluster, method)));

    let patches = match &staged.map {
        MapChange::Patch(patches) => &patches[..],
        _ => &[],
    };
    let record: BlobRecord = staged.meta.record(patches);
    let mut pages = encode_blob(&record);
    let old_chain = std::mem::take(&mut staged.meta.chain);
    for _ in 1..pages.len() {
        staged.meta.chain.push(change.take_page(space, false)?);
    }
    change.freed_pages.extend(old_chain);
    seal_chain(&mut pages, &staged.meta.chain);
    let mut pages = pages.into_iter();
    let root = pages.next().expect("a blob has a root");
    let chain = staged.meta.chain.iter().copied();
    batch.fresh.extend(chain.zip(pages));
    batch.points.push(CommitPoint {
        index: staged.meta.root(),
        page: root,
        old: staged.old.clone().map_or(Old::Blank, Old::Root),
    });
    Ok(())
}

/// Returns the commit point of a change that touches entries of one extent page and nothing
/// else: that page, rewritten in place.
fn in_place(space: &Allocator, staged: &Staged, patches: &[(u64, u32)]) -> Option<CommitPoint> {
    let per_page = EXTENTS_PER_PAGE as u64;
    let number = u32::try_from(patches.first()?.0 / per_page).ok()?;
    let one = patches
        .iter()
        .all(|(index, _)| index / per_page == u64::from(number));
    let old = staged.old.as_ref()?;
    if staged.other || !one || staged.meta.trailing != Trailing::default() {
        return None;
    }
    let index = *staged
        .meta
        .extent_pages
        .get(&number)
        .filter(|page| !space.shared_pages.contains(page))?;
    Some(CommitPoint {
        index,
        page: patched_page(&staged.meta, number, patches),
        old: Old::ExtentPage(Arc::clone(old), number),
    })
}

/// Writes the extent pages that have changed to free metadata pages.
fn lay_out_extent_pages(
    space: &mut Allocator,
    change: &mut Change,
    staged: &mut Staged,
    batch: &mut Batch,
) -> Result<(), Error> {
    let per_page = EXTENTS_PER_PAGE as u64;
    let number_of = |index: u64| u32::try_from(index / per_page).expect("at most 2^32 clusters");
    let mut fresh: BTreeMap<u32, Box<Page>> = BTreeMap::new();
    let mut dropped = Vec::new();
    match &staged.map {
        MapChange::None => return Ok(()),
        MapChange::Patch(patches) => {
            for group in patches.chunk_by(|a, b| number_of(a.0) == number_of(b.0)) {
                let number = number_of(group[0].0);
                fresh.insert(number, patched_page(&staged.meta, number, group));
            }
        }
        MapChange::Replaced => {
            let map = &staged.meta.map;
            let mut numbers: Vec<u32> =
                map.allocated().map(|(index, _)| number_of(index)).collect();
            numbers.dedup();
            let old_map = staged.old.as_ref().map(|old| Arc::clone(&old.map));
            for number in &numbers {
                let entries = map.page(*number);
                let unchanged = staged.meta.extent_pages.contains_key(number)
                    && old_map
                        .as_ref()
                        .is_some_and(|old| old.page(*number) == entries);
                if !unchanged {
                    let start = *number * u32::try_from(EXTENTS_PER_PAGE).expect("512");
                    fresh.insert(*number, encode_extent_page(staged.meta.id, start, &entries));
                }
            }
            let gone = staged
                .meta
                .extent_pages
                .keys()
                .filter(|number| numbers.binary_search(number).is_err());
            dropped = gone.copied().collect();
        }
    }
    for number in dropped {
        let page = staged.meta.extent_pages.remove(&number);
        change
            .freed_pages
            .extend(page.filter(|page| !space.shared_pages.contains(page)));
    }
    for (number, page) in fresh {
        let index = change.take_page(space, false)?;
        let old = staged.meta.extent_pages.insert(number, index);
        change
            .freed_pages
            .extend(old.filter(|page| !space.shared_pages.contains(page)));
        batch.fresh.push((index, page));
    }
    Ok(())
}
