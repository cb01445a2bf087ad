//! Reading the metadata of all blobs, from a list of roots or by a scan of the whole region.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use super::alloc::{Bitmap, iter_words};
use super::error::Error;
use super::extents::ExtentMap;
use super::format::{
    BlobId, BlobReader, BlobRecord, Descriptors, EXTENTS_PER_PAGE, ExtentPage, MapRecord, Page,
    PageError, PageHeader, PageProblem, Run, TYPE_EXTENT_PAGE, TableEntry, decode_extent_page,
    page_crc, stored_crc,
};
use super::geometry::Geometry;
use super::mdio::MdIo;
use super::meta::{BlobMeta, Trailing};
use super::pages::{all_ranges, ranges, read_pages};
use super::remains::Remains;

/// Most claims of the store's clusters, per cluster. Two are legal for a moment (a snapshot being
/// made or removed). A hostile image must not take unbounded memory.
const CLAIMS_PER_CLUSTER: u64 = 4;

/// The source of the roots.
pub(crate) enum Roots<'a> {
    /// A scan of all pages finds them.
    Scan {
        /// A trusted mask, if there is one. Its pages are roots, whatever they contain.
        sure: Option<&'a [u64]>,
        /// The mask of the last orderly unload, if there is one. Its pages were roots then.
        past: Option<&'a [u64]>,
    },
    /// A mask has them.
    Mask(&'a [u64]),
}

impl Roots<'_> {
    /// Whether the trusted mask has this page.
    fn lists(&self, index: u32) -> bool {
        match self {
            Roots::Scan { sure, .. } => sure.is_some_and(|words| bit(words, index)),
            Roots::Mask(words) => bit(words, index),
        }
    }
}

fn bit(words: &[u64], index: u32) -> bool {
    words
        .get(index as usize / 64)
        .is_some_and(|word| word >> (index % 64) & 1 != 0)
}

/// The content of the metadata region.
#[derive(Debug)]
pub(crate) struct Scan {
    /// Blobs by root page.
    pub blobs: BTreeMap<u32, BlobMeta>,
    /// Blobs that cannot be used, by root page.
    pub damaged: BTreeMap<u32, PageError>,
    /// The readable parts of damaged blobs, by root page.
    pub remains: BTreeMap<u32, Remains>,
    /// Pages that blobs use, including those of damaged blobs as far as they are known.
    pub pages: Bitmap,
    /// Pages that a blob has written, used or not. They are known after a scan only.
    pub written: Bitmap,
    /// Clusters that the metadata and blobs use.
    pub clusters: Bitmap,
    /// Clusters that more than one blob claims.
    pub shared_clusters: HashSet<u32>,
    /// Extent pages that more than one blob claims.
    pub shared_pages: HashSet<u32>,
    claims: u64,
    /// Pages that may be damaged roots, unless a blob names them.
    suspects: Vec<(u32, PageProblem)>,
    /// Undamaged pages with another blob's id in their header: the root of that blob, and the page.
    others: Vec<(u32, u32)>,
}

/// A blob whose chain is being read.
struct Partial {
    root: u32,
    reader: BlobReader,
    chain: Vec<u32>,
}

/// Reads all blobs. Fails only if the device cannot be used at all. Errors of a blob are in
/// [`Scan::damaged`].
pub(crate) fn scan(io: &mut MdIo, geo: &Geometry, roots: &Roots<'_>) -> Result<Scan, Error> {
    let mut scan = Scan::empty(geo);
    let records = scan.read_chains(io, geo, roots)?;
    let extent_pages = scan.read_extent_pages(io, geo, &records)?;
    for (record, chain) in records {
        scan.add(geo, record, chain, &extent_pages);
    }
    scan.judge_suspects();
    scan.claim_of_damaged(io, geo)?;
    Ok(scan)
}

impl Scan {
    /// Returns the result for a store without blobs.
    pub fn empty(geo: &Geometry) -> Scan {
        let mut scan = Scan {
            blobs: BTreeMap::new(),
            damaged: BTreeMap::new(),
            remains: BTreeMap::new(),
            pages: Bitmap::new(geo.md_len),
            written: Bitmap::new(geo.md_len),
            clusters: Bitmap::new(geo.total_clusters),
            shared_clusters: HashSet::new(),
            shared_pages: HashSet::new(),
            claims: 0,
            suspects: Vec::new(),
            others: Vec::new(),
        };
        for cluster in geo.own_clusters() {
            scan.clusters.set(cluster);
        }
        scan
    }

    fn damage(&mut self, root: u32, page: u32, problem: PageProblem) {
        let error = PageError { page, problem };
        tracing::error!(blob = %BlobId::from_page(root), %error, "blob set aside");
        self.damaged.entry(root).or_insert(error);
    }

    /// Records damage behind an undamaged root.
    fn damage_partial(&mut self, partial: &Partial, page: u32, problem: PageProblem) {
        let remains = Remains::named(partial.reader.xattr(b"name"));
        self.remains.insert(partial.root, remains);
        self.damage(partial.root, page, problem);
    }

