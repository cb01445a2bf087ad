//! `pumice mount`: the files of a device in a directory, for every program, through FUSE.

mod errno;
mod kernel;
mod owner;
mod table;
#[cfg(test)]
mod tests;
mod tree;
mod unsynced;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use clap::Args;
use fuser::{Config, MountOption, Session, SessionACL};
use pumice_bdev_control::{complain, say};
use pumice_blobfs::fs::{FileSystem, FsError, MountOptions};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use crate::access::{Change, mount_device, open_to_read};
use crate::failure::{Failure, fail};
use crate::signals::not_ignored;
use kernel::Kernel;
use tree::Tree;

/// Number of threads that answer requests.
const THREADS: usize = 8;
/// Time after which a change is made durable that no program has synced.
const SYNC_AFTER: Duration = Duration::from_secs(5);
/// Time after which an unmount that has not ended is one of a directory that is in use.
const BUSY_AFTER: Duration = Duration::from_millis(300);
/// Time that programs have to close their files after a signal.
const GRACE: Duration = Duration::from_secs(2);
/// Bytes of the page cache. The kernel has one, too.
const CACHE_BYTES: u64 = 64 << 20;

/// Mount a device's file system in a directory, for every program (FUSE)
///
/// Stays in the foreground. SIGINT, SIGTERM or `fusermount3 -u DIR` unmounts; the exit code is 0 when everything is durable.
#[derive(Args)]
pub struct MountArgs {
    #[command(flatten)]
    change: Change,
    /// Device
    uri: String,
    /// An empty directory, in which the files appear
    dir: PathBuf,
    /// Change nothing; other readers may have the device at the same time
    #[arg(short, long, conflicts_with = "accept_damage")]
    read_only: bool,
    /// Let other users in, too, as far as the permission bits allow
    #[arg(long)]
    allow_other: bool,
}

/// Runs `pumice mount`.
pub fn run(args: &MountArgs) -> ExitCode {
    match mount(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail("mount", &e),
    }
}

/// The reasons for which a mount ends.
enum End {
    /// Somebody has unmounted it, and the last request is answered.
    Unmounted,
    Signal,
}

fn mount(args: &MountArgs) -> Result<(), Failure> {
    let owner = check_dir(&args.dir)?;
    check_fuse(owner.0).map_err(|e| not_mounted(&args.dir, &e))?;
    let opts = MountOptions::default()
        .cache_bytes(CACHE_BYTES)
        .read_only(args.read_only)
        .accept_damage(args.change.accepts_damage());
    let (events, ends) = channel();
    catch(events.clone())?;
    let dev = if args.read_only {
        open_to_read(&args.uri)?
    } else {
        pumice_bdev::open(&args.uri)?
    };
    let fs = mount_device(&args.uri, dev, &opts)?;
    let served = serve(args, &fs, owner, events, &ends);
    let unmounted = unmount(&fs);
    served.and(unmounted)
}

/// Checks the directory, and returns the ids of the user and group that run this.
fn check_dir(dir: &Path) -> Result<(u32, u32), Failure> {
    let shown = dir.display();
    let refuse = |why: String| Err(Failure::from(format!("{shown}: {why}")));
    match fs::metadata(dir) {
        Ok(found) if !found.is_dir() => {
            return refuse("is not a directory; give an empty one".to_owned());
        }
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return refuse(format!(
                "there is no such directory; make it with `mkdir -p {shown}`"
            ));
        }
        Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => {
            return refuse(format!(
                "something was mounted here whose process is gone; `fusermount3 -u {shown}` removes it"
            ));
        }
        Err(e) => return refuse(e.to_string()),
    }
    let mut entries = fs::read_dir(dir).map_err(|e| Failure::from(format!("{shown}: {e}")))?;
    if entries.next().is_some() {
        return refuse(
            "is not empty, and a mount would hide what it holds; give an empty directory"
                .to_owned(),
        );
    }
    // Of this process: there is a directory of its own for it in /proc.
    let own = fs::metadata("/proc/self").map_err(|e| Failure::from(format!("/proc/self: {e}")))?;
    Ok((own.uid(), own.gid()))
}

/// Checks that this process, of the user `uid`, can use FUSE, before anything is changed.
fn check_fuse(uid: u32) -> io::Result<()> {
    fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")?;
    if uid == 0 {
        // Root mounts by itself.
        return Ok(());
    }
    let named = std::env::var_os("FUSERMOUNT_PATH");
    let programs = match named {
        Some(program) => vec![program],
        None => vec!["fusermount3".into(), "fusermount".into()],
    };
    let runs = |program: OsString| {
        let mut version = Command::new(program);
        version
            .arg("-V")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        version.status().map(drop)
    };
    programs
        .into_iter()
        .map(runs)
        .reduce(io::Result::or)
        .unwrap_or(Ok(()))
}

/// Reports the first signal that is not ignored to `events`. A second one ends the process at once.
fn catch(events: Sender<End>) -> Result<(), Failure> {
    let numbers = not_ignored();
    let failed = |e: io::Error| Failure::from(format!("signals: {e}"));
    let again = Arc::new(AtomicBool::new(false));
    for signal in numbers.iter().copied() {
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&again))
            .map_err(failed)?;
        flag::register(signal, Arc::clone(&again)).map_err(failed)?;
    }
    let mut signals = Signals::new(numbers).map_err(failed)?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            let _ = events.send(End::Signal);
        }
    });
    Ok(())
}

