//! The file system below RocksDB: the kernel's, RocksDB's memory env, or ours.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use pumice_rocksdb_tools::Files;
use serde::Serialize;

use super::flags::Flags;
use super::ours::Ours;
use super::report::IoCount;
use super::workload::Workload;

/// Where a database is when `--db` says nothing, but in the kernel's file system.
const DEFAULT_DB: &str = "/dbbench";

/// What a completed write is worth.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Durability {
    /// In words.
    pub words: String,
    /// A synced write survives power loss.
    pub sync_is_durable: bool,
    /// The device may hold completed writes in a cache of its own that loses power: a sync has to
    /// flush it. `None` when that is not known.
    pub write_cache: Option<bool>,
}

/// A file system ready for a database.
pub struct Target {
    /// Given to RocksDB's tool.
    pub files: Files,
    /// The database's directory, for `--db`.
    pub db: String,
    /// The file system in words.
    pub words: String,
    /// What a completed write is worth.
    pub durability: Durability,
    /// Set where the file system is ours.
    pub ours: Option<Ours>,
    /// The kernel's block device below.
    mount: Option<Mount>,
}

impl Target {
    /// Makes ready what the flags ask for.
    ///
    /// # Errors
    /// In words for the user.
    pub fn open(f: &Flags, workload: &Workload) -> Result<Self, String> {
        if let Some(uri) = &workload.uri {
            return named(f, workload, uri);
        }
        match &f.env[..] {
            "kernel" => kernel(workload),
            "mem" => memory(workload),
            _ => ours(f, workload),
        }
    }

    /// Device operations so far, where they can be counted.
    #[must_use]
    pub fn io(&self) -> Option<IoCount> {
        match &self.ours {
            Some(o) => Some(o.io()),
            None => self.mount.as_ref().and_then(Mount::io),
        }
    }

    /// Ends it in order. The databases must be closed.
    ///
    /// # Errors
    /// In words for the user.
    pub fn close(self) -> Result<(), String> {
        self.ours.map_or(Ok(()), Ours::close)
    }
}

fn or_default(db: &str) -> String {
    if db.is_empty() {
        DEFAULT_DB.to_owned()
    } else {
        db.to_owned()
    }
}

/// What RocksDB's own `--fs_uri` or `--env_uri` names.
fn named(f: &Flags, workload: &Workload, uri: &str) -> Result<Target, String> {
    if !(f.device.is_empty() && f.spdk.is_empty()) {
        return Err(format!(
            "--device or --spdk, and RocksDB's own {uri}: give one of them"
        ));
    }
    Ok(Target {
        files: Files::Kernel,
        db: workload.db.clone(),
        words: format!("what {uri} names"),
        durability: Durability {
            words: "not known".to_owned(),
            sync_is_durable: false,
            write_cache: None,
        },
        ours: None,
        mount: None,
    })
}

fn kernel(workload: &Workload) -> Result<Target, String> {
    let db = if workload.db.is_empty() {
        own_directory(&std::env::temp_dir())?
    } else {
        PathBuf::from(&workload.db)
    };
    let fail = |e: &dyn std::fmt::Display| format!("--db={}: {e}", db.display());
    if !workload.db.is_empty() {
        std::fs::create_dir_all(&db).map_err(|e| fail(&e))?;
    }
    let mount = Mount::of(&db).map_err(|e| fail(&e))?;
    let device = mount.write_cache();
    let memory = matches!(mount.kind.as_str(), "tmpfs" | "ramfs");
    let words = if memory {
        "nothing survives power loss: the file system is memory".to_owned()
    } else {
        let sync = if workload.use_fsync {
            "fsync"
        } else {
            "fdatasync"
        };
        let cache = match device {
            Some(true) => "the device has a volatile write cache, which the kernel flushes",
            Some(false) => "the device has no volatile write cache",
            None => "the device's write cache is not known",
        };
        format!(
            "a synced write by {sync}; {cache}; other writes reach the device when the kernel writes them back"
        )
    };
    Ok(Target {
        files: Files::Kernel,
        words: format!(
            "kernel's {} on {} at {}",
            mount.kind, mount.source, mount.point
        ),
        db: db.display().to_string(),
        durability: Durability {
            words,
            sync_is_durable: !memory,
            write_cache: device,
        },
        ours: None,
        mount: Some(mount),
    })
}

