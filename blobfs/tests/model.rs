//! Random operations on many blobs against a model in memory, with power cuts and reloads in
//! between. A failure prints the seed; `PUMICE_SEED` and `PUMICE_STEPS` run others.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::*;
use pumice_bdev::{BlockDevice, DmaBuf};
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions};
use pumice_blobfs::blobstore::check::check;
use pumice_blobfs::blobstore::{
    BlobId, Blobstore, ClearMethod, CreateOptions, Error, InitOptions, LoadOptions, Parent,
};
use rand::prelude::*;

const PAGE: u64 = 4096;
const PAGES_PER_CLUSTER: usize = 2;
const CLUSTER: u64 = PAGE * PAGES_PER_CLUSTER as u64;

/// A blob, each page of which holds one value.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Model {
    pages: Vec<u8>,
    thin: bool,
    read_only: bool,
    parent: Option<BlobId>,
    xattrs: BTreeMap<String, Vec<u8>>,
}

type Blobs = BTreeMap<BlobId, Model>;

fn device(image: CrashImage, write_cache: bool, seed: u64) -> CrashDevice {
    let options = CrashOptions::default()
        .block_size(4096)
        .write_cache(write_cache)
        .seed(seed)
        .tear_bytes(4096)
        .unmap_zeroes(true);
    CrashDevice::with_options(&options, image)
}

/// Returns the content of the store as a model.
fn observe(store: &Blobstore) -> Blobs {
    assert_eq!(store.damaged(), []);
    let mut blobs = Blobs::new();
    for id in store.blobs() {
        let blob = store.open(id).unwrap();
        let bytes = whole(&blob);
        let pages = bytes.chunks(4096).map(|page| {
            assert!(
                page.iter().all(|byte| *byte == page[0]),
                "a page of {id} is mixed"
            );
            page[0]
        });
        let parent = match blob.parent() {
            Parent::None => None,
            Parent::Snapshot(parent) => Some(parent),
            Parent::External(_) => panic!("nobody made an external snapshot"),
        };
        let xattrs = blob
            .xattrs()
            .into_iter()
            .map(|(name, value)| (String::from_utf8(name).unwrap(), value));
        let (thin, read_only) = (blob.is_thin(), blob.is_read_only());
        let model = Model {
            pages: pages.collect(),
            thin,
            read_only,
            parent,
            xattrs: xattrs.collect(),
        };
        blobs.insert(id, model);
    }
    blobs
}

fn children(blobs: &Blobs, id: BlobId) -> Vec<BlobId> {
    blobs
        .iter()
        .filter(|(_, model)| model.parent == Some(id))
        .map(|(child, _)| *child)
        .collect()
}

/// Whether the error is one that a full store or a wrong request causes.
fn refused(error: &Error) -> bool {
    matches!(
        error,
        Error::NoSpace { .. }
            | Error::NoMdPages { .. }
            | Error::Busy(_)
            | Error::ReadOnly(_)
            | Error::InvalidInput(_)
    )
}

