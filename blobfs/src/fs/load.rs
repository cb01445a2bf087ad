//! Mounting: builds the map of names from the blobs' xattrs, and completes what a crash
//! interrupted.
//!
//! Everything read here is untrusted. A blob that cannot be a file is reported ([`Core::problems`])
//! and left alone. The others are mounted.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use crossbeam::atomic::AtomicCell;
use pumice_bdev::BlockDevice;
use pumice_bdev::contents::{self, Contents};
use pumice_bdev::process::Birth;

use super::cache::Cache;
use super::core::Core;
use super::durable::Durability;
use super::elastic::Bound;
use super::error::{FsError, Result};
use super::huge::HugePages;
use super::implied::imply_dirs;
use super::inode::{Inode, decode_mode, xattr};
use super::lost::Lost;
use super::metered::Metered;
use super::names::{Dir, Entry, Names, decode_names, encode_name, encode_names};
use super::options::MountOptions;
use super::path;
use super::shm_log::ShmLog;
use super::shm_replay::{self, OnDevice};
use super::volume::{Phase, Volume, store_error};
use crate::blobstore::{
    Abilities, Blob, BlobId, Blobstore, BsType, Error as StoreError, LoadOptions, Persist, Spend,
    Transaction,
};

/// The name of an incomplete file, until it is renamed to its own name. A file that has it when the
/// file system is mounted was left by a killed process: it is not shown, and a mount for writing
/// removes it.
pub const UNFINISHED: &str = "/.pumice-unfinished";

/// The earlier name of an incomplete file, which a mount treats in the same way.
pub const UNFINISHED_BEFORE: &str = "/.pumice-cp.part";

fn is_unfinished(blob: &Blob) -> bool {
    blob.xattr(xattr::NAME).is_some_and(|raw| {
        [UNFINISHED, UNFINISHED_BEFORE]
            .iter()
            .any(|name| raw.strip_suffix(&[0]).unwrap_or(&raw) == name.as_bytes())
    })
}

/// Most problems that are listed. Further ones are counted.
const MAX_PROBLEMS: usize = 100;
/// Most recorded renames of directories that a mount completes. Renames run one at a time, so there
/// is more than one only after one has failed.
const MAX_RENAMES: usize = 16;
/// A blob that is marked as a file or a directory.
struct Found {
    id: BlobId,
    names: Vec<String>,
    /// Whether names were changed in memory and have to be written.
    changed: bool,
    len: u64,
    on_device: OnDevice,
    is_dir: bool,
    seq: u64,
    replaces: Option<u64>,
    rename: Option<(String, String)>,
    mtime_ns: u64,
    mode: Option<u32>,
}

/// The state of a mount in progress.
struct Loader {
    store: Blobstore,
    read_only: bool,
    problems: Vec<String>,
    /// Number of problems that are not listed.
    untold: usize,
    /// The problems that lose something.
    damage: Vec<String>,
    found: Vec<Found>,
    /// Blobs that were deleted while they were open.
    deleted: Vec<BlobId>,
    /// Parts of files that are damaged.
    lost: Vec<(BlobId, Lost)>,
}

