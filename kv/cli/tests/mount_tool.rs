//! Tests of `pumice mount`, which drive the mounted directory as any program does.

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::{FallocateFlags, RenameFlags, fallocate, renameat2};
use nix::sys::statvfs::statvfs;
use serde_json::Value;

#[path = "common/mounted.rs"]
mod mounted;
#[path = "common/tool.rs"]
mod tool;

use mounted::{Mounted, can_mount, image, sound};
use tool::{ok, pumice};

/// Returns the number of the error.
fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

fn refused(args: &[&str]) -> String {
    let output = pumice(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// Bytes that differ from place to place.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..len).map(|_| next()).collect()
}

/// Returns every path below `dir` with what is to be the same after a remount.
fn tree(dir: &Path) -> BTreeMap<String, (u32, u64, SystemTime, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(at) = dirs.pop() {
        for entry in fs::read_dir(&at).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
            let (links, modified, bytes) = if meta.is_dir() {
                dirs.push(path);
                (0, UNIX_EPOCH, Vec::new())
            } else {
                let bytes = fs::read(&path).unwrap();
                assert_eq!(bytes.len() as u64, meta.len(), "{name}");
                (meta.nlink(), meta.modified().unwrap(), bytes)
            };
            found.insert(name, (meta.mode(), links, modified, bytes));
        }
    }
    found
}

#[test]
fn what_cannot_be_mounted_is_refused_with_what_to_do() {
    if !can_mount("what_cannot_be_mounted_is_refused_with_what_to_do") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path(), "64M");
    let at = dir.path().join("mnt");
    let to = at.to_str().unwrap();
    assert!(refused(&["mount", &uri, to]).contains("mkdir"));
    fs::create_dir(&at).unwrap();
    fs::write(at.join("file"), "text").unwrap();
    assert!(refused(&["mount", &uri, to]).contains("empty directory"));
    let file = format!("{to}/file");
    assert!(refused(&["mount", &uri, &file]).contains("not a directory"));
    fs::remove_file(at.join("file")).unwrap();
    let none = dir.path().join("none.img");
    refused(&["mount", none.to_str().unwrap(), to]);
    let both = pumice(&["mount", "--read-only", "--accept-damage", &uri, to]);
    assert_eq!(both.status.code(), Some(2), "{both:?}");
    // A device has one writer.
    let mounted = Mounted::new(&uri, &at, &[]);
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    let second = refused(&["mount", &uri, other.to_str().unwrap()]);
    assert!(second.contains("in use by process"), "{second}");
    let reader = refused(&["mount", "--read-only", &uri, other.to_str().unwrap()]);
    assert!(reader.contains("in use by process"), "{reader}");
    mounted.unmount(&uri);
    // Readers have it together.
    let one = Mounted::new(&uri, &at, &["--read-only"]);
    let two = Mounted::new(&uri, &other, &["-r"]);
    assert_eq!(ok(&["ls", &uri]), "");
    assert_eq!(errno(fs::write(one.at.join("f"), "")), Some(libc::EROFS));
    assert_eq!(errno(fs::create_dir(two.at.join("d"))), Some(libc::EROFS));
    two.end("-TERM", &uri);
    one.unmount(&uri);
}

