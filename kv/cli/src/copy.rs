//! `pumice cp`: copies between BlobFS and the kernel's file system, and within BlobFS.

use std::fs::{self, File as KernelFile};
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use pumice_bdev_control::complain;
use pumice_bdev_control::terminal::{print_json, visible};
use pumice_blobfs::fs::{Access, File, FileSystem, FsError, OpenOptions, UNFINISHED};
use serde_json::json;

use crate::access::{Change, Mode, mounted};
use crate::failure::{Failure, fail};
use crate::files::{CHUNK, human, join, walk};
use crate::signals;

/// Copy files into, out of, and within the file system
///
/// Paths in the file system begin with a colon, other paths are the kernel's, and `-` is standard
/// input or output: `pumice cp disk.img :/db/CURRENT .` and `pumice cp disk.img -r backup :/db`. A
/// file in the file system is replaced when the new one is complete.
#[derive(Args)]
pub struct Cp {
    #[command(flatten)]
    change: Change,
    /// Device
    uri: String,
    /// Files and directories to copy
    #[arg(required = true, num_args = 1..)]
    from: Vec<String>,
    /// Destination: a path for one file, or a directory
    to: String,
    /// Copy directories with their content
    #[arg(short, long)]
    recursive: bool,
    /// Print JSON when done, and no progress
    #[arg(long)]
    json: bool,
    /// Print no progress
    #[arg(short, long)]
    quiet: bool,
}

/// A path, in one of the file systems.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Ours(String),
    Kernel(PathBuf),
    /// Standard input or output.
    Stream,
}

impl Place {
    fn parse(text: &str) -> Place {
        if text == "-" {
            return Place::Stream;
        }
        match text.strip_prefix(':') {
            Some("") => Place::Ours("/".to_owned()),
            Some(path) => Place::Ours(path.to_owned()),
            None => Place::Kernel(PathBuf::from(text)),
        }
    }

    fn base(&self) -> Result<String, Failure> {
        let base = match self {
            Place::Ours(p) => p
                .trim_end_matches('/')
                .rsplit('/')
                .next()
                .map(str::to_owned),
            Place::Stream => {
                let text = "-: standard input has no name; say which file it becomes, as :/db/file";
                return Err(Failure::from(text.to_owned()));
            }
            Place::Kernel(p) => match p.canonicalize() {
                Ok(full) => full.file_name().map(|n| n.to_string_lossy().into_owned()),
                Err(e) => return Err(kernel_error(p, &e)),
            },
        };
        Ok(base.unwrap_or_default())
    }

    fn is_dir(&self, fs: &FileSystem) -> bool {
        match self {
            Place::Ours(p) => fs.stat(p).is_ok_and(|s| s.is_dir),
            Place::Kernel(p) => p.is_dir(),
            Place::Stream => false,
        }
    }

    fn child(&self, name: &str) -> Place {
        match self {
            Place::Ours(p) => Place::Ours(join(p, name)),
            Place::Kernel(p) => Place::Kernel(p.join(name)),
            Place::Stream => Place::Stream,
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Ours(p) => f.write_str(p),
            Place::Kernel(p) => p.display().fmt(f),
            Place::Stream => f.write_str("-"),
        }
    }
}

/// Creates or empties a file in the kernel's file system. Only its user can read a new one, since
/// an image is private.
///
/// # Errors
/// Returns the system's error, and refuses an image that somebody has open, which may be the one that is read.
pub fn create_private(path: &Path) -> std::io::Result<KernelFile> {
    let file = KernelFile::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    if file.metadata()?.is_file() {
        pumice_bdev::file::lock_unused(&file)?;
        file.set_len(0)?;
    }
    Ok(file)
}

fn kernel_error(path: &Path, e: &std::io::Error) -> Failure {
    Failure::from(format!("{}: {e}", path.display()))
}

