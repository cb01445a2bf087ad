//! Growth of a store with its device, and of its metadata region.
//!
//! The region grows in place where free clusters follow it and its masks have room for the bits.
//! Otherwise it moves: the masks, and a copy of the region followed by empty pages, go to a run of
//! free clusters. All of that is durable before one write of the super block switches over. A page
//! keeps its index in the region, so every blob keeps its id. The old copy is untouched until that
//! write, and its clusters are free after it. A power cut leaves one or the other, and a load of
//! either finds the same blobs.

use pumice_bdev::DeviceInfo;

use super::Blobstore;
use super::edit::Edit;
use super::error::Error;
use super::format::{MASK_HEADER_LEN, PAGE_SIZE, PAGE_SIZE_U64, SuperBlock, mask_pages};
use super::geometry::{Geometry, Layout};
use super::mdio::MdIo;
use super::retry::may_land;
use super::space::{Allocator, Spend, Taken};

/// Divisor of the region: a move must gain at least this part of it.
const LEAST_GAIN: u32 = 8;

/// A way to get more metadata pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Growth {
    /// The region ends later.
    InPlace { md_len: u32 },
    /// Masks and region move to the run of clusters from `first` on.
    Move { md_len: u32, first: u32 },
}

impl Growth {
    fn md_len(self) -> u32 {
        match self {
            Growth::InPlace { md_len } | Growth::Move { md_len, .. } => md_len,
        }
    }
}

impl Blobstore {
    /// Takes what the device has beyond the recorded size. Returns the number of new clusters, 0 if
    /// there are none. If the cluster mask has no room for them, masks and metadata region move to
    /// new clusters. One write of the super block switches over. Durable on return. Blocks.
    ///
    /// # Errors
    /// Fails for a store of an old version whose mask has no room, and when the device fails.
    pub fn grow(&self) -> Result<u64, Error> {
        let edit = self.edit_around_blobs()?;
        let info = self.inner.dev.info();
        let geo = edit.geometry();
        let old = geo.total_clusters;
        let wanted = (info.len_bytes() / geo.cluster_size).min(u64::from(u32::MAX));
        let wanted = u32::try_from(wanted).expect("bounded above");
        if wanted <= old {
            return Ok(0);
        }
        // The size that the device reports, unless the number of clusters limits it.
        let size = if wanted < u32::MAX {
            info.len_bytes()
        } else {
            info.len_bytes().min(u64::from(wanted) * geo.cluster_size)
        };
        if wanted <= cluster_mask_room(&edit.state().sb) {
            let mut sb = edit.state().sb.clone();
            sb.size = size.into();
            sb.used_cluster_mask_len = u32::try_from(mask_pages(wanted.into()))
                .expect("at most 2^17 pages")
                .into();
            switch(&edit, sb)?;
        } else {
            move_metadata(&edit, geo.md_len, wanted, size)?;
        }
        Ok(u64::from(wanted - old))
    }

    /// Enlarges the metadata region to at least `wanted` pages, or to as many as there is room for,
    /// in place or by moving it. Returns the number that there are then. Durable on return. Blocks.
    ///
    /// # Errors
    /// Fails with [`Error::NoMdPages`] if there is no room for even one more, for a store of an old
    /// version, and when the device fails.
    pub fn grow_md_pages(&self, wanted: u32) -> Result<u32, Error> {
        let edit = self.edit_around_blobs()?;
        if wanted > edit.geometry().md_len {
            grow_metadata(&edit, wanted, 0)?;
            edit.state().space.note_growth();
        }
        Ok(edit.geometry().md_len)
    }