#[test]
fn files_directories_and_links_survive_a_remount() {
    let Some((_dir, uri, m)) =
        Mounted::on_new_image("files_directories_and_links_survive_a_remount", "256M")
    else {
        return;
    };
    let at = m.at.clone();
    fs::create_dir_all(m.at.join("a/b/c")).unwrap();
    let long = pattern(5_000_000, 3);
    fs::write(m.at.join("a/long"), &long).unwrap();
    fs::write(m.at.join("a/b/short"), "short").unwrap();
    fs::write(m.at.join("empty"), "").unwrap();
    fs::hard_link(m.at.join("a/b/short"), m.at.join("a/link")).unwrap();
    let ino = |name: &str| fs::metadata(m.at.join(name)).unwrap().ino();
    assert_eq!(ino("a/b/short"), ino("a/link"));
    assert_eq!(fs::metadata(m.at.join("a/link")).unwrap().nlink(), 2);
    fs::set_permissions(m.at.join("a/long"), Permissions::from_mode(0o751)).unwrap();
    fs::set_permissions(m.at.join("a/b"), Permissions::from_mode(0o1700)).unwrap();
    let then = UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    let file = File::options()
        .append(true)
        .open(m.at.join("a/long"))
        .unwrap();
    (&file).write_all(b"more").unwrap();
    file.set_times(FileTimes::new().set_modified(then)).unwrap();
    drop(file);
    let sub = File::open(m.at.join("a/b/c")).unwrap();
    sub.set_times(FileTimes::new().set_modified(then)).unwrap();
    drop(sub);
    // Bytes inside, past the end, and a shorter length.
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(m.at.join("holes"))
        .unwrap();
    file.write_all_at(b"end", 300_000).unwrap();
    file.write_all_at(b"inside", 70_001).unwrap();
    file.set_len(300_001).unwrap();
    drop(file);
    fs::rename(m.at.join("a"), m.at.join("moved")).unwrap();
    let before = tree(&at);
    let inodes: Vec<u64> = vec![ino("moved/long"), ino("moved/b"), ino("holes")];
    m.unmount(&uri);
    let m = Mounted::new(&uri, &at, &["--read-only"]);
    assert!(tree(&at) == before);
    let ino = |name: &str| fs::metadata(m.at.join(name)).unwrap().ino();
    assert_eq!(inodes, [ino("moved/long"), ino("moved/b"), ino("holes")]);
    let meta = fs::metadata(m.at.join("moved/long")).unwrap();
    assert_eq!(meta.mode(), 0o100_751);
    assert_eq!(meta.modified().unwrap(), then);
    assert_eq!(meta.len(), 5_000_004);
    let meta = |name: &str| fs::metadata(m.at.join(name)).unwrap();
    assert_eq!(meta("moved/b/c").modified().unwrap(), then);
    assert_eq!(meta("moved/b").mode(), 0o041_700);
    let mut file = File::open(m.at.join("holes")).unwrap();
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(69_999)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(&bytes[..9], b"\0\0inside\0");
    assert_eq!(bytes.last(), Some(&b'e'));
    drop(file);
    m.unmount(&uri);
    // The other commands see the same.
    assert_eq!(ok(&["cat", &uri, "/moved/link"]), "short");
}

#[test]
fn a_file_without_a_name_lives_until_it_is_closed() {
    let Some((_dir, uri, m)) =
        Mounted::on_new_image("a_file_without_a_name_lives_until_it_is_closed", "64M")
    else {
        return;
    };
    let at = m.at.clone();
    let used = || {
        let space = statvfs(&at).unwrap();
        space.blocks() - space.blocks_free()
    };
    let empty = used();
    let open = |name: &str| {
        let mut how = OpenOptions::new();
        how.read(true).write(true).create(true);
        how.open(m.at.join(name)).unwrap()
    };
    let first = open("file");
    first.write_all_at(&pattern(3 << 20, 1), 0).unwrap();
    let second = open("other");
    second.write_all_at(b"second", 0).unwrap();
    let both = open("both");
    fs::hard_link(m.at.join("both"), m.at.join("link")).unwrap();
    fs::remove_file(m.at.join("both")).unwrap();
    assert_eq!(both.metadata().unwrap().nlink(), 1);
    both.write_all_at(b"linked", 0).unwrap();
    assert_eq!(fs::read(m.at.join("link")).unwrap(), b"linked");
    fs::remove_file(m.at.join("file")).unwrap();
    // A new file of the same name, and one renamed over an open one.
    fs::write(m.at.join("file"), "new").unwrap();
    fs::write(m.at.join("third"), "third").unwrap();
    fs::rename(m.at.join("third"), m.at.join("other")).unwrap();
    assert_eq!(first.metadata().unwrap().len(), 3 << 20);
    assert_eq!(first.metadata().unwrap().nlink(), 0);
    first.set_len(2 << 20).unwrap();
    first.write_all_at(b"still", 2 << 20).unwrap();
    first.sync_all().unwrap();
    let mut bytes = vec![0; 6];
    first.read_exact_at(&mut bytes[..5], 2 << 20).unwrap();
    assert_eq!(&bytes[..5], b"still");
    second.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, b"second");
    assert_eq!(fs::read(m.at.join("file")).unwrap(), b"new");
    assert_eq!(fs::read(m.at.join("other")).unwrap(), b"third");
    drop((first, second, both));
    for name in ["file", "other", "link"] {
        fs::remove_file(m.at.join(name)).unwrap();
    }
    // The kernel tells of the last close a moment later.
    let started = std::time::Instant::now();
    while used() != empty && started.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(used(), empty);
    m.end("-INT", &uri);
}