/// One file or directory to copy.
struct Job {
    from: Place,
    to: Place,
    is_dir: bool,
    len: u64,
}

/// Runs the command.
pub fn cp(args: &Cp) -> ExitCode {
    let to = Place::parse(&args.to);
    if to == Place::Stream && args.json {
        let text = "--json and - both write to standard output; leave one of them out";
        return fail("cp", &Failure::from(text.to_owned()));
    }
    let mode = match to {
        Place::Ours(_) => args.change.mode(),
        _ => Mode::Read,
    };
    let result = mounted(&args.uri, mode, |fs| copy(fs, args, &to));
    match result {
        Ok((files, bytes)) => {
            if args.json {
                print_json(&json!({"files": files, "bytes": bytes}));
            } else if !args.quiet {
                complain!("{files} files, {}", human(bytes));
            }
            ExitCode::SUCCESS
        }
        Err(e) => fail("cp", &e),
    }
}

fn copy(fs: &FileSystem, args: &Cp, to: &Place) -> Result<(u64, u64), Failure> {
    let into = to.is_dir(fs);
    if args.from.len() > 1 && !into {
        return Err(Failure::from(format!("{}: not a directory", args.to)));
    }
    let mut jobs = Vec::new();
    for text in &args.from {
        let from = Place::parse(text);
        if !matches!((&from, to), (Place::Ours(_), _) | (_, Place::Ours(_))) {
            let text = format!(
                "{text}: neither path is in the file system; those begin with a colon, as :/db"
            );
            return Err(Failure::from(text));
        }
        let base = if into { from.base()? } else { String::new() };
        let target = if base.is_empty() {
            to.clone()
        } else {
            to.child(&base)
        };
        plan(fs, &from, &target, args.recursive, &mut jobs)?;
    }
    let total = jobs.iter().map(|j| j.len).sum();
    let bar = progress(total, args);
    let mut files = 0;
    for job in &jobs {
        signals::check()?;
        bar.set_message(visible(&job.to.to_string()));
        files += u64::from(!job.is_dir);
        run_job(fs, job, &bar)?;
    }
    bar.finish_and_clear();
    Ok((files, bar.position()))
}

fn progress(total: u64, args: &Cp) -> ProgressBar {
    if args.quiet || args.json || !std::io::stderr().is_terminal() {
        let bar = ProgressBar::hidden();
        bar.set_length(total);
        return bar;
    }
    let style = "{bar:30} {bytes:>10} of {total_bytes} {binary_bytes_per_sec:>12} {wide_msg}";
    ProgressBar::new(total).with_style(
        ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
    )
}

fn plan(
    fs: &FileSystem,
    from: &Place,
    to: &Place,
    recursive: bool,
    jobs: &mut Vec<Job>,
) -> Result<(), Failure> {
    let refuse = |name: String| {
        Err(Failure::from(format!(
            "{name}: is a directory; copy it with -r"
        )))
    };
    match from {
        Place::Stream => jobs.push(Job {
            from: Place::Stream,
            to: to.clone(),
            is_dir: false,
            len: 0,
        }),
        Place::Ours(path) => {
            let found = walk(fs, path)?;
            if found[0].1 && !recursive {
                return refuse(path.clone());
            }
            if found[0].1 && *to == Place::Stream {
                let text = format!("{path}: is a directory; only files can go to standard output");
                return Err(Failure::from(text));
            }
            let root = path.trim_end_matches('/');
            // The content of a directory that is copied into itself was listed before it grew.
            for (p, is_dir) in found {
                let rest = p[root.len().min(p.len())..].trim_start_matches('/');
                let target = if rest.is_empty() {
                    to.clone()
                } else {
                    to.child(rest)
                };
                let len = if is_dir { 0 } else { fs.stat(&p)?.len };
                jobs.push(Job {
                    from: Place::Ours(p),
                    to: target,
                    is_dir,
                    len,
                });
            }
        }
        Place::Kernel(path) => {
            let meta = fs::metadata(path).map_err(|e| kernel_error(path, &e))?;
            let (is_dir, is_file) = (meta.is_dir(), meta.is_file());
            if is_dir && !recursive {
                return refuse(path.display().to_string());
            }
            if !is_dir && !is_file {
                return Err(Failure::from(format!(
                    "{}: neither file nor directory",
                    path.display()
                )));
            }
            let len = if is_file { meta.len() } else { 0 };
            jobs.push(Job {
                from: from.clone(),
                to: to.clone(),
                is_dir,
                len,
            });
            if is_dir {
                let entries = fs::read_dir(path).map_err(|e| kernel_error(path, &e))?;
                let mut names = Vec::new();
                for entry in entries {
                    names.push(entry.map_err(|e| kernel_error(path, &e))?.file_name());
                }
                names.sort();
                for name in names {
                    let Some(name) = name.to_str() else {
                        let text =
                            format!("{}: {}: name is not UTF-8", path.display(), name.display());
                        return Err(Failure::from(text));
                    };
                    plan(fs, &from.child(name), &to.child(name), recursive, jobs)?;
                }
            }
        }
    }
    Ok(())
}

