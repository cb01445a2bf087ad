//! Tests of blobs: creation, sizes, xattrs, data, exhaustion, and their durability.

mod common;

use common::*;
use pumice_bdev::{AsyncChannel, DmaBuf};
use pumice_blobfs::blobstore::check::check;
use pumice_blobfs::blobstore::{
    BlobId, Blobstore, BsType, ClearMethod, ClusterInit, CreateOptions, Error, InitOptions,
    LoadOptions, Transaction,
};

const CLUSTER: u64 = 16384;

fn store(len: u64) -> Blobstore {
    let opts = InitOptions::default().cluster_size(16384);
    Blobstore::init(memory(len, 4096), &opts).unwrap()
}

fn reload(store: Blobstore) -> Blobstore {
    let dev = store.device().clone();
    store.unload().unwrap();
    drop(store);
    let report = check(&dev).unwrap();
    let notes = u32::from(dev.info().block_size < 4096);
    let is_note = |text: &str| text.contains("a power cut can tear the page");
    let about = report.findings.iter().filter(|f| is_note(&f.text));
    assert_eq!(about.count(), notes as usize);
    let others = report.findings.iter().filter(|f| !is_note(&f.text));
    assert_eq!(others.count(), 0, "after an orderly unload: {report:?}");
    assert_eq!(report.worst(), None);
    Blobstore::load(dev, &LoadOptions::default()).unwrap()
}

fn thick(num_clusters: u64) -> CreateOptions {
    CreateOptions::default().num_clusters(num_clusters)
}

fn thin(num_clusters: u64) -> CreateOptions {
    CreateOptions::default()
        .num_clusters(num_clusters)
        .thin(true)
}

#[test]
fn a_store_of_each_geometry_loads_again() {
    for (cluster_size, block_size, md_pages) in [
        (4096, 512, Some(500)),
        (65536, 512, Some(100)),
        (1 << 20, 4096, None),
        (12288, 4096, Some(40_000)),
    ] {
        let dev = memory(256 << 20, block_size);
        let opts = InitOptions::default()
            .cluster_size(cluster_size)
            .md_pages(md_pages)
            .bstype(BsType::LVOLSTORE);
        let store = Blobstore::init(dev.clone(), &opts).unwrap();
        assert_eq!(store.cluster_size(), u64::from(cluster_size));
        assert_eq!(store.io_unit_size(), block_size);
        let id = store.create(&thick(2)).unwrap();
        assert_eq!(id, BlobId::from_page(0));
        let blob = store.open(id).unwrap();
        write(&blob, 4096, &[7; 4096]);
        drop(blob);
        let (free, total) = (store.free_clusters(), store.total_clusters());
        assert_eq!(free, total - 2);
        let store = reload(store);
        assert_eq!(
            (store.free_clusters(), store.total_clusters()),
            (free, total)
        );
        assert_eq!(store.bstype(), BsType::LVOLSTORE);
        assert_eq!(read(&store.open(id).unwrap(), 4096, 4096), [7; 4096]);
    }
    assert!(matches!(
        Blobstore::init(memory(8192, 512), &InitOptions::default()),
        Err(Error::InvalidInput(_) | Error::Geometry { .. })
    ));
    // By default clusters of one page have room beside the metadata pages.
    let opts = InitOptions::default().cluster_size(4096);
    let store = Blobstore::init(memory(1 << 24, 512), &opts).unwrap();
    assert_eq!(store.md_pages().total, 1024);
    assert!(store.free_clusters() > 3000);
    let opts = opts.md_pages(Some(4096));
    let error = Blobstore::init(memory(1 << 24, 512), &opts)
        .unwrap_err()
        .to_string();
    assert!(error.contains("md_pages"), "{error}");
    let opts = InitOptions::default().cluster_size(5000);
    assert!(matches!(
        Blobstore::init(memory(1 << 24, 512), &opts),
        Err(Error::InvalidInput(_))
    ));
}