    /// Reads the chains of all blobs.
    fn read_chains(
        &mut self,
        io: &mut MdIo,
        geo: &Geometry,
        roots: &Roots<'_>,
    ) -> Result<Vec<(BlobRecord, Vec<u32>)>, Error> {
        let mut found: Vec<(Partial, Option<u32>)> = Vec::new();
        let mut all = all_ranges(geo);
        let mut some;
        let first: &mut dyn Iterator<Item = Range<u32>> = match roots {
            Roots::Scan { .. } => &mut all,
            Roots::Mask(words) => {
                some = ranges(iter_words(words));
                &mut some
            }
        };
        read_pages(io, geo, first, |index, page| {
            let id = BlobId::from_page(index);
            if !roots.lists(index) {
                match self.look_at(geo, roots, index, &page) {
                    Kind::Root => {}
                    Kind::Other => return,
                    Kind::Suspect(problem) => {
                        self.suspects.push((index, problem));
                        return;
                    }
                }
            }
            if let Ok(page) = &page {
                self.note_name(index, page);
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
                        let md_len = geo.md_len;
                        self.damage_partial(
                            &partial,
                            last,
                            PageProblem::PageIndex { index, md_len },
                        );
                    }
                    Some(index) if !self.pages.set(index) => {
                        self.damage_partial(&partial, index, PageProblem::Loop);
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
                    Err(problem) => self.damage_partial(&partial, index, problem),
                }
            })?;
        }
        records.sort_unstable_by_key(|(record, _)| record.id);
        Ok(records)
    }

    /// Determines what an unlisted page is, as far as the page alone shows.
    fn look_at(
        &mut self,
        geo: &Geometry,
        roots: &Roots<'_>,
        index: u32,
        page: &Result<&Page, String>,
    ) -> Kind {
        let Roots::Scan { past, .. } = roots else {
            return Kind::Other;
        };
        let page = match page {
            Ok(page) => page,
            Err(error) => return Kind::Suspect(PageProblem::Unreadable(error.clone())),
        };
        let header = PageHeader::read(page);
        let (stored, computed) = (stored_crc(page), page_crc(page));
        let owner = header.id.page();
        if owner.is_some() {
            self.written.set(index);
        }
        if owner == Some(index) && header.sequence == 0 {
            // A page with the id of its own place is a root, damaged or not, since no other page
            // has that id.
            return Kind::Root;
        }
        if stored == computed {
            if let Some(root) = owner.filter(|root| *root < geo.md_len) {
                self.others.push((root, index));
            }
            return Kind::Other;
        }
        let was_root = past.is_some_and(|words| bit(words, index));
        let first_sector_is_blank = page[..512].iter().all(|byte| *byte == 0);
        let blank = first_sector_is_blank && (!was_root || page.iter().all(|byte| *byte == 0));
        // A crash before the commit cut the change that wrote it, and tore it: it is a page of a
        // chain or of extents.
        let of_another = owner.is_some_and(|root| root < geo.md_len && root != index)
            && (header.sequence != 0 || first_kind(page) == Some(TYPE_EXTENT_PAGE));
        if blank || (of_another && !was_root) {
            return Kind::Other;
        }
        Kind::Suspect(PageProblem::Crc { stored, computed })
    }

    /// Marks pages that nobody names and that may be roots as damaged roots.
    fn judge_suspects(&mut self) {
        for (index, problem) in std::mem::take(&mut self.suspects) {
            if self.pages.set(index) {
                self.damage(index, index, problem);
            }
        }
    }

    /// Claims the undamaged pages with the id of a damaged blob, and the clusters that they name,
    /// for that blob.
    fn claim_of_damaged(&mut self, io: &mut MdIo, geo: &Geometry) -> Result<(), Error> {
        let others = std::mem::take(&mut self.others);
        let mut pages: Vec<u32> = others
            .into_iter()
            .filter(|(root, _)| self.damaged.contains_key(root))
            .map(|(_, page)| page)
            .filter(|page| self.pages.set(*page))
            .collect();
        pages.sort_unstable();
        let mut clusters = Vec::new();
        read_pages(
            io,
            geo,
            &mut ranges(pages.iter().copied()),
            |index, page| {
                if pages.binary_search(&index).is_ok()
                    && let Ok(page) = page
                    && let Ok(page) = decode_extent_page(page)
                {
                    clusters.extend(page.clusters.into_iter().filter(|cluster| *cluster != 0));
                }
            },
        )?;
        for cluster in clusters {
            if geo.is_data_cluster(cluster.into()) {
                self.clusters.set(cluster);
            }
        }
        Ok(())
    }

    /// Records the name in a root, damaged or not, for messages.
    fn note_name(&mut self, index: u32, page: &Page) {
        let remains = Remains::of_page(page);
        if remains.name.is_some() {
            self.remains.insert(index, remains);
        }
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
            let (first, end) = (geo.first_data_cluster(), geo.total_clusters);
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
            Err((page, problem)) => {
                let remains = Remains::named(meta.xattr(b"name").map(|name| &**name));
                self.remains.insert(root, remains);
                self.damage(root, page, problem);
            }
        }
    }

    /// Adds the map of a blob with run-length extents.
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
                    first: geo.first_data_cluster(),
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

    /// Adds the map of a blob with an extent table. Everything readable is claimed, even if there
    /// is damage.
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

/// The kind of a page, as far as the page alone shows it.
enum Kind {
    /// The root of a blob, damaged or not.
    Root,
    /// Not a root: free, or a page that a blob names or has named.
    Other,
    /// Possibly a root.
    Suspect(PageProblem),
}

/// Returns the type of a page's first descriptor.
fn first_kind(page: &Page) -> Option<u8> {
    Some(Descriptors::new(page).next()?.ok()?.kind)
}
