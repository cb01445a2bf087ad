//! Databases of one process share the file system of a device, and never that of another device.

mod common;

use std::path::Path;

use common::watchdog;
use pumice::bdev::file_uri;
use pumice::{Db, DbOptions, ErrorKind, MountOptions, mount};
use pumice_nvme_soft::{MemoryBackend, SoftConfig, SoftController, SoftNamespace, SoftServer};

fn open(uri: &str, path: &str) -> Db {
    DbOptions::new().path(path).open(uri).unwrap()
}

fn make(image: &Path) -> String {
    format!("{}?size=64M&create=1", file_uri(image))
}

/// Whether two databases are in one file system.
fn share(a: &Db, b: &Db) -> bool {
    a.file_system().mkdir("/mark").unwrap();
    let there = b.file_system().exists("/mark").unwrap();
    a.file_system().rmdir("/mark").unwrap();
    there
}

#[test]
fn each_namespace_of_a_controller_is_a_device() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let disk = || SoftNamespace::new(Box::new(MemoryBackend::new(64 << 20)), 512);
    let soft = SoftController::new(SoftConfig::new(vec![disk(), disk()]).served()).unwrap();
    let _server = SoftServer::start(soft, &dir.path().join("cntrl")).unwrap();
    let controller = format!("vfio-user://{}", dir.path().display());
    let namespace = |n: u32| format!("{controller}?nsid={n}");
    let one = open(&namespace(1), "/a");
    let two = open(&namespace(2), "/a");
    assert!(!share(&one, &two));
    one.put("where", "one").unwrap();
    assert_eq!(two.get("where").unwrap(), None);
    // Two spellings of one namespace are one device, which is mounted once.
    let again = open(&format!("{controller}/1"), "/b");
    assert!(share(&one, &again));
    let twice = DbOptions::new().path("/a").open(&namespace(1));
    assert_eq!(twice.err().unwrap().kind(), ErrorKind::InUse);
    for options in [MountOptions::new(), MountOptions::new().read_only(true)] {
        let refused = mount(&namespace(1), &options).err().unwrap();
        assert!(
            refused.to_string().contains("in use by this process"),
            "{refused}"
        );
    }
    for db in [&one, &again, &two] {
        db.close().unwrap();
    }
    let one = open(&namespace(1), "/a");
    assert_eq!(one.get("where").unwrap().as_deref(), Some(&b"one"[..]));
}

#[test]
fn a_file_is_one_device_under_all_its_names() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let plain = |name: &str| dir.path().join(name).display().to_string();
    // A plain path has no options and no escapes.
    let names = ["a", "a?1", "a?2", "b c", "b%20c"];
    let all = names.map(|name| open(&make(&dir.path().join(name)), "/a"));
    for (db, name) in all.iter().zip(names) {
        db.put("name", name).unwrap();
    }
    for (n, name) in names.iter().enumerate() {
        let second = open(&plain(name), "/b");
        for (m, db) in all.iter().enumerate() {
            assert_eq!(share(db, &second), n == m, "{name} and {}", names[m]);
        }
    }
    let spaced = open(&format!("file://{}", plain("b c")), "/c");
    assert!(share(&spaced, &all[3]));
    std::fs::hard_link(plain("a"), plain("link")).unwrap();
    assert!(share(&open(&plain("link"), "/c"), &all[0]));
}

#[test]
fn a_new_file_at_the_path_of_an_open_one_is_another_device() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let (image, moved) = (dir.path().join("kv.img"), dir.path().join("moved.img"));
    let old = open(&make(&image), "/a");
    old.put("which", "old").unwrap();
    std::fs::rename(&image, &moved).unwrap();
    let new = open(&make(&image), "/a");
    assert_eq!(new.get("which").unwrap(), None);
    assert!(!share(&old, &new));
    assert!(share(&old, &open(&file_uri(&moved), "/b")));
    assert!(share(&new, &open(&file_uri(&image), "/b")));
}

/// A handle of the file system can unmount it. Then the next database mounts the device again, and
/// those of the mount before have no part in when that ends.
#[test]
fn each_mount_counts_its_own_databases() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = make(&dir.path().join("kv.img"));
    let a = open(&uri, "/a");
    a.file_system().unmount().unwrap();
    let b = open(&uri, "/b");
    let c = open(&uri, "/c");
    drop(a);
    b.close().unwrap();
    c.put("still", "open").unwrap();
    c.close().unwrap();
}