#[test]
fn xattrs_large_small_and_many() {
    let store = store(16 << 20);
    let id = store.create(&thick(1)).unwrap();
    let blob = store.open(id).unwrap();
    blob.set_xattr("name", b"one").unwrap();
    assert_eq!(blob.xattr("name").unwrap(), b"one");
    blob.set_xattr("empty", b"").unwrap();
    blob.sync_md().unwrap();
    for i in 0..20 {
        blob.set_xattr(&format!("big{i}"), &vec![i; 3500]).unwrap();
    }
    blob.set_xattr("name", b"two").unwrap();
    blob.remove_xattr("empty").unwrap();
    assert!(blob.remove_xattr("empty").is_err());
    assert_eq!(blob.xattr("empty"), None);
    blob.sync_md().unwrap();
    assert!(blob.set_xattr("", b"x").is_err());
    assert!(blob.set_xattr("nul\0", b"x").is_err());
    assert!(blob.set_xattr("huge", &[0; 4060]).is_err());
    blob.set_xattr("largest", &[1; 4056]).unwrap();
    blob.sync_md().unwrap();
    let names = blob.xattr_names();
    let used = store.md_pages().used;
    drop(blob);
    let store = reload(store);
    assert_eq!(store.md_pages().used, used);
    let blob = store.open(id).unwrap();
    assert_eq!(blob.xattr_names(), names);
    assert_eq!(blob.xattr("name").unwrap(), b"two");
    assert_eq!(blob.xattr("big19").unwrap(), [19; 3500]);
    for name in names {
        blob.remove_xattr(&name).unwrap();
    }
    blob.sync_md().unwrap();
    assert_eq!(store.md_pages().used, 2);
}

#[test]
fn sizes_up_and_down() {
    for extent_table in [true, false] {
        let store = store(64 << 20);
        let opts = thick(0).extent_table(extent_table);
        let id = store.create(&opts).unwrap();
        let blob = store.open(id).unwrap();
        let free = store.free_clusters();
        for size in [1, 511, 512, 513, 1024, 1025, 600, 512, 3, 0, 2000, 7] {
            let before = blob.num_clusters();
            blob.resize(size).unwrap();
            assert_eq!(blob.num_clusters(), size);
            assert_eq!(blob.num_allocated(), size);
            assert_eq!(store.free_clusters(), free - size);
            if size > before {
                // New clusters read as zeroes. Then they are written.
                assert_eq!(read(&blob, (size - 1) * CLUSTER, 16384), [0; 16384]);
                for index in before..size {
                    write(&blob, index * CLUSTER, &[index.to_le_bytes()[0] | 1; 4096]);
                }
            }
            // The same is there without an unload, as after a crash.
            let again = memory_with(&content(store.device()), store.device().info().block_size);
            let again = Blobstore::load(again, &LoadOptions::default()).unwrap();
            assert_eq!(again.free_clusters(), store.free_clusters());
            assert_eq!(whole(&again.open(id).unwrap()), whole(&blob));
        }
        drop(blob);
        reload(store);
    }
}

#[test]
fn new_clusters_never_show_old_bytes() {
    for clear_method in [
        ClearMethod::None,
        ClearMethod::Default,
        ClearMethod::WriteZeroes,
    ] {
        let store = store(8 << 20);
        let all = store.free_clusters();
        let old = store
            .create(&thick(all).clear_method(clear_method))
            .unwrap();
        let blob = store.open(old).unwrap();
        for index in 0..all {
            write(&blob, index * CLUSTER, &[0xee; 16384]);
        }
        drop(blob);
        store.delete(old).unwrap();
        let blob = store.open(store.create(&thick(5)).unwrap()).unwrap();
        assert!(whole(&blob).iter().all(|byte| *byte == 0));
        blob.resize(9).unwrap();
        assert!(whole(&blob).iter().all(|byte| *byte == 0));
        let blob = store.open(store.create(&thin(9)).unwrap()).unwrap();
        write(&blob, 3 * CLUSTER + 4096, &[1; 4096]);
        assert_eq!(whole(&blob).iter().filter(|byte| **byte != 0).count(), 4096);
        assert!(whole(&blob).iter().all(|byte| *byte != 0xee));
        // A caller who writes everything can do without the clearing.
        let opts = thick(2).init(ClusterInit::CallerWrites);
        let blob = store.open(store.create(&opts).unwrap()).unwrap();
        assert_eq!(
            whole(&blob).contains(&0xee),
            clear_method == ClearMethod::None
        );
    }
}

