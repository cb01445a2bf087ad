//! `fsck`: checks the content of a device without writing.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

#[cfg(doc)]
use pumice_bdev::BdevError;
use pumice_bdev::{BlockDevice, DeviceInfo};

use super::alloc::{Bitmap, iter_words};
use super::error::Error;
use super::format::{BlobId, PAGE_SIZE_U64, PageError, SuperBlock};
use super::geometry::{Geometry, tears_pages};
use super::journal::format::RingPlace;
use super::journal::recovery::{self, Treat};
use super::masks::Masks;
use super::mdio::MdIo;
use super::meta::{BlobMeta, Parent, SNAPRM, SNAPTMP, Trailing};
use super::scan::{Roots, Scan, scan};
use super::steady::Steady;
use super::super_page::{self, Found};
use super::{Blobstore, LoadOptions};

/// The severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Legal: what a crash leaves, or other information.
    Note,
    /// Wrong, and corrected by a repair without losing anything.
    Repairable,
    /// Wrong, and not corrected without losing something: a repair removes damaged blobs, and
    /// leaves clusters with several owners as they are.
    Error,
}

/// A finding of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// The severity.
    pub severity: Severity,
    /// A description with the place.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Note => "note",
            Severity::Repairable => "error (repairable)",
            Severity::Error => "error",
        };
        write!(f, "{severity}: {}", self.text)
    }
}

/// The result of a check.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// The findings in the order of the checks.
    pub findings: Vec<Finding>,
    /// Number of blobs that can be read.
    pub blobs: u64,
    /// Number of blobs that are snapshots of others.
    pub snapshots: u64,
    /// Number of used clusters, including those of the metadata.
    pub used_clusters: u64,
    /// Number of clusters of the store.
    pub total_clusters: u64,
    /// Number of used metadata pages.
    pub used_pages: u64,
    /// Number of pages of the metadata region.
    pub total_pages: u64,
    /// Whether the store was unloaded in order.
    pub clean: bool,
    /// The reason why the journal may have lost changes, if it is damaged.
    pub journal_damage: Option<String>,
    /// Number of findings beyond those in the list, and the worst severity among them.
    untold: Option<(u64, Severity)>,
}

/// Most findings in the list; more are only counted. An image must not take unbounded memory.
const MAX_FINDINGS: usize = 1000;

impl Report {
    /// Returns the worst severity, or `None` if there are only notes.
    #[must_use]
    pub fn worst(&self) -> Option<Severity> {
        self.findings
            .iter()
            .map(|finding| finding.severity)
            .max()
            .filter(|worst| *worst != Severity::Note)
    }

    fn add(&mut self, severity: Severity, text: String) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(Finding { severity, text });
        } else {
            let (count, worst) = self.untold.unwrap_or((0, severity));
            self.untold = Some((count + 1, worst.max(severity)));
        }
    }

    fn note_torn_pages(&mut self, info: &DeviceInfo) {
        if let Some(whole) = tears_pages(info) {
            let text = format!(
                "the device promises to write {whole} bytes whole, and a metadata page has {PAGE_SIZE_U64}: \
                 a power cut can tear the page that is being written"
            );
            self.add(Severity::Note, text);
        }
    }

    /// Appends the number of findings that were left out.
    fn close(&mut self) {
        if let Some((count, severity)) = self.untold.take() {
            let text = format!("{count} more findings of the same kinds");
            self.findings.push(Finding { severity, text });
        }
    }
}

/// Checks a store without writing: the super block, the masks against the metadata, every page that
/// blobs use, clusters with two owners, and snapshot trees. States that a crash may leave, by
/// Pumice's or SPDK's order of writing, are legal and give notes.
///
/// # Errors
/// Fails when there is no blobstore, its super block cannot be used, or the device fails.
pub fn check(dev: &Arc<dyn BlockDevice>) -> Result<Report, Error> {
    examine(dev).map(|(report, _)| report)
}

/// The beginning of the finding for an unclean store.
const NOT_UNLOADED: &str = "the store was not unloaded in order";

