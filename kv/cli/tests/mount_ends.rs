//! How `pumice mount` begins and ends where something else is wanted of its directory, its signals or its device.

use std::fs::{self, File};

#[path = "common/mounted.rs"]
mod mounted;
#[path = "common/tool.rs"]
mod tool;

use mounted::{Mounted, can_mount, image};
use tool::ok;

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
