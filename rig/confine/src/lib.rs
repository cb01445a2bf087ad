//! Runs a program with fewer rights than a process usually has, as a container does: system calls
//! that return an error, limits, no capabilities, a read-only root, another user, little memory. No
//! container engine is needed, and a confinement ends with the process that it was made for.
//!
//! ```no_run
//! use std::process::Command;
//! use std::time::Duration;
//!
//! use pumice_confine::Confinement;
//!
//! let docker = Confinement::new().docker_seccomp().without_capabilities();
//! let output = docker.run(&mut Command::new("true"), Duration::from_secs(10));
//! assert!(output.is_ok_and(|output| output.status.success()));
//! ```
//!
//! [`Terminal`] runs a program on a pseudo-terminal.
#![allow(unsafe_code)]

mod group;
mod processor;
mod terminal;
mod tmpfs;

pub use processor::assert_refused_by_older_processor;
pub use terminal::Terminal;
pub use tmpfs::{small_tmpfs, with_small_tmpfs};

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use group::MemoryGroup;

/// The user `nobody`.
const NOBODY: u32 = 65534;

/// The system calls of io_uring.
pub const IO_URING: [i64; 3] = [
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

/// The calls that Docker's default seccomp profile refuses with EPERM to a container without
/// capabilities, as Docker's documentation lists them ("Seccomp security profiles for Docker"), and
/// those of io_uring, which it refuses since version 25.
const DOCKER: &[i64] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_get_mempolicy,
    libc::SYS_init_module,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_mbind,
    libc::SYS_mount,
    libc::SYS_move_pages,
    libc::SYS_nfsservctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_set_mempolicy,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_sysfs,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_uselib,
    libc::SYS_userfaultfd,
    libc::SYS_ustat,
    libc::SYS_vhangup,
];

/// A system call that fails.
#[derive(Clone, Copy, Debug)]
struct Denied {
    nr: i64,
    /// Restricts the failure to calls with one of these bits in the argument of this index.
    with: Option<(u32, i32)>,
    errno: i32,
}

/// The restrictions of a program that [`Confinement::run`] starts.
#[derive(Clone, Debug, Default)]
pub struct Confinement {
    denied: Vec<Denied>,
    limits: Vec<(libc::__rlimit_resource_t, u64)>,
    other_user: bool,
    no_capabilities: bool,
    writable: Option<PathBuf>,
    no_shared_memory: bool,
    memory_bytes: Option<u64>,
}

impl Confinement {
    /// Makes one without restrictions.
    #[must_use]
    pub fn new() -> Confinement {
        Confinement::default()
    }

    /// Makes system calls, by number, fail with `errno`.
    #[must_use]
    pub fn deny(mut self, calls: &[i64], errno: i32) -> Confinement {
        self.denied.extend(always(calls, errno));
        self
    }

    /// Makes the calls fail that Docker's default seccomp profile refuses.
    #[must_use]
    pub fn docker_seccomp(self) -> Confinement {
        self.deny(DOCKER, libc::EPERM)
            .deny(&IO_URING, libc::EPERM)
            .deny(&[libc::SYS_clone3], libc::ENOSYS)
    }

    /// Hides huge pages.
    #[must_use]
    pub fn without_huge_pages(mut self) -> Confinement {
        let with_bits = |nr, argument, bits| Denied {
            nr,
            with: Some((argument, bits)),
            errno: libc::ENOMEM,
        };
        self.denied
            .push(with_bits(libc::SYS_mmap, 3, libc::MAP_HUGETLB));
        let bits = libc::MFD_HUGETLB.cast_signed();
        self.denied.push(with_bits(libc::SYS_memfd_create, 1, bits));
        self
    }

    /// Allows at most this many open files (`ulimit -n`).
    #[must_use]
    pub fn open_files(mut self, count: u64) -> Confinement {
        self.limits.push((libc::RLIMIT_NOFILE, count));
        self
    }

    /// Allows no locked memory (`ulimit -l 0`). The process must not have CAP_IPC_LOCK either.
    #[must_use]
    pub fn without_locked_memory(mut self) -> Confinement {
        self.limits.push((libc::RLIMIT_MEMLOCK, 0));
        self.without_capabilities()
    }

