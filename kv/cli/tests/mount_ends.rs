//! How `pumice mount` begins and ends where something else is wanted of its directory, its signals or its device.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

#[path = "common/mounted.rs"]
mod mounted;
#[path = "common/tool.rs"]
mod tool;

use mounted::{Mounted, can_mount, image};
use tool::ok;

/// Makes a directory with an image of its own.
fn beside(dir: &Path, name: &str) -> String {
    let sub = dir.join(name);
    fs::create_dir(&sub).unwrap();
    image(&sub, "64M")
}

#[test]
fn a_signal_leaves_what_somebody_else_has_mounted_there() {
    if !can_mount("a_signal_leaves_what_somebody_else_has_mounted_there") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (beside(dir.path(), "first"), beside(dir.path(), "second"));
    let at = dir.path().join("mnt");
    let mut ours = Mounted::new(&first, &at, &[]);
    let mut file = File::create(at.join("file")).unwrap();
    file.write_all(b"text").unwrap();
    // The open file keeps the first process although its mount is out of the directory.
    let unmounted = Command::new("fusermount3")
        .args(["-u", "-z"])
        .arg(&at)
        .status();
    assert!(unmounted.unwrap().success());
    let theirs = Mounted::new(&second, &at, &[]);
    fs::write(at.join("theirs"), "theirs").unwrap();
    let device = fs::metadata(&at).unwrap().dev();
    ours.signal("-TERM");
    assert_eq!(ours.wait().code(), Some(0));
    assert_eq!(fs::metadata(&at).unwrap().dev(), device);
    assert_eq!(fs::read(at.join("theirs")).unwrap(), b"theirs");
    assert!(file.write_all(b"more").is_err());
    drop(file);
    assert_eq!(ok(&["cat", &first, "/file"]), "text");
    theirs.unmount(&second);
    sound(&first);
    // Its drop unmounts the directory, so it is the last.
    drop(ours);
}

#[test]
fn a_replaced_file_is_there_before_or_after_when_the_process_dies() {
    if !can_mount("a_replaced_file_is_there_before_or_after_when_the_process_dies") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path(), "64M");
    let at = dir.path().join("mnt");
    let new = vec![7; 300_000];
    let mut m = Mounted::new(&uri, &at, &[]);
    fs::write(at.join("file"), "old").unwrap();
    File::open(at.join("file")).unwrap().sync_all().unwrap();
    fs::write(at.join("new"), &new).unwrap();
    fs::rename(at.join("new"), at.join("file")).unwrap();
    m.signal("-KILL");
    m.wait();
    drop(m);
    // A power cut leaves what the image has, and not the log in shared memory, which a copy does not find.
    let copy = dir.path().join("copy.img");
    fs::copy(&uri, &copy).unwrap();
    let found = ok(&["cat", copy.to_str().unwrap(), "/file"]);
    assert!(found.as_bytes() == new, "{} bytes", found.len());
}