/// Returns the report, and the damaged blobs separately.
fn examine(dev: &Arc<dyn BlockDevice>) -> Result<(Report, Vec<DamagedBlob>), Error> {
    let steady = Steady::new(Arc::clone(dev));
    let failed_flush = steady.failed_flush();
    let dev: Arc<dyn BlockDevice> = steady;
    let info = dev.info();
    let mut io = MdIo::new(&dev, failed_flush)?;
    let Found { sb, torn } = super_page::read(&mut io, info)?;
    let geo = Geometry::new(&sb, info)?;
    let journal = recovery::find(&mut io, &geo, &sb, &info.name, Treat::ReadOnly)?;
    let (masks, past) = Masks::read(&mut io, &geo, &sb)?;
    let listed = masks
        .as_ref()
        .filter(|_| sb.is_clean())
        .map(|masks| &masks.blobids[..]);
    let roots = Roots::Scan {
        sure: listed,
        past: past.blobids.as_deref(),
    };
    let found = scan(&mut io, &geo, &roots)?;
    let mut report = Report {
        blobs: found.blobs.len() as u64,
        total_clusters: geo.total_clusters.into(),
        total_pages: geo.md_len.into(),
        used_clusters: found.clusters.used().into(),
        used_pages: found.pages.used().into(),
        clean: sb.is_clean(),
        journal_damage: journal.damage,
        ..Report::default()
    };
    check_journal(&mut report, io.replayed().len(), journal.blocks.len());
    if torn {
        let text = "the super block was torn while it was changed; its copy is used, and the next load puts it back";
        report.add(Severity::Note, text.to_owned());
    }
    match &journal.journal {
        // There a torn page is made whole.
        Some(journal) => check_journals_blob(&mut report, &journal.place, &found),
        None => report.note_torn_pages(info),
    }
    check_super(&mut report, &sb, &found, info.len_bytes(), &geo);
    note_damaged(&mut report, &found);
    check_trees(&mut report, &found);
    check_owners(&mut report, &found);
    match (&masks, sb.is_clean()) {
        (_, false) => report.add(
            Severity::Note,
            format!("{NOT_UNLOADED}; the next load scans the metadata"),
        ),
        (None, true) if sb.used_blobid_mask_len.get() == 0 => {
            report.add(
                Severity::Note,
                "an old store without a blobid mask: every load scans the metadata".to_owned(),
            );
        }
        (None, true) => report.add(
            Severity::Repairable,
            "the store is marked clean, but a mask is not valid".to_owned(),
        ),
        (Some(masks), true) => check_masks(&mut report, masks, &found, &geo),
    }
    let blobs = found.blobs.values();
    blobs.for_each(|meta| check_blob(&mut report, meta));
    check_orphans(&mut report, &found);
    report.close();
    let damaged = found.damaged.into_iter().map(|(root, error)| DamagedBlob {
        id: BlobId::from_page(root),
        name: found.remains.get(&root).and_then(|r| r.name.clone()),
        error,
    });
    Ok((report, damaged.collect()))
}

/// The plan of a repair: see [`plan`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RepairPlan {
    /// Damaged blobs that are removed with their content.
    pub removed: Vec<DamagedBlob>,
    /// The damage of the journal, because of which changes may be missing. They are given up.
    pub journal: Option<String>,
    /// Findings that new masks and the completion of interrupted snapshots correct, without any
    /// loss.
    pub corrected: Vec<String>,
}

/// Adds each blob that cannot be used.
fn note_damaged(report: &mut Report, found: &Scan) {
    for (root, error) in &found.damaged {
        let name = found.remains.get(root).and_then(|r| r.name.as_deref());
        let name = name.map_or_else(String::new, |name| format!(" (\"{name}\")"));
        report.add(
            Severity::Error,
            format!("blob {}{name}: {error}", BlobId::from_page(*root)),
        );
    }
}

