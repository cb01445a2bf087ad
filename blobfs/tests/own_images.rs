//! Tests of images that earlier versions of Pumice wrote: this version opens, checks, reads and
//! changes them.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::faults::files_of;
use common::*;
use pumice_blobfs::fs::{FileSystem, MountOptions, OpenOptions};
use sha2::{Digest, Sha256};

#[derive(Debug, PartialEq, Eq)]
enum Entry {
    Dir,
    File {
        len: u64,
        links: usize,
        sha256: String,
    },
}

type Tree = BTreeMap<String, Entry>;

/// Returns the content of OWN.tsv for each image.
fn recorded() -> BTreeMap<String, Tree> {
    let text = std::fs::read_to_string(image_path("OWN.tsv")).unwrap();
    let mut images = BTreeMap::new();
    let mut name = String::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let (path, entry) = match fields[..] {
            ["image", image] => {
                name = image.to_owned();
                images.insert(name.clone(), Tree::new());
                continue;
            }
            ["dir", path] => (path, Entry::Dir),
            ["file", path, len, links, sha256] => (
                path,
                Entry::File {
                    len: len.parse().unwrap(),
                    links: links.parse().unwrap(),
                    sha256: sha256.to_owned(),
                },
            ),
            _ => panic!("OWN.tsv: {line}"),
        };
        images
            .get_mut(&name)
            .unwrap()
            .insert(path.to_owned(), entry);
    }
    images
}

fn tree(fs: &FileSystem) -> Tree {
    let entry = |(path, bytes): (String, Option<Vec<u8>>)| {
        let Some(bytes) = bytes else {
            return (path, Entry::Dir);
        };
        let file = Entry::File {
            len: bytes.len() as u64,
            links: fs.stat(&path).unwrap().links,
            sha256: Sha256::digest(&bytes)
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect(),
        };
        (path, file)
    };
    files_of(fs).into_iter().map(entry).collect()
}

#[test]
fn every_image_mounts_and_shows_what_it_held() {
    let images = recorded();
    assert_eq!(images.len(), 7);
    for (name, expected) in images {
        let bytes = image(&name);
        let dev = memory_with(&bytes, 4096);
        // A reader changes nothing, even if something has to be recovered.
        let mut options = MountOptions::default();
        options.read_only = true;
        let fs = FileSystem::mount(Arc::clone(&dev), &options).unwrap();
        assert_eq!(fs.problems(), [] as [String; 0], "{name}");
        assert_eq!(tree(&fs), expected, "{name}, read-only");
        fs.unmount().unwrap();
        drop(fs);
        assert!(content(&dev) == bytes, "{name}: a reader has written");

        // A writer recovers it, and its changes are there after an orderly unmount.
        let fs = FileSystem::mount(Arc::clone(&dev), &MountOptions::default()).unwrap();
        assert_eq!(tree(&fs), expected, "{name}");
        fs.unmount().unwrap();
        drop(fs);
        let fs = FileSystem::mount(Arc::clone(&dev), &MountOptions::default()).unwrap();
        assert_eq!(tree(&fs), expected, "{name}, mounted again");
        fs.unmount().unwrap();
    }
}

#[test]
fn every_image_can_be_changed_and_emptied() {
    for (name, expected) in recorded() {
        let dev = memory_with(&image(&name), 4096);
        let fs = FileSystem::mount(Arc::clone(&dev), &MountOptions::default()).unwrap();
        for (path, entry) in expected.iter().rev() {
            match entry {
                Entry::Dir => fs.rmdir(path),
                Entry::File { .. } => fs.unlink(path),
            }
            .unwrap_or_else(|e| panic!("{name}: {path}: {e}"));
        }
        let f = fs.open("/new", OpenOptions::CREATE).unwrap();
        f.append(&[9; 100_000]).unwrap();
        f.sync().unwrap();
        drop(f);
        fs.unmount().unwrap();
        drop(fs);
        let fs = FileSystem::mount(dev, &MountOptions::default()).unwrap();
        assert_eq!(tree(&fs).len(), 1, "{name}");
        assert_eq!(fs.stat("/new").unwrap().len, 100_000, "{name}");
        fs.unlink("/new").unwrap();
        let space = fs.statfs();
        assert_eq!(
            (space.free, space.md_pages_used),
            // A journal has two pages.
            (space.total, if space.journal > 0 { 2 } else { 0 }),
            "{name}: space leaked"
        );
    }
}