fn memory(workload: &Workload) -> Result<Target, String> {
    if workload.use_existing_db {
        return Err(
            "--use_existing_db with --env=mem: memory holds no database from before".to_owned(),
        );
    }
    Ok(Target {
        files: Files::Memory,
        db: or_default(&workload.db),
        words: "RocksDB's memory env".to_owned(),
        durability: Durability {
            words: "nothing survives the end of the process".to_owned(),
            sync_is_durable: false,
            write_cache: None,
        },
        ours: None,
        mount: None,
    })
}

fn ours(f: &Flags, workload: &Workload) -> Result<Target, String> {
    if workload.simulates_a_disk {
        return Err(
            "RocksDB simulates disks on the kernel's file system only; give --env=kernel as well"
                .to_owned(),
        );
    }
    let ours = Ours::open(f, workload)?;
    Ok(Target {
        files: Files::Pumice(ours.fs().clone()),
        db: or_default(&workload.db),
        words: ours.to_string(),
        durability: ours.durability(),
        ours: Some(ours),
        mount: None,
    })
}

/// The user's own directory for databases in a place where everybody may make names. One that
/// somebody else made, or may write to, is refused: RocksDB follows the links that it finds there.
fn own_directory(temp: &Path) -> Result<PathBuf, String> {
    let me = std::fs::metadata("/proc/self")
        .map_err(|e| format!("/proc/self: {e}"))?
        .uid();
    let dir = temp.join(format!("dbbench-{me}"));
    let fail = |what: &str| {
        format!(
            "{}: {what}; name a directory of your own with --db",
            dir.display()
        )
    };
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(fail(&e.to_string()));
        }
        _ => {}
    }
    // Of the name itself: not of what a link leads to.
    let meta = std::fs::symlink_metadata(&dir).map_err(|e| fail(&e.to_string()))?;
    if !meta.is_dir() {
        return Err(fail("it is not a directory"));
    }
    if meta.uid() != me || meta.mode() & 0o022 != 0 {
        return Err(fail("another user made it, or may write to it"));
    }
    Ok(dir)
}

/// Where a directory of the kernel's is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `ext4`, `xfs`, `tmpfs`, …
    pub kind: String,
    /// The device, as mount names it.
    pub source: String,
    /// Where.
    pub point: String,
    /// `major:minor`.
    pub device: String,
}

impl Mount {
    /// The mount that holds `path`.
    ///
    /// # Errors
    /// The path cannot be resolved, or no mount is listed for it.
    pub fn of(path: &Path) -> std::io::Result<Self> {
        let full = path.canonicalize()?;
        let table = std::fs::read_to_string("/proc/self/mountinfo")?;
        table
            .lines()
            .filter_map(Self::parse)
            .filter(|m| full.starts_with(&m.point))
            .max_by_key(|m| m.point.len())
            .ok_or_else(|| std::io::Error::other("not in /proc/self/mountinfo"))
    }

    /// One line of mountinfo (proc(5)).
    fn parse(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<&str> = left.split(' ').collect();
        let mut right = right.split(' ');
        Some(Self {
            device: (*left.get(2)?).to_owned(),
            point: left.get(4)?.replace("\\040", " "),
            kind: right.next()?.to_owned(),
            source: right.next()?.to_owned(),
        })
    }

