//! `pumice ls|cat|rm|mv|df|stat|mkdir|rmdir`: the files of a BlobFS that nobody has mounted. What a process has mounted, `ls`,
//! `df` and `stat` ask that process for.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use pumice_bdev::BdevError;
use pumice_bdev_control::terminal::{print, print_json, visible};
use pumice_bdev_control::{complain, say};
use pumice_blobfs::fs::{Access, FileSystem, FsError, MountOptions, OpenOptions, Stat};
use serde_json::{Value, json};

use crate::access::{Change, Mode, mounted, on_device};
use crate::failure::{Failure, fail};
use crate::holder::Holder;
use crate::signals;

/// Number of bytes that are copied at once.
pub const CHUNK: usize = 1 << 20;

/// List directories, or show files
#[derive(Args)]
pub struct Ls {
    /// Device
    uri: String,
    /// Paths in the file system; `/` by default
    paths: Vec<String>,
    /// List directories recursively
    #[arg(short = 'R', long)]
    recursive: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Print files
#[derive(Args)]
pub struct Cat {
    /// Device
    uri: String,
    /// Paths in the file system
    #[arg(required = true)]
    paths: Vec<String>,
}

/// Remove files
#[derive(Args)]
pub struct Rm {
    #[command(flatten)]
    change: Change,
    /// Device
    uri: String,
    /// Paths in the file system
    #[arg(required = true)]
    paths: Vec<String>,
    /// Remove directories with their content
    #[arg(short, long)]
    recursive: bool,
    /// Ignore files that do not exist
    #[arg(short, long)]
    force: bool,
}

/// Rename a file or a directory; replaces an existing file
#[derive(Args)]
pub struct Mv {
    #[command(flatten)]
    change: Change,
    /// Device
    uri: String,
    /// Current path
    from: String,
    /// New path, or a directory to move it into
    to: String,
}

/// Show the used and free space of the file system
#[derive(Args)]
pub struct Df {
    /// Device
    uri: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Show all properties of files
#[derive(Args)]
pub struct StatArgs {
    /// Device
    uri: String,
    /// Paths in the file system; `/` by default
    paths: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Make directories
#[derive(Args)]
pub struct Mkdir {
    #[command(flatten)]
    change: Change,
    /// Device
    uri: String,
    /// Paths in the file system
    #[arg(required = true)]
    paths: Vec<String>,
    /// Also make missing parents, and accept existing directories
    #[arg(short, long)]
    parents: bool,
}

/// Remove empty directories
#[derive(Args)]
pub struct Rmdir {
    #[command(flatten)]
    change: Change,
    /// Device
    uri: String,
    /// Paths in the file system
    #[arg(required = true)]
    paths: Vec<String>,
}

type Outcome = Result<(), Failure>;

fn ended(command: &str, result: Outcome) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(command, &e),
    }
}

/// The source of the answers of commands that change nothing.
enum Source<'a> {
    Mounted(&'a FileSystem),
    /// Another process has it mounted.
    Process(Holder),
}

impl Source<'_> {
    fn stat(&mut self, path: &str) -> Result<Value, Failure> {
        match self {
            Source::Mounted(fs) => Ok(as_json(path, &fs.stat(path)?)),
            Source::Process(holder) => holder.ask("pumice_get_file", &json!({ "path": path })),
        }
    }

    /// Returns the content of a directory.
    fn files(&mut self, dir: &str) -> Result<Vec<Value>, Failure> {
        match self {
            Source::Mounted(fs) => {
                let names = fs
                    .list(dir)?
                    .into_iter()
                    .map(|entry| join(dir, &entry.name));
                names
                    .map(|path| Ok(as_json(&path, &fs.stat(&path)?)))
                    .collect()
            }
            Source::Process(holder) => {
                match holder.ask("pumice_get_files", &json!({ "path": dir }))? {
                    Value::Array(files) => Ok(files),
                    _ => Err("the process answers with something else".to_owned().into()),
                }
            }
        }
    }