/// Performs one random operation on the store and on the model. Returns whether a power cut in its
/// middle leaves either the old or the new state.
fn step(store: &Blobstore, blobs: &mut Blobs, rng: &mut SmallRng) -> (String, bool) {
    let any = blobs.keys().copied().choose(rng);
    let kind = if blobs.len() < 3 {
        0
    } else {
        rng.random_range(0..14)
    };
    let (Some(id), true) = (any, kind > 1) else {
        let num_clusters = rng.random_range(0..7);
        let thin = rng.random_bool(0.6);
        let clear_method = *[
            ClearMethod::Default,
            ClearMethod::None,
            ClearMethod::WriteZeroes,
        ]
        .choose(rng)
        .unwrap();
        let extent_table = rng.random_bool(0.7);
        let opts = CreateOptions::default()
            .num_clusters(num_clusters)
            .thin(thin)
            .clear_method(clear_method)
            .extent_table(extent_table);
        match store.create(&opts) {
            Ok(id) => {
                let pages = vec![0; usize::try_from(num_clusters).unwrap() * PAGES_PER_CLUSTER];
                let model = Model {
                    pages,
                    thin,
                    read_only: false,
                    parent: None,
                    xattrs: BTreeMap::new(),
                };
                assert!(blobs.insert(id, model).is_none());
            }
            Err(error) => assert!(refused(&error), "{error}"),
        }
        return (format!("create {num_clusters} thin {thin}"), true);
    };
    let old = blobs[&id].clone();
    let expect = |result: &Result<(), Error>, legal: bool| match result {
        Ok(()) => assert!(legal, "{id}: should have been refused"),
        Err(error) => assert!(refused(error), "{error}"),
    };
    let writable = !old.read_only;
    match kind {
        2..=5 if !old.pages.is_empty() => {
            let first = rng.random_range(0..old.pages.len());
            let count = rng.random_range(1..=(old.pages.len() - first).min(5));
            let byte = rng.random_range(1..=255);
            let mut buf = DmaBuf::new(count * 4096).unwrap();
            buf.fill(byte);
            let result = store
                .open(id)
                .unwrap()
                .write_at(first as u64 * PAGE, buf.freeze(), true);
            expect(&result, writable);
            if result.is_ok() {
                blobs.get_mut(&id).unwrap().pages[first..first + count].fill(byte);
            }
            (
                format!("write {id} pages {first}+{count} = {byte}: {result:?}"),
                false,
            )
        }
        6 if !old.pages.is_empty() => {
            let first = rng.random_range(0..old.pages.len());
            let count = rng.random_range(1..=old.pages.len() - first);
            let blob = store.open(id).unwrap();
            let result = blob.write_zeroes_at(first as u64 * PAGE, count as u64 * PAGE);
            expect(&result, writable);
            // Zeroes are durable after a flush.
            store.flush().unwrap();
            if result.is_ok() {
                blobs.get_mut(&id).unwrap().pages[first..first + count].fill(0);
            } else if writable {
                // A store that becomes full meanwhile may have zeroed a part.
                let now = observe(store);
                blobs.insert(id, now[&id].clone());
            }
            (
                format!("zero {id} pages {first}+{count}: {result:?}"),
                false,
            )
        }
        7 => {
            let size = rng.random_range(0..9u64);
            let result = store.open(id).unwrap().resize(size);
            expect(
                &result,
                writable || size * CLUSTER == old.pages.len() as u64 * PAGE,
            );
            if result.is_ok() {
                let below = old
                    .parent
                    .map(|parent| blobs[&parent].pages.clone())
                    .unwrap_or_default();
                let pages = &mut blobs.get_mut(&id).unwrap().pages;
                let size = usize::try_from(size).unwrap() * PAGES_PER_CLUSTER;
                pages.truncate(size);
                while pages.len() < size {
                    pages.push(below.get(pages.len()).copied().unwrap_or(0));
                }
            }
            (format!("resize {id} to {size}: {result:?}"), true)
        }
        8 => {
            let name = format!("x{}", rng.random_range(0..4));
            let value = vec![rng.random(); *[0, 8, 200, 3000].choose(rng).unwrap()];
            let blob = store.open(id).unwrap();
            let result = blob.set_xattr(&name, &value).and_then(|()| blob.sync_md());
            expect(&result, writable);
            if result.is_ok() {
                blobs
                    .get_mut(&id)
                    .unwrap()
                    .xattrs
                    .insert(name.clone(), value);
            }
            (format!("set {name} of {id}: {result:?}"), true)
        }
        9 | 10 => {
            let kids = children(blobs, id);
            let result = store.delete(id);
            expect(&result, kids.len() < 2);
            if result.is_ok() {
                for kid in kids {
                    blobs.get_mut(&kid).unwrap().parent = old.parent;
                }
                blobs.remove(&id);
            }
            (format!("delete {id}: {result:?}"), true)
        }
        11 => {
            let result = store.snapshot(id, &[("s".to_owned(), vec![1])]);
            match &result {
                Ok(snapshot) => {
                    assert!(writable);
                    let mut model = old.clone();
                    model.read_only = true;
                    model.xattrs = BTreeMap::from([("s".to_owned(), vec![1])]);
                    blobs.insert(*snapshot, model);
                    let blob = blobs.get_mut(&id).unwrap();
                    (blob.thin, blob.parent) = (true, Some(*snapshot));
                }
                Err(error) => assert!(refused(error), "{error}"),
            }
            (format!("snapshot {id}: {result:?}"), true)
        }
        12 => {
            let result = store.clone_blob(id, &[]);
            match &result {
                Ok(clone) => {
                    assert!(old.read_only);
                    let xattrs = BTreeMap::new();
                    let model = Model {
                        thin: true,
                        read_only: false,
                        parent: Some(id),
                        xattrs,
                        ..old
                    };
                    blobs.insert(*clone, model);
                }
                Err(error) => assert!(refused(error), "{error}"),
            }
            (format!("clone {id}: {result:?}"), true)
        }
        13 => {
            let inflate = rng.random_bool(0.5);
            let result = if inflate {
                store.inflate(id)
            } else {
                store.decouple(id)
            };
            // Snapshots, too: what they read stays the same.
            expect(&result, inflate || old.parent.is_some());
            if result.is_ok() {
                let parent = if inflate {
                    None
                } else {
                    old.parent.and_then(|parent| blobs[&parent].parent)
                };
                let blob = blobs.get_mut(&id).unwrap();
                blob.parent = parent;
                blob.thin &= !inflate;
            }
            (format!("inflate {inflate} {id}: {result:?}"), true)
        }
        _ => ("nothing".to_owned(), true),
    }
}