    /// What the block device did so far, whoever asked for it (kernel's
    /// Documentation/block/stat.rst).
    #[must_use]
    pub fn io(&self) -> Option<IoCount> {
        let file = Path::new("/sys/dev/block").join(&self.device).join("stat");
        let text = std::fs::read_to_string(file).ok()?;
        let n: Vec<u64> = text
            .split_whitespace()
            .map_while(|w| w.parse().ok())
            .collect();
        const SECTOR: u64 = 512;
        Some(IoCount {
            reads: *n.first()?,
            read_bytes: n.get(2)? * SECTOR,
            writes: *n.get(4)?,
            write_bytes: n.get(6)? * SECTOR,
            flushes: n.get(15).copied().unwrap_or(0),
            whole_device: true,
        })
    }

    /// Whether the block device has a volatile write cache, as the kernel knows it.
    #[must_use]
    pub fn write_cache(&self) -> Option<bool> {
        let dir = Path::new("/sys/dev/block").join(&self.device);
        // A partition has no queue of its own; its parent has.
        let text = [
            dir.join("queue/write_cache"),
            dir.join("../queue/write_cache"),
        ]
        .iter()
        .find_map(|p| std::fs::read_to_string(p).ok())?;
        Some(text.trim() == "write back")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines() {
        let m = Mount::parse(
            "36 35 98:0 /mnt1 /mnt\\040two rw,noatime master:1 - ext3 /dev/root rw,errors=continue",
        );
        let m = m.unwrap();
        assert_eq!((m.kind.as_str(), m.source.as_str()), ("ext3", "/dev/root"));
        assert_eq!((m.point.as_str(), m.device.as_str()), ("/mnt two", "98:0"));
        assert!(Mount::parse("nonsense").is_none());
        assert!(!Mount::of(Path::new("/")).unwrap().kind.is_empty());
    }

    #[test]
    fn the_directory_for_everybodys_names_is_the_users_own() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let temp = tempfile::tempdir().unwrap();
        let dir = own_directory(temp.path()).unwrap();
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        assert_eq!(own_directory(temp.path()).unwrap(), dir, "found again");
        // Somebody else may write there.
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(own_directory(temp.path()).unwrap_err().contains("--db"));
        // A link to a directory of one's own is somebody else's choice.
        std::fs::remove_dir(&dir).unwrap();
        let elsewhere = temp.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, &dir).unwrap();
        let refused = own_directory(temp.path()).unwrap_err();
        assert!(refused.contains("not a directory"), "{refused}");
        assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);
    }

    #[test]
    fn another_users_directory_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let me = std::fs::metadata("/proc/self").unwrap().uid();
        let dir = temp.path().join(format!("dbbench-{me}"));
        std::fs::create_dir(&dir).unwrap();
        if std::os::unix::fs::chown(&dir, Some(65534), None).is_err() {
            println!("skipped: another_users_directory_is_refused: needs root");
            return;
        }
        let refused = own_directory(temp.path()).unwrap_err();
        assert!(refused.contains("another user"), "{refused}");
    }

    #[test]
    fn two_choices_of_a_file_system_are_refused() {
        let f = Flags {
            device: "malloc://64M".into(),
            ..Flags::default()
        };
        let named = Workload {
            uri: Some("--fs_uri=posix://".into()),
            ..Workload::default()
        };
        let refused = Target::open(&f, &named).err().unwrap();
        assert!(refused.contains("give one"), "{refused}");
        let simulated = Workload {
            simulates_a_disk: true,
            ..Workload::default()
        };
        let refused = Target::open(&f, &simulated).err().unwrap();
        assert!(refused.contains("--env=kernel"), "{refused}");
    }

    #[test]
    fn the_memory_env_says_that_nothing_lasts() {
        let f = Flags {
            env: "mem".into(),
            ..Flags::default()
        };
        let t = Target::open(&f, &Workload::default()).unwrap();
        assert!(!t.durability.sync_is_durable);
        assert_eq!(t.db, "/dbbench");
        let again = Workload {
            use_existing_db: true,
            ..Workload::default()
        };
        assert!(Target::open(&f, &again).is_err());
    }
}