    /// Runs the program as root without a single capability.
    #[must_use]
    pub fn without_capabilities(mut self) -> Confinement {
        self.no_capabilities = true;
        self
    }

    /// Runs the program as a user who owns nothing except the directory of
    /// [`Confinement::read_only_root`], if that is set.
    #[must_use]
    pub fn other_user(mut self) -> Confinement {
        self.other_user = true;
        self
    }

    /// Makes everything read-only except `writable`.
    #[must_use]
    pub fn read_only_root(mut self, writable: &Path) -> Confinement {
        self.writable = Some(writable.to_owned());
        self
    }

    /// Allows nothing to be made in `/dev/shm`.
    #[must_use]
    pub fn without_shared_memory(mut self) -> Confinement {
        self.no_shared_memory = true;
        self
    }

    /// Runs the program in a control group with this much memory and no swap.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Confinement {
        self.memory_bytes = Some(bytes);
        self
    }

    /// Runs a command to its end, and kills it if that takes longer than `patience`.
    ///
    /// # Errors
    /// Returns the reason why this machine cannot confine a program in this way. A test then prints
    /// that it is skipped.
    ///
    /// # Panics
    /// Panics if the program cannot be started, or does not end in time.
    pub fn run(&self, command: &mut Command, patience: Duration) -> Result<Output, String> {
        let group = self.memory_bytes.map(MemoryGroup::new).transpose()?;
        self.can_be_done()?;
        let copy = self.other_user.then(|| Copied::new(command));
        let mut command = match &copy {
            Some(copy) => copy.command(command),
            None => copied(command, command.get_program()),
        };
        let step = self.prepare(group.as_ref());
        // SAFETY: between fork and exec the closure makes system calls on memory that was set up before the fork; it
        // allocates nothing and takes no lock.
        unsafe { command.pre_exec(move || step.take()) };
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = spawn(&mut command).unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let pid = child.id().cast_signed();
        let (ended, end) = mpsc::channel();
        let waiter = thread::spawn(move || ended.send(child.wait_with_output()));
        let output = end.recv_timeout(patience);
        if output.is_err() {
            // SAFETY: kills the child, which has not been waited for: the thread still waits.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        let _ = waiter.join();
        let output = output.unwrap_or_else(|_| panic!("{command:?}: not done after {patience:?}"));
        Ok(output.unwrap_or_else(|e| panic!("{command:?}: {e}")))
    }

    /// Fails if this process may not confine a child in this way.
    fn can_be_done(&self) -> Result<(), String> {
        let wants_root = self.other_user
            || self.no_capabilities
            || self.no_shared_memory
            || self.writable.is_some();
        // SAFETY: the call has no preconditions.
        if wants_root && unsafe { libc::geteuid() } != 0 {
            return Err("not root".to_owned());
        }
        if self.no_shared_memory || self.writable.is_some() {
            let status = Command::new("unshare").args(["-m", "true"]).status();
            if !status.is_ok_and(|status| status.success()) {
                return Err("no mount namespaces here".to_owned());
            }
        }
        Ok(())
    }

    fn prepare(&self, group: Option<&MemoryGroup>) -> Steps {
        let path =
            |path: &Path| CString::new(path.as_os_str().as_bytes()).expect("no NUL in a path");
        let mut mounts = Vec::new();
        if let Some(writable) = &self.writable {
            let writable = fs::canonicalize(writable).expect("the writable directory is there");
            if self.other_user {
                chown(&writable, Some(NOBODY), Some(NOBODY)).expect("root may give files away");
            }
            mounts = mount_points()
                .iter()
                .map(|point| (path(point), Mount::ReadOnly))
                .collect();
            mounts.push((path(&writable), Mount::Writable));
        }
        let shared_memory = Path::new("/dev/shm");
        if self.no_shared_memory && shared_memory.exists() {
            mounts.push((path(shared_memory), Mount::Empty));
        }
        // The writable directory needs a bind mount before everything else becomes read-only.
        mounts.sort_by_key(|(_, mount)| *mount != Mount::Writable);
        Steps {
            procs: group.map(|group| path(&group.dir.join("cgroup.procs"))),
            mounts,
            limits: self.limits.clone(),
            no_capabilities: self.no_capabilities,
            other_user: self.other_user,
            filter: filter(&self.denied),
        }
    }
}

