//! Tests of all kinds of space: a full file system opens, can be read and emptied; metadata pages
//! grow; small files use little; the reported free space is true.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::faults::KINDS;
use common::*;
use pumice_bdev::{BdevError, BlockDevice, DeviceInfo, HostSpace, IoChannel};
use pumice_blobfs::blobstore::check::check;
use pumice_blobfs::blobstore::{Blobstore, CreateOptions, LoadOptions};
use pumice_blobfs::fs::{
    FileSystem, FormatOptions, FsError, Journal, MountOptions, OpenOptions, SpaceKind, grow,
};

const ESSENTIAL: OpenOptions = OpenOptions::FRESH.essential(true);

fn format(dev: &Arc<dyn BlockDevice>, journal: Journal, cluster_size: u32, md_pages: Option<u32>) {
    let mut options = FormatOptions::default();
    options.cluster_size = cluster_size;
    options.md_pages = md_pages;
    options.journal = journal;
    FileSystem::format(Arc::clone(dev), &options).unwrap();
}

fn mount(dev: &Arc<dyn BlockDevice>) -> FileSystem {
    FileSystem::mount(Arc::clone(dev), &MountOptions::default()).unwrap()
}

fn write_file(fs: &FileSystem, path: &str, how: OpenOptions, len: usize) -> Result<(), FsError> {
    let f = fs.open(path, how)?;
    f.append(&vec![7; len])?;
    f.sync()
}

fn is_full(error: &FsError) -> bool {
    matches!(error, FsError::NoSpace { .. })
}

/// Asserts that the device is consistent, by the check and by the second parser.
fn verify(dev: &Arc<dyn BlockDevice>, what: &str) {
    let report = check(dev).unwrap();
    assert_eq!(report.worst(), None, "{what}: {:?}", report.findings);
    strict::parse_of(&content(dev), what);
}

