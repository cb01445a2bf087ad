//! A `pumice mount` for tests, with a watchdog.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::tool::{ok, pumice};

/// Longest time of a mount in a test. Then its process is killed, and what waits for it fails.
const PATIENCE: Duration = Duration::from_secs(300);

/// Whether file systems can be mounted here. Says so if not.
pub fn can_mount(test: &str) -> bool {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    let why = match device {
        Err(e) => format!("/dev/fuse: {e}"),
        Ok(_) if Command::new("fusermount3").arg("-V").output().is_err() => {
            "there is no fusermount3".to_owned()
        }
        Ok(_) => return true,
    };
    println!("skipped: {test}: {why}");
    false
}

/// Makes an image with an empty file system.
pub fn image(dir: &Path, size: &str) -> String {
    let uri = dir.join("disk.img").to_str().unwrap().to_owned();
    ok(&["mkfs", &uri, "--size", size]);
    uri
}

/// A mount. Dropping it kills the process.
pub struct Mounted {
    child: Child,
    pub at: PathBuf,
    /// Dropped to call the watchdog off.
    _done: Sender<()>,
}

impl Mounted {
    /// Mounts a new image of this size in a directory of its own, which is returned with the image's URI.
    /// Returns `None` and says so where file systems cannot be mounted.
    pub fn on_new_image(test: &str, size: &str) -> Option<(TempDir, String, Mounted)> {
        if !can_mount(test) {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let uri = image(dir.path(), size);
        let mounted = Mounted::new(&uri, &dir.path().join("mnt"), &[]);
        Some((dir, uri, mounted))
    }

    pub fn new(uri: &str, at: &Path, options: &[&str]) -> Mounted {
        std::fs::create_dir_all(at).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_pumice"))
            .arg("mount")
            .args(options)
            .arg(uri)
            .arg(at)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = lines.next().expect("a line, or the reason stands above");
        assert!(line.unwrap().contains("is mounted in"));
        let (done, waits) = channel();
        let pid = child.id().to_string();
        std::thread::spawn(move || {
            if waits.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                eprintln!("the watchdog ends the mount");
                signal("-KILL", &pid);
            }
        });
        Mounted {
            child,
            at: at.to_owned(),
            _done: done,
        }
    }

    /// Sends a signal to the process.
    pub fn signal(&self, name: &str) {
        signal(name, &self.child.id().to_string());
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "the process does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Unmounts as a user does, and checks the file system.
    pub fn unmount(mut self, uri: &str) {
        let unmounted = Command::new("fusermount3").arg("-u").arg(&self.at).output();
        let unmounted = unmounted.unwrap();
        let text = String::from_utf8_lossy(&unmounted.stderr);
        assert!(unmounted.status.success(), "{text}");
        assert_eq!(self.wait().code(), Some(0));
        sound(uri);
    }

    /// Ends the process by a signal, and checks the file system.
    pub fn end(mut self, signal: &str, uri: &str) {
        self.signal(signal);
        assert_eq!(self.wait().code(), Some(0), "{signal}");
        sound(uri);
    }
}

/// Checks that a file system was unmounted in order.
pub fn sound(uri: &str) {
    let fsck = pumice(&["fsck", uri]);
    let text = String::from_utf8_lossy(&fsck.stdout);
    assert_eq!(fsck.status.code(), Some(0), "{text}");
}

fn signal(name: &str, pid: &str) {
    let sent = Command::new("kill").args([name, pid]).status().unwrap();
    assert!(sent.success());
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = Command::new("fusermount3")
            .args(["-u", "-z", "-q"])
            .arg(&self.at)
            .output();
    }
}