/// Returns the restrictions of containers and services, each alone and then all at once. `writable`
/// is the one directory that can be written when the root cannot.
#[must_use]
pub fn surroundings(writable: &Path) -> Vec<(&'static str, Confinement)> {
    let new = Confinement::new;
    let refused = |nr| new().deny(&[nr], libc::EPERM);
    vec![
        ("Docker's seccomp profile", new().docker_seccomp()),
        ("io_uring_setup refused", refused(libc::SYS_io_uring_setup)),
        ("io_uring_enter refused", refused(libc::SYS_io_uring_enter)),
        (
            "io_uring_register refused",
            refused(libc::SYS_io_uring_register),
        ),
        ("no capabilities", new().without_capabilities()),
        ("a read-only root", new().read_only_root(writable)),
        ("no /dev/shm", new().without_shared_memory()),
        ("no huge pages", new().without_huge_pages()),
        ("ulimit -l 0", new().without_locked_memory()),
        ("ulimit -n 64", new().open_files(64)),
        ("128 MiB of memory", new().memory(128 << 20)),
        ("another user", new().read_only_root(writable).other_user()),
        (
            "all of it",
            new()
                .docker_seccomp()
                .without_locked_memory()
                .without_shared_memory()
                .without_huge_pages()
                .open_files(64)
                .memory(128 << 20)
                .read_only_root(writable)
                .other_user(),
        ),
    ]
}

