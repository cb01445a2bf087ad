//! Clusters and pages: which are free, and which wait for the batch that releases them.

use super::file::MemFile;
use crate::device::CLUSTERS;
use crate::rules::{Release, Rules};

/// Something that durable metadata may still claim.
#[derive(Clone, Copy, Debug)]
pub enum Held {
    Cluster(u8),
    Id(usize),
}

#[derive(Clone, Debug)]
pub struct FreeSpace {
    clusters: Vec<bool>,
    ids: Vec<bool>,
    /// Clusters and pages that wait, with the sequence of the batch that releases them.
    held: Vec<(Held, u32)>,
}

impl FreeSpace {
    /// The space beside these files.
    pub fn around(files: &[Option<MemFile>]) -> FreeSpace {
        let mut clusters = vec![true; CLUSTERS];
        for cluster in files.iter().flatten().flat_map(MemFile::clusters) {
            clusters[usize::from(cluster)] = false;
        }
        FreeSpace {
            clusters,
            ids: files.iter().map(Option::is_none).collect(),
            held: Vec::new(),
        }
    }

    pub fn take_cluster(&mut self) -> Option<u8> {
        let cluster = self.clusters.iter().position(|free| *free)?;
        self.clusters[cluster] = false;
        Some(u8::try_from(cluster).expect("few"))
    }

    pub fn is_free(&self, id: usize) -> bool {
        self.ids[id]
    }

    pub fn take_id(&mut self, id: usize) {
        self.ids[id] = false;
    }

    /// Keeps what the batch `seq` releases for as long as the rules say.
    pub fn hold(&mut self, held: Vec<Held>, seq: u32, r: &Rules) {
        self.held.extend(held.into_iter().map(|h| (h, seq)));
        if r.release == Release::AtOnce {
            self.release_upto(u32::MAX);
        }
    }

    /// Frees what the batches up to `seq` release.
    pub fn release_upto(&mut self, seq: u32) {
        for (held, _) in self.held.extract_if(.., |(_, s)| *s <= seq) {
            match held {
                Held::Cluster(c) => self.clusters[usize::from(c)] = true,
                Held::Id(id) => self.ids[id] = true,
            }
        }
    }
}