fn run_job(fs: &FileSystem, job: &Job, bar: &ProgressBar) -> Result<(), Failure> {
    match (&job.from, &job.to) {
        (_, Place::Ours(to)) if job.is_dir => {
            if fs.stat(to).is_ok_and(|s| s.is_dir) {
                Ok(())
            } else {
                Ok(fs.mkdir(to)?)
            }
        }
        (_, Place::Kernel(to)) if job.is_dir => match fs::create_dir(to) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists && to.is_dir() => Ok(()),
            result => result.map_err(|e| kernel_error(to, &e)),
        },
        (Place::Kernel(from), Place::Ours(to)) => {
            let source = KernelFile::open(from).map_err(|e| kernel_error(from, &e))?;
            replace(fs, to, |target| take_in(source, from, target, bar))
        }
        (Place::Stream, Place::Ours(to)) => {
            let name = Path::new("standard input");
            replace(fs, to, |target| {
                take_in(Input::standard(), name, target, bar)
            })
        }
        (Place::Ours(from), Place::Stream) => {
            let mut out = std::io::stdout().lock();
            let name = Path::new("standard output");
            each_chunk(fs, from, bar, |bytes| {
                out.write_all(bytes).map_err(|e| kernel_error(name, &e))
            })?;
            out.flush().map_err(|e| kernel_error(name, &e))
        }
        (Place::Ours(from), Place::Kernel(to)) => {
            let mut target = create_private(to).map_err(|e| kernel_error(to, &e))?;
            each_chunk(fs, from, bar, |bytes| {
                target.write_all(bytes).map_err(|e| kernel_error(to, &e))
            })?;
            target.sync_all().map_err(|e| kernel_error(to, &e))
        }
        (Place::Ours(from), Place::Ours(to)) => {
            if fs.exists(to)? && fs.same_file(from, to)? {
                return Err(Failure::from(format!("{from} and {to} are the same file")));
            }
            replace(fs, to, |target| {
                each_chunk(fs, from, bar, |bytes| Ok(target.append(bytes)?))
            })
        }
        (from, _) => Err(Failure::from(format!("{from}: not in the file system"))),
    }
}

