//! The journal of a new store.

use super::Blobstore;
use super::error::Error;
use super::journal::format::{RingPlace, Spot};
use super::journal::heads::Heads;
use super::journal::recovery::{LEAST_BYTES, MOST_BYTES, NAME, is_of};
use super::ops::{ClusterInit, CreateOptions};
use super::order::Scope;

impl Blobstore {
    /// Makes a journal in a new store, whose changes are not written to it yet: after the next load
    /// they are.
    pub(crate) fn make_journal(&self, bytes: u64) -> Result<(), Error> {
        let geo = self.inner.state.lock().geo.clone();
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
        let blob = self.create(&CreateOptions {
            num_clusters: count,
            init: ClusterInit::CallerWrites,
            xattrs: vec![
                ("name".to_owned(), NAME.to_vec()),
                ("length".to_owned(), len.to_le_bytes().to_vec()),
            ],
            ..CreateOptions::default()
        })?;
        let place = {
            let state = self.inner.state.lock();
            let meta = state.meta(blob)?;
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
            let io = &mut *self.inner.md_channels.get()?;
            let blocks = len / geo.block_size;
            let zeroes = io
                .can()
                .written_zeroes(geo.cluster_lba(place.cluster), blocks)?;
            io.run_durable(zeroes)?;
            Heads::new(&geo, &place, None, false).begin(io, Spot::first(0))?;
        }
        let edit = self.edit(&Scope::All)?;
        edit.change(|state, change| {
            let mut sb = state.sb.clone();
            place.write(&mut sb);
            change.super_block = Some(Box::new((sb, state.geo.clone())));
            Ok(())
        })
    }
}
