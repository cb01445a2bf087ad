//! How `pumice mount` begins and ends where something else is wanted of its directory, its signals or its device.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

#[path = "common/mounted.rs"]
mod mounted;
#[path = "common/tool.rs"]
mod tool;

use mounted::{Mounted, can_mount, image, sound};
use tool::{ok, pumice};

/// Longest wait for what takes no time.
const PATIENCE: Duration = Duration::from_secs(60);

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

/// Starts a program in a shell that ignores SIGHUP, as `nohup` does.
fn behind_nohup(args: &[&str]) -> Child {
    Command::new("sh")
        .args(["-c", "trap '' HUP; exec \"$0\" \"$@\""])
        .arg(env!("CARGO_BIN_EXE_pumice"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn send(signal: &str, child: &Child) {
    let pid = child.id().to_string();
    let sent = Command::new("kill").args([signal, &pid]).status().unwrap();
    assert!(sent.success());
}

/// Waits until a process has an empty queue of signals, so that the last one was delivered or thrown away.
fn has_no_pending_signal(child: &Child) {
    let started = Instant::now();
    loop {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let pending = status.lines().find(|line| line.starts_with("ShdPnd:"));
        if pending.unwrap().ends_with("0000000000000000") {
            return;
        }
        assert!(started.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_signal_that_was_ignored_stays_ignored() {
    if !can_mount("a_signal_that_was_ignored_stays_ignored") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path(), "64M");
    let at = dir.path().join("mnt");
    fs::create_dir(&at).unwrap();
    let mut child = behind_nohup(&["mount", &uri, at.to_str().unwrap()]);
    let mut line = String::new();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    assert!(line.contains("is mounted in"), "{line}");
    for _ in 0..2 {
        // A second signal would end the process at once.
        send("-HUP", &child);
        has_no_pending_signal(&child);
        fs::write(at.join("file"), "text").unwrap();
    }
    send("-TERM", &child);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    sound(&uri);
    // The commands that change something do the same.
    let mut child = behind_nohup(&["cp", &uri, "-", ":/copied"]);
    let mut input = child.stdin.take().unwrap();
    input.write_all(&vec![1; 8 << 20]).unwrap();
    send("-HUP", &child);
    has_no_pending_signal(&child);
    input.write_all(b"end").unwrap();
    drop(input);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(ok(&["cat", &uri, "/copied"]).len(), (8 << 20) + 3);
}

#[test]
fn an_image_stays_as_it_is_where_nothing_can_be_mounted() {
    let name = "an_image_stays_as_it_is_where_nothing_can_be_mounted";
    if !can_mount(name) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let uri = image(dir.path(), "64M");
    let at = dir.path().join("mnt");
    let mut killed = Mounted::new(&uri, &at, &[]);
    fs::write(at.join("file"), "text").unwrap();
    killed.signal("-KILL");
    killed.wait();
    drop(killed);
    let before = fs::read(&uri).unwrap();
    // Without a /dev/fuse.
    let output = Command::new("unshare")
        .args([
            "-m",
            "sh",
            "-c",
            "mount -t tmpfs none /dev && echo hidden && exec \"$0\" \"$@\"",
        ])
        .arg(env!("CARGO_BIN_EXE_pumice"))
        .args(["mount", &uri, at.to_str().unwrap()])
        .output();
    let output = match output {
        Ok(output) if output.stdout.starts_with(b"hidden") => output,
        _ => {
            println!("skipped: {name}: /dev cannot be hidden");
            return;
        }
    };
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("--device /dev/fuse --cap-add SYS_ADMIN"),
        "{text}"
    );
    assert!(fs::read(&uri).unwrap() == before);
    let fsck = pumice(&["fsck", &uri]);
    assert_ne!(fsck.status.code(), Some(2), "{fsck:?}");
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
