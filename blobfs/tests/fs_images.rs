//! Tests of BlobFS images that SPDK wrote: their files, and damage to them.

mod common;

use std::sync::Arc;

use common::*;
use pumice_bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice_bdev::{BlockDevice, OpKind};
use pumice_blobfs::blobstore::{Blobstore, CreateOptions, LoadOptions};
use pumice_blobfs::fs::{FileSystem, FormatOptions, FsError, Journal, MountOptions, OpenOptions};
use sha2::{Digest, Sha256};

fn sum(fs: &FileSystem, path: &str) -> String {
    let f = fs.open(path, OpenOptions::READ).unwrap();
    let mut hash = Sha256::new();
    let mut buf = vec![0; 77_777];
    let mut at = 0;
    loop {
        let n = f.read_at(at, &mut buf).unwrap();
        if n == 0 {
            break;
        }
        hash.update(&buf[..n]);
        at += n as u64;
    }
    assert_eq!(at, f.len());
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Returns (path, checksum) of the files of an image.
fn recorded(name: &str) -> Vec<(String, String)> {
    let facts = facts(name);
    let mut files = Vec::new();
    for line in facts.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [path, _, sum] if path.starts_with('/') && sum.len() == 64 => {
                files.push((path.to_owned(), sum.to_owned()));
            }
            [sum, file] if sum.len() == 64 && !file.starts_with("0x") => {
                files.push((format!("/{file}"), sum.to_owned()));
            }
            _ => {}
        }
    }
    files.sort();
    files
}

#[test]
fn the_files_of_spdk_are_all_there() {
    // Both block sizes load: io units of 4096 bytes on blocks of 512.
    for (name, block_size) in [
        ("small-blobfs-4096.img", 512),
        ("small-rdb-clean.img", 4096),
    ] {
        let bytes = image(name);
        {
            let dev = memory_with(&bytes, block_size);
            let fs = FileSystem::mount(Arc::clone(&dev), &MountOptions::default()).unwrap();
            assert_eq!(fs.problems(), [] as [String; 0]);
            let expected = recorded(name);
            assert!(expected.len() >= 7);
            let found: Vec<(String, String)> = fs
                .list("/")
                .unwrap()
                .into_iter()
                .map(|e| (format!("/{}", e.name), sum(&fs, &format!("/{}", e.name))))
                .collect();
            assert_eq!(found, expected);
            fs.unmount().unwrap();
            assert!(
                content(&dev) == bytes,
                "a mount without a change writes nothing"
            );
        }
    }
}

#[test]
fn files_of_spdk_are_changed_and_remain_well_formed() {
    let dev = memory_with(&image("small-blobfs-4096.img"), 4096);
    let fs = FileSystem::mount(Arc::clone(&dev), &MountOptions::default()).unwrap();
    let f = fs.open("/a.txt", OpenOptions::READ).unwrap();
    let mut old = vec![0; 13];
    f.read_at(0, &mut old).unwrap();
    f.append(b"more").unwrap();
    f.sync().unwrap();
    drop(f);
    fs.rename("/big20.bin", "/a.txt").unwrap();
    fs.open("/new", OpenOptions::CREATE)
        .unwrap()
        .append(&[5; 3_000_000])
        .unwrap();
    fs.unlink("/renamed.bin").unwrap();
    fs.unmount().unwrap();
    drop(fs);
    // SPDK requires this of every blob of a BlobFS.
    let store = Blobstore::load(Arc::clone(&dev), &LoadOptions::default()).unwrap();
    assert_eq!(store.bstype().to_string(), "BLOBFS");
    for id in store.blobs() {
        let blob = store.open(id).unwrap();
        let name = blob.xattr("name").unwrap();
        assert!(name.starts_with(b"/") && name.ends_with(&[0]));
        let len = u64::from_le_bytes(blob.xattr("length").unwrap().try_into().unwrap());
        assert!(len <= blob.len_bytes());
        assert_eq!(blob.num_allocated(), blob.num_clusters());
        assert!(!blob.is_thin());
        assert!(blob.xattr("is_deleted").is_none());
    }
    drop(store);
    let fs = FileSystem::mount(dev, &MountOptions::default()).unwrap();
    assert_eq!(
        sum(&fs, "/a.txt"),
        "014f7deaeb9d20d3fdd9648eb60d810b89563f6d161a84e03bdc757037534083"
    );
    assert!(!fs.exists("/big20.bin").unwrap() && !fs.exists("/renamed.bin").unwrap());
    assert_eq!(fs.stat("/new").unwrap().len, 3_000_000);
}