/// Another program may have changed the journal's blob: the journal is left unused then.
fn check_journals_blob(report: &mut Report, place: &RingPlace, found: &Scan) {
    let root = place.blob.page();
    let meta = root.and_then(|root| found.blobs.get(&root));
    if !meta.is_some_and(|meta| recovery::is_of(meta, place)) {
        let text = "the journal's blob is not as the super block has it: the next load goes on without the journal";
        report.add(Severity::Note, text.to_owned());
    }
}

/// A blob that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DamagedBlob {
    /// Id of the blob.
    pub id: BlobId,
    /// Value of its xattr `name` (a file's path), if it can still be read.
    pub name: Option<String>,
    /// The damage.
    pub error: PageError,
}

impl RepairPlan {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.journal.is_none() && self.corrected.is_empty()
    }

    /// Returns a line for each step, those that lose something first.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let removed = self.removed.iter().map(|blob| {
            let name = blob.name.as_deref();
            let name = name.map_or_else(String::new, |name| format!(" (\"{name}\")"));
            format!(
                "remove blob {}{name} with its content: {}",
                blob.id, blob.error
            )
        });
        let journal = self
            .journal
            .iter()
            .map(|damage| format!("give up the changes that the journal may have lost: {damage}"));
        let corrected = self.corrected.iter().map(|text| format!("correct: {text}"));
        removed.chain(journal).chain(corrected).collect()
    }
}

/// Returns the plan for [`apply`] on this device. Only reads. Blocks.
///
/// # Errors
/// Fails as [`check`] does.
pub fn plan(dev: &Arc<dyn BlockDevice>) -> Result<RepairPlan, Error> {
    let (report, removed) = examine(dev)?;
    let unclean = !report.clean;
    let corrected = report
        .findings
        .iter()
        .filter(|finding| {
            finding.severity == Severity::Repairable
                || (unclean && finding.text.starts_with(NOT_UNLOADED))
        })
        .map(|finding| finding.text.clone())
        .collect();
    Ok(RepairPlan {
        removed,
        journal: report.journal_damage,
        corrected,
    })
}

/// Carries out the plan and nothing more: removes its damaged blobs, gives up what a damaged
/// journal has lost, completes or undoes snapshots,
/// writes new masks and marks the store clean. Returns a line for each step. Clusters with several
/// owners stay as they are. Blocks.
///
/// # Errors
/// Fails when the store is loaded ([`BdevError::InUse`]), when it has damage that is not in the
/// plan ([`Error::DamagedStore`], [`Error::Journal`]; nothing was changed then, except that pages
/// of the journal may be in place), and as [`Blobstore::load`] and [`Blobstore::unload`] do.
pub fn apply(dev: &Arc<dyn BlockDevice>, plan: &RepairPlan) -> Result<Vec<String>, Error> {
    let before = check(dev)?;
    let load = LoadOptions::default().accept_journal_damage(plan.journal.is_some());
    let store = Blobstore::load_by_scan(Arc::clone(dev), &load)?;
    let planned: HashSet<BlobId> = plan.removed.iter().map(|blob| blob.id).collect();
    let damaged = store.damaged();
    if damaged.iter().any(|(id, _)| !planned.contains(id)) {
        return Err(Error::DamagedStore {
            device: dev.info().name.clone(),
            damage: store.damage(),
        });
    }
    let mut done = Vec::new();
    let lines = store.damage();
    for ((id, _), line) in damaged.iter().zip(lines) {
        store.delete_damaged(*id)?;
        done.push(format!("removed: {line}"));
    }
    store.end_half_done()?;
    store.unload()?;
    drop(store);
    if !damaged.is_empty() {
        // Only now are the clusters and pages of the removed blobs free.
        let store = Blobstore::load_by_scan(Arc::clone(dev), &LoadOptions::default())?;
        store.unload()?;
    }
    let after = check(dev)?;
    for finding in &before.findings {
        let removed = damaged
            .iter()
            .any(|(id, _)| finding.text.starts_with(&format!("blob {id}")));
        if !removed && !after.findings.contains(finding) {
            done.push(format!("corrected: {}", finding.text));
        }
    }
    Ok(done)
}

