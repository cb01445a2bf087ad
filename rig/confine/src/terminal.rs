//! A program on a pseudo-terminal, as a person would run it.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::check;

/// A program that runs on a terminal of its own. Dropping it kills the program.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    child: Child,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// Starts a command on a terminal of this many rows and columns.
    ///
    /// # Panics
    /// Panics if there is no pseudo-terminal, or if the program cannot be started.
    pub fn run(command: &mut Command, rows: u16, columns: u16) -> Terminal {
        let (mut master, mut slave) = (-1, -1);
        let size = size(rows, columns);
        // SAFETY: the two numbers are writable, and the size is readable; the other pointers may be null.
        let opened = unsafe {
            libc::openpty(
                &raw mut master,
                &raw mut slave,
                std::ptr::null_mut(),
                std::ptr::null(),
                &raw const size,
            )
        };
        check(opened).expect("a pseudo-terminal");
        // SAFETY: both are new descriptors, which nobody else closes.
        let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        let copy = || slave.try_clone().expect("another descriptor");
        command.stdin(copy()).stdout(copy()).stderr(copy());
        // SAFETY: two system calls between fork and exec; descriptor 0 is the terminal then.
        unsafe {
            command.pre_exec(|| {
                check(libc::setsid())?;
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))
            });
        }
        let child = command
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let shown = Arc::<Mutex<Vec<u8>>>::default();
        let (mut source, sink) = (
            master.try_clone().expect("a descriptor"),
            Arc::clone(&shown),
        );
        thread::spawn(move || {
            let mut piece = [0; 4096];
            // An error is the end, because nobody has the other side open.
            while let Ok(n @ 1..) = source.read(&mut piece) {
                let mut shown = sink.lock().unwrap_or_else(PoisonError::into_inner);
                shown.extend_from_slice(&piece[..n]);
            }
        });
        Terminal {
            master,
            child,
            shown,
        }
    }

    /// Types keys.
    ///
    /// # Panics
    /// Panics if the terminal is closed.
    pub fn type_keys(&mut self, keys: &str) {
        self.master
            .write_all(keys.as_bytes())
            .expect("the terminal");
    }

    /// Gives the terminal another size, which the kernel reports to the program by SIGWINCH, and
    /// forgets what was shown.
    ///
    /// # Panics
    /// Panics if the terminal is closed.
    pub fn resize(&mut self, rows: u16, columns: u16) {
        self.forget();
        let size = size(rows, columns);
        // SAFETY: the size is readable.
        let done =
            unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        check(done).expect("another size");
    }

    /// Forgets what was shown so far.
    pub fn forget(&mut self) {
        self.shown
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    /// Returns what was shown, with the control sequences.
    #[must_use]
    pub fn shown(&self) -> String {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&shown).into_owned()
    }

    /// Waits until a text is shown.
    ///
    /// # Panics
    /// Panics if it is not shown within `patience`.
    pub fn wait_for(&self, text: &str, patience: Duration) {
        let start = Instant::now();
        while !self.shown().contains(text) {
            assert!(
                start.elapsed() < patience,
                "no {text:?} after {patience:?}: {:?}",
                self.shown()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Returns the number of the process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end of the program.
    ///
    /// # Panics
    /// Panics if it runs longer than `patience`.
    pub fn end(&mut self, patience: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(start.elapsed() < patience, "it goes on: {:?}", self.shown());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether the terminal accepts lines and shows what is typed, as a shell needs it.
    ///
    /// # Errors
    /// Fails when the system does.
    pub fn is_cooked(&self) -> io::Result<bool> {
        // SAFETY: all bits zero are a value of this plain structure, which the call fills.
        let mut settings: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the structure is writable.
        check(unsafe { libc::tcgetattr(self.master.as_raw_fd(), &raw mut settings) })?;
        Ok(settings.c_lflag & (libc::ICANON | libc::ECHO) == libc::ICANON | libc::ECHO)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn size(rows: u16, columns: u16) -> libc::winsize {
    libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