/// Mounts a BlobFS that has files with these xattrs.
fn with_blobs(blobs: &[&[(&str, &[u8])]]) -> FileSystem {
    FileSystem::mount(image_of(blobs), &accepting()).unwrap()
}

/// Makes the image that [`with_blobs`] mounts.
fn image_of(blobs: &[&[(&str, &[u8])]]) -> Arc<dyn BlockDevice> {
    let dev = memory(32 << 20, 4096);
    let mut format = FormatOptions::default();
    format.journal = Journal::None;
    FileSystem::format(Arc::clone(&dev), &format).unwrap();
    let store = Blobstore::load(Arc::clone(&dev), &LoadOptions::default()).unwrap();
    for xattrs in blobs {
        let xattrs = xattrs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), v.to_vec()))
            .collect();
        store
            .create(&CreateOptions::default().num_clusters(1).xattrs(xattrs))
            .unwrap();
    }
    store.unload().unwrap();
    drop(store);
    dev
}

/// Returns options that accept damage.
fn accepting() -> MountOptions {
    let mut opts = MountOptions::default();
    opts.accept_damage = true;
    opts
}

fn names(fs: &FileSystem) -> Vec<String> {
    fs.list("/").unwrap().into_iter().map(|e| e.name).collect()
}

#[test]
fn damage_is_reported_and_the_rest_mounts() {
    let len: &[u8] = &7u64.to_le_bytes();
    let huge: &[u8] = &u64::MAX.to_le_bytes();
    let fs = with_blobs(&[
        &[("name", b"/good\0"), ("length", len)],
        &[("name", b"/no-nul"), ("length", len)],
        &[("name", b"no-slash\0"), ("length", len)],
        &[("name", b"/twice\0"), ("length", len)],
        &[("name", b"/twice\0"), ("length", len)],
        &[("name", b"/bad\xff\0"), ("length", len)],
        &[("name", b"\0"), ("length", len)],
        &[("name", b"/../up\0"), ("length", len)],
        &[("name", b"/too-long\0"), ("length", huge)],
        &[("name", b"/short-length\0"), ("length", &[1, 2, 3])],
        &[("length", len)],
        &[
            ("name", b"/links\0"),
            ("length", len),
            ("pumice.links", b"/x"),
        ],
        &[
            ("name", b"/intent\0"),
            ("length", len),
            ("pumice.dir", &[1]),
            ("pumice.rename", b"/intent\0"),
        ],
        &[("name", b"/gone\0"), ("length", len), ("is_deleted", &[1])],
        &[("name", b"/good/under-a-file\0"), ("length", len)],
    ]);
    let names = names(&fs);
    for name in [
        "good", "no-nul", "no-slash", "twice", "too-long", "links", "intent",
    ] {
        assert!(names.iter().any(|n| n == name), "{name}: {names:?}");
    }
    assert_eq!(names.iter().filter(|n| n.starts_with("twice~")).count(), 1);
    assert_eq!(
        names
            .iter()
            .filter(|n| n.starts_with(".pumice-blob-"))
            .count(),
        3
    );
    assert!(!names.iter().any(|n| n == "gone" || n == "short-length"));
    assert_eq!(fs.stat("/too-long").unwrap().len, 64 << 10);
    assert!(fs.exists("/good/under-a-file").unwrap());
    assert_eq!(fs.problems().len(), 11, "{:#?}", fs.problems());
}

