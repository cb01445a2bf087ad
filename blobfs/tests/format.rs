//! Reads what the crate writes with a parser that shares nothing with it.

mod common;

use common::*;
use pumice_blobfs::blobstore::{
    Blob, Blobstore, BsType, ClearMethod, CreateOptions, InitOptions, LoadOptions,
};

/// SPDK's own images obey the same rules, so the rules are SPDK's.
#[test]
fn the_parser_agrees_with_spdk() {
    for name in [
        "small-bs-4k.img",
        "small-bs-4k-dirty.img",
        "small-blobfs-4096.img",
        "small-rdb-clean.img",
    ] {
        let facts = facts(name);
        let store = strict::parse(&image(name));
        assert_eq!(store.clean, !name.contains("dirty"), "{name}");
        for line in store.listing() {
            assert!(facts.contains(&line), "{name}: {line}");
        }
    }
}

fn create(store: &Blobstore, num_clusters: u64, thin: bool, extent_table: bool) -> Blob {
    let opts = CreateOptions::default()
        .num_clusters(num_clusters)
        .thin(thin)
        .extent_table(extent_table)
        .clear_method(ClearMethod::Unmap);
    store.open(store.create(&opts).unwrap()).unwrap()
}

fn touch(blob: &Blob, cluster: u64) {
    write(blob, cluster * blob.store().cluster_size(), &[7; 4096]);
}

/// Makes every kind of content, step by step.
fn fill(store: &Blobstore, mut after: impl FnMut(&str)) {
    for extent_table in [true, false] {
        let empty = create(store, 0, false, extent_table);
        after("an empty blob");
        let thick = create(store, 3, false, extent_table);
        thick.set_xattr("name", b"/a\0").unwrap();
        for i in 0..6 {
            thick.set_xattr(&format!("big{i}"), &[i; 3000]).unwrap();
        }
        thick.sync_md().unwrap();
        after("a chain of xattrs");
        thick.remove_xattr("big3").unwrap();
        thick.set_xattr("max", &[9; 4060]).unwrap();
        thick.sync_md().unwrap();
        after("an xattr that fills a page");
        let thin = create(store, 2, true, extent_table);
        touch(&thin, 1);
        thin.resize(600).unwrap();
        after("a thin blob of two extent pages");
        touch(&thin, 511);
        touch(&thin, 512);
        thin.resize(3000).unwrap();
        touch(&thin, 2999);
        after("holes between extent pages");
        thin.unmap_at(512 * store.cluster_size(), store.cluster_size())
            .unwrap();
        after("an extent page without clusters");
        thin.resize(513).unwrap();
        thin.resize(512).unwrap();
        thin.resize(100).unwrap();
        after("a shrunk blob");
        let snapshot = store.snapshot(thin.id(), &[]).unwrap();
        after("a snapshot");
        touch(&thin, 1);
        touch(&thin, 50);
        let second = store
            .snapshot(thin.id(), &[("x".to_owned(), vec![1])])
            .unwrap();
        let clone = store.clone_blob(snapshot, &[]).unwrap();
        touch(&store.open(clone).unwrap(), 7);
        after("a chain of snapshots and a clone");
        store.delete(second).unwrap();
        after("a snapshot deleted under its clone");
        let small = create(store, 5, false, extent_table);
        let of_small = store.snapshot(small.id(), &[]).unwrap();
        after("a snapshot of a thick blob");
        store.inflate(small.id()).unwrap();
        store.delete(of_small).unwrap();
        after("an inflated blob");
        let other = store.clone_blob(snapshot, &[]).unwrap();
        store.decouple(other).unwrap();
        after("a decoupled clone");
        thick.set_read_only().unwrap();
        after("a read-only blob");
        let long = create(store, 400_000, true, extent_table);
        for cluster in [0, 1, 511, 5000, 5001, 5002, 399_999] {
            touch(&long, cluster);
        }
        after("a long table");
        drop((empty, thick, thin, small));
        store.delete(other).unwrap();
        after("a deleted blob");
    }
}

/// Every state of a store follows the format: dirty after each step, clean after an unload.
#[test]
fn every_state_is_as_the_format_says() {
    for (block_size, cluster_size, md_pages, bstype) in [
        (4096, 16384, None, BsType::NONE),
        (512, 65536, None, BsType::LVOLSTORE),
        (512, 4096, Some(700), BsType::BLOBFS),
        (4096, 36864, None, BsType::NONE),
    ] {
        let dev = memory(24 << 20, block_size);
        let opts = InitOptions::default()
            .cluster_size(cluster_size)
            .md_pages(md_pages)
            .bstype(bstype);
        let mut store = Blobstore::init(dev.clone(), &opts).unwrap();
        let bytes = content(&dev);
        assert!(!strict::parse(&bytes).clean);
        assert_eq!(&bytes[56..72], &bstype.0);
        let again = store.clone();
        fill(&store, |what| {
            let parsed = strict::parse(&content(&dev));
            assert!(!parsed.clean, "{what}");
            assert_eq!(parsed.listing(), listing(&again), "{what}");
        });
        drop(again);
        let before = listing(&store);
        for _ in 0..2 {
            store.unload().unwrap();
            drop(store);
            let parsed = strict::parse(&content(&dev));
            assert!(parsed.clean);
            assert_eq!(parsed.listing(), before);
            store = Blobstore::load(dev.clone(), &LoadOptions::default()).unwrap();
            assert_eq!(listing(&store), before);
            store.set_super_blob(None).unwrap();
        }
    }
}

/// Checks the image of an empty store field by field.
#[test]
fn the_super_block_of_a_new_store() {
    let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let dev = memory(192 << 20, 4096);
    let opts = InitOptions::default().bstype(BsType::NONE);
    Blobstore::init(dev.clone(), &opts)
        .unwrap()
        .unload()
        .unwrap();
    let (ours, spdk) = (content(&dev), image("small-bs-4k.img"));
    // SPDK made its store on a device of the same size with the same options: everything but the id
    // of the super blob is the same.
    for at in (8..96).step_by(4).filter(|at| ![20, 24].contains(at)) {
        assert_eq!(word(&ours, at), word(&spdk, at), "offset {at}");
    }
}
