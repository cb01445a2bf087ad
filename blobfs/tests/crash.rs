//! Tests of power cuts: for each operation of several steps, power is cut after every event on the
//! device, with and without a volatile cache of which any part is lost. The content of the device
//! then obeys the format, so SPDK loads it; the store opens, passes the check, and holds the old or
//! the new state.

mod common;
#[path = "crash/growth.rs"]
mod growth;
#[path = "crash/repair.rs"]
mod repair;

use std::sync::Arc;

use common::*;
use pumice_bdev::BlockDevice;
use pumice_bdev_testkit::crashsim::{CrashDevice, CrashImage, CrashOptions, Unsettled};
use pumice_blobfs::blobstore::check::{Severity, check, repair};
use pumice_blobfs::blobstore::{BlobId, Blobstore, CreateOptions, InitOptions, LoadOptions};
use rand::prelude::*;

const CLUSTER: u64 = 8192;

fn device(image: CrashImage, write_cache: bool, seed: u64) -> CrashDevice {
    // Metadata pages are written whole or not at all: this protocol does not cover torn ones.
    let options = CrashOptions::default()
        .block_size(4096)
        .write_cache(write_cache)
        .seed(seed)
        .tear_bytes(4096);
    CrashDevice::with_options(&options, image)
}

/// A device that supports other operations than most.
#[derive(Debug, Clone, Copy)]
enum Ability {
    /// It supports FUA, write zeroes and unmap.
    Usual,
    /// Only a flush makes anything durable.
    NoFua,
    /// It copies by itself, which cannot carry FUA.
    Copies,
    /// It supports only reads, writes and flushes.
    Plain,
    /// It has blocks of 512 bytes.
    SmallBlocks,
}

fn able(image: CrashImage, write_cache: bool, seed: u64, ability: Ability) -> CrashDevice {
    let mut options = CrashOptions::default()
        .block_size(4096)
        .write_cache(write_cache)
        .seed(seed)
        .tear_bytes(4096);
    match ability {
        Ability::Usual => {}
        Ability::NoFua => options.fua = false,
        Ability::Copies => options.copy = true,
        Ability::Plain => {
            options.fua = false;
            options.unmap = false;
            options.write_zeroes = false;
        }
        Ability::SmallBlocks => options.block_size = 512,
    }
    CrashDevice::with_options(&options, image)
}

fn load(dev: &CrashDevice) -> Blobstore {
    Blobstore::load(Arc::new(dev.clone()), &LoadOptions::default()).unwrap()
}

/// Describes everything that can be seen of a store.
fn describe(store: &Blobstore) -> Vec<String> {
    assert_eq!(store.damaged(), []);
    let mut lines = listing(store);
    for id in store.blobs() {
        lines.push(format!(
            "{id} {:#x}",
            crc32c::crc32c(&whole(&store.open(id).unwrap()))
        ));
    }
    let clusters: u64 = store
        .blobs()
        .iter()
        .map(|id| store.open(*id).unwrap().num_allocated())
        .sum();
    lines.push(format!(
        "{} clusters, {:?}",
        store.total_clusters(),
        store.super_blob()
    ));
    assert_eq!(
        store.free_clusters() + clusters,
        store.total_clusters(),
        "clusters without an owner"
    );
    lines
}

/// Checks a state after a power cut: the store opens and passes the check, and is the same after an
/// orderly unload.
fn state_after(image: &CrashImage, allowed: &[&[String]], what: &str) {
    state_after_on(image, allowed, what, Ability::Usual);
}

fn state_after_on(image: &CrashImage, allowed: &[&[String]], what: &str, ability: Ability) {
    strict::parse_of(&image.to_vec(), what);
    let dev = able(image.clone(), false, 0, ability);
    let as_dyn: Arc<dyn BlockDevice> = Arc::new(dev.clone());
    let report = check(&as_dyn).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(
        report.findings.iter().all(|f| f.severity == Severity::Note),
        "{what}: {:?}",
        report.findings
    );
    let store = load(&dev);
    let found = describe(&store);
    if !allowed.contains(&&found[..]) {
        panic!("{what}: neither old nor new:\nfound {found:#?}\nallowed {allowed:#?}");
    }
    if dev.len_events() > 0 {
        cut_in_the_load(image, allowed, what, ability);
    }
    // It can be used.
    let id = store.create(&CreateOptions::default().num_clusters(1));
    if let Ok(id) = id {
        let blob = store.open(id).unwrap();
        assert!(
            whole(&blob).iter().all(|byte| *byte == 0),
            "{what}: old bytes in a new blob"
        );
        drop(blob);
        store.delete(id).unwrap();
    }
    store.unload().unwrap();
    assert!(
        strict::parse_of(&dev.image().to_vec(), what).clean,
        "{what}"
    );
    let report = check(&as_dyn).unwrap();
    assert_eq!(report.worst(), None, "{what}: {:?}", report.findings);
    assert_eq!(
        describe(&load(&dev)),
        found,
        "{what}: after an orderly unload"
    );
}