/// The next mount finds no damage in a file of which a part was given up.
#[test]
fn a_cut_length_and_lost_links_are_given_up_for_good() {
    let huge: &[u8] = &u64::MAX.to_le_bytes();
    let len: &[u8] = &7u64.to_le_bytes();
    let dev = memory(32 << 20, 4096);
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    let store = Blobstore::load(Arc::clone(&dev), &LoadOptions::default()).unwrap();
    let file = |xattrs: &[(&str, &[u8])]| {
        let owned = xattrs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.to_vec()));
        let options = CreateOptions::default()
            .num_clusters(1)
            .xattrs(owned.collect());
        store.create(&options).unwrap();
    };
    file(&[("name", b"/too-long\0"), ("length", huge)]);
    file(&[
        ("name", b"/links\0"),
        ("length", len),
        ("pumice.links", b"/x"),
    ]);
    store.unload().unwrap();
    let options = MountOptions::default();
    let refused = |dev: &Arc<dyn BlockDevice>| {
        let error = FileSystem::mount(Arc::clone(dev), &options).unwrap_err();
        assert!(
            matches!(&error, FsError::Damaged { damage, .. } if damage.len() == 2),
            "{error}"
        );
    };
    refused(&dev);
    let seen = FileSystem::mount(Arc::clone(&dev), &options.clone().read_only(true)).unwrap();
    assert_eq!(seen.problems().len(), 2);
    drop(seen);
    refused(&dev);
    let told = FileSystem::mount(Arc::clone(&dev), &options.clone().accept_damage(true)).unwrap();
    assert_eq!(told.problems().len(), 2);
    told.unmount().unwrap();
    let fs = FileSystem::mount(Arc::clone(&dev), &options).unwrap();
    assert_eq!(fs.problems(), [""; 0]);
    assert_eq!(fs.stat("/too-long").unwrap().len, 64 << 10);
    assert_eq!(fs.stat("/links").unwrap().links, 1);
}

/// The name under which a duplicate is shown may be that of a file, which must not disappear behind it.
#[test]
fn a_stand_in_for_a_name_hides_no_file() {
    let dev = memory(32 << 20, 4096);
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    let store = Blobstore::load(Arc::clone(&dev), &LoadOptions::default()).unwrap();
    let file = |name: &str| {
        let xattrs = vec![
            ("name".to_owned(), format!("{name}\0").into_bytes()),
            ("length".to_owned(), 0u64.to_le_bytes().to_vec()),
        ];
        let opts = CreateOptions::default().xattrs(xattrs);
        store.create(&opts).unwrap()
    };
    let long = format!("/{}", "n".repeat(250));
    for id in [file("/a"), file("/a"), file(&long), file(&long)] {
        for name in ["/a~", "/.pumice-blob-"] {
            file(&format!("{name}{id}"));
        }
    }
    let blobs = store.blobs().len();
    store.unload().unwrap();
    let fs = FileSystem::mount(dev, &accepting()).unwrap();
    let names = names(&fs);
    assert_eq!(names.len(), 12, "of {blobs} blobs: {names:?}");
}

/// A mount finds what it can and never panics, whatever the xattrs contain, and a second mount
/// finds the same.
#[test]
fn nonsense_in_xattrs_is_no_panic() {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    let long = format!("/{}\0", "n".repeat(300));
    let names: Vec<&[u8]> = vec![
        b"/a\0",
        b"/a\0",
        b"/d\0",
        b"/d/x\0",
        b"/d/e/y\0",
        b"/a/b\0",
        b"/\0",
        b"",
        b"\0",
        b"/e",
        b"//d//x/\0",
        long.as_bytes(),
        b"/.pumice-blob-0x100000000\0",
        b"/a~0x100000002\0",
        b"\xff\xfe",
        b"/d/../d\0",
    ];
    let renames: Vec<&[u8]> = vec![
        b"/d\0/f\0",
        b"/d\0/d/in\0",
        b"/f\0/d\0",
        b"/d\0/a\0",
        b"/d\0",
        b"\0\0",
        b"/d\0/f\0/g\0",
        b"/d\0/d\0",
        b"//\0/x\0",
    ];
    for seed in 0..80u64 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let dev = memory(16 << 20, 4096);
        FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
        let store = Blobstore::load(Arc::clone(&dev), &LoadOptions::default()).unwrap();
        for _ in 0..rng.random_range(1..9) {
            let mut xattrs: Vec<(String, Vec<u8>)> = Vec::new();
            let mut maybe = |chance: f64, name: &str, value: &[u8], rng: &mut SmallRng| {
                if rng.random_bool(chance) {
                    xattrs.push((name.to_owned(), value.to_vec()));
                }
            };
            let pick =
                |from: &[&[u8]], rng: &mut SmallRng| from[rng.random_range(0..from.len())].to_vec();
            let name = pick(&names, &mut rng);
            maybe(0.95, "name", &name, &mut rng);
            let len = [0u64, 5, 1 << 20, u64::MAX][rng.random_range(0..4)].to_le_bytes();
            let len = &len[..if rng.random_bool(0.9) { 8 } else { 3 }];
            maybe(0.95, "length", len, &mut rng);
            let mut links = pick(&names, &mut rng);
            links.extend(pick(&names, &mut rng));
            maybe(0.3, "pumice.links", &links, &mut rng);
            maybe(0.3, "pumice.dir", &[1], &mut rng);
            let rename = pick(&renames, &mut rng);
            maybe(0.3, "pumice.rename", &rename, &mut rng);
            let seq = rng.random_range(0..3u64).to_le_bytes();
            maybe(0.5, "pumice.seq", &seq, &mut rng);
            let replaces = ((1u64 << 32) + rng.random_range(0..12u64)).to_le_bytes();
            maybe(0.5, "pumice.replaces", &replaces, &mut rng);
            maybe(0.1, "is_deleted", &[1], &mut rng);
            maybe(0.2, "pumice.mtime", &[0xff; 8], &mut rng);
            let num_clusters = rng.random_range(0..3);
            store
                .create(
                    &CreateOptions::default()
                        .num_clusters(num_clusters)
                        .xattrs(xattrs),
                )
                .unwrap();
        }
        store.unload().unwrap();
        drop(store);
        let look = || {
            let fs = FileSystem::mount(Arc::clone(&dev), &accepting()).unwrap();
            let mut found = Vec::new();
            let mut dirs = vec!["/".to_owned()];
            while let Some(dir) = dirs.pop() {
                let Ok(entries) = fs.list(&dir) else { continue };
                for e in entries {
                    let path = format!("{}/{}", dir.trim_end_matches('/'), e.name);
                    let stat = fs.stat(&path).unwrap();
                    if e.is_dir {
                        dirs.push(path.clone());
                    } else {
                        let mut out = vec![0; 100];
                        let _ = fs
                            .open(&path, OpenOptions::READ)
                            .unwrap()
                            .read_at(0, &mut out)
                            .unwrap();
                    }
                    found.push((path, e.is_dir, stat.len));
                }
            }
            fs.unmount().unwrap();
            found.sort();
            found
        };
        let first = look();
        assert_eq!(first, look(), "seed {seed}");
    }
}