/// Runs [`plan`] and [`apply`]: corrects repairable findings and states that a crash left, and
/// removes damaged blobs. Returns a line for each step. Blocks.
///
/// # Errors
/// Fails as [`apply`] does.
pub fn repair(dev: &Arc<dyn BlockDevice>) -> Result<Vec<String>, Error> {
    apply(dev, &plan(dev)?)
}

fn check_journal(report: &mut Report, pages: usize, blocks: usize) {
    if let Some(damage) = &report.journal_damage {
        let text = format!("the journal is damaged: {damage}; changes that it held may be missing");
        report.add(Severity::Error, text);
    }
    if pages > 0 {
        let text = format!(
            "{pages} metadata pages are in the journal and not in place; the next load puts them there"
        );
        report.add(Severity::Note, text);
    }
    if blocks > 0 {
        let text = format!(
            "{blocks} blocks of blobs are in the journal and not in place; the next load puts them there"
        );
        report.add(Severity::Note, text);
    }
}

fn check_super(report: &mut Report, sb: &SuperBlock, found: &Scan, dev_bytes: u64, geo: &Geometry) {
    if let Some(id) = sb.super_blob()
        && !id
            .page()
            .is_some_and(|root| found.blobs.contains_key(&root))
    {
        report.add(
            Severity::Note,
            format!("the super blob {id} does not exist"),
        );
    }
    let unused = dev_bytes / geo.cluster_size - u64::from(geo.total_clusters);
    if unused != 0 {
        report.add(
            Severity::Note,
            format!("the device has {unused} clusters more than the store; it can grow"),
        );
    }
}

/// Checks that parents exist, that there are no loops, and that marks name existing blobs.
fn check_trees(report: &mut Report, found: &Scan) {
    let mut parents: HashSet<BlobId> = HashSet::new();
    // Blobs whose line of snapshots is known to end.
    let mut ends: HashSet<BlobId> = HashSet::new();
    let mut loops: HashSet<BlobId> = HashSet::new();
    for meta in found.blobs.values() {
        let id = meta.id;
        if meta.flags.unknown_invalid() != 0 {
            let bits = meta.flags.unknown_invalid();
            report.add(
                Severity::Note,
                format!("blob {id}: unknown invalid_flags {bits:#x}, it cannot be opened here"),
            );
        }
        let Parent::Snapshot(parent) = meta.parent() else {
            continue;
        };
        parents.insert(parent);
        let get = |id: BlobId| id.page().and_then(|root| found.blobs.get(&root));
        if get(parent).is_none() {
            report.add(
                Severity::Error,
                format!("blob {id}: its snapshot {parent} does not exist or is damaged"),
            );
            continue;
        }
        let mut line: HashSet<BlobId> = HashSet::from([id]);
        let mut at = parent;
        let is_loop = loop {
            if ends.contains(&at) {
                break false;
            }
            if loops.contains(&at) || !line.insert(at) {
                break true;
            }
            match get(at).map(BlobMeta::parent) {
                Some(Parent::Snapshot(next)) => at = next,
                _ => break false,
            }
        };
        if is_loop {
            report.add(
                Severity::Error,
                format!("blob {id}: its snapshots form a loop"),
            );
            loops.extend(line);
        } else {
            ends.extend(line);
        }
    }
    report.snapshots = parents.len() as u64;
    for meta in found.blobs.values() {
        for (mark, doing) in [(SNAPTMP, "made"), (SNAPRM, "removed")] {
            if let Some(named) = meta.internal_id(mark) {
                let text = format!(
                    "blob {}: a snapshot of {named} that was being {doing}; the next load ends it",
                    meta.id
                );
                report.add(Severity::Note, text);
            }
        }
    }
}