    fn statfs(&mut self) -> Result<Value, Failure> {
        match self {
            Source::Mounted(fs) => {
                let s = fs.statfs();
                Ok(json!({
                    "device": fs.device_name(),
                    "total_bytes": s.total,
                    "free_bytes": s.free,
                    "used_bytes": s.used,
                    "journal_bytes": s.journal,
                    "host_free_bytes": s.host_free,
                    "cluster_size": s.cluster,
                    "files": s.files,
                    "md_pages": s.md_pages,
                    "md_pages_used": s.md_pages_used,
                }))
            }
            Source::Process(holder) => holder.ask("pumice_get_statfs", &Value::Null),
        }
    }
}

/// Mounts to read, or asks the process that has the device, and says so.
fn looked<R>(
    uri: &str,
    f: impl FnOnce(&mut Source<'_>) -> Result<R, Failure>,
) -> Result<R, Failure> {
    let how = pumice_bdev::OpenOptions::new().read_only(true);
    let dev = match pumice_bdev::open_with(uri, how) {
        Ok(dev) => dev,
        Err(BdevError::InUse {
            device,
            pid: Some(pid),
        }) => {
            let Some(holder) = Holder::find(&device, pid) else {
                let e = BdevError::InUse {
                    device,
                    pid: Some(pid),
                };
                return Err(Failure::from(format!(
                    "{e}; a process that opens it with `DbOptions::rpc_socket` can be asked"
                )));
            };
            complain!("pumice: {device}: process {pid} has it and answers");
            return f(&mut Source::Process(holder));
        }
        Err(e) => return Err(e.into()),
    };
    let opts = MountOptions::default().read_only(true);
    on_device(uri, dev, &opts, |fs| f(&mut Source::Mounted(fs)))
}

/// Formats a number of bytes for people.
pub fn human(bytes: u64) -> String {
    let mut unit = "B";
    let mut whole = bytes;
    let mut rest = 0;
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if whole < 1024 {
            break;
        }
        rest = whole % 1024;
        whole /= 1024;
        unit = next;
    }
    if rest == 0 || whole >= 100 {
        format!("{whole} {unit}")
    } else {
        format!("{whole}.{} {unit}", rest * 10 / 1024)
    }
}

/// Formats a time in UTC. It converts days to a date by counting from March (the calendar repeats
/// after 400 years).
fn date(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    if seconds == 0 {
        return "-".to_owned();
    }
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year + era * 400 + u64::from(month <= 2);
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {h:02}:{m:02}:{s:02}")
}

fn as_json(path: &str, s: &Stat) -> Value {
    json!({
        "path": path,
        "type": if s.is_dir { "directory" } else { "file" },
        "length": s.len,
        "allocated": s.allocated,
        "links": s.links,
        "mode": s.mode.map(|mode| format!("{mode:04o}")),
        "modified_ns": s.mtime.duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)),
        "blob": s.blob_id.map(|id| id.to_string()),
    })
}

fn text<'a>(file: &'a Value, key: &str) -> &'a str {
    file[key].as_str().unwrap_or_default()
}

fn number(file: &Value, key: &str) -> u64 {
    file[key].as_u64().unwrap_or(0)
}

fn is_dir(file: &Value) -> bool {
    text(file, "type") == "directory"
}

fn modified(file: &Value) -> String {
    date(UNIX_EPOCH + Duration::from_nanos(number(file, "modified_ns")))
}

/// Returns the path of a name in `dir`.
pub fn join(dir: &str, name: &str) -> String {
    format!("{}/{name}", dir.trim_end_matches('/'))
}

/// Returns `path` and everything below it, directories before their content.
pub fn walk(fs: &FileSystem, path: &str) -> Result<Vec<(String, bool)>, Failure> {
    let is_dir = fs.stat(path)?.is_dir;
    let mut found = vec![(path.to_owned(), is_dir)];
    let mut at = 0;
    while at < found.len() {
        let (dir, is_dir) = found[at].clone();
        if is_dir {
            for e in fs.list(&dir)? {
                found.push((join(&dir, &e.name), e.is_dir));
            }
        }
        at += 1;
    }
    Ok(found)
}

