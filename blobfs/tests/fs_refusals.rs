//! What a file system refuses, by every operation that it concerns. What is refused has changed nothing.

mod common;

use std::sync::Arc;

use common::faults::files_of;
use common::{content, memory};
use pumice_bdev::BlockDevice;
use pumice_blobfs::fs::{
    Attributes, File, FileSystem, FormatOptions, FsError, MountOptions, OpenOptions, Result,
};

/// A file system with the file `/file` and the directory `/dir`, which has a file too.
fn filled() -> (Arc<dyn BlockDevice>, FileSystem) {
    let dev = memory(16 << 20, 4096);
    FileSystem::format(Arc::clone(&dev), &FormatOptions::default()).unwrap();
    let fs = FileSystem::mount(Arc::clone(&dev), &MountOptions::default()).unwrap();
    fs.mkdir("/dir").unwrap();
    for path in ["/file", "/dir/inner"] {
        let file = fs.open(path, OpenOptions::CREATE).unwrap();
        file.append(&[7; 5000]).unwrap();
        file.sync().unwrap();
    }
    (dev, fs)
}

fn modified() -> Attributes {
    let mut attributes = Attributes::default();
    attributes.mode = Some(0o600);
    attributes
}

/// The operations that change names.
type Change = (&'static str, fn(&FileSystem, &str) -> Result<()>);

/// Each makes the name, or gives it to something.
const MAKES: [Change; 7] = [
    ("create", |fs, path| {
        fs.open(path, OpenOptions::CREATE).map(drop)
    }),
    ("create exclusively", |fs, path| {
        fs.open(path, OpenOptions::CREATE.exclusive(true)).map(drop)
    }),
    ("create afresh", |fs, path| {
        fs.open(path, OpenOptions::FRESH).map(drop)
    }),
    ("mkdir", FileSystem::mkdir),
    ("rename of a file", |fs, path| fs.rename("/file", path)),
    ("rename of a directory", |fs, path| fs.rename("/dir", path)),
    ("link", |fs, path| fs.link("/file", path)),
];

/// Each needs that there is something of the name.
const NEEDS: [Change; 9] = [
    ("open", |fs, path| {
        fs.open(path, OpenOptions::READ).map(drop)
    }),
    ("unlink", FileSystem::unlink),
    ("rmdir", FileSystem::rmdir),
    ("rename of it", |fs, path| fs.rename(path, "/new")),
    ("link to it", |fs, path| fs.link(path, "/new")),
    ("attributes", |fs, path| {
        fs.set_attributes(path, &modified())
    }),
    ("stat", |fs, path| fs.stat(path).map(drop)),
    ("list", |fs, path| fs.list(path).map(drop)),
    ("sync_dir", FileSystem::sync_dir),
];

/// Nothing gets a name in a directory that does not exist, where a mount would not find it, or below a file.
#[test]
fn nothing_is_made_in_what_is_not_a_directory() {
    let (dev, fs) = filled();
    let before = files_of(&fs);
    for (what, change) in MAKES {
        let error = change(&fs, "/none/x").unwrap_err();
        assert!(matches!(error, FsError::NotFound { .. }), "{what}: {error}");
        let error = change(&fs, "/file/x").unwrap_err();
        assert!(matches!(error, FsError::NotDir { .. }), "{what}: {error}");
    }
    for (what, need) in NEEDS {
        for path in ["/none", "/none/x", "/dir/none"] {
            let error = need(&fs, path).unwrap_err();
            assert!(
                matches!(error, FsError::NotFound { .. }),
                "{what} {path}: {error}"
            );
        }
        need(&fs, "/file/x").unwrap_err();
    }
    for (what, need) in [NEEDS[0], NEEDS[1], NEEDS[4]] {
        let error = need(&fs, "/file/x").unwrap_err();
        assert!(matches!(error, FsError::NotDir { .. }), "{what}: {error}");
    }
    assert!(files_of(&fs) == before);
    fs.unmount().unwrap();
    drop(fs);
    let fs = FileSystem::mount(dev, &MountOptions::default()).unwrap();
    assert!(files_of(&fs) == before);
}

/// The operations that change a file.
type Write = (&'static str, fn(&File) -> Result<()>);

const WRITES: [Write; 5] = [
    ("append", |f| f.append(b"x")),
    ("write_at", |f| f.write_at(0, b"x")),
    ("truncate", |f| f.truncate(10)),
    ("allocate", |f| f.allocate(0, 1 << 20)),
    ("attributes", |f| f.set_attributes(&modified())),
];

/// Tries everything that changes something.
fn try_all(fs: &FileSystem, file: &File, is_refusal: fn(&FsError) -> bool) {
    for (what, change) in MAKES {
        let error = change(fs, "/dir/x").unwrap_err();
        assert!(is_refusal(&error), "{what}: {error}");
    }
    let existing: [Change; 5] = [
        ("afresh", |fs, _| {
            fs.open("/file", OpenOptions::FRESH).map(drop)
        }),
        ("unlink", |fs, _| fs.unlink("/file")),
        ("rmdir", |fs, _| fs.rmdir("/empty")),
        ("attributes", |fs, _| fs.set_attributes("/dir", &modified())),
        ("grow", |fs, _| fs.grow().map(drop)),
    ];
    for (what, change) in existing {
        let error = change(fs, "").unwrap_err();
        assert!(is_refusal(&error), "{what}: {error}");
    }
    for (what, write) in WRITES {
        let error = write(file).unwrap_err();
        assert!(is_refusal(&error), "{what}: {error}");
    }
}

#[test]
fn a_mount_for_reading_changes_nothing() {
    let (dev, fs) = filled();
    fs.mkdir("/empty").unwrap();
    fs.unmount().unwrap();
    drop(fs);
    let before = content(&dev);
    let mut opts = MountOptions::default();
    opts.read_only = true;
    let fs = FileSystem::mount(Arc::clone(&dev), &opts).unwrap();
    let files = files_of(&fs);
    let file = fs.open("/file", OpenOptions::READ).unwrap();
    try_all(&fs, &file, |e| matches!(e, FsError::ReadOnly { .. }));
    file.sync().unwrap();
    assert!(files_of(&fs) == files);
    drop(file);
    fs.unmount().unwrap();
    assert!(content(&dev) == before);
}

#[test]
fn what_is_unmounted_is_not_used() {
    let (dev, fs) = filled();
    fs.mkdir("/empty").unwrap();
    let file = fs.open("/file", OpenOptions::READ).unwrap();
    fs.unmount().unwrap();
    let before = content(&dev);
    let is_refusal = |e: &FsError| matches!(e, FsError::Unmounted { .. });
    try_all(&fs, &file, is_refusal);
    for (what, need) in NEEDS {
        let path = if what == "list" || what == "sync_dir" || what == "rmdir" {
            "/empty"
        } else {
            "/file"
        };
        let error = need(&fs, path).unwrap_err();
        assert!(is_refusal(&error), "{what}: {error}");
    }
    let mut out = [0; 10];
    let others = [
        ("read_at", file.read_at(0, &mut out).map(drop)),
        ("read_async", file.read_async(0, 10).map(drop)),
        ("sync", file.sync()),
        ("sync_data", file.sync_data()),
        ("sync of all", fs.sync()),
        ("exists", fs.exists("/file").map(drop)),
        ("names", fs.names("/file").map(drop)),
        ("num_links", fs.num_links("/file").map(drop)),
        ("same_file", fs.same_file("/file", "/file").map(drop)),
        ("lock", fs.lock("/file").map(drop)),
        ("unmount", fs.unmount()),
    ];
    for (what, result) in others {
        let error = result.expect_err(what);
        assert!(is_refusal(&error), "{what}: {error}");
    }
    assert!(content(&dev) == before);
}
