//! Reading the metadata of all blobs, from a list of roots or by a scan of the whole region.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use pumice_bdev::{DmaBuf, Op};

use super::alloc::{Bitmap, iter_words};
use super::error::Error;
use super::extents::ExtentMap;
use super::format::{
    BlobId, BlobReader, BlobRecord, EXTENTS_PER_PAGE, ExtentPage, MapRecord, PAGE_SIZE, Page,
    PageError, PageHeader, PageProblem, Run, TableEntry, decode_extent_page, page_crc, stored_crc,
};
use super::geometry::Geometry;
use super::mdio::MdIo;
use super::meta::{BlobMeta, Trailing};

/// Pages that one read takes.
const READ_PAGES: u32 = 256;
/// Unneeded pages that are read along rather than beginning another read.
const GAP_PAGES: u32 = 16;
/// How often the clusters of a store may be claimed in all; twice is legal for a moment (a snapshot being
/// made or removed). A hostile image must not take memory without bound.
const CLAIMS_PER_CLUSTER: u64 = 4;

/// Which pages are roots.
pub(crate) enum Roots<'a> {
    /// Those that a scan of all pages shows to be, and those of a mask, if there is one to be believed.
    Scan(Option<&'a [u64]>),
    /// Those of a mask.
    Mask(&'a [u64]),
}

/// What the metadata region holds.
#[derive(Debug)]
pub(crate) struct Scan {
    /// By root page.
    pub blobs: BTreeMap<u32, BlobMeta>,
    /// Blobs that cannot be used, by root page.
    pub damaged: BTreeMap<u32, PageError>,
    /// Pages that blobs use, damaged ones as far as known.
    pub pages: Bitmap,
    /// Pages that a blob has written, used or not; known after a scan only.
    pub written: Bitmap,
    /// Clusters that the metadata and blobs use.
    pub clusters: Bitmap,
    /// Clusters that more than one blob claims.
    pub shared_clusters: HashSet<u32>,
    /// Extent pages that more than one blob claims.
    pub shared_pages: HashSet<u32>,
    claims: u64,
}

/// A blob whose chain is being read.
struct Partial {
    root: u32,
    reader: BlobReader,
    chain: Vec<u32>,
}

/// Reads all blobs. Fails only if the device cannot be used at all; what is wrong with one blob stands in
/// [`Scan::damaged`].
pub(crate) fn scan(io: &mut MdIo, geo: &Geometry, roots: &Roots<'_>) -> Result<Scan, Error> {
    let mut scan = Scan::empty(geo);
    let records = scan.read_chains(io, geo, roots)?;
    let extent_pages = scan.read_extent_pages(io, geo, &records)?;
    for (record, chain) in records {
        scan.add(geo, record, chain, &extent_pages);
    }
    Ok(scan)
}

impl Scan {
    /// A store without blobs.
    pub fn empty(geo: &Geometry) -> Scan {
        let mut scan = Scan {
            blobs: BTreeMap::new(),
            damaged: BTreeMap::new(),
            pages: Bitmap::new(geo.md_len),
            written: Bitmap::new(geo.md_len),
            clusters: Bitmap::new(geo.total_clusters),
            shared_clusters: HashSet::new(),
            shared_pages: HashSet::new(),
            claims: 0,
        };
        for cluster in 0..geo.first_data_cluster {
            scan.clusters.set(cluster);
        }
        scan
    }

    fn damage(&mut self, root: u32, page: u32, problem: PageProblem) {
        let error = PageError { page, problem };
        tracing::error!(blob = %BlobId::from_page(root), %error, "blob set aside");
        self.damaged.entry(root).or_insert(error);
    }

    /// Reads the chains of all blobs.
    fn read_chains(
        &mut self,
        io: &mut MdIo,
        geo: &Geometry,
        roots: &Roots<'_>,
    ) -> Result<Vec<(BlobRecord, Vec<u32>)>, Error> {
        let mut found: Vec<(Partial, Option<u32>)> = Vec::new();
        let listed = |index: u32| match roots {
            Roots::Scan(None) => false,
            Roots::Scan(Some(words)) | Roots::Mask(words) => {
                words[index as usize / 64] >> (index % 64) & 1 != 0
            }
        };
        let step = READ_PAGES as usize;
        let mut all = (0..geo.md_len)
            .step_by(step)
            .map(|start| start..geo.md_len.min(start.saturating_add(READ_PAGES)));
        let mut some;
        let first: &mut dyn Iterator<Item = Range<u32>> = match roots {
            Roots::Scan(_) => &mut all,
            Roots::Mask(words) => {
                some = ranges(iter_words(words));
                &mut some
            }
        };
        read_pages(io, geo, first, |index, page| {
            let id = BlobId::from_page(index);
            if !listed(index) {
                let (Roots::Scan(_), Ok(page)) = (roots, &page) else {
                    return;
                };
                let header = PageHeader::read(page);
                if header.id.page().is_some() {
                    self.written.set(index);
                }
                if header.id != id || header.sequence != 0 || stored_crc(page) != page_crc(page) {
                    return;
                }
            }
            self.pages.set(index);
            let mut reader = BlobReader::new(id);
            match page
                .map_err(PageProblem::Unreadable)
                .and_then(|page| reader.page(page))
            {
                Ok(next) => found.push((
                    Partial {
                        root: index,
                        reader,
                        chain: Vec::new(),
                    },
                    next,
                )),
                Err(problem) => self.damage(index, index, problem),
            }
        })?;
        found.sort_unstable_by_key(|(partial, _)| partial.root);
        let mut records = Vec::new();
        while !found.is_empty() {
            let mut wanted = BTreeMap::new();
            for (mut partial, next) in found.drain(..) {
                let last = partial.chain.last().copied().unwrap_or(partial.root);
                match next {
                    None => records.push((partial.reader.finish(), partial.chain)),
                    Some(index) if index >= geo.md_len => {
                        self.damage(
                            partial.root,
                            last,
                            PageProblem::PageIndex {
                                index,
                                md_len: geo.md_len,
                            },
                        );
                    }
                    Some(index) if !self.pages.set(index) => {
                        self.damage(partial.root, index, PageProblem::Loop);
                    }
                    Some(index) => {
                        partial.chain.push(index);
                        wanted.insert(index, partial);
                    }
                }
            }
            let wanted_ranges: Vec<_> = ranges(wanted.keys().copied()).collect();
            read_pages(io, geo, &mut wanted_ranges.into_iter(), |index, page| {
                let Some(mut partial) = wanted.remove(&index) else {
                    return;
                };
                match page
                    .map_err(PageProblem::Unreadable)
                    .and_then(|page| partial.reader.page(page))
                {
                    Ok(next) => found.push((partial, next)),
                    Err(problem) => self.damage(partial.root, index, problem),
                }
            })?;
        }
        records.sort_unstable_by_key(|(record, _)| record.id);
        Ok(records)
    }

    /// Reads the extent pages that the tables name.
    fn read_extent_pages(
        &mut self,
        io: &mut MdIo,
        geo: &Geometry,
        records: &[(BlobRecord, Vec<u32>)],
    ) -> Result<HashMap<u32, Result<ExtentPage, PageProblem>>, Error> {
        let entries = records.iter().flat_map(|(record, _)| match &record.map {
            MapRecord::Table { entries, .. } => &entries[..],
            MapRecord::Rle(_) => &[],
        });
        let mut wanted: Vec<u32> = entries
            .map(|entry| entry.page)
            .filter(|page| (1..geo.md_len).contains(page))
            .collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut pages = HashMap::with_capacity(wanted.len());
        let mut wanted_ranges = ranges(wanted.iter().copied());
        read_pages(io, geo, &mut wanted_ranges, |index, page| {
            if wanted.binary_search(&index).is_ok() {
                pages.insert(
                    index,
                    page.map_err(PageProblem::Unreadable)
                        .and_then(decode_extent_page),
                );
            }
        })?;
        Ok(pages)
    }

    /// Claims a cluster for a blob.
    fn claim(&mut self, geo: &Geometry, cluster: u32) -> Result<(), PageProblem> {
        if !geo.is_data_cluster(cluster.into()) {
            let (first, end) = (geo.first_data_cluster, geo.total_clusters);
            return Err(PageProblem::Cluster {
                cluster: cluster.into(),
                first,
                end,
            });
        }
        self.claims += 1;
        if self.claims > CLAIMS_PER_CLUSTER * u64::from(geo.total_clusters) {
            return Err(PageProblem::Claimed(cluster));
        }
        if !self.clusters.set(cluster) {
            self.shared_clusters.insert(cluster);
        }
        Ok(())
    }

    fn add(
        &mut self,
        geo: &Geometry,
        record: BlobRecord,
        chain: Vec<u32>,
        extent_pages: &HashMap<u32, Result<ExtentPage, PageProblem>>,
    ) {
        let root = record.id.page().expect("roots are read by their page");
        let last = chain.last().copied().unwrap_or(root);
        let thin = record.flags.thin();
        let mut meta = BlobMeta {
            id: record.id,
            flags: record.flags,
            xattrs: record.xattrs,
            internal: record.internal,
            table: matches!(record.map, MapRecord::Table { .. }),
            chain,
            extent_pages: BTreeMap::new(),
            map: Arc::new(ExtentMap::new(0, 0, geo.cluster_blocks())),
            trailing: Trailing::default(),
        };
        let result = match record.map {
            MapRecord::Rle(runs) => self
                .add_runs(geo, &runs, thin)
                .map_err(|problem| (last, problem)),
            MapRecord::Table {
                num_clusters,
                entries,
            } => self.add_table(geo, num_clusters, &entries, thin, &mut meta, extent_pages),
        };
        match result {
            Ok(map) => {
                meta.map = Arc::new(map);
                self.blobs.insert(root, meta);
            }
            Err((page, problem)) => self.damage(root, page, problem),
        }
    }

    /// The map of a blob with run-length extents.
    fn add_runs(
        &mut self,
        geo: &Geometry,
        runs: &[Run],
        thin: bool,
    ) -> Result<ExtentMap, PageProblem> {
        let mut problem = None;
        let mut allocated = 0;
        for run in runs.iter().filter(|run| run.cluster != 0) {
            for offset in 0..run.len {
                let cluster = u64::from(run.cluster) + u64::from(offset);
                let claimed = u32::try_from(cluster).map_err(|_| PageProblem::Cluster {
                    cluster,
                    first: geo.first_data_cluster,
                    end: geo.total_clusters,
                });
                if let Err(error) = claimed.and_then(|cluster| self.claim(geo, cluster)) {
                    problem = problem.or(Some(error));
                    break;
                }
                allocated += 1;
            }
        }
        if let Some(problem) = problem {
            return Err(problem);
        }
        let total = runs.iter().map(|run| u64::from(run.len)).sum();
        if !thin && allocated != total {
            return Err(PageProblem::HoleInThick);
        }
        let map = ExtentMap::new(total, allocated, geo.cluster_blocks());
        let mut at = 0;
        for run in runs {
            for offset in (0..run.len).take_while(|_| run.cluster != 0) {
                map.set(at + u64::from(offset), run.cluster + offset);
            }
            at += u64::from(run.len);
        }
        Ok(map)
    }

    /// The map of a blob with an extent table. Everything readable is claimed, damage or not.
    fn add_table(
        &mut self,
        geo: &Geometry,
        table_clusters: u64,
        entries: &[TableEntry],
        thin: bool,
        meta: &mut BlobMeta,
        pages: &HashMap<u32, Result<ExtentPage, PageProblem>>,
    ) -> Result<ExtentMap, (u32, PageProblem)> {
        let root = meta.root();
        let mut problem: Option<(u32, PageProblem)> = None;
        let mut clusters: Vec<(u64, u32)> = Vec::new();
        let mut number = 0; // of the extent page in the blob
        let mut at = 0; // first cluster of the entry
        let mut ended = false; // a short page that is not the last: a shrink was cut
        for (i, entry) in entries.iter().enumerate() {
            let is_last = i + 1 == entries.len();
            let mut complain = |page, error| {
                problem.get_or_insert((page, error));
            };
            if entry.page == 0 {
                if !thin {
                    complain(root, PageProblem::HoleInThick);
                }
                number += entry.count;
                let span = u64::from(entry.count) * EXTENTS_PER_PAGE as u64;
                if !ended {
                    at += if is_last {
                        span.min(table_clusters.saturating_sub(at))
                    } else {
                        span
                    };
                }
                continue;
            }
            if entry.page >= geo.md_len {
                complain(
                    root,
                    PageProblem::PageIndex {
                        index: entry.page,
                        md_len: geo.md_len,
                    },
                );
                continue;
            }
            if !self.pages.set(entry.page) {
                self.shared_pages.insert(entry.page);
            }
            let page = match &pages[&entry.page] {
                Ok(page) => page,
                Err(error) => {
                    complain(entry.page, error.clone());
                    continue;
                }
            };
            let expected = u64::from(number) * EXTENTS_PER_PAGE as u64;
            if u64::from(page.start) != expected {
                complain(
                    entry.page,
                    PageProblem::ExtentPageStart {
                        expected,
                        found: page.start,
                    },
                );
            }
            for (cluster, index) in page.clusters.iter().zip(expected..) {
                if *cluster == 0 {
                    if !thin {
                        complain(entry.page, PageProblem::HoleInThick);
                    }
                    continue;
                }
                match self.claim(geo, *cluster) {
                    Ok(()) if ended => meta.trailing.clusters.push(*cluster),
                    Ok(()) => clusters.push((index, *cluster)),
                    Err(error) => complain(entry.page, error),
                }
            }
            if ended {
                meta.trailing.pages.push(entry.page);
            } else {
                meta.extent_pages.insert(number, entry.page);
                at = expected + page.clusters.len() as u64;
                ended = page.clusters.len() < EXTENTS_PER_PAGE;
            }
            number += 1;
        }
        if let Some(problem) = problem {
            return Err(problem);
        }
        if at > u64::from(u32::MAX) {
            return Err((root, PageProblem::TooManyClusters));
        }
        let map = ExtentMap::new(at, clusters.len() as u64, geo.cluster_blocks());
        for (index, cluster) in clusters {
            map.set(index, cluster);
        }
        Ok(map)
    }
}

/// Groups sorted indices into reads.
fn ranges(indices: impl Iterator<Item = u32>) -> impl Iterator<Item = Range<u32>> {
    let mut indices = indices.peekable();
    std::iter::from_fn(move || {
        let start = indices.next()?;
        let mut end = start + 1;
        while let Some(next) =
            indices.next_if(|next| next - end <= GAP_PAGES && next - start < READ_PAGES)
        {
            end = next + 1;
        }
        Some(start..end)
    })
}

/// Reads ranges of metadata pages, many at a time, and hands over each page with its index. A page that
/// cannot be read comes with the error's text.
fn read_pages(
    io: &mut MdIo,
    geo: &Geometry,
    ranges: &mut dyn Iterator<Item = Range<u32>>,
    mut page: impl FnMut(u32, Result<&Page, String>),
) -> Result<(), Error> {
    let read = |range: Range<u32>| {
        let buf = DmaBuf::new(range.len() * PAGE_SIZE)?;
        Ok(Op::Read {
            lba: geo.md_lba(range.start),
            buf,
        })
    };
    let index_of = |lba: u64| {
        let index = (lba - geo.md_lba(0)) / (geo.md_lba(1) - geo.md_lba(0));
        u32::try_from(index).expect("an index that was given out as u32")
    };
    let mut singly: Vec<Range<u32>> = Vec::new();
    let per_read = u32::try_from(io.max_io_blocks() * geo.block_size / PAGE_SIZE as u64)
        .unwrap_or(u32::MAX)
        .max(1);
    let mut pieces = ranges.flat_map(|range| {
        let end = range.end;
        range
            .step_by(per_read as usize)
            .map(move |start| start..end.min(start.saturating_add(per_read)))
    });
    io.stream(pieces.by_ref().map(read), |op, result| {
        let Op::Read { lba, buf } = op else {
            unreachable!("only reads were submitted")
        };
        let first = index_of(lba);
        match result {
            Ok(()) => {
                for (bytes, index) in buf.chunks_exact(PAGE_SIZE).zip(first..) {
                    page(index, Ok(bytes.try_into().expect("a whole page")));
                }
            }
            Err(error) => {
                tracing::warn!(%error, "reading metadata failed; trying page by page");
                let count = u32::try_from(buf.len() / PAGE_SIZE).expect("at most READ_PAGES");
                singly.extend((first..first + count).map(|index| index..index + 1));
            }
        }
        Ok(())
    })?;
    io.stream(singly.into_iter().map(read), |op, result| {
        let Op::Read { lba, buf } = op else {
            unreachable!("only reads were submitted")
        };
        match result {
            Ok(()) => page(index_of(lba), Ok(buf[..].try_into().expect("a whole page"))),
            Err(error) => page(index_of(lba), Err(error.to_string())),
        }
        Ok(())
    })
}