/// Makes empty files until there is no page left for one, and a long one until there is no cluster.
fn fill(fs: &FileSystem) {
    let name = "first";
    // The long file is created while there is a page for it.
    let f = fs.open(&format!("/{name}"), OpenOptions::CREATE).unwrap();
    let empty = |i: u32| fs.open(&format!("/{name}{i}"), OpenOptions::CREATE).err();
    let error = (0..).find_map(empty).unwrap();
    assert!(is_full(&error), "{error}");
    assert!(error.to_string().contains("pumice grow"), "{error}");
    let error = (0..).find_map(|_| f.append(&[3; 65536]).err()).unwrap();
    assert!(
        matches!(
            error,
            FsError::NoSpace {
                kind: SpaceKind::Clusters,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("pumice grow"), "{error}");
    f.sync().unwrap();
}

/// F5: sync, truncate and unmount of a file with preallocated space, with no page left.
#[test]
fn a_store_without_pages_can_be_synced_truncated_and_unmounted() {
    for journal in KINDS {
        for table in [false, true] {
            let dev = memory(32 << 20, 4096);
            format(&dev, journal, 65536, Some(24));
            if table {
                // A file as earlier versions made it, with an extent page.
                let store = Blobstore::load(Arc::clone(&dev), &LoadOptions::default()).unwrap();
                let xattrs = vec![
                    ("name".to_owned(), b"/a\0".to_vec()),
                    ("length".to_owned(), vec![0; 8]),
                ];
                let opts = CreateOptions::default().xattrs(xattrs);
                store.create(&opts).unwrap();
                store.unload().unwrap();
            }
            let fs = mount(&dev);
            let empty = fs.statfs().md_pages_used - u64::from(table);
            let a = fs.open("/a", OpenOptions::CREATE).unwrap();
            for _ in 0..4 {
                a.append(&[1; 70_000]).unwrap();
            }
            fill(&fs);
            a.sync().unwrap();
            a.truncate(100).unwrap();
            a.append(b"more").unwrap();
            a.sync().unwrap();
            drop(a);
            fs.unmount().unwrap();
            drop(fs);
            verify(&dev, "full");

            // The full file system can be mounted, the files needed for opening a database can be
            // created, and everything can be deleted.
            let fs = mount(&dev);
            let error = fs.open("/more", OpenOptions::CREATE).unwrap_err();
            assert!(is_full(&error), "{error}");
            assert_eq!(fs.free_bytes(), 0, "no file can be made");
            for i in 0..5 {
                write_file(&fs, &format!("/MANIFEST-{i}"), ESSENTIAL, 3000).unwrap();
            }
            fs.rename("/MANIFEST-0", "/CURRENT").unwrap();
            assert!(is_full(
                &write_file(&fs, "/more", OpenOptions::CREATE, 1).unwrap_err()
            ));
            fs.unmount().unwrap();
            drop(fs);
            let fs = mount(&dev);
            for entry in fs.list("/").unwrap() {
                fs.unlink(&format!("/{}", entry.name)).unwrap();
            }
            let space = fs.statfs();
            assert_eq!((space.md_pages_used, space.files), (empty, 0));
            assert_eq!(space.free, space.total);
            write_file(&fs, "/again", OpenOptions::CREATE, 1 << 20).unwrap();
            fs.unmount().unwrap();
            verify(&dev, "emptied");
        }
    }
}

/// A store of an earlier version has no reserve: every page is used, and no cluster is free.
#[test]
fn an_old_store_with_not_a_page_left_is_emptied() {
    let dev = memory(8 << 20, 4096);
    format(&dev, Journal::None, 65536, Some(20));
    let store = Blobstore::load(Arc::clone(&dev), &LoadOptions::default()).unwrap();
    let file = |i: usize, num_clusters: u64| {
        CreateOptions::default()
            .xattrs(vec![
                ("name".to_owned(), format!("/f{i}\0").into_bytes()),
                (
                    "length".to_owned(),
                    (num_clusters * 65536).to_le_bytes().to_vec(),
                ),
            ])
            .num_clusters(num_clusters)
    };
    // Two pages each. The last page is the root of an empty file.
    for i in 0..9 {
        store.create(&file(i, 3)).unwrap();
    }
    let free = store.free_clusters();
    let pages = store.md_pages();
    for i in 0..pages.total - pages.used - 2 {
        store
            .create(&file(100 + usize::try_from(i).unwrap(), 0))
            .unwrap();
    }
    store.create(&file(10, free)).unwrap();
    assert_eq!(
        (store.free_clusters(), store.md_pages().used),
        (0, pages.total)
    );
    store.unload().unwrap();
    drop(store);

    let fs = mount(&dev);
    assert_eq!(fs.problems(), [] as [String; 0]);
    let f = fs.open("/f0", OpenOptions::READ).unwrap();
    f.truncate(65536 + 5).unwrap();
    assert_eq!(f.len(), 65536 + 5);
    f.sync().unwrap();
    drop(f);
    fs.unmount().unwrap();
    drop(fs);
    let fs = mount(&dev);
    assert_eq!(fs.stat("/f0").unwrap().len, 65536 + 5);
    fs.unlink("/f1").unwrap();
    fs.unlink("/f2").unwrap();
    for entry in fs.list("/").unwrap() {
        fs.unlink(&format!("/{}", entry.name)).unwrap();
    }
    assert_eq!(fs.statfs().md_pages_used, 0);
    fs.unmount().unwrap();
    verify(&dev, "an old store, emptied");
}

/// R4: files of up to a cluster fill the device, and not half of it.
#[test]
fn pages_grow_until_the_clusters_are_used_up() {
    for journal in KINDS {
        for (cluster_size, md_pages) in [(65536, None), (65536, Some(16)), (1 << 20, Some(16))] {
            let dev = memory(64 << 20, 512);
            format(&dev, journal, cluster_size, md_pages);
            let fs = mount(&dev);
            let total = fs.statfs().total;
            let mut files = 0u64;
            loop {
                match write_file(&fs, &format!("/f{files}"), OpenOptions::CREATE, 4096) {
                    Ok(()) => files += 1,
                    Err(e) => {
                        assert!(is_full(&e), "{e}");
                        break;
                    }
                }
            }
            let least = total / u64::from(cluster_size) * 9 / 10;
            assert!(files >= least, "{files} files, at least {least} expected");
            fs.unlink("/f0").unwrap();
            fs.unmount().unwrap();
            drop(fs);
            verify(&dev, "full of small files");
            let fs = mount(&dev);
            assert_eq!(fs.problems(), [] as [String; 0]);
            for i in 1..files {
                let f = fs.open(&format!("/f{i}"), OpenOptions::READ).unwrap();
                let mut byte = [0];
                f.read_at(4095, &mut byte).unwrap();
                assert_eq!(byte[0], 7);
            }
            fs.unmount().unwrap();
        }
    }
}

/// U6, R2, KA15: the files that a database leaves each time that it is opened use little space here
/// too.
#[test]
fn a_hundred_opens_take_as_many_pages_as_files_and_little_space() {
    let dev = memory(256 << 20, 512);
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    let before = {
        let fs = mount(&dev);
        let space = fs.statfs();
        fs.unmount().unwrap();
        space
    };
    for i in 0..100 {
        let fs = mount(&dev);
        if i > 0 {
            fs.rename("/LOG", &format!("/LOG.old.{i}")).unwrap();
        }
        write_file(&fs, "/LOG", ESSENTIAL, 35_000).unwrap();
        let table = fs
            .open(&format!("/{i:06}.sst"), OpenOptions::FRESH)
            .unwrap();
        table.allocate(0, 8 << 20).unwrap();
        table.append(&[1; 3000]).unwrap();
        table.sync().unwrap();
        table.finish_writing();
        assert_eq!(table.allocated(), before.cluster);
        drop(table);
        fs.unmount().unwrap();
    }
    let fs = mount(&dev);
    let space = fs.statfs();
    assert_eq!(space.files, 200);
    let used = space.md_pages_used - before.md_pages_used;
    assert_eq!(used, 200, "one page for a small file");
    assert!(before.free - space.free <= 200 * (64 << 10));
    fs.unmount().unwrap();
}

/// KA13: space from `allocate` is freed when the writer has finished, not before.
#[test]
fn preallocation_goes_back_when_the_writer_has_finished() {
    let dev = memory(64 << 20, 512);
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    let fs = mount(&dev);
    let f = fs.open("/t", OpenOptions::FRESH).unwrap();
    f.allocate(0, 9 << 20).unwrap();
    f.append(&vec![5; 8_500_000]).unwrap();
    f.sync().unwrap();
    assert!(f.allocated() >= 9 << 20);
    f.finish_writing();
    assert_eq!(
        f.allocated(),
        8_500_000u64.next_multiple_of(fs.statfs().cluster)
    );
    // It is an ordinary file again.
    f.append(&vec![6; 3_000_000]).unwrap();
    f.sync().unwrap();
    let mut end = [0; 2];
    f.read_at(8_499_999, &mut end).unwrap();
    assert_eq!(end, [5, 6]);
    drop(f);
    fs.unmount().unwrap();
    verify(&dev, "finished");
}

/// KC5: too few pages are refused with the smallest number that is accepted, and the device stays
/// as it was.
#[test]
fn too_few_metadata_pages_are_refused() {
    let dev = memory(16 << 20, 4096);
    for md_pages in [0, 1, FormatOptions::MIN_MD_PAGES - 1] {
        let mut options = FormatOptions::default();
        options.md_pages = Some(md_pages);
        let error = FileSystem::format(Arc::clone(&dev), &options).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(&format!("at least {}", FormatOptions::MIN_MD_PAGES)),
            "{text}"
        );
    }
    assert!(content(&dev).iter().all(|byte| *byte == 0));
    format(
        &dev,
        Journal::None,
        65536,
        Some(FormatOptions::MIN_MD_PAGES),
    );
    let fs = mount(&dev);
    write_file(&fs, "/x", OpenOptions::CREATE, 10).unwrap();
    fs.unmount().unwrap();
}

/// A file whose clusters are scattered over the device gets an extent table when its runs fill the
/// root page.
#[test]
fn a_scattered_file_gets_a_table() {
    for journal in KINDS {
        let dev = memory(64 << 20, 4096);
        format(&dev, journal, 4096, None);
        let fs = mount(&dev);
        let empty = fs.statfs().md_pages_used;
        let (a, b) = (
            fs.open("/a", OpenOptions::FRESH).unwrap(),
            fs.open("/b", OpenOptions::FRESH).unwrap(),
        );
        for i in 0..1500u32 {
            for f in [&a, &b] {
                // The files take one cluster at a time, in turn.
                f.allocate(0, u64::from(i + 1) * 4096).unwrap();
                f.append(&[u8::try_from(i % 251).unwrap(); 4096]).unwrap();
            }
        }
        a.sync().unwrap();
        b.sync().unwrap();
        drop((a, b));
        assert!(fs.statfs().md_pages_used > 4);
        fs.unmount().unwrap();
        drop(fs);
        verify(&dev, "scattered");
        let fs = mount(&dev);
        for path in ["/a", "/b"] {
            let f = fs.open(path, OpenOptions::READ).unwrap();
            let mut bytes = vec![0; 1500 * 4096];
            assert_eq!(f.read_at(0, &mut bytes).unwrap(), bytes.len());
            for (i, page) in bytes.chunks(4096).enumerate() {
                assert!(
                    page.iter().all(|byte| usize::from(*byte) == i % 251),
                    "{path} {i}"
                );
            }
            f.truncate(4096 * 3).unwrap();
        }
        fs.unlink("/a").unwrap();
        fs.unlink("/b").unwrap();
        let space = fs.statfs();
        assert_eq!((space.md_pages_used, space.free), (empty, space.total));
        fs.unmount().unwrap();
    }
}

/// A memory device on a host with limited space.
#[derive(Debug)]
struct Sparse {
    base: Arc<dyn BlockDevice>,
    free: AtomicU64,
}

impl BlockDevice for Sparse {
    fn info(&self) -> &DeviceInfo {
        self.base.info()
    }

    fn open_channel(&self) -> Result<Box<dyn IoChannel>, BdevError> {
        self.base.open_channel()
    }

    fn host_space(&self) -> Option<HostSpace> {
        Some(HostSpace {
            free_bytes: self.free.load(Ordering::Relaxed),
            allocated_bytes: 1 << 20,
        })
    }
}

/// R5: on a full host the append fails before anything was promised, `free` reports the host's
/// space, and the same call works when there is space again.
#[test]
fn a_full_host_is_told_and_passes() {
    for journal in KINDS {
        let sparse = Arc::new(Sparse {
            base: memory(64 << 20, 512),
            free: AtomicU64::new(1 << 40),
        });
        let dev: Arc<dyn BlockDevice> = Arc::clone(&sparse) as Arc<dyn BlockDevice>;
        format(&dev, journal, 65536, None);
        let fs = mount(&dev);
        assert_eq!(fs.statfs().free, fs.statfs().total);
        assert_eq!(fs.statfs().used, 0);
        sparse.free.store(8 << 20, Ordering::Relaxed);
        let free = fs.free_bytes();
        assert!(free <= 9 << 20 && free > 0, "{free}");
        assert_eq!(fs.statfs().host_free, Some(free));
        let f = fs.open("/f", OpenOptions::CREATE).unwrap();
        let mut written = 0u64;
        let error = loop {
            match f.append(&[1; 100_000]) {
                Ok(()) => written += 100_000,
                Err(e) => break e,
            }
        };
        assert!(
            matches!(
                error,
                FsError::NoSpace {
                    kind: SpaceKind::Host,
                    ..
                }
            ),
            "{error}"
        );
        assert!(error.is_retryable());
        assert!(error.to_string().contains("holds the image"), "{error}");
        assert!(
            written <= free && written + (1 << 20) > free,
            "{written} of {free}"
        );
        assert_eq!(f.len(), written);
        f.sync().unwrap();
        sparse.free.store(32 << 20, Ordering::Relaxed);
        f.append(&[2; 100_000]).unwrap();
        f.sync().unwrap();
        drop(f);
        fs.unmount().unwrap();
    }
}

/// The file system grows with its device, repeatedly.
#[test]
fn a_file_system_grows_with_its_device() {
    for journal in KINDS {
        let small = memory(16 << 20, 4096);
        format(&small, journal, 4096, None);
        let fs = mount(&small);
        write_file(&fs, "/f", OpenOptions::CREATE, 9_000_000).unwrap();
        assert_eq!(fs.grow().unwrap(), 0);
        let before = fs.statfs();
        fs.unmount().unwrap();
        drop(fs);
        let mut bytes = content(&small);
        bytes.resize(300 << 20, 0);
        // There are more clusters than the old mask has bits.
        let dev = memory_with(&bytes, 4096);
        let fs = mount(&dev);
        let same = fs.statfs();
        assert_eq!(same.total, before.total, "it grows when it is asked to");
        assert_eq!(fs.grow().unwrap(), (300 - 16) << 20);
        let after = fs.statfs();
        assert!(
            after.total > 280 << 20 && after.md_pages >= 600,
            "{after:?}"
        );
        assert_eq!(fs.grow().unwrap(), 0);
        assert_eq!(fs.statfs(), after);
        write_file(&fs, "/g", OpenOptions::CREATE, 100 << 20).unwrap();
        fs.unmount().unwrap();
        drop(fs);
        verify(&dev, "grown");
        let fs = mount(&dev);
        assert_eq!(fs.stat("/f").unwrap().len, 9_000_000);
        assert_eq!(fs.stat("/g").unwrap().len, 100 << 20);
        fs.unmount().unwrap();
    }
}

/// The journal promises nothing that the host of a sparse image may have no room for when it is put in place.
#[test]
fn on_a_full_host_a_sync_writes_its_bytes_first() {
    let sparse = Arc::new(Sparse {
        base: memory(64 << 20, 4096),
        free: AtomicU64::new(1 << 40),
    });
    let dev: Arc<dyn BlockDevice> = Arc::clone(&sparse) as Arc<dyn BlockDevice>;
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    let fs = mount(&dev);
    let file = fs.open("/log", OpenOptions::CREATE).unwrap();
    let writes = |syncs: u32| {
        let before = fs.io_stats();
        for _ in 0..syncs {
            file.append(&[1; 100]).unwrap();
            file.sync().unwrap();
        }
        fs.io_stats().since(&before).writes
    };
    writes(1);
    // With a checkpoint in the background, perhaps.
    assert!(writes(20) < 36);
    sparse.free.store(10 << 20, Ordering::Relaxed);
    // It is looked at now and then.
    writes(40);
    assert!(writes(20) >= 40);
    sparse.free.store(1 << 40, Ordering::Relaxed);
    writes(40);
    // With a checkpoint in the background, perhaps.
    assert!(writes(20) < 36);
}

/// G12: a large device gets 64 MiB of metadata pages and not a share of its size.
#[test]
fn the_metadata_of_a_large_device_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("large.img");
    let uri = format!("file://{}?size=1T&create=1", path.display());
    let dev = pumice_bdev::open(&uri).unwrap();
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    let fs = mount(&dev);
    let pages = fs.statfs().md_pages;
    assert!((16384..16384 + 16).contains(&pages), "{pages}");
    fs.unmount().unwrap();
    drop((fs, dev));
    let on_host = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512;
    // With the ring of the journal.
    assert!(on_host <= (80 + 32) << 20, "{on_host} bytes");
}