    /// Lets the region grow if metadata pages are scarce, before a change that may take some. If it
    /// cannot grow, the change still has what is left, so this is not an error of the change.
    pub(crate) fn grow_metadata_if_scarce(&self, spend: Spend) {
        if self.inner.state.lock().space.wanted_growth(spend).is_none() {
            return;
        }
        let Ok(edit) = self.edit_around_blobs() else {
            return;
        };
        let (wanted, keep) = {
            let space = &mut edit.state().space;
            // Another thread may have done it.
            let Some(wanted) = space.wanted_growth(spend) else {
                return;
            };
            let keep = match spend {
                Spend::Ordinary => space.reserve_clusters(),
                Spend::Opening | Spend::Releasing => 0,
            };
            (wanted, keep)
        };
        let grown = grow_metadata(&edit, wanted, keep);
        let space = &mut edit.state().space;
        match grown {
            Ok(()) => space.note_growth(),
            Err(error) => {
                let device = &self.inner.dev.info().name;
                tracing::warn!(device, %error, "the metadata region could not grow");
                space.note_no_growth();
            }
        }
    }
}

/// Returns the number of bits that the cluster mask has room for.
fn cluster_mask_room(sb: &SuperBlock) -> u32 {
    let start = sb.used_cluster_mask_start.get();
    let others = [
        sb.used_page_mask_start.get(),
        sb.used_blobid_mask_start.get(),
        sb.md_start.get(),
    ];
    let next = others
        .into_iter()
        .filter(|other| *other > start)
        .min()
        .unwrap_or(start);
    mask_bits(next - start)
}

/// Whether the store is of a version whose metadata cannot grow.
fn is_old_version(sb: &SuperBlock) -> bool {
    sb.version.get() < 3 || sb.used_blobid_mask_len.get() == 0
}

/// Returns the way to `wanted` pages, or to as many as there is room for while `keep` clusters
/// stay free.
fn best_growth(
    sb: &SuperBlock,
    space: &Allocator,
    wanted: u32,
    keep: u32,
) -> Result<Growth, Error> {
    let none = Error::NoMdPages {
        needed: u64::from(wanted - space.geo.md_len),
        free: space.pages.free().into(),
        total: space.geo.md_len.into(),
    };
    if is_old_version(sb) {
        return Err(none);
    }
    let in_place = growth_in_place(sb, space, wanted, keep);
    let moved = match in_place {
        Some(growth) if growth.md_len() >= wanted => None,
        _ => growth_by_move(space, wanted, keep),
    };
    let ways = in_place.into_iter().chain(moved);
    ways.max_by_key(|growth| growth.md_len()).ok_or(none)
}

/// Returns how far the region can grow where it is.
fn growth_in_place(sb: &SuperBlock, space: &Allocator, wanted: u32, keep: u32) -> Option<Growth> {
    let geo = &space.geo;
    let ends = geo.md_clusters.end;
    let free_behind = space.clusters.free_runs().find(|run| run.start == ends);
    let spare = space.clusters.free().saturating_sub(keep);
    let more = free_behind.map_or(0, |run| run.end - run.start).min(spare);
    let limit = u64::from(ends + more) * geo.pages_per_cluster() - u64::from(geo.md_start);
    let masks = sb
        .used_page_mask_len
        .get()
        .min(sb.used_blobid_mask_len.get());
    let md_len = u32::try_from(limit)
        .unwrap_or(u32::MAX - geo.md_start)
        .min(mask_bits(masks));
    // This is the end of the cluster that the last wanted page is in.
    let full = (u64::from(geo.md_start) + u64::from(wanted))
        .next_multiple_of(geo.pages_per_cluster())
        - u64::from(geo.md_start);
    let md_len = md_len.min(u32::try_from(full).unwrap_or(wanted));
    (md_len > geo.md_len).then_some(Growth::InPlace { md_len })
}

/// Returns where the region can move to and how long it is there.
fn growth_by_move(space: &Allocator, wanted: u32, keep: u32) -> Option<Growth> {
    let (geo, total) = (&space.geo, space.geo.total_clusters);
    let old_clusters = geo.md_clusters.end - geo.md_clusters.start;
    // The clusters of the old copy become free.
    let most = space
        .clusters
        .free()
        .min((space.clusters.free() + old_clusters).saturating_sub(keep));
    let needed = clusters_for(geo, wanted, total);
    let first = (needed <= most)
        .then(|| space.clusters.find_run(needed))
        .flatten();
    let (first, clusters) = match first {
        Some(first) => (first, needed),
        None => {
            let run = space.clusters.longest_run();
            (run.start, (run.end - run.start).min(most))
        }
    };
    let md_len = pages_in(geo, clusters, wanted, total)?;
    let gain = geo.md_len / LEAST_GAIN;
    (md_len > geo.md_len + gain).then_some(Growth::Move { md_len, first })
}