/// Opens the store and builds the file system on it.
pub(crate) fn mount(dev: &Arc<dyn BlockDevice>, opts: &MountOptions) -> Result<Core> {
    let info = dev.info().clone();
    if info.block_size > 4096 {
        return Err(FsError::invalid(
            &info.name,
            format!(
                "blocks of {} bytes; BlobFS needs 512 to 4096",
                info.block_size
            ),
        ));
    }
    let persist = Abilities::of(&info).persist();
    let writes = Arc::new(Durability::new(persist != Persist::Completion));
    let metered = Metered::new(Arc::clone(dev), Arc::clone(&writes));
    let counted: Arc<dyn BlockDevice> = Arc::clone(&metered) as Arc<dyn BlockDevice>;
    let load = LoadOptions::default()
        .bstype(Some(BsType::BLOBFS))
        .read_only(opts.read_only)
        .refuse_damage(!opts.read_only && !opts.accept_damage)
        .accept_journal_damage(opts.accept_damage)
        .keep_session(true);
    let store = Blobstore::load(Arc::clone(&counted), &load).map_err(|e| refuse(dev, e))?;
    let unclean = !store.super_block().is_clean();
    let mut loader = Loader {
        store: store.clone(),
        read_only: opts.read_only,
        problems: Vec::new(),
        untold: 0,
        damage: Vec::new(),
        found: Vec::new(),
        deleted: Vec::new(),
        lost: Vec::new(),
    };
    if let Some(damage) = store.journal_damage() {
        let text = format!("the journal is damaged, and changes may be missing: {damage}");
        loader.problems.push(text);
    }
    store.set_space_policy(super::space::POLICY);
    loader.read_blobs();
    let host_name = dev.host_name();
    let files = loader.found.iter().map(|f| (f.id.0, f.on_device)).collect();
    let left = shm_replay::find(host_name.as_deref(), &store, &files);
    loader.damage.extend(left.damage.iter().cloned());
    loader.problems.extend(left.damage.iter().cloned());
    if load.refuse_damage && !loader.damage.is_empty() {
        return Err(FsError::Damaged {
            device: info.name,
            damage: loader.damage,
        });
    }
    loader.give_up_lost();
    loader.remove_deleted();
    loader.finish_renames()?;
    loader.resolve_names()?;
    let most = opts.cache_most_bytes.unwrap_or(opts.cache_bytes);
    let cache = Cache::with(
        Bound::new(opts.cache_bytes, most),
        HugePages::of(opts.huge_pages),
    );
    let (map, seq) = loader.build(&cache, unclean);
    if loader.untold > 0 {
        let text = format!("{} more problems of the same kinds", loader.untold);
        loader.problems.push(text);
    }
    for problem in &loader.problems {
        tracing::warn!(device = info.name, "{problem}");
    }
    let io_unit = usize::try_from(store.io_unit_size())
        .unwrap_or(4096)
        .max(info.block_size as usize);
    store
        .open_shared(opts.shared_channels)
        .map_err(|e| store_error(format!("{}: mount", info.name), e, 0))?;
    let vol = Arc::new(Volume {
        cluster: store.cluster_size(),
        store,
        metered,
        dev: counted,
        opts: opts.clone(),
        phase: AtomicCell::new(Phase::Mounted),
        born: Birth::now(),
        block: io_unit,
        persist,
    });
    let log = Arc::new(ShmLog::new(&vol, host_name.as_deref()));
    let names = Names::new(map, seq);
    let mut core = Core::new(vol, cache, writes, names, Arc::clone(&log), loader.problems);
    if opts.read_only {
        core.hides_writes = left.show(&core);
    } else {
        left.put_in_place(&core)?;
        log.arm();
    }
    Ok(core)
}

/// Returns the reason why there is nothing to mount.
fn refuse(dev: &Arc<dyn BlockDevice>, e: StoreError) -> FsError {
    let device = dev.info().name.clone();
    let hint = "make a file system with `pumice mkfs`".to_owned();
    match e {
        StoreError::DamagedStore { damage, .. } => FsError::Damaged { device, damage },
        StoreError::WrongType { found, .. } => FsError::Foreign {
            device,
            found: format!("an SPDK blobstore of type \"{found}\""),
            hint: "only one of type \"BLOBFS\" is a file system".to_owned(),
        },
        StoreError::SuperBlock { .. } => match contents::recognise(&**dev) {
            Ok(Some(Contents::Foreign(found))) => FsError::Foreign {
                device,
                found,
                hint,
            },
            Ok(None) => FsError::Foreign {
                device,
                found: "no file system".to_owned(),
                hint,
            },
            _ => store_error(device, e, 0),
        },
        e => store_error(device, e, 0),
    }
}