/// Cuts the power in a load that has something to repair: the next load finds the old or the new
/// state too.
fn cut_in_the_load(image: &CrashImage, allowed: &[&[String]], what: &str, ability: Ability) {
    let dev = able(image.clone(), true, 5, ability);
    drop(load(&dev));
    let mut points = dev.crash_points();
    while points.advance().is_some() {
        for all in [false, true] {
            let image = points.image(&mut |_| all);
            let found = describe(&load(&able(image, false, 0, ability)));
            let position = points.position();
            assert!(
                allowed.contains(&&found[..]),
                "{what}, cut in the load after event {position}: neither old nor new:\n{found:#?}"
            );
        }
    }
}

/// Makes a small store with a few blobs of all kinds, one of them with a long extent table.
fn setup(table: bool) -> (CrashImage, Vec<BlobId>) {
    setup_on(&device(CrashImage::zeroed(4 << 20), false, 0), table)
}

fn setup_on(dev: &CrashDevice, table: bool) -> (CrashImage, Vec<BlobId>) {
    let opts = InitOptions::default().cluster_size(8192).md_pages(Some(80));
    let store = Blobstore::init(Arc::new(dev.clone()), &opts).unwrap();
    let mut ids = Vec::new();
    for (num_clusters, thin) in [(3, false), (6, true), (530, true), (2, false)] {
        let xattrs = vec![
            ("name".to_owned(), vec![b'x'; 40]),
            ("big".to_owned(), vec![7; 2500]),
        ];
        let opts = CreateOptions::default()
            .num_clusters(num_clusters)
            .thin(thin)
            .xattrs(xattrs)
            .extent_table(table);
        let id = store.create(&opts).unwrap();
        let blob = store.open(id).unwrap();
        write(&blob, 0, &[ids.len().to_le_bytes()[0] + 1; 4096]);
        write(
            &blob,
            (num_clusters - 1) * CLUSTER,
            &[ids.len().to_le_bytes()[0] + 11; 8192],
        );
        ids.push(id);
    }
    // This cluster holds only zeroes.
    write(&store.open(ids[2]).unwrap(), 520 * CLUSTER, &[0; 4096]);
    // This is a chain: snapshot a of blob 1, then b, then a clone of a.
    let a = store.snapshot(ids[1], &[]).unwrap();
    write(&store.open(ids[1]).unwrap(), 2 * CLUSTER, &[21; 4096]);
    let b = store
        .snapshot(ids[1], &[("big".to_owned(), vec![1; 3900])])
        .unwrap();
    write(&store.open(ids[1]).unwrap(), 3 * CLUSTER, &[22; 4096]);
    ids.extend([a, b]);
    store.unload().unwrap();
    (dev.image(), ids)
}

/// Cuts the power at every event of `op`.
fn cut_everywhere(name: &str, op: impl Fn(&Blobstore, &[BlobId])) {
    let mut states = 0;
    for table in [true, false] {
        let (base, ids) = setup(table);
        for (write_cache, dirty, ability) in [
            (false, false, Ability::Usual),
            (true, false, Ability::Usual),
            (true, true, Ability::Usual),
            (true, true, Ability::NoFua),
            (true, false, Ability::Copies),
            (true, true, Ability::Plain),
            (true, false, Ability::SmallBlocks),
        ] {
            if !table && !matches!(ability, Ability::Usual) {
                continue;
            }
            // The images of stores on small blocks say so, and are made on such a device.
            let small = matches!(ability, Ability::SmallBlocks);
            let (base, ids) = if small {
                setup_on(&able(CrashImage::zeroed(4 << 20), false, 0, ability), table)
            } else {
                (base.clone(), ids.clone())
            };
            let dev = able(base, write_cache, 7, ability);
            let store = load(&dev);
            if dirty {
                store.set_super_blob(Some(ids[0])).unwrap();
            }
            let old = describe(&store);
            let start = dev.len_events();
            op(&store, &ids);
            let new = if dev.image().to_vec()[16] == 1 {
                old.clone()
            } else {
                describe(&store)
            };
            let mut rng = SmallRng::seed_from_u64(11);
            let mut points = dev.crash_points();
            while points.advance().is_some() {
                if points.position() < start {
                    continue;
                }
                let open = points.unsettled().len();
                let rounds = if open == 0 { 1 } else { 2 + open.min(4) };
                for round in 0..rounds {
                    let mut choose = |_: &Unsettled| match round {
                        0 => false,
                        1 => true,
                        _ => rng.random_bool(0.5),
                    };
                    let image = points.image(&mut choose);
                    let what = format!(
                        "{name}, table {table}, cache {write_cache}, dirty {dirty}, {ability:?}, after event {} of {}, round {round}",
                        points.position(),
                        points.len_events()
                    );
                    // What was acknowledged is there, whatever part of the rest is lost.
                    let ended = points.position() == points.len_events();
                    let allowed: &[&[String]] = if ended { &[&new] } else { &[&old, &new] };
                    state_after_on(&image, allowed, &what, ability);
                    states += 1;
                }
            }
        }
    }
    println!("{name}: {states} states");
    assert!(states > 10, "{name}: only {states} states");
}

