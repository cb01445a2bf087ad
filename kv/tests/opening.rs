//! Opening and closing: what is refused, what is made, what is free afterwards.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{check, fill, key, tree, uncompressed, value, watchdog};
use pumice::bdev::BlockDevice;
use pumice::bdev::OpKind;
use pumice::bdev::error_inject::{ErrorDevice, Failure, Injection};
use pumice::fs::OpenOptions;
use pumice::rocksdb::{Options, WriteOptions};
use pumice::{Db, DbOptions, EnvOptions, Error, ErrorKind, MountOptions, mount, mount_device};

#[test]
fn what_is_not_ours_is_refused() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("other.img");
    let mut bytes = vec![0; 64 << 20];
    bytes[5000..5008].copy_from_slice(b"precious");
    std::fs::write(&image, &bytes).unwrap();
    let uri = format!("file://{}", image.display());
    let error = Db::open(&uri).err().unwrap();
    assert!(matches!(error, Error::NotEmpty { .. }), "{error}");
    assert!(error.to_string().contains("mkfs"), "{error}");
    assert!(std::fs::read(&image).unwrap() == bytes, "it was written to");
    std::fs::write(&image, vec![0; 64 << 20]).unwrap();
    let never = MountOptions::new().format_empty(None);
    assert!(mount(&uri, &never).is_err());
    let db = Db::open(&uri).unwrap();
    let error = Db::open(&uri).err().unwrap().to_string();
    assert!(error.contains("LOCK"), "{error}");
    let error = pumice::chain(&mount(&uri, &never).err().unwrap());
    assert!(error.contains("in use"), "{error}");
    db.close().unwrap();
    assert!(matches!(
        Db::open("no such thing"),
        Err(Error::Device { .. })
    ));
    let error = DbOptions::new()
        .path("/a\0b")
        .open("malloc://64M")
        .err()
        .unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
}

/// Reading creates nothing: no image, no file system, no database.
#[test]
fn a_database_that_is_only_read_is_not_made() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let reader = DbOptions::new().read_only(true);
    let typo = format!("file://{}/typo.img?size=64M&create=1", dir.path().display());
    let error = reader.open(&typo).err().unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{error}");
    let image = dir.path().join("blank.img");
    std::fs::write(&image, vec![0; 64 << 20]).unwrap();
    assert!(reader.open(&format!("file://{}", image.display())).is_err());
    assert!(std::fs::read(&image).unwrap().iter().all(|byte| *byte == 0));
    let fs = mount("malloc://64M", &MountOptions::new()).unwrap();
    assert!(reader.clone().path("/a/typo").open_in(&fs).is_err());
    assert_eq!(tree(&fs, "/"), Vec::<String>::new());
}

/// U7: closing takes a shared handle, and remaining handles of the database are harmless.
#[test]
fn closed_by_a_shared_handle_and_opened_again_at_once() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}/kv.img?size=256M&create=1", dir.path().display());
    let db = Arc::new(uncompressed().open(&uri).unwrap());
    let env = db.env().clone();
    let mut options = Options::default();
    options.set_env(&env);
    fill(&db, 0..1_000);
    Arc::clone(&db).close().unwrap();
    db.close().unwrap();
    // R11: neither the database, nor its environment, nor options with it keep the device. Another
    // database would share the mount, if it was still there.
    let alone = mount(&uri, &MountOptions::new()).unwrap();
    alone.unmount().unwrap();
    drop(alone);
    let again = uncompressed().open(&uri).unwrap();
    check(&again, 0..1_000);
    assert!(db.put("late", "1").is_err());
    again.put("later", "2").unwrap();
    drop(db);
    assert_eq!(again.get("late").unwrap(), None);
    again.close().unwrap();
    drop(again);
    // The same when it is dropped instead of closed.
    let db = uncompressed().open(&uri).unwrap();
    let _env = db.env().clone();
    db.put("more", "3").unwrap();
    drop(db);
    let db = uncompressed().open(&uri).unwrap();
    assert_eq!(db.get("more").unwrap().as_deref(), Some(&b"3"[..]));
}