#[test]
fn exhaustion_leaves_everything_as_it_was() {
    let opts = InitOptions::default()
        .cluster_size(16384)
        .md_pages(Some(12));
    let store = Blobstore::init(memory(4 << 20, 4096), &opts).unwrap();
    let free = store.free_clusters();
    assert!(matches!(
        store.create(&thick(free + 1)),
        Err(Error::NoSpace { .. })
    ));
    let a = store.open(store.create(&thick(3)).unwrap()).unwrap();
    let b = store.open(store.create(&thin(10 * free)).unwrap()).unwrap();
    let used = store.md_pages();
    assert!(matches!(a.resize(free + 1), Err(Error::NoSpace { .. })));
    a.set_xattr("big", &[1; 3000]).unwrap();
    a.sync_md().unwrap();
    for i in 0..20 {
        a.set_xattr(&format!("x{i}"), &[2; 4000]).unwrap();
    }
    assert!(matches!(a.sync_md(), Err(Error::NoMdPages { .. })));
    assert_eq!(store.md_pages(), used);
    assert!(
        matches!(a.resize(4), Ok(())),
        "a change without many pages still fits"
    );
    let mut written = 0;
    let error = loop {
        let mut buf = DmaBuf::new(4096).unwrap();
        buf.fill(3);
        match b.write_at(written * CLUSTER, buf.freeze(), false) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
    };
    assert!(
        matches!(error, Error::NoSpace { .. } | Error::NoMdPages { .. }),
        "{error}"
    );
    assert_eq!(store.free_clusters() + written, free - 4);
    // A full store can be emptied.
    let id = b.id();
    drop(b);
    store.delete(id).unwrap();
    assert_eq!(store.free_clusters(), free - 4);
    drop(a);
    reload(store);
}

#[test]
fn transactions_are_all_or_nothing() {
    let store = store(8 << 20);
    let old = store.create(&thick(2)).unwrap();
    let mut t = store.transaction();
    let new = t.create(thick(1));
    t.set_xattr(new, "name", b"fresh");
    t.set_xattr(old, "name", b"old");
    t.resize(new, 4);
    let committed = t.commit().unwrap();
    let new = committed.id(new);
    assert_eq!(store.open(new).unwrap().num_clusters(), 4);
    assert_eq!(store.open(new).unwrap().xattr("name").unwrap(), b"fresh");

    let free = store.free_clusters();
    let mut t = store.transaction();
    t.create(thick(3));
    t.set_xattr(new, "name", b"changed");
    t.resize(old, 1_000_000);
    assert!(matches!(t.commit(), Err(Error::NoSpace { .. })));
    assert_eq!(store.free_clusters(), free);
    assert_eq!(store.blobs(), [old, new]);
    assert_eq!(store.open(new).unwrap().xattr("name").unwrap(), b"fresh");

    let mut t = store.transaction();
    t.delete(old);
    t.set_xattr(new, "name", b"last");
    t.commit().unwrap();
    assert_eq!(store.blobs(), [new]);
    let store = reload(store);
    assert_eq!(store.open(new).unwrap().xattr("name").unwrap(), b"last");
}