/// Serves the kernel's requests until the mount ends.
fn serve(
    args: &MountArgs,
    fs: &FileSystem,
    (uid, gid): (u32, u32),
    events: Sender<End>,
    ends: &Receiver<End>,
) -> Result<(), Failure> {
    let tree = Arc::new(Tree::new(fs.clone(), uid, gid));
    let report = move || drop(events.send(End::Unmounted));
    // Once it is mounted, resolving its path asks this process.
    let place = args.dir.canonicalize();
    let session = Kernel::new(Arc::clone(&tree), report)
        .and_then(|kernel| Session::new(kernel, &args.dir, &config(args)))
        .and_then(Session::spawn)
        .map_err(|e| not_mounted(&args.dir, &e))?;
    let number = || {
        let table = fs::read("/proc/self/mountinfo").ok()?;
        device_in(&table, place.as_deref().ok()?)
    };
    let device = number();
    let is_ours = || device.is_some() && number() == device;
    let dir = args.dir.display();
    say!(
        "{} is mounted in {dir}; `fusermount3 -u {dir}` or SIGINT unmounts it",
        args.uri
    );
    let end = loop {
        match ends.recv_timeout(SYNC_AFTER) {
            Ok(end) => break end,
            Err(RecvTimeoutError::Disconnected) => break End::Signal,
            Err(RecvTimeoutError::Timeout) => {
                if let Err(e) = tree.sync_changed() {
                    complain!("pumice mount: {e}; it is tried again");
                }
            }
        }
    };
    match end {
        // Dropping the session would unmount what somebody else may have mounted there by now.
        End::Unmounted => std::mem::forget(session),
        End::Signal if !is_ours() => {
            complain!("pumice mount: {dir}: shows another file system, which stays");
            std::mem::forget(session);
        }
        End::Signal => {
            // This unmounts, unless a file is open, and returns before the last request is answered.
            drop(session);
            if !is_over(ends, BUSY_AFTER) {
                complain!(
                    "pumice mount: {dir}: files are open there; they return errors in {} seconds",
                    GRACE.as_secs()
                );
                if is_ours() {
                    detach(&args.dir)?;
                }
                is_over(ends, GRACE);
            }
        }
    }
    Ok(())
}

/// Returns the number of the file system that was last mounted in a directory, as the table of mounts (proc(5), mountinfo) has
/// it: asking the file system itself would wait for an answer of this process.
fn device_in(table: &[u8], dir: &Path) -> Option<Vec<u8>> {
    let mut escaped = Vec::new();
    for byte in dir.as_os_str().as_bytes() {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' => escaped.extend(format!("\\{byte:03o}").bytes()),
            byte => escaped.push(*byte),
        }
    }
    let fields = |line: &[u8]| -> Option<(Vec<u8>, bool)> {
        let mut fields = line.split(|byte| *byte == b' ');
        let number = fields.nth(2)?.to_vec();
        Some((number, fields.nth(1)? == escaped))
    };
    let lines = table.split(|byte| *byte == b'\n');
    let mut here = lines.filter_map(fields).filter(|(_, is_here)| *is_here);
    here.next_back().map(|(number, _)| number)
}

/// Waits until the last request is answered, but no longer than `patience`.
fn is_over(ends: &Receiver<End>, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while let Some(left) = deadline.checked_duration_since(Instant::now()) {
        match ends.recv_timeout(left) {
            Ok(End::Unmounted) => return true,
            Ok(End::Signal) => {}
            Err(_) => return false,
        }
    }
    false
}

fn config(args: &MountArgs) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(args.uri.replace(',', ";")),
        MountOption::Subtype("pumice".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoDev,
        MountOption::NoSuid,
        MountOption::NoAtime,
    ];
    if args.read_only {
        config.mount_options.push(MountOption::RO);
    }
    if args.allow_other {
        config.acl = SessionACL::All;
    }
    config.n_threads = Some(THREADS);
    config
}

fn not_mounted(dir: &Path, e: &io::Error) -> Failure {
    let advice = match e.kind() {
        io::ErrorKind::NotFound => {
            "is there a /dev/fuse? `modprobe fuse` makes it, and a container needs \
             `--device /dev/fuse --cap-add SYS_ADMIN`; users other than root need fusermount3 (package fuse3)"
        }
        io::ErrorKind::PermissionDenied => {
            "a container needs `--device /dev/fuse --cap-add SYS_ADMIN`; for users other than root, \
             `--allow-other` needs the line user_allow_other in /etc/fuse.conf"
        }
        _ => "nothing was mounted",
    };
    Failure::from(format!("{}: {e}; {advice}", dir.display()))
}

/// Takes the mount out of the tree of directories although files in it are open.
fn detach(dir: &Path) -> Result<(), Failure> {
    match nix::mount::umount2(dir, nix::mount::MntFlags::MNT_DETACH) {
        // It is out already: fusermount3 does it so.
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::EPERM) => Ok(()),
        Err(e) => Err(Failure::from(format!("{}: {e}", dir.display()))),
    }
}

/// Makes everything durable and unmounts the file system. What cannot be made durable is named.
fn unmount(fs: &FileSystem) -> Result<(), Failure> {
    let Err(first) = fs.unmount() else {
        return Ok(());
    };
    complain!("pumice mount: {first}; it is tried once more");
    let lost: Vec<FsError> = fs.unmount_anyway()?;
    if lost.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = lost.iter().map(ToString::to_string).collect();
    Err(Failure::from(format!(
        "bytes that were not synced are lost: {}",
        lines.join("; ")
    )))
}
