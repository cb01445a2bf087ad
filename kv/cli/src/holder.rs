//! The process that has a device, as the server of a socket where it answers questions.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pumice_bdev_control::rpc::RpcClient;
use serde_json::Value;

use crate::failure::Failure;

/// Time within which a process must answer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// No more sockets of a directory are tried.
const NAMES_MAX: usize = 64;
/// The flag of a socket that accepts connections, in `/proc/net/unix`.
const ACCEPTS: &str = "00010000";

/// A process that has a device and answers questions about it.
pub struct Holder {
    client: RpcClient,
}

impl Holder {
    /// Returns the process `pid`, if it answers questions about the device that this process knows
    /// as `device`.
    pub fn find(device: &str, pid: u32) -> Option<Holder> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        sockets(&proc).iter().find_map(|socket| {
            let mut holder = Holder::connect(socket).ok()?;
            let statfs = holder.ask("pumice_get_statfs", &Value::Null).ok()?;
            let theirs = statfs["device"].as_str()?;
            (theirs == device || is_same_file(&proc, theirs, device)).then_some(holder)
        })
    }

    /// Returns a process that has opened the file `device` for reading and answers questions about
    /// it.
    pub fn of_reader(device: &str) -> Option<Holder> {
        let file = fs::metadata(device).ok()?;
        let (major, minor) = (libc::major(file.dev()), libc::minor(file.dev()));
        let inode = format!("{major:02x}:{minor:02x}:{}", file.ino());
        let locks = fs::read_to_string("/proc/locks").ok()?;
        // An example: "3: FLOCK  ADVISORY  READ 1234 fe:00:131 0 EOF".
        locks.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            if words.get(1) != Some(&"FLOCK") || words.get(5) != Some(&&inode[..]) {
                return None;
            }
            let pid = words[4].parse().ok()?;
            Holder::find(device, pid)
        })
    }

    /// Returns the process that serves a socket.
    pub fn connect(socket: &Path) -> Result<Holder, Failure> {
        let client = RpcClient::connect(socket, TIMEOUT);
        let client = client.map_err(|e| Failure::from(e.to_string()))?;
        Ok(Holder { client })
    }

    pub fn ask(&mut self, method: &str, params: &Value) -> Result<Value, Failure> {
        let answer = self.client.call(method, params);
        answer.map_err(|e| Failure::from(e.to_string()))
    }
}

/// Returns the Unix sockets on which a process accepts connections, as paths that this process can
/// use.
fn sockets(proc: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string(proc.join("net/unix")).unwrap_or_default();
    let descriptors = fs::read_dir(proc.join("fd"));
    let links: Vec<PathBuf> = descriptors
        .into_iter()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .collect();
    let is_open = |inode: &str| {
        let link = PathBuf::from(format!("socket:[{inode}]"));
        links.contains(&link)
    };
    text.lines()
        .filter_map(|line| {
            // The columns are address, references, protocol, flags, type, state, inode, and a path
            // if there is one.
            let mut words = line.split_whitespace();
            let flags = words.nth(3)?;
            let inode = words.nth(2)?;
            let path = line.split_once(&format!(" {inode} "))?.1;
            (flags == ACCEPTS && path.starts_with('/') && is_open(inode)).then(|| path.to_owned())
        })
        .flat_map(|path| {
            names(&PathBuf::from(format!(
                "{}{path}",
                proc.join("root").display()
            )))
        })
        .collect()
}

/// The names under which a socket may be found that was bound as `bound`. One that `bind_private` has made was bound in a
/// directory of its own, which is gone, and has its name in the directory above.
fn names(bound: &Path) -> Vec<PathBuf> {
    if bound.exists() {
        return vec![bound.to_owned()];
    }
    let above = bound.parent().and_then(Path::parent);
    let entries = above.and_then(|above| fs::read_dir(above).ok());
    let is_socket = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_socket());
    entries
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter(is_socket)
        .take(NAMES_MAX)
        .map(|entry| entry.path())
        .collect()
}

/// Whether the process's name of an image and ours name the same file.
fn is_same_file(proc: &Path, theirs: &str, ours: &str) -> bool {
    let theirs = if theirs.starts_with('/') {
        PathBuf::from(format!("{}{theirs}", proc.join("root").display()))
    } else {
        proc.join("cwd").join(theirs)
    };
    match (fs::metadata(theirs), fs::metadata(ours)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}