/// In a mounted file system the directory is free after the close, and the old handle cannot write
/// beside the new one.
#[test]
fn a_directory_is_free_after_the_close() {
    let _limit = watchdog();
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let open = || uncompressed().path("/db").open_in(&fs);
    let old = open().unwrap();
    fill(&old, 0..1_000);
    assert!(open().is_err(), "opened twice");
    old.close().unwrap();
    let new = open().unwrap();
    assert!(old.put(key(1), "old").is_err());
    fill(&new, 1_000..2_000);
    drop(old);
    assert!(open().is_err(), "the new one's lock went with the old one");
    check(&new, 0..2_000);
    new.close().unwrap();
    fs.unmount().unwrap();
}

/// U7: a failed close says so, and can be called again when the fault has passed.
#[test]
fn a_close_that_failed_is_called_again() {
    let _limit = watchdog();
    let base = pumice::bdev::open("malloc://256M?block_size=4096").unwrap();
    drop(mount_device(&base, &MountOptions::new()).unwrap());
    let faulty = Arc::new(ErrorDevice::new(None, base));
    let device: Arc<dyn BlockDevice> = Arc::clone(&faulty) as Arc<dyn BlockDevice>;
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    let db = uncompressed().open_in(&fs).unwrap();
    fill(&db, 0..20_000);
    // This is data: a metadata page that cannot be written stops the store, which is another case.
    let data = Some((1024, 60_000));
    faulty.inject(
        Injection::new(Failure::Fail)
            .op(Some(OpKind::Write))
            .count(u64::MAX)
            .range(data),
    );
    db.close().expect_err("nothing could be written");
    check(&db, 0..20_000);
    db.close().expect_err("nothing can be written yet");
    faulty.clear();
    let started = Instant::now();
    while let Err(error) = db.close() {
        assert!(started.elapsed() < common::LIMIT / 3, "never: {error}");
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(db);
    fs.unmount().unwrap();
    let fs = mount_device(&device, &MountOptions::new()).unwrap();
    check(&uncompressed().open_in(&fs).unwrap(), 0..20_000);
}

/// KA6, U20: the parents of the path are missing, as when a user of the `rocksdb` crate passes it.
#[test]
fn missing_parents_of_a_databases_directory_are_made() {
    let _limit = watchdog();
    // The crate makes the path in the kernel's file system as well.
    let dir = tempfile::tempdir().unwrap();
    let path = format!("{}/n/e/s/t", dir.path().display());
    let fs = mount("malloc://256M", &MountOptions::new()).unwrap();
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_env(&pumice::env(&fs));
    let db = pumice::rocksdb::DB::open(&options, &path).unwrap();
    db.put("a", "b").unwrap();
    drop(db);
    assert!(fs.stat(&format!("{path}/CURRENT")).is_ok());
    let env = EnvOptions::new().root("/ten/ant").build(&fs).unwrap();
    options.set_env(&env);
    drop(pumice::rocksdb::DB::open(&options, &path).unwrap());
    assert!(fs.stat(&format!("/ten/ant{path}/CURRENT")).is_ok());
    // A file in place of a parent is an error.
    fs.open("/file", OpenOptions::CREATE).unwrap();
    let env = EnvOptions::new().root("/file").build(&fs).unwrap();
    options.set_env(&env);
    assert!(pumice::rocksdb::DB::open(&options, "/").is_err());
}

/// KA18, L8: a root is untrusted data.
#[test]
fn a_root_that_cannot_be_is_an_error() {
    let fs = mount("malloc://64M", &MountOptions::new()).unwrap();
    for root in ["/a\0b", "a\nb", "\u{7f}"] {
        let error = EnvOptions::new().root(root).build(&fs).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        let error = DbOptions::new().path(root).open_in(&fs).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
}

/// KA9: the error for a file of the kernel's file system says what to do.
#[test]
fn a_file_of_the_kernels_is_named_as_such() {
    let _limit = watchdog();
    let fs = mount("malloc://64M", &MountOptions::new()).unwrap();
    let db = uncompressed().open_in(&fs).unwrap();
    let error = db.ingest_external_file(vec!["/etc/passwd"]).unwrap_err();
    assert!(error.to_string().contains("pumice cp"), "{error}");
}

/// R6: the log's metadata is damaged. Its loss must not go unnoticed.
#[test]
fn a_database_on_a_damaged_file_system_is_not_opened_unasked() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("kv.img");
    let uri = format!("file://{}", image.display());
    let db = uncompressed()
        .open(&format!("{uri}?size=64M&create=1"))
        .unwrap();
    let mut sync = WriteOptions::default();
    sync.set_sync(true);
    for n in 0..100 {
        db.put_opt(key(n), value(n), &sync).unwrap();
    }
    db.close().unwrap();
    drop(db);
    let mut bytes = std::fs::read(&image).unwrap();
    let page = bytes
        .chunks_exact_mut(4096)
        .take(2048)
        .find(|page| page.windows(5).any(|w| w == b".log\0"))
        .expect("no page of the log's");
    page[2000] ^= 1;
    std::fs::write(&image, &bytes).unwrap();
    let error = Db::open(&uri)
        .expect_err("opened without its log")
        .to_string();
    assert!(
        error.contains("damage") && error.contains("accept_damage"),
        "{error}"
    );
    let error = mount(&uri, &MountOptions::new()).err().unwrap().to_string();
    assert!(error.contains("accept_damage"), "{error}");
    assert!(std::fs::read(&image).unwrap() == bytes, "it was written to");
    // Reading needs no permission, and continuing takes the option that the error names.
    let reading = MountOptions::new().read_only(true);
    let fs = mount(&uri, &reading).unwrap();
    assert!(!fs.problems().is_empty());
    fs.unmount().unwrap();
    let anyway = MountOptions::new().accept_damage(true);
    let db = uncompressed().mount(anyway).open(&uri).unwrap();
    db.put("goes", "on").unwrap();
    db.close().unwrap();
}

#[test]
fn several_databases_of_one_device_are_opened_by_its_uri() {
    let _limit = watchdog();
    let dir = tempfile::tempdir().unwrap();
    let uri = format!("file://{}", dir.path().join("kv.img").display());
    let at = |path: &str| uncompressed().path(path);
    let a = at("/a").open(&format!("{uri}?size=128M&create=1")).unwrap();
    // Under another name of the same file.
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path().join("kv.img"), &link).unwrap();
    let b = at("/b").open(&link.display().to_string()).unwrap();
    fill(&a, 0..100);
    fill(&b, 100..200);
    // Opening one of them twice is refused, and does not affect the others.
    assert!(at("/a").open(&uri).is_err());
    a.close().unwrap();
    a.close().unwrap();
    check(&b, 100..200);
    b.put("still", "open").unwrap();
    // The device belongs to this process until the last database is closed.
    let other = MountOptions::new();
    assert_eq!(mount(&uri, &other).err().unwrap().kind(), ErrorKind::InUse);
    b.close().unwrap();
    mount(&uri, &other).unwrap().unmount().unwrap();
    // A dropped database counts as closed, and a failed opening does not keep the device.
    drop(at("/a").open(&uri).unwrap());
    assert!(at("/a\0").open(&uri).is_err());
    let b = at("/b").open(&uri).unwrap();
    check(&b, 100..200);
    b.close().unwrap();
    mount(&uri, &other).unwrap();
}

/// RocksDB reads these files whole into memory, and a file without blocks may be longer than any memory.
#[test]
fn a_current_that_is_no_line_is_not_read_into_memory() {
    let _limit = watchdog();
    let fs = mount("malloc://64M", &MountOptions::new()).unwrap();
    DbOptions::new().open_in(&fs).unwrap().close().unwrap();
    let set_len = |name, len| {
        let file = fs.open(name, OpenOptions::READ).unwrap();
        let before = file.len();
        file.truncate(len).unwrap();
        before
    };
    let len = set_len("/CURRENT", (1 << 20) + 1);
    let error = DbOptions::new().open_in(&fs).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    let text = pumice::chain(&error);
    assert!(
        text.contains("1048577 bytes in place of one line"),
        "{text}"
    );
    set_len("/CURRENT", len);
    let len = set_len("/IDENTITY", (1 << 20) + 1);
    let _ = DbOptions::new().open_in(&fs);
    set_len("/IDENTITY", len);
    DbOptions::new().open_in(&fs).unwrap().close().unwrap();
}
