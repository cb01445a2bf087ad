//! The file system below RocksDB: the kernel's, RocksDB's memory env, or ours.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use pumice::Inspection;
use pumice_rocksdb_tools::Files;
use serde::Serialize;

use super::flags::Flags;
use super::ours::Ours;
use super::report::IoCount;
use super::workload::Workload;

/// Directory of a database without `--db`, except in the kernel's file system.
const DEFAULT_DB: &str = "/dbbench";

/// The guarantee of a completed write.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Durability {
    /// A description.
    pub words: String,
    /// Whether a synced write survives power loss.
    pub sync_is_durable: bool,
    /// Whether the device may hold completed writes in a cache that loses its content without
    /// power, so that a sync has to flush it. `None` if that is unknown.
    pub write_cache: Option<bool>,
}

/// A file system ready for a database.
pub struct Target {
    /// `pumice`, `kernel`, `mem`, or `uri` for what RocksDB's own flag names.
    pub env: &'static str,
    /// The files that RocksDB's tool uses.
    pub files: Files,
    /// Directory of the database, for `--db`.
    pub db: String,
    /// Description of the file system.
    pub words: String,
    /// The guarantee of a completed write.
    pub durability: Durability,
    /// Our file system, if it is used.
    pub ours: Option<Ours>,
    /// The mount of the kernel's file system, if it is used.
    mount: Option<Mount>,
}

impl Target {
    /// Lets others look at our file system, as the flags say, until this is dropped.
    ///
    /// # Errors
    /// Returns a text for the user.
    pub fn inspection(&self, f: &Flags) -> Result<Option<Inspection>, String> {
        if f.metrics.is_empty() && f.rpc_socket.is_empty() {
            return Ok(None);
        }
        let ours = self.ours.as_ref().ok_or_else(|| {
            "--metrics and --rpc_socket show Pumice's file system; they need --env=pumice"
                .to_owned()
        })?;
        let mut inspection = Inspection::new(ours.fs());
        if !f.metrics.is_empty() {
            let made = inspection.metrics(&f.metrics);
            inspection = made.map_err(|e| format!("--metrics: {}", pumice::chain(&e)))?;
        }
        if !f.rpc_socket.is_empty() {
            let made = inspection.rpc_socket(Path::new(&f.rpc_socket));
            inspection = made.map_err(|e| format!("--rpc_socket: {}", pumice::chain(&e)))?;
        }
        Ok(Some(inspection))
    }

    /// Opens the file system that the flags choose.
    ///
    /// # Errors
    /// Returns a text for the user.
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

    /// Returns the number of device operations so far, if they can be counted.
    #[must_use]
    pub fn io(&self) -> Option<IoCount> {
        match &self.ours {
            Some(o) => Some(o.io()),
            None => self.mount.as_ref().and_then(Mount::io),
        }
    }

    /// Ends the use in order. The databases must be closed.
    ///
    /// # Errors
    /// Returns a text for the user.
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

/// Opens what RocksDB's own `--fs_uri` or `--env_uri` names.
fn named(f: &Flags, workload: &Workload, uri: &str) -> Result<Target, String> {
    if !(f.device.is_empty() && f.spdk.is_empty()) {
        return Err(format!(
            "--device or --spdk, and RocksDB's own {uri}: give one of them"
        ));
    }
    if f.env != Flags::default().env {
        return Err(format!(
            "--env={}, and RocksDB's own {uri}: give one of them",
            f.env
        ));
    }
    Ok(Target {
        env: "uri",
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
        env: "kernel",
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
        env: "mem",
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
        env: "pumice",
        files: Files::Pumice(ours.fs().clone()),
        db: or_default(&workload.db),
        words: ours.to_string(),
        durability: ours.durability(),
        ours: Some(ours),
        mount: None,
    })
}

/// Makes the user's own directory for databases in a place where everybody may make names. One that
/// another user made, or may write to, is refused, because RocksDB follows the links that it finds
/// there.
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
    // This looks at the name itself, not at the target of a link.
    let meta = std::fs::symlink_metadata(&dir).map_err(|e| fail(&e.to_string()))?;
    if !meta.is_dir() {
        return Err(fail("it is not a directory"));
    }
    if meta.uid() != me || meta.mode() & 0o022 != 0 {
        return Err(fail("another user made it, or may write to it"));
    }
    Ok(dir)
}

/// A mount of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `ext4`, `xfs`, `tmpfs`, …
    pub kind: String,
    /// The device, as mount names it.
    pub source: String,
    /// The mount point.
    pub point: String,
    /// `major:minor`.
    pub device: String,
}

impl Mount {
    /// Returns the mount that holds `path`.
    ///
    /// # Errors
    /// Fails if the path cannot be resolved, or if no mount is listed for it.
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

    /// Parses one line of mountinfo (proc(5)).
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

    /// Returns the number of operations of the block device so far, whoever requested them
    /// (kernel's Documentation/block/stat.rst).
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

    /// Whether the kernel says that the block device has a volatile write cache.
    #[must_use]
    pub fn write_cache(&self) -> Option<bool> {
        let dir = Path::new("/sys/dev/block").join(&self.device);
        // A partition has no queue, but its parent has.
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
        // Another user may write there.
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(own_directory(temp.path()).unwrap_err().contains("--db"));
        // A link to a directory of one's own may be another user's choice.
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
        for env in ["mem", "kernel"] {
            let f = Flags {
                env: env.into(),
                ..Flags::default()
            };
            let refused = Target::open(&f, &named).err().unwrap();
            assert!(refused.contains(&format!("--env={env}, and")), "{refused}");
        }
        assert_eq!(Target::open(&Flags::default(), &named).unwrap().env, "uri");
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