/// Finds clusters and extent pages with two owners, which are legal between a snapshot that is
/// being made or removed and its blob.
fn check_owners(report: &mut Report, found: &Scan) {
    let pair = |meta: &BlobMeta| {
        let named = meta
            .internal_id(SNAPTMP)
            .or_else(|| meta.internal_id(SNAPRM))?;
        Some((meta.id, named))
    };
    let pairs: HashSet<(BlobId, BlobId)> = found
        .blobs
        .values()
        .filter_map(pair)
        .flat_map(|(a, b)| [(a, b), (b, a)])
        .collect();
    let mut clusters: HashMap<u32, Vec<BlobId>> = HashMap::new();
    let mut pages: HashMap<u32, Vec<BlobId>> = HashMap::new();
    for meta in found.blobs.values() {
        let shared = |cluster: &u32| found.shared_clusters.contains(cluster);
        for cluster in meta.clusters().filter(shared) {
            clusters.entry(cluster).or_default().push(meta.id);
        }
        let shared = |page: &u32| found.shared_pages.contains(page);
        for page in meta.pages_of_extents().filter(shared) {
            pages.entry(page).or_default().push(meta.id);
        }
    }
    for (what, owners) in [("cluster", clusters), ("extent page", pages)] {
        let mut owners: Vec<(u32, Vec<BlobId>)> = owners.into_iter().collect();
        owners.sort_unstable();
        for (number, blobs) in owners {
            let text = match &blobs[..] {
                [a, b] if pairs.contains(&(*a, *b)) => continue,
                [a, b] if a == b => format!("{what} {number} belongs twice to {a}"),
                [one] => format!("{what} {number} belongs to {one} and to a damaged blob"),
                _ => {
                    let names: Vec<String> = blobs.iter().map(ToString::to_string).collect();
                    format!("{what} {number} belongs to {}", names.join(" and "))
                }
            };
            report.add(Severity::Error, text);
        }
    }
}

fn check_masks(report: &mut Report, masks: &Masks, found: &Scan, geo: &Geometry) {
    let damaged = !found.damaged.is_empty();
    let mut roots = Bitmap::new(geo.md_len);
    for root in found.blobs.keys().chain(found.damaged.keys()) {
        roots.set(*root);
    }
    let mut compare = |name: &str, mask: &[u64], found: &Bitmap| {
        let only =
            |a: &[u64], b: &[u64]| -> Vec<u64> { a.iter().zip(b).map(|(a, b)| a & !b).collect() };
        let free = only(found.words(), mask);
        let leaked = only(mask, found.words());
        for (bits, text) in [
            (free, "in use, but free in its mask"),
            (leaked, "used in its mask, but by nobody"),
        ] {
            let list: Vec<u32> = iter_words(&bits).collect();
            if !list.is_empty() {
                let text = format!("{} {name} {text}: {}", list.len(), some(&list));
                report.add(
                    if damaged {
                        Severity::Error
                    } else {
                        Severity::Repairable
                    },
                    text,
                );
            }
        }
    };
    compare("metadata pages", &masks.pages, &found.pages);
    compare("clusters", masks.clusters.words(), &found.clusters);
    compare("blob ids", &masks.blobids, &roots);
}

/// Finds pages with a blob's content that no blob names: they were replaced, and a crash came
/// before they were zeroed.
fn check_orphans(report: &mut Report, found: &Scan) {
    let words = found.written.words().iter().zip(found.pages.words());
    let orphans: Vec<u64> = words.map(|(written, used)| written & !used).collect();
    let orphans: Vec<u32> = iter_words(&orphans).collect();
    if !orphans.is_empty() {
        let text = format!(
            "{} metadata pages hold old content that no blob names: {}",
            orphans.len(),
            some(&orphans)
        );
        report.add(Severity::Note, text);
    }
}

/// Formats the first few elements of a list.
fn some(list: &[u32]) -> String {
    let more = if list.len() > 8 { ", …" } else { "" };
    let some: Vec<String> = list.iter().take(8).map(ToString::to_string).collect();
    some.join(", ") + more
}

fn check_blob(report: &mut Report, meta: &BlobMeta) {
    if meta.trailing != Trailing::default() {
        let n = meta.trailing.pages.len();
        let text = format!(
            "blob {}: {n} extent pages behind its end, left by a shrink that was cut short",
            meta.id
        );
        report.add(Severity::Note, text);
    }
}