fn or_root(paths: &[String]) -> Vec<String> {
    if paths.is_empty() {
        vec!["/".to_owned()]
    } else {
        paths.to_vec()
    }
}

/// Returns the entries below `path`, each directory before its content.
fn listed(source: &mut Source<'_>, path: &str, recursive: bool) -> Result<Vec<Value>, Failure> {
    let top = source.stat(path)?;
    if !is_dir(&top) {
        return Ok(vec![top]);
    }
    let mut found = source.files(path)?;
    let mut at = 0;
    while recursive && at < found.len() {
        if is_dir(&found[at]) {
            let dir = text(&found[at], "path").to_owned();
            found.extend(source.files(&dir)?);
        }
        at += 1;
    }
    Ok(found)
}

/// Runs `pumice ls`.
pub fn ls(args: &Ls) -> ExitCode {
    let list = |source: &mut Source<'_>| {
        let mut all = Vec::new();
        for path in or_root(&args.paths) {
            all.extend(listed(source, &path, args.recursive)?);
        }
        Ok(all)
    };
    let result = looked(&args.uri, list).map(|files| {
        if args.json {
            print_json(&Value::Array(files));
            return;
        }
        let len = |file: &Value| number(file, "length").to_string();
        let width = files.iter().map(|file| len(file).len()).max().unwrap_or(0);
        let line = |file: &Value| {
            let end = if is_dir(file) { "/" } else { "" };
            let (modified, path) = (modified(file), visible(text(file, "path")));
            format!("{:>width$}  {modified:19}  {path}{end}\n", len(file))
        };
        print(&files.iter().map(line).collect::<String>());
    });
    ended("ls", result)
}

/// Runs `pumice cat`.
pub fn cat(args: &Cat) -> ExitCode {
    let result = mounted(&args.uri, Mode::Read, |fs| {
        let mut out = std::io::stdout().lock();
        let mut buf = vec![0; CHUNK];
        for path in &args.paths {
            let f = fs.open(path, OpenOptions::READ)?;
            f.advise(Access::Sequential);
            let mut at = 0;
            loop {
                let n = f.read_at(at, &mut buf)?;
                if n == 0 {
                    break;
                }
                match out.write_all(&buf[..n]) {
                    Ok(()) => at += n as u64,
                    // The reader of the pipe has stopped reading.
                    Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
                    Err(e) => return Err(Failure::from(format!("standard output: {e}"))),
                }
            }
        }
        out.flush()
            .map_err(|e| Failure::from(format!("standard output: {e}")))
    });
    ended("cat", result)
}

/// Runs `pumice rm`.
pub fn rm(args: &Rm) -> ExitCode {
    let result = mounted(&args.uri, args.change.mode(), |fs| {
        for path in &args.paths {
            let stat = match fs.stat(path) {
                Ok(stat) => stat,
                Err(FsError::NotFound { .. }) if args.force => continue,
                Err(e) => return Err(e.into()),
            };
            if stat.is_dir && !args.recursive {
                return Err(Failure::from(format!(
                    "{path}: is a directory; remove it with -r"
                )));
            }
            for (p, is_dir) in walk(fs, path)?.iter().rev() {
                signals::check()?;
                match (is_dir, p.as_str()) {
                    (true, "/") => {}
                    (true, p) => fs.rmdir(p)?,
                    (false, p) => fs.unlink(p)?,
                }
            }
        }
        Ok(())
    });
    ended("rm", result)
}

/// Runs `pumice mv`.
pub fn mv(args: &Mv) -> ExitCode {
    let result = mounted(&args.uri, args.change.mode(), |fs| {
        let into = fs.stat(&args.to).is_ok_and(|s| s.is_dir);
        let base = args
            .from
            .trim_end_matches('/')
            .rsplit('/')
            .next()
            .unwrap_or_default();
        let to = if into {
            join(&args.to, base)
        } else {
            args.to.clone()
        };
        Ok(fs.rename(&args.from, &to)?)
    });
    ended("mv", result)
}