#[test]
fn create() {
    cut_everywhere("create", |store, _| {
        let xattrs = (0..4).map(|i| (format!("x{i}"), vec![i; 3000])).collect();
        let opts = CreateOptions::default().num_clusters(5).xattrs(xattrs);
        store.create(&opts).unwrap();
    });
}

#[test]
fn resize() {
    // The blobs are thick and thin; the sizes stay in an extent page or cross its end, up and down.
    for (number, size) in [(0, 9), (0, 1), (2, 1030), (2, 513), (2, 400), (1, 2)] {
        cut_everywhere("resize", |store, ids| {
            store.open(ids[number]).unwrap().resize(size).unwrap();
        });
    }
}

/// Changes every page of a chain of several.
#[test]
fn xattrs_of_many_pages() {
    cut_everywhere("prepare", |store, ids| {
        let mut all = store.transaction();
        for i in 0..3 {
            all.set_xattr(ids[3], &format!("long{i}"), &[i; 3000]);
        }
        all.commit().unwrap();
    });
    for table in [true, false] {
        let (base, ids) = setup(table);
        let dev = device(base, false, 7);
        let store = load(&dev);
        let set = |byte: u8| {
            let mut all = store.transaction();
            for i in 0..3u8 {
                all.set_xattr(ids[3], &format!("long{i}"), &[byte + i; 3000]);
            }
            all.commit().unwrap();
        };
        let state = || {
            let blob = store.open(ids[3]).unwrap();
            (0..3)
                .map(|i| blob.xattr(&format!("long{i}")))
                .collect::<Vec<_>>()
        };
        set(10);
        let (start, old) = (dev.len_events(), state());
        set(20);
        let new = state();
        let mut points = dev.crash_points();
        while points.advance().is_some() {
            if points.position() < start {
                continue;
            }
            for all in [false, true] {
                let image = points.image(&mut |_| all);
                let what = format!("chain, after event {}", points.position());
                strict::parse_of(&image.to_vec(), &what);
                let after = load(&device(image, false, 0));
                assert_eq!(after.damaged(), [], "{what}");
                let blob = after.open(ids[3]).unwrap();
                let found: Vec<_> = (0..3).map(|i| blob.xattr(&format!("long{i}"))).collect();
                assert!(found == old || found == new, "{what}");
            }
        }
    }
}

/// Data that was written before a snapshot and is only in the device's cache is durable with the snapshot.
#[test]
fn data_in_the_cache_become_durable_with_a_snapshot() {
    for ability in [Ability::Usual, Ability::NoFua] {
        let (base, ids) = setup(true);
        let dev = able(base, true, 7, ability);
        let store = load(&dev);
        let blob = store.open(ids[0]).unwrap();
        write(&blob, 0, &[77; 8192]);
        let snapshot = store.snapshot(ids[0], &[]).unwrap();
        let image = dev.image_after(dev.len_events(), &mut |_| false);
        let after = load(&device(image, false, 0));
        assert_eq!(read(&after.open(snapshot).unwrap(), 0, 8192), [77; 8192]);
        assert_eq!(read(&after.open(ids[0]).unwrap(), 0, 8192), [77; 8192]);
    }
}