fn u64_of(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

/// Returns a name that no blob has, for one whose name belongs to another blob.
fn stand_in(taken: &mut HashSet<String>, name: &str, id: BlobId) -> String {
    let further = (2..).map(|n: u64| format!("/.pumice-blob-{id}-{n}"));
    [format!("{name}~{id}"), format!("/.pumice-blob-{id}")]
        .into_iter()
        .chain(further)
        .find(|shown| shown.len() <= path::NAME_MAX && taken.insert(shown.clone()))
        .expect("there are fewer blobs than numbers")
}

/// Whether a path is normalised, and not the root.
fn is_normal(name: &str) -> bool {
    name != "/" && path::normalise(name).is_ok_and(|n| n == name)
}

impl Loader {
    fn problem(&mut self, id: BlobId, what: impl std::fmt::Display) {
        if self.problems.len() == MAX_PROBLEMS {
            self.untold += 1;
        } else {
            self.problems.push(format!("blob {id}: {what}"));
        }
    }

    /// Records a problem that loses something.
    fn damage(&mut self, id: BlobId, what: impl std::fmt::Display) {
        if self.damage.len() < MAX_PROBLEMS {
            self.damage.push(format!("blob {id}: {what}"));
        }
        self.problem(id, what);
    }

    fn read_blobs(&mut self) {
        for (id, error) in self.store.damaged() {
            self.damage(id, format!("damaged metadata, left alone: {error}"));
        }
        for id in self.store.blobs() {
            match self.store.open(id) {
                Ok(blob) => {
                    if blob.xattr(xattr::IS_DELETED).is_some() || is_unfinished(&blob) {
                        self.deleted.push(id);
                    } else {
                        self.read_blob(&blob);
                    }
                }
                Err(e) => self.damage(id, format!("cannot be opened, left alone: {e}")),
            }
        }
    }

    fn give_up_lost(&mut self) {
        if self.read_only {
            return;
        }
        for (id, lost) in std::mem::take(&mut self.lost) {
            if let Err(error) = lost.give_up(&self.store, id) {
                self.problem(id, format!("its damage stays: {error}"));
            }
        }
    }

    fn remove_deleted(&mut self) {
        for id in std::mem::take(&mut self.deleted) {
            self.delete(id);
        }
    }

    fn delete(&mut self, id: BlobId) {
        if self.read_only {
            return;
        }
        let mut tx = self.store.transaction();
        tx.spend(Spend::Releasing);
        tx.delete(id);
        if let Err(e) = tx.commit() {
            self.problem(
                id,
                format!("deleted while it was open, and cannot be removed: {e}"),
            );
        }
    }

    fn read_blob(&mut self, blob: &Blob) {
        let id = blob.id();
        let Some(raw) = blob.xattr(xattr::NAME) else {
            self.problem(id, "has no name, so it is not a file; left alone");
            return;
        };
        let Some(len) = blob.xattr(xattr::LENGTH).as_deref().and_then(u64_of) else {
            self.problem(
                id,
                "has no length of 8 bytes, so it is not a file; left alone",
            );
            return;
        };
        let mut names = vec![self.first_name(id, &raw)];
        if let Some(raw) = blob.xattr(xattr::LINKS) {
            match decode_names(&raw) {
                Some(links) if links.iter().all(|l| is_normal(l)) => names.extend(links),
                _ => {
                    let what = "damaged list of hard links; only its first name is used";
                    self.damage(id, what);
                    self.lost.push((id, Lost::Links));
                }
            }
        }
        let is_dir = blob.xattr(xattr::DIR).is_some();
        let size = blob
            .num_clusters()
            .saturating_mul(self.store.cluster_size());
        if len > size {
            let but = format!("length {len}, but only {size} bytes allocated: cut to that");
            self.damage(id, format!("{}: {but}", names[0]));
            self.lost.push((id, Lost::Beyond(size)));
        }
        let rename = blob.xattr(xattr::RENAME).and_then(|raw| {
            let parsed = decode_names(&raw).and_then(|n| <[String; 2]>::try_from(n).ok());
            match parsed {
                Some([from, to]) if is_dir && is_normal(&from) && is_normal(&to) => {
                    Some((from, to))
                }
                _ => {
                    self.problem(id, "damaged record of a directory's rename; ignored");
                    None
                }
            }
        });
        self.found.push(Found {
            id,
            names,
            changed: false,
            len: len.min(size),
            on_device: OnDevice {
                len: len.min(size),
                allocated: size,
            },
            is_dir,
            seq: blob
                .xattr(xattr::SEQ)
                .as_deref()
                .and_then(u64_of)
                .unwrap_or(0),
            replaces: blob.xattr(xattr::REPLACES).as_deref().and_then(u64_of),
            rename,
            mtime_ns: blob
                .xattr(xattr::MTIME)
                .as_deref()
                .and_then(u64_of)
                .unwrap_or(0),
            mode: blob.xattr(xattr::MODE).as_deref().and_then(decode_mode),
        });
    }

    /// Returns the path in the xattr `name`, or one that replaces it.
    fn first_name(&mut self, id: BlobId, raw: &[u8]) -> String {
        let text = raw.strip_suffix(&[0]).unwrap_or(raw);
        let stand_in = format!("/.pumice-blob-{id}");
        let name = std::str::from_utf8(text)
            .ok()
            .filter(|name| !name.is_empty());
        if let Some(name) = name.filter(|name| is_normal(name)) {
            return name.to_owned();
        }
        let normal = name.and_then(|name| Some((name, path::normalise(name).ok()?)));
        let (shown, problem) = match normal.filter(|(_, normal)| normal != "/") {
            Some((name, normal)) => {
                let problem = format!("name \"{}\" used as {normal}", name.escape_debug());
                (normal, problem)
            }
            None => {
                let name = text.escape_ascii();
                let problem = format!("unusable name \"{name}\"; shown as {stand_in}");
                (stand_in, problem)
            }
        };
        self.problem(id, problem);
        shown
    }

    /// Completes recorded renames of directories.
    fn finish_renames(&mut self) -> Result<()> {
        let mut intents: Vec<(usize, String, String)> = self
            .found
            .iter()
            .enumerate()
            .filter_map(|(i, f)| f.rename.clone().map(|(from, to)| (i, from, to)))
            .collect();
        // Each goes over all names, so only the latest are completed, in their order.
        if intents.len() > MAX_RENAMES {
            intents.sort_by_key(|(i, ..)| self.found[*i].seq);
            for (marker, from, to) in intents.drain(..intents.len() - MAX_RENAMES) {
                let id = self.found[marker].id;
                self.problem(
                    id,
                    format!("record of a rename of {from} to {to} beside many others; ignored"),
                );
            }
        }
        for (marker, from, to) in intents {
            let id = self.found[marker].id;
            self.found[marker].rename = None;
            let inside = to.starts_with(&path::dir_prefix(&from));
            if inside || from == to || self.found[marker].names != [from.clone()] {
                self.problem(
                    id,
                    format!("record of a rename of {from} to {to} that cannot be; ignored"),
                );
                continue;
            }
            tracing::info!(from, to, "finishing the rename of a directory");
            let (old, new) = (path::dir_prefix(&from), path::dir_prefix(&to));
            let mut moved = Vec::new();
            for (i, f) in self.found.iter_mut().enumerate() {
                let mut any = false;
                for name in &mut f.names {
                    if let Some(rest) = name.strip_prefix(&old) {
                        let renamed = format!("{new}{rest}");
                        if renamed.len() <= path::NAME_MAX {
                            *name = renamed;
                            any = true;
                        }
                    }
                }
                if any && i != marker {
                    moved.push(i);
                }
            }
            // The directory that was there before had to be empty.
            let replaced = self
                .found
                .iter()
                .position(|f| f.is_dir && f.id != id && f.names.first() == Some(&to));
            self.found[marker].names = vec![to.clone()];
            if !self.read_only {
                let mut tx = self.store.transaction();
                for i in moved {
                    self.stage(&mut tx, i)?;
                }
                tx.set_xattr(id, xattr::NAME, &encode_name(&to));
                tx.remove_xattr(id, xattr::RENAME);
                if let Some(i) = replaced {
                    tx.delete(self.found[i].id);
                }
                self.commit(id, tx, &format!("finishing the rename of {from} to {to}"))?;
            }
            if let Some(i) = replaced {
                // Blobs are named by position only inside this loop.
                self.found[i].names.clear();
            }
        }
        self.found.retain(|f| !f.names.is_empty());
        Ok(())
    }

    /// Commits. A device error fails the mount. A refusal of the blobstore (of a blob with clones,
    /// for example) is reported.
    fn commit(&mut self, id: BlobId, mut tx: Transaction, what: &str) -> Result<()> {
        tx.spend(Spend::Releasing);
        match tx.commit() {
            Ok(_) => Ok(()),
            Err(e) if e.is_of_device() || matches!(e, StoreError::Stopped(_)) => {
                Err(store_error(what, e, 0))
            }
            Err(e) => {
                self.problem(id, format!("{what}: {e}"));
                Ok(())
            }
        }
    }

    fn stage(&self, tx: &mut Transaction, i: usize) -> Result<()> {
        let f = &self.found[i];
        tx.set_xattr(f.id, xattr::NAME, &encode_name(&f.names[0]));
        let has_links = self
            .store
            .open(f.id)
            .is_ok_and(|b| b.xattr(xattr::LINKS).is_some());
        if f.names.len() > 1 {
            tx.set_xattr(f.id, xattr::LINKS, &encode_names(&f.names[1..]));
        } else if has_links {
            tx.remove_xattr(f.id, xattr::LINKS);
        }
        Ok(())
    }

    /// Gives each name to one blob. Where a crash interrupted a replacement, the replaced blob
    /// loses the name, and is deleted with its last name. Other duplicates are reported and shown
    /// under names of their own.
    fn resolve_names(&mut self) -> Result<()> {
        let mut claims: HashMap<String, Vec<usize>> = HashMap::new();
        for (i, f) in self.found.iter().enumerate() {
            for name in &f.names {
                claims.entry(name.clone()).or_default().push(i);
            }
        }
        let mut contested: Vec<(String, Vec<usize>)> =
            claims.into_iter().filter(|(_, c)| c.len() > 1).collect();
        contested.sort();
        let all = self.found.iter().flat_map(|f| f.names.iter().cloned());
        let mut taken: HashSet<String> = match contested.is_empty() {
            true => HashSet::new(),
            false => all.collect(),
        };
        for (name, mut claimants) in contested {
            claimants.dedup();
            claimants.sort_by_key(|i| {
                std::cmp::Reverse((self.found[*i].seq, std::cmp::Reverse(self.found[*i].id)))
            });
            let winner = claimants[0];
            let (winner_id, replaces) = (self.found[winner].id, self.found[winner].replaces);
            for loser in claimants.into_iter().skip(1).filter(|i| *i != winner) {
                let id = self.found[loser].id;
                if replaces == Some(id.0) {
                    self.found[loser].names.retain(|n| *n != name);
                    self.found[loser].changed = true;
                    continue;
                }
                let shown = stand_in(&mut taken, &name, id);
                self.problem(
                    id,
                    format!(
                        "has the name {name}, which blob {winner_id} also has; shown as {shown}"
                    ),
                );
                for n in self.found[loser].names.iter_mut().filter(|n| **n == name) {
                    n.clone_from(&shown);
                }
            }
        }
        if !self.read_only {
            for i in 0..self.found.len() {
                if self.found[i].changed {
                    let mut tx = self.store.transaction();
                    if self.found[i].names.is_empty() {
                        tx.delete(self.found[i].id);
                    } else {
                        self.stage(&mut tx, i)?;
                    }
                    let id = self.found[i].id;
                    self.commit(id, tx, "finishing a replacement")?;
                }
            }
        }
        self.found.retain(|f| !f.names.is_empty());
        Ok(())
    }

    /// Builds the map of names, and returns the greatest sequence number used.
    fn build(&mut self, cache: &Arc<Cache>, unclean: bool) -> (BTreeMap<String, Entry>, u64) {
        let mut map = BTreeMap::new();
        let found = std::mem::take(&mut self.found);
        let seq = found.iter().map(|f| f.seq).max().unwrap_or(0);
        for f in found {
            if f.is_dir {
                let dir = Dir::new(Some(f.id), f.mtime_ns, f.mode);
                map.insert(f.names[0].clone(), Entry::Dir(Arc::new(dir)));
                continue;
            }
            let blob = match self.store.open(f.id) {
                Ok(blob) => blob,
                Err(e) => {
                    self.problem(
                        f.id,
                        format!("{}: cannot be opened, left alone: {e}", f.names[0]),
                    );
                    continue;
                }
            };
            let ino = Inode::new(blob, f.len, f.names.clone(), f.mtime_ns, f.mode, cache);
            if unclean {
                // These clusters were allocated ahead when the crash came.
                ino.tail.lock().grown = true;
            }
            for name in f.names {
                map.insert(name, Entry::File(Arc::clone(&ino)));
            }
        }
        imply_dirs(&mut map, |id, what| self.problem(id, what));
        (map, seq)
    }
}
