//! Small images that could take much memory or time: the work of a mount is bounded.

mod common;

use std::sync::Arc;

use common::*;
use pumice_bdev::BlockDevice;
use pumice_blobfs::blobstore::{Blobstore, BsType, CreateOptions, InitOptions};
use pumice_blobfs::fs::{FileSystem, MountOptions};

/// Makes a file system whose blobs have these xattrs.
fn image(blobs: impl Iterator<Item = Vec<(&'static str, Vec<u8>)>>) -> Arc<dyn BlockDevice> {
    let dev = memory(64 << 20, 4096);
    let opts = InitOptions::default()
        .cluster_size(4096)
        .md_pages(Some(8000))
        .bstype(BsType::BLOBFS);
    let store = Blobstore::init(Arc::clone(&dev), &opts).unwrap();
    for xattrs in blobs {
        let xattrs = xattrs.into_iter().map(|(k, v)| (k.to_owned(), v));
        let opts = CreateOptions::default().xattrs(xattrs.collect());
        store.create(&opts).unwrap();
    }
    store.unload().unwrap();
    dev
}

fn file(name: &str, links: &[String]) -> Vec<(&'static str, Vec<u8>)> {
    let mut xattrs = vec![
        ("name", format!("{name}\0").into_bytes()),
        ("length", vec![0; 8]),
    ];
    if !links.is_empty() {
        let links: String = links.iter().map(|link| format!("{link}\0")).collect();
        xattrs.push(("pumice.links", links.into_bytes()));
    }
    xattrs
}

fn dir(name: &str) -> Vec<(&'static str, Vec<u8>)> {
    let mut xattrs = file(name, &[]);
    xattrs.push(("pumice.dir", vec![1]));
    xattrs
}

fn look_at(dev: &Arc<dyn BlockDevice>) -> FileSystem {
    let mut opts = MountOptions::default();
    opts.read_only = true;
    FileSystem::mount(Arc::clone(dev), &opts).unwrap()
}

/// Returns the resident memory of this process in bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = text.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[test]
fn deep_names_are_bounded() {
    // 15 names each, 110 directories deep, all different.
    let deep = |i: usize, k: usize| format!("/{i:04}{k:02}{}", "/d".repeat(110));
    let files = (0..200).map(|i| {
        let links: Vec<String> = (1..15).map(|k| deep(i, k)).collect();
        file(&deep(i, 0), &links)
    });
    let others = [file("/plain", &[]), dir("/z"), file("/z/in", &[])];
    let dev = image(files.chain(others));
    let before = resident();
    let fs = look_at(&dev);
    let grown = resident().saturating_sub(before);
    assert!(
        grown < 300 << 20,
        "{} MiB for an image of 4 MiB",
        grown >> 20
    );
    assert!(fs.exists("/plain").unwrap());
    assert!(fs.exists("/z/in").unwrap(), "its directory has a blob");
    assert!(fs.exists(&deep(0, 0)).unwrap());
    assert!(fs.problems().iter().any(|p| p.contains("left out")));
    // Whatever has a name can be found from the root.
    assert!(!fs.exists(&deep(199, 14)).unwrap());
}

/// Directories that have blobs imply others as well.
#[test]
fn deep_directories_are_bounded() {
    let deep = |i: usize| format!("/{i:04}{}", "/d".repeat(110));
    let fs = look_at(&image((0..1500).map(|i| dir(&deep(i)))));
    assert!(fs.exists(&deep(0)).unwrap());
    assert!(!fs.exists(&deep(1499)).unwrap() && !fs.exists("/1499").unwrap());
    assert!(fs.problems().iter().any(|p| p.contains("left out")));
}

#[test]
fn a_name_below_a_file_is_reported() {
    let below = file("/plain/a/b", &[]);
    let fs = look_at(&image([file("/plain", &[]), below].into_iter()));
    assert!(!fs.stat("/plain").unwrap().is_dir);
    let problems = fs.problems();
    assert!(
        problems.iter().any(|p| p.contains("/plain is a file")),
        "{problems:?}"
    );
}

#[test]
fn problems_are_counted_rather_than_told_without_end() {
    let names: Vec<String> = (0..100).map(|i| format!("/name{i}")).collect();
    let dev = image((0..50).map(|_| file("/all", &names)));
    let fs = look_at(&dev);
    assert_eq!(fs.problems().len(), 101);
    assert!(
        fs.problems()[100].contains("more problems"),
        "{}",
        fs.problems()[100]
    );
}

#[test]
fn recorded_renames_are_bounded() {
    let dirs = (0..60u64).map(|i| {
        vec![
            ("name", format!("/from{i}\0").into_bytes()),
            ("length", vec![0; 8]),
            ("pumice.dir", vec![1]),
            ("pumice.seq", (i + 1).to_le_bytes().to_vec()),
            ("pumice.rename", format!("/from{i}\0/to{i}\0").into_bytes()),
        ]
    });
    let fs = look_at(&image(dirs));
    let ignored = fs.problems().iter().filter(|p| p.contains("many others"));
    assert_eq!(ignored.count(), 44);
    // The latest renames are carried out.
    assert!(fs.exists("/to59").unwrap() && fs.exists("/from0").unwrap());
}