#[test]
fn errors_have_the_numbers_of_a_kernel_file_system() {
    let Some((_dir, uri, m)) =
        Mounted::on_new_image("errors_have_the_numbers_of_a_kernel_file_system", "64M")
    else {
        return;
    };
    let at = m.at.clone();
    fs::create_dir(m.at.join("d")).unwrap();
    fs::write(m.at.join("d/f"), "").unwrap();
    let is = |expected: i32, found: Option<i32>| assert_eq!(found, Some(expected));
    is(libc::ENOENT, errno(File::open(m.at.join("none"))));
    is(libc::ENOTDIR, errno(File::open(m.at.join("d/f/x"))));
    is(libc::EISDIR, errno(fs::write(m.at.join("d"), "")));
    is(libc::EEXIST, errno(fs::create_dir(m.at.join("d"))));
    is(libc::EEXIST, errno(File::create_new(m.at.join("d/f"))));
    is(libc::ENOTEMPTY, errno(fs::remove_dir(m.at.join("d"))));
    is(libc::ENOTDIR, errno(fs::remove_dir(m.at.join("d/f"))));
    is(libc::EISDIR, errno(fs::remove_file(m.at.join("d"))));
    is(
        libc::EINVAL,
        errno(fs::rename(m.at.join("d"), m.at.join("d/e"))),
    );
    is(
        libc::ENAMETOOLONG,
        errno(fs::write(m.at.join("x".repeat(255)), "")),
    );
    is(libc::EINVAL, errno(fs::write(m.at.join("new\nline"), "")));
    let latin = at.join(std::ffi::OsStr::from_bytes(b"caf\xe9"));
    is(libc::EILSEQ, errno(fs::write(&latin, "")));
    is(libc::ENOENT, errno(File::open(&latin)));
    is(
        libc::EPERM,
        errno(std::os::unix::fs::symlink("f", m.at.join("s"))),
    );
    is(
        libc::EPERM,
        errno(std::os::unix::fs::chown(m.at.join("d/f"), Some(4711), None)),
    );
    let own = fs::metadata(m.at.join("d/f")).unwrap();
    std::os::unix::fs::chown(m.at.join("d/f"), Some(own.uid()), Some(own.gid())).unwrap();
    let fifo = Command::new("mkfifo").arg(m.at.join("p")).output().unwrap();
    assert!(!fifo.status.success());
    for taken in [".pumice-unfinished", ".pumice-cp.part"] {
        let taken = m.at.join(taken);
        is(libc::EPERM, errno(fs::write(&taken, "")));
        is(libc::EPERM, errno(fs::create_dir(&taken)));
        is(libc::EPERM, errno(fs::rename(m.at.join("d/f"), &taken)));
        is(libc::EPERM, errno(fs::hard_link(m.at.join("d/f"), &taken)));
    }
    // Renames that do not replace.
    fs::write(m.at.join("g"), "").unwrap();
    let no_replace = |from: &str, to: &str| {
        let cwd = nix::fcntl::AT_FDCWD;
        let flags = RenameFlags::RENAME_NOREPLACE;
        renameat2(cwd, &m.at.join(from), cwd, &m.at.join(to), flags)
    };
    assert_eq!(no_replace("g", "d/f"), Err(nix::errno::Errno::EEXIST));
    no_replace("g", "h").unwrap();
    m.unmount(&uri);
}