#[test]
fn a_transaction_deletes_a_blob_once_and_removes_what_is_there() {
    let store = store(8 << 20);
    let [a, b] = [2, 3].map(|clusters| store.create(&thick(clusters)).unwrap());
    let before = (store.blobs(), store.free_clusters(), store.md_pages().used);
    type Steps = fn(&mut Transaction, BlobId);
    let wrong: [(&str, Steps); 3] = [
        ("deleted twice", |t, a| {
            t.delete(a);
            t.delete(a);
        }),
        ("changed, then deleted", |t, a| {
            t.set_xattr(a, "name", b"a");
            t.delete(a);
        }),
        ("without that xattr", |t, a| t.remove_xattr(a, "name")),
    ];
    for (what, steps) in wrong {
        let mut t = store.transaction();
        t.set_xattr(b, "name", b"b");
        steps(&mut t, a);
        assert!(matches!(t.commit(), Err(Error::InvalidInput(_))), "{what}");
        assert_eq!(
            (store.blobs(), store.free_clusters(), store.md_pages().used),
            before,
            "{what}"
        );
        assert_eq!(store.open(b).unwrap().xattr("name"), None, "{what}");
    }
    let mut t = store.transaction();
    t.set_xattr(b, "name", b"b");
    t.commit().unwrap();
    let mut t = store.transaction();
    t.remove_xattr(b, "name");
    t.commit().unwrap();
    assert_eq!(store.open(b).unwrap().xattr("name"), None);
}

#[test]
fn open_blobs_are_counted() {
    let store = store(8 << 20);
    let id = store.create(&thick(1)).unwrap();
    let a = store.open(id).unwrap();
    let b = store.open(id).unwrap();
    a.set_xattr("seen", b"by both").unwrap();
    assert_eq!(b.xattr("seen").unwrap(), b"by both");
    assert!(matches!(store.delete(id), Err(Error::Busy(_))));
    assert!(matches!(store.unload(), Err(Error::Busy(_))));
    drop(a);
    assert!(matches!(store.delete(id), Err(Error::Busy(_))));
    drop(b);
    store.delete(id).unwrap();
    assert!(matches!(store.open(id), Err(Error::NoSuchBlob(_))));
    store.unload().unwrap();
    assert!(matches!(store.create(&thick(1)), Err(Error::Unloaded)));
}

#[test]
fn reads_and_writes_across_clusters() {
    let store = store(8 << 20);
    let blobs = [
        store.create(&thick(9)).unwrap(),
        store.create(&thin(9)).unwrap(),
    ];
    for id in blobs {
        let blob = store.open(id).unwrap();
        let mut model = vec![0; usize::try_from(blob.len_bytes()).unwrap()];
        for (i, (offset, len)) in [
            (0, 4096),
            (12288, 8192),
            (4096, 70_000 / 4096 * 4096),
            (140_000 / 4096 * 4096, 4096),
            (32768, 16384),
        ]
        .into_iter()
        .enumerate()
        {
            let bytes: Vec<u8> = (0..len)
                .map(|at: usize| (at / 512 + i + 1).to_le_bytes()[0])
                .collect();
            write(&blob, offset as u64, &bytes);
            model[offset..offset + len].copy_from_slice(&bytes);
            assert!(whole(&blob) == model);
        }
        blob.write_zeroes_at(8192, 40960).unwrap();
        model[8192..49152].fill(0);
        assert!(whole(&blob) == model);
        let before = blob.num_allocated();
        blob.unmap_at(0, blob.len_bytes()).unwrap();
        model.fill(0);
        assert!(whole(&blob) == model);
        assert_eq!(
            blob.num_allocated(),
            if blob.is_thin() { 0 } else { before }
        );
        let out = blob.read_at(blob.len_bytes(), DmaBuf::new(4096).unwrap());
        assert!(matches!(out, Err(Error::OutOfRange { .. })));
        let out = blob.read_at(100, DmaBuf::new(4096).unwrap());
        assert!(matches!(out, Err(Error::InvalidInput(_))));
    }
    assert_eq!(store.free_clusters(), store.total_clusters() - 9);
}