fn run(seed: u64, steps: u32) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let write_cache = rng.random_bool(0.7);
    let mut dev = device(CrashImage::zeroed(2 << 20), write_cache, seed);
    let opts = InitOptions::default().cluster_size(8192).md_pages(Some(60));
    let mut store = Blobstore::init(Arc::new(dev.clone()), &opts).unwrap();
    let mut blobs = Blobs::new();
    let mut history: Vec<String> = Vec::new();
    for number in 0..steps {
        let before = blobs.clone();
        let start = dev.len_events();
        let (what, atomic) = step(&store, &mut blobs, &mut rng);
        history.push(what);
        let context = || {
            format!(
                "seed {seed}, step {number}, the last: {:#?}",
                &history[history.len().saturating_sub(6)..]
            )
        };
        let cut = rng.random_range(0..20);
        if cut == 0 {
            store.unload().unwrap();
            drop(store);
            assert!(strict::parse_of(&dev.image().to_vec(), &context()).clean);
            store = Blobstore::load(Arc::new(dev.clone()), &LoadOptions::default()).unwrap();
        } else if cut < 4 {
            // The power is cut, in the middle of the operation if that has to leave the old or the
            // new state.
            let end = dev.len_events();
            let at = if atomic && cut < 3 {
                rng.random_range(start..=end)
            } else {
                end
            };
            let keep: f64 = rng.random();
            let image = dev.image_after(at, &mut |_| rng.random_bool(keep));
            drop(store);
            strict::parse_of(&image.to_vec(), &context());
            dev = device(image, write_cache, rng.random());
            let as_dyn: Arc<dyn BlockDevice> = Arc::new(dev.clone());
            let report = check(&as_dyn).unwrap();
            assert_eq!(report.worst(), None, "{:?} {}", report.findings, context());
            store = Blobstore::load(as_dyn, &LoadOptions::default()).unwrap();
            let now = observe(&store);
            assert!(
                now == blobs || (atomic && now == before),
                "{}\nfound {now:#?}\nold {before:#?}\nnew {blobs:#?}",
                context()
            );
            blobs = now;
        } else if number % 16 == 0 {
            assert!(
                observe(&store) == blobs,
                "{}\n{:#?}\n{blobs:#?}",
                context(),
                observe(&store)
            );
        }
        let allocated: u64 = store
            .blobs()
            .iter()
            .map(|id| store.open(*id).unwrap().num_allocated())
            .sum();
        assert_eq!(
            store.free_clusters() + allocated,
            store.total_clusters(),
            "{}",
            context()
        );
    }
    assert!(observe(&store) == blobs, "seed {seed}");
    store.unload().unwrap();
    let as_dyn: Arc<dyn BlockDevice> = Arc::new(dev);
    let report = check(&as_dyn).unwrap();
    assert_eq!(report.worst(), None, "seed {seed}: {:?}", report.findings);
}

#[test]
fn random_operations_against_a_model() {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse::<u64>().unwrap())
    };
    let steps = u32::try_from(number("PUMICE_STEPS").unwrap_or(150)).unwrap();
    match number("PUMICE_SEED") {
        Some(seed) => run(seed, steps),
        None => (1..=12).for_each(|seed| run(seed, steps)),
    }
}