fn info<'a>(edit: &Edit<'a>) -> &'a DeviceInfo {
    edit.store.inner.dev.info()
}

/// Enlarges the region to `wanted` pages, or to as many as there is room for while `keep`
/// clusters stay free.
fn grow_metadata(edit: &Edit<'_>, wanted: u32, keep: u32) -> Result<(), Error> {
    let (geo, best, mut sb) = {
        let state = edit.state();
        state.space.check_not_held()?;
        (
            state.space.geo.clone(),
            best_growth(&state.sb, &state.space, wanted, keep)?,
            state.sb.clone(),
        )
    };
    match best {
        Growth::InPlace { md_len } => {
            sb.md_len = md_len.into();
            let mut io = edit.store.inner.md_channels.get()?;
            let first = geo.md_lba(geo.md_len);
            let zeroes = io.can().zeroes(first, geo.md_lba(md_len) - first)?;
            let end = u64::from(geo.md_start) + u64::from(md_len);
            let zeroed = io.run_durable(zeroes);
            drop(io);
            keep_if_late(edit, zeroed, geo.md_clusters.end, end)?;
            switch(edit, sb)?;
        }
        Growth::Move { md_len, first } => {
            move_to(edit, first, md_len, geo.total_clusters, sb.size.get())?;
        }
    }
    let (pages, was) = (edit.geometry().md_len, geo.md_len);
    tracing::info!(
        device = info(edit).name,
        pages,
        was,
        ?best,
        "more metadata pages"
    );
    Ok(())
}

/// Moves masks and region to where there is room for the bits of `total` clusters.
fn move_metadata(edit: &Edit<'_>, md_len: u32, total: u32, size: u64) -> Result<(), Error> {
    let (geo, needed, first, old_version) = {
        let state = edit.state();
        state.space.check_not_held()?;
        let mut clusters = state.space.clusters.clone();
        clusters.grow(total);
        let needed = clusters_for(&state.space.geo, md_len, total);
        let first = clusters.find_run(needed);
        (
            state.space.geo.clone(),
            needed,
            first,
            is_old_version(&state.sb),
        )
    };
    let Some(first) = first.filter(|_| !old_version) else {
        let reason = format!(
            "the cluster mask has no room for {total} clusters, and {} ",
            if old_version {
                "a store of an old version cannot move its metadata".to_owned()
            } else {
                format!("no {needed} free clusters follow one another; delete blobs")
            }
        );
        return Err(Error::Geometry {
            device: info(edit).name.clone(),
            reason,
        });
    };
    let md_len = pages_in(&geo, needed, md_len, total).unwrap_or(md_len);
    move_to(edit, first, md_len, total, size)
}

/// Copies the region to the clusters from `first` on, then switches over.
fn move_to(edit: &Edit<'_>, first: u32, md_len: u32, total: u32, size: u64) -> Result<(), Error> {
    // The region is copied from the device.
    edit.store.inner.commit.put_pages()?;
    let (old, mut sb) = {
        let state = edit.state();
        (state.space.geo.clone(), state.sb.clone())
    };
    let at = u64::from(first) * old.pages_per_cluster();
    let Some(layout) = Layout::at(at, md_len, total) else {
        return Err(Error::Geometry {
            device: info(edit).name.clone(),
            reason: "the metadata would lie behind page 2^32".to_owned(),
        });
    };
    layout.set(&mut sb);
    sb.size = size.into();
    let new = Geometry::new(&sb, info(edit))?;
    let mut io = edit.store.inner.md_channels.get()?;
    // The old bytes of a file must not look like a blob's root, or like a mask.
    let start = old.page_lba(at);
    let zeroes = io.can().zeroes(start, old.page_lba(layout.end) - start)?;
    let failed = io.failed_flushes();
    let copied = io
        .run(zeroes)
        .and_then(|()| copy_region(edit, &mut io, &old, &new))
        .and_then(|()| io.flush_since(failed));
    drop(io);
    keep_if_late(edit, copied, first, layout.end)?;
    switch(edit, sb)
}

