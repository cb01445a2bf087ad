//! The journal of a new store.

use super::Blobstore;
use super::error::Error;
use super::format::BlobId;
use super::geometry::Geometry;
use super::journal::format::{RingPlace, Spot};
use super::journal::heads::Heads;
use super::journal::recovery::{LEAST_BYTES, MOST_BYTES, NAME, is_of};
use super::meta::BlobMeta;
use super::ops::{ClusterInit, CreateOptions};
use super::order::Scope;

impl Blobstore {
    /// Adds a journal to a store that has none. It is used from the next load on. Durable on return. Blocks.
    ///
    /// A blob that is named `pumice.journal` and holds no journal is left of a call that a power cut has ended. It is removed.
    ///
    /// # Errors
    /// Nothing has changed then, unless the device has failed.
    pub fn add_journal(&self, bytes: u64) -> Result<(), Error> {
        let (in_use, left) = {
            let state = self.inner.state.lock();
            let is_left = |meta: &BlobMeta| meta.xattr(b"name").is_some_and(|name| **name == *NAME);
            let blobs = state
                .blobs
                .by_root
                .values()
                .filter(|slot| is_left(&slot.meta));
            let left: Vec<BlobId> = blobs.map(|slot| slot.meta.id).collect();
            (RingPlace::read(&state.sb) != Ok(None), left)
        };
        if in_use {
            return Err(Error::invalid("the store has a journal"));
        }
        for blob in left {
            self.delete(blob)?;
        }
        self.make_journal(bytes)
    }

    /// Makes a journal in a store, whose changes are not written to it yet: after the next load
    /// they are.
    pub(super) fn make_journal(&self, bytes: u64) -> Result<(), Error> {
        let geo = self.inner.state.lock().space.geo.clone();
        if bytes < LEAST_BYTES {
            return Err(Error::invalid(format!(
                "a journal of {bytes} bytes is too small; it has at least {LEAST_BYTES}"
            )));
        }
        if bytes > MOST_BYTES {
            return Err(Error::invalid(format!(
                "a journal of {bytes} bytes is too large; it has at most {MOST_BYTES}"
            )));
        }
        let count = bytes.div_ceil(geo.cluster_size);
        let len = (count * geo.cluster_size).min(MOST_BYTES);
        if count > u64::from(geo.data_clusters() / 2) {
            return Err(Error::invalid(format!(
                "a journal of {len} bytes takes more than half of the store; make it smaller, or leave it out"
            )));
        }
        let available = self.available_clusters();
        let run = self.inner.state.lock().space.clusters.longest_run().len() as u64;
        if count > run.min(available) {
            return Err(Error::invalid(format!(
                "a journal of {len} bytes needs {count} free clusters that follow one another, and there are {}; make it \
                 smaller, or delete files",
                run.min(available)
            )));
        }
        let blob = self.create(
            &CreateOptions::default()
                .num_clusters(count)
                .init(ClusterInit::CallerWrites)
                .xattrs(vec![
                    ("name".to_owned(), NAME.to_vec()),
                    ("length".to_owned(), len.to_le_bytes().to_vec()),
                ]),
        )?;
        let begun = begin_journal(self, &geo, blob, len, count);
        if begun.is_err() {
            // The first error counts. A blob that stays is removed by the next call.
            let _ = self.delete(blob);
        }
        begun
    }
}

fn begin_journal(
    store: &Blobstore,
    geo: &Geometry,
    blob: BlobId,
    len: u64,
    count: u64,
) -> Result<(), Error> {
    let place = {
        let state = store.inner.state.lock();
        let meta = state.blobs.meta(blob)?;
        let first = meta.map.cluster(0).unwrap_or_default();
        let place = RingPlace {
            blob,
            len,
            cluster: first,
            count: u32::try_from(count).expect("at most half of the clusters"),
        };
        if !is_of(meta, &place) {
            return Err(Error::invalid(
                "the free clusters of the store do not follow one another, and a journal needs them to",
            ));
        }
        place
    };
    {
        // The host has allocated the ring's blocks before a change uses them.
        let io = &mut *store.inner.md_channels.get()?;
        let blocks = len / geo.block_size;
        let zeroes = io
            .can()
            .written_zeroes(geo.cluster_lba(place.cluster), blocks)?;
        io.run_durable(zeroes)?;
        Heads::new(geo, &place, None, false).begin(io, Spot::first(0))?;
    }
    let edit = store.edit(&Scope::All)?;
    edit.change(|state, change| {
        let mut sb = state.sb.clone();
        place.write(&mut sb);
        change.super_block = Some(Box::new((sb, state.space.geo.clone())));
        Ok(())
    })
}
