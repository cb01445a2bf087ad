//! A LevelDB on BlobFS against a model, over remounts and power cuts.

use std::collections::BTreeMap;
use std::sync::Arc;

use pumice_bdev::BlockDevice;
use pumice_bdev_testkit::crashsim::CrashDevice;
use pumice_blobfs::fs::{FileSystem, FormatOptions, MountOptions};
use pumice_leveldb::BlobFsEnv;
use pumice_leveldb::rusty_leveldb::env::Env;
use pumice_leveldb::rusty_leveldb::{DB, LdbIterator, Options, StatusCode, WriteBatch};
use rand::prelude::*;

type Model = BTreeMap<Vec<u8>, Vec<u8>>;

fn mounted(dev: &Arc<dyn BlockDevice>) -> BlobFsEnv {
    BlobFsEnv::new(FileSystem::mount(Arc::clone(dev), &MountOptions::default()).unwrap())
}

fn small(env: &BlobFsEnv) -> Options {
    Options {
        write_buffer_size: 64 << 10,
        max_file_size: 64 << 10,
        ..env.options()
    }
}

fn all(db: &mut DB) -> Model {
    let mut iter = db.new_iter().unwrap();
    let mut found = Model::new();
    while let Some((key, value)) = iter.next() {
        found.insert(key.to_vec(), value.to_vec());
    }
    found
}

#[test]
fn it_holds_what_a_map_holds_over_remounts() {
    let dev = pumice_bdev::open("malloc://128M").unwrap();
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    let mut random = StdRng::seed_from_u64(1);
    let mut model = Model::new();
    for _round in 0..4 {
        let env = mounted(&dev);
        let mut db = DB::open("/a/db", small(&env)).unwrap();
        assert!(all(&mut db) == model);
        for _ in 0..3000 {
            let key = random.random_range(0..2000_u32).to_be_bytes().to_vec();
            if random.random_range(0..4) == 0 {
                db.delete(&key).unwrap();
                model.remove(&key);
            } else {
                let value = vec![random.random(); random.random_range(0..400)];
                db.put(&key, &value).unwrap();
                model.insert(key, value);
            }
        }
        assert!(all(&mut db) == model);
        db.close().unwrap();
        drop(db);
        assert!(env.file_system().problems().is_empty());
        env.unmount().unwrap();
    }
}

/// Every cut leaves what was written with `sync` before it.
#[test]
fn synced_writes_survive_a_power_cut() {
    let device = Arc::new(CrashDevice::new(4096, 8192, true, 7));
    let dev: Arc<dyn BlockDevice> = device.clone();
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    let env = mounted(&dev);
    let mut db = DB::open("/db", small(&env)).unwrap();
    let mut acknowledged = vec![(device.len_events(), 0_u32)];
    for n in 0..120_u32 {
        let mut batch = WriteBatch::default();
        batch.put(&n.to_be_bytes(), &vec![7; 1000]);
        db.write(batch, true).unwrap();
        acknowledged.push((device.len_events(), n + 1));
    }
    let end = device.len_events();
    let mut random = StdRng::seed_from_u64(3);
    for cut in (acknowledged[0].0..=end).step_by(7) {
        // Of what was not flushed the device keeps some.
        let copy: Arc<dyn BlockDevice> =
            Arc::new(device.reopen_after(cut, &mut |_| random.random()));
        let env = mounted(&copy);
        let mut db = DB::open("/db", small(&env)).unwrap();
        let promised = acknowledged
            .iter()
            .rev()
            .find(|(at, _)| *at <= cut)
            .unwrap()
            .1;
        let found = all(&mut db);
        for n in 0..promised {
            assert_eq!(
                found.get(&n.to_be_bytes()[..]),
                Some(&vec![7; 1000]),
                "cut {cut}: key {n}"
            );
        }
        drop(db);
    }
}

#[test]
fn the_environment_keeps_its_promises() {
    let env = BlobFsEnv::open("malloc://64M").unwrap();
    env.mkdir("/a/b".as_ref()).unwrap();
    env.mkdir("/a/b".as_ref()).unwrap();
    env.open_writable_file("/a/b/f".as_ref())
        .unwrap()
        .write_all(b"text")
        .unwrap();
    env.open_appendable_file("/a/b/f".as_ref())
        .unwrap()
        .write_all(b" more")
        .unwrap();
    assert_eq!(env.size_of("/a/b/f".as_ref()).unwrap(), 9);
    let mut read = String::new();
    env.open_sequential_file("/a/b/f".as_ref())
        .unwrap()
        .read_to_string(&mut read)
        .unwrap();
    assert_eq!(read, "text more");
    let mut part = [0; 4];
    assert_eq!(
        env.open_random_access_file("/a/b/f".as_ref())
            .unwrap()
            .read_at(5, &mut part)
            .unwrap(),
        4
    );
    assert_eq!(&part, b"more");
    env.rename("/a/b/f".as_ref(), "/a/g".as_ref()).unwrap();
    assert_eq!(
        env.children("/a".as_ref()).unwrap(),
        ["b", "g"].map(std::path::PathBuf::from)
    );
    assert!(!env.exists("/a/b/f".as_ref()).unwrap());
    let code = |result: pumice_leveldb::rusty_leveldb::Result<()>| result.unwrap_err().code;
    assert_eq!(code(env.delete("/a/b/f".as_ref())), StatusCode::NotFound);
    let lock = env.lock("/a/LOCK".as_ref()).unwrap();
    assert_eq!(
        code(env.lock("/a/LOCK".as_ref()).map(drop)),
        StatusCode::LockError
    );
    env.unlock(lock).unwrap();
    let lock = env.lock("/a/LOCK".as_ref()).unwrap();
    env.unlock(lock).unwrap();
    env.rmdir("/a".as_ref()).unwrap();
    assert!(!env.exists("/a".as_ref()).unwrap());
    env.unmount().unwrap();
    assert_eq!(code(env.delete("/a".as_ref())), StatusCode::IOError);
}