#[test]
fn what_is_not_supported_has_the_number_of_the_documents_table() {
    let Some((_dir, uri, m)) = Mounted::on_new_image(
        "what_is_not_supported_has_the_number_of_the_documents_table",
        "64M",
    ) else {
        return;
    };
    fs::create_dir(m.at.join("d")).unwrap();
    fs::write(m.at.join("d/f"), "").unwrap();
    fs::write(m.at.join("d/g"), "").unwrap();
    let tmpfile = File::options()
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(&m.at);
    assert_eq!(errno(tmpfile), Some(libc::EOPNOTSUPP));
    let python = "import os, fcntl, sys\n\
        def number(f):\n try: f()\n except OSError as e: return e.errno\n\
        d = os.open('d/f', os.O_RDWR)\n\
        print(*map(number, [\n\
        lambda: os.setxattr('d/f', 'user.a', b'x'), lambda: os.getxattr('d/f', 'user.a'),\n\
        lambda: os.listxattr('d/f'), lambda: os.removexattr('d/f', 'user.a'),\n\
        lambda: fcntl.ioctl(d, 0x40041234, b'1234')]))";
    let asked = Command::new("python3")
        .args(["-c", python])
        .current_dir(&m.at)
        .output();
    match asked {
        Ok(output) => {
            let unsupported = libc::EOPNOTSUPP;
            let expected = format!(
                "{unsupported} {unsupported} {unsupported} {unsupported} {}\n",
                libc::ENOTTY
            );
            assert_eq!(
                String::from_utf8_lossy(&output.stdout),
                expected,
                "{output:?}"
            );
        }
        Err(_) => println!("skipped: python3 in mount_tool: there is none"),
    }
    for flags in [RenameFlags::RENAME_EXCHANGE, RenameFlags::RENAME_WHITEOUT] {
        let cwd = nix::fcntl::AT_FDCWD;
        let renamed = renameat2(cwd, &m.at.join("d/f"), cwd, &m.at.join("d/g"), flags);
        assert_eq!(renamed, Err(nix::errno::Errno::EINVAL));
    }
    // The time of the inode's last change is that of its bytes.
    let file = File::options().write(true).open(m.at.join("d/f")).unwrap();
    let then = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    file.set_times(FileTimes::new().set_modified(then)).unwrap();
    assert_eq!(file.metadata().unwrap().ctime(), 1_000_000_000);
    drop(file);
    m.unmount(&uri);
}

#[test]
fn a_full_device_and_allocation_have_the_numbers_of_a_kernel_file_system() {
    let Some((_dir, uri, m)) = Mounted::on_new_image(
        "a_full_device_and_allocation_have_the_numbers_of_a_kernel_file_system",
        "64M",
    ) else {
        return;
    };
    let is = |expected: i32, found: Option<i32>| assert_eq!(found, Some(expected));
    let file = File::create(m.at.join("big")).unwrap();
    is(libc::ENOSPC, errno(file.set_len(1 << 40)));
    assert_eq!(
        fallocate(&file, FallocateFlags::empty(), 0, 1 << 40),
        Err(nix::errno::Errno::ENOSPC)
    );
    fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 1 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 0);
    fallocate(&file, FallocateFlags::empty(), 0, 1 << 20).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    assert_eq!(
        fallocate(
            &file,
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            0,
            4096
        ),
        Err(nix::errno::Errno::EOPNOTSUPP)
    );
    let chunk = pattern(1 << 20, 9);
    let full = (0..).find_map(|_| errno((&file).write_all(&chunk)));
    is(libc::ENOSPC, full);
    drop(file);
    fs::remove_file(m.at.join("big")).unwrap();
    fs::write(m.at.join("again"), &chunk).unwrap();
    m.unmount(&uri);
}

#[test]
fn a_synced_file_survives_the_death_of_the_process() {
    let Some((_dir, uri, mut m)) =
        Mounted::on_new_image("a_synced_file_survives_the_death_of_the_process", "64M")
    else {
        return;
    };
    let at = m.at.clone();
    let bytes = pattern(3_333_333, 5);
    let mut file = File::create(m.at.join("all")).unwrap();
    file.write_all(&bytes).unwrap();
    file.set_permissions(Permissions::from_mode(0o600)).unwrap();
    file.sync_all().unwrap();
    let mut data = File::create(m.at.join("data")).unwrap();
    data.write_all(&bytes).unwrap();
    data.sync_data().unwrap();
    data.write_all_at(b"changed", 1000).unwrap();
    data.sync_data().unwrap();
    m.signal("-KILL");
    m.wait();
    drop((file, data, m));
    // The mount is dead and says what to do.
    let m = Mounted::new(&uri, &at, &[]);
    assert!(fs::read(m.at.join("all")).unwrap() == bytes);
    assert_eq!(fs::metadata(m.at.join("all")).unwrap().mode(), 0o100_600);
    let mut changed = bytes;
    changed[1000..1007].copy_from_slice(b"changed");
    assert!(fs::read(m.at.join("data")).unwrap() == changed);
    m.unmount(&uri);
}

#[test]
fn a_change_that_nobody_syncs_is_durable_after_some_seconds() {
    let Some((_dir, uri, mut m)) = Mounted::on_new_image(
        "a_change_that_nobody_syncs_is_durable_after_some_seconds",
        "64M",
    ) else {
        return;
    };
    fs::write(m.at.join("file"), "text").unwrap();
    std::thread::sleep(Duration::from_secs(11));
    m.signal("-KILL");
    m.wait();
    drop(m);
    assert_eq!(ok(&["cat", &uri, "/file"]), "text");
}