/// After a write of new metadata that has timed out: what it may still reach, free clusters from `first` up to the page
/// `end`, is given to nobody before the next load.
fn keep_if_late(
    edit: &Edit<'_>,
    written: Result<(), Error>,
    first: u32,
    end: u64,
) -> Result<(), Error> {
    if written.as_ref().is_err_and(may_land) {
        let space = &mut edit.state().space;
        let end = end.div_ceil(space.geo.pages_per_cluster());
        let end = u32::try_from(end).unwrap_or(u32::MAX);
        let free = (first..end).filter(|cluster| space.clusters.set(*cluster));
        let late = Taken {
            pages: Vec::new(),
            clusters: free.collect(),
        };
        space.late.push(late);
    }
    written
}

/// Copies the pages of the region to their new positions, used or not, since it is not known
/// which pages a damaged blob owns. A page that cannot be read and that nothing uses stays
/// empty.
fn copy_region(
    edit: &Edit<'_>,
    io: &mut MdIo,
    old: &Geometry,
    new: &Geometry,
) -> Result<(), Error> {
    let per_read = io.can().max_io_blocks() * old.block_size / PAGE_SIZE_U64;
    let per_read = u32::try_from(per_read).unwrap_or(u32::MAX).max(1);
    let mut at = 0;
    while at < old.md_len {
        let pages = per_read.min(old.md_len - at);
        if let Err(error) = copy_pages(io, old, new, at, pages) {
            if may_land(&error) {
                return Err(error);
            }
            tracing::warn!(%error, "copying metadata failed; trying page by page");
            for page in at..at + pages {
                match copy_pages(io, old, new, page, 1) {
                    Err(error) if may_land(&error) || edit.state().space.pages.is_set(page) => {
                        return Err(error);
                    }
                    _ => {}
                }
            }
        }
        at += pages;
    }
    Ok(())
}

/// Makes `sb` the super block. This is the commit point of every growth.
fn switch(edit: &Edit<'_>, sb: SuperBlock) -> Result<(), Error> {
    let geo = Geometry::new(&sb, info(edit))?;
    edit.change(|_, change| {
        change.super_block = Some(Box::new((sb, geo)));
        Ok(())
    })
}

fn copy_pages(
    io: &mut MdIo,
    old: &Geometry,
    new: &Geometry,
    at: u32,
    pages: u32,
) -> Result<(), Error> {
    let buf = io.read(old.md_lba(at), pages as usize * PAGE_SIZE)?;
    if buf.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    let writes = io.can().writes(new.md_lba(at), &buf)?;
    io.run(writes)
}

/// Returns the number of bits in a mask of this many pages.
fn mask_bits(pages: u32) -> u32 {
    let bytes = (u64::from(pages) * PAGE_SIZE_U64).saturating_sub(MASK_HEADER_LEN as u64);
    u32::try_from(bytes * 8).unwrap_or(u32::MAX)
}

/// Returns the number of clusters that masks and region take.
fn clusters_for(geo: &Geometry, md_len: u32, total: u32) -> u32 {
    let pages = Layout::masks_len(md_len, total) + u64::from(md_len);
    u32::try_from(pages.div_ceil(geo.pages_per_cluster())).unwrap_or(u32::MAX)
}

/// Returns the length of the longest region that fits into this many clusters together with its
/// masks, but at most `wanted` and what fills the last cluster that this takes.
fn pages_in(geo: &Geometry, clusters: u32, wanted: u32, total: u32) -> Option<u32> {
    let clusters = clusters.min(clusters_for(geo, wanted, total));
    let pages = u64::from(clusters) * geo.pages_per_cluster();
    let most = u32::try_from(pages).unwrap_or(u32::MAX);
    // The masks of a longer region are at least as long.
    let fits = pages.checked_sub(Layout::masks_len(most, total))?;
    u32::try_from(fits).ok().filter(|pages| *pages > 0)
}