/// Runs `pumice df`.
pub fn df(args: &Df) -> ExitCode {
    let ask = |source: &mut Source<'_>| {
        let mut answer = source.statfs()?;
        if let Value::Object(figures) = &mut answer {
            figures.insert("device".to_owned(), args.uri.clone().into());
        }
        Ok(answer)
    };
    let result = looked(&args.uri, ask).map(|s| {
        if args.json {
            print_json(&s);
            return;
        }
        let (used, total) = (number(&s, "used_bytes"), number(&s, "total_bytes"));
        say!("device          {}", args.uri);
        say!("total           {}", human(total));
        say!(
            "used            {} ({} %)",
            human(used),
            used.saturating_mul(100) / total.max(1)
        );
        say!("free            {}", human(number(&s, "free_bytes")));
        say!("journal         {}", human(number(&s, "journal_bytes")));
        if let Some(host) = s["host_free_bytes"].as_u64() {
            say!("room below      {}", human(host));
        }
        say!("cluster         {}", human(number(&s, "cluster_size")));
        say!("files           {}", number(&s, "files"));
        let (pages, pages_used) = (number(&s, "md_pages"), number(&s, "md_pages_used"));
        say!("metadata pages  {pages_used} of {pages} used");
    });
    ended("df", result)
}

/// Runs `pumice stat`.
pub fn stat(args: &StatArgs) -> ExitCode {
    let look = |source: &mut Source<'_>| {
        let paths = or_root(&args.paths);
        paths.iter().map(|path| source.stat(path)).collect()
    };
    let result = looked(&args.uri, look).map(|all: Vec<Value>| {
        if args.json {
            print_json(&Value::Array(all));
            return;
        }
        for file in all {
            say!("path       {}", visible(text(&file, "path")));
            say!("type       {}", visible(text(&file, "type")));
            say!("length     {} bytes", number(&file, "length"));
            say!("allocated  {}", human(number(&file, "allocated")));
            say!("links      {}", number(&file, "links"));
            say!("mode       {}", file["mode"].as_str().unwrap_or("not set"));
            say!("modified   {}", modified(&file));
            say!(
                "blob       {}",
                visible(file["blob"].as_str().unwrap_or("none"))
            );
        }
    });
    ended("stat", result)
}

/// Runs `pumice mkdir`.
pub fn mkdir(args: &Mkdir) -> ExitCode {
    let result = mounted(&args.uri, args.change.mode(), |fs| {
        for path in &args.paths {
            if !args.parents {
                fs.mkdir(path)?;
                continue;
            }
            let mut at = String::new();
            for part in path.split('/').filter(|p| !p.is_empty()) {
                at = format!("{at}/{part}");
                if !fs.stat(&at).is_ok_and(|s| s.is_dir) {
                    fs.mkdir(&at)?;
                }
            }
        }
        Ok(())
    });
    ended("mkdir", result)
}

/// Runs `pumice rmdir`.
pub fn rmdir(args: &Rmdir) -> ExitCode {
    let result = mounted(&args.uri, args.change.mode(), |fs| {
        args.paths.iter().try_for_each(|p| Ok(fs.rmdir(p)?))
    });
    ended("rmdir", result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_dates_for_people() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(1023), "1023 B");
        assert_eq!(human(1536), "1.5 KiB");
        assert_eq!(human(1 << 20), "1 MiB");
        assert_eq!(human(u64::MAX), "16383 PiB");
        let at = |s| date(UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "-");
        assert_eq!(at(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(at(1_795_000_000), "2026-11-18 11:06:40");
        assert_eq!(at(4_107_542_399), "2100-02-28 23:59:59");
    }

    #[test]
    fn paths_are_joined() {
        assert_eq!(join("/", "a"), "/a");
        assert_eq!(join("/d", "a"), "/d/a");
    }
}