/// The same holds for an unload, and for a durable write if the device has no FUA.
#[test]
fn data_in_the_cache_become_durable_with_an_unload_and_a_durable_write() {
    for (ability, fua) in [
        (Ability::Usual, false),
        (Ability::NoFua, false),
        (Ability::Usual, true),
        (Ability::NoFua, true),
    ] {
        let (base, ids) = setup(true);
        let dev = able(base, true, 7, ability);
        let store = load(&dev);
        let blob = store.open(ids[0]).unwrap();
        let mut data = pumice_bdev::DmaBuf::new(8192).unwrap();
        data.fill(78);
        blob.write_at(0, data.freeze(), fua).unwrap();
        drop(blob);
        if !fua {
            store.set_super_blob(None).unwrap();
            store.unload().unwrap();
        }
        drop(store);
        let image = dev.image_after(dev.len_events(), &mut |_| false);
        let after = load(&device(image, false, 0));
        assert_eq!(read(&after.open(ids[0]).unwrap(), 0, 8192), [78; 8192]);
    }
}

#[test]
fn first_write_to_a_thin_blob() {
    // The write itself changes the content, and is atomic here: one page, or one whole cluster.
    cut_everywhere("write", |store, ids| {
        let blob = store.open(ids[2]).unwrap();
        let mut buf = pumice_bdev::DmaBuf::new(8192).unwrap();
        buf.fill(0);
        blob.write_at(515 * CLUSTER, buf.freeze(), true).unwrap();
    });
}

#[test]
fn copy_on_write() {
    cut_everywhere("copy on write", |store, ids| {
        // This writes what is there already: the cluster moves, and the content stays.
        let blob = store.open(ids[1]).unwrap();
        let same = read(&blob, 5 * CLUSTER, 4096);
        write(&blob, 5 * CLUSTER, &same);
    });
}

#[test]
fn snapshot() {
    for number in 0..3 {
        cut_everywhere("snapshot", |store, ids| {
            store
                .snapshot(ids[number], &[("of".to_owned(), vec![5; 3000])])
                .unwrap();
        });
    }
}

#[test]
fn delete_snapshot() {
    cut_everywhere("delete the lower snapshot", |store, ids| {
        store.delete(ids[4]).unwrap();
    });
    cut_everywhere("delete the upper snapshot", |store, ids| {
        store.delete(ids[5]).unwrap();
    });
}

#[test]
fn delete() {
    cut_everywhere("delete", |store, ids| store.delete(ids[2]).unwrap());
}

#[test]
fn clone() {
    cut_everywhere("clone", |store, ids| {
        store
            .clone_blob(ids[5], &[("big".to_owned(), vec![1; 4000])])
            .unwrap();
    });
}

#[test]
fn inflate_and_decouple() {
    cut_everywhere("inflate", |store, ids| store.inflate(ids[1]).unwrap());
    cut_everywhere("decouple", |store, ids| store.decouple(ids[1]).unwrap());
}

#[test]
fn unmap_of_whole_clusters() {
    cut_everywhere("unmap", |store, ids| {
        let blob = store.open(ids[2]).unwrap();
        blob.unmap_at(520 * CLUSTER, CLUSTER).unwrap();
        assert_eq!(blob.extents().lba(520), None);
    });
}

#[test]
fn set_parent_and_read_only() {
    cut_everywhere("set parent", |store, ids| {
        store.set_parent(ids[1], ids[4]).unwrap();
    });
    cut_everywhere("set read-only", |store, ids| {
        store.open(ids[3]).unwrap().set_read_only().unwrap();
    });
}

#[test]
fn unload() {
    cut_everywhere("unload", |store, _| {
        store.set_super_blob(store.super_blob()).unwrap();
        store.unload().unwrap();
    });
}

#[test]
fn init() {
    for write_cache in [false, true] {
        let dev = device(
            CrashImage::from_bytes(&setup(true).0.to_vec()),
            write_cache,
            7,
        );
        let opts = InitOptions::default()
            .cluster_size(16384)
            .md_pages(Some(16))
            .force(true);
        let new = describe(&Blobstore::init(Arc::new(dev.clone()), &opts).unwrap());
        let (mut no_store, mut made) = (0, 0);
        let mut rng = SmallRng::seed_from_u64(3);
        let mut points = dev.crash_points();
        while points.advance().is_some() {
            for round in 0..4 {
                let image = points.image(&mut |_| match round {
                    0 => false,
                    1 => true,
                    _ => rng.random_bool(0.5),
                });
                let after = device(image.clone(), false, 0);
                // It is the old store, none, or the new one, which is empty.
                match Blobstore::load(Arc::new(after.clone()), &LoadOptions::default()) {
                    Ok(store) if store.cluster_size() == 8192 => {}
                    Ok(_) => {
                        state_after(&image, &[&new], "init");
                        made += 1;
                    }
                    Err(_) => no_store += 1,
                }
            }
        }
        assert!(no_store > 0 && made > 0);
    }
}
