//! Power cuts on a store with a journal. Each test names the rules of the protocol that it is about.
//!
//! A series of operations runs, the power is cut after events on the device, and any part of what was
//! not durable is lost, torn at the device's blocks. What was acknowledged is there then, and of the
//! operation that was cut either everything or nothing.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use common::journal::*;
use common::{listing, strict};
use pumice_bdev::{AsyncChannel, BlockDevice, DmaBuf};
use pumice_bdev_testkit::crashsim::{Action, CrashDevice, CrashImage, Event, Unsettled};
use pumice_blobfs::blobstore::check::{Severity, check};
use pumice_blobfs::blobstore::{Blobstore, CreateOptions, LoadOptions};
use rand::prelude::*;

/// Everything that two loads that may not write, in which every blob is read-only, are compared by.
fn contents(store: &Blobstore) -> Vec<String> {
    let lines = listing(store).into_iter();
    lines.map(|line| line.replace(" ro=1", " ro=0")).collect()
}

/// Checks a state after a power cut. Returns the number of states that this has looked at.
fn state_after(
    device: Device,
    image: &CrashImage,
    allowed: &[&[String]],
    what: &str,
    deep: bool,
) -> u64 {
    let dev = device.with(image.clone(), 5);
    let as_dyn: Arc<dyn BlockDevice> = Arc::new(dev.clone());
    let report = check(&as_dyn).unwrap_or_else(|error| panic!("{what}: {error}"));
    let worst = report.findings.iter().map(|finding| finding.severity).max();
    assert!(
        worst.is_none_or(|worst| worst == Severity::Note),
        "{what}: {:?}",
        report.findings
    );
    // A load that may not write sees the same, and writes nothing.
    let read_only = LoadOptions::default().read_only(true);
    let store = Blobstore::load(Arc::clone(&as_dyn), &read_only).unwrap();
    let seen = contents(&store);
    drop(store);
    assert_eq!(dev.len_events(), 0, "{what}: a read-only load has written");
    let store = load(&dev);
    let found = describe(&store);
    if !allowed.contains(&&found[..]) {
        panic!("{what}: neither old nor new:\nfound {found:#?}\nallowed {allowed:#?}");
    }
    // A load that writes ends a snapshot that is half made.
    let half = |text: &str| text.contains("a snapshot of");
    if !report.findings.iter().any(|finding| half(&finding.text)) {
        assert_eq!(seen, contents(&store), "{what}: read-only");
    }
    let mut states = 1;
    if deep {
        // A second cut, in the recovery.
        let mut points = dev.crash_points();
        let mut rng = SmallRng::seed_from_u64(3);
        while points.advance().is_some() {
            for round in 0..3 {
                let again = points.image(&mut |_| match round {
                    0 => false,
                    1 => true,
                    _ => rng.random_bool(0.5),
                });
                let second = load(&device.with(again, 6));
                let found = describe(&second);
                assert!(
                    allowed.contains(&&found[..]),
                    "{what}, cut in the load after event {}:\nfound {found:#?}\nallowed {allowed:#?}",
                    points.position()
                );
                states += 1;
            }
        }
    }
    // It can be used, and is what SPDK reads after an orderly unload.
    let id = store.create(&CreateOptions::default()).unwrap();
    store.delete(id).unwrap();
    store.unload().unwrap();
    assert!(
        strict::parse_of(&dev.image().to_vec(), what).clean,
        "{what}"
    );
    assert_eq!(version(&dev.image()), (3, 1), "{what}");
    assert_eq!(
        describe(&load(&dev)),
        found,
        "{what}: after an orderly unload"
    );
    states
}

type Op = Box<dyn Fn(&Blobstore) -> bool>;