#[test]
fn vectored_io() {
    let store = store(8 << 20);
    let blob = store.open(store.create(&thin(4)).unwrap()).unwrap();
    let ch = store.channel().unwrap();
    let slices = [1u8, 2, 3].map(|byte| {
        let mut buf = DmaBuf::new(8192).unwrap();
        buf.fill(byte);
        buf.freeze()
    });
    ch.block_on(blob.write_vectored(&ch, 8192, slices.to_vec(), true))
        .unwrap();
    let bufs = (0..4).map(|_| DmaBuf::new(8192).unwrap()).collect();
    let bufs = ch.block_on(blob.read_vectored(&ch, 0, bufs)).unwrap();
    let firsts: Vec<u8> = bufs.iter().map(|buf| buf[5000]).collect();
    assert_eq!(firsts, [0, 1, 2, 3]);
}

#[test]
fn many_threads_on_many_blobs() {
    let store = store(32 << 20);
    let shared = store.open(store.create(&thin(64)).unwrap()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (store, shared) = (&store, &shared);
            scope.spawn(move || {
                let own = store.open(store.create(&thin(32)).unwrap()).unwrap();
                for round in 0..50u64 {
                    let byte = (thread * 50 + round).to_le_bytes()[0] | 1;
                    let offset = round % 32 * CLUSTER;
                    write(&own, offset, &[byte; 4096]);
                    assert_eq!(read(&own, offset, 4096), [byte; 4096]);
                    // Each thread writes every fourth cluster of the shared blob.
                    let offset = (round % 16 * 4 + thread) * CLUSTER;
                    write(shared, offset, &[byte; 4096]);
                    assert_eq!(read(shared, offset, 4096), [byte; 4096]);
                    if round % 10 == 0 {
                        own.set_xattr("round", &round.to_le_bytes()).unwrap();
                        own.sync_md().unwrap();
                        own.resize(32 + round % 3).unwrap();
                    }
                }
            });
        }
    });
    drop(shared);
    let store = reload(store);
    assert_eq!(store.blobs().len(), 5);
}

#[test]
fn a_caller_may_use_a_channel_of_his_own() {
    let store = store(8 << 20);
    let blob = store.open(store.create(&thick(4)).unwrap()).unwrap();
    let ch = AsyncChannel::new(store.device().open_channel().unwrap());
    let mut buf = DmaBuf::new(4096).unwrap();
    buf.fill(9);
    ch.block_on(blob.write(&ch, 0, buf.freeze(), false))
        .unwrap();
    let lba = blob.extents().lba(0).unwrap();
    let direct = ch
        .block_on(ch.read(lba, DmaBuf::new(4096).unwrap()))
        .unwrap();
    assert_eq!(direct[..], [9; 4096]);
}

#[test]
fn the_super_blob_is_kept() {
    let store = store(8 << 20);
    assert_eq!(store.super_blob(), None);
    let id = store.create(&thick(1)).unwrap();
    store.set_super_blob(Some(id)).unwrap();
    let again = memory_with(&content(store.device()), store.device().info().block_size);
    let again = Blobstore::load(again, &LoadOptions::default()).unwrap();
    assert_eq!(again.super_blob(), Some(id));
    drop(again);
    let store = reload(store);
    assert_eq!(store.super_blob(), Some(id));
    store.set_super_blob(None).unwrap();
    assert_eq!(reload(store).super_blob(), None);
}

#[test]
fn unmapping_spans_pages_of_the_map() {
    for extent_table in [true, false] {
        let store = store(8 << 20);
        let opts = thin(2500).extent_table(extent_table);
        let id = store.create(&opts).unwrap();
        let blob = store.open(id).unwrap();
        let written = [0, 900, 1019, 1020, 1500, 2039, 2040, 2499];
        for cluster in written {
            write(&blob, cluster * CLUSTER, &[5; 4096]);
        }
        assert_eq!(blob.num_allocated(), written.len() as u64);
        blob.unmap_at(900 * CLUSTER, 1500 * CLUSTER).unwrap();
        drop(blob);
        let store = reload(store);
        let blob = store.open(id).unwrap();
        assert_eq!(blob.num_allocated(), 2);
        for cluster in written {
            let byte = if [0, 2499].contains(&cluster) { 5 } else { 0 };
            let found = read(&blob, cluster * CLUSTER, 4096);
            assert!(found == [byte; 4096], "{cluster}");
        }
    }
}
