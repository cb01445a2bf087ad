//! Damaged blobs: collects what their undamaged metadata pages show, and reads the known clusters
//! from the device.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf};
use pumice_blobfs::blobstore::BlobId;
use pumice_blobfs::blobstore::dump::{CarriedBytes, Dump};
use pumice_blobfs::blobstore::format::{
    Content, Descriptors, Page, PageHeader, TYPE_XATTR, page_crc, stored_crc,
};

use super::copy::{Copied, into_range};
use super::target::Target;
use super::{Loss, Outcome};

/// Directory of the copies.
const PLACE: &str = "/damaged";

/// The state of a cluster of a blob, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// The cluster is not allocated, so it reads as zeroes.
    Zeroes,
    /// The cluster's place in the store.
    At(u32),
}

/// The content of a metadata page.
#[derive(Debug, Default, Clone)]
struct Said {
    sequence: u32,
    next: u32,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Runs of clusters: place (0: none) and length.
    runs: Vec<(u32, u32)>,
    /// Number of clusters and the extent pages, if there is a table.
    table: Option<(u64, Vec<u32>)>,
    /// First cluster and the places, in an extent page.
    extents: Option<(u32, Vec<u32>)>,
}

/// The geometry of the store, from its super block.
struct Store {
    cluster_size: u64,
    total_clusters: u64,
    max_io_bytes: u64,
    block_size: u64,
    /// Bytes of blobs that the journal has.
    carried: Vec<CarriedBytes>,
    /// The blob that holds the journal. It is not a file.
    journal: Option<BlobId>,
}

/// Whether the device has a file system's super block that leads to metadata pages.
pub fn has_pages(dev: &Arc<dyn BlockDevice>) -> bool {
    let Ok(mut dump) = Dump::open(dev) else {
        return false;
    };
    let mut any = false;
    let is_ours = &dump.super_block().signature == b"SPDKBLOB";
    is_ours && dump.pages(|_, _| any = true).is_ok() && any
}

/// Copies what is left of the blobs in `only`, or of all without it.
pub fn blobs(
    dev: &Arc<dyn BlockDevice>,
    only: Option<&[BlobId]>,
    target: &Target,
    outcome: &mut Outcome,
) {
    let (store, pages) = match collect(dev, only) {
        Ok(found) => found,
        Err(e) => {
            outcome.lose(PLACE, format!("damaged metadata cannot be read: {e}"));
            return;
        }
    };
    let ch = match dev.open_channel() {
        Ok(ch) => AsyncChannel::new(ch),
        Err(e) => {
            outcome.lose(PLACE, e.to_string());
            return;
        }
    };
    let mut ids: Vec<BlobId> = only.map_or_else(
        || pages.keys().map(|(id, _)| *id).collect(),
        <[BlobId]>::to_vec,
    );
    ids.retain(|id| Some(*id) != store.journal);
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        one(&store, &ch, id, &pages, target, outcome);
    }
}

type Pages = HashMap<(BlobId, u32), Said>;

fn collect(dev: &Arc<dyn BlockDevice>, only: Option<&[BlobId]>) -> Result<(Store, Pages), String> {
    let mut dump = Dump::open(dev).map_err(|e| e.to_string())?;
    let (carried, journal) = dump.replay();
    let sb = dump.super_block();
    let cluster_size = u64::from(sb.cluster_size.get());
    let info = dev.info();
    let size = sb.size.get().min(info.len_bytes());
    let block_size = u64::from(info.block_size);
    let store = Store {
        cluster_size,
        total_clusters: size.checked_div(cluster_size).unwrap_or(0),
        max_io_bytes: info.transfer_blocks(1 << 20) * block_size,
        block_size,
        carried,
        journal,
    };
    let wanted: Option<HashSet<BlobId>> = only.map(|ids| ids.iter().copied().collect());
    let mut pages = Pages::new();
    dump.pages(|index, page| {
        let id = PageHeader::read(page).id;
        let is_wanted = wanted.as_ref().is_none_or(|ids| ids.contains(&id));
        if is_wanted && id.page().is_some() && stored_crc(page) == page_crc(page) {
            pages.insert((id, index), read_page(page));
        }
    })
    .map_err(|e| e.to_string())?;
    Ok((store, pages))
}

