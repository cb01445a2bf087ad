//! The map of a blob's clusters, [`ExtentMap`], which is read without a lock.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use super::format::{EXTENTS_PER_PAGE, Run};

/// Number of entries of a node of a sparse map.
const NODE: usize = 512;
/// Number of clusters under one entry of a sparse map's top.
const TOP_SPAN: usize = NODE * NODE;
/// Largest map that is always dense.
const DENSE_MAX: usize = 4096;

type Leaf = Box<[AtomicU32]>;
type Node = Box<[OnceLock<Leaf>]>;

/// Maps a cluster of a blob to a cluster of the store, or to 0 if it is not allocated.
///
/// Readers take no lock. A resize makes a new map. A cluster that a thin blob allocates or frees is
/// changed in place. A huge thin blob uses memory only for its allocated clusters.
#[derive(Debug)]
pub struct ExtentMap {
    num_clusters: usize,
    blocks_per_cluster: u64,
    repr: Repr,
}

#[derive(Debug)]
enum Repr {
    Dense(Box<[AtomicU32]>),
    Sparse(Box<[OnceLock<Node>]>),
}

fn atoms(len: usize) -> Box<[AtomicU32]> {
    (0..len).map(|_| AtomicU32::new(0)).collect()
}

impl ExtentMap {
    /// Makes a map of unallocated clusters, of which about `expected` will be allocated.
    pub(crate) fn new(num_clusters: u64, expected: u64, blocks_per_cluster: u64) -> ExtentMap {
        let num_clusters = usize::try_from(num_clusters).expect("at most 2^32 clusters");
        let dense = num_clusters <= DENSE_MAX || num_clusters as u64 / 4 <= expected;
        let repr = if dense {
            Repr::Dense(atoms(num_clusters))
        } else {
            Repr::Sparse(
                (0..num_clusters.div_ceil(TOP_SPAN))
                    .map(|_| OnceLock::new())
                    .collect(),
            )
        };
        ExtentMap {
            num_clusters,
            blocks_per_cluster,
            repr,
        }
    }

    /// Number of clusters of the blob.
    #[must_use]
    pub fn num_clusters(&self) -> u64 {
        self.num_clusters as u64
    }

    /// Returns the cluster of the store that is cluster `index` of the blob.
    #[inline]
    #[must_use]
    pub fn cluster(&self, index: u64) -> Option<u32> {
        let index = usize::try_from(index).ok()?;
        match self.get(index) {
            0 => None,
            cluster => Some(cluster),
        }
    }

    /// Returns the first device block of cluster `index` of the blob, or `None` if it is not
    /// allocated (or lies past the end).
    #[inline]
    #[must_use]
    pub fn lba(&self, index: u64) -> Option<u64> {
        self.cluster(index)
            .map(|cluster| u64::from(cluster) * self.blocks_per_cluster)
    }

    #[inline]
    fn get(&self, index: usize) -> u32 {
        match &self.repr {
            Repr::Dense(entries) => entries
                .get(index)
                .map_or(0, |entry| entry.load(Ordering::Acquire)),
            Repr::Sparse(top) => {
                let node = top.get(index / TOP_SPAN).and_then(OnceLock::get);
                let leaf = node.and_then(|node| node[index % TOP_SPAN / NODE].get());
                leaf.map_or(0, |leaf| leaf[index % NODE].load(Ordering::Acquire))
            }
        }
    }

    /// Changes an entry; 0 stands for unallocated.
    pub(crate) fn set(&self, index: u64, cluster: u32) {
        let index = usize::try_from(index).expect("at most 2^32 clusters");
        assert!(
            index < self.num_clusters,
            "cluster {index} of {}",
            self.num_clusters
        );
        match &self.repr {
            Repr::Dense(entries) => entries[index].store(cluster, Ordering::Release),
            Repr::Sparse(top) => {
                let node = top[index / TOP_SPAN]
                    .get_or_init(|| (0..NODE).map(|_| OnceLock::new()).collect());
                let leaf = node[index % TOP_SPAN / NODE].get_or_init(|| atoms(NODE));
                leaf[index % NODE].store(cluster, Ordering::Release);
            }
        }
    }

    /// The allocated clusters, in order: (index in the blob, cluster of the store).
    pub fn allocated(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        let dense: &[AtomicU32] = match &self.repr {
            Repr::Dense(entries) => entries,
            Repr::Sparse(_) => &[],
        };
        let top: &[OnceLock<Node>] = match &self.repr {
            Repr::Dense(_) => &[],
            Repr::Sparse(top) => top,
        };
        let leaves = top
            .iter()
            .enumerate()
            .filter_map(|(i, node)| Some((i * TOP_SPAN, node.get()?)));
        let leaves = leaves.flat_map(|(at, node)| {
            node.iter()
                .enumerate()
                .filter_map(move |(i, leaf)| Some((at + i * NODE, &leaf.get()?[..])))
        });
        std::iter::once((0, dense))
            .chain(leaves)
            .flat_map(|(at, leaf)| {
                leaf.iter().enumerate().filter_map(move |(i, entry)| {
                    let cluster = entry.load(Ordering::Acquire);
                    (cluster != 0).then_some(((at + i) as u64, cluster))
                })
            })
    }

    /// Number of allocated clusters.
    #[must_use]
    pub fn num_allocated(&self) -> u64 {
        self.allocated().count() as u64
    }