/// Runs operations one after another, and cuts the power everywhere. `every` thins out the cuts,
/// `rounds` is the number of ways to lose what is not durable.
fn cut_everywhere(name: &str, device: Device, base: &CrashImage, ops: &[Op], every: usize) {
    let dev = device.with(base.clone(), 7);
    let store = load(&dev);
    // The state after each operation, and the event at which it was acknowledged.
    let mut acknowledged = vec![(0, describe(&store))];
    for op in ops {
        if op(&store) {
            acknowledged.push((dev.len_events(), describe(&store)));
        } else {
            // It has unloaded the store.
            let last = acknowledged.last().unwrap().1.clone();
            acknowledged.push((dev.len_events(), last));
        }
    }
    drop(store);
    let mut rng = SmallRng::seed_from_u64(11);
    let mut points = dev.crash_points();
    let mut states = 0;
    while points.advance().is_some() {
        if !points.position().is_multiple_of(every) {
            continue;
        }
        let at = points.position();
        let done = acknowledged
            .iter()
            .rposition(|(event, _)| *event <= at)
            .unwrap();
        let allowed: Vec<&[String]> = acknowledged[done..]
            .iter()
            .take(2)
            .map(|(_, state)| &state[..])
            .collect();
        let open = points.unsettled().len();
        for round in 0..if open == 0 { 1 } else { 3 } {
            let mut choose = |_: &Unsettled| match round {
                0 => false,
                1 => true,
                _ => rng.random_bool(0.5),
            };
            let image = points.image(&mut choose);
            let what = format!(
                "{name}, {device:?}, after event {at} of {}, round {round}",
                points.len_events()
            );
            states += state_after(
                device,
                &image,
                &allowed,
                &what,
                (at / every).is_multiple_of(8),
            );
        }
    }
    println!("{name}, {device:?}: {states} states");
    assert!(states > 10);
}

fn op(f: impl Fn(&Blobstore) + 'static) -> Op {
    Box::new(move |store| {
        f(store);
        true
    })
}

#[test]
fn rules_2_9_and_12_a_power_cut_anywhere_leaves_what_was_acknowledged() {
    for device in DEVICES {
        let ops: Vec<Op> = vec![
            op(|store| {
                store.create(&CreateOptions::default()).unwrap();
            }),
            op(|store| {
                let opts = CreateOptions::default()
                    .num_clusters(4)
                    .xattrs((0..3).map(|i| (format!("x{i}"), vec![i; 3000])).collect());
                store.create(&opts).unwrap();
            }),
            op(|store| store.open(nth(store, 0)).unwrap().resize(9).unwrap()),
            op(|store| store.delete(nth(store, 1)).unwrap()),
            // Its pages and clusters are used again.
            op(|store| {
                let opts = CreateOptions::default()
                    .num_clusters(700)
                    .thin(true)
                    .xattrs(vec![("big".to_owned(), vec![9; 3500])]);
                store.create(&opts).unwrap();
            }),
            op(|store| {
                let blob = store.open(nth(store, 1)).unwrap();
                let mut zeroes = pumice_bdev::DmaBuf::new(8192).unwrap();
                zeroes.fill(0);
                blob.write_at(600 * CLUSTER, zeroes.freeze(), true).unwrap();
            }),
            op(|store| {
                store.snapshot(nth(store, 1), &[]).unwrap();
            }),
            op(|store| store.set_super_blob(Some(nth(store, 0))).unwrap()),
            op(|store| store.delete(nth(store, 2)).unwrap()),
            op(|store| {
                store.grow_md_pages(300).unwrap();
            }),
            op(|store| store.open(nth(store, 0)).unwrap().resize(2).unwrap()),
            Box::new(|store| {
                store.unload().unwrap();
                false
            }),
        ];
        let every = if device.write_cache && device.fua {
            1
        } else {
            3
        };
        cut_everywhere("all operations", device, &device.store(), &ops, every);
    }
}