#[test]
fn a_signal_ends_a_mount_that_is_in_use() {
    let Some((_dir, uri, m)) = Mounted::on_new_image("a_signal_ends_a_mount_that_is_in_use", "64M")
    else {
        return;
    };
    let at = m.at.clone();
    let mut file = File::create(m.at.join("file")).unwrap();
    file.write_all(b"text").unwrap();
    m.end("-TERM", &uri);
    assert!(file.write_all(b"more").is_err());
    assert_eq!(ok(&["cat", &uri, "/file"]), "text");
    assert_eq!(fs::read_dir(&at).unwrap().count(), 0, "it is detached");
}

#[test]
fn a_large_directory_can_be_read_while_it_is_emptied() {
    let Some((_dir, uri, m)) =
        Mounted::on_new_image("a_large_directory_can_be_read_while_it_is_emptied", "64M")
    else {
        return;
    };
    fs::create_dir(m.at.join("d")).unwrap();
    for i in 0..700 {
        fs::write(m.at.join(format!("d/a-name-that-is-not-short-{i:05}")), "x").unwrap();
    }
    let mut seen = 0;
    for entry in fs::read_dir(m.at.join("d")).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().len(), 1);
        fs::remove_file(entry.path()).unwrap();
        seen += 1;
    }
    assert_eq!(seen, 700);
    fs::remove_dir(m.at.join("d")).unwrap();
    m.unmount(&uri);
}

#[test]
fn tar_cp_and_rsync_bring_back_what_they_stored() {
    if !can_mount("tar_cp_and_rsync_bring_back_what_they_stored") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path(), "256M");
    let at = dir.path().join("mnt");
    let source = dir.path().join("source");
    for (i, sub) in ["", "x", "x/y", "z"].iter().enumerate() {
        let sub = source.join(sub);
        fs::create_dir_all(&sub).unwrap();
        for k in 0..25 {
            let path = sub.join(format!("file {k}"));
            fs::write(&path, pattern(k * k * 700, (i * 100 + k) as u64)).unwrap();
            let mode = if k % 3 == 0 { 0o755 } else { 0o640 };
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let then = UNIX_EPOCH + Duration::from_secs(1_500_000_000 + k as u64);
            let file = File::options().write(true).open(&path).unwrap();
            file.set_times(FileTimes::new().set_modified(then)).unwrap();
        }
    }
    fs::hard_link(source.join("x/file 3"), source.join("z/link")).unwrap();
    let expected = tree(&source);
    let m = Mounted::new(&uri, &at, &[]);
    let sh = |script: &str| {
        let output = Command::new("sh")
            .arg("-ec")
            .arg(script)
            .current_dir(dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {text}");
    };
    sh("mkdir mnt/tar && tar -C source -cf - . | tar -C mnt/tar -xf -");
    sh("cp -a source mnt/cp");
    let mut copies = vec!["tar", "cp"];
    if Command::new("rsync").arg("--version").output().is_ok() {
        sh(
            "rsync -aH source/ mnt/rsync/ && rsync -aHci source/ mnt/rsync/ > changes && ! test -s changes",
        );
        copies.push("rsync");
    } else {
        println!("skipped: rsync in mount_tool: there is none");
    }
    m.unmount(&uri);
    let m = Mounted::new(&uri, &at, &["--read-only"]);
    for copy in copies {
        assert!(tree(&m.at.join(copy)) == expected, "{copy}");
    }
    sh("mkdir back && tar -C mnt/tar -cf - . | tar -C back -xf - && diff -r source back");
    m.unmount(&uri);
}

#[test]
fn space_agrees_with_df() {
    if !can_mount("space_agrees_with_df") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path(), "64M");
    let df: Value = serde_json::from_str(&ok(&["df", &uri, "--json"])).unwrap();
    let at = dir.path().join("mnt");
    let m = Mounted::new(&uri, &at, &[]);
    let space = statvfs(&at).unwrap();
    let bytes = |blocks: u64| blocks * space.fragment_size();
    assert_eq!(df["total_bytes"], bytes(space.blocks()));
    assert_eq!(df["free_bytes"], bytes(space.blocks_available()));
    assert_eq!(space.name_max(), 254);
    m.unmount(&uri);
    sound(&uri);
}