    /// Returns a map of another size with the same clusters, without those past its end.
    pub(crate) fn resized(&self, num_clusters: u64, expected: u64) -> ExtentMap {
        let map = ExtentMap::new(num_clusters, expected, self.blocks_per_cluster);
        for (index, cluster) in self
            .allocated()
            .take_while(|(index, _)| *index < num_clusters)
        {
            map.set(index, cluster);
        }
        map
    }

    /// Returns the entries of extent page `number`, as many as it must have.
    pub(crate) fn page(&self, number: u32) -> Vec<u32> {
        let start = number as usize * EXTENTS_PER_PAGE;
        let end = self.num_clusters.min(start + EXTENTS_PER_PAGE);
        (start..end).map(|index| self.get(index)).collect()
    }

    /// Number of extent pages of the blob.
    pub(crate) fn num_pages(&self) -> u32 {
        u32::try_from(self.num_clusters.div_ceil(EXTENTS_PER_PAGE)).expect("at most 2^32 clusters")
    }

    /// Returns the clusters as runs, with `patches` (index, cluster) applied.
    pub(crate) fn runs(&self, patches: &[(u64, u32)]) -> Vec<Run> {
        let mut runs = Runs::default();
        if patches.is_empty() {
            self.allocated()
                .for_each(|(index, cluster)| runs.add(index, cluster));
        } else {
            let patches: BTreeMap<u64, u32> = patches.iter().copied().collect();
            let mut patched: Vec<(u64, u32)> = self
                .allocated()
                .filter(|(index, _)| !patches.contains_key(index))
                .collect();
            patched.extend(patches.into_iter().filter(|(_, cluster)| *cluster != 0));
            patched.sort_unstable();
            for (index, cluster) in patched {
                runs.add(index, cluster);
            }
        }
        runs.end(self.num_clusters())
    }
}

/// Clusters that become runs, in order.
#[derive(Default)]
struct Runs {
    runs: Vec<Run>,
    /// The cluster of the blob behind the last one.
    at: u64,
}

impl Runs {
    #[inline]
    fn add(&mut self, index: u64, cluster: u32) {
        self.gap(index);
        self.at = index + 1;
        match self.runs.last_mut() {
            Some(run)
                if run.cluster != 0
                    && u64::from(run.cluster) + u64::from(run.len) == u64::from(cluster) =>
            {
                run.len += 1;
            }
            _ => self.runs.push(Run { cluster, len: 1 }),
        }
    }

    /// Adds unallocated clusters up to this one.
    #[inline]
    fn gap(&mut self, to: u64) {
        if to != self.at {
            self.runs.push(Run {
                cluster: 0,
                len: u32::try_from(to - self.at).expect("at most 2^32 clusters"),
            });
        }
    }

    fn end(mut self, num_clusters: u64) -> Vec<Run> {
        self.gap(num_clusters);
        self.runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dense_and_sparse_agree() {
        for n in [0u64, 1, 511, 512, 513, 4096, 5000, 300_000] {
            let sparse = ExtentMap::new(n, 0, 8);
            let dense = ExtentMap::new(n, n, 8);
            for index in (0..n).filter(|i| i % 7 == 3 || (1000..1100).contains(i)) {
                let cluster = u32::try_from(index + 1).unwrap();
                sparse.set(index, cluster);
                dense.set(index, cluster);
            }
            assert!(sparse.allocated().eq(dense.allocated()), "{n}");
            assert_eq!(sparse.runs(&[]), dense.runs(&[]));
            assert_eq!(
                sparse
                    .runs(&[])
                    .iter()
                    .map(|r| u64::from(r.len))
                    .sum::<u64>(),
                n
            );
            for page in 0..sparse.num_pages() {
                assert_eq!(sparse.page(page), dense.page(page));
            }
            assert_eq!(sparse.lba(3), (n > 3).then_some(32));
            assert_eq!(sparse.lba(n), None);
            assert!(
                sparse
                    .resized(n / 2, 0)
                    .allocated()
                    .eq(dense.allocated().take_while(|(i, _)| *i < n / 2))
            );
        }
    }

    #[test]
    fn a_huge_thin_map_is_small() {
        let map = ExtentMap::new(u64::from(u32::MAX), 0, 8);
        map.set(u64::from(u32::MAX) - 1, 9);
        assert_eq!(
            map.allocated().collect::<Vec<_>>(),
            [(u64::from(u32::MAX) - 1, 9)]
        );
        assert_eq!(map.page(map.num_pages() - 1).last(), Some(&9));
        assert_eq!(map.runs(&[(5, 7), (6, 8)]).len(), 4);
    }

    /// Clusters behind a hole follow nothing, also if their numbers continue its length.
    #[test]
    fn a_hole_stays_a_hole() {
        let map = ExtentMap::new(9, 9, 8);
        for (index, cluster) in [(2, 2), (3, 3), (7, 4)] {
            map.set(index, cluster);
        }
        let run = |cluster, len| Run { cluster, len };
        let holes = [run(0, 2), run(2, 2), run(0, 3), run(4, 1), run(0, 1)];
        assert_eq!(map.runs(&[]), holes);
        // Patches replace, add and free, in their places.
        let patched = map.runs(&[(7, 9), (3, 0), (0, 6)]);
        let runs = patched.iter().flat_map(|run| {
            (0..run.len).map(|n| if run.cluster == 0 { 0 } else { run.cluster + n })
        });
        assert_eq!(runs.collect::<Vec<_>>(), [6, 0, 2, 0, 0, 0, 0, 9, 0]);
    }
}