/// Fills the ring many times: its end, checkpoints on the side and under pressure, and changes that
/// are too large for a batch.
#[test]
fn rules_6_to_8_a_power_cut_anywhere_while_the_ring_goes_round() {
    for (device, seed) in DEVICES.into_iter().zip(1..) {
        let mut rng = SmallRng::seed_from_u64(seed);
        println!("{device:?}, seed {seed}");
        let mut ops: Vec<Op> = Vec::new();
        for _ in 0..6 {
            ops.push(op(make));
        }
        for step in 0..60u8 {
            let (blob, byte, size) = (
                rng.random_range(0..6),
                rng.random::<u8>(),
                rng.random_range(1..6),
            );
            ops.push(match step % 10 {
                2 => op(move |store| store.open(nth(store, blob)).unwrap().resize(size).unwrap()),
                4 => op(move |store| store.delete(nth(store, blob)).unwrap()),
                5 => op(make),
                // A block is written whole or not at all.
                6 => op(move |store| {
                    let mut data = pumice_bdev::DmaBuf::new(store.io_unit_size() as usize).unwrap();
                    data.fill(byte);
                    let blob = store.open(nth(store, blob)).unwrap();
                    blob.write_at(0, data.freeze(), true).unwrap();
                }),
                // Nine pages behind the root, of a ring that takes six or seven at a time.
                8 => op(move |store| {
                    let mut all = store.transaction();
                    for number in 0..9 {
                        all.set_xattr(nth(store, blob), &format!("big{number}"), &[byte; 3900]);
                    }
                    all.commit().unwrap();
                }),
                _ => op(move |store| {
                    let blob = store.open(nth(store, blob)).unwrap();
                    blob.set_xattr("v", &[byte; 700]).unwrap();
                    blob.sync_md().unwrap();
                }),
            });
        }
        cut_everywhere("round and round", device, &device.store(), &ops, 31);
    }
}

/// Writes what a log says was written, and flushes nothing.
fn write_again(events: &[Event], dev: &CrashDevice) {
    let ch = AsyncChannel::new(dev.open_channel().unwrap());
    for event in events {
        if let Event::Submitted(change) = event
            && let Action::Write(bytes) = &change.action
        {
            let data = DmaBuf::copy_from(bytes).unwrap().freeze();
            ch.block_on(ch.write(change.lba, data, false)).unwrap();
        }
    }
}

/// A process was killed between the write of a batch and its flush, so that a load finds the batch
/// and only the device's cache has it. A power cut in that load leaves the whole change or nothing
/// of it: no page is in place before the batch is durable.
#[test]
fn rule_12_a_batch_in_the_cache_is_durable_before_a_page_is_in_place() {
    for device in DEVICES.into_iter().filter(|device| device.write_cache) {
        let base = device.with(device.store(), 7);
        let store = load(&base);
        make(&store);
        make(&store);
        store.unload().unwrap();
        let dev = device.with(base.image(), 8);
        let store = load(&dev);
        set(&store, 1).unwrap();
        let old = describe(&store);
        let acknowledged = dev.len_events();
        let mut both = store.transaction();
        for n in 0..2 {
            both.set_xattr(nth(&store, n), "v", &[9; 100]);
        }
        both.commit().unwrap();
        let new = describe(&store);
        drop(store);

        let durable = dev.image_after(acknowledged, &mut |_| false);
        let killed = device.with(durable, 9);
        write_again(&dev.log()[acknowledged..], &killed);
        assert_eq!(describe(&load(&killed)), new, "{device:?}");
        let mut points = killed.crash_points();
        while points.advance().is_some() {
            // Of what may be lost, one page is kept and nothing else, or lost and nothing else. The
            // last number is of no page.
            let page_of = |piece: &Unsettled| piece.lba * u64::from(device.block_size) / 4096;
            let pages: BTreeSet<u64> = points.unsettled().iter().map(page_of).collect();
            for page in pages.into_iter().chain([u64::MAX]) {
                for kept in [false, true] {
                    let image = points.image(&mut |piece| (page_of(piece) == page) == kept);
                    let found = describe(&load(&device.with(image, 6)));
                    let at = points.position();
                    assert!(
                        found == old || found == new,
                        "{device:?}, event {at}, page {page} kept {kept}: {found:#?}"
                    );
                }
            }
        }
    }
}
