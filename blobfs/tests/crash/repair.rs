//! Power cuts while what an earlier one has left is put right.

use super::*;

/// Makes a device that tears at 512 bytes.
fn torn_device(image: CrashImage, write_cache: bool, seed: u64) -> CrashDevice {
    let options = CrashOptions::default()
        .block_size(512)
        .write_cache(write_cache)
        .seed(seed)
        .tear_bytes(512);
    CrashDevice::with_options(&options, image)
}

/// Loads a store after a cut, which must be in an allowed state, and cuts the power at every event
/// of that load. Returns the number of states that were looked at.
fn cut_again(image: CrashImage, write_cache: bool, allowed: &[Vec<String>], what: &str) -> usize {
    let second = torn_device(image, write_cache, 5);
    let as_dyn: Arc<dyn BlockDevice> = Arc::new(second.clone());
    let report = check(&as_dyn).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(report.worst(), None, "{what}: {:?}", report.findings);
    let found = describe(&load(&second));
    assert!(allowed.contains(&found), "{what}: {found:#?}");
    let mut states = 1;
    // This is a second cut, while the load writes.
    let mut again = second.crash_points();
    while again.advance().is_some() {
        let open = again.unsettled().len();
        for cut in 0..=open {
            let mut number = 0;
            let image = again.image(&mut |_| {
                number += 1;
                number <= cut
            });
            let third = load(&torn_device(image, false, 5));
            assert_eq!(describe(&third), found, "{what}, second cut");
            third.unload().unwrap();
            states += 1;
        }
    }
    states
}

/// On a device that tears at 512 bytes the super block is the old or the new one after every cut,
/// also after a second cut while the load restores it.
#[test]
fn a_torn_super_block_is_put_together_again() {
    type Op = fn(&Blobstore, &[BlobId]);
    let ops: [(&str, Op); 3] = [
        ("grow", |store, _| assert_eq!(store.grow().unwrap(), 128)),
        ("set", |store, ids| {
            store.set_super_blob(Some(ids[1])).unwrap();
        }),
        ("set twice", |store, ids| {
            store.set_super_blob(Some(ids[0])).unwrap();
            store.set_super_blob(None).unwrap();
        }),
    ];
    let (base, ids) = setup_on(
        &able(CrashImage::zeroed(4 << 20), false, 0, Ability::SmallBlocks),
        true,
    );
    let mut bytes = base.to_vec();
    bytes.resize(bytes.len() + (1 << 20), 0);
    let base = CrashImage::from_bytes(&bytes);
    let mut states = 0;
    for (name, op) in ops {
        for write_cache in [false, true] {
            let dev = torn_device(base.clone(), write_cache, 7);
            let store = load(&dev);
            let old = describe(&store);
            op(&store, &ids);
            let new = describe(&store);
            let middle = {
                let other = torn_device(base.clone(), false, 7);
                let store = load(&other);
                store.set_super_blob(Some(ids[0])).unwrap();
                describe(&store)
            };
            let allowed = [old, new, middle];
            let mut points = dev.crash_points();
            while points.advance().is_some() {
                let open = points.unsettled().len();
                // These are subsets of two halves: one sector, all but one, at each place.
                for cut in 0..=open {
                    for reverse in [false, true] {
                        let mut number = 0;
                        let image = points.image(&mut |_| {
                            number += 1;
                            (number <= cut) != reverse
                        });
                        let what = format!(
                            "{name}, cache {write_cache}, after event {}, {cut} of {open}, {reverse}",
                            points.position()
                        );
                        states += cut_again(image, write_cache, &allowed, &what);
                    }
                }
            }
        }
    }
    println!("{states} states");
    assert!(states > 100);
}

/// A power cut while the state that an earlier one left is repaired, by a load or by a repair, is
/// repaired by the next.
#[test]
fn repairs() {
    type Op = fn(&Blobstore, &[BlobId]);
    let ops: [Op; 3] = [
        |store, ids| {
            store.snapshot(ids[2], &[]).unwrap();
        },
        |store, ids| store.delete(ids[4]).unwrap(),
        |store, ids| store.delete(ids[5]).unwrap(),
    ];
    let mut states = 0;
    for (number, op) in ops.into_iter().enumerate() {
        let (base, ids) = setup(true);
        let dev = device(base, true, 7);
        let store = load(&dev);
        let old = describe(&store);
        op(&store, &ids);
        let new = describe(&store);
        let mut points = dev.crash_points();
        while points.advance().is_some() {
            let cut = points.image(&mut |_| true);
            for by_repair in [false, true] {
                let second = device(cut.clone(), true, 5);
                let as_dyn: Arc<dyn BlockDevice> = Arc::new(second.clone());
                if by_repair {
                    repair(&as_dyn).unwrap();
                } else {
                    drop(load(&second));
                }
                let mut points = second.crash_points();
                while points.advance().is_some() {
                    for all in [false, true] {
                        let image = points.image(&mut |_| all);
                        let what = format!("state {number}, repair {by_repair}");
                        state_after(&image, &[&old, &new], &what);
                        states += 1;
                    }
                }
            }
        }
    }
    println!("repairs: {states} states");
    assert!(states > 20, "only {states} states");
}