/// `pumice grow` can be repeated on the file and its file system. A refusal changes nothing.
#[test]
fn an_image_and_its_file_system_grow_in_one_step() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kv.img");
    let uri = format!("file://{}", path.display());
    let len = || std::fs::metadata(&path).unwrap().len();
    std::fs::write(&path, vec![0; 16 << 20]).unwrap();
    // The image has no content yet.
    assert!(grow(&uri, Some(64 << 20)).is_err());
    assert_eq!(len(), 16 << 20);
    let dev = pumice_bdev::open(&uri).unwrap();
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    let fs = mount(&dev);
    write_file(&fs, "/f", OpenOptions::CREATE, 5_000_000).unwrap();
    let before = fs.statfs();
    // The device is in use.
    assert!(grow(&uri, Some(64 << 20)).is_err());
    assert_eq!(len(), 16 << 20);
    fs.unmount().unwrap();
    drop((fs, dev));
    // A smaller size is refused.
    assert!(grow(&uri, Some(8 << 20)).is_err());
    assert_eq!(len(), 16 << 20);
    let after = grow(&uri, Some(64 << 20)).unwrap();
    assert_eq!(len(), 64 << 20);
    assert!(after.total > before.total + (44 << 20), "{after:?}");
    assert_eq!(grow(&uri, Some(64 << 20)).unwrap().total, after.total);
    // A crash happens after the file was made longer.
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(96 << 20).unwrap();
    drop(file);
    let again = grow(&uri, Some(96 << 20)).unwrap();
    assert!(again.total > after.total + (28 << 20), "{again:?}");
    assert_eq!(grow(&uri, None).unwrap().total, again.total);
    let dev = pumice_bdev::open(&uri).unwrap();
    let fs = mount(&dev);
    assert_eq!(fs.stat("/f").unwrap().len, 5_000_000);
    fs.unmount().unwrap();
}