#[test]
fn halves_of_a_replacement_are_put_together() {
    let len: &[u8] = &7u64.to_le_bytes();
    let id = |n: u64| ((1 << 32) | n).to_le_bytes();
    // The first blob's root is page 0, and its extent page comes after it.
    let fs = with_blobs(&[
        &[
            ("name", b"/f\0"),
            ("length", len),
            ("pumice.seq", &3u64.to_le_bytes()),
        ],
        &[
            ("name", b"/f\0"),
            ("length", &9u64.to_le_bytes()),
            ("pumice.seq", &4u64.to_le_bytes()),
            ("pumice.replaces", &id(0)),
        ],
    ]);
    assert_eq!(fs.problems(), [] as [String; 0]);
    assert_eq!(names(&fs), ["f"]);
    assert_eq!(fs.stat("/f").unwrap().len, 9);
    assert_eq!(fs.blobstore().blobs().len(), 1);
}

/// Behind a device error a replacement is not finished. A mount does not go on as if it were.
#[test]
fn an_error_of_the_device_in_finishing_a_replacement_fails_the_mount() {
    let id = |n: u64| ((1 << 32) | n).to_le_bytes();
    let file = |seq: &'static [u8; 8]| {
        [
            ("name", &b"/f\0"[..]),
            ("length", &[0; 8]),
            ("pumice.seq", seq),
        ]
    };
    let (old, new) = (
        file(&[3, 0, 0, 0, 0, 0, 0, 0]),
        file(&[4, 0, 0, 0, 0, 0, 0, 0]),
    );
    let replaces = id(0);
    let new = [&new[..], &[("pumice.replaces", &replaces[..])]].concat();
    let base = image_of(&[&old, &new]);
    let store = Blobstore::load(Arc::clone(&base), &LoadOptions::default()).unwrap();
    let root = store.super_block().md_start.get().into();
    store.unload().unwrap();
    drop(store);
    let dev = Arc::new(ErrorDevice::new(None, base));
    dev.inject(
        Injection::new(Failure::Fail)
            .op(Some(OpKind::Write))
            .count(u64::MAX)
            .range(Some((root, 1))),
    );
    let mount = || FileSystem::mount(dev.clone(), &MountOptions::default());
    let error = mount().unwrap_err().to_string();
    assert!(error.contains("finishing a replacement"), "{error}");
    dev.clear();
    let fs = mount().unwrap();
    assert_eq!(names(&fs), ["f"]);
    assert_eq!(fs.blobstore().blobs().len(), 1);
    fs.unmount().unwrap();
}