/// Makes these system calls fail with `errno` from now on, in every thread of this process and in
/// everything that it starts.
///
/// # Panics
/// Panics if the kernel has no seccomp filters.
pub fn deny_from_now_on(calls: &[i64], errno: i32) {
    let denied: Vec<Denied> = always(calls, errno).collect();
    install(&filter(&denied)).expect("the kernel takes a seccomp filter");
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mount {
    Writable,
    ReadOnly,
    Empty,
}

/// The steps between fork and exec, in order.
struct Steps {
    procs: Option<CString>,
    mounts: Vec<(CString, Mount)>,
    limits: Vec<(libc::__rlimit_resource_t, u64)>,
    no_capabilities: bool,
    other_user: bool,
    filter: Vec<libc::sock_filter>,
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Steps {
    fn take(&self) -> io::Result<()> {
        if let Some(procs) = &self.procs {
            // SAFETY: the path ends in NUL, the text is as long as it says, the descriptor is this call's own.
            unsafe {
                let fd = libc::open(procs.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                check(fd)?;
                if libc::write(fd, c"0".as_ptr().cast(), 1) != 1 {
                    return Err(io::Error::last_os_error());
                }
                libc::close(fd);
            }
        }
        if !self.mounts.is_empty() {
            // SAFETY: plain flags; the child has one thread.
            check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
            mount(None, c"/", None, libc::MS_REC | libc::MS_PRIVATE)?;
        }
        for (path, how) in &self.mounts {
            match how {
                Mount::Writable => mount(Some(path.as_c_str()), path, None, libc::MS_BIND)?,
                Mount::ReadOnly => {
                    // Some mounts of the kernel itself cannot be changed, and nothing is stored on
                    // them.
                    let flags = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY;
                    let done = mount(None, path, None, flags);
                    if path.as_bytes() == b"/" {
                        done?;
                    }
                }
                Mount::Empty => {
                    mount(Some(c"none"), path, Some(c"tmpfs"), libc::MS_RDONLY)?;
                }
            }
        }
        for (resource, limit) in &self.limits {
            let limit = libc::rlimit {
                rlim_cur: *limit,
                rlim_max: *limit,
            };
            // SAFETY: the structure is readable.
            check(unsafe { libc::setrlimit(*resource, &raw const limit) })?;
        }
        if self.no_capabilities {
            for capability in 0..64 as libc::c_ulong {
                // SAFETY: plain numbers. A number beyond the last capability is refused, which is as well.
                unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
            }
            // SAFETY: plain numbers.
            if unsafe { libc::prctl(libc::PR_CAPBSET_READ, 0, 0, 0, 0) } != 0 {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
        }
        if self.other_user {
            // SAFETY: plain numbers and an empty list.
            unsafe {
                check(libc::setgroups(0, std::ptr::null()))?;
                check(libc::setgid(NOBODY))?;
                check(libc::setuid(NOBODY))?;
            }
        }
        if self.filter.len() > 2 {
            install(&self.filter)?;
        }
        Ok(())
    }
}

fn mount(
    source: Option<&std::ffi::CStr>,
    target: &std::ffi::CStr,
    kind: Option<&std::ffi::CStr>,
    flags: libc::c_ulong,
) -> io::Result<()> {
    let pointer =
        |text: Option<&std::ffi::CStr>| text.map_or(std::ptr::null(), std::ffi::CStr::as_ptr);
    // SAFETY: each pointer is null or to a text that ends in NUL and outlives the call.
    check(unsafe {
        libc::mount(
            pointer(source),
            target.as_ptr(),
            pointer(kind),
            flags,
            std::ptr::null(),
        )
    })
}

/// Makes these calls fail whatever their arguments are.
fn always(calls: &[i64], errno: i32) -> impl Iterator<Item = Denied> {
    calls.iter().map(move |nr| Denied {
        nr: *nr,
        with: None,
        errno,
    })
}

/// Makes a filter program for the kernel: these calls fail, and all others are allowed.
fn filter(denied: &[Denied]) -> Vec<libc::sock_filter> {
    let op = |code: u32, k: u32, jf: u8| libc::sock_filter {
        code: u16::try_from(code).expect("a code has 16 bits"),
        jt: 0,
        jf,
        k,
    };
    let load = |offset: u32| op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset, 0);
    let jump = |test: u32, k: u32, jf: u8| op(libc::BPF_JMP | test | libc::BPF_K, k, jf);
    // The number of the call is the first word of the filter's input. The arguments begin at byte
    // 16 and have 8 bytes each.
    let mut program = vec![load(0)];
    for Denied { nr, with, errno } in denied {
        let nr = u32::try_from(*nr).expect("numbers of calls are small");
        let fail = op(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | errno.cast_unsigned(),
            0,
        );
        match with {
            None => program.extend([jump(libc::BPF_JEQ, nr, 1), fail]),
            Some((argument, bits)) => program.extend([
                jump(libc::BPF_JEQ, nr, 4),
                load(16 + 8 * argument),
                jump(libc::BPF_JSET, bits.cast_unsigned(), 1),
                fail,
                load(0),
            ]),
        }
    }
    program.push(op(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0));
    program
}

fn install(filter: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(io::Error::other)?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: plain numbers, and a program of the length that it says, which the kernel copies and does not change.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        let flags = libc::SECCOMP_FILTER_FLAG_TSYNC;
        let done = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        );
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Returns the mount points of file systems, `/` first.
fn mount_points() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut points: Vec<PathBuf> = text
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(PathBuf::from)
        .collect();
    points.sort();
    points.dedup();
    points
}

/// Starts a command. A program that was just copied cannot be run while a child that another thread has forked has not begun
/// its own: until then it has the descriptor that the copy was written by.
fn spawn(command: &mut Command) -> io::Result<Child> {
    let mut tries = 500;
    loop {
        match command.spawn() {
            Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy && tries > 0 => {
                tries -= 1;
                thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

/// Returns the same command with another program.
fn copied(command: &Command, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut new = Command::new(program);
    new.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => new.env(name, value),
            None => new.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        new.current_dir(dir);
    }
    new
}

/// A copy of a program where every user can run it.
struct Copied(PathBuf);

impl Copied {
    fn new(command: &Command) -> Copied {
        let dir = fresh_path(&std::env::temp_dir());
        fs::create_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        let everybody = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&dir, everybody).expect("permissions of a new directory");
        fs::copy(command.get_program(), dir.join("program")).expect("a copy of the program");
        Copied(dir)
    }

    fn command(&self, command: &Command) -> Command {
        copied(command, self.0.join("program"))
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Returns a name in `dir` that no other test uses.
fn fresh_path(dir: &Path) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    dir.join(format!("pumice-test-{}-{number}", std::process::id()))
}