fn read_page(page: &Page) -> Said {
    let header = PageHeader::read(page);
    let mut said = Said {
        sequence: header.sequence,
        next: header.next,
        ..Said::default()
    };
    for descriptor in Descriptors::new(page) {
        let Ok(descriptor) = descriptor else { break };
        match descriptor.content() {
            Some(Content::Xattr(xattr)) if descriptor.kind == TYPE_XATTR => {
                if let Some((name, value)) = xattr.name_and_value() {
                    said.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
            Some(Content::Runs(runs)) => said.runs.extend(runs.pairs()),
            Some(Content::Table {
                num_clusters,
                entries,
            }) => {
                let listed = entries.pairs().map(|(page, _)| page);
                let table = said.table.get_or_insert((num_clusters, Vec::new()));
                table.0 = num_clusters;
                table.1.extend(listed.filter(|page| *page != 0));
            }
            Some(Content::ExtentPage { start, clusters }) => {
                said.extents = Some((start, clusters.iter().collect()));
            }
            _ => {}
        }
    }
    said
}

/// The facts that are known about a blob.
#[derive(Default)]
struct Remains {
    xattrs: HashMap<Vec<u8>, Vec<u8>>,
    clusters: BTreeMap<u64, Known>,
    /// Number of clusters, if a page has it.
    num_clusters: Option<u64>,
}

impl Remains {
    fn of(id: BlobId, pages: &Pages, store: &Store) -> Remains {
        let mut remains = Remains::default();
        let mut chain = Vec::new();
        // The chain from the root on, as far as it is undamaged.
        let mut at = id.page();
        while let Some(index) = at
            && let Some(said) = pages.get(&(id, index))
            && said.sequence as usize == chain.len()
        {
            chain.push(said);
            at = Some(said.next);
        }
        let listed: Option<Vec<u32>> = if chain.is_empty() {
            // Without a root, every page that the blob wrote is used.
            let mut all: Vec<_> = pages.iter().filter(|((of, _), _)| *of == id).collect();
            all.sort_unstable_by_key(|((_, index), said)| (said.sequence, *index));
            for (_, said) in all {
                remains.take_xattrs(said);
            }
            None
        } else {
            let mut listed = None;
            let mut cluster = 0;
            for said in &chain {
                remains.take_xattrs(said);
                remains.take_runs(&said.runs, &mut cluster, store);
                if let Some((clusters, pages)) = &said.table {
                    remains.num_clusters = Some(*clusters);
                    let all: &mut Vec<u32> = listed.get_or_insert_default();
                    all.extend(pages);
                }
            }
            Some(listed.unwrap_or_default())
        };
        for ((of, index), said) in pages {
            let is_listed = listed.as_ref().is_none_or(|l| l.contains(index));
            if let Some((first, places)) = &said.extents
                && *of == id
                && is_listed
            {
                for (cluster, place) in (u64::from(*first)..).zip(places) {
                    remains.take(cluster, *place, store);
                }
            }
        }
        remains
    }

    fn take_xattrs(&mut self, said: &Said) {
        for (name, value) in &said.xattrs {
            self.xattrs
                .entry(name.clone())
                .or_insert_with(|| value.clone());
        }
    }

    fn take_runs(&mut self, runs: &[(u32, u32)], cluster: &mut u64, store: &Store) {
        for (place, len) in runs {
            for n in 0..u64::from(*len).min(store.total_clusters) {
                let place = match place {
                    0 => 0,
                    first => first.saturating_add(u32::try_from(n).unwrap_or(u32::MAX)),
                };
                self.take(*cluster + n, place, store);
            }
            *cluster += u64::from(*len);
        }
        if !runs.is_empty() {
            self.num_clusters = Some(*cluster);
        }
    }

    fn take(&mut self, cluster: u64, place: u32, store: &Store) {
        let known = match place {
            0 => Known::Zeroes,
            place if u64::from(place) < store.total_clusters => Known::At(place),
            _ => return,
        };
        self.clusters.insert(cluster, known);
    }

    fn xattr(&self, name: &str) -> Option<&[u8]> {
        self.xattrs.get(name.as_bytes()).map(Vec::as_slice)
    }

    /// Returns the number of bytes of the file, at most those of the store.
    fn len(&self, store: &Store) -> u64 {
        let last = self.clusters.keys().next_back().map_or(0, |last| last + 1);
        let clusters = self.num_clusters.unwrap_or(last).min(store.total_clusters);
        let room = clusters.saturating_mul(store.cluster_size);
        let length = self.xattr("length").and_then(|v| v.try_into().ok());
        length
            .map_or(room, u64::from_le_bytes)
            .min(store.total_clusters.saturating_mul(store.cluster_size))
    }
}

fn one(
    store: &Store,
    ch: &AsyncChannel,
    id: BlobId,
    pages: &Pages,
    target: &Target,
    outcome: &mut Outcome,
) {
    let remains = Remains::of(id, pages, store);
    if remains.xattr("is_deleted").is_some() {
        return;
    }
    let name = remains.xattr("name").map(|raw| {
        let raw = raw.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(raw).into_owned()
    });
    let shown = name.clone().unwrap_or_else(|| format!("blob {id}"));
    if remains.xattr("pumice.dir").is_some() {
        outcome.lose(&shown, "a directory with damaged metadata");
        return;
    }
    if remains.clusters.is_empty() {
        outcome.lose(
            &shown,
            "damaged metadata: the place of its data is not known",
        );
        return;
    }
    let path = match &name {
        Some(name) => format!("{PLACE}/{name}"),
        None => format!("{PLACE}/blob-{id}"),
    };
    let (file, at) = match target.file(&path) {
        Ok(made) => made,
        Err(e) => {
            outcome.lose(&shown, format!("the copy {path} cannot be made: {e}"));
            return;
        }
    };
    match read_all(store, ch, id, &remains, &file) {
        Ok(copied) => {
            outcome.files += 1;
            outcome.bytes += copied.bytes;
            outcome.losses.push(Loss {
                path: shown,
                why: format!(
                    "damaged metadata; the recovered part is in {}",
                    at.display()
                ),
                holes: copied.holes,
            });
        }
        Err(e) => outcome.lose(&shown, e),
    }
}

fn read_all(
    store: &Store,
    ch: &AsyncChannel,
    id: BlobId,
    remains: &Remains,
    file: &std::fs::File,
) -> Result<Copied, String> {
    let len = remains.len(store);
    file.set_len(len).map_err(|e| format!("the copy: {e}"))?;
    let mut copied = Copied::default();
    let mut next = 0;
    let size = store.cluster_size;
    for (cluster, known) in &remains.clusters {
        let start = cluster.saturating_mul(size);
        if start >= len {
            break;
        }
        let end = start.saturating_add(size).min(len);
        if next < start {
            copied.miss(next..start, "damaged metadata");
        }
        next = end;
        match known {
            Known::Zeroes => copied.bytes += end - start,
            Known::At(place) => {
                let base = u64::from(*place) * size;
                let read = |offset: u64, buf: &mut [u8]| {
                    read_device(store, ch, base + (offset - start), buf)
                };
                into_range(file, start..end, &read, &mut copied)?;
            }
        }
    }
    if next < len {
        copied.miss(next..len, "damaged metadata");
    }
    for carried in store.carried.iter().filter(|carried| carried.blob == id) {
        let room = len.saturating_sub(carried.offset);
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let bytes = &carried.bytes[..carried.bytes.len().min(room)];
        file.write_all_at(bytes, carried.offset)
            .map_err(|e| format!("the copy: {e}"))?;
    }
    file.sync_all().map_err(|e| format!("the copy: {e}"))?;
    Ok(copied)
}

fn read_device(
    store: &Store,
    ch: &AsyncChannel,
    offset: u64,
    buf: &mut [u8],
) -> Result<(), String> {
    let mut done = 0;
    while done < buf.len() {
        let wanted = (buf.len() - done) as u64;
        let n = wanted.min(store.max_io_bytes);
        let whole =
            usize::try_from(n.next_multiple_of(store.block_size)).map_err(|e| e.to_string())?;
        let piece = DmaBuf::new(whole).map_err(|e| e.to_string())?;
        let lba = (offset + done as u64) / store.block_size;
        let read = ch
            .block_on(ch.read(lba, piece))
            .map_err(|e| e.to_string())?;
        let n = usize::try_from(n).map_err(|e| e.to_string())?;
        buf[done..done + n].copy_from_slice(&read[..n]);
        done += n;
    }
    Ok(())
}
