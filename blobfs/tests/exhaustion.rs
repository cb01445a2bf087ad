//! Each operation of a blobstore with every number of free metadata pages and clusters below what it needs: it fails, has changed
//! nothing, and succeeds as soon as there is enough.

mod common;

use common::*;
use pumice_bdev::DmaBuf;
use pumice_blobfs::blobstore::check::check;
use pumice_blobfs::blobstore::{BlobId, Blobstore, CreateOptions, Error, InitOptions, LoadOptions};

const CLUSTER: u64 = 16384;

/// The blobs of the store that an operation works on.
struct Blobs {
    /// A thin blob with clusters of its own, above `large`.
    origin: BlobId,
    /// A snapshot whose only clone is `small`, which is smaller.
    large: BlobId,
    /// A snapshot whose only clone is `origin`.
    small: BlobId,
    /// A short thin blob with a parent.
    little: BlobId,
    /// A blob without a parent, which is not thin.
    thick: BlobId,
}

type Operation = fn(&Blobstore, &Blobs) -> Result<(), Error>;

fn write_first(store: &Blobstore, id: BlobId, cluster: u64) -> Result<(), Error> {
    let mut buf = DmaBuf::new(4096).unwrap();
    buf.fill(9);
    store
        .open(id)?
        .write_at(cluster * CLUSTER, buf.freeze(), false)
}

const OPERATIONS: &[(&str, Operation)] = &[
    ("create", |store, _| {
        let opts = CreateOptions::default()
            .num_clusters(3)
            .xattrs(vec![("big".to_owned(), vec![1; 3900])]);
        store.create(&opts).map(drop)
    }),
    ("snapshot", |store, blobs| {
        store.snapshot(blobs.origin, &[]).map(drop)
    }),
    ("snapshot of a thick blob", |store, blobs| {
        let xattrs = ["one", "two"].map(|name| (name.to_owned(), vec![1; 3900]));
        store.snapshot(blobs.thick, &xattrs).map(drop)
    }),
    ("clone", |store, blobs| {
        store.clone_blob(blobs.small, &[]).map(drop)
    }),
    ("delete a snapshot", |store, blobs| {
        store.delete(blobs.small)
    }),
    ("delete a larger snapshot", |store, blobs| {
        store.delete(blobs.large)
    }),
    ("inflate", |store, blobs| store.inflate(blobs.little)),
    ("decouple", |store, blobs| store.decouple(blobs.origin)),
    ("write", |store, blobs| write_first(store, blobs.origin, 1)),
    ("write far away", |store, blobs| {
        write_first(store, blobs.origin, 1500)
    }),
    ("resize", |store, blobs| store.open(blobs.thick)?.resize(9)),
    ("resize far", |store, blobs| {
        store.open(blobs.origin)?.resize(10_000)
    }),
    ("xattr", |store, blobs| {
        let blob = store.open(blobs.thick)?;
        blob.set_xattr("one", &[1; 3900])?;
        blob.set_xattr("two", &[2; 3900])?;
        blob.sync_md()
    }),
    ("transaction", |store, blobs| {
        let mut tx = store.transaction();
        tx.set_xattr(blobs.thick, "one", &[1; 3900]);
        tx.set_xattr(blobs.origin, "two", &[2; 3900]);
        tx.commit().map(drop)
    }),
];

fn thin(num_clusters: u64, extent_table: bool) -> CreateOptions {
    CreateOptions::default()
        .num_clusters(num_clusters)
        .thin(true)
        .extent_table(extent_table)
}

fn made(extent_table: bool) -> (Blobstore, Blobs) {
    let opts = InitOptions::default()
        .cluster_size(16384)
        .md_pages(Some(60));
    let store = Blobstore::init(memory(4 << 20, 4096), &opts).unwrap();
    let origin = store.create(&thin(2000, extent_table)).unwrap();
    for cluster in [0, 2, 900, 1000] {
        write_first(&store, origin, cluster).unwrap();
    }
    let large = store.snapshot(origin, &[]).unwrap();
    store.open(origin).unwrap().resize(600).unwrap();
    let small = store.snapshot(origin, &[]).unwrap();
    store.open(origin).unwrap().resize(2000).unwrap();
    write_first(&store, origin, 700).unwrap();
    let little = store.create(&thin(20, extent_table)).unwrap();
    write_first(&store, little, 1).unwrap();
    store.snapshot(little, &[]).unwrap();
    write_first(&store, little, 3).unwrap();
    let opts = CreateOptions::default()
        .num_clusters(4)
        .extent_table(extent_table);
    let thick = store.create(&opts).unwrap();
    let blobs = Blobs {
        origin,
        large,
        small,
        little,
        thick,
    };
    (store, blobs)
}

/// Leaves this many metadata pages and clusters, if there are more.
fn leave(store: &Blobstore, pages: u64, clusters: u64) {
    let spare = store.free_clusters().saturating_sub(clusters);
    let opts = CreateOptions::default().num_clusters(spare);
    store.create(&opts).unwrap();
    while store.md_pages().total - store.md_pages().used > pages {
        store.create(&CreateOptions::default()).unwrap();
    }
}

fn seen(store: &Blobstore) -> (Vec<String>, u64, u64) {
    (listing(store), store.free_clusters(), store.md_pages().used)
}

fn consistent(store: &Blobstore, what: &str) {
    let dev = memory_with(&content(store.device()), 4096);
    let again = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
    assert_eq!(seen(&again), seen(store), "{what}, after a load");
    again.unload().unwrap();
    assert!(check(&dev).unwrap().findings.is_empty(), "{what}");
}

#[test]
fn what_finds_no_page_or_no_cluster_changes_nothing() {
    for extent_table in [true, false] {
        for (name, operation) in OPERATIONS {
            let needs = |pages: u64, clusters: u64| {
                let what = format!(
                    "{name}, extent table {extent_table}, {pages} pages and {clusters} clusters left"
                );
                let (store, blobs) = made(extent_table);
                leave(&store, pages, clusters);
                let before = seen(&store);
                match operation(&store, &blobs) {
                    Ok(()) => {
                        consistent(&store, &what);
                        true
                    }
                    Err(Error::NoSpace { .. } | Error::NoMdPages { .. }) => {
                        assert_eq!(seen(&store), before, "{what}");
                        consistent(&store, &what);
                        false
                    }
                    Err(e) => panic!("{what}: {e}"),
                }
            };
            let pages = (0..40).find(|pages| needs(*pages, 100)).unwrap();
            let clusters = (0..90).find(|clusters| needs(40, *clusters)).unwrap();
            println!("{name}, extent table {extent_table}: {pages} pages, {clusters} clusters");
        }
    }
}