/// Makes the file `to` in one step: it gets its name when it is complete and durable. An earlier
/// file of the name stays if that fails.
fn replace(
    fs: &FileSystem,
    to: &str,
    fill: impl FnOnce(&File) -> Result<(), Failure>,
) -> Result<(), Failure> {
    // Everything that the rename would refuse is refused before anything is copied.
    let dir = to.trim_end_matches('/').rsplit_once('/');
    if let Some((dir, _)) = dir
        && !fs.stat(dir)?.is_dir
    {
        return Err(FsError::NotDir { path: dir.into() }.into());
    }
    if fs.stat(to).is_ok_and(|s| s.is_dir) {
        return Err(FsError::IsDir { path: to.into() }.into());
    }
    let of_file = |e: Failure| Failure::from(format!("{to}: {e}"));
    let opened = fs.open(UNFINISHED, OpenOptions::FRESH);
    let target = opened.map_err(|e| of_file(e.into()))?;
    let filled = fill(&target).and_then(|()| Ok(target.sync()?));
    drop(target);
    let done = filled
        .and_then(|()| Ok(fs.rename(UNFINISHED, to)?))
        .map_err(of_file);
    if done.is_err()
        && let Err(e) = fs.unlink(UNFINISHED)
    {
        complain!("pumice cp: {UNFINISHED} could not be removed: {e}");
    }
    done
}

/// Standard input, read by a thread of its own, so that the caller can react to a signal while it
/// waits.
pub struct Input {
    chunks: Receiver<std::io::Result<Vec<u8>>>,
    rest: Vec<u8>,
}

impl Input {
    /// Starts to read.
    pub fn standard() -> Input {
        let (sender, chunks) = sync_channel(2);
        std::thread::spawn(move || {
            loop {
                let mut chunk = vec![0; CHUNK];
                let read = std::io::stdin().lock().read(&mut chunk);
                let read = read.map(|n| {
                    chunk.truncate(n);
                    chunk
                });
                let over = match &read {
                    Ok(chunk) => chunk.is_empty(),
                    // A signal does not end the input.
                    Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                    Err(_) => true,
                };
                if sender.send(read).is_err() || over {
                    return;
                }
            }
        });
        Input {
            chunks,
            rest: Vec::new(),
        }
    }
}

impl Read for Input {
    /// Reads as any reader does. Returns `Interrupted` from time to time while nothing comes.
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        if self.rest.is_empty() {
            self.rest = match self.chunks.recv_timeout(Duration::from_millis(50)) {
                Ok(chunk) => chunk?,
                Err(RecvTimeoutError::Timeout) => return Err(ErrorKind::Interrupted.into()),
                Err(RecvTimeoutError::Disconnected) => Vec::new(),
            };
        }
        let n = self.rest.len().min(buf.len());
        buf[..n].copy_from_slice(&self.rest[..n]);
        self.rest.drain(..n);
        Ok(n)
    }
}

/// Appends all of `source` to `target`.
fn take_in(
    mut source: impl Read,
    name: &Path,
    target: &File,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let mut buf = vec![0; CHUNK];
    loop {
        signals::check()?;
        match source.read(&mut buf) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                target.append(&buf[..n])?;
                bar.inc(n as u64);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(kernel_error(name, &e)),
        }
    }
}

fn each_chunk(
    fs: &FileSystem,
    from: &str,
    bar: &ProgressBar,
    mut sink: impl FnMut(&[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let source = fs.open(from, OpenOptions::READ)?;
    source.advise(Access::Sequential);
    let mut buf = vec![0; CHUNK];
    let mut at = 0;
    loop {
        signals::check()?;
        let n = source.read_at(at, &mut buf)?;
        if n == 0 {
            return Ok(());
        }
        sink(&buf[..n])?;
        at += n as u64;
        bar.inc(n as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_path_it_is() {
        assert_eq!(Place::parse(":/a/b"), Place::Ours("/a/b".to_owned()));
        assert_eq!(Place::parse(":"), Place::Ours("/".to_owned()));
        assert_eq!(Place::parse("-"), Place::Stream);
        assert_eq!(Place::parse("./-"), Place::Kernel(PathBuf::from("./-")));
        assert_eq!(Place::parse("a/b"), Place::Kernel(PathBuf::from("a/b")));
        assert_eq!(
            Place::Ours("/".to_owned()).child("x"),
            Place::Ours("/x".to_owned())
        );
    }
}
